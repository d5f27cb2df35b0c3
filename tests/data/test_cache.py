"""Tokens on disk: the same as those made in memory, made once, made anew when anything that decides them changes."""

import json
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from base.errors import UserError
from data import cache
from data.encode import data_hash, load_encoded
from data.plan import BatchPlan, plan_once
from data.tokenizer import get
from runtime.build import share
from tests.conftest import ROOT, SCRATCH, close, flags, good, metrics
from tests.data.published import dialogue, write

PAIRS = [
    {"prompt": f"Q{n % 7} " + "why " * (n % 50), "chosen": f" yes {n}" * (1 + n % 3), "rejected": f" no {n}"}
    for n in range(1100)
]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The cache's folder; every file is large enough for it."""
    monkeypatch.setenv("NANOPREF_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(cache, "SMALL", 0)
    return tmp_path / "cache" / "tokens"


@pytest.fixture
def pairs(tmp_path):
    return write(tmp_path / "pairs.jsonl", *PAIRS)


def start(path, view="preference", tokenizer="gpt2", max_len=60, truncation="drop", **more):
    return load_encoded(str(path), "train", view, get(tokenizer), max_len, truncation, **more)


def in_memory(monkeypatch, *args, **more):
    with monkeypatch.context() as patched:
        patched.setattr(cache, "SMALL", 10**12)
        items = start(*args, **more)
    assert isinstance(items, list)
    return items


def same(a, b) -> None:
    assert len(a) == len(b) > 0
    for x, y in zip(a, b, strict=True):
        assert (x.number, x.group, x.label, x.row_tokens) == (y.number, y.group, y.label, y.row_tokens)
        assert [part.tolist() for part in (x.prompt, *x.completions)] == [part.tolist() for part in (y.prompt, *y.completions)]
        assert x.prompt.dtype == np.int32


def without_encoding(monkeypatch, *args, **more):
    """A start that must not tokenize anything."""
    with monkeypatch.context() as patched:
        patched.setattr(type(get("gpt2")), "encode_batch", None)
        return start(*args, **more)


def test_the_same_items_as_in_memory(folder, pairs, tmp_path, monkeypatch):
    options = write(
        tmp_path / "o.jsonl", *({"prompt": f"P{n}", "choices": [" A", f" B{n}", " C c c"], "label": n % 3} for n in range(9))
    )
    chats = write(tmp_path / "hh.jsonl", *({"chosen": dialogue(n, " Yes."), "rejected": dialogue(n, " No.")} for n in range(9)))
    for path, view in ((pairs, "preference"), (pairs, "sft"), (options, "mcq"), (chats, "preference")):
        items, plain = start(path, view), in_memory(monkeypatch, path, view)
        assert isinstance(items, cache.Records)
        same(items, plain)
        same(items[3:7], plain[3:7])
        same([items[-1]], [plain[-1]])
        assert data_hash(items) == data_hash(plain)
        plans = [BatchPlan(x, 4, 1, row_len=90, world=2, per_group=1) for x in (items, plain)]
        assert [plans[0][step] for step in range(4)] == [plans[1][step] for step in range(4)]
        assert plan_once(items, 200, world=2) == plan_once(plain, 200, world=2)
        with pytest.raises(IndexError):
            items[len(items)]


def test_a_second_start_makes_no_tokens(folder, pairs, monkeypatch, capsys):
    first = start(pairs)
    fields, counted, example = capsys.readouterr().out.splitlines()
    assert "fields prompt, chosen, rejected, read in the project's own form" in fields
    assert example == "the first: prompt 'Q0 ', chosen ' yes 0<|endoftext|>', rejected ' no 0<|endoftext|>'"
    same(first, without_encoding(monkeypatch, pairs))
    counted = counted.replace(" dropped as too long", " dropped as too long (tokens of an earlier start)")
    assert capsys.readouterr().out.splitlines() == [counted, example]
    assert len(list(folder.iterdir())) == 1, "nothing beside the one file"
    (pairs.parent / "elsewhere").mkdir()
    same(first, without_encoding(monkeypatch, pairs.rename(pairs.parent / "elsewhere" / pairs.name)))


@pytest.mark.parametrize(
    "change",
    [
        {"view": "sft"},
        {"max_len": 30},
        {"max_len": 30, "truncation": "left"},
        {"limit": 1050},
        {"end": False},
        {"columns": "prompt=prompt,chosen=rejected,rejected=chosen"},
    ],
)
def test_another_setting_makes_other_tokens(folder, pairs, monkeypatch, change):
    start(pairs)
    same(start(pairs, **change), in_memory(monkeypatch, pairs, **change))
    assert len(list(folder.iterdir())) == 2
    without_encoding(monkeypatch, pairs), without_encoding(monkeypatch, pairs, **change)


def test_other_bytes_tokenizer_or_code_make_other_tokens(folder, pairs, tmp_path, monkeypatch, files):
    start(pairs)
    times = os.stat(pairs)
    pairs.write_text(pairs.read_text().replace("yes 1099", "yes 1098", 1))
    os.utime(pairs, ns=(times.st_atime_ns, times.st_mtime_ns))  # the same size and the same time
    changed = start(pairs)
    assert get("gpt2").decode(changed[-1].completions[0].tolist()).startswith(" yes 1098")
    assert len(list(folder.iterdir())) == 2
    start(files["pairs"], max_len=128), start(files["pairs"], tokenizer="toy", max_len=128)
    assert len(list(folder.iterdir())) == 4
    shutil.copytree(ROOT / "data", tmp_path / "data", ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(cache, "__file__", str(tmp_path / "data" / "cache.py"))
    without_encoding(monkeypatch, pairs)
    (tmp_path / "data" / "hh.py").write_text("# another recipe\n")
    start(pairs)
    assert len(list(folder.iterdir())) == 5


@pytest.mark.parametrize("damage", ["cut", "bit", "garbage", "empty", "number"])
def test_a_damaged_file_is_made_anew(folder, pairs, monkeypatch, capsys, damage):
    first = [(i.prompt.tolist(), i.group) for i in start(pairs)]
    (path,) = folder.iterdir()
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    damaged = {"cut": content[:-100], "bit": content, "garbage": b"x\n{}", "empty": b"", "number": b"1\n1"}[damage]
    path.write_bytes(damaged)
    capsys.readouterr()
    items = start(pairs)
    out, err = capsys.readouterr()
    assert err.startswith(f"warning: {path} is damaged (") and err.count("\n") == 1 and err.endswith(": made anew\n")
    assert [(i.prompt.tolist(), i.group) for i in items] == first and "earlier start" not in out
    without_encoding(monkeypatch, pairs)
    assert list(folder.iterdir()) == [path] and capsys.readouterr().err == ""


def test_nothing_half_written(folder, pairs, monkeypatch):
    with pairs.open("a") as file:
        file.write('{"prompt": 1, "chosen": "a", "rejected": "b"}\n')
    with pytest.raises(UserError, match=r"pairs.jsonl:1101: the field 'prompt' must be text"):
        start(pairs)
    assert not list(folder.iterdir())
    with pytest.raises(UserError, match="no example is left of 1050: 1,050 examples, 1,050 dropped as too long"):
        start(pairs, max_len=1, limit=1050)
    assert not list(folder.iterdir())
    folder.rmdir()
    folder.write_text("a file where a folder should be")
    with pytest.raises(UserError, match=r"the tokens cannot be kept there .*NANOPREF_CACHE"):
        start(pairs, limit=1050)


def test_small_data_need_no_cache(folder, pairs, monkeypatch):
    assert isinstance(start(pairs, limit=999), list)
    monkeypatch.setattr(cache, "SMALL", pairs.stat().st_size + 1)
    assert isinstance(start(pairs), list) and not folder.exists()


def test_ranks_map_one_file_or_get_the_items(folder, pairs):
    items = start(pairs)
    sent = pickle.dumps(items)
    assert len(sent) < 1000, "not the tokens"
    same(pickle.loads(sent), items)

    class Compute:  # rank 0 of two machines
        def __init__(self, seen: bool):
            self.seen = seen

        def once(self, work):
            return work()

        def gather(self, value):
            return [value, self.seen]

    assert share(lambda: items, Compute(True)) is items
    copied = share(lambda: items, Compute(False))
    assert isinstance(copied, list)
    same(copied, items)
    items.path.unlink()
    assert pickle.loads(sent) is None, "the machine that does not see the file"
    same(pickle.loads(pickle.dumps(copied)), copied)


@pytest.mark.slow
def test_two_processes_train_from_one_file(folder, files, world, tmp_path):
    """With a large file, so that the processes, in which nothing is patched, keep its tokens."""
    lines = Path(files["sft"]).read_text()
    big = tmp_path / "big.jsonl"
    big.write_text(lines * (cache_size() // len(lines) + 1))
    args = flags(**SCRATCH, data=big, max_steps=3, batch_size=8, lr=1e-3)
    runs = []
    for n in (1, 2):
        good(world(n, "sft", [*args, "--out_dir", tmp_path / f"run{n}"], NANOPREF_CACHE=str(tmp_path / "cache")))
        runs.append(metrics(tmp_path / f"run{n}"))
        assert len(list(folder.glob("*.tokens"))) == 1
    close(*runs, tolerance=1e-4)


def cache_size() -> int:
    """What `cache.SMALL` is in a process that no test has changed."""
    return int(subprocess.check_output([sys.executable, "-c", "from data import cache; print(cache.SMALL)"], cwd=ROOT))


@pytest.mark.slow
def test_a_second_start_takes_no_memory_of_its_own():
    """As docs/scaling.md measures it, on 20,000 pairs of 13 MB of tokens."""
    done = subprocess.run(
        [sys.executable, "tests/data/start_time.py", "--json", "20000"],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": "."},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    first, second = (json.loads(line) for line in done.stdout.splitlines())
    assert second["tokens_mb"] > 10 and second["own_mb"] < 3
    assert second["cpu"] < first["cpu"] / 5
