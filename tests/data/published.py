"""Small files in the formats and under the names in which the data sets were published."""

import gzip
import json
from pathlib import Path

from data import alpaca, hellaswag, hh, human_labels

PAD, EOT = human_labels.PAD, human_labels.EOT


def write(path: Path, *records: dict | str) -> Path:
    """One record a line; a text is written as it is. Gzipped where the name ends in .gz."""
    content = "".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in records).encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path


def dialogue(n: int, answer: str) -> str:
    return f"\n\nHuman: What is {n} and {n}?\n\nAssistant: Why do you ask?\n\nHuman: I count.\n\nAssistant:{answer}"


def hh_folder(folder: Path, n: int = 12) -> Path:
    """The repository's layout. Each file also has a dialogue that is too long, and a pair whose prompts differ."""
    for p, part in enumerate(hh.PARTS):
        for s, split in enumerate(("train", "test")):
            numbers = range(1000 * p + 100 * s, 1000 * p + 100 * s + n)
            rows = [{"chosen": dialogue(i, f" It is {2 * i}."), "rejected": dialogue(i, " Who knows.")} for i in numbers]
            rows.insert(3, {**rows[0], "rejected": dialogue(7777, " No.")})
            rows.insert(5, {"chosen": dialogue(1, " a" * 700), "rejected": dialogue(1, " b")})
            write(folder / part / f"{split}.jsonl.gz", *rows)
    return folder


def labelled(n: int, **change) -> dict:
    """An entry with padding before its query; the even samples ended early, the odd ones were cut off."""
    samples = {f"sample{i}": [1000 + n, 11, 262, 400 + i] if i % 2 else [2000 + n, 300 + i, PAD, PAD] for i in range(4)}
    return {"query": [PAD, 464, 3290, 500 + n], **samples, "best": n % 4, **change}


def labels_folder(folder: Path, n: int = 120) -> Path:
    for names in human_labels.FILES.values():
        for k, name in enumerate(names):
            write(folder / name, json.dumps([labelled(i) for i in range(k * n, k * n + n)]))
    return folder


def instruction(n: int, **change) -> dict:
    return {"instruction": f"Add one to {n}.", "input": f"{n}" if n % 2 else "", "output": f"It is {n + 1}.", **change}


def alpaca_folder(folder: Path, n: int = 150) -> Path:
    """Entry 5 has no output."""
    entries = [instruction(i, **({"output": ""} if i == 4 else {})) for i in range(n)]
    write(folder / alpaca.FILE, json.dumps(entries, indent=4))
    return folder


ENDINGS = {
    "activity_label": "Removing ice",
    "ctx_a": "Then, the man writes over the snow",
    "ctx_b": "he",
    "ctx": "not used where ctx_a is",
    "endings": ["goes.", "a [title] b", " c [step] d", "e"],
    "label": 3,
}


def hellaswag_folder(folder: Path, n: int = 24) -> Path:
    for name, _ in hellaswag.FILES.values():
        write(folder / name, *({**ENDINGS, "ctx_b": f"he {i}", "label": i % 4} for i in range(n)))
    return folder
