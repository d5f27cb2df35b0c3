"""Text in, examples out: `load` takes a recipe, a file or a data set of the hub and gives `Example`s (data/examples.py).

A recipe is one file in this folder and one line in `RECIPES`. The file has

    load(split, view, data_dir="", limit=0) -> list[Example]

split       "train", "val" or "test"; the training stages validate on "val"
view        "sft": one completion; "preference": chosen and rejected; "mcq" and "loglik": the options and a label. For a view
            that the data cannot give, raise UserError; `only_text_views` does it for data without options
data_dir    a folder with the data set's files (`local` finds them), or a file where the recipe takes one; "" = download
            them with `base.download.fetch`
limit       above 0: only the first so many problems
"""

import base.script  # noqa: F401  `python -m data` imports this file first

import difflib
import glob
from functools import partial
from pathlib import Path

from base.errors import UserError
from data import alpaca, hellaswag, hh, hub, human_labels, math_problems, own, reviews, toy
from data.examples import VIEWS, Example, local, move_space, only_text_views, question, report, split_of
from data.tables import ENDINGS

__all__ = ["RECIPES", "VIEWS", "Example", "load", "local", "move_space", "only_text_views", "question", "report", "split_of"]

SPLITS = ("train", "val", "test")  # of a recipe; a data set of the hub has its own

RECIPES = {
    "toy": toy.load,
    "reviews": reviews.load,
    "hellaswag": hellaswag.load,
    "hh": hh.load,
    "alpaca": alpaca.load,
    **{f"human_labels:{part}": partial(human_labels.load, part=part) for part in human_labels.FILES},
    **{name: partial(math_problems.load, part=name) for name in math_problems.NAMES},
}


def is_local(source: str) -> bool:
    """Whether data are files on this machine: no recipe, and not on the hub."""
    return source not in RECIPES and not source.startswith(hub.PREFIX)


def check_data(source: str) -> None:
    """UserError for data that are neither a recipe, nor on the hub, nor files that are there. Reads and downloads nothing."""
    if is_local(source):
        local_files(source)


def local_files(source: str) -> list[Path]:
    """The files that `source` names: paths or patterns (`part-*.jsonl`), with commas between. UserError if one is not there."""
    parts = [source] if Path(source).exists() else [part for part in source.split(",") if part]
    names = [name for part in parts for name in ([] if Path(part).exists() else sorted(glob.glob(part))) or [part]]
    for name in (name for name in names if not Path(name).exists()):
        if name.endswith(ENDINGS):
            raise UserError(f"{name}: no such file: check the path")
        known, near = ", ".join(sorted(RECIPES)), difflib.get_close_matches(name, RECIPES, n=1)
        hint = f": did you mean {near[0]}?" if near else ""
        raise UserError(
            f"data {name!r} is neither a recipe ({known}) nor a file ({', '.join(ENDINGS)}) nor hub:owner/name{hint}"
        )
    return [Path(name) for name in names]


def files(source: str, split: str) -> list[Path]:
    """The files behind data that are no recipe: those of `local_files`, or those of a data set on the hub, downloaded."""
    if not is_local(source):
        return hub.files(source, split)
    if split not in SPLITS:
        raise UserError(f"key split: {split!r}: the file {source} has no splits: leave it out")
    return local_files(source)


def load(source: str, split: str, view: str, *, data_dir: str = "", limit: int = 0, **rows) -> list[Example]:
    """Examples of a recipe's split, of a file (which is its own only split), or of a data set on the hub, in the form of a
    view.

    data_dir: a folder that holds a recipe's files under their published names, plain or .gz; "" = download them. limit:
    above 0, only the first so many problems. rows: `columns`, `min_gap` and `half`, for what is no recipe, see `own.load`.
    Raises UserError, naming file and line, for whatever is wrong with the data.
    """
    assert view in VIEWS, view
    if source not in RECIPES:
        return list(own.load(files(source, split), view, limit, **rows))
    columns, half = rows.get("columns"), rows.get("half")
    if rows.get("min_gap"):
        raise UserError(f"key min_gap: {rows['min_gap']}: the recipe {source} has no scores: leave it out")
    if split not in SPLITS or columns or half:
        name, given = ("val_share", half[1]) if half else ("columns", columns) if columns else ("split", split)
        raise UserError(f"key {name}: {given!r}: the recipe {source} has the splits {', '.join(SPLITS)} and its own columns")
    return RECIPES[source](split, view, data_dir=data_dir, limit=limit)
