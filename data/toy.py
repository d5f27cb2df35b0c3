"""A toy task: everyday routines as multiple-choice questions in HellaSwag's shape, made by code.

    Today Tom bakes the old card. Mia soaks the red scarf. Mia washes the red scarf. Then Mia
    A) folds the red scarf.  B) dries the red scarf.  C) …

Each thing has its own routine: six steps in a circle, drawn once and never changed. Two neighbouring steps are told, and the
right answer is the next one. The options are the four steps that were not told. Each step of a routine is right as often as any
other, so only a model that has learnt the routines can choose.

Half of the demonstrations that SFT learns from skip a step. SFT imitates what it is shown, so its accuracy stays well below
100%, however long it runs. The preference pairs say which of two endings is better: DPO learns that from them.
"""

import hashlib
import random
from dataclasses import replace

from data.examples import Example, Problem, view_problem

NAMES = ["Mia", "Tom", "Ana", "Leo", "Ida", "Max", "Zoe", "Ben", "Eva", "Sam"]
KINDS = ["red", "blue", "green", "white", "old", "new", "big", "small"]
THINGS = "scarf plate loaf carrot letter radio shelf book bike dog doll rose tent vase card clock".split()
VERBS = "soaks washes dries folds bakes cuts peels writes opens cleans fixes paints hangs lifts buys wraps hides sells".split()
STEPS = 6
CARELESS = 0.5  # share of demonstrations that skip a step
_draw = random.Random("routines")
ROUTINES = {thing: _draw.sample(VERBS, STEPS) for thing in THINGS}

MARKS = ["\n", "A", "B", "C", "D", "Answer", ")", ":", ".", "Today", " Then", " the"]
VOCAB = MARKS + [" " + word for word in NAMES + KINDS + THINGS + VERBS]

SIZES = {"train": 40_000, "val": 2_000, "test": 2_000}
SPLITS = {0: "val", 1: "test"}  # two of ten equal shares of all contexts; the other eight are for training


def _problem(rng: random.Random) -> tuple[Problem, int]:
    """A problem, and the index of the ending that its demonstration shows."""
    (thing, other), (who, someone), (kind, another) = rng.sample(THINGS, 2), rng.sample(NAMES, 2), rng.sample(KINDS, 2)
    at = rng.randrange(STEPS)
    routine = ROUTINES[thing][at:] + ROUTINES[thing][:at]  # a circle: the first two are told, the third is right
    told = [f"{who} {verb} the {kind} {thing}." for verb in routine[:2]]
    told.insert(rng.randrange(2), f"{someone} {rng.choice(ROUTINES[other])} the {another} {other}.")
    right, skipping, *_ = verbs = routine[2:]
    shown = skipping if rng.random() < CARELESS else right
    rng.shuffle(verbs)
    context = f"Today {' '.join(told)} Then {who}"
    return Problem(context, tuple(f"{verb} the {kind} {thing}." for verb in verbs), verbs.index(right)), verbs.index(shown)


def is_of(split: str, text: str) -> bool:
    """Whether a text belongs to a split, by its hash."""
    share = hashlib.sha256(text.encode()).digest()[0] % 10
    return SPLITS.get(share, "train") == split


def problems(split: str, n: int, seed: int = 0) -> list[tuple[Problem, int]]:
    """`n` problems of a split, each with the index of the ending that its demonstration shows. The same seed gives the same
    problems. A context belongs to one split, whatever the seed."""
    rng, found = random.Random(f"{split} {seed}"), []
    while len(found) < n:
        problem, shown = _problem(rng)
        if is_of(split, problem.context):
            found.append((problem, shown))
    return found


def load(split: str, view: str, data_dir: str = "", limit: int = 0) -> list[Example]:
    """A split in a view's form. `sft` has the demonstrations, of which half are wrong; the other views use the right ending.
    `loglik` has the question as its prompt too, because the model knows no other."""
    view = "mcq" if view == "loglik" else view
    made = problems(split, min(limit or SIZES[split], SIZES[split]))
    if view == "sft":
        made = [(replace(problem, label=shown), shown) for problem, shown in made]
    return [e for n, (p, _) in enumerate(made) for e in view_problem(p, view, n, f"toy {split} {n}")]
