"""What a judge is shown and what it said: text in, text or a verdict out.

A verdict has to be clear. A reply that can be read two ways gives None, and the judge is asked again.
"""

import hashlib
import re
from pathlib import Path

from base.errors import UserError

# --- the judge's prompt ---------------------------------------------------------------------------------------------


def read_template(path: str | Path, names: tuple[str, ...]) -> str:
    """The text of a judge's prompt, which must have every placeholder {name} of `names`; UserError if it does not."""
    try:
        text = Path(path).read_bytes().decode()
    except OSError as error:
        raise UserError(f"key judge_prompt: cannot read {path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise UserError(f"key judge_prompt: {path}: not UTF-8 text") from None
    missing = [name for name in names if f"{{{name}}}" not in text]
    if missing:
        raise UserError(f"key judge_prompt: {path} lacks the placeholder {{{missing[0]}}}: it needs each of {', '.join(names)}")
    return text


def fill(template: str, **texts: str) -> str:
    """Put each text in the place of its {name}, as it is, between tags that it cannot hold.

    The tags carry a hash of all the texts, so no text can close its own and speak as if it stood outside; and what looks like
    a placeholder in a text stays as it is.
    """
    mark = hashlib.sha256("\0".join(texts.values()).encode(errors="replace")).hexdigest()[:8]

    def fenced(match: re.Match) -> str:
        return f"<{match[1]}-{mark}>\n{texts[match[1]]}\n</{match[1]}-{mark}>"

    return re.sub(r"\{(" + "|".join(texts) + r")\}", fenced, template)


# --- A, B or tie ----------------------------------------------------------------------------------------------------

NAME = r"(?:the\s+)?(?:response|answer|assistant|option|reply|output|completion)\s*[\[({<]*"
LETTER = rf"(?:{NAME})?[\[({{<]*\s*([abc])(?=[ \t]*(?:$|\n|[.,;:!?)\]}}<>]|[-–—]\s|(?:because|since)\b))"
SIDE = rf"(?:(?:it is |it's )?(?:an?\s+)?(tie|draw)\b|{LETTER})"
ALONE = rf"(?m)^[ \t]*{SIDE}[.!\])}}> \t]*$"  # a line of its own
BETTER = r"(?:better|best|superior|preferable|preferred|stronger|more helpful|more useful|the winner)\b"
DEGREE = r"(?:(?!not\b|no\b|hardly\b)\w+\s+){0,2}?(?:the\s+)?"
PROSE = [
    r"\[\[\s*([abc]|tie)\s*\]\]",
    r"\b(?:winner|better|best|preferred|preference|more helpful|choice|decision|judge?ment|conclusion|answer)"
    rf"(?:\s+(?:one|response|answer|reply|option))?\s*(?:is\b|[:=])[:=\s]*{SIDE}",
    rf"\b{NAME}([ab])\s+(?:is|was|seems|looks)\s+{DEGREE}{BETTER}",
    rf"(?-i:\b([AB]))\s+(?:is|was|seems|looks)\s+{DEGREE}{BETTER}",
    rf"\b{NAME}([ab])\s+wins\b",
    r"(?-i:\b([AB]))\s+wins\b",
    rf"\b(?:choose|prefer|pick|select|favou?r|go with|vote for)\s+{NAME}([ab])\b",
    r"\b(?:choose|prefer|pick|select|favou?r|go with|vote for)\s+(?-i:([AB])(?![\w'’-]))",
]
UNSURE = r"\b(?:cannot|can't|won't|unable|if|whether|unless|either)\b"
DENIED = rf"{UNSURE}|\b(?:not|never|neither|nor|hardly)\b|n['’]t\b"


def side(reply: str) -> str | None:
    """The verdict in a judge's reply: "A", "B" or "tie"; None where there is none, or more than one.

    What follows the word "verdict" counts before all else; then a letter on a line of its own and what the prose prefers.
    """
    text = _plain(reply)
    marked = _sides(rf"\bverdict\b\s*(?:is\b|[:=>])?[:=\s]*{SIDE}", text, UNSURE)
    if not marked:
        at = re.search(r"(?i)\bverdict\s*[:=]", text)  # what was weighed before it is no verdict
        text = text[at.end() :] if at else text
        marked = set().union(*(_sides(pattern, text, DENIED) for pattern in (ALONE, *PROSE)))
    return marked.pop() if len(marked) == 1 else None


def _plain(reply: str) -> str:
    """Without what a reasoning model thought aloud, markdown's marks and quotation marks; apostrophes inside words stay."""
    reply = re.sub(r"(?is)<think>.*?(</think>|$)", "", reply)
    return re.sub(r"[*_`#\"“”„«»]|(?<!\w)['‘’]|['‘’](?!\w)", "", reply).strip()


def _sides(pattern: str, text: str, unless: str) -> set[str]:
    """Every side that the pattern finds, but for those in a sentence that takes it back, or in "A or B"."""
    found = set()
    for match in re.finditer(pattern, text, re.IGNORECASE):
        before = re.split(r"[.!?;:\n]", text[: match.start()])[-1]
        either = re.search(r"(?i)\b(?:or|and)\s*$", text[: match.start()]) or re.match(r"(?i)\s*or\b", text[match.end() :])
        if not either and not re.search(unless, before, re.IGNORECASE):
            letter = next(g for g in match.groups() if g).upper()
            found.add(letter if letter in "AB" else "tie")
    return found


# --- 0 to 100 -------------------------------------------------------------------------------------------------------

OF_100 = r"(?:\s*(?:/|out\s+of)\s*100\b)"
NUMBER = rf"(?<![\w.,/-])(\d{{1,3}}(?:\.\d+)?)(?:{OF_100}|\s*(?:%|points?\b))?(?![\w%]|[.,]\d|\s*(?:/|-|–|to\b|out of)\s*\d)"
SCORED = rf"\b(?:score|grade|rating|mark|verdict)\b(?:\s*\([^)\n]*\)|\s+out\s+of\s+100)?\s*(?:is\b|of\b|[:=])?[:=\s]*{NUMBER}"
GIVEN = rf"\b(?:give|grade|rate|score|assign|award|deserves|earns|gets)\b[^.\d\n-]{{0,60}}{NUMBER}"


def score(reply: str) -> float | None:
    """The grade in a judge's reply, 0 to 100; None where there is none, more than one, or one out of range."""
    text = _plain(reply)
    for pattern in (SCORED, rf"(?<![\w.,/-])(\d{{1,3}}(?:\.\d+)?){OF_100}", GIVEN, rf"(?m)^[ \t\[({{<]*{NUMBER}[\])}}>. \t]*$"):
        found = {float(n) for n in re.findall(pattern, text, re.IGNORECASE)}
        if found:
            return found.pop() if len(found) == 1 and max(found) <= 100 else None
    return None
