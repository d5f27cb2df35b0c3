"""Several processes: the same curve for every number of them, checkpoints that any number can read, and faults."""

import fcntl
import functools
import gzip
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch.distributed.device_mesh import init_device_mesh

import logprobs
import weights
from base import errors
from data.batch import collate
from data.encode import Encoded
from data.tokenizer import get
from model import SIZES, GPTConfig
from runtime import checkpoint, distributed, optim
from runtime.step import Outcome
from tests import tiny
from tests.conftest import ROOT, SHARED, close, dpo_args, flags, free_port, good, metrics, ref_args, sft_args

SLOW = pytest.mark.slow
KILLS = int(os.environ.get("NANOPREF_KILLS", "3"))  # random moments of `kill -9`, with and without restarts


# --- the same numbers -------------------------------------------------------------------------------------------------


def train_args(stage, name: str, folder: Path, **keys) -> tuple[str, list[str]]:
    """A run whose curve must not depend on the number of processes: "sft", or a loss of dpo's."""
    more = {"dropout": 0} if name == "sft" else {"epochs": 2, "eval_every": 4, "batch_size": 10}
    return stage(name, folder, **{"keep": 9, "save_every": 3, "micro_tokens": 300, **more, **keys})


@pytest.fixture(scope="session")
def alone(stage, world, tmp_path_factory):
    """alone("sft"): the metrics and the weights of such a run in one process, to compare with."""

    @functools.cache
    def run(name: str) -> tuple[list[dict], dict[str, torch.Tensor]]:
        folder = tmp_path_factory.mktemp("alone") / name
        good(world(1, *train_args(stage, name, folder)))
        return metrics(folder), load_file(folder / "model/model.safetensors")

    return run


@pytest.mark.parametrize(
    ("name", "n", "replicate"),
    [
        ("sft", 2, 1),
        pytest.param("sigmoid", 4, 2, marks=SLOW),
        pytest.param("sft", 4, 1, marks=SLOW),
        pytest.param("sigmoid", 2, 0, marks=SLOW),
        pytest.param("aot", 4, 1, marks=SLOW),
    ],
)
@pytest.mark.slow
def test_the_curve_does_not_depend_on_the_number_of_processes(name, n, replicate, alone, stage, world, tmp_path):
    """Sharded, in hybrid, and whole on every rank; losses, gradient norms, rewards at every step; the weights at the end.
    Four processes run one example a forward, so that some have less work than others."""
    more = {"micro_tokens": 1} if n == 4 else {}
    good(world(n, *train_args(stage, name, tmp_path / "run", replicate=replicate, **more)))
    records, tensors = alone(name)
    close(metrics(tmp_path / "run"), records, 1e-5)
    ours = load_file(tmp_path / "run/model/model.safetensors")
    assert ours.keys() == tensors.keys()
    assert max((ours[k] - tensors[k]).abs().max().item() for k in ours) < 1e-4


@SLOW
@pytest.mark.skipif(not (SHARED / "data").is_dir(), reason="no shared data")
def test_the_curve_on_real_pairs(world, tmp_path):
    """Anthropic HH, very unlike lengths, GPT-2's vocabulary: 1, 2 and 4 processes, all three stages."""
    with gzip.open(SHARED / "data/hh_harmless_base_test.jsonl.gz", "rt") as file:
        lines = [line for line in file if len(line) < 1500][:24]
    (tmp_path / "hh.jsonl").write_text("".join(lines))
    sizes = {"init_from": "scratch", "n_layer": 2, "n_head": 2, "n_embd": 32, "block_size": 512}
    data = {**sizes, "data": tmp_path / "hh.jsonl", "val_data": tmp_path / "hh.jsonl", "val_limit": 6}
    train = {"batch_size": 8, "max_steps": 3, "eval_every": 2, "replicate": 1, "lr": 1e-3, "samples": 0}
    for n in (1, 2, 4):
        ref = tmp_path / f"ref{n}.safetensors"
        good(world(n, "precompute_ref", flags(**data, out=ref)))
        assert ref.read_bytes() == (tmp_path / "ref1.safetensors").read_bytes()
        for stage, more in (("sft", {}), ("dpo", {"ref": ref})):
            good(world(n, stage, flags(**data, **train, **more, out_dir=tmp_path / f"{stage}{n}")))
            close(metrics(tmp_path / f"{stage}{n}"), metrics(tmp_path / f"{stage}1"), 1e-4)


