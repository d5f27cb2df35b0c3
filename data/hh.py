"""Recipe B: Anthropic HH dialogues, Bai et al. 2022 (arXiv 2204.05862). https://huggingface.co/datasets/Anthropic/hh-rlhf

A line holds two whole dialogues that part in the assistant's last turn. The prompt is everything up to and including the
last `\\n\\nAssistant:`; what follows is the completion, its leading space kept.
"""

import hashlib
from pathlib import Path

from base.download import hub_file
from base.errors import UserError
from data import Example, local, only_text_views, report
from data.jsonl import get, read

TURN = "\n\nAssistant:"
REPO = "datasets/Anthropic/hh-rlhf"
PARTS = ("helpful-base", "helpful-online", "helpful-rejection-sampled", "harmless-base")
LONGEST = 1280  # characters of a dialogue, the answer included
HELD_OUT = 1000  # pairs of the training files that are for validation; of fewer than 10,000 pairs, a tenth


def is_record(record: dict) -> bool:
    return "prompt" not in record and "chosen" in record and "rejected" in record


def pair(record: dict, where: str) -> Example | None:
    """A line as a preference pair; None where the two dialogues do not share the prompt or an answer is empty."""
    sides = []
    for field in ("chosen", "rejected"):
        dialogue = get(record, field, str, where)
        cut = dialogue.rfind(TURN)
        if cut < 0:
            raise UserError(f"{where}: no '\\n\\nAssistant:' turn in {field!r}: not a dialogue, and there is no 'prompt'")
        sides.append((dialogue[: cut + len(TURN)], dialogue[cut + len(TURN) :]))
    (prompt, chosen), (other, rejected) = sides
    if prompt != other or not chosen.strip() or not rejected.strip():
        return None
    return Example(prompt, (chosen, rejected), source=where)


def paths(split: str, data_dir: str = "") -> list[Path]:
    """The four files of the published split, from the hub or from a folder laid out like its repository (those it has)."""
    names = [f"{part}/{'test' if split == 'test' else 'train'}.jsonl.gz" for part in PARTS]
    return local(data_dir, names) if data_dir else [hub_file(REPO, name) for name in names]


def load(split: str, view: str, data_dir: str = "", limit: int = 0) -> list[Example]:
    """A split in a view's form, in the order of the prompts' hashes: the four files mixed, pairs of one prompt together, so
    that those held out for validation share no prompt with the others."""
    only_text_views("hh", view)
    files = paths(split, data_dir)
    pairs, unlike, long = [], 0, 0
    for where, record in (line for file in files for line in read(file)):
        found = pair(record, where)
        if found is None:
            unlike += 1
        elif max(len(record["chosen"]), len(record["rejected"])) > LONGEST:
            long += 1
        else:
            pairs.append((hashlib.sha256(found.prompt.encode()).digest(), len(pairs), found))
    pairs.sort()
    what = f"hh {split} of {', '.join(file.parent.name for file in files)}"
    if split != "test":
        cut = min(HELD_OUT, len(pairs) // 10)
        while 0 < cut < len(pairs) and pairs[cut][0] == pairs[cut - 1][0]:
            cut += 1
        what += f" ({cut:,} of {len(pairs):,} pairs held out for validation)"
        pairs = pairs[:cut] if split == "val" else pairs[cut:]
    why = {"their dialogues differ before the last answer, or one answer is empty": unlike}
    report(what, len(pairs), why | {f"a dialogue of over {LONGEST:,} characters": long})
    if not pairs:
        raise UserError(f"hh: no pair is left for the {split} split of {files[0]} and the like: see what was dropped")
    examples = [found for _, _, found in (pairs[:limit] if limit else pairs)]
    if view == "sft":
        return [Example(e.prompt, e.completions[:1], source=e.source) for e in examples]
    return examples
