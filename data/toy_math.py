"""The toy task of recipe C: sums of small numbers, a step at a time, made by code and learnt in minutes on a CPU.

    Question: 37+8-5
    Answer: 37+8=45, 45-5=40
    #### 40

A problem begins between 10 and 89 and has 2 to 5 steps, its level, of 1 to 9 up or down; it never leaves 0 to 99. A step is
one of 1,800 facts, so that a model that has seen few demonstrations knows some of them, and one wrong step spoils the answer.
"""

import hashlib
import random

KEYWORDS = ["Question:", "Answer:", "####"]
VOCAB = KEYWORDS + list("0123456789 +-=,.!?\n")
PATTERN = "|".join(KEYWORDS) + r"|[^\S\n]|\n|\S"  # a keyword, or one character

SIZES = {"train": 40_000, "val": 2_000, "test": 2_000}
SPLITS = {0: "val", 1: "test"}  # of ten shares of all problems; the other eight are for training
LEVELS = (2, 5)  # fewest and most steps


def _problem(rng: random.Random) -> tuple[str, str, str, int]:
    """(problem, worked solution, answer, level)"""
    level, total = rng.randint(*LEVELS), rng.randint(10, 89)
    text, steps = str(total), []
    for _ in range(level):
        number, sign = rng.randint(1, 9), rng.choice("+-")
        if not 0 <= total + int(f"{sign}{number}") <= 99:
            sign = "-" if sign == "+" else "+"
        result = total + int(f"{sign}{number}")
        steps.append(f"{total}{sign}{number}={result}")
        text, total = f"{text}{sign}{number}", result
    return text, f" {', '.join(steps)}\n#### {total}", str(total), level


def problems(split: str, n: int, seed: int = 0) -> list[tuple[str, str, str, int]]:
    """`n` problems of a split, none twice, the same for the same seed. A problem belongs to one split, whatever the seed."""
    rng, found = random.Random(f"{split} {seed}"), {}
    while len(found) < n:
        made = _problem(rng)
        share = hashlib.sha256(made[0].encode()).digest()[0] % 10
        if SPLITS.get(share, "train") == split:
            found.setdefault(made[0], made)
    return list(found.values())