@pytest.mark.slow
def test_reference_and_evaluation_are_the_same_to_the_bit(files, sft_run, world, tmp_path):
    for n in (1, 2, 3):
        good(world(n, "precompute_ref", ref_args(files, sft_run, tmp_path / f"{n}.safetensors", micro_tokens=500)))
        made = [f"{n}.safetensors"]
        for mode in ("loglik", "generate"):
            made += [f"{n}_{mode}.json", f"{n}_{mode}.jsonl"]
            out = {"out": tmp_path / made[-2], "details": tmp_path / made[-1], "micro_tokens": 400, "batch_size": 7}
            good(world(n, "eval_mcq", flags(model=sft_run / "model", data=files["mcq"], mode=mode, **out)))
            assert len((tmp_path / made[-1]).read_text().splitlines()) == 48
        for name in made:
            assert (tmp_path / name).read_bytes() == (tmp_path / name.replace(str(n), "1", 1)).read_bytes()


def test_bfloat16_stays_near_float32(files, sft_run, reference, world, tmp_path):
    """One process computes under autocast, two gather bfloat16 parameters; the sums of log-probs are those of float32."""
    for dtype, n in (("float32", 1), ("bfloat16", 1), ("bfloat16", 2)):
        more = {"dtype": dtype, "max_steps": 3, "eval_every": 1, "replicate": 1}
        good(world(n, "dpo", dpo_args(files, sft_run, reference, tmp_path / f"{dtype}{n}", **more)))
    exact, *runs = (metrics(tmp_path / name) for name in ("float321", "bfloat161", "bfloat162"))
    tokens = 7  # of an ending of the toy, about
    for run in runs:
        for a, b in zip(exact, run, strict=True):
            assert b["loss"] == pytest.approx(a["loss"], abs=2e-2)
            for name in ("logps/chosen", "logps/rejected"):
                assert b[name] == pytest.approx(a[name], abs=2e-2 * tokens)
        assert [r["logps/chosen"] for r in run] != [r["logps/chosen"] for r in exact], "it was float32 after all"


@pytest.mark.slow
def test_activation_checkpointing_changes_nothing(alone, stage, call, world, tmp_path, monkeypatch):
    calls, checkpointed = [], logprobs.checkpoint
    monkeypatch.setattr(logprobs, "checkpoint", lambda *args, **how: calls.append(args) or checkpointed(*args, **how))
    for asked in ("false", "true"):
        name, args = train_args(stage, "sigmoid", tmp_path / asked, activation_checkpointing=asked)
        assert call(name, *args)[0] == 0 and bool(calls) == (asked == "true")
        assert metrics(tmp_path / asked) == alone("sigmoid")[0]
    good(world(2, *train_args(stage, "sigmoid", tmp_path / "two", activation_checkpointing="true", replicate=1)))
    close(metrics(tmp_path / "two"), alone("sigmoid")[0], 1e-5)


# --- checkpoints -------------------------------------------------------------------------------------------------------


def cut_back(folder: Path, step: int) -> None:
    """Make a run look as if it had been killed after the checkpoint of `step`."""
    checkpoint.drop_after(folder / "checkpoints", step)
    shutil.rmtree(folder / "model")


@pytest.mark.slow
@pytest.mark.parametrize(("name", "saved", "resumed"), [("sigmoid", 4, (1, 2)), pytest.param("sft", 1, (2, 4), marks=SLOW)])
def test_saved_by_some_resumed_by_others(name, saved, resumed, alone, stage, world, tmp_path):
    good(world(saved, *train_args(stage, name, tmp_path / "run", replicate=1)))
    parts = {f.name for f in (tmp_path / "run/checkpoints/step_3").glob("rank_*")}
    assert parts == {f"rank_{rank}.safetensors" for rank in range(saved)}, "every rank writes its own part"
    for n in resumed:
        cut_back(tmp_path / "run", 3)
        good(world(n, *train_args(stage, name, tmp_path / "run", replicate=2 if n == 4 else 1)))
        close(metrics(tmp_path / "run"), alone(name)[0], 1e-5)


