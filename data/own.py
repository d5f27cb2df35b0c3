"""Your own files and those of the hub: JSON lines, a JSON list, CSV (plain or .gz) or parquet; each row has the fields

    sft          {"prompt", "completion"}, or a preference file, whose "chosen" is taken
    preference   {"prompt", "chosen", "rejected"}
    mcq, loglik  {"prompt", "choices": […], "label": int}

Conversations, lists of messages in these fields or in `messages`: see data/messages.py. A file whose objects have the fields
of a published data set (HellaSwag, Alpaca, Anthropic HH) is read as that data set.
"""

from collections.abc import Iterator
from pathlib import Path

from base.errors import UserError
from data import alpaca, hellaswag, hh, messages, tables
from data.examples import Example, half_of, move_space, report
from data.jsonl import completion, get, index

# Each has is_record(record) and examples(record, view, group, where); DROPPED says why examples() may give none.
PUBLISHED = (messages, hellaswag, alpaca, hh)


def examples(record: dict, view: str, where: str) -> list[Example]:
    """A line in your own format as the examples of a view."""
    prompt = get(record, "prompt", str, where)
    if view in ("sft", "preference"):
        answer = "completion" if "completion" in record or "chosen" not in record else "chosen"
        fields = (answer,) if view == "sft" else ("chosen", "rejected")
        return [Example(prompt, tuple(completion(record, field, where) for field in fields), source=where)]
    choices = get(record, "choices", list, where)
    if len(choices) < 2 or not all(isinstance(c, str) and c for c in choices):
        raise UserError(f"{where}: 'choices' must be a list of at least two texts, none of them empty")
    example = Example(prompt, tuple(choices), index(record, "label", len(choices), where), source=where)
    return [move_space(example) if view == "loglik" else example]


def load(
    files: list[Path], view: str, limit: int = 0, columns: str = "", half: tuple[str, float] | None = None
) -> Iterator[Example]:
    """Files, one behind the other, as the examples of a view, one by one; `limit` above 0 takes so many rows.

    columns: see `tables.read`. half: only the prompts of this half, ("train" or "val", validation's share), see `half_of`.
    Prints what the first row is taken as.
    """
    found, taken, dropped = 0, 0, {}
    rows = (row for path in files for row in tables.read(path, 0 if half else limit, columns))
    for number, (where, record) in enumerate(rows):
        if limit and taken == limit:
            break
        published = next((recipe for recipe in PUBLISHED if recipe.is_record(record)), None)
        if number == 0:
            form = f"in the form of {published.__name__.removeprefix('data.')}" if published else "in the project's own form"
            renamed = f" (by columns {columns})" if columns else ""
            print(f"{where}: fields {', '.join(record)}{renamed}, read {form}", flush=True)
        made = published.examples(record, view, number, where) if published else examples(record, view, where)
        if not made:
            dropped[published.DROPPED] = dropped.get(published.DROPPED, 0) + 1
        if half:
            made = [example for example in made if half_of(example, half[1]) == half[0]]
        taken += bool(made or not half)
        found += len(made)
        yield from made
    if half and not found:
        raise UserError(f"key val_share: {half[1]} leaves no prompt of {files[0]} for {half[0]}: give another, or more data")
    if dropped:
        report(str(files[0]), found, dropped)
