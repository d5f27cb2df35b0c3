"""Is a given answer the right one?

    plain_equal(r"\\frac{1}{2}", "0.5")          -> True
    plain_equal("18", "18 dollars")              -> True
    plain_equal(r"\\sqrt{12}", r"2\\sqrt{3}")     -> False, that is algebra; verify_equal says True

There are two graders. `plain` compares numbers, fractions, percentages, amounts with units, and lists of these by value; it
compares everything else as text, after it removed what is only layout in LaTeX. `math_verify` (the package math-verify,
optional) does algebra too. docs/math.md shows where the two differ on real answers.
"""

import functools
import importlib.util
import re
from collections.abc import Callable
from fractions import Fraction

from base.errors import UserError
from data.math_problems import extract
from selftrain.sandbox import Refused, run_program

LONGEST = 300  # characters: a longer answer is compared as text
NUMBER = r"[-+]?(?:\d{1,3}(?:,\d{3})+|\d+)?(?:\.\d+|(?<=\d)\.?)"


# --- plain: equal answers have one normal form ----------------------------------------------------------------------------

SPACING = re.compile(r"\\(?:left|right|bigl?|bigr?|quad|qquad|displaystyle|limits)(?![a-zA-Z])|\\[!,;: ]|~")
TEXT = re.compile(r"\\(?:text|mbox|mathrm)\s*\{([^{}]*)\}")
STYLED = re.compile(r"\\(?:textbf|textit|mathbf|operatorname|mathrm(?=\s*\{\w\}))\s*\{([^{}]*)\}")  # not a unit: the answer
OR = re.compile(r"(?<![a-z])(?:or|and)(?![a-z])", re.I)
# words that change an amount, as a unit does not: 5 million, 2 pi, 3 to 4, 7 or more
MEANS = re.compile(
    r"(?<![a-z])(?:or|and|to|hundred|thousand|[mbtr]+illion|dozen|pi|sqrt|root|sin|cos|tan|log|ln|exp|mod|over|times|plus"
    r"|minus|more|less|than|[xyzabnk]{2,3}|if|for|not|e|i)(?![a-z])",
    re.I,
)
UNIT = re.compile(
    rf"^({NUMBER}(?:\s*/\s*\d+|\s+\d+/\d+)?)\s+(?![ap]m\b)[a-z]{{2,}}(?:[a-z .²³/-]|\^?[23](?!\d))*$", re.I
)  # 18 dollars, 5 cm^2
ASSIGNED = re.compile(r"^\s*(?:[a-zA-Z]|[a-zA-Z]\([a-zA-Z]\))\s*=\s*(?=[^=]+$)")  # x = 5, f(x) = 2x
FRAC = re.compile(r"\\frac(?:\{([-+]?\d+)\}|(\d))(?:\{([-+]?\d+)\}|(\d))(?![,.\s]*\d)")
POWER = re.compile(rf"^({NUMBER})(?:\\times|\\cdot|\*|x)10\^\{{?([-+]?\d{{1,3}})\}}?$")


@functools.lru_cache(maxsize=100_000)
def normal(text: str) -> str | Fraction | tuple:
    """An answer's normal form: a number, a tuple for a list, or a text without white space. Equal answers have equal forms.

    A percentage becomes the number before its sign, an amount with a unit the amount. The parts of a list keep their order
    inside brackets and are sorted elsewhere.
    """
    text = text.strip()
    if len(text) > LONGEST:
        return text
    text = re.sub(r"^(?:\\\(|\\\[|\$+)|(?:\\\)|\\\]|(?<!\\)\$+)$", "", text).strip()
    text = re.sub(r"(?<=[\d,])\\[!,](?=\d{3}(?!\d))", "", text)  # 10,\!000
    text = SPACING.sub(" ", text).replace("{,}", ",").replace("−", "-").replace("\\$", "").replace("$", "")
    text = re.sub(r"\^\s*\{?\s*\\circ\s*\}?|\\degrees?|°|[£€]|\\?%", "", text)
    text = re.sub(r"\\[dt]frac", r"\\frac", text)
    text = STYLED.sub(r"\1", text)
    text = TEXT.sub(lambda m: m[0] if not MEANS.search(m[1]) else "," if OR.fullmatch(m[1].strip()) else f" {m[1]} ", text)
    bare = TEXT.sub(" ", text).strip()
    text = bare if re.search(r"\d|\\", bare) else TEXT.sub(r"\1", text)  # a unit goes, a word that is the whole answer stays
    text = ASSIGNED.sub("", text.strip()).rstrip(".").strip()
    if (unit := UNIT.match(text)) and not MEANS.search(text):
        text = unit[1]
    spaced, text = text, re.sub(r"\s+", "", text)
    if (number := as_number(spaced)) is not None:
        return number
    start, inner, end = re.fullmatch(r"(\(|\[|\\\{|)(.*?)(\)|\]|\\\}|)", text, re.S).groups()
    parts = _split(inner if start and end else text)
    if len(parts) > 1 and all(parts):
        forms = [normal(part) for part in parts]
        names = [part.partition("=")[0] if ASSIGNED.match(part) else "" for part in parts]
        if len(set(names)) > 1:  # x = 3, y = 5
            forms = list(zip(names, forms, strict=True))
        ordered = end and start in ("(", "[")
        return (start, *forms, end) if ordered else ("{", *sorted(forms, key=repr), "}")
    text = re.sub(r"\\frac(\d)(\d)", r"\\frac{\1}{\2}", text)
    text = re.sub(r"\\sqrt(\d)", r"\\sqrt{\1}", text)
    text = re.sub(r"(?<=\d)(?:\\cdot|\*)(?=\d)", "·", text).replace("\\cdot", "").replace("*", "")  # 2 * 3x is not 23x
    text = re.sub(r"^\((\w)\)$", r"\1", re.sub(r"([\^_])\{(\w)\}", r"\1\2", text))  # (C) is C
    return text if "\\" in text else text.lower()


