"""Fixtures: tiny files of the toy task, and scripts that run in this process or in several others."""

import contextlib
import importlib
import json
import multiprocessing
import os
import resource
import signal
import socket
import sys
from collections import Counter
from pathlib import Path

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")  # tiny models: threads only cost. Torch, which comes next, reads it once


ROOT = Path(__file__).parents[1]
SHARED = ROOT.parent / "shared"  # real data, where there is some; tests that want it skip without it


def pytest_addoption(parser) -> None:
    parser.addoption("--fuzz", type=int, default=0, help="draw so many new cases in tests/test_fuzz.py")
    parser.addoption("--copies", type=int, default=12, help="damaged copies of each kind of file (tests/test_corruption.py)")


def pytest_terminal_summary(terminalreporter) -> None:
    """End with a line for each reason why tests were skipped, and how many. Also under -q and -n."""
    skipped = terminalreporter.stats.get("skipped", [])
    reasons = Counter(report.longrepr[2].removeprefix("Skipped: ") for report in skipped)
    for reason, n in sorted(reasons.items()):
        terminalreporter.write_line(f"skipped {n}: {reason}")


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


@pytest.fixture(scope="session")
def stage(files, sft_run, reference):
    """stage("sft", folder, lr=1) -> ("sft", the arguments of a run in that folder). Any other name is one of dpo's losses."""

    def arguments(name: str, folder: Path, **keys: object) -> tuple[str, list[str]]:
        if name == "sft":
            return "sft", sft_args(files, folder, **keys)
        return "dpo", dpo_args(files, sft_run, reference, folder, **{"loss": name, **keys})

    return arguments


def script(name: str, *args: object) -> int:
    """Run `main` of a module ("sft", "selftrain.eval_math") as the command line would; returns the exit status."""
    from base.errors import run

    before = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}
    argv, sys.argv = sys.argv, [f"{name.replace('.', '/')}.py", *map(str, args)]
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


def contents(folder: Path) -> dict[str, bytes]:
    """Every file in a folder, by its path there, but for empty lock files, which a run or a kill leaves."""
    files = (p for p in sorted(folder.rglob("*")) if p.is_file() and p.name != ".lock" and not p.name.endswith("nanopref-lock"))
    return {str(p.relative_to(folder)): p.read_bytes() for p in files}


@pytest.fixture
def run(call, stage):
    """run("sft", folder, lr=1): a run that must succeed; returns (what it printed, what it wrote on stderr, its metrics)."""

    def go(name: str, folder: Path, **keys: object) -> tuple[str, str, list[dict]]:
        command, args = stage(name, folder, **keys)
        status, printed, err = call(command, *args)
        assert status == 0, err
        return printed, err, metrics(folder)

    return go


def close(a: list[dict], b: list[dict], tolerance: float) -> None:
    """Assert that two runs' records agree in every number."""
    assert [(r["step"], r["split"], *r) for r in a] == [(r["step"], r["split"], *r) for r in b]
    for x, y in zip(a, b, strict=True):
        for name in x.keys() - {"split"}:
            if name == "rewards/accuracies" and abs(x["rewards/margins"]) < 1e-4:
                continue  # before the first update every pair is a tie, which rounding decides
            assert x[name] == pytest.approx(y[name], abs=tolerance, rel=tolerance), (x["step"], name)


def good(result: tuple[list[int], str]) -> None:
    """Assert that all processes of a `world` ended well."""
    statuses, err = result
    assert not any(statuses), err


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
    context.set_forkserver_preload([*stages, "tests.conftest", "torch.distributed.fsdp"])

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
    """world(2, "sft", args, limits={1: bytes}, NAME="value"): run a script in so many processes, whose files may have so
    many bytes, in that environment; returns (exit statuses, stderr)."""

    def run(n: int, name: str, args: list, limits: dict | None = None, **more: str) -> tuple[list[int], str]:
        err = tmp_path_factory.mktemp("world") / "err"
        port, children = free_port(), []
        for rank in range(n):
            env = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": n, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            env = {k: str(v) for k, v in ((env if n > 1 else {}) | more).items()}
            children.append(spawn(name, args, err, (limits or {}).get(rank, 0), env))
        for child in children:
            child.join(120)
        alive = [child for child in children if child.exitcode is None]
        for child in alive:
            child.kill()
        assert not alive, f"{len(alive)} of {n} processes hang: {err.read_text()}"
        return [child.exitcode for child in children], err.read_text() if err.exists() else ""

    return run
