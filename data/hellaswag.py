"""Recipe A: HellaSwag, Zellers et al. 2019 (arXiv 1905.07830). https://github.com/rowanz/hellaswag

39,905 training and 10,042 validation problems. Text is cleaned as lm-evaluation-harness cleans it
(lm_eval/tasks/hellaswag/utils.py), so that scores can be compared.
"""

import re
from pathlib import Path

from base.download import cache_dir, fetch
from base.errors import UserError
from data import Example, Problem, view_problem
from data.jsonl import get, read

URL = "https://raw.githubusercontent.com/rowanz/hellaswag/master/data/"
FILES = {"train": ("hellaswag_train.jsonl", 39_905), "val": ("hellaswag_val.jsonl", 10_042)}


def clean(text: str) -> str:
    """Without the WikiHow marks: ` [title]` becomes `. `, other `[…]` go, double spaces fold (once, as the harness does)."""
    text = text.strip().replace(" [title]", ". ")
    return re.sub(r"\[.*?\]", "", text).replace("  ", " ")


def is_record(record: dict) -> bool:
    return "endings" in record and ("ctx" in record or "ctx_a" in record)


def problem(record: dict, where: str, plain: bool = False) -> Problem:
    """A line of the published file. `plain` gives the context in the harness's form, "activity: context", for scoring;
    otherwise it is the context alone, as in recipe A's question. A file without `ctx_a` has its context in `ctx`."""
    if "ctx_a" in record:
        context = get(record, "ctx_a", str, where) + " " + get(record, "ctx_b", str, where).capitalize()
    else:
        context = get(record, "ctx", str, where)
    if plain:
        context = get(record, "activity_label", str, where) + ": " + context
    endings, label = get(record, "endings", list, where), record.get("label")
    if len(endings) != 4 or not all(isinstance(e, str) and e.strip() for e in endings):
        raise UserError(f"{where}: 'endings' must be a list of four texts")
    if isinstance(label, str) and label.isdigit():  # the published file has a number, the hub's copy a text
        label = int(label)
    if type(label) is not int:
        raise UserError(f"{where}: 'label' must be a number from 0 to 3, not {label!r:.40} (the test split has none)")
    if not 0 <= label < 4:
        raise UserError(f"{where}: label {label} is out of range: there are 4 endings, numbered from 0")
    return Problem(clean(context), tuple(clean(e) for e in endings), label)


def path(split: str, data_dir: str = "") -> Path:
    """The split's file: in `data_dir` (plain or .gz), or downloaded once into the cache and checked for its line count."""
    if split not in FILES:
        raise UserError(f"hellaswag has no {split} split with labels: use train or val")
    name, lines = FILES[split]
    if data_dir:
        for candidate in (Path(data_dir) / name, Path(data_dir) / (name + ".gz")):
            if candidate.is_file():
                return candidate
        raise UserError(f"data_dir {data_dir}: neither {name} nor {name}.gz is there")
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
    examples = []
    for number, (where, record) in enumerate(read(path(split, data_dir), limit)):
        examples += view_problem(problem(record, where, plain=view == "loglik"), view, number, where)
    return examples
