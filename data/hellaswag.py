"""Recipe A: HellaSwag, Zellers et al. 2019 (arXiv 1905.07830). https://github.com/rowanz/hellaswag

39,905 training and 10,042 validation problems. Text is cleaned as lm-evaluation-harness cleans it
(lm_eval/tasks/hellaswag/utils.py), so that scores can be compared.
"""

import re
from pathlib import Path

from base.download import cache_dir, fetch
from base.errors import UserError
from data.examples import Example, Problem, local, view_problem
from data.jsonl import get, index, read

URL = "https://raw.githubusercontent.com/rowanz/hellaswag/master/data/"
FILES = {"train": ("hellaswag_train.jsonl", 39_905), "val": ("hellaswag_val.jsonl", 10_042)}  # name, lines


def clean(text: str) -> str:
    """Text without WikiHow's marks: ` [title]` becomes `. `, other `[…]` go, and double spaces become one (once)."""
    text = text.strip().replace(" [title]", ". ")
    return re.sub(r"\[.*?\]", "", text).replace("  ", " ")


def is_record(record: dict) -> bool:
    """Whether an object has HellaSwag's fields."""
    return "endings" in record and ("ctx" in record or "ctx_a" in record)


def examples(record: dict, view: str, group: int, where: str) -> list[Example]:
    """A line as the examples of a view. For `loglik` the context has the harness's form, "activity: context". A line without
    `ctx_a` has its context in `ctx`."""
    if "ctx_a" in record:
        context = get(record, "ctx_a", str, where) + " " + get(record, "ctx_b", str, where).capitalize()
    else:
        context = get(record, "ctx", str, where)
    if view == "loglik":
        context = get(record, "activity_label", str, where) + ": " + context
    endings, label = get(record, "endings", list, where), record.get("label")
    if len(endings) != 4 or not all(isinstance(e, str) and e.strip() for e in endings):
        raise UserError(f"{where}: 'endings' must be a list of four texts")
    if isinstance(label, str) and label.isdigit():  # the published file has a number, the hub's copy a text
        record = {**record, "label": int(label)}
    problem = Problem(clean(context), tuple(clean(e) for e in endings), index(record, "label", 4, where))
    return view_problem(problem, view, group, where)


def path(split: str, data_dir: str = "") -> Path:
    """The split's file: in `data_dir`, or downloaded once into the cache and checked for its number of lines."""
    if split not in FILES:
        raise UserError(f"hellaswag has no {split} split with labels: use train or val")
    name, lines = FILES[split]
    if data_dir:
        return local(data_dir, [name])[0]
    target = cache_dir() / "hellaswag" / name
    if not target.exists():
        fetch(URL + name, target)
        with open(target, "rb") as file:
            found = sum(1 for _ in file)
        if found != lines:
            target.unlink()
            raise UserError(f"{URL + name}: {found} lines where {lines} were published: not the data set; start again")
    return target


def load(split: str, view: str, data_dir: str = "", limit: int = 0) -> list[Example]:
    """A split in a view's form; `limit` counts problems."""
    lines = enumerate(read(path(split, data_dir), limit))
    return [e for number, (where, record) in lines for e in examples(record, view, number, where)]
