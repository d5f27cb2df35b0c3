"""What a judge is shown and what it said: text in, text or a verdict out.

A verdict has to stand on a line of its own form, `Verdict: A` or `Score: 85`. Any other reply gives None, and so do two
verdicts that differ; the judge is then asked again.
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

    The tags carry a hash of all the texts, so no text can close its own tag and speak as if it stood outside. What looks
    like a placeholder inside a text stays as it is.
    """
    mark = hashlib.sha256("\0".join(texts.values()).encode(errors="replace")).hexdigest()[:8]

    def fenced(match: re.Match) -> str:
        return f"<{match[1]}-{mark}>\n{texts[match[1]]}\n</{match[1]}-{mark}>"

    return re.sub(r"\{(" + "|".join(texts) + r")\}", fenced, template)


# --- the verdict ----------------------------------------------------------------------------------------------------

START = r"(?:^|[.!?;])[^\w\n]*(?:(?:my|the|final|overall)\s+)*"  # of a line or a sentence
TIE = r"(?:(?:it's|it is)\s+)?(?:an?\s+)?(?P<tie>tie|draw)\b"
LETTER = r"(?:(?:the\s+)?(?:response|answer|assistant)\s*)?[\[({]*(?P<letter>[abc])"
LETTER_END = r"(?=[ \t]*(?:$|[.,;:!)\]}<>]|[-–—]\s|(?:because|since)\b))"
RANGE = r"(?:\s*\([^)\n]*\)|\s+out\s+of\s+100)?"  # "Score (0-100): 85", "Score out of 100: 85"
OF_100 = r"(?:\s*(?:(?:/|out\s+of)\s*100\b|%|points?\b))?"
NUMBER = rf"(?P<score>\d{{1,3}}(?:\.\d+)?){OF_100}(?![\w%/-]|[.,]\d|\s*(?:-|–|/|to\b|out\b))"


def side(reply: str) -> str | None:
    """The verdict in a judge's reply: "A", "B" or "tie" (a judge may call it C); None if there is none, or more than one."""
    found = _marked(reply, "verdict", rf"(?:{TIE}|{LETTER}){LETTER_END}")
    verdicts = {(match["letter"] or "c").upper() for match in found}
    return verdicts.pop().replace("C", "tie") if len(verdicts) == 1 else None


def score(reply: str) -> float | None:
    """The grade in a judge's reply, 0 to 100; None if there is none, more than one, or one out of range."""
    found = _marked(reply, "score|grade|rating|verdict", NUMBER, after=RANGE)
    grades = {float(match["score"]) for match in found}
    return grades.pop() if len(grades) == 1 and max(grades) <= 100 else None


def _marked(reply: str, words: str, value: str, after: str = "") -> list[re.Match]:
    """The values that follow one of `words` at the start of a line or a sentence; if there is no such word, those that
    are a line of their own."""
    reply = re.sub(r"(?is)<think>.*?(</think>|$)", "", reply)  # what a reasoning model thinks aloud is no verdict
    text = re.sub(r"[*_`#\"“”„«»‘’]|(?<!\w)'|'(?!\w)", "", reply)  # markdown's marks and quotation marks
    marker = rf"(?im){START}(?:{words})\b{after}\s*(?:is\b|[:=>])?"
    if re.search(marker, text):
        return list(re.finditer(rf"{marker}[:=\s]*{value}", text))
    return list(re.finditer(rf"(?im)^[ \t\[({{]*{value}[.!\])}}> \t]*$", text))