@SLOW
def test_two_processes_resume_to_the_bit(files, world, tmp_path):
    """With dropout. A shard that is missing or changed is noticed, once, and the checkpoint before is taken."""
    args = sft_args(files, tmp_path / "run", keep=9, replicate=1, micro_tokens=300)
    good(world(2, "sft", args))
    whole, model = metrics(tmp_path / "run"), (tmp_path / "run/model/model.safetensors").read_bytes()
    cut_back(tmp_path / "run", 6)
    for damage in ("missing", "flipped", "none"):
        statuses, err = world(2, "sft", args)
        assert statuses == [0, 0] and metrics(tmp_path / "run") == whole
        assert (tmp_path / "run/model/model.safetensors").read_bytes() == model
        shard = tmp_path / "run/checkpoints/step_10/rank_1.safetensors"
        content = shard.read_bytes()
        shard.unlink()
        if damage == "flipped":
            shard.write_bytes(content[:999] + bytes([content[999] ^ 1]) + content[1000:])
        assert damage == "missing" or ("step_10 is damaged (rank_1.safetensors" in err and err.count("falling back") == 1)


@pytest.mark.slow
@pytest.mark.parametrize("n", [2, pytest.param(1, marks=SLOW)])
def test_a_full_disk_of_one_rank_stops_all_and_loses_nothing(n, files, world, tmp_path):
    """Files may not grow past a size that metrics.jsonl fits and a checkpoint does not: one line, the checkpoint before is
    whole, nothing is half-written, and with room again the run goes on to the unbroken metrics."""
    args, checkpoints = sft_args(files, tmp_path / "run", replicate=1), tmp_path / "run/checkpoints"
    good(world(n, "sft", [*args, "--keep", 9]))
    whole = metrics(tmp_path / "run")
    cut_back(tmp_path / "run", 3)
    statuses, err = world(n, "sft", args, limits={n - 1: 40_000})
    lines = [line for line in err.splitlines() if line.startswith("error: ")]
    assert statuses == [2] * n, err
    assert len(lines) == 1 and "no space left on the disk" in lines[0] and "Traceback" not in err
    (kept,) = checkpoints.iterdir()
    assert kept.name == "step_3" and checkpoint.inspect(kept)[1] is None and not (tmp_path / "run/model").exists()
    good(world(n, "sft", args))
    assert metrics(tmp_path / "run") == whole


# --- what the user did wrong ---------------------------------------------------------------------------------------------


def test_an_error_is_said_once(files, sft_run, world, tmp_path):
    shutil.copytree(sft_run / "model", tmp_path / "cut")
    weights_file = tmp_path / "cut/model.safetensors"
    weights_file.write_bytes(weights_file.read_bytes()[:-100])
    sizes = dict.fromkeys(("n_layer", "n_head", "n_embd", "block_size"))
    (tmp_path / "busy").mkdir()
    with open(tmp_path / "busy/.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for keys, says in (
            ({"data": tmp_path / "none.jsonl"}, "none.jsonl"),
            ({"lr": "fast"}, "lr = 'fast' is not a float"),
            ({"init_from": tmp_path / "nowhere"}, "nowhere"),
            ({"init_from": tmp_path / "cut", **sizes}, "damaged"),
            ({"replicate": 3}, "key replicate: 2 processes cannot hold 3 copies"),
            ({}, "busy: another run is writing there"),
        ):
            statuses, err = world(2, "sft", sft_args(files, tmp_path / "busy", **keys))
            lines = [line for line in err.splitlines() if line.startswith("error: ")]
            assert statuses == [2, 2] and len(lines) == 1 and says in lines[0] and "Traceback" not in err, err


