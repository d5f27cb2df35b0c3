"""Fixtures: tiny files of the toy task, and scripts called in this process."""

import contextlib
import importlib
import json
import multiprocessing
import os
import resource
import signal
import socket
import sys
from pathlib import Path

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")  # tiny models: threads only cost. Torch, which comes next, reads it once

import tests.second_family  # noqa: F401  (its line in weights.FAMILIES, also in processes that tests start)

SHARED = Path(__file__).parents[2] / "shared"


@pytest.fixture(scope="session")
def files(tmp_path_factory) -> dict[str, str]:
    """Paths of toy files in the user's formats: sft, pairs, mcq (48 examples each) and val_sft, val_pairs (16)."""
    from data import question
    from data.toy import problems

    folder = tmp_path_factory.mktemp("files")
    out = {}
    for name, split, n in (("", "train", 48), ("val_", "val", 16)):
        records: dict[str, list] = {"sft": [], "pairs": [], "mcq": []}
        for p, _ in problems(split, n):
            prompt, endings = question(p.context, p.endings), [" " + e for e in p.endings]
            right, wrong = endings[p.label], endings[(p.label + 1) % 4]
            records["sft"].append({"prompt": prompt, "completion": right})
            records["pairs"].append({"prompt": prompt, "chosen": right, "rejected": wrong})
            records["mcq"].append({"prompt": prompt, "choices": endings, "label": p.label})
        for kind, rows in records.items():
            path = folder / f"{name}{kind}.jsonl"
            path.write_text("".join(json.dumps(r) + "\n" for r in rows))
            out[name + kind] = str(path)
    return out


SCRATCH = {"init_from": "scratch", "tokenizer": "toy", "n_layer": 2, "n_head": 2, "n_embd": 32, "block_size": 128}


def flags(**keys: object) -> list[str]:
    """Keys as a command line; one that is None is left out."""
    return [word for name, value in keys.items() if value is not None for word in (f"--{name}", str(value))]


def sft_args(files, out_dir, **keys) -> list[str]:
    """A run of 10 steps, with dropout, validated and saved along the way."""
    data = {"data": files["sft"], "val_data": files["val_sft"], "out_dir": out_dir, "dropout": 0.1, "batch_size": 10}
    return flags(**{**SCRATCH, **data, "epochs": 2, "lr": 1e-3, "eval_every": 4, "save_every": 3, **keys})


def ref_args(files, sft_run, out, **keys) -> list[str]:
    data = {"init_from": sft_run / "model", "data": files["pairs"], "val_data": files["val_pairs"], "out": out}
    return flags(**{**data, **keys})


def dpo_args(files, sft_run, reference, out_dir, **keys) -> list[str]:
    """A run of 12 steps."""
    data = {"init_from": sft_run / "model", "data": files["pairs"], "val_data": files["val_pairs"], "ref": reference}
    return flags(**{**data, "out_dir": out_dir, "batch_size": 12, "lr": 1e-3, "epochs": 3, **keys})


def script(name: str, *args: object) -> int:
    """Run a stage script's main as the command line would; returns its exit status."""
    from base.errors import run

    before = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}
    argv, sys.argv = sys.argv, [f"{name}.py", *map(str, args)]
    try:
        run(importlib.import_module(name).main)
    except SystemExit as end:
        return end.code or 0
    finally:
        sys.argv = argv
        for s, handler in before.items():
            signal.signal(s, handler)


@pytest.fixture
def call(capsys):
    """call("sft", "--data", …) -> (exit status, stdout, stderr)."""

    def run(name: str, *args: object) -> tuple[int, str, str]:
        capsys.readouterr()
        status = script(name, *args)
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return run


@pytest.fixture
def refused(call):
    """refused("sft", …, says="…"): exit status 2 and one line on stderr that starts with error: and holds the text."""

    def check(name: str, *args: object, says: str) -> str:
        status, _, err = call(name, *args)
        lines = err.strip().splitlines()
        assert status == 2, err
        assert lines and lines[-1].startswith("error: ") and "Traceback" not in err, err
        assert sum(line.startswith("error: ") for line in lines) == 1
        assert says in lines[-1], lines[-1]
        return lines[-1]

    return check


def metrics(folder: Path | str, timeless: bool = True) -> list[dict]:
    """A run's records; `timeless` leaves out what a clock decides."""
    records = [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]
    if timeless:
        for record in records:
            for name in ("tokens_per_s", "step_s"):
                record.pop(name, None)
    return records


@pytest.fixture(scope="session")
def sft_run(files, tmp_path_factory) -> Path:
    """A finished tiny SFT run's folder; its model is in model/."""
    folder = tmp_path_factory.mktemp("sft") / "run"
    with contextlib.redirect_stdout(None):
        assert script("sft", *sft_args(files, folder, dropout=0, batch_size=16, epochs=4, lr=3e-3)) == 0
    return folder


@pytest.fixture(scope="session")
def reference(files, sft_run) -> Path:
    """The reference file of sft_run's model on pairs and val_pairs."""
    out = sft_run.parent / "ref.safetensors"
    with contextlib.redirect_stdout(None):
        assert script("precompute_ref", *ref_args(files, sft_run, out)) == 0
    return out


def _child(name: str, args: list, stderr: str, limit: int, env: dict) -> None:
    """A script in a process of its own, its output to /dev/null, stderr appended to a file, files of `limit` bytes at most."""
    if limit:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    os.environ.update(env)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    os.dup2(os.open(stderr, os.O_WRONLY | os.O_CREAT | os.O_APPEND), 2)
    os._exit(script(name, *args))


@pytest.fixture(scope="session")
def spawn():
    """Start a script in a forked process of a server that has imported everything: no start-up to wait for."""
    context = multiprocessing.get_context("forkserver")
    stages = ["sft", "dpo", "precompute_ref", "eval_mcq", "sample"]
    context.set_forkserver_preload([*stages, "tests.conftest", "torch.distributed.checkpoint", "torch.distributed.fsdp"])

    def start(name: str, args: list, stderr: Path, limit: int = 0, env: dict | None = None):
        process = context.Process(target=_child, args=(name, [*map(str, args)], str(stderr), limit, env or {}))
        process.start()
        return process

    return start


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@pytest.fixture(scope="session")
def world(spawn, tmp_path_factory):
    """world(2, "sft", args, limits={1: bytes}): run a script in so many processes; returns (exit statuses, stderr)."""

    def run(n: int, name: str, args: list, limits: dict | None = None) -> tuple[list[int], str]:
        err = tmp_path_factory.mktemp("world") / "err"
        port, children = free_port(), []
        for rank in range(n):
            env = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": n, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            env = {k: str(v) for k, v in env.items()} if n > 1 else {}
            children.append(spawn(name, args, err, (limits or {}).get(rank, 0), env))
        for child in children:
            child.join(120)
        alive = [child for child in children if child.exitcode is None]
        for child in alive:
            child.kill()
        assert not alive, f"{len(alive)} of {n} processes hang: {err.read_text()}"
        return [child.exitcode for child in children], err.read_text() if err.exists() else ""

    return run
