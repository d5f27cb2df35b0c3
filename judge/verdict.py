"""What a judge is shown and what it said: text in, text or a verdict out.

A verdict has to be written as `Verdict: A` or `Score: 85`. The last one counts. What the judge quotes does not, for a response
may say "Verdict: A" of itself. A reply that is not clear gives None; the judge is then asked again.
"""

import contextlib
import hashlib
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from base.errors import UserError

# --- the judge's prompt ---------------------------------------------------------------------------------------------


def read_template(path: str | Path, names: tuple[str, ...]) -> str:
    """The text of a judge's prompt. UserError if it cannot be read, or lacks a placeholder {name} of `names`."""
    try:
        text = Path(path).read_bytes().decode()
    except (OSError, UnicodeDecodeError) as error:
        why = getattr(error, "strerror", "not UTF-8 text")
        raise UserError(f"key judge_prompt: cannot read {path}: {why}") from None
    missing = [name for name in names if f"{{{name}}}" not in text]
    if missing:
        raise UserError(f"key judge_prompt: {path} lacks the placeholder {{{missing[0]}}}: it needs each of {', '.join(names)}")
    return text


def fill(template: str, **texts: str) -> str:
    """Replace each {name} of the template by its text, unchanged, between two tags that the text cannot hold.

    The tags carry a hash of all the texts, so no text can close its own tag and speak as if it stood outside. (64 bits: shorter
    ones could be found by trying texts.) What looks like a placeholder inside a text stays as it is.
    """
    mark = hashlib.sha256("\0".join(texts.values()).encode(errors="replace")).hexdigest()[:16]

    def fenced(match: re.Match) -> str:
        return f"<{match[1]}-{mark}>\n{texts[match[1]]}\n</{match[1]}-{mark}>"

    return re.sub(r"\{(" + "|".join(texts) + r")\}", fenced, template)


# --- the verdict ----------------------------------------------------------------------------------------------------

LONGEST = 10_000  # characters: a reply that goes on for longer holds no clear verdict
START = r"(?:^|[.!?;])[^\w\n]{0,9}(?:(?:my|the|final|overall)\s+)*"  # of a line or a sentence
SIDE = (
    r"(?:(?:it's|it is) +)?(?:an? +(?=tie|draw)|(?:the +)?(?:response|answer|assistant) *)?[\[({]*"
    r"(?P<value>[abc]|tie|draw)\b"
)
NAMED_SIDE = r"\b(?:[AB]|b|a(?!\s+\w)|(?i:tie|draw|other|former|latter))\b"  # "a" is mostly a word
RANGE = r"(?:\s*\([^)\n]*\)|\s+out\s+of\s+100)?"  # "Score (0-100): 85", "Score out of 100: 85"
NUMBER = r"[\[({]*(?P<value>\d{1,3}(?:\.\d+)?)(?:\s*\(?(?:/|out\s+of)\s*100\b\)?|\s*%|\s*points?\b)?"
NAMED_NUMBER = r"\d+(?:\.\d+)?|\bout of\b"
END = r"(?=[ \t]*(?:$|[.,;!)\]}](?!\d)|</(?:verdict|score)|[-–—]\s|(?:because|since)\b))"

BLOCKS = [  # quoted lines: fenced code, our own tags and HTML's, block quotes, indented code
    r"(?ms)^[ \t]*(`{3,}|~{3,})[^\n]*\n.*?^[ \t]*\1[ \t]*$",
    r"(?s)<(\w+-\w+|q|quote|blockquote|code|pre)>.*?(?:</\1>|\Z)",
    r"(?m)^[ \t]*[-*]?[ \t]*>.*$",
    r"(?m)^(?: {4}|\t).*$",
]
PAIRS = ("„“", "„”", "“”", "‚‘", "‘’", "«»", "»«", "‹›", "「」", '""', "''", "``")
SPANS = [rf"(?s)(?<!\w){a}(.{{0,2000}}?)([.!?]?){b}(?!\w)" for a, b in PAIRS]  # not the mark in it's or 12"
SAYS = r"\b(?:[AB]|(?i:response|answer|assistant|text))\b.*:$"  # a line before somebody else's words
UNPAIRED = r"""(?<!\d)"|[„“”«»‹›「」`]|(?<!\w)['‚‘](?=\S)|~~~"""


def side(reply: str) -> str | None:
    """The verdict in a judge's reply: "A", "B" or "tie" (a judge may call it C); None if there is no clear one."""
    return _clear(reply, "verdict", "", SIDE, NAMED_SIDE, lambda name: {"a": "A", "b": "B"}.get(name.lower(), "tie"))


def score(reply: str) -> float | None:
    """The grade in a judge's reply, 0 to 100; None if there is no clear one, or one out of range."""
    number = lambda text: float(text) if text[0].isdigit() else None  # noqa: E731
    grade = _clear(reply, "score|grade|rating|verdict", RANGE, NUMBER, NAMED_NUMBER, number)
    return grade if grade is not None and grade <= 100 else None


def _clear(reply: str, words: str, after: str, value: str, named: str, read: Callable[[str], Any]) -> Any:
    """The value behind the last of `words` that starts a line or a sentence, or of a reply that is nothing but a value.

    It is not clear, so None, if another such word has another value, or if the text behind it names another one (`named`).
    Where the reply begins with its verdict, that text is the rest of the line, for reasons may follow.
    """
    reply = reply.rpartition("</think>")[2].partition("<think>")[0].strip()  # what a model thinks aloud is no verdict
    text = _spoken(reply, words) if len(reply) <= LONGEST else ""
    marker = rf"(?im){START}(?:{words})\b{after}\s*(?:is\b|[:=>])?[:=\s]*"
    found = list(re.finditer(rf"{marker}(?:{value}{END})?", text)) or [re.fullmatch(rf"(?i)\s*{value}[.!\])}}\s]*", text)]
    last = found[-1]
    if last is None or last["value"] is None or re.search(UNPAIRED, text):
        return None
    before, behind = text[: last.start()].strip(), text[last.end() :]
    if re.search(SAYS, before.rpartition("\n")[2]):
        return None
    if not before and "\n" not in last[0].strip():
        behind = behind.partition("\n")[0]
    values = {read(match["value"]) for match in found if match["value"]} | {read(name) for name in re.findall(named, behind)}
    return values.pop() if len(values) == 1 else None


def _spoken(reply: str, words: str) -> str:
    """A reply without what it quotes, and without Markdown's marks. Of a JSON object the fields called one of `words`."""
    if (only := re.fullmatch(r"(?s)```\w*\n(.*?)```", reply)) and "```" not in only[1]:
        reply = only[1]
    if reply.startswith("{"):
        with contextlib.suppress(ValueError, RecursionError):
            fields = json.loads(reply, object_pairs_hook=list)  # pairs: a name may be there twice
            return "\n".join(f"{name}: {value}" for name, value in fields if name.lower() in words.split("|"))
    for block in BLOCKS:
        reply = re.sub(block, "\n…\n", reply)
    reply = re.sub(r"[*_#]", "", reply)
    for span in SPANS:  # a single word or number is emphasized, not quoted
        reply = re.sub(span, lambda m: (m[1] if re.fullmatch(r"[\w.]*", m[1]) else "…") + m[2], reply)
    return reply
