"""Recipe D: which of four continuations people liked best, Ziegler et al. 2019 (arXiv 1909.08593).
https://github.com/openai/lm-human-preferences

A file is one JSON list of {"query": [ids], "sample0": [ids], …, "sample3": [ids], "best": 0..3}: token ids of GPT-2, padded
with 50259. The ids are used unchanged, without the padding. The best sample is preferred to each of the other three: one
example of four completions and three pairs. A sample with padding behind it has ended, so it gets <|endoftext|>; one without
was cut off, and gets none.
"""

import array
from pathlib import Path

from base.download import cache_dir, fetch, openai_endpoint
from base.errors import UserError
from data.examples import Example, local, only_text_views, report, split_of
from data.jsonl import get, index, read

FILES = {
    "sentiment": ("sentiment/offline_5k.json",),
    "descriptiveness": ("descriptiveness/offline_5k.json",),
    "tldr": ("tldr/online_45k.json", "tldr/offline_60k.json"),
    "cnndm": ("cnndm/online_45k.json", "cnndm/offline_60k.json"),
}
PAD, EOT = 50259, 50256
SAMPLES = ("sample0", "sample1", "sample2", "sample3")
BEST = ((0, 1), (0, 2), (0, 3))  # of the samples as `group` gives them, over each of the others
VAL, TEST = 0.05, 0.05  # shares of all queries, drawn by their hash
_IDS = list(range(EOT + 1))  # one int object for each id: a file holds up to 50 million ids, and Python would make as many ints


def unpadded(record: dict, field: str, where: str) -> tuple[tuple[int, ...], bool]:
    """A field's ids without the padding on either side, and whether there was padding behind them."""
    ids = get(record, field, list, where)
    begin, end = 0, len(ids)
    while begin < end and ids[end - 1] == PAD:
        end -= 1
    while begin < end and ids[begin] == PAD:
        begin += 1
    for i in ids[begin:end]:
        if type(i) is not int or not 0 <= i <= EOT:
            what = f"no token id of GPT-2 (0 to {EOT}; {PAD} only as padding before or behind)"
            raise UserError(f"{where}: {field!r} holds {i!r:.40}, which is {what}")
    return tuple(_IDS[i] for i in ids[begin:end]), end < len(ids)


def group(record: dict, where: str) -> tuple[tuple[int, ...], list[tuple[int, ...]]]:
    """An entry as its query and the four samples, the best one first."""
    query, _ = unpadded(record, "query", where)
    samples = []
    for field in SAMPLES:
        ids, ended = unpadded(record, field, where)
        if not ids and not ended:
            raise UserError(f"{where}: {field!r} is empty: a sample needs at least one token, or padding where it ended")
        samples.append((*ids, EOT) if ended and ids[-1:] != (EOT,) else ids)
    best = index(record, "best", len(SAMPLES), where)
    return query, [samples[best], *samples[:best], *samples[best + 1 :]]


def paths(part: str, data_dir: str = "") -> list[Path]:
    """A part's files, downloaded once, or those that a folder has, which is laid out like the published one."""
    if data_dir:
        return local(data_dir, FILES[part])
    folder = cache_dir() / "human_labels"
    return [fetch(f"{openai_endpoint()}/lm-human-preferences/labels/{name}", folder / name) for name in FILES[part]]


def load(split: str, view: str, data_dir: str = "", limit: int = 0, part: str = "sentiment") -> list[Example]:
    """A split in a view's form; `limit` counts queries. A query is in the same split in whichever file it stands."""
    only_text_views(f"recipe human_labels:{part}", view)
    files = paths(part, data_dir)
    found, groups = [], 0
    for where, record in (entry for file in files for entry in read(file)):
        query, (best, *rest) = group(record, where)
        if split_of(array.array("i", query).tobytes(), VAL, TEST) == split and (not limit or groups < limit):
            groups += 1
            samples = (best, *rest) if view == "preference" else (best,)
            found.append(Example(query, samples, source=where, pairs=BEST))
    report(f"human_labels:{part} {split}, queries of {', '.join(file.name for file in files)}", groups, {})
    return found
