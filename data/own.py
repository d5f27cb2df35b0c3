"""Your own files and those of the hub: JSON lines, a JSON list, CSV (plain or .gz) or parquet; each row has the fields

    sft          {"prompt", "completion"}, or a preference file, whose "chosen" is taken
    preference   {"prompt", "chosen", "rejected"}; or several completions of one prompt, and which are preferred to which:
                 {"prompt", "completions": […], "pairs": [[chosen, rejected], …]}, numbered from 0, or with "scores": […]
    mcq, loglik  {"prompt", "choices": […], "label": int}

Conversations, lists of messages in these fields or in `messages`: see data/messages.py. A file whose objects have the fields
of a published data set (HellaSwag, Alpaca, Anthropic HH) is read as that data set.
"""

import collections
import itertools
import sys
from collections.abc import Iterator
from pathlib import Path

from base.errors import UserError
from data import alpaca, hellaswag, hh, messages, tables
from data.examples import Example, half_of, move_space, only_text_views, report
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


def is_several(record: dict) -> bool:
    """Whether an object has several completions of its prompt, for preference data."""
    return "completions" in record and not {"completion", "chosen", "choices"} & record.keys()


def several(record: dict, view: str, where: str, min_gap: float) -> list[Example]:
    """A line with several completions, texts or conversations, as the examples of a view; none if no two scores are unequal and
    `min_gap` apart. For `sft` the completion that is chosen in most pairs is taken."""
    only_text_views(where, view)
    found = get(record, "completions", list, where)
    named = {f"completions[{i}]": answer for i, answer in enumerate(found)}
    if isinstance(record.get("prompt"), list):
        prompt = messages.conversation(record, "prompt", where, ends="user")
        answers = tuple(messages.conversation(named, name, where, prompt) for name in named)
    else:
        prompt = get(record, "prompt", str, where)
        answers = tuple(completion(named, name, where) for name in named)
    if len(found) < 2 or ("pairs" in record) == ("scores" in record):
        raise UserError(f"{where}: 'completions' must be two or more, and with them either 'pairs' or 'scores' must stand")
    pairs = given_pairs(record, len(found), where) if "pairs" in record else scored_pairs(record, len(found), where, min_gap)
    if view == "preference" or not pairs:
        return [Example(prompt, answers, source=where, pairs=pairs)] if pairs else []
    ((best, _),) = collections.Counter(chosen for chosen, _ in pairs).most_common(1)
    return [Example(prompt, (answers[best],), source=where)]


def given_pairs(record: dict, n: int, where: str) -> tuple[tuple[int, int], ...]:
    """The field `pairs`, checked: [chosen, rejected] each, numbers of two different ones of `n` completions."""
    pairs = get(record, "pairs", list, where)
    for pair in pairs or [pairs]:
        right = isinstance(pair, list) and len(pair) == 2 and all(type(i) is int and 0 <= i < n for i in pair)
        if not right or pair[0] == pair[1]:
            what = f"[chosen, rejected], the numbers of two completions (0 to {n - 1})"
            raise UserError(f"{where}: 'pairs' must be a list of {what}, not {pair!r:.60}")
    return tuple((chosen, rejected) for chosen, rejected in pairs)


def scored_pairs(record: dict, n: int, where: str, min_gap: float) -> tuple[tuple[int, int], ...]:
    """All pairs of completions by the field `scores`: the higher score is chosen, by `min_gap` at least. Ties are no pairs."""
    scores = get(record, "scores", list, where)
    for score in scores:
        if type(score) not in (int, float) or not abs(score) <= sys.float_info.max:  # nan is not
            raise UserError(f"{where}: 'scores' holds {score!r:.60}: a score is a finite number")
    if len(scores) != n:
        raise UserError(f"{where}: {len(scores)} 'scores' for {n} 'completions': give one each")
    both = itertools.permutations(range(n), 2)
    return tuple((i, j) for i, j in both if scores[i] > scores[j] and scores[i] - scores[j] >= min_gap)


def load(
    files: list[Path],
    view: str,
    limit: int = 0,
    columns: str = "",
    min_gap: float = 0.0,
    half: tuple[str, float] | None = None,
) -> Iterator[Example]:
    """Files, one behind the other, as the examples of a view, one by one; `limit` above 0 takes so many rows.

    columns: see `tables.read`. min_gap: see `several`. half: only the prompts of this half ("train" or "val", validation's
    share), see `half_of`. Prints what the first row is taken as.
    """
    found, taken, dropped = 0, 0, {}
    rows = (row for path in files for row in tables.read(path, 0 if half else limit, columns))
    for number, (where, record) in enumerate(rows):
        if limit and taken == limit:
            break
        ours = is_several(record)
        published = None if ours else next((recipe for recipe in PUBLISHED if recipe.is_record(record)), None)
        if number == 0:
            form = f"in the form of {published.__name__.removeprefix('data.')}" if published else "in the project's own form"
            renamed = f" (by columns {columns})" if columns else ""
            print(f"{where}: fields {', '.join(record)}{renamed}, read {form}", flush=True)
        if ours:
            made = several(record, view, where, min_gap)
        else:
            made = published.examples(record, view, number, where) if published else examples(record, view, where)
        if not made:
            why = "their scores make no pair" if ours else published.DROPPED
            dropped[why] = dropped.get(why, 0) + 1
        if half:
            made = [example for example in made if half_of(example, half[1]) == half[0]]
        taken += bool(made or not half)
        found += len(made)
        yield from made
    if half and not found:
        raise UserError(f"key val_share: {half[1]} leaves no prompt of {files[0]} for {half[0]}: give another, or more data")
    if dropped:
        report(str(files[0]), found, dropped)