def _split(text: str) -> list[str]:
    """Parts between commas that stand in no bracket."""
    parts, depth = [""], 0
    for letter in text:
        depth += (letter in "([{") - (letter in ")]}")
        if letter == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += letter
    return parts


def as_number(text: str) -> Fraction | None:
    """The exact value of an integer, a decimal, a fraction (also mixed: 12 3/5, 12\\frac{3}{5}) or a * 10^b; else None."""
    text = re.sub(r"\s*(\\frac|[{}])\s*", r"\1", text.strip())
    text = FRAC.sub(r" \1\2/\3\4", text).strip()
    mixed = re.fullmatch(r"([-+]?)(\d+) +(\d+)/(\d+)", text)
    if mixed and int(mixed[4]):
        value = int(mixed[2]) + Fraction(int(mixed[3]), int(mixed[4]))
        return -value if mixed[1] == "-" else value
    text = re.sub(r"(?<=\d) (?=\d{3}(?!\d))", "", text)  # 10 000
    if re.search(r"\d,?\s+\d", text):  # two numbers
        return None
    text = re.sub(r"\s+", "", text)
    text = re.sub(r"^([-+]?)\((.*)\)$", r"\1\2", text) if "," not in text else text
    if re.fullmatch(NUMBER, text):
        return Fraction(text.replace(",", "").rstrip("."))
    if (parts := re.fullmatch(rf"({NUMBER})/({NUMBER})", text)) and (below := as_number(parts[2])):
        return as_number(parts[1]) / below
    if power := POWER.match(text):
        return as_number(power[1]) * Fraction(10) ** int(power[2])
    return None


def plain_equal(answer: str, given: str) -> bool:
    """Whether the two have one normal form. Where only one of them has a % sign, 50% equals 0.5 as well as 50."""
    right, found = normal(answer), normal(given)
    if isinstance(right, Fraction) and isinstance(found, Fraction) and ("%" in answer) != ("%" in given):
        return right == found or right == (found * 100 if "%" in answer else found / 100)
    return right == found


# --- math-verify ----------------------------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=100_000)
def verify_equal(answer: str, given: str) -> bool:
    """Whether math-verify takes the two as equal. Both go in between dollars, so that it reads them as LaTeX."""
    import math_verify

    def parsed(text: str) -> list:
        return math_verify.parse(f"${text.strip().strip('$')}$")

    return bool(math_verify.verify(parsed(answer), parsed(given)))


def equality(grader: str) -> tuple[str, Callable[[str, str], bool]]:
    """(name, equal(answer, given)) of the grader plain, math_verify or auto, which is math_verify where it is installed.

    Raises UserError for math_verify where it is not installed.
    """
    installed = importlib.util.find_spec("math_verify") is not None
    if grader == "math_verify" and not installed:
        raise UserError("key grader: math-verify is not installed: pip install math-verify, or take plain")
    return ("math_verify", verify_equal) if installed and grader != "plain" else ("plain", plain_equal)


# --- programs -------------------------------------------------------------------------------------------------------------

FENCE = re.compile(r"```[ \t]*(?:python|py)?[ \t]*\n(.*?)(?:\n[ \t]*```|\Z)", re.S | re.I)


def program(prompt: str, completion: str) -> str | None:
    """The last block of code in a completion, or None. The prompt's suffix may have opened it; it may be unclosed."""
    if prompt.count("```") % 2:
        completion = "```" + prompt.rpartition("```")[2] + completion
    blocks = FENCE.findall(completion)
    return blocks[-1] if blocks else None


def program_answer(code: str, seconds: float, memory_mb: int) -> str | None:
    """The marked answer in what a program prints, else the last line of it. None if it failed, went over a limit or printed
    nothing. Raises UserError where this machine cannot sandbox a program; then none is run."""
    try:
        ran = run_program(code, seconds, memory_mb)
    except Refused as refused:
        raise UserError(f"key programs: this machine cannot sandbox a program ({refused}): grade without --programs") from None
    lines = ran.output.strip().splitlines()
    return (extract(ran.output, markers_only=True) or lines[-1].strip()) if ran.end == "ok" and lines else None
