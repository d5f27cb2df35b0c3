"""Recipe C's problems: GSM8K, MATH, the toy sums, or a user's file. Each has the answer that a completion must reach.

GSM8K: Cobbe et al. 2021 (arXiv 2110.14168), https://github.com/openai/grade-school-math. Its fields are `question` and
`answer`, a worked solution that ends in `#### 72`.

MATH: Hendrycks et al. 2021 (arXiv 2103.03874). Its fields are `problem`, `level`, `type`, and `solution`, with the answer in
`\\boxed{}`. We download the split of https://github.com/openai/prm800k (Lightman et al. 2023, arXiv 2305.20050): 12,000
problems to train on and 500 to test, one a line. `data_dir` may also hold MATH as it was released, one file a problem.
"""

import itertools
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from base.download import cache_dir, fetch
from base.errors import UserError
from base.files import read_json
from data import toy_math
from data.examples import Example, local
from data.jsonl import get, read

NAMES = ("gsm8k", "math", "toy_math")
URLS = {
    "gsm8k": "https://raw.githubusercontent.com/openai/grade-school-math/master/grade_school_math/data/",
    "math": "https://media.githubusercontent.com/media/openai/prm800k/main/prm800k/math_splits/",
}
SHA256 = {  # of the published files
    ("gsm8k", "train"): "17f347dc51477c50d4efb83959dbb7c56297aba886e5544ee2aaed3024813465",
    ("gsm8k", "test"): "3730d312f6e3440559ace48831e51066acaca737f6eabec99bccb9e4b3c39d14",
    ("math", "train"): "90d96daeac3fe343ebb1e22ce93dd99690f75983e957f88de42f87cffe1e8076",
    ("math", "test"): "35dc41080a3680858b27fa7e0533d2d547825316fc5dafe5d316f4ccc5a06132",
}
HELD_OUT = 500  # nothing published is for validation: we take the last so many problems of `train`

LAST_NUMBER = re.compile(r"(?<![\w.])-?\$?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?(?:/\d+)?(?:\\?%)?|(?<![\w.])-?\$?\.\d+(?:\\?%)?")
BRACES = re.compile(r"(\\(?:boxed|fbox)\s*\{)|\\(?!\\(?:boxed|fbox)).|[{}]", re.S)
LINE = re.compile(r"^[ \t>*]*(?:A|Answer|Final answer)[*]*:[*]*[ \t]*(\S.*)$", re.M | re.I)


def extract(text: str, markers_only: bool = False) -> str | None:
    """The final answer in a text, or None: the last `\\boxed{…}`, else what follows the last `####` on its line, else the last
    line `A: …` or `Answer: …`, else the last number. `markers_only` leaves the last number out."""
    found = boxed(text)
    if found is None and "####" in text:
        found = text.rpartition("####")[2].strip().partition("\n")[0]
    if not found and (lines := LINE.findall(text)):
        found = lines[-1].rstrip("* ")  # **Answer: 18**
    if not found and not markers_only and (numbers := LAST_NUMBER.findall(text)):
        found = numbers[-1]
    return (found or "").strip() or None


def boxed(text: str) -> str | None:
    """The content of the last `\\boxed{…}` whose braces close, or None. It may hold braces; `\\{` and `\\}` are letters."""
    last, opened = (0, None), []  # where it starts and what it holds; the starts of all braces that are open, 0 for a bare one
    for m in BRACES.finditer(text):
        if m[0] == "}" and opened and (start := opened.pop()) > last[0]:
            last = start, text[start : m.start()].strip()
        elif m[0] == "{" or m[1]:
            opened.append(m.end() if m[1] else 0)
    return last[1]


@dataclass(frozen=True)
class MathProblem:
    """A problem with its answer.

    solution: the worked answer that SFT learns; empty where the data has none. kind: its level and subject, as far as the data
    names them; results are broken down by these. source: where it stands, for messages.
    """

    problem: str
    answer: str
    solution: str
    kind: dict[str, str]
    source: str


def prompt(problem: str, shown: Sequence[MathProblem] = (), suffix: str = "") -> str:
    """The prompt that asks a problem: first the problems `shown` with their solutions, then the question, then `suffix`."""
    examples = "".join(f"Question: {p.problem}\nAnswer:{p.solution}\n\n" for p in shown)
    return f"{examples}Question: {problem}\nAnswer:{suffix}"