def test_more_processes_than_gpus(monkeypatch, capsys):
    """Rank 0 has a GPU and no complaint: the first that has none speaks."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("WORLD_SIZE", "4")
    for rank in (2, 3):
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("LOCAL_RANK", str(rank))
        with pytest.raises(SystemExit) as end:
            errors.run(distributed.setup)
        said = capsys.readouterr().err
        assert end.value.code == 2
        assert said == ("error: 2 GPUs are here, but torchrun started more processes: give --nproc_per_node 2\n" * (rank == 2))


@pytest.mark.parametrize("n", [1, 2])
@pytest.mark.slow
def test_a_loss_that_is_not_finite_stops_the_run(n, files, sft_run, world, refused, tmp_path):
    """On whatever rank: step and examples are named, once, and the weights are those of the step before."""
    model, toy = weights.load(sft_run / "model"), get("toy")
    word = json.loads(Path(files["sft"]).read_text().splitlines()[0])["completion"].split()[-1].rstrip(".")
    with torch.no_grad():
        model.wte.weight[[i for i in range(toy.size) if word in toy.decode([i])]] = float("nan")
    weights.save(model, toy, tmp_path / "nan")
    args = flags(init_from=tmp_path / "nan", data=files["sft"], out_dir=tmp_path / "run", micro_tokens=1, replicate=1)
    statuses, err = world(n, "sft", args)
    assert statuses == [2] * n and err.count("error: ") == 1, err
    assert re.search(r"the loss is nan at step 1, in the micro-batch with examples \d+.*the weights were not touched", err)
    assert not list((tmp_path / "run").glob("checkpoints/*"))
    if n == 1:
        ref = tmp_path / "ref.safetensors"
        refused("precompute_ref", *ref_args(files, sft_run, ref, init_from=tmp_path / "nan"), says="not finite (example ")
        assert not ref.exists()
        refused("eval_mcq", *flags(model=tmp_path / "nan", data=files["mcq"], mode="generate"), says="weights are damaged")


def test_a_rank_without_a_bad_example_names_none():
    fine, bad = SimpleNamespace(number=3), SimpleNamespace(number=7)
    compute = SimpleNamespace(total=lambda loss: loss + float("nan"), gather=lambda mine: [mine, [[bad]]], world=2, rank=0)
    with pytest.raises(errors.UserError, match="loss is nan at step 1, in the micro-batch with examples 7 "):
        Outcome([(torch.tensor(1.0), [fine])], torch.tensor(float("nan")), 0, compute).read()


# --- torchrun, and processes that die -------------------------------------------------------------------------------------


@pytest.mark.parametrize("rank", [0, 1])
def test_a_process_that_never_comes(rank, monkeypatch):
    """The other one says so, whichever it is."""
    monkeypatch.setattr(distributed, "STUCK", timedelta(seconds=1))
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1"), monkeypatch.setenv("MASTER_PORT", str(free_port()))
    with pytest.raises(errors.UserError, match=rf"^rank {rank}: (rank 1|others) did not come to 127\.0\.0\.1:\d") as found:
        distributed.join(rank, 2, torch.device("cpu"))
    assert found.value.here and not dist.is_initialized()


@pytest.mark.slow
def test_a_restart_does_not_meet_the_dead(files, sft_run, world, tmp_path):
    """torchrun's store outlives its workers and keeps the addresses that they had. Its count of restarts may stay the same: a
    node that starts again because another one failed does not count that."""
    store = dist.TCPStore("127.0.0.1", free_port(), is_master=True, wait_for_workers=False)
    more = {"MASTER_PORT": str(store.port), "TORCHELASTIC_USE_AGENT_STORE": "True"}
    for start, count in enumerate(("0", "0", "1")):
        args = ref_args(files, sft_run, tmp_path / f"{start}.safetensors")
        good(world(2, "precompute_ref", args, **more, TORCHELASTIC_RESTART_COUNT=count))


def test_a_restart_does_not_wipe_the_run_again(run, tmp_path, monkeypatch):
    _, _, whole = run("sft", tmp_path / "run", overwrite="true")
    cut_back(tmp_path / "run", 9)
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    printed, _, records = run("sft", tmp_path / "run", overwrite="true")
    assert "resuming" in printed and records == whole


def torchrun(*args: object, **options) -> subprocess.Popen:
    command = [sys.executable, "-m", "torch.distributed.run", *map(str, args)]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **options)


def two(*args: object) -> list[object]:
    """What torchrun takes for two processes on this machine."""
    return ["--nproc_per_node", 2, "--master_port", free_port(), *args]


def workers(folder: Path) -> list[int]:
    """Process numbers of the ranks that train in `folder`."""
    found = []
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = entry.read_bytes().split(b"\0")
        except OSError:
            continue
        if str(folder).encode() in words and b"torch.distributed.run" not in words:
            found.append(int(entry.parent.name))
    return found


LONG = {"epochs": 16, "save_every": 2, "replicate": 1, "samples": 0, "eval_every": 20}


@SLOW
@pytest.mark.parametrize("restarts", [0, 3])
def test_kill_9_of_a_random_rank(restarts, files, world, tmp_path):
    """The job ends or starts again within 30 s, goes on, and its metrics are the unbroken run's; nothing partial is loaded."""
    good(world(2, "sft", sft_args(files, tmp_path / "whole", **LONG)))
    run, rng, killed = tmp_path / "run", random.Random(restarts), 0
    args = sft_args(files, run, **LONG)
    for _ in range(10 * KILLS):
        job = torchrun(*two("--max-restarts", restarts, "sft.py", *args))
        begin = time.monotonic()
        while job.poll() is None and killed < KILLS:
            seen = len(list((run / "checkpoints").glob("step_*")))
            if not (ranks := workers(run)) or (time.monotonic() - begin < 60 and not seen):
                time.sleep(0.05)
                continue
            time.sleep(rng.uniform(0, 0.5))
            try:
                os.kill(rng.choice(ranks), signal.SIGKILL)
            except ProcessLookupError:
                continue
            killed, died = killed + 1, time.monotonic()
            while job.poll() is None and set(workers(run)) & set(ranks):
                assert time.monotonic() - died < 30, "the other rank hangs"
                time.sleep(0.05)
            begin = time.monotonic()
            if not restarts:
                job.wait(30)
        output, _ = job.communicate(timeout=120)
        if job.returncode == 0:
            break
    assert job.returncode == 0 and killed >= 1, output
    assert metrics(run) == metrics(tmp_path / "whole")
    assert (run / "model/model.safetensors").read_bytes() == (tmp_path / "whole/model/model.safetensors").read_bytes()
    assert not list((run / "checkpoints").glob("*.tmp"))


