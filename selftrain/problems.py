"""Write problems as prompts: a line a problem, with its answer for grading, and its worked solution where the data has one.

    python -m selftrain.problems --data gsm8k --split test --few_shot 4 --out runs/gsm8k_test.jsonl
    python -m selftrain.problems --data math --data_dir ~/MATH --level 5 --suffix ' ```python' --out runs/math5.jsonl

A prompt is `Question: …`, a new line, `Answer:` and the suffix. `--few_shot N` puts N solved problems in front of each prompt.
"""

from base.script import run

import json
import random
from dataclasses import dataclass

from base.errors import UserError
from base.files import write_whole
from data import math_problems
from data.math_problems import MathProblem
from runtime import config
from runtime.config import REQUIRED, key


@dataclass
class Config:
    """Write problems as prompts with their answers, one JSON object a line."""

    data: str = key(REQUIRED, "gsm8k, math, toy_math, or a .jsonl file of problem and answer (or solution)")
    data_dir: str = key("", "folder that holds a recipe's files, instead of downloading them")
    split: str = key("train", "the recipe's split (of a published train set the last 500 are val)", ["train", "val", "test"])
    level: str = key("", "only problems of this level, say 5; empty = all")
    skip: int = key(0, "pass over the first so many", least=0)
    limit: int = key(0, "then at most so many, 0 = all", least=0)
    wrap: bool = key(False, "after the last problem go on with the first, until there are `limit`")
    few_shot: int = key(0, "solved training problems in front of each prompt, drawn by seed, never asked themselves", least=0)
    suffix: str = key("", r"text at the prompt's end, for example the opening of a code block; \n is a new line")
    seed: int = key(0, "seed of which problems are shown solved")
    out: str = key(REQUIRED, "the .jsonl file to write", writes="")


def select(cfg: Config) -> tuple[list[MathProblem], list[MathProblem]]:
    """(the problems to ask, the problems to show solved). No problem is in both. UserError if none is left to ask."""
    problems = math_problems.problems(cfg.data, cfg.split, data_dir=cfg.data_dir)
    shown = []
    if cfg.few_shot:
        recipe = cfg.data in math_problems.NAMES and cfg.split != "train"
        pool = math_problems.problems(cfg.data, "train", data_dir=cfg.data_dir) if recipe else problems
        worked = [p for p in pool if p.solution]
        if len(worked) < cfg.few_shot:
            raise UserError(f"key few_shot: {cfg.few_shot} wanted, but only {len(worked)} problems have a solution")
        shown = random.Random(f"few shot {cfg.seed}").sample(worked, cfg.few_shot)
        problems = [p for p in problems if p not in shown]
    problems = [p for p in problems if not cfg.level or p.kind.get("level") == cfg.level]
    if cfg.wrap and problems:
        first = cfg.skip % len(problems)
        problems = problems[first:] + problems[:first]
    else:
        problems = problems[cfg.skip :]
    if not problems:
        raise UserError(f"{cfg.data}: no problem is left: see the keys split, level, skip and few_shot")
    return problems[: cfg.limit or None], shown


def main() -> None:
    cfg = config.load(Config, prog="-m selftrain.problems")
    problems, shown = select(cfg)
    suffix = cfg.suffix.replace("\\n", "\n")
    records = [{"prompt": math_problems.prompt(p.problem, shown, suffix), "answer": p.answer, **p.kind} for p in problems]
    for record, p in zip(records, problems, strict=True):
        if p.solution and not suffix:  # a solution does not continue a suffix
            record["completion"] = p.solution
    write_whole(cfg.out, "".join(json.dumps(record) + "\n" for record in records))
    print(f"wrote {cfg.out}: {len(records):,} problems; the first:\n{records[0]['prompt']}")


if __name__ == "__main__":
    run(main, alone=True)
