"""Text in, examples out: `load` takes a recipe's name or a file and gives a list of `Example` (data/examples.py).

A recipe is one file in this folder and one line in `RECIPES`. The file has

    load(split, view, data_dir="", limit=0) -> list[Example]

split       "train", "val" or "test"; the training stages validate on "val"
view        "sft": one completion; "preference": chosen and rejected; "mcq" and "loglik": the options and a label. For a view
            that the data cannot give, raise UserError; `only_text_views` does it for data without options
data_dir    a folder with the data set's files (`local` finds them), or a file where the recipe takes one; "" = download
            them with `base.download.fetch`
limit       above 0: only the first so many problems
"""

import difflib
from functools import partial
from pathlib import Path

from base.errors import UserError
from data import alpaca, hellaswag, hh, human_labels, math_problems, own, reviews, toy
from data.examples import VIEWS, Example, local, move_space, only_text_views, question, report, split_of

__all__ = ["RECIPES", "VIEWS", "Example", "load", "local", "move_space", "only_text_views", "question", "report", "split_of"]

RECIPES = {
    "toy": toy.load,
    "reviews": reviews.load,
    "hellaswag": hellaswag.load,
    "hh": hh.load,
    "alpaca": alpaca.load,
    **{f"human_labels:{part}": partial(human_labels.load, part=part) for part in human_labels.FILES},
    **{name: partial(math_problems.load, part=name) for name in math_problems.NAMES},
}


def load(source: str, split: str, view: str, *, data_dir: str = "", limit: int = 0) -> list[Example]:
    """Examples of a recipe's split, or of a file (which is its own only split), in the form of a view.

    data_dir: a folder that holds a recipe's files under their published names, plain or .gz; "" = download them. limit:
    above 0, only the first so many problems. Raises UserError, naming file and line, for whatever is wrong with the data.
    """
    assert view in VIEWS, view
    if source in RECIPES:
        return RECIPES[source](split, view, data_dir=data_dir, limit=limit)
    if not source.endswith((".jsonl", ".jsonl.gz", ".json", ".json.gz")) and not Path(source).exists():
        known, near = ", ".join(sorted(RECIPES)), difflib.get_close_matches(source, RECIPES, n=1)
        hint = f": did you mean {near[0]}?" if near else ""
        raise UserError(f"data {source!r} is neither a recipe ({known}) nor a .jsonl or .jsonl.gz file{hint}")
    return own.load(source, view, limit)
