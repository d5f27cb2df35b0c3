"""What is judged: answers and what each is compared with, out of JSONL files or of preference data."""

from dataclasses import dataclass

from base.errors import UserError
from data import RECIPES, jsonl, load, messages
from data.hh import TURN

# fields that hold an answer to compare with; the first one found is taken
REFERENCES = ("chosen", "completion", "output", "messages")


@dataclass(frozen=True)
class Item:
    """A prompt, and for each trial the text to judge and the one to compare it with. `source`: file:line."""

    prompt: str
    texts: tuple[str, ...]
    others: tuple[str, ...]
    source: str


def completions_of(record: dict, where: str, trials: int) -> tuple[str, ...]:
    """A text a trial: the t-th completion, or the only one every time."""
    found = jsonl.entries(record, "completions", str, "texts", where)
    if 1 < len(found) < trials:
        raise UserError(f"{where}: {len(found)} completions for {trials} trials: give one, or as many as trials")
    return tuple(text.strip() for text in (found * trials if len(found) == 1 else found)[:trials])


def reference_of(record: dict, field: str, prompt: str, where: str) -> str:
    """The text of a field, or if none is named of the first of REFERENCES that is there.

    A dialogue in Anthropic HH's form begins with its prompt, which is cut off.
    """
    field = field or next((name for name in REFERENCES if name in record), REFERENCES[0])
    found = record.get(field)
    if isinstance(found, list) and found and isinstance(found[-1], dict):  # messages, of which the last is the answer
        if found[-1].get("role") != "assistant":
            raise UserError(f"{where}: {field!r} ends with no answer to compare with: name another in --against")
        record, field = found[-1], "content"
    text = jsonl.get(record, field, str, where)
    return (text.removeprefix(prompt) if prompt.endswith(TURN) else text).strip()


def read_items(responses: str, against: str, trials: int, limit: int) -> list[Item]:
    """The responses and what each is compared with. UserError, naming file and line, for whatever does not fit."""
    ours = list(jsonl.read(responses))
    from_file = against.endswith((".jsonl", ".jsonl.gz", ".json", ".json.gz"))
    theirs = list(jsonl.read(against)) if from_file else ours
    same = "line for line they must be answers to the same prompts"
    if len(ours) != len(theirs):
        raise UserError(f"{responses} has {len(ours):,} lines and {against} has {len(theirs):,}: {same}")
    items = []
    for (where, record), (there, other) in list(zip(ours, theirs, strict=True))[: limit or None]:
        prompt = messages.as_text(messages.prompt_of(record, where))
        if (messages.is_record(other) or "prompt" in other) and messages.as_text(messages.prompt_of(other, there)) != prompt:
            raise UserError(f"{there}: another prompt than at {where}: {same}")
        if from_file and "completions" in other:
            others = completions_of(other, there, trials)
        else:
            others = (reference_of(other, "" if from_file else against, prompt, there),) * trials
        items.append(Item(prompt, completions_of(record, where, trials), others, where))
    return items


def known_pairs(source: str, limit: int, trials: int) -> list[Item]:
    """Preference data as items: the chosen text is judged against the rejected one."""
    items = []
    for e in load(source, "test" if source in RECIPES else "train", "preference", limit=limit):
        texts = [messages.as_text(c).strip() for c in e.completions]
        items += [Item(messages.as_text(e.prompt), (texts[w],) * trials, (texts[l],) * trials, e.source) for w, l in e.pairs]
    return items
