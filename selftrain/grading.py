"""What a completion answers, and whether that is the right answer.

    extract("… so 9 * 2 = 18.\\n#### 18")  -> "18"
    equal("\\\\frac{1}{2}", "0.5")          -> True

Two graders: `plain`, below, knows numbers, fractions, percentages, units, and lists of these, and compares all else as text
once LaTeX's ways of writing the same are out of it; `math_verify` (the package math-verify, optional) does algebra as well.
docs/math.md has where the two differ on real answers.
"""

import functools
import re
from collections.abc import Callable
from fractions import Fraction

from base.errors import UserError
from data.math_problems import boxed, extract  # noqa: F401
from selftrain.sandbox import Refused, run_program

GRADERS = ("auto", "plain", "math_verify")
LONGEST = 300  # characters: a longer answer is compared as text
NUMBER = r"[-+]?(?:\d{1,3}(?:,\d{3})+|\d+)?(?:\.\d+|(?<=\d)\.?)"


# --- plain: one written form for equal answers ----------------------------------------------------------------------------

SPACING = re.compile(r"\\(?:left|right|bigl?|bigr?|quad|qquad|displaystyle|limits)(?![a-zA-Z])|\\[!,;: ]|~")
TEXT = re.compile(r"\\(?:text|mbox|mathrm)\s*\{([^{}]*)\}")
STYLED = re.compile(r"\\(?:textbf|textit|mathbf|operatorname|mathrm(?=\s*\{\w\}))\s*\{([^{}]*)\}")  # part of the answer
OR = re.compile(r"(?<![a-z])(?:or|and)(?![a-z])", re.I)
# words that are more than a unit: 5 million, 2 pi, 3 to 4, 7 or more
MEANS = re.compile(
    r"(?<![a-z])(?:or|and|to|hundred|thousand|[mbtr]+illion|dozen|pi|sqrt|root|sin|cos|tan|log|ln|exp|mod|over|times|plus"
    r"|minus|more|less|than|[xyzabnk]{2,3}|if|for|not|e|i)(?![a-z])",
    re.I,
)
UNIT = re.compile(
    rf"^({NUMBER}(?:\s*/\s*\d+|\s+\d+/\d+)?)\s+(?![ap]m\b)[a-z]{{2,}}(?:[a-z .²³/-]|\^?[23](?!\d))*$", re.I
)  # 18 dollars, 5 cm^2
ASSIGNED = re.compile(r"^\s*(?:[a-zA-Z]|[a-zA-Z]\([a-zA-Z]\))\s*=\s*(?=[^=]+$)")  # x = 5, f(x) = 2x
FRAC = re.compile(r"\\frac(?:\{([-+]?\d+)\}|(\d))(?:\{([-+]?\d+)\}|(\d))")
POWER = re.compile(rf"^({NUMBER})(?:\\times|\\cdot|\*|x)10\^\{{?([-+]?\d{{1,3}})\}}?$")


