"""Problems as prompts: a line a problem, with the answer beside it, for sample.py (and the worked solution, for sft.py).

    python problems.py --data gsm8k --split test --few_shot 4 --out runs/gsm8k_test.jsonl
    python problems.py --data math --data_dir ~/MATH --level 5 --suffix ' ```python' --out runs/math5.jsonl

A prompt is `Question: …`, a new line, `Answer:` and the suffix; `few_shot` solved ones stand in front of it, the same for all.
"""

import json
from dataclasses import dataclass

from base.errors import UserError, run
from base.files import check_file, write_whole
from data import math_problems
from runtime import config
from runtime.config import REQUIRED, key


@dataclass
class Config:
    """Write problems as prompts with their answers, one JSON object a line."""

    data: str = key(REQUIRED, "gsm8k, math, toy_math, or a .jsonl file of problem and answer (or solution)")
    data_dir: str = key("", "folder that holds a recipe's files, instead of downloading them")
    split: str = key("train", "the recipe's split (of a published train set the last 500 are val)", ["train", "val", "test"])
    level: str = key("", "only problems of this level, say 5; empty = all")
    skip: int = key(0, "pass over the first so many")
    limit: int = key(0, "then at most so many, 0 = all")
    few_shot: int = key(0, "solved training problems in front of each prompt, drawn by seed, never asked themselves")
    suffix: str = key("", r"text at the prompt's end, for example the opening of a code block; \n is a new line")
    seed: int = key(0, "seed of which problems are shown solved")
    out: str = key(REQUIRED, "the .jsonl file to write")

    def check(self) -> None:
        for name in ("skip", "limit", "few_shot"):
            if getattr(self, name) < 0:
                raise UserError(f"key {name}: {getattr(self, name)} must not be negative")
        check_file("out", self.out)


def main() -> None:
    cfg = config.load(Config, prog="problems.py")
    problems = math_problems.problems(cfg.data, cfg.split, data_dir=cfg.data_dir)
    shown = ()
    if cfg.few_shot:  # never a problem that is asked
        recipe = cfg.data in math_problems.NAMES and cfg.split != "train"
        pool = math_problems.problems(cfg.data, "train", data_dir=cfg.data_dir) if recipe else problems
        shown = math_problems.few_shot(pool, cfg.few_shot, cfg.seed)
        problems = [p for p in problems if p not in shown]
    problems = [p for p in problems if not cfg.level or p.kind.get("level") == cfg.level]
    problems = problems[cfg.skip :][: cfg.limit or None]
    if not problems:
        raise UserError(f"{cfg.data}: no problem is left: see split, level and skip")
    suffix = cfg.suffix.replace("\\n", "\n")
    records = [{"prompt": math_problems.prompt(p.problem, shown, suffix), "answer": p.answer, **p.kind} for p in problems]
    for record, p in zip(records, problems, strict=True):
        if p.solution and not suffix:  # behind a suffix it would not fit
            record["completion"] = p.solution
    write_whole(cfg.out, "".join(json.dumps(record) + "\n" for record in records))
    print(f"wrote {cfg.out}: {len(records):,} problems; the first:\n{records[0]['prompt']}")


if __name__ == "__main__":
    run(main, alone=True)
