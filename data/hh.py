"""Recipe B: Anthropic HH dialogues, Bai et al. 2022 (arXiv 2204.05862). https://huggingface.co/datasets/Anthropic/hh-rlhf

A line holds two whole dialogues that differ in the assistant's last turn. The prompt is everything up to and including the
last `\\n\\nAssistant:`. What follows is the completion; it keeps its leading space.
"""

import hashlib

from base.download import hub_file
from base.errors import UserError
from data.examples import Example, local, only_text_views, report
from data.jsonl import get, read

TURN = "\n\nAssistant:"
REPO = "datasets/Anthropic/hh-rlhf"
PARTS = ("helpful-base", "helpful-online", "helpful-rejection-sampled", "harmless-base")
LONGEST = 1280  # characters of a dialogue, the answer included
HELD_OUT = 1000  # pairs of the training files that are for validation; of fewer than 10,000 pairs, a tenth
DROPPED = "their dialogues differ before the last answer, or one answer is empty"
TOO_LONG = f"a dialogue of over {LONGEST:,} characters"


def is_record(record: dict) -> bool:
    """Whether an object has HH's fields."""
    return "prompt" not in record and "chosen" in record and "rejected" in record


def examples(record: dict, view: str, group: int, where: str) -> list[Example]:
    """A line as the examples of a view; none if the two dialogues do not share their prompt, or an answer is empty."""
    only_text_views(where, view)
    prompts, answers = set(), []
    for field in ("chosen", "rejected"):
        prompt, turn, answer = get(record, field, str, where).rpartition(TURN)
        if not turn:
            raise UserError(f"{where}: no '\\n\\nAssistant:' turn in {field!r}: not a dialogue, and there is no 'prompt'")
        prompts.add(prompt + turn)
        answers.append(answer)
    if len(prompts) > 1 or not all(answer.strip() for answer in answers):
        return []
    return [Example(prompts.pop(), tuple(answers[:1] if view == "sft" else answers), source=where)]


def load(split: str, view: str, data_dir: str = "", limit: int = 0) -> list[Example]:
    """A split in a view's form, sorted by the prompts' hashes. This mixes the four files and keeps pairs of one prompt
    together, so the pairs held out for validation share no prompt with those for training. `data_dir` is laid out like the
    repository, and may hold some of the four files."""
    only_text_views("recipe hh", view)
    names = [f"{part}/{'test' if split == 'test' else 'train'}.jsonl.gz" for part in PARTS]
    files = local(data_dir, names) if data_dir else [hub_file(REPO, name) for name in names]
    found, dropped = [], {DROPPED: 0, TOO_LONG: 0}
    for where, record in (line for file in files for line in read(file)):
        made = examples(record, view, 0, where)
        if made and max(len(record["chosen"]), len(record["rejected"])) > LONGEST:
            dropped[TOO_LONG] += 1
            continue
        dropped[DROPPED] += not made
        found += made
    found.sort(key=lambda e: hashlib.sha256(e.prompt.encode()).digest())
    what = f"hh {split} of {', '.join(file.parent.name for file in files)}"
    if split != "test":
        cut = min(HELD_OUT, len(found) // 10)
        while 0 < cut < len(found) and found[cut].prompt == found[cut - 1].prompt:
            cut += 1
        what += f" ({cut:,} of {len(found):,} pairs held out for validation)"
        found = found[:cut] if split == "val" else found[cut:]
    report(what, len(found), dropped)
    return found[: limit or None]
