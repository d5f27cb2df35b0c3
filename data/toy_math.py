"""The toy task of recipe C: sums of small numbers, a step at a time, made by code and learnt in minutes on a CPU.

    Question: 3+8-5+9                   Question: 3+8-5+9
    Answer:3+8=11,11-5=6,6+9=15         Answer:####15
    ####15

A problem has 2 to 4 steps, its level, of 1 to 9 up or down, and never leaves 0 to 20. All demonstrations are right, but two
of three name the answer at once, and a small model can do that for few problems: it writes in either way, and is right far
more often when it takes the steps. Nothing but the grades tells it so. That is for DPO to find out.
"""

import hashlib
import random

from data.toy import is_of

KEYWORDS = ["Question:", "Answer:", "####"]
MOST = 20  # the largest number that a problem meets
VOCAB = KEYWORDS + [str(n) for n in range(MOST + 1)] + list(" +-=,.!?\n")
PATTERN = "|".join(KEYWORDS) + r"|1[0-9]|20|[^\S\n]|\n|\S"  # a keyword, a number, or one character

SIZES = {"train": 40_000, "val": 2_000, "test": 2_000}
LEVELS = (2, 4)  # fewest and most steps
WORKED = 3  # one demonstration of so many shows its steps


def _problem(rng: random.Random) -> tuple[str, str, str, int]:
    """(problem, worked solution, answer, level)"""
    level, total = rng.randint(*LEVELS), rng.randint(1, 9)
    text, steps = str(total), []
    for _ in range(level):
        change = rng.choice([c for c in range(-9, 10) if c and 0 <= total + c <= MOST])
        steps.append(f"{total}{change:+}={total + change}")
        text, total = f"{text}{change:+}", total + change
    worked = hashlib.sha256(text.encode()).digest()[1] % WORKED == 0
    return text, f"{','.join(steps)}\n####{total}" if worked else f"####{total}", str(total), level


def problems(split: str, n: int, seed: int = 0) -> list[tuple[str, str, str, int]]:
    """`n` problems of a split, none twice, the same for the same seed. A problem belongs to one split, whatever the seed."""
    rng, found = random.Random(f"{split} {seed}"), {}
    while len(found) < n:
        made = _problem(rng)
        if is_of(split, made[0]):
            found.setdefault(made[0], made)
    return list(found.values())
