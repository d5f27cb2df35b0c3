"""Recipe E: Alpaca's instructions, Taori et al. 2023. https://github.com/tatsu-lab/stanford_alpaca

52,002 entries of instruction, input and output in one JSON list. Any file of such entries can be used in the same way, a list
or one entry a line: `--data alpaca --data_dir FILE` splits it, `--data FILE` takes it whole.
"""

from pathlib import Path

from base.download import cache_dir, fetch
from base.errors import UserError
from data.examples import Example, local, only_text_views, report, split_of
from data.jsonl import completion, get, read

URL = "https://raw.githubusercontent.com/tatsu-lab/stanford_alpaca/main/"
FILE = "alpaca_data.json"
VAL, TEST = 0.05, 0.10  # shares of all entries, drawn by their hash
DROPPED = "their output is empty"

# The data set's own prompt, by which models and judges know the task, and a new line, so that the answer begins a line.
ASKED = (
    "Below is an instruction that describes a task{paired}. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n{given}### Response:\n"
)
PAIRED = ", paired with an input that provides further context"


def prompt(instruction: str, given: str) -> str:
    """Alpaca's prompt for an instruction and its input, which may be empty."""
    more = {"paired": PAIRED, "given": f"### Input:\n{given}\n\n"} if given else {"paired": "", "given": ""}
    return ASKED.format(instruction=instruction, **more)


def is_record(record: dict) -> bool:
    """Whether an object has Alpaca's fields."""
    return "instruction" in record and "output" in record and "prompt" not in record


def examples(record: dict, view: str, group: int, where: str) -> list[Example]:
    """An entry as the examples of a view; none if its output is empty. `preference` needs the fields chosen and rejected."""
    only_text_views(where, view)
    instruction, given, output = (get(record, field, str, where).strip() for field in ("instruction", "input", "output"))
    if not instruction:
        raise UserError(f"{where}: the field 'instruction' is empty: every entry needs one")
    answers = (output,) if output else ()
    if view == "preference":
        answers = completion(record, "chosen", where), completion(record, "rejected", where)
    return [Example(prompt(instruction, given), answers, source=where)] if answers else []


def load(split: str, view: str, data_dir: str = "", limit: int = 0) -> list[Example]:
    """A split in a view's form. All entries with the same instruction and input are in the same split."""
    only_text_views("recipe alpaca", view)
    if Path(data_dir).is_file():
        file = Path(data_dir)
    else:
        file = local(data_dir, [FILE])[0] if data_dir else fetch(URL + FILE, cache_dir() / "alpaca" / FILE)
    found, empty = [], 0
    for where, record in read(file):
        made = examples(record, view, 0, where)
        empty += not made
        found += [e for e in made if split_of(e.prompt.encode(), VAL, TEST) == split]
    report(f"alpaca {split} of {file}", len(found), {f"{DROPPED} (in all splits)": empty})
    return found[: limit or None]
