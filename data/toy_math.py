"""The toy task of recipe C: sums of small numbers, a step at a time, made by code and learnt in minutes on a CPU.

    Question: 3+8-5+9
    Answer:3+8=11,11-5=6,6+9=15
    ####15

A problem has 2 to 4 steps, its level, of 1 to 9 up or down, and never leaves 0 to 20. A step is one of 320 facts, so that a
model that has seen few demonstrations knows some of them, and one wrong step spoils the answer.
"""

import hashlib
import random

KEYWORDS = ["Question:", "Answer:", "####"]
MOST = 20  # the largest number that a problem meets
VOCAB = KEYWORDS + [str(n) for n in range(MOST + 1)] + list(" +-=,.!?\n")
PATTERN = "|".join(KEYWORDS) + r"|1[0-9]|20|[^\S\n]|\n|\S"  # a keyword, a number, or one character

SIZES = {"train": 40_000, "val": 2_000, "test": 2_000}
SPLITS = {0: "val", 1: "test"}  # of ten shares of all problems; the other eight are for training
LEVELS = (2, 4)  # fewest and most steps


def _problem(rng: random.Random) -> tuple[str, str, str, int]:
    """(problem, worked solution, answer, level)"""
    level, total = rng.randint(*LEVELS), rng.randint(1, 9)
    text, steps = str(total), []
    for _ in range(level):
        change = rng.choice([c for c in range(-9, 10) if c and 0 <= total + c <= MOST])
        steps.append(f"{total}{change:+}={total + change}")
        text, total = f"{text}{change:+}", total + change
    return text, f"{','.join(steps)}\n####{total}", str(total), level


def problems(split: str, n: int, seed: int = 0) -> list[tuple[str, str, str, int]]:
    """`n` problems of a split, none twice, the same for the same seed. A problem belongs to one split, whatever the seed."""
    rng, found = random.Random(f"{split} {seed}"), {}
    while len(found) < n:
        made = _problem(rng)
        share = hashlib.sha256(made[0].encode()).digest()[0] % 10
        if SPLITS.get(share, "train") == split:
            found.setdefault(made[0], made)
    return list(found.values())
