"""Data sets of the Hugging Face hub: `hub:owner/name[:config]` and a split -> files on this machine.

The hub itself sorts most data sets into configs and splits, and converts them to parquet, whatever their format was.
`/api/datasets/{repo}/parquet` lists the result, `…/parquet/{config}/{split}/{n}.parquet` is one file of it
(huggingface.co/docs/hub/api, huggingface.co/docs/dataset-viewer/parquet). So nothing has to be guessed from a README.
It does not convert private data sets of owners who do not pay. Of these, and of any other that it has not converted,
`/api/datasets/{repo}` lists the files, and their names say the split (huggingface.co/docs/hub/datasets-file-names-and-splits).
"""

import re
from pathlib import Path
from urllib.parse import quote

from base.download import cache_dir, fetch, hub_endpoint, hub_file
from base.errors import UserError
from base.files import read_json
from data.tables import ENDINGS

PREFIX = "hub:"
WORDS = {  # a split -> the words for it in the names of files and folders
    "train": {"train", "training"},
    "validation": {"validation", "valid", "val", "dev"},
    "test": {"test", "testing", "eval", "evaluation"},
}


def files(source: str, split: str) -> list[Path]:
    """The files of a data set's split, in order; downloaded once, like all that `fetch` brings. The split "val" is the hub's
    "validation" where it has no "val". UserError, naming those that are there, for a config or split that is not."""
    repo, _, config = source.removeprefix(PREFIX).partition(":")
    if not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", repo):
        raise UserError(f"data {source!r}: no name of a data set on the hub: write hub:owner/name or hub:owner/name:config")
    folder = cache_dir() / "hub" / "datasets" / repo
    about = folder / ".info.json"  # of an earlier start that found no converted files
    there = (not about.exists() and _converted(repo, folder / ".parquet")) or {"default": _by_name(repo, about)}
    config = config or (next(iter(there)) if len(there) == 1 else "default")
    if config not in there:
        raise UserError(f"data {source}: no config {config!r} there: name one of {', '.join(there)}, as hub:{repo}:CONFIG")
    splits = there[config]
    if split == "val" and split not in splits:
        split = "validation"
    if split not in splits:
        raise UserError(f"data {source}: no split {split!r} in config {config!r}: name one of {', '.join(splits)} with --split")
    print(f"{source}: config {config}, split {split}, {len(splits[split])} file(s)", flush=True)
    return [fetch(*where) if isinstance(where, tuple) else hub_file(f"datasets/{repo}", where) for where in splits[split]]


def _converted(repo: str, folder: Path) -> dict[str, dict[str, list]]:
    """{config: {split: [(address, place on this machine), …]}} of the hub's parquet files; {} where it has not made any."""
    url = f"{hub_endpoint()}/api/datasets/{repo}/parquet"
    try:
        listing = read_json(fetch(url, folder / "list.json"))
    except UserError:  # if it is the network, or a token is missing, asking for the files' names will say so
        return {}
    found: dict[str, dict[str, list]] = {}
    for config, splits in listing.items():
        for split, parts in splits.items() if isinstance(splits, dict) else ():
            place = f"{quote(config, safe='')}/{quote(split, safe='')}"
            names = [f"{place}/{n}.parquet" for n in range(len(parts))]
            partial = "partial-" if any(f"/partial-{split}/" in str(part) for part in parts) else ""  # the first 5 GB only
            found.setdefault(config, {})[partial + split] = [(f"{url}/{name}", folder / name) for name in names]
    return found


def _by_name(repo: str, about: Path) -> dict[str, list]:
    """{split: [name of a file in the repository, …]}, by the names. Where none names a split, all are of "train"."""
    files = read_json(fetch(f"{hub_endpoint()}/api/datasets/{repo}", about)).get("siblings", [])
    names = sorted(file["rfilename"] for file in files)
    names = [name for name in names if Path(name).name != "dataset_infos.json"]
    ending = next((ending for ending in ENDINGS if any(name.endswith(ending) for name in names)), None)
    if ending is None:
        raise UserError(f"data hub:{repo}: no file there ends in {', '.join(ENDINGS)}: save it as one of these")
    found: dict[str, list] = {}
    for name in names:
        if name.endswith(ending):
            found.setdefault(_split_of(name), []).append(name)
    unnamed = found.pop("", [])
    return found or {"train": unnamed}


def _split_of(name: str) -> str:
    shard = re.search(r"(?:^|/)([\w.]+)-\d{5}-of-\d{5}\.", name)
    words = set(re.split(r"[^a-z]+", name.lower()))
    return shard[1] if shard else next((split for split, same in WORDS.items() if words & same), "")
