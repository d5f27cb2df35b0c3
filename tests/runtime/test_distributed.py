"""Several processes: the same curve for every number of them, checkpoints that any number can read, and faults."""

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import model
from base import errors
from runtime import checkpoint, distributed
from tests.conftest import SHARED, dpo_args, flags, free_port, metrics, ref_args, sft_args

ROOT = Path(__file__).parents[2]
KILLS = int(os.environ.get("NANOPREF_KILLS", "3"))  # random moments of `kill -9`, with and without restarts


def good(result: tuple[list[int], str]) -> None:
    statuses, err = result
    assert not any(statuses), err


def equal_records(a: Path, b: Path, tolerance: float) -> None:
    """Every number of every record; an accuracy may flip on a tie, so that is not what these runs are made of."""
    ours, theirs = metrics(a), metrics(b)
    assert len(ours) == len(theirs) and [r.keys() for r in ours] == [r.keys() for r in theirs]
    for x, y in zip(ours, theirs, strict=True):
        for name in x.keys() - {"split"}:
            assert x[name] == pytest.approx(y[name], abs=tolerance, rel=tolerance), (x["step"], name)


# --- the same numbers -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def alone(files, sft_run, reference, world, tmp_path_factory) -> dict[str, Path]:
    """Runs of one process, to compare with."""
    folder = tmp_path_factory.mktemp("alone")
    for name in ("sft", "sigmoid", "aot"):
        stage = "sft" if name == "sft" else "dpo"
        good(world(1, stage, stage_args(name, files, sft_run, reference, folder / name)))
    return {name: folder / name for name in ("sft", "sigmoid", "aot")}


def stage_args(name: str, files, sft_run, reference, out: Path, **keys) -> list[str]:
    keys = {"keep": 9, "save_every": 3, "micro_tokens": 300, **keys}
    if name == "sft":
        return sft_args(files, out, dropout=0, **keys)
    return dpo_args(files, sft_run, reference, out, loss=name, epochs=2, eval_every=4, **keys)


@pytest.mark.parametrize(
    ("name", "n", "replicate"),
    [("sft", 2, 1), ("sft", 4, 1), ("sft", 3, 0), ("sigmoid", 2, 1), ("sigmoid", 4, 2), ("sigmoid", 2, 0), ("aot", 2, 1)],
)
def test_the_curve_does_not_depend_on_the_number_of_processes(
    name, n, replicate, alone, files, sft_run, reference, world, tmp_path
):
    """Sharded, in hybrid, and whole on every rank; losses, gradient norms, rewards at every step; the weights at the end."""
    args = stage_args(name, files, sft_run, reference, tmp_path / "run", replicate=replicate)
    good(world(n, "sft" if name == "sft" else "dpo", args))
    equal_records(tmp_path / "run", alone[name], 1e-5)
    ours, theirs = (load_file(folder / "model/model.safetensors") for folder in (tmp_path / "run", alone[name]))
    assert ours.keys() == theirs.keys()
    gap = max((ours[k] - theirs[k]).abs().max().item() for k in ours)
    assert gap < 1e-4, gap


@pytest.mark.skipif(not (SHARED / "data").is_dir(), reason="no shared data")
def test_the_curve_on_real_pairs(world, tmp_path):
    """Anthropic HH, very unlike lengths, GPT-2's vocabulary: 1, 2 and 4 processes, all three stages."""
    import gzip

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
            equal_records(tmp_path / f"{stage}{n}", tmp_path / f"{stage}1", 1e-4)


@pytest.mark.parametrize("mode", ["loglik", "generate"])
def test_evaluation_is_the_same_for_every_number_of_processes(mode, files, sft_run, world, tmp_path):
    for n in (1, 2, 3):
        out = {"out": tmp_path / f"{n}.json", "details": tmp_path / f"{n}.jsonl"}
        more = {"micro_tokens": 400, "batch_size": 7}
        good(world(n, "eval_mcq", flags(model=sft_run / "model", data=files["mcq"], mode=mode, **out, **more)))
        for end in ("json", "jsonl"):
            assert (tmp_path / f"{n}.{end}").read_text() == (tmp_path / f"1.{end}").read_text()
    assert len((tmp_path / "3.jsonl").read_text().splitlines()) == 48


