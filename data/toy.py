"""The toy task of `make demo`: everyday routines as multiple-choice questions in HellaSwag's shape, made by code.

    Today Tom irons the old shirt. Mia soaks the red scarf. Mia washes the red scarf. Then Mia
    A) folds the red scarf.  B) dries the red scarf.  C) …

Every thing has a routine of its own, six steps in a fixed order, drawn once and for all: nothing but training tells what
comes after washing a scarf. The wrong endings are other steps of the same routine, and the next step of the other person's,
so they are as plausible as the right one to whoever has not learnt the routine. Some things come up often, some rarely
(Zipf's law), so that a model learns the task little by little and can be stopped half-way.
"""

import hashlib
import random

from data import Example, Problem, view_problem

NAMES = "Mia Tom Ana Leo Ida Max Zoe Ben Eva Sam".split()
KINDS = "red blue green white old new big small".split()
THINGS = (
    "scarf shirt towel blanket curtain quilt plate cup pan tray loaf cake pie pizza carrot potato onion apple letter card "
    "note form radio clock lamp phone shelf frame box mirror book map atlas novel bike cart wagon sled dog cat pony rabbit "
    "doll kite puzzle drum rose tulip daisy fern tent flag net rope vase jug mug bowl poster mask"
).split()
VERBS = (
    "sorts soaks washes dries irons folds clears scrubs rinses stacks mixes kneads shapes bakes cools slices picks peels chops "
    "boils writes reads seals stamps posts opens checks cleans fixes tests measures saws sands glues paints hangs finds "
    "borrows closes returns lifts oils rides parks calls brushes feeds walks buys wraps labels hides carries gives plants "
    "waters trims sells packs ties"
).split()
STEPS = 6
_draw = random.Random("routines")
ROUTINES = {thing: _draw.sample(VERBS, STEPS) for thing in THINGS}
HOW_OFTEN = [1 / (rank + 3) for rank in range(len(THINGS))]  # of THINGS, in their order

MARKS = ["\n", "A", "B", "C", "D", "Answer", ")", ":", ".", "Today", " Then", " the"]
VOCAB = MARKS + [" " + word for word in NAMES + KINDS + THINGS + VERBS]

SIZES = {"train": 40_000, "val": 2_000, "test": 2_000}
SPLITS = {0: "val", 1: "test"}  # of ten shares of all contexts; the other eight are for training


def _problem(rng: random.Random) -> Problem:
    thing, other = rng.choices(THINGS, HOW_OFTEN, k=2)
    while other == thing:
        other = rng.choice(THINGS)
    (who, someone), (kind, another) = rng.sample(NAMES, 2), rng.sample(KINDS, 2)
    at, elsewhere = rng.randrange(1, STEPS - 1), rng.randrange(STEPS - 1)
    routine = ROUTINES[thing]
    told = [f"{who} {verb} the {kind} {thing}." for verb in routine[at - 1 : at + 1]]
    told.insert(rng.randrange(2), f"{someone} {ROUTINES[other][elsewhere]} the {another} {other}.")
    right = routine[at + 1]
    wrong = rng.sample([verb for verb in routine if verb != right], 3)
    if (verb := ROUTINES[other][elsewhere + 1]) not in routine:
        wrong[0] = verb
    verbs = [right, *wrong]
    rng.shuffle(verbs)
    context = f"Today {' '.join(told)} Then {who}"
    return Problem(context, tuple(f"{verb} the {kind} {thing}." for verb in verbs), verbs.index(right))


def problems(split: str, n: int, seed: int = 0) -> list[Problem]:
    """`n` problems of a split, the same for the same seed. A context belongs to one split, whatever the seed."""
    rng, found = random.Random(f"{split} {seed}"), []
    while len(found) < n:
        problem = _problem(rng)
        share = hashlib.sha256(problem.context.encode()).digest()[0] % 10
        if SPLITS.get(share, "train") == split:
            found.append(problem)
    return found


def load(split: str, view: str, data_dir: str = "", limit: int = 0) -> list[Example]:
    """A split in a view's form. Options are scored after the question too: that is the prompt that the model knows."""
    view = "mcq" if view == "loglik" else view
    made = problems(split, min(limit or SIZES[split], SIZES[split]))
    return [e for n, p in enumerate(made) for e in view_problem(p, view, n, f"toy {split} {n}")]
