"""Recipe C's problems: GSM8K, MATH, the toy sums, or a user's file; each with the answer that a completion must reach.

GSM8K: Cobbe et al. 2021 (arXiv 2110.14168), https://github.com/openai/grade-school-math: `question`, and `answer`, a worked
solution that ends in `#### 72`. MATH: Hendrycks et al. 2021 (arXiv 2103.03874): `problem`, `level`, `type`, and `solution`,
which holds its answer in `\\boxed{}`; as released, a file a problem, or a line a problem as in https://github.com/openai/prm800k
(Lightman et al. 2023, arXiv 2305.20050: 12,000 to train on and 500 to test), which is what is downloaded.
"""

import itertools
import json
import random
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from base.download import cache_dir, fetch
from base.errors import UserError
from data import toy_math
from data.examples import Example
from data.jsonl import get, read

NAMES = ("gsm8k", "math", "toy_math")
GSM8K_URL = "https://raw.githubusercontent.com/openai/grade-school-math/master/grade_school_math/data/"
GSM8K = {"train": 7_473, "test": 1_319}  # problems in the published files
MATH_URL = "https://media.githubusercontent.com/media/openai/prm800k/main/prm800k/math_splits/"
MATH = {
    "train": "90d96daeac3fe343ebb1e22ce93dd99690f75983e957f88de42f87cffe1e8076",
    "test": "35dc41080a3680858b27fa7e0533d2d547825316fc5dafe5d316f4ccc5a06132",
}
HELD_OUT = 500  # the published files have no validation split: it is the last so many problems of `train`

LAST_NUMBER = re.compile(r"(?<![\w.])-?\$?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?(?:/\d+)?(?:\\?%)?|(?<![\w.])-?\$?\.\d+(?:\\?%)?")
LINE = re.compile(r"^[ \t>*]*(?:A|Answer|Final answer)[*]*:[*]*[ \t]*(\S.*)$", re.M | re.I)


def extract(text: str, markers_only: bool = False) -> str | None:
    """The final answer that a text gives: the last `\\boxed{…}`, else what follows the last `####` on its line, else the last
    line `A: …` (or `Answer: …`), else, unless `markers_only`, the last number. None where there is nothing of the kind."""
    found = boxed(text)
    if found is None and "####" in text:
        found = text.rpartition("####")[2].strip().partition("\n")[0]
    if not found and (lines := LINE.findall(text)):
        found = lines[-1].rstrip("* ")  # **Answer: 18**
    if not found and not markers_only and (numbers := LAST_NUMBER.findall(text)):
        found = numbers[-1]
    return (found or "").strip() or None


def boxed(text: str) -> str | None:
    """What stands in the last `\\boxed{…}` whose braces close; braces in it are matched, `\\{` and `\\}` are letters."""
    for start in reversed([m.end() for m in re.finditer(r"\\(?:boxed|fbox)\s*\{", text)]):
        depth = 1
        for m in re.compile(r"\\.|[{}]", re.S).finditer(text, start):
            depth += {"{": 1, "}": -1}.get(m[0], 0)
            if not depth:
                return text[start : m.start()].strip()
    return None


@dataclass(frozen=True)
class Problem:
    """`solution` is what SFT learns (it may be empty: nobody worked the problem out); `kind` has what an evaluation is broken
    down by, `level` and `subject`, as far as the data has it; `source` is for messages."""

    problem: str
    answer: str
    solution: str
    kind: dict[str, str]
    source: str


def prompt(problem: str, shown: tuple[Problem, ...] = (), suffix: str = "") -> str:
    """Question, answer to be written; `shown` stand solved in front of it, `suffix` behind it."""
    examples = "".join(f"Question: {p.problem}\nAnswer:{p.solution}\n\n" for p in shown)
    return f"{examples}Question: {problem}\nAnswer:{suffix}"


def few_shot(problems: list[Problem], n: int, seed: int) -> tuple[Problem, ...]:
    """`n` worked problems, drawn by seed. UserError if there are too few."""
    worked = [p for p in problems if p.solution]
    if len(worked) < n:
        raise UserError(f"key few_shot: {n} examples wanted, but only {len(worked)} problems have a solution")
    return tuple(random.Random(f"few shot {seed}").sample(worked, n))