def answer_of(record: dict, where: str) -> str:
    """The field `answer`, a text or a number, as text; "" where there is none. UserError for anything else."""
    answer = record.get("answer", "")
    return str(answer) if type(answer) in (int, float) else get({"answer": answer}, "answer", str, where).strip()


def parse(record: dict, where: str) -> MathProblem:
    """A line in the form of GSM8K, of MATH, or of a user's file: `problem` or `question`, `answer` or `solution` or both,
    and perhaps `level` and `subject` (or `type`). UserError where there is no problem or no answer."""
    text = get(record, "question" if "question" in record and "problem" not in record else "problem", str, where)
    solution = get(record, "solution", str, where) if "solution" in record else ""
    answer = answer_of(record, where)
    if "####" in answer:  # GSM8K keeps the worked solution here
        solution, answer = answer, ""
    answer = answer or extract(solution, markers_only=True)
    if not text.strip():
        raise UserError(f"{where}: the problem is empty")
    if not answer:
        raise UserError(f"{where}: no answer: give 'answer', or a 'solution' that ends in \\boxed{{…}} or #### …")
    return MathProblem(text, answer, " " + solution.strip() if solution else "", kind_of(record), where)


def kind_of(record: dict) -> dict[str, str]:
    """Level and subject, as far as a record has them: {"level": "5", "subject": "Algebra"}."""
    kind = {"level": str(record.get("level", "")).removeprefix("Level ")}
    kind["subject"] = str(record.get("subject", record.get("type", "")))
    return {name: value for name, value in kind.items() if value}


def problems(source: str, split: str = "train", *, data_dir: str = "", limit: int = 0) -> list[MathProblem]:
    """The problems of a recipe's split, or of a user's .jsonl file (which has no splits), at most `limit` (0 = all).

    source: gsm8k, math, toy_math or a path. Raises UserError, naming file and line, for what is missing or wrong.
    """
    if source == "toy_math":
        made = toy_math.problems(split, min(limit or toy_math.SIZES[split], toy_math.SIZES[split]))
        return [MathProblem(p, a, s, {"level": str(level)}, f"toy_math {split} {n}") for n, (p, s, a, level) in enumerate(made)]
    if source in NAMES:
        records = list(_records(source, split, data_dir))
        if split != "test":
            records = records[-HELD_OUT:] if split == "val" else records[:-HELD_OUT]
    elif source.endswith((".jsonl", ".jsonl.gz")) or Path(source).exists():
        records = read(source)
    else:
        raise UserError(f"data {source!r} is neither one of {', '.join(NAMES)} nor a .jsonl or .jsonl.gz file")
    return [parse(record, where) for where, record in itertools.islice(records, limit or None)]


def _records(name: str, split: str, data_dir: str) -> Iterator[tuple[str, dict]]:
    """("file:line", record) of a published file, from `data_dir` or downloaded."""
    published = "test" if split == "test" else "train"
    file = f"{published}.jsonl"
    if not data_dir:
        return read(fetch(URLS[name] + file, cache_dir() / name / file, sha256=SHA256[name, published]))
    if name == "math" and (folder := Path(data_dir) / published).is_dir():
        return _folder(folder)
    return read(local(data_dir, [f"{name}_{file}", file])[0])


def _folder(folder: Path) -> Iterator[tuple[str, dict]]:
    """(file, record) of MATH as it was released, in the order of the paths SUBJECT/NUMBER.json."""
    files = sorted(folder.glob("*/*.json"))
    if not files:
        raise UserError(f"{folder}: no SUBJECT/NUMBER.json in it, as MATH was released")
    for file in files:
        yield str(file), read_json(file)


def load(split: str, view: str, *, part: str, data_dir: str = "", limit: int = 0) -> list[Example]:
    """Recipe `part` (gsm8k, math, toy_math) as examples for SFT: the prompt and the worked solution. It has no other view."""
    if view != "sft":
        what = "pairs" if view == "preference" else "options"
        raise UserError(f"{part} has no {what}: sample answers, then make pairs with python -m selftrain.pairs")
    found = problems(part, split, data_dir=data_dir, limit=limit)
    return [Example(prompt(p.problem), (p.solution,), source=p.source) for p in found]
