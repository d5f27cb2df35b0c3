"""Sampled answers to problems, with their grades: a file's, or ours.

One problem a line: `{"prompt", "answer", "completions": […]}`, as sample.py writes it from prompts that carry an answer; with
`grades` (a list of true and false) and `pred` (what each completion answers) it is graded, as eval_math.py --details leaves it.
Two published forms are read as what they are: Qwen2.5-Math's (`question`, `answer`, `response`, `pred`, `score`) and OpenAI's
solutions of GSM8K (`question`, `ground_truth`, and a `{"is_correct", "solution"}` a model).
"""

import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from base.errors import UserError
from data import math_problems
from data.jsonl import get, read
from runtime.config import REQUIRED, key
from selftrain import grading


@dataclass
class Sample:
    """A problem and its completions. `grades` and `pred` are those in force; `stored` are the file's grades, if it has any."""

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
    grades: str = key(
        "auto", "take the file's grades, make our own, or auto = the file's where there", ["auto", "stored", "own"]
    )
    grader: str = key("auto", "own grades: math_verify, plain, or auto = math_verify where installed", list(grading.GRADERS))
    programs: bool = key(False, "own grades: run the Python program in a completion, shut in, and take what it prints")
    program_seconds: float = key(5.0, "most seconds a program runs")
    program_memory_mb: int = key(512, "most memory of a program")

    def check(self) -> None:
        """Raise UserError for values that make no sense. Runs before anything is read."""
        if not 0 < self.program_seconds <= 3600:
            raise UserError(f"key program_seconds: {self.program_seconds} must be above 0 and at most 3600")
        if not 64 <= self.program_memory_mb <= 2**20:
            raise UserError(f"key program_memory_mb: {self.program_memory_mb} must be at least 64")


def load_graded(cfg: GradeKeys) -> tuple[list[Sample], str]:
    """(samples with `grades` and `pred`, where the grades are from: "stored", or the grader's name).

    Raises UserError, naming file and line, for a line without grades and answer, without completions, or of another form.
    """
    samples = [_sample(record, where) for where, record in read(cfg.samples)]
    stored = [s for s in samples if s.stored is not None]
    if cfg.grades == "stored" or (cfg.grades == "auto" and len(stored) == len(samples)):
        for s in samples:
            if s.stored is None:
                raise UserError(f"{s.source}: no 'grades' are stored there: grade it with --grades own")
            s.grades = s.stored
            s.pred = s.pred or [grading.extract(c) for c in s.completions]
        return samples, "stored"
    name, equal = grading.equality(cfg.grader)
    for s in samples:
        if not s.answer.strip():
            raise UserError(f"{s.source}: no 'answer' is there to grade by")
    # programs wait on the clock, so they run side by side; math-verify keeps time by signals, so it runs in the main thread
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        jobs = [[pool.submit(_answer, s.prompt, c, cfg) for c in s.completions] if cfg.programs else None for s in samples]
        try:
            for s, job in zip(samples, jobs, strict=True):
                s.pred = [j.result() for j in job] if job else [grading.extract(c) for c in s.completions]
                s.grades = [p is not None and equal(s.answer, p) for p in s.pred]
        finally:
            pool.shutdown(cancel_futures=True)  # after Ctrl-C, or where no program can be shut in, the rest is not tried
    return samples, name


def _answer(prompt: str, completion: str, cfg: GradeKeys) -> str | None:
    code = grading.program(prompt, completion)
    if code is None:
        return grading.extract(completion)
    return grading.program_answer(code, cfg.program_seconds, cfg.program_memory_mb)


def _sample(record: dict, where: str) -> Sample:
    if "ground_truth" in record:
        return _gsm8k(record, where)
    if "response" in record and "completions" not in record:
        record = {**record, "completions": record["response"]}
        if "score" in record:
            record["grades"] = record["score"]
    completions = _texts(record, "completions", where)
    answer = record.get("answer", "")
    answer = str(answer) if type(answer) in (int, float) else get({"answer": answer}, "answer", str, where)
    stored = get(record, "grades", list, where) if "grades" in record else None
    if stored is not None and (len(stored) != len(completions) or not all(type(g) is bool for g in stored)):
        raise UserError(f"{where}: 'grades' must be true or false for each of the {len(completions)} completions")
    if stored is None and not answer.strip():
        raise UserError(f"{where}: neither 'grades' nor an 'answer' is there to grade by")
    pred = get(record, "pred", list, where) if "pred" in record and stored is not None else None
    if pred is not None and (len(pred) != len(completions) or not all(p is None or isinstance(p, str) for p in pred)):
        raise UserError(f"{where}: 'pred' must be a text or null for each of the {len(completions)} completions")
    if "prompt" not in record and "question" in record:  # somebody else's file: it gets our prompt, and a space to begin with
        prompt = math_problems.prompt(get(record, "question", str, where))
        completions = [" " + c for c in completions]
    else:
        prompt = get(record, "prompt", str, where)
    pred = [p or None for p in pred] if pred is not None else None
    return Sample(prompt, answer, completions, math_problems.kind_of(record), record, where, stored, pred=pred)


def _texts(record: dict, field: str, where: str) -> list[str]:
    texts = get(record, field, list, where)
    if not texts:
        raise UserError(f"{where}: {field!r} is empty: a problem needs at least one completion")
    if not all(isinstance(t, str) for t in texts):
        raise UserError(f"{where}: {field!r} must be a list of texts")
    return texts


def _gsm8k(record: dict, where: str) -> Sample:
    """A line of https://github.com/openai/grade-school-math, example_model_solutions.jsonl."""
    models = {name: value for name, value in record.items() if isinstance(value, dict) and "solution" in value}
    if not models or not all(type(m.get("is_correct")) is bool and isinstance(m["solution"], str) for m in models.values()):
        raise UserError(f'{where}: no {{"is_correct": true or false, "solution": text}} beside the question')
    prompt = math_problems.prompt(get(record, "question", str, where))
    answer = grading.extract(get(record, "ground_truth", str, where), markers_only=True) or ""
    completions, stored = [" " + m["solution"] for m in models.values()], [m["is_correct"] for m in models.values()]
    return Sample(prompt, answer, completions, {}, record, where, stored)