@functools.lru_cache(maxsize=100_000)
def normal(text: str) -> str | Fraction | tuple:
    """An answer's normal form: a number, a tuple for a list (ordered in brackets, sorted else), or a text without white space.

    A percentage is the number before its sign, an amount with a unit the amount. Equal forms are equal answers.
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
    text = bare if re.search(r"\d|\\", bare) else TEXT.sub(r"\1", text)  # a unit is left out, a word that is the answer is not
    text = ASSIGNED.sub("", text.strip()).rstrip(".").strip()
    if (unit := UNIT.match(text)) and not MEANS.search(text):
        text = unit[1]
    spaced, text = text, re.sub(r"\s+", "", text)
    if (number := as_number(spaced)) is not None:
        return number
    inner, ends = text, ("", "")
    if brackets := re.match(r"^(\(|\[|\\\{)(.*)(\)|\]|\\\})$", text, re.S):
        inner, ends = brackets[2], (brackets[1], brackets[3])
    parts = _split(inner)
    if len(parts) > 1 and all(parts):
        forms = [normal(part) for part in parts]
        names = [part.partition("=")[0] if ASSIGNED.match(part) else "" for part in parts]
        if len(set(names)) > 1:  # x = 3, y = 5
            forms = list(zip(names, forms, strict=True))
        return (ends[0], *forms, ends[1]) if ends[0] in ("(", "[") else ("{", *sorted(forms, key=repr), "}")
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
    """The exact value of an integer, decimal, fraction (also mixed: 12 3/5, 12\\frac{3}{5}), or a * 10^b; else None."""
    text = re.sub(r"\s*(\\frac|[{}])\s*", r"\1", text.strip())
    text = FRAC.sub(lambda m: f"\\frac{{{m[1] or m[2]}}}{{{m[3] or m[4]}}}", text)
    mixed = re.match(r"^([-+]?)(\d+)\s*\\frac\{(\d+)\}\{(\d+)\}$", text) or re.match(r"^([-+]?)(\d+) +(\d+)/(\d+)$", text)
    if mixed and int(mixed[4]):
        value = int(mixed[2]) + Fraction(int(mixed[3]), int(mixed[4]))
        return -value if mixed[1] == "-" else value
    text = re.sub(r"(?<=\d) (?=\d{3}(?!\d))", "", text)  # 10 000
    if re.search(r"\d,?\s+\d", text):  # two numbers
        return None
    text = re.sub(r"\s+", "", text)
    text = re.sub(r"^([-+]?)\((.*)\)$", r"\1\2", text) if "," not in text else text
    text = re.sub(r"^([-+]?)\\frac\{([-+]?\d+)\}\{([-+]?\d+)\}$", r"\1\2/\3", text)
    if re.fullmatch(NUMBER, text):
        return Fraction(text.replace(",", "").rstrip("."))
    if (parts := re.fullmatch(rf"({NUMBER})/({NUMBER})", text)) and (below := as_number(parts[2])):
        return as_number(parts[1]) / below
    if power := POWER.match(text):
        return as_number(power[1]) * Fraction(10) ** int(power[2])
    return None


def plain_equal(answer: str, given: str) -> bool:
    """Whether `given` is the right answer by normal form; where only one of the two has a % sign, 50% is 0.5 as well as 50."""
    right, found = normal(answer), normal(given)
    if right == found:
        return True
    if isinstance(right, Fraction) and isinstance(found, Fraction) and ("%" in answer) != ("%" in given):
        return right / 100 == found if "%" in answer else right == found / 100
    return False


# --- math-verify ----------------------------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=100_000)
def verify_equal(answer: str, given: str) -> bool:
    """Whether math-verify takes `given` for `answer`. Both stand in dollars, so that it reads them as LaTeX."""
    import math_verify

    def parsed(text: str) -> list:
        return math_verify.parse(f"${text.strip().strip('$')}$")

    return bool(math_verify.verify(parsed(answer), parsed(given)))


def equality(grader: str) -> tuple[str, Callable[[str, str], bool]]:
    """(name, equal(answer, given)) of a grader; `auto` is math_verify where it is installed. UserError where it is asked for
    and is not."""
    if grader != "plain":
        try:
            import math_verify  # noqa: F401

            return "math_verify", verify_equal
        except ImportError:
            if grader == "math_verify":
                raise UserError("key grader: math-verify is not installed: pip install math-verify, or take plain") from None
    return "plain", plain_equal


# --- programs -------------------------------------------------------------------------------------------------------------

FENCE = re.compile(r"```[ \t]*(?:python|py)?[ \t]*\n(.*?)(?:\n[ \t]*```|\Z)", re.S | re.I)


def program(prompt: str, completion: str) -> str | None:
    """The last block of code of a completion, None where there is none. A block may have been opened at the prompt's end (a
    suffix "```python"), and need not be closed."""
    if prompt.count("```") % 2:
        completion = "```" + prompt.rpartition("```")[2] + completion
    blocks = FENCE.findall(completion)
    return blocks[-1] if blocks else None


def program_answer(code: str, seconds: float, memory_mb: int) -> str | None:
    """What a program answers: the marked answer in its output, else its output's last line; None if it did not end well.

    UserError where this machine cannot shut programs in: none is run then.
    """
    try:
        ran = run_program(code, seconds, memory_mb)
    except Refused as refused:
        raise UserError(f"key programs: this machine cannot shut a program in ({refused}): grade without --programs") from None
    lines = ran.output.strip().splitlines()
    return (extract(ran.output, markers_only=True) or lines[-1].strip()) if ran.end == "ok" and lines else None
