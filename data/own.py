"""Your own files: one JSON object a line (in a .json file: or one list of them), plain or .gz.

    sft          {"prompt", "completion"}, or a preference file, whose "chosen" is taken
    preference   {"prompt", "chosen", "rejected"}
    mcq, loglik  {"prompt", "choices": […], "label": int}

Conversations, lists of messages in these fields or in `messages`: see data/messages.py. A file whose objects have the fields
of a published data set (HellaSwag, Alpaca, Anthropic HH) is read as that data set.
"""

from base.errors import UserError
from data import alpaca, hellaswag, hh, messages
from data.examples import Example, move_space, report
from data.jsonl import completion, get, index, read

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


def load(path: str, view: str, limit: int = 0) -> list[Example]:
    """A file as the examples of a view; `limit` above 0 takes so many lines."""
    found, dropped = [], {}
    for number, (where, record) in enumerate(read(path, limit)):
        published = next((recipe for recipe in PUBLISHED if recipe.is_record(record)), None)
        made = published.examples(record, view, number, where) if published else examples(record, view, where)
        if not made:
            dropped[published.DROPPED] = dropped.get(published.DROPPED, 0) + 1
        found += made
    if dropped:
        report(path, len(found), dropped)
    return found
