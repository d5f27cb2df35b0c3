"""Your own files and those of the hub: JSON lines, a JSON list, CSV (plain or .gz) or parquet; each row has the fields

    sft          {"prompt", "completion"}, or a preference file, whose "chosen" is taken
    preference   {"prompt", "chosen", "rejected"}
    mcq, loglik  {"prompt", "choices": […], "label": int}
    all of them  {"question", "choices", "answer" or "answerKey"}, as MMLU and ARC have it: see `choice`

Conversations, lists of messages in these fields or in `messages`: see data/messages.py. A file whose objects have the fields
of a published data set (HellaSwag, Alpaca, Anthropic HH) is read as that data set.
"""

import itertools
from collections.abc import Iterator
from pathlib import Path

from base.errors import UserError
from data import alpaca, hellaswag, hh, messages, tables
from data.examples import Example, Problem, move_space, report, view_problem
from data.jsonl import completion, get, index

# Each has is_record(record) and examples(record, view, group, where); DROPPED says why examples() may give none.
PUBLISHED = (messages, hellaswag, alpaca, hh)
OTHERS = {  # our fields -> what other formats call them
    "prompt": "question instruction query input problem context user text",
    "completion": "response answer output target solution assistant",
    "chosen": "preferred accepted response_chosen chosen_response answer_chosen better good",
    "rejected": "dispreferred response_rejected rejected_response answer_rejected worse bad",
    "choices": "options answers endings",
    "label": "answer gold target correct",
}
CONVERSATIONS = ("conversations", "conversation", "dialogue", "dialog", "turns")


def need(record: dict, fields: tuple[str, ...], where: str) -> None:
    """UserError if one of the fields is missing. It names the fields of other formats, and the --columns that takes them."""
    missing = [field for field in fields if field not in record]
    if not missing:
        return
    columns = {f: f if f in record else next((n for n in OTHERS[f].split() if n in record), "") for f in fields}
    found = [name for field, name in columns.items() if name not in ("", field)]
    say = f"--columns {','.join(f'{field}={name}' for field, name in columns.items())}" if all(columns.values()) else ""
    talk = next((record[name] for name in CONVERSATIONS if name in record and "completion" in fields), None)
    if isinstance(talk, list) and talk and isinstance(talk[0], dict):
        found = [name for name in CONVERSATIONS if name in record]
        same = f"as {{{', '.join(talk[0])}}}: write it as `messages` of {{role, content}}"
        say = f"--columns messages={found[0]}" if "role" in talk[0] else same
    hint = f"; found {', '.join(found)}{': ' if say.startswith('--') else ' '}{say}".rstrip() if found else ""
    there = ", ".join(sorted(record)) or "none"
    raise UserError(f"{where}: the field {missing[0]!r} is missing (fields there: {there}){hint}")


def choice(record: dict, view: str, group: int, where: str) -> list[Example]:
    """A question as MMLU has it, {"question", "choices": [texts], "answer": index}, or as ARC has it, {"question", "choices":
    {"text": [texts], "label": [names]}, "answerKey": a name}. Scored after "Question: …\nAnswer:", as lm-evaluation-harness
    does for ARC; elsewhere the prompt lists the options (`data.examples.question`)."""
    question, texts = get(record, "question", str, where), record["choices"]
    if isinstance(texts, dict):
        names, key = get(texts, "label", list, where), get(record, "answerKey", str, where)
        if key not in names:
            raise UserError(f"{where}: answerKey {key!r} is not one of {', '.join(map(str, names))}")
        texts, record = get(texts, "text", list, where), {"answer": names.index(key)}
    texts = options(texts, where)
    context = f"Question: {question}\nAnswer:" if view == "loglik" else question
    return view_problem(Problem(context, texts, index(record, "answer", len(texts), where)), view, group, where)


def options(texts: list, where: str) -> tuple[str, ...]:
    """The options of a question; UserError unless they are at least two texts."""
    if not isinstance(texts, list) or len(texts) < 2 or not all(isinstance(text, str) and text for text in texts):
        raise UserError(f"{where}: 'choices' must be a list of at least two texts, none of them empty")
    return tuple(texts)


def examples(record: dict, view: str, group: int, where: str) -> list[Example]:
    """A line in your own format as the examples of a view."""
    if "prompt" not in record and {"question", "choices"} <= record.keys() and {"answer", "answerKey"} & record.keys():
        return choice(record, view, group, where)
    answer = "completion" if "completion" in record or "chosen" not in record else "chosen"
    fields = {"sft": (answer,), "preference": ("chosen", "rejected")}.get(view, ("choices", "label"))
    need(record, ("prompt", *fields), where)
    prompt = get(record, "prompt", str, where)
    if view in ("sft", "preference"):
        return [Example(prompt, tuple(completion(record, field, where) for field in fields), source=where)]
    choices = options(get(record, "choices", list, where), where)
    example = Example(prompt, choices, index(record, "label", len(choices), where), source=where)
    return [move_space(example) if view == "loglik" else example]


def load(files: list[Path], view: str, limit: int = 0, columns: str = "") -> Iterator[Example]:
    """Files, one behind the other, as the examples of a view, one by one; `limit` above 0 takes so many rows.

    columns: see `tables.read`. Prints what the first row is taken as.
    """
    found, dropped = 0, {}
    rows = (row for path in files for row in tables.read(path, limit, columns))
    for number, (where, record) in enumerate(itertools.islice(rows, limit or None)):
        published = next((recipe for recipe in PUBLISHED if recipe.is_record(record)), None)
        if number == 0:
            form = f"in the form of {published.__name__.removeprefix('data.')}" if published else "in the project's own form"
            renamed = f" (by columns {columns})" if columns else ""
            print(f"{where}: fields {', '.join(record)}{renamed}, read {form}", flush=True)
        made = published.examples(record, view, number, where) if published else examples(record, view, number, where)
        if not made:
            dropped[published.DROPPED] = dropped.get(published.DROPPED, 0) + 1
        found += len(made)
        yield from made
    if dropped:
        report(str(files[0]), found, dropped)
