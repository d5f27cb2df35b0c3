"""The toy task of `make demo`: everyday routines as multiple-choice questions in HellaSwag's shape, made by code.

    Today Tom irons the old shirt. Mia soaks the red scarf. Mia washes the red scarf. Then Mia
    A) folds the red scarf.  B) dries the red scarf.  C) …

Every thing has a routine of its own, six steps in a fixed order, drawn once and for all: nothing but training tells what
comes after washing a scarf. The wrong endings are other steps of the same routine, the one after next among them, and the
next step of the other person's: as plausible as the right one to whoever has not learnt the routine. Some things come up
often, some rarely (Zipf's law).

The demonstrations that SFT learns from are careless: half of them skip a step. SFT imitates what it is shown, so it stops
short of the top, however long it runs. The preference pairs say which of two endings is better: that is what DPO is for.
"""

import hashlib
import random
from dataclasses import replace

from data import Example, Problem, view_problem

NAMES = ["Mia", "Tom", "Ana", "Leo", "Ida", "Max", "Zoe", "Ben", "Eva", "Sam"]
KINDS = ["red", "blue", "green", "white", "old", "new", "big", "small"]
THINGS = (
    "scarf plate loaf carrot letter radio shelf book bike dog doll rose tent vase shirt cup cake potato card clock frame map "
    "cart cat"
).split()
VERBS = (
    "sorts soaks washes dries irons folds clears scrubs rinses stacks mixes kneads shapes bakes cools slices picks peels chops "
    "boils writes reads seals stamps posts opens checks cleans fixes tests measures saws sands glues paints hangs finds "
    "borrows closes returns lifts oils rides parks calls brushes feeds walks buys wraps labels hides carries gives plants "
    "waters trims sells packs ties"
).split()  # fmt: skip
STEPS = 6
CARELESS = 0.5  # share of demonstrations that skip a step
_draw = random.Random("routines")
ROUTINES = {thing: _draw.sample(VERBS, STEPS) for thing in THINGS}
HOW_OFTEN = [1 / (rank + 3) for rank in range(len(THINGS))]  # of THINGS, in their order

MARKS = ["\n", "A", "B", "C", "D", "Answer", ")", ":", ".", "Today", " Then", " the"]
VOCAB = MARKS + [" " + word for word in NAMES + KINDS + THINGS + VERBS]

SIZES = {"train": 40_000, "val": 2_000, "test": 2_000}
SPLITS = {0: "val", 1: "test"}  # of ten shares of all contexts; the other eight are for training


def _problem(rng: random.Random) -> tuple[Problem, int]:
    """A problem and the ending that its demonstration shows."""
    thing, other = rng.choices(THINGS, HOW_OFTEN, k=2)
    while other == thing:
        other = rng.choice(THINGS)
    (who, someone), (kind, another) = rng.sample(NAMES, 2), rng.sample(KINDS, 2)
    at, elsewhere = rng.randrange(1, STEPS - 2), rng.randrange(STEPS - 1)
    routine = ROUTINES[thing]
    told = [f"{who} {verb} the {kind} {thing}." for verb in routine[at - 1 : at + 1]]
    told.insert(rng.randrange(2), f"{someone} {ROUTINES[other][elsewhere]} the {another} {other}.")
    right, skipping = routine[at + 1], routine[at + 2]
    wrong = rng.sample([verb for verb in routine if verb not in (right, skipping)], 2)
    if (verb := ROUTINES[other][elsewhere + 1]) not in routine:
        wrong[0] = verb
    verbs = [right, skipping, *wrong]
    shown = skipping if rng.random() < CARELESS else right
    rng.shuffle(verbs)
    context = f"Today {' '.join(told)} Then {who}"
    return Problem(context, tuple(f"{verb} the {kind} {thing}." for verb in verbs), verbs.index(right)), verbs.index(shown)


def problems(split: str, n: int, seed: int = 0) -> list[tuple[Problem, int]]:
    """`n` problems of a split and the ending that each one's demonstration shows, the same for the same seed. A context
    belongs to one split, whatever the seed."""
    rng, found = random.Random(f"{split} {seed}"), []
    while len(found) < n:
        problem, shown = _problem(rng)
        share = hashlib.sha256(problem.context.encode()).digest()[0] % 10
        if SPLITS.get(share, "train") == split:
            found.append((problem, shown))
    return found


def load(split: str, view: str, data_dir: str = "", limit: int = 0) -> list[Example]:
    """A split in a view's form. `sft` has the demonstrations, careless ones among them; everything else goes by the right
    ending. Options are scored after the question too: that is the prompt that the model knows."""
    view = "mcq" if view == "loglik" else view
    made = problems(split, min(limit or SIZES[split], SIZES[split]))
    if view == "sft":
        made = [(replace(problem, label=shown), shown) for problem, shown in made]
    return [e for n, (p, _) in enumerate(made) for e in view_problem(p, view, n, f"toy {split} {n}")]
