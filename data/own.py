"""Your own files and those of the hub: JSON lines, a JSON list, CSV (plain or .gz) or parquet; each row has the fields

    sft          {"prompt", "completion"}, or a preference file, whose "chosen" is taken
    preference   {"prompt", "chosen", "rejected"}; or several completions of one prompt, and which are preferred to which:
                 {"prompt", "completions": […], "pairs": [[chosen, rejected], …]}, numbered from 0, or with "scores": […]
                 or unpaired: {"prompt", "completion", "label": true or false}, see `lend`
    mcq, loglik  {"prompt", "choices": […], "label": int}
    all of them  {"question", "choices", "answer" or "answerKey"}, as MMLU and ARC have it: see `choice`

Conversations, lists of messages in these fields or in `messages`: see data/messages.py. A file whose objects have the fields
of a published data set (HellaSwag, Alpaca, Anthropic HH) is read as that data set.
"""

import collections
import itertools
import sys
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path

from base.errors import UserError
from data import alpaca, hellaswag, hh, messages, tables
from data.examples import Example, Problem, half_of, move_space, only_text_views, report, view_problem
from data.jsonl import completion, get, index, missing

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
    absent = [field for field in fields if field not in record]
    if not absent:
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
    raise missing(record, absent[0], where, hint)


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


def is_several(record: dict) -> bool:
    """Whether an object has several completions of its prompt, for preference data."""
    return "completions" in record and not {"completion", "chosen", "choices"} & record.keys()


def several(record: dict, view: str, where: str, min_gap: float) -> list[Example]:
    """A line with several completions, texts or conversations, as the examples of a view; none if no two scores are unequal and
    `min_gap` apart. For `sft` the one of the best score, or that is chosen in most pairs, is taken."""
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
    wins = collections.Counter(chosen for chosen, _ in pairs)
    best = max(wins, key=lambda i: record["scores"][i] if "scores" in record else wins[i])
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


def is_unpaired(record: dict) -> bool:
    """Whether an object has one completion, where preference data are read."""
    return "completion" in record and not {"chosen", "rejected", "completions"} & record.keys()


def labelled(made: list[Example], record: dict, where: str) -> list[Example]:
    """Examples of one completion with the field `label`: 1 where it is true (desirable), 0 where it is false."""
    if "label" not in record:
        raise missing(record, "label", where, ": unpaired data have it (true or false), and pairs have chosen and rejected")
    return [replace(example, label=int(get(record, "label", bool, where))) for example in made]


def lend(examples: Iterable[Example]) -> Iterator[Example]:
    """Unpaired examples, each with a second completion, which another prompt was answered with: KTO estimates a KL from such.

    An example borrows it from the last one before it that has another prompt. The first ones have none before them: they come
    at the end, and borrow from the last one, or the last one of another prompt. UserError if all have the same prompt.
    """
    waiting, last, other = [], None, None
    for example in examples:
        if last and last.prompt != example.prompt:
            other = last
        last = example
        if other:
            yield replace(example, completions=example.completions + other.completions)
        else:
            waiting.append(example)
    if waiting and not other:
        raise UserError(f"{waiting[0].source}: unpaired data need two prompts or more, and these have one: give more data")
    for example in waiting:
        lender = other if last.prompt == example.prompt else last
        yield replace(example, completions=example.completions + lender.completions)


def load(files: list[Path], view: str, limit: int = 0, *, unpaired: bool = False, **how) -> Iterator[Example]:
    """Files as the examples of a view, see `rows`. unpaired: take unpaired data, too, in the preference view, see `lend`."""
    made = rows(files, view, limit, unpaired=unpaired, **how)
    first = next(made, None)
    found = itertools.chain([first] if first else [], made)
    yield from lend(found) if view == "preference" and first and first.label is not None else found


def rows(
    files: list[Path],
    view: str,
    limit: int = 0,
    columns: str = "",
    min_gap: float = 0.0,
    half: tuple[str, float] | None = None,
    unpaired: bool = False,
) -> Iterator[Example]:
    """Files, one behind the other, as the examples of a view, one by one; `limit` above 0 takes so many rows.

    columns: see `tables.read`. min_gap: see `several`. half: only the prompts of this half ("train" or "val", validation's
    share), see `half_of`. Prints what the first row is taken as.
    """
    found, taken, dropped, single = 0, 0, {}, False
    read = (row for path in files for row in tables.read(path, 0 if half else limit, columns))
    for number, (where, record) in enumerate(read):
        if limit and taken == limit:
            break
        if view == "preference" and (is_unpaired(record) and (unpaired or "label" in record)) != single:
            if number or not unpaired:
                what = "a pair where unpaired lines were expected" if single else "an unpaired line where pairs were expected"
                raise UserError(f"{where}: {what}: keep both in files of their own; dpo.py --loss kto takes unpaired lines")
            single = True
        ours = is_several(record)
        published = None if ours else next((recipe for recipe in PUBLISHED if recipe.is_record(record)), None)
        if number == 0:
            form = f"in the form of {published.__name__.removeprefix('data.')}" if published else "in the project's own form"
            renamed = f" (by columns {columns})" if columns else ""
            print(f"{where}: fields {', '.join(record)}{renamed}, read {form}", flush=True)
        if ours:
            made = several(record, view, where, min_gap)
        else:
            kind, make = "sft" if single else view, published.examples if published else examples
            made = make(record, kind, number, where)
        if single:
            made = labelled(made, record, where)
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