@SLOW
@pytest.mark.parametrize("ctrl_c", [False, True])
def test_sigterm_saves_once_and_ends(ctrl_c, files, world, tmp_path):
    """Ctrl-C reaches every process of the terminal, and the workers once more from torchrun."""
    run, keys = tmp_path / "run", {**LONG, "save_every": 0}
    good(world(2, "sft", sft_args(files, tmp_path / "whole", **keys)))
    job = torchrun(*two("sft.py", *sft_args(files, run, **keys)))
    while job.poll() is None and not ((run / "metrics.jsonl").exists() and metrics(run)):
        time.sleep(0.05)
    for pid in workers(run) if ctrl_c else []:
        os.kill(pid, signal.SIGINT)
    job.send_signal(signal.SIGINT if ctrl_c else signal.SIGTERM)
    output, _ = job.communicate(timeout=30)
    assert output.count(": finishing this step") == 1 and output.count("stopped at step") == 1, output
    (saved,) = (run / "checkpoints").glob("step_*")
    assert metrics(run)[-1]["step"] == int(saved.name.removeprefix("step_"))
    good(world(2, "sft", sft_args(files, run, **keys)))
    assert metrics(run) == metrics(tmp_path / "whole")


@SLOW
def test_two_nodes(alone, stage, tmp_path):
    """Two agents that meet on the loopback train together, sharded over both."""
    name, args = train_args(stage, "sigmoid", tmp_path / "run", replicate=1)
    meet = ["--nnodes", 2, "--nproc_per_node", 1, "--rdzv_backend", "c10d", "--rdzv_endpoint", f"127.0.0.1:{free_port()}"]
    jobs = [torchrun(*meet, f"{name}.py", *args) for _ in range(2)]
    for job in jobs:
        output, _ = job.communicate(timeout=120)
        assert job.returncode == 0, output
    close(metrics(tmp_path / "run"), alone("sigmoid")[0], 1e-5)


