"""Recipe E: Alpaca's instructions, Taori et al. 2023. https://github.com/tatsu-lab/stanford_alpaca

52,002 entries of instruction, input and output in one JSON list. Any file of such entries, as a list or one a line, goes the
same way: `--data alpaca --data_dir FILE` splits it, `--data FILE` takes it whole.
"""

from pathlib import Path

from base.download import cache_dir, fetch
from base.errors import UserError
from data import Example, local, only_text_views, report, split_of
from data.jsonl import completion, get, read

URL = "https://raw.githubusercontent.com/tatsu-lab/stanford_alpaca/main/"
FILE = "alpaca_data.json"
VAL, TEST = 0.05, 0.10  # shares of all entries, drawn by their hash

# The data set's own prompt, by which models and judges know the task, and a new line behind it, so that the answer begins one.
ASKED = (
    "Below is an instruction that describes a task{paired}. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n{given}### Response:\n"
)
PAIRED = ", paired with an input that provides further context"


def prompt(instruction: str, given: str) -> str:
    """Alpaca's prompt, with the input or without; the output follows as it is."""
    more = {"paired": PAIRED, "given": f"### Input:\n{given}\n\n"} if given else {"paired": "", "given": ""}
    return ASKED.format(instruction=instruction, **more)


def is_record(record: dict) -> bool:
    return "instruction" in record and "prompt" not in record


def example(record: dict, view: str, where: str) -> Example | None:
    """An entry in a view's form; None if its output is empty. `preference` needs the fields chosen and rejected too."""
    only_text_views("alpaca", view)
    instruction, given, output = (get(record, field, str, where).strip() for field in ("instruction", "input", "output"))
    if not instruction:
        raise UserError(f"{where}: the field 'instruction' is empty: every entry needs one")
    if view == "preference":
        both = tuple(completion(get(record, field, str, where), field, where) for field in ("chosen", "rejected"))
        return Example(prompt(instruction, given), both, source=where)
    return Example(prompt(instruction, given), (output,), source=where) if output else None


def path(data_dir: str = "") -> Path:
    """The published file, from `data_dir` or downloaded once; or the file that `data_dir` is."""
    if Path(data_dir).is_file():
        return Path(data_dir)
    return local(data_dir, [FILE])[0] if data_dir else fetch(URL + FILE, cache_dir() / "alpaca" / FILE)


def load(split: str, view: str, data_dir: str = "", limit: int = 0) -> list[Example]:
    """A split in a view's form. An entry belongs to one split, and so do all that have its instruction and input."""
    file = path(data_dir)
    examples, empty = [], 0
    for where, record in read(file):
        made = example(record, view, where)
        if made is None:
            empty += 1
        elif split_of(made.prompt.encode(), VAL, TEST) == split:
            examples.append(made)
    report(f"alpaca {split} of {file}", len(examples), {"their output is empty (in all splits)": empty})
    if not examples:
        raise UserError(f"{file}: no entry of it falls into the {split} split: use --data {file} to take it whole")
    return examples[:limit] if limit else examples
