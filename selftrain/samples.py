"""Read sampled answers to problems and grade them, or take the grades that the file has.

A line is one problem: `{"prompt", "answer", "completions": […]}`. sample.py writes it from a prompt that carries an answer. A
graded line also has `grades` (true or false for each completion) and `pred` (the answer that each completion gives, or null).
`python -m selftrain.eval_math --details` writes graded lines.
"""

import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from base.errors import UserError
from data import math_problems
from data.jsonl import entries, get, read
from data.math_problems import extract
from runtime.config import REQUIRED, key
from selftrain import grading


@dataclass
class Sample:
    """A problem and its completions.

    grades: whether each completion is right. pred: the answer that each completion gives; None where it gives none.
    stored: the file's own grades, or None. kind: level and subject, as far as known. record: the line in our form.
    source: "file:line", for messages.
    """

    prompt: str
    answer: str
    completions: list[str]
    kind: dict[str, str]
    record: dict
    source: str
    stored: list[bool] | None = None
    grades: list[bool] | None = None
    pred: list[str | None] | None = None


@dataclass
class GradeKeys:
    """Which samples to read and how to grade them."""

    samples: str = key(REQUIRED, "a .jsonl / .jsonl.gz file of prompts, answers and completions")
    grades: str = key("auto", "the file's, our own, or auto = the file's where it has them", ["auto", "stored", "own"])
    grader: str = key("auto", "of own grades; auto = math_verify where installed", ["auto", "plain", "math_verify"])
    programs: bool = key(False, "own grades: run the Python program in a completion in a sandbox, and take what it prints")
    program_seconds: float = key(5.0, "most seconds a program runs", above=0, most=3600)
    program_memory_mb: int = key(512, "most memory of a program", least=64, most=2**20)


def load_graded(cfg: GradeKeys) -> tuple[list[Sample], str]:
    """(samples with `grades` and `pred`, who graded them: "stored", or the grader's name).

    Raises UserError, naming file and line, for a line of another form, or one without completions or an answer to grade by.
    """
    samples = [_sample(record, where) for where, record in read(cfg.samples)]
    if cfg.grades == "stored" or (cfg.grades == "auto" and all(s.stored is not None for s in samples)):
        for s in samples:
            if s.stored is None:
                raise UserError(f"{s.source}: no 'grades' are stored there: grade it with --grades own")
            s.grades = s.stored
            s.pred = s.pred or [extract(c) for c in s.completions]
        return samples, "stored"
    name, equal = grading.equality(cfg.grader)
    for s in samples:
        if not s.answer.strip():
            raise UserError(f"{s.source}: no 'answer' is there to grade by")
    with ThreadPoolExecutor(os.cpu_count()) as pool:  # one program a processor; an error or Ctrl-C in `map` cancels the rest
        answers = iter(list(pool.map(lambda a: _answer(*a, cfg), [(s.prompt, c) for s in samples for c in s.completions])))
    for s in samples:  # in the main thread: math-verify keeps its time limits by signals
        s.pred = [next(answers) for _ in s.completions]
        s.grades = [p is not None and equal(s.answer, p) for p in s.pred]
    return samples, name


def _answer(prompt: str, completion: str, cfg: GradeKeys) -> str | None:
    """What a completion answers: what its program prints, if programs are run and it has one, else the answer in its text."""
    code = grading.program(prompt, completion) if cfg.programs else None
    if code is None:
        return extract(completion)
    return grading.program_answer(code, cfg.program_seconds, cfg.program_memory_mb)


def _sample(record: dict, where: str) -> Sample:
    """A line as a Sample that is not graded yet. Raises UserError for a line that is none."""
    completions = entries(record, "completions", str, "texts", where)
    n = len(completions)
    answer, kind = math_problems.answer_of(record, where), math_problems.kind_of(record)
    stored = entries(record, "grades", bool, "true or false", where, n) if "grades" in record else None
    pred = None
    if stored is None and not answer:
        raise UserError(f"{where}: neither 'grades' nor an 'answer' is there to grade by")
    if stored is not None and "pred" in record:
        pred = [p or None for p in entries(record, "pred", str | None, "texts or null", where, n)]
    return Sample(get(record, "prompt", str, where), answer, completions, kind, record, where, stored, pred=pred)