def parse(record: dict, where: str) -> Problem:
    """A line in GSM8K's or MATH's published form, or a user's: `problem` (or `question`), an `answer` or a `solution` (or
    both), perhaps `level` and `subject` (or `type`)."""
    text = get(record, "question" if "question" in record and "problem" not in record else "problem", str, where)
    if "answer" not in record and "solution" not in record:
        raise UserError(f"{where}: neither 'answer' nor 'solution' is there (fields: {', '.join(sorted(record))})")
    if isinstance(record.get("answer"), int | float) and not isinstance(record["answer"], bool):
        record = {**record, "answer": str(record["answer"])}
    solution = get(record, "solution", str, where) if "solution" in record else ""
    answer = get(record, "answer", str, where).strip() if "answer" in record else ""
    if "####" in answer:  # GSM8K: the worked solution
        solution = answer
    if not answer or "####" in answer:
        answer = extract(solution, markers_only=True) or ""
    if not text.strip():
        raise UserError(f"{where}: the problem is empty")
    if not answer:
        raise UserError(f"{where}: no answer: give 'answer', or a 'solution' that ends in \\boxed{{…}} or #### …")
    return Problem(text, answer, " " + solution.strip() if solution else "", kind_of(record), where)


def kind_of(record: dict) -> dict[str, str]:
    """Level and subject of a record, as far as it has them: {"level": "5", "subject": "Algebra"}."""
    kind = {"level": str(record.get("level", "")).removeprefix("Level ")}
    kind["subject"] = str(record.get("subject", record.get("type", "")))
    return {name: value for name, value in kind.items() if value}


def problems(source: str, split: str = "train", *, data_dir: str = "", limit: int = 0) -> list[Problem]:
    """Problems of a recipe (gsm8k, math, toy_math) or of a user's .jsonl file (its one split), at most `limit`
    (0 = all). Raises UserError for what is missing or wrong, naming file and line."""
    if source == "toy_math":
        made = toy_math.problems(split, min(limit or toy_math.SIZES[split], toy_math.SIZES[split]))
        return [Problem(p, a, s, {"level": str(level)}, f"toy_math {split} {n}") for n, (p, s, a, level) in enumerate(made)]
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
    """A published file's lines; MATH's folder of files is read in the order of their paths."""
    published = "test" if split == "test" else "train"
    if data_dir:
        names = [f"{stem}.jsonl{end}" for stem in (f"{name}_{published}", published) for end in ("", ".gz")]
        for file in (Path(data_dir) / n for n in names):
            if file.is_file():
                return read(file)
        if name == "math" and (Path(data_dir) / published).is_dir():
            return _folder(Path(data_dir) / published)
        raise UserError(f"data_dir {data_dir}: none of {', '.join(names)} is there")
    file = cache_dir() / name / f"{published}.jsonl"
    if name == "math":
        return read(fetch(f"{MATH_URL}{published}.jsonl", file, sha256=MATH[published]))
    if not file.exists():
        fetch(f"{GSM8K_URL}{published}.jsonl", file)
        with open(file, "rb") as lines:
            found = sum(1 for _ in lines)
        if found != GSM8K[published]:
            file.unlink()
            raise UserError(f"{GSM8K_URL}{published}.jsonl: {found} lines, not the {GSM8K[published]} published: start again")
    return read(file)


def _folder(folder: Path) -> Iterator[tuple[str, dict]]:
    files = sorted(folder.glob("*/*.json"))
    if not files:
        raise UserError(f"{folder}: no SUBJECT/NUMBER.json in it, as MATH was released")
    for file in files:
        try:
            record = json.loads(file.read_bytes())
        except ValueError:
            raise UserError(f"{file}: not JSON") from None
        if not isinstance(record, dict):
            raise UserError(f"{file}: not a JSON object")
        yield str(file), record


def load(split: str, view: str, *, part: str, data_dir: str = "", limit: int = 0) -> list[Example]:
    """Recipe `part` (gsm8k, math, toy_math) as SFT's examples: the bare prompt and the worked solution."""
    if view != "sft":
        raise UserError(f"{part} has no {'pairs' if view == 'preference' else 'options'}: sample answers, then see pairs.py")
    found = problems(part, split, data_dir=data_dir, limit=limit)
    return [Example(prompt(p.problem), (p.solution,), source=p.source) for p in found]