@pytest.mark.parametrize(("major", "dtype"), [(7, torch.float32), (8, torch.bfloat16)])
def test_the_dtype_of_an_old_gpu(major, dtype, monkeypatch):
    """Before Ampere (8.0) bfloat16 is emulated: float32 is taken, and the first line of a run says why."""
    card = SimpleNamespace(major=major, total_memory=16 * 10**9)
    for name, answer in {"is_available": True, "current_device": 0, "set_device": None}.items():
        monkeypatch.setattr(torch.cuda, name, lambda *_, answer=answer: answer)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: card)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a card")
    monkeypatch.setattr(torch, "zeros", lambda *_, device: torch.tensor(0))
    compute = distributed.setup("cuda")
    assert compute.dtype == dtype and str(compute).startswith("cuda (a card, 16.0 GB), ")
    assert str(compute).endswith("; this GPU has no bfloat16 of its own, and float32 is faster there") == (major < 8)


# --- memory ------------------------------------------------------------------------------------------------------------


@SLOW
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="no /proc")
def test_starting_takes_a_shard_and_a_tensor():
    """Host memory that a rank gains while the model is made and handed out; for gpt2-large see docs/scaling.md."""
    args = "--nproc_per_node", 4, "--master_port", free_port(), "tests/runtime/start_memory.py", "12,8,1024"
    job = torchrun(*args, env=os.environ | {"PYTHONPATH": str(ROOT)})
    output, _ = job.communicate(timeout=120)
    assert job.returncode == 0, output
    found = json.loads(output.strip().splitlines()[-1])
    assert sum(found["shards"]) == found["model"] == 4 * (50257 * 1024 + 1024**2 + 12 * (12 * 1024**2 + 13 * 1024) + 2048)
    assert all(shard == pytest.approx(found["model"] / 4, rel=0.01) for shard in found["shards"])
    assert max(found["grown"][1:]) < 0.5 * found["model"], found
    assert found["grown"][0] < 0.8 * found["model"], "rank 0 needs no whole copy: the embedding, a fourth, and its shard"


# --- precision, and on a GPU ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_sharded_bfloat16_is_near_autocast(device, monkeypatch):
    """One process, a group of one: gathered bfloat16 parameters give the log-probs and gradients of autocast over float32."""
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1"), monkeypatch.setenv("MASTER_PORT", str(free_port()))
    dist.init_process_group("nccl" if device == "cuda" else "gloo", rank=0, world_size=1)
    try:
        rng = np.random.default_rng(0)
        ids = [rng.integers(0, 101, n).astype(np.int32) for n in (60, 30, 20)]
        batch = collate([[Encoded(ids[0], ids[1:], 0, 0)]], 128).to(torch.device(device))
        found = []
        for sharded in (False, True):
            sizes = {"n_layer": 3, "n_head": 4, "n_embd": 128, "block_size": 128, "vocab_size": 101}
            model = weights.load("scratch", **sizes).to(device)
            if sharded:
                distributed.wrap(model, init_device_mesh(device, (1,)), torch.bfloat16)
            with torch.autocast(device, torch.bfloat16):
                logps = model(batch)
            logps.mean().backward()
            found.append((logps.detach(), {n: weights.whole(p.grad) for n, p in model.named_parameters()}))
        (a, grads), (b, sharded_grads) = found
        assert (a - b).abs().max() < 2e-2
        for name, grad in grads.items():
            assert (grad - sharded_grads[name]).norm() <= 0.05 * grad.norm() + 1e-6, name
    finally:
        dist.destroy_process_group()