def test_a_reference_file_of_two_processes_is_that_of_one(files, sft_run, reference, world, tmp_path):
    good(world(2, "precompute_ref", ref_args(files, sft_run, tmp_path / "ref.safetensors", micro_tokens=500)))
    good(world(1, "precompute_ref", ref_args(files, sft_run, tmp_path / "one.safetensors", micro_tokens=500)))
    assert (tmp_path / "ref.safetensors").read_bytes() == (tmp_path / "one.safetensors").read_bytes()
    good(world(1, "dpo", dpo_args(files, sft_run, tmp_path / "ref.safetensors", tmp_path / "run", max_steps=1)))


def test_bfloat16_stays_near_float32(files, sft_run, reference, world, tmp_path):
    """One process computes under autocast, two gather bfloat16 parameters; the sums of log-probs are those of float32."""
    for dtype, n in (("float32", 1), ("bfloat16", 1), ("bfloat16", 2)):
        more = {"dtype": dtype, "max_steps": 3, "eval_every": 1, "replicate": 1}
        good(world(n, "dpo", dpo_args(files, sft_run, reference, tmp_path / f"{dtype}{n}", **more)))
    exact, one, two = (metrics(tmp_path / name) for name in ("float321", "bfloat161", "bfloat162"))
    tokens = 7  # of an ending of the toy, about
    for a, b, c in zip(exact, one, two, strict=True):
        for name in ("logps/chosen", "logps/rejected"):
            assert b[name] == pytest.approx(a[name], abs=2e-2 * tokens) and c[name] == pytest.approx(a[name], abs=2e-2 * tokens)
        assert b["loss"] == pytest.approx(a["loss"], abs=2e-2) and c["loss"] == pytest.approx(a["loss"], abs=2e-2)
    for run in (one, two):
        assert [r["logps/chosen"] for r in run] != [r["logps/chosen"] for r in exact], "it was float32 after all"


