"""The toy task of `make demo`: everyday procedures as multiple-choice questions in HellaSwag's shape, made by code.

Two people do the same kind of work, each on a thing of their own:

    Laundry: Mia soaks the red scarf. Tom irons the old shirt. Mia washes the red scarf.

The right ending is what the last one named does next, with the same thing ("Mia dries the red scarf."). The wrong
endings mix in another step of the work, the other one's thing, or the other one. Two of these three slots vary, each
with two values, and the four options are their combinations: every value stands in two options, so the options alone
give nothing away, and a model that gets one slot right and guesses the other is right half the time.
"""

import hashlib
import random
from dataclasses import dataclass

# Work -> (its steps in order, what it is done to). Steps recur across works in another order.
WORKS = {
    "Laundry": ("sorts soaks washes dries irons folds", "shirt scarf towel dress blanket"),
    "Dishes": ("clears soaks scrubs rinses dries stacks", "plate bowl cup pan tray"),
    "Baking": ("mixes kneads shapes bakes cools slices", "loaf cake pie pizza tart"),
    "Cooking": ("picks washes peels chops boils serves", "carrot potato onion turnip beet"),
    "Mail": ("writes reads folds seals stamps posts", "letter card note form bill"),
    "Repairs": ("opens checks cleans fixes tests closes", "radio clock lamp phone camera"),
    "Woodwork": ("measures saws sands glues paints hangs", "shelf frame box sign mirror"),
    "Library": ("finds borrows opens reads closes returns", "book map novel atlas magazine"),
    "Garage": ("lifts cleans oils tests rides parks", "bike scooter cart wagon sled"),
    "Pets": ("calls brushes washes dries feeds walks", "dog cat pony goat rabbit"),
    "Gifts": ("buys wraps labels hides carries gives", "doll kite puzzle ball drum"),
    "Garden": ("buys plants waters trims picks sells", "rose lily tulip daisy fern"),
    "Camping": ("carries unpacks spreads ties checks packs", "tent tarp hammock flag net"),
    "Pottery": ("shapes dries sands paints fires sells", "vase jug mug dish pot"),
    "Sewing": ("measures cuts pins sews irons hangs", "curtain quilt apron skirt vest"),
    "Drawing": ("sketches checks paints frames labels gives", "portrait poster picture banner mask"),
}
NAMES = ["Mia", "Tom", "Ana", "Leo", "Ida", "Max", "Zoe", "Ben", "Eva", "Sam"]
KINDS = ["red", "blue", "green", "white", "old", "new", "big", "small"]


@dataclass(frozen=True)
class Problem:
    context: str
    endings: tuple[str, ...]
    label: int  # which of the endings is right
    work: str = ""
    slots: str = ""


def make(rng):
    work = rng.choice(list(WORKS))
    steps, things = (words.split() for words in WORKS[work])
    who = rng.sample(NAMES, 2)
    kinds, items = rng.sample(KINDS, 2), rng.sample(things, 2)
    what = [f"the {k} {i}" for k, i in zip(kinds, items)]
    at = rng.randrange(1, len(steps) - 1)
    other = rng.randrange(len(steps))
    told = [(0, at - 1), (0, at)]
    told.insert(rng.randrange(2), (1, other))
    context = work + ": " + " ".join(f"{who[p]} {steps[s]} {what[p]}." for p, s in told)
    wrong = rng.choice([s for s in range(len(steps)) if s != at + 1])
    slots = rng.choice(["who step", "who what", "step what"])
    endings = []
    for a in (0, 1):
        for b in (0, 1):
            v = dict(zip(slots.split(), (a, b)))
            endings.append(f"{who[v.get('who', 0)]} {steps[wrong if v.get('step') else at + 1]} {what[v.get('what', 0)]}.")
    right = endings[0]
    rng.shuffle(endings)
    return Problem(context, tuple(endings), endings.index(right), work, slots + f" {wrong-at-1}")


MARKS = ["\n", "A", "B", "C", "D", "Answer", ")", ":", "."]
VOCAB = MARKS + list(WORKS) + [" " + w for w in sorted({"the", *NAMES, *KINDS, *(x for a, b in WORKS.values() for x in (a + " " + b).split())})]


def problems(split, n, seed=0):
    found, seen, i = [], set(), 0
    rng = random.Random(f"{seed}")
    while len(found) < n:
        p = make(rng)
        h = int(hashlib.sha256(p.context.encode()).hexdigest(), 16) % 10
        if {0: "val", 1: "test"}.get(h, "train") == split:
            found.append(p)
    return found
