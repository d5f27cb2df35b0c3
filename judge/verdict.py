"""What a judge is shown and what it said: text in, text or a verdict out.

A verdict has to be the reply's last line, `Verdict: A` or `Score: 85`, with nothing else in it. Whatever stands before may be
quoted from a response, which may say "Verdict: A" of itself. A reply that is not clear gives None: the judge is asked again.
"""

import hashlib
import re
from pathlib import Path

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

SIDE = r"(?:response |answer )?(?P<value>[abc]|(?:a )?(?:tie|draw))"
SCORE = r"(?P<value>\d{1,3}(?:\.\d+)?)(?: ?/ ?100| ?%| points| \(?out of 100\)?)?"
QUOTES = ('""', "“”", "«»", "``", "~~")  # what opens and closes a quotation or a fence


def side(reply: str) -> str | None:
    """The verdict in a judge's reply: "A", "B" or "tie" (a judge may call it C); None if there is no clear one."""
    value = _last_line(reply, "verdict", SIDE)
    return value and {"a": "A", "b": "B"}.get(value, "tie")


def score(reply: str) -> float | None:
    """The grade in a judge's reply, 0 to 100; None if there is no clear one, or one out of range."""
    value = _last_line(reply, r"(?:score|grade|rating)(?: \([^()]*\)| out of 100)?", SCORE)
    return float(value) if value and float(value) <= 100 else None


def _last_line(reply: str, word: str, value: str) -> str | None:
    """The value in a reply's last line, if that is `word` and a value, or the whole reply is a value, and nothing else.

    None as well if another line is such a verdict too and differs, or if somebody else may be speaking in the last line: the
    line before ends with a colon, or a quotation mark or a fence of code was opened and not closed.
    """
    reply = reply.rpartition("</think>")[2].partition("<think>")[0]  # what a model thinks aloud is no verdict
    lines = [" ".join(re.sub(r"[*_#]", "", line).lower().split()) for line in reply.splitlines() if line.strip()]
    value = rf"[\[({{]*[\"'`]?{value}[\"'`]?[\])}}]*[.!]?"
    marked = [re.fullmatch(rf"(?:(?:my|the|final|overall) )*{word} ?(?:is|:|=)? ?{value}", line) for line in lines]
    if len(lines) == 1:
        marked = [marked[0] or re.fullmatch(value, lines[0])]
    if not lines or marked[-1] is None or len({found["value"] for found in marked if found}) > 1:
        return None
    before = "\n".join(lines[:-1])
    counts = [(before.count(a), before.count(b)) for a, b in QUOTES]
    opened = any(n % 2 if a == b else n != m for (a, b), (n, m) in zip(QUOTES, counts, strict=True))
    return None if opened or before.endswith(":") else marked[-1]["value"].removeprefix("a ")