@pytest.mark.parametrize("asked", ["false", "true"])
def test_activation_checkpointing_is_wired(asked, files, call, tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(model, "checkpoint", lambda block, *args, **how: calls.append(block) or block(*args))
    assert call("sft", *sft_args(files, tmp_path / "run", activation_checkpointing=asked, max_steps=1))[0] == 0
    assert bool(calls) == (asked == "true")


def test_activation_checkpointing_changes_nothing(alone, files, sft_run, reference, world, tmp_path):
    args = stage_args("sigmoid", files, sft_run, reference, tmp_path / "run", activation_checkpointing="true")
    good(world(1, "dpo", args))
    assert metrics(tmp_path / "run") == metrics(alone["sigmoid"])
    args = stage_args("sigmoid", files, sft_run, reference, tmp_path / "two", activation_checkpointing="true", replicate=1)
    good(world(2, "dpo", args))
    equal_records(tmp_path / "two", alone["sigmoid"], 1e-5)


# --- checkpoints -------------------------------------------------------------------------------------------------------


def cut_back(folder: Path, step: int) -> None:
    """Make a run look as if it had been killed after the checkpoint of `step`."""
    for saved in checkpoint.steps(folder / "checkpoints"):
        if int(saved.name.removeprefix("step_")) > step:
            shutil.rmtree(saved)
    shutil.rmtree(folder / "model")


@pytest.mark.parametrize(("name", "saved", "resumed"), [("sft", 2, (1, 4)), ("sigmoid", 4, (2,)), ("sft", 1, (2,))])
def test_saved_by_some_resumed_by_others(name, saved, resumed, alone, files, sft_run, reference, world, tmp_path):
    stage = "sft" if name == "sft" else "dpo"

    def go(n, replicate):
        good(world(n, stage, stage_args(name, files, sft_run, reference, tmp_path / "run", replicate=replicate)))

    go(saved, 1)
    shards = {f.name.split("_")[2] for f in (tmp_path / "run/checkpoints/step_3").glob("__*")}
    assert shards == {str(rank) for rank in range(saved)}, "every rank writes its own part"
    for n in resumed:
        cut_back(tmp_path / "run", 3)
        go(n, 2 if n == 4 else 1)
        equal_records(tmp_path / "run", alone[name], 1e-5)


def test_two_processes_resume_to_the_bit(files, world, tmp_path):
    args = sft_args(files, tmp_path / "run", keep=9, replicate=1, micro_tokens=300)  # with dropout
    good(world(2, "sft", args))
    whole = metrics(tmp_path / "run")
    weights = (tmp_path / "run/model/model.safetensors").read_bytes()
    cut_back(tmp_path / "run", 6)
    good(world(2, "sft", args))
    assert metrics(tmp_path / "run") == whole
    assert (tmp_path / "run/model/model.safetensors").read_bytes() == weights


@pytest.mark.parametrize("n", [1, 2])
def test_saving_in_the_background(n, files, world, tmp_path):
    """The same checkpoints, whole, and a run that goes on from one of them to the bit."""
    args = sft_args(files, tmp_path / "run", keep=9, replicate=1, async_save="true")
    good(world(n, "sft", args))
    good(world(n, "sft", sft_args(files, tmp_path / "whole", keep=9, replicate=1)))
    assert metrics(tmp_path / "run") == metrics(tmp_path / "whole")
    kept = [sorted(f.name for f in (tmp_path / name / "checkpoints").iterdir()) for name in ("run", "whole")]
    assert kept[0] == kept[1] and not any(name.endswith(".tmp") for name in kept[0])
    cut_back(tmp_path / "run", 6)
    good(world(n, "sft", args))
    assert metrics(tmp_path / "run") == metrics(tmp_path / "whole")


def test_a_background_save_is_one_and_keeps_the_best_until_then(files, call, tmp_path, monkeypatch):
    """A thread writes; and no checkpoint is deleted in favour of one that is not whole yet."""
    threads, pruned, save, prune = [], [], checkpoint.dcp.async_save, checkpoint.prune

    def watched(root, keep, best):
        pruned.append(best)
        assert best is None or f"step_{best}" in [f.name for f in checkpoint.steps(root)]
        prune(root, keep, best)

    monkeypatch.setattr(checkpoint.dcp, "async_save", lambda *args, **how: threads.append(save(*args, **how)) or threads[-1])
    monkeypatch.setattr(checkpoint, "prune", watched)
    monkeypatch.setattr(checkpoint.Save, "written", lambda _: False)  # as on a slow disk
    args = sft_args(files, tmp_path / "run", async_save="true", eval_every=1, keep=1, lr=1e-2)
    assert call("sft", *args)[0] == 0
    assert len(threads) >= 4 and len(set(pruned)) > 2
    assert call("sft", *sft_args(files, tmp_path / "plain"))[0] == 0 and len(pruned) > len(threads)


@pytest.mark.parametrize("damage", ["missing", "flipped"])
def test_a_damaged_shard_is_noticed(damage, files, world, tmp_path):
    args = sft_args(files, tmp_path / "run", replicate=1)
    good(world(2, "sft", args))
    whole = metrics(tmp_path / "run")
    shard = tmp_path / "run/checkpoints/step_10/__1_0.distcp"
    content = shard.read_bytes()
    shard.unlink()
    if damage == "flipped":
        shard.write_bytes(content[:999] + bytes([content[999] ^ 1]) + content[1000:])
    statuses, err = world(2, "sft", args)
    assert statuses == [0, 0] and "step_10 is damaged (__1_0.distcp" in err and err.count("falling back") == 1
    assert metrics(tmp_path / "run") == whole


@pytest.mark.parametrize("later", ["false", "true"])
def test_a_full_disk_of_one_rank_stops_all_and_loses_nothing(later, files, world, tmp_path):
    args = sft_args(files, tmp_path / "run", replicate=1, save_every=3)
    full = sft_args(files, tmp_path / "run", replicate=1, save_every=3, n_embd=64, overwrite="true", async_save=later)
    good(world(2, "sft", args))
    statuses, err = world(2, "sft", full, limits={1: 40_000})
    assert statuses == [2, 2], err
    lines = [line for line in err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and "no space left on the disk" in lines[0] and "Traceback" not in err
    assert not list((tmp_path / "run/checkpoints").glob("step_*")), "nothing half-written"
    full.remove("--overwrite"), full.remove("true")
    good(world(2, "sft", full))
    assert len(metrics(tmp_path / "run")) == 14


# --- what the user did wrong ---------------------------------------------------------------------------------------------


def test_an_error_is_said_once(files, world, tmp_path):
    for args, says in (
        (sft_args(files, tmp_path / "run", data=tmp_path / "none.jsonl"), "none.jsonl"),
        (sft_args(files, tmp_path / "run", lr="fast"), "lr = 'fast' is not a float"),
        (sft_args(files, tmp_path / "run", init_from=tmp_path / "nowhere"), "nowhere"),
        (sft_args(files, tmp_path / "run", replicate=3), "key replicate: 2 processes cannot hold 3 copies"),
        (sft_args(files, tmp_path / "run", device="cuda:0"), "device cuda:0: with several processes"),
    ):
        statuses, err = world(2, "sft", args)
        lines = [line for line in err.splitlines() if line.startswith("error: ")]
        assert statuses == [2, 2] and len(lines) == 1 and says in lines[0], err
        assert "Traceback" not in err


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


def test_damaged_weights_are_said_once(files, sft_run, world, tmp_path):
    shutil.copytree(sft_run / "model", tmp_path / "model")
    file = tmp_path / "model/model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    sizes = dict.fromkeys(("n_layer", "n_head", "n_embd", "block_size"))
    statuses, err = world(2, "sft", sft_args(files, tmp_path / "run", init_from=tmp_path / "model", **sizes, replicate=1))
    assert statuses == [2, 2] and err.count("error: ") == 1 and "damaged" in err, err


def test_a_loss_that_is_not_finite_on_one_rank_stops_all(files, sft_run, world, tmp_path):
    import weights
    from data.tokenizer import get

    model, toy = weights.load(sft_run / "model"), get("toy")
    rows = [json.loads(line) for line in Path(files["sft"]).read_text().splitlines()]
    word = rows[0]["completion"].split()[-1].rstrip(".")
    ids = [i for i in range(toy.size) if word in toy.decode([i])]
    with torch.no_grad():
        model.wte.weight[ids] = float("nan")
    weights.save(model, toy, tmp_path / "nan")
    args = flags(init_from=tmp_path / "nan", data=files["sft"], out_dir=tmp_path / "run", micro_tokens=100, replicate=1)
    statuses, err = world(2, "sft", args)
    assert statuses == [2, 2] and err.count("error: ") == 1, err
    assert re.search(r"the loss is nan at step 1, in the micro-batch with examples \d+", err)
    assert not list((tmp_path / "run").glob("checkpoints/*"))


def test_an_out_dir_in_use(files, world, tmp_path):
    import fcntl

    (tmp_path / "run").mkdir()
    with open(tmp_path / "run/.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        statuses, err = world(2, "sft", sft_args(files, tmp_path / "run"))
    assert statuses == [2, 2] and err.count("another run is writing there") == 1, err


# --- torchrun, and processes that die -------------------------------------------------------------------------------------


def torchrun(*args: object, **options) -> subprocess.Popen:
    command = [sys.executable, "-m", "torch.distributed.run", *map(str, args)]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **options)


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


@pytest.mark.parametrize("restarts", [0, 3])
def test_kill_9_of_a_random_rank(restarts, files, world, tmp_path):
    """The job ends or starts again within 30 s, goes on, and its metrics are the unbroken run's; nothing partial is loaded."""
    good(world(2, "sft", sft_args(files, tmp_path / "whole", **LONG)))
    run, rng, killed = tmp_path / "run", random.Random(restarts), 0
    args = sft_args(files, run, **LONG)
    for _ in range(10 * KILLS):
        job = torchrun("--nproc_per_node", 2, "--master_port", free_port(), "--max-restarts", restarts, "sft.py", *args)
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


def test_a_restart_does_not_meet_the_dead(monkeypatch):
    """torchrun's store outlives its workers. Each start gives all its processes one new prefix, whoever comes first."""
    kept = torch.distributed.TCPStore("127.0.0.1", free_port(), is_master=True, wait_for_workers=False)
    for name, value in {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": kept.port, "TORCHELASTIC_USE_AGENT_STORE": True}.items():
        monkeypatch.setenv(name, str(value))
    for late in (0, 1, 2):
        with ThreadPoolExecutor() as pool:
            first = [pool.submit(distributed.meet, rank, 3) for rank in range(3) if rank != late]
            time.sleep(0.3)
            assert not any(f.done() for f in first), "met one of the start before"
            stores = [f.result(30) for f in [*first, pool.submit(distributed.meet, late, 3)]]
        assert not stores[0].check(["who"]), "the same prefix as the start before"
        stores[0].set("who", str(late))
        assert [store.check(["who"]) and store.get("who") for store in stores] == [str(late).encode()] * 3


@pytest.mark.parametrize("kept", [False, True], ids=["first start", "restart"])
@pytest.mark.parametrize("absent", [0, 2])
def test_a_process_that_never_comes(kept, absent, monkeypatch):
    """Each of the others says so in a line, rank 0 who it is. A store that torchrun kept still has the words of the dead."""
    monkeypatch.setattr(distributed, "STUCK", timedelta(seconds=2))
    port = free_port()
    for name, value in {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "TORCHELASTIC_USE_AGENT_STORE": kept}.items():
        monkeypatch.setenv(name, str(value))
    if kept:
        store = torch.distributed.TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False)
        for name in ("words", "start", "seen/0", "seen/1", "seen/2"):
            store.set(name, "a b c")
        for rank, word in enumerate("abc"):
            store.set(f"word/{rank}", word)
    here = [rank for rank in range(3) if rank != absent]
    with ThreadPoolExecutor() as pool:
        found = [pool.submit(distributed.meet, rank, 3) for rank in here]
        said = {rank: f.exception(30) for rank, f in zip(here, found, strict=True)}
    assert all(isinstance(error, errors.UserError) and error.here for error in said.values()), said
    assert all(str(error).startswith(f"rank {rank}: ") for rank, error in said.items())
    assert absent == 0 or str(said[0]).startswith("rank 0: rank 2 did not come to 127.0.0.1:"), said


@pytest.mark.parametrize("ctrl_c", [False, True])
def test_sigterm_saves_once_and_ends(ctrl_c, files, world, tmp_path):
    """Ctrl-C reaches every process of the terminal, and the workers once more from torchrun."""
    run = tmp_path / "run"
    args = sft_args(files, run, **{**LONG, "save_every": 0})
    good(world(2, "sft", sft_args(files, tmp_path / "whole", **{**LONG, "save_every": 0})))
    job = torchrun("--nproc_per_node", 2, "--master_port", free_port(), "sft.py", *args)
    while job.poll() is None and not ((run / "metrics.jsonl").exists() and metrics(run)):
        time.sleep(0.05)
    for pid in workers(run) if ctrl_c else []:
        os.kill(pid, signal.SIGINT)
    job.send_signal(signal.SIGINT if ctrl_c else signal.SIGTERM)
    output, _ = job.communicate(timeout=30)
    assert output.count(": finishing this step") == 1 and output.count("stopped at step") == 1, output
    (saved,) = (run / "checkpoints").glob("step_*")
    assert metrics(run)[-1]["step"] == int(saved.name.removeprefix("step_"))
    good(world(2, "sft", args))
    assert metrics(run) == metrics(tmp_path / "whole")


def test_a_restart_does_not_wipe_the_run_again(files, call, tmp_path, monkeypatch):
    args = sft_args(files, tmp_path / "run", overwrite="true")
    assert call("sft", *args)[0] == 0
    whole = metrics(tmp_path / "run")
    cut_back(tmp_path / "run", 9)
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    status, printed, _ = call("sft", *args)
    assert status == 0 and "resuming" in printed and metrics(tmp_path / "run") == whole


@pytest.mark.parametrize("replicate", [1, 2])
def test_two_nodes(replicate, alone, files, sft_run, reference, tmp_path):
    """Two agents that meet on the loopback train together, sharded over both or with a copy on each."""
    args = stage_args("sigmoid", files, sft_run, reference, tmp_path / "run", replicate=replicate)
    meet = ["--nnodes", 2, "--nproc_per_node", 1, "--rdzv_backend", "c10d", "--rdzv_endpoint", f"127.0.0.1:{free_port()}"]
    jobs = [torchrun(*meet, "dpo.py", *args) for _ in range(2)]
    for job in jobs:
        output, _ = job.communicate(timeout=120)
        assert job.returncode == 0, output
    equal_records(tmp_path / "run", alone["sigmoid"], 1e-5)


# --- memory ------------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="no /proc")
@pytest.mark.skipif(not (SHARED / "tiktoken").is_dir(), reason="no shared vocabulary")
def test_starting_takes_a_shard_and_a_tensor():
    """Host memory that a rank gains while the model is made and handed out; for gpt2-large see docs/scaling.md."""
    from model import GPTConfig
    from report import memory

    job = torchrun(
        "--nproc_per_node", 4, "--master_port", free_port(), "tests/start_memory.py", "12,8,1024",
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    output, _ = job.communicate(timeout=120)
    assert job.returncode == 0, output
    found = json.loads(output.strip().splitlines()[-1])
    config = GPTConfig(12, 8, 1024)
    needed = memory.needed(config, 1, 1, processes=4, bfloat16=False)["weights"]
    assert all(shard == pytest.approx(needed, rel=0.01) for shard in found["shards"])
    assert sum(found["shards"]) == found["model"] == 4 * memory.parameters(config)
    assert max(found["grown"][1:]) < 0.5 * found["model"], found
    assert found["grown"][0] < 0.8 * found["model"], "rank 0 needs no whole copy: the embedding, a fourth, and its shard"


# --- precision, and on a GPU ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_sharded_bfloat16_is_near_autocast(device, monkeypatch):
    """One process, a group of one: gathered bfloat16 parameters give the log-probs and gradients of autocast over float32."""
    import numpy as np
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh

    import weights
    from data.encode import Encoded, collate
    from runtime.distributed import whole, wrap

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
                wrap(model, init_device_mesh(device, (1,)), torch.bfloat16)
            with torch.autocast(device, torch.bfloat16):
                logps = model(batch)
            logps.mean().backward()
            found.append((logps.detach(), {n: whole(p.grad) for n, p in model.named_parameters()}))
        (a, grads), (b, sharded_grads) = found
        assert (a - b).abs().max() < 2e-2
        for name, grad in grads.items():
            assert (grad - sharded_grads[name]).norm() <= 0.05 * grad.norm() + 1e-6, name
    finally:
        dist.destroy_process_group()


@pytest.mark.gpu
@pytest.mark.parametrize("n", [1, 2])
def test_gpu_torchrun_equals_plain(n, files, call, tmp_path):
    if torch.cuda.device_count() < n:
        pytest.skip(f"{n} GPUs needed")
    keys = {"device": "cuda", "dtype": "float32", "dropout": 0}
    assert call("sft", *sft_args(files, tmp_path / "plain", **keys))[0] == 0
    job = torchrun("--nproc_per_node", n, "sft.py", *sft_args(files, tmp_path / "run", replicate=1, **keys))
    output, _ = job.communicate(timeout=300)
    assert job.returncode == 0, output
    for ours, plain in zip(metrics(tmp_path / "run"), metrics(tmp_path / "plain"), strict=True):
        assert ours["loss"] == pytest.approx(plain["loss"], abs=1e-3)
