"""Recipe B: Anthropic HH dialogues, Bai et al. 2022 (arXiv 2204.05862). https://huggingface.co/datasets/Anthropic/hh-rlhf

A line holds two whole dialogues that part in the assistant's last turn. The prompt is everything up to and including the
last `\\n\\nAssistant:`; what follows is the completion, its leading space kept.
"""

from data import Example
from data.jsonl import get
from runtime.errors import UserError

TURN = "\n\nAssistant:"


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