@pytest.fixture
def group(monkeypatch):
    """A group of this process alone."""
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1"), monkeypatch.setenv("MASTER_PORT", str(free_port()))
    dist.init_process_group("gloo", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_a_step_gathers_a_block_twice_whatever_its_micro_batches(group, monkeypatch):
    """Once for the first forward, and once for the last backward; gradients as of one pass over all."""
    from torch.distributed.fsdp._fully_shard._fsdp_param_group import FSDPParamGroup

    gathered, wait = Counter(), FSDPParamGroup.wait_for_unshard

    def counted(self):
        gathered[self._module_fqn] += self._all_gather_result is not None
        wait(self)

    monkeypatch.setattr(FSDPParamGroup, "wait_for_unshard", counted)
    rng = np.random.default_rng(0)
    micros = [[tiny.example(rng, 9, 5, 7)] for _ in range(3)]
    alone, sharded = tiny.gpt().train(), tiny.gpt().train()
    distributed.wrap(sharded, init_device_mesh("cpu", (1,), mesh_dim_names=("shard",)), torch.float32)
    for model in (alone, sharded):
        for n, items in enumerate(micros, start=1):
            distributed.sync_gradients(model, n == len(micros))
            model(collate([items])).sum().backward()
    assert {name: n for name, n in gathered.items() if name} == {f"blocks.{i}": 2 for i in range(3)}
    for p, q in zip(alone.parameters(), sharded.parameters(), strict=True):
        torch.testing.assert_close(p.grad, weights.whole(q.grad))
    wanted = torch.cat([p.grad.flatten() for p in alone.parameters()]).norm()
    for model in (alone, sharded):
        assert optim.clip(model, 0.1) == pytest.approx(wanted.item(), rel=1e-5)
        assert optim.clip(model, 0) == pytest.approx(0.1, rel=1e-4)
    with torch.no_grad():  # after the step nothing stays gathered: what a step changed is seen
        for model in (alone, sharded):
            for p in model.parameters():
                distributed.own(p).mul_(0.5)
        batch = collate([micros[0]])
        torch.testing.assert_close(alone(batch), sharded(batch))


@pytest.mark.parametrize(("name", "whole"), [("gpt2", True), ("gpt2-medium", True), ("gpt2-large", True), ("gpt2-xl", False)])
def test_what_fits_on_a_card_of_80_gb_is_not_sharded(name, whole):
    sizes = dict(zip(("n_layer", "n_head", "n_embd"), SIZES[name], strict=True))
    needed = optim.memory(weights.empty(GPTConfig(**sizes)), "adamw")
    card = SimpleNamespace(device=torch.device("cuda:0"), world=8, memory=80 * 10**9)
    assert distributed.fits(needed, card) == whole
    machine = SimpleNamespace(device=torch.device("cpu"), world=8, memory=80 * 10**9)  # eight share it
    assert distributed.fits(needed, machine) == (name == "gpt2")


def test_nccl_is_told_its_device(monkeypatch):
    told = {}
    monkeypatch.setattr(distributed, "meet", lambda rank, world: "store")
    monkeypatch.setattr(dist, "init_process_group", lambda **how: told.update(how))
    distributed.join(1, 2, torch.device("cuda:1"))
    assert told["backend"] == "nccl" and told["device_id"] == torch.device("cuda:1") and told["rank"] == 1


@pytest.mark.gpu
@pytest.mark.parametrize("n", [1, 2])
def test_gpu_torchrun_equals_plain(n, files, run, tmp_path):
    if torch.cuda.device_count() < n:
        pytest.skip(f"{n} GPUs needed")
    keys = {"device": "cuda", "dtype": "float32", "dropout": 0}
    _, _, plain = run("sft", tmp_path / "plain", **keys)
    job = torchrun("--nproc_per_node", n, "sft.py", *sft_args(files, tmp_path / "run", replicate=1, **keys))
    output, _ = job.communicate(timeout=300)
    assert job.returncode == 0, output
    for ours, wanted in zip(metrics(tmp_path / "run"), plain, strict=True):
        assert ours["loss"] == pytest.approx(wanted["loss"], abs=1e-3)
