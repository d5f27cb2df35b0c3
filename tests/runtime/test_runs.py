"""Whole runs on tiny models: the pipeline, sums that no layout may change, resuming, damage, full disks."""

import errno
import fcntl
import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import time
import types
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from base.files import lock
from tests.conftest import dpo_args, flags, metrics, ref_args, sft_args


def close(a: list[dict], b: list[dict], tolerance: float) -> None:
    assert [r["step"] for r in a] == [r["step"] for r in b]
    for x, y in zip(a, b, strict=True):
        assert x.keys() == y.keys()
        for name in x:
            if name == "rewards/accuracies" and abs(x["rewards/margins"]) < 1e-4:
                continue  # before the first update every pair is a tie, which rounding decides
            if isinstance(x[name], str):
                same = x[name] == y[name]
            else:
                same = math.isclose(x[name], y[name], abs_tol=tolerance, rel_tol=tolerance)
            assert same, (name, x, y)


# --- the pipeline --------------------------------------------------------------------------------------------------


def test_pipeline(files, sft_run, reference, call, tmp_path):
    """SFT, reference, DPO, evaluation; what comes out is a folder that transformers loads, with the same model in it."""
    out = tmp_path / "dpo"
    status, printed, err = call("dpo", *dpo_args(files, sft_run, reference, out))
    assert status == 0, err
    assert "loss 0.6931" in printed and "12 tokens" not in err
    records = metrics(out)
    train = [r for r in records if r["split"] == "train"]
    assert (
        len(train) == 12
        and abs(train[0]["loss"] - math.log(2)) < 1e-5
        and train[0]["rewards/margins"] == pytest.approx(0, abs=1e-5)
    )
    assert train[-1]["rewards/accuracies"] > 0.7 and train[-1]["loss"] < 0.69
    rewards = "rewards/chosen rewards/rejected rewards/accuracies rewards/margins logps/chosen logps/rejected"
    wanted = "loss lr grad_norm tokens " + rewards
    assert set(wanted.split()) <= train[0].keys() and {"tokens_per_s", "step_s"} <= metrics(out, timeless=False)[1].keys()
    assert (
        records[0]["split"] == "val" and records[0]["step"] == 0 and records[0]["loss"] == pytest.approx(math.log(2), abs=1e-5)
    )
    assert (out / "config.toml").read_text().count("beta = 0.1") == 1

    results = {}
    for mode in ("loglik", "generate"):
        saved, details = tmp_path / f"{mode}.json", tmp_path / f"{mode}.jsonl"
        args = ["--model", out / "model", "--data", files["mcq"], "--mode", mode, "--out", saved, "--details", details]
        assert call("eval_mcq", *args)[0] == 0
        results[mode] = json.loads(saved.read_text())
        rows = [json.loads(line) for line in details.read_text().splitlines()]
        assert len(rows) == results[mode]["n"] == 48 and rows[5]["id"] == 5
        assert sum(r["pred"] == r["label"] for r in rows) / 48 == results[mode]["acc"]
    assert {"acc", "acc_stderr", "acc_norm", "acc_norm_stderr"} <= results["loglik"].keys()
    assert results["generate"]["acc"] <= results["generate"]["aligned"] <= 1

    transformers = pytest.importorskip("transformers")
    import weights
    from data.tokenizer import get
    from data.toy import problems

    theirs = transformers.AutoModelForCausalLM.from_pretrained(out / "model").eval()
    text = problems("val", 1)[0][0].context
    ids = transformers.AutoTokenizer.from_pretrained(out / "model")(text)["input_ids"]
    assert ids == get("toy").encode(text)
    with torch.no_grad():
        gap = theirs(torch.tensor([ids])).logits - weights.load(out / "model").logits(torch.tensor([ids]))
    assert gap.abs().max() < 1e-4


def test_reference_file(files, sft_run, reference):
    """float32 logps (pairs, 2), equal to each pair scored as a plain sequence; and what it is bound to."""
    import weights
    from data.tokenizer import get

    with safe_open(reference, "pt") as file:
        logps, metadata = file.get_tensor("logps"), file.metadata()
        assert logps.dtype == torch.float32 and logps.shape == (48, 2) and file.get_tensor("val_logps").shape == (16, 2)
    model, toy = weights.load(sft_run / "model"), get("toy")
    assert metadata["weights_sha256"] == weights.fingerprint(model)
    assert metadata["max_len"] == "128" and metadata["dtype"] == "float32" and metadata["tokenizer"] == "toy"
    records = [json.loads(line) for line in Path(files["pairs"]).read_text().splitlines()]
    for n in (0, 17, 47):
        prompt = toy.encode(records[n]["prompt"])
        for side, field in enumerate(("chosen", "rejected")):
            tokens = torch.tensor([prompt + toy.encode(records[n][field]) + [toy.eot]])
            all_logps = model.logits(tokens)[0, :-1].log_softmax(-1).gather(1, tokens[0, 1:, None])[:, 0]
            assert logps[n, side].item() == pytest.approx(all_logps[len(prompt) - 1 :].sum().item(), abs=1e-4)


def test_reference_shares_prompts_of_a_group(sft_run):
    """Three pairs of one problem are one row; the numbers are those of pairs scored alone."""
    import weights
    from data import load
    from data.encode import encode
    from data.tokenizer import get
    from precompute_ref import reference_logps, share_prompts
    from runtime.distributed import setup

    model = weights.load(sft_run / "model")
    items, _ = encode(load("toy", "val", "preference", limit=6), get("toy"), 128, "drop")
    shared, where = share_prompts(items)
    assert len(items) == 18 and len(shared) == 6 and [len(s.completions) for s in shared] == [4] * 6
    assert where[4] == [(1, 0), (1, 2)]
    together = reference_logps(model, items, setup("cpu"), 4096)
    alone = torch.cat([reference_logps(model, [item], setup("cpu"), 4096) for item in items])
    assert (together - alone).abs().max() < 1e-4


# --- sums that no layout may change ----------------------------------------------------------------------------------

LAYOUTS = [{}, {"micro_tokens": 1}, {"micro_tokens": 400}, {"row_len": 200}, {"row_len": 300, "micro_tokens": 650}]


def test_sft_loss_under_any_layout(files, call, tmp_path):
    """One example a forward, several, packed rows: the same losses and gradient norms at every step."""
    want = None
    for n, layout in enumerate(LAYOUTS):
        assert call("sft", *sft_args(files, tmp_path / str(n), dropout=0, **layout))[0] == 0
        got = metrics(tmp_path / str(n))
        want = want or got
        close(got, want, 1e-4)


@pytest.mark.parametrize("loss", ["sigmoid", "aot", "aot_unpaired"])
def test_dpo_loss_under_any_layout(files, sft_run, reference, call, tmp_path, loss):
    """Also for losses that couple the pairs of a batch; with an SFT term, whose mean runs over tokens, not pairs."""
    want = None
    for n, layout in enumerate(LAYOUTS):
        more = {"loss": loss, "sft_weight": 0.5, "max_steps": 5, **layout}
        assert call("dpo", *dpo_args(files, sft_run, reference, tmp_path / str(n), **more))[0] == 0
        got = metrics(tmp_path / str(n))
        want = want or got
        close(got, want, 1e-4)


@pytest.mark.parametrize("loss", ["robust", "ipo", "hinge", "dpop", "exo_pair", "bco_pair", "simpo"])
def test_dpo_runs_with_every_kind_of_loss(files, sft_run, reference, call, tmp_path, loss):
    """Margins grow under each; simpo needs no reference file."""
    ref = None if loss == "simpo" else reference
    smoothing = 0.1 if loss in ("robust", "exo_pair") else 0
    status, _, err = call("dpo", *dpo_args(files, sft_run, ref, tmp_path / "run", loss=loss, label_smoothing=smoothing))
    assert status == 0, err
    train = [r for r in metrics(tmp_path / "run") if r["split"] == "train"]
    assert train[-1]["rewards/margins"] > train[0]["rewards/margins"] + 0.002


def test_optimizers_and_schedules(files, call, tmp_path):
    from types import SimpleNamespace as Settings

    from runtime.optim import learning_rate

    for name in ("adamw", "rmsprop", "sgd"):
        more = {"optimizer": name, "lr": {"sgd": 0.5}.get(name, 1e-3), "schedule": "constant"}
        assert call("sft", *sft_args(files, tmp_path / name, **more))[0] == 0
        val = [r["loss"] for r in metrics(tmp_path / name) if r["split"] == "val"]
        assert val[-1] < val[0] - 0.1, (name, val)
    cfg = Settings(lr=1.0, min_lr=0.1, warmup=4, schedule="cosine")
    rates = [learning_rate(cfg, s, 20) for s in range(20)]
    assert rates[:4] == [0.25, 0.5, 0.75, 1.0] and rates[4] == 1.0 and rates[12] == pytest.approx(0.55)
    assert rates[19] == pytest.approx(0.1 + 0.9 * (1 + math.cos(math.pi * 15 / 16)) / 2)
    cfg.schedule, cfg.warmup = "linear", 0.5
    assert learning_rate(cfg, 4, 20) == 0.5 and learning_rate(cfg, 15, 20) == pytest.approx(0.55)
    cfg.schedule = "constant"
    assert learning_rate(cfg, 19, 20) == 1.0


# --- the best checkpoint ---------------------------------------------------------------------------------------------


# ruins the model late
LATE = {"epochs": 8, "schedule": "constant", "lr": 0.5, "warmup": 40, "grad_clip": 0, "dropout": 0}


def test_best_checkpoint_is_kept_and_becomes_the_model(files, call, tmp_path):
    """A rate that ruins the model late: the folder model/ has the weights of the best validation, not the last."""
    run = tmp_path / "run"
    args = sft_args(files, run, **LATE, keep=1, save_every=2)
    assert call("sft", *args)[0] == 0
    val = {r["step"]: r["loss"] for r in metrics(run) if r["split"] == "val" and r["step"]}
    best = min(val, key=val.get)
    kept = {f.name for f in (run / "checkpoints").iterdir()}
    assert kept == {f"step_{best}", f"step_{max(val)}"}
    assert best < max(val), "the rate did not ruin the model: choose another"
    status, printed, _ = call("sft", *args)  # finished: writes the same model again
    assert status == 0 and f"step {best}, which validated best" in printed
    import sft
    import weights
    from data.encode import load_encoded
    from data.tokenizer import get
    from runtime.distributed import setup

    items = load_encoded(files["val_sft"], "val", "sft", get("toy"), 128, "drop")
    found = sft.validate(weights.load(run / "model"), items, setup("cpu"), 4096)["loss"]
    assert found == pytest.approx(val[best], abs=1e-5)


# --- resuming --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", ["sft", "dpo"])
def test_killed_runs_resume_to_the_bit(stage, files, sft_run, reference, tmp_path, spawn):
    """kill -9 at ten random moments, saving included: metrics.jsonl is the unbroken run's, line for line, times aside."""

    def args(folder):
        if stage == "sft":
            return sft_args(files, folder, epochs=8, save_every=2, row_len=200)
        more = {"dropout": 0.1, "epochs": 6, "save_every": 2, "eval_every": 3}
        return dpo_args(files, sft_run, reference, folder, **more)

    def same(folder):
        assert metrics(folder) == metrics(tmp_path / "whole")
        for name in ("config.json", "model.safetensors"):
            assert (folder / "model" / name).read_bytes() == (tmp_path / "whole/model" / name).read_bytes()
        assert not list((folder / "checkpoints").glob("*.tmp")), "what a kill left behind is cleared away"

    err, run = tmp_path / "err", tmp_path / "broken"
    for name in ("warm", "whole"):  # the first also starts the server of processes
        begin = time.monotonic()
        process = spawn(stage, args(tmp_path / name), err)
        process.join()
        seconds = time.monotonic() - begin
        assert process.exitcode == 0, err.read_text()

    rng = random.Random(stage)
    kills = resumed = 0
    while kills < 10:
        process = spawn(stage, args(run), err)
        process.join(rng.uniform(0.05, 0.7) * seconds)
        if process.exitcode is None:
            os.kill(process.pid, signal.SIGKILL)
            process.join()
            kills += 1
            resumed += any((run / "checkpoints").glob("step_*"))
        else:  # it got through between two kills: once more from the start
            assert process.exitcode == 0, err.read_text()
            same(run)
            shutil.rmtree(run)
    last = spawn(stage, args(run), err)
    last.join()
    assert last.exitcode == 0, err.read_text()
    assert resumed >= 2, "hardly a kill came after a checkpoint: make the run longer"
    same(run)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signals_finish_the_step_and_save(number, files, call, tmp_path, monkeypatch):
    """The run stops after the step it was in, says how to go on, and goes on to the unbroken run's metrics."""
    assert call("sft", *sft_args(files, tmp_path / "whole"))[0] == 0
    from runtime.run import Run

    log_step = Run.log_step

    def interrupt(self, step, *args):
        log_step(self, step, *args)
        if step == 5:
            os.kill(os.getpid(), number)

    monkeypatch.setattr(Run, "log_step", interrupt)
    status, printed, err = call("sft", *sft_args(files, tmp_path / "run"))
    assert status == 128 + number
    assert "stopped at step 5 of 10" in printed and "the same command goes on from there" in printed
    assert f"{number.name}: finishing this step" in err and not (tmp_path / "run/model").exists()
    monkeypatch.undo()
    status, printed, _ = call("sft", *sft_args(files, tmp_path / "run"))
    assert status == 0 and "at step 5 of 10" in printed
    assert metrics(tmp_path / "run") == metrics(tmp_path / "whole")


@pytest.mark.parametrize("damage", ["cut", "flipped", "missing", "state"])
def test_a_damaged_checkpoint_is_passed_over(damage, files, call, tmp_path):
    assert call("sft", *sft_args(files, tmp_path / "run"))[0] == 0
    whole = metrics(tmp_path / "run")
    newest = tmp_path / "run/checkpoints/step_10"
    (tensors,) = newest.glob("*.distcp")
    content = tensors.read_bytes()
    if damage == "cut":
        tensors.write_bytes(content[: len(content) // 2])
    elif damage == "flipped":
        tensors.write_bytes(content[:5000] + bytes([content[5000] ^ 1]) + content[5001:])
    elif damage == "missing":
        tensors.unlink()
    else:
        (newest / "state.json").write_text((newest / "state.json").read_text()[:40])
    status, printed, err = call("sft", *sft_args(files, tmp_path / "run"))
    assert status == 0 and f"{newest} is damaged" in err and "falling back to the one before" in err
    assert "at step 9 of 10" in printed
    assert metrics(tmp_path / "run") == whole


def test_no_whole_checkpoint_left(files, call, refused, tmp_path):
    assert call("sft", *sft_args(files, tmp_path / "run"))[0] == 0
    for state in (tmp_path / "run/checkpoints").glob("*/state.json"):
        state.unlink()
    refused("sft", *sft_args(files, tmp_path / "run"), says="every checkpoint is damaged: start anew with --overwrite")
    assert call("sft", *sft_args(files, tmp_path / "run", overwrite="true"))[0] == 0


def test_disk_full_while_saving(files, tmp_path, spawn):
    """Files may not grow past a size that metrics fit and a second checkpoint does not: one line, status 2, the checkpoint
    before is whole, and with room again the run goes on to the unbroken metrics."""
    err = tmp_path / "err"
    whole = spawn("sft", sft_args(files, tmp_path / "whole"), err)
    whole.join()
    assert whole.exitcode == 0, err.read_text()
    err.unlink()
    size = next((tmp_path / "whole/checkpoints/step_10").glob("*.distcp")).stat().st_size
    full = spawn("sft", sft_args(files, tmp_path / "run"), err, limit=size // 2)
    full.join()
    said = err.read_text().strip().splitlines()
    assert full.exitcode == 2 and len(said) == 1 and said[0].startswith("error: no space left on the disk"), said
    assert list((tmp_path / "run/checkpoints").iterdir()) == [] and not (tmp_path / "run/model").exists()
    again = spawn("sft", sft_args(files, tmp_path / "run"), err)
    again.join()
    assert again.exitcode == 0 and metrics(tmp_path / "run") == metrics(tmp_path / "whole")


def test_disk_full_keeps_the_checkpoint_before(files, call, refused, tmp_path, monkeypatch):
    import torch.distributed.checkpoint as dcp

    saves = []
    save = dcp.save

    def fail(*args, **kwargs):
        saves.append(1)
        if len(saves) == 3:
            raise OSError(errno.ENOSPC, "No space left on device")
        return save(*args, **kwargs)

    monkeypatch.setattr(dcp, "save", fail)
    refused("sft", *sft_args(files, tmp_path / "run"), says="no space left on the disk")
    from runtime import checkpoint

    kept = checkpoint.steps(tmp_path / "run/checkpoints")
    assert len(kept) == 2 and all(checkpoint.inspect(f)[1] is None for f in kept)


def test_a_finished_run_is_left_alone_and_other_settings_are_refused(files, call, refused, tmp_path):
    args = sft_args(files, tmp_path / "run")
    assert call("sft", *args)[0] == 0
    before = metrics(tmp_path / "run", timeless=False)
    left = tmp_path / "run/checkpoints/step_2.tmp"  # by a kill after the last save
    left.mkdir()
    status, printed, _ = call("sft", *args)
    assert status == 0 and "at step 10 of 10" in printed and metrics(tmp_path / "run", timeless=False) == before
    assert not left.exists()
    refused("sft", *sft_args(files, tmp_path / "run", lr=2e-3), says="holds a run with lr = 0.001, not 0.002")
    refused("sft", *sft_args(files, tmp_path / "run", data=files["pairs"]), says="holds a run with data =")
    assert call("sft", *sft_args(files, tmp_path / "run", lr=2e-3, overwrite="true"))[0] == 0
    assert metrics(tmp_path / "run")[1]["lr"] != before[1]["lr"]


def test_two_runs_never_share_a_folder(files, refused, tmp_path):
    (tmp_path / "run").mkdir()
    with open(tmp_path / "run/.lock", "w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        refused("sft", *sft_args(files, tmp_path / "run"), says="another run is writing there")


def test_a_file_system_without_locks_is_no_obstacle(tmp_path, monkeypatch):
    with open(tmp_path / "file", "w") as file, open(tmp_path / "file") as other:
        assert lock(file) and not lock(other)
        monkeypatch.setattr(fcntl, "flock", lambda *_: (_ for _ in ()).throw(OSError(errno.ENOLCK, "No locks available")))
        assert lock(other)


def test_of_several_processes_one_does_what_cannot_be_shared(tmp_path):
    for rank in (1, 0):
        command = [
            sys.executable,
            "-m",
            "selftrain.problems",
            "--data",
            "toy_math",
            "--limit",
            "3",
            "--out",
            str(tmp_path / "out.jsonl"),
        ]
        done = subprocess.run(command, env=os.environ | {"RANK": str(rank), "WORLD_SIZE": "2"}, capture_output=True, text=True)
        assert (done.returncode, done.stderr) == (0, "")
        assert (tmp_path / "out.jsonl").exists() == bool(done.stdout) == (rank == 0)


def test_a_loss_that_is_not_finite_stops_the_run(files, sft_run, refused, tmp_path):
    """Step and examples are named, and the weights are those of the step before."""
    import weights
    from data.tokenizer import get

    model = weights.load(sft_run / "model")
    with torch.no_grad():
        model.wte.weight[get("toy").encode(" Mia")[0]] = float("nan")
    weights.save(model, get("toy"), tmp_path / "nan")
    args = flags(init_from=tmp_path / "nan", data=files["sft"], out_dir=tmp_path / "run", micro_tokens=1)
    line = refused("sft", *args, says="the loss is nan at step 1, in the micro-batch with examples ")
    assert "the weights were not touched" in line and not (tmp_path / "run/checkpoints").exists()
    args = ref_args(files, sft_run, tmp_path / "nan.safetensors", init_from=tmp_path / "nan")
    refused("precompute_ref", *args, says="not finite (pair ")
    assert not (tmp_path / "nan.safetensors").exists()
    refused("eval_mcq", *flags(model=tmp_path / "nan", data=files["mcq"], mode="generate"), says="its weights are damaged")


# --- what a reader of the code once found wrong ----------------------------------------------------------------------------


def test_a_validation_that_is_not_finite_is_never_the_best(files, call, tmp_path, monkeypatch):
    import sft

    validate = sft.validate
    calls = []

    def broken(*args):
        calls.append(1)
        return {"loss": float("nan"), "perplexity": float("nan")} if len(calls) == 2 else validate(*args)

    monkeypatch.setattr(sft, "validate", broken)
    assert call("sft", *sft_args(files, tmp_path / "run"))[0] == 0
    state = json.loads((tmp_path / "run/checkpoints/step_10/state.json").read_text())
    assert math.isfinite(state["best"]["loss"]) and state["best"]["step"] in (8, 10)


def test_damaged_newer_checkpoints_do_not_outlive_the_resume(files, call, tmp_path):
    """They would count as the newest ones, and `keep` would spare them instead of whole ones."""
    assert call("sft", *sft_args(files, tmp_path / "run", keep=9))[0] == 0
    checkpoints = tmp_path / "run/checkpoints"
    for step in (9, 10):
        (checkpoints / f"step_{step}" / "state.json").write_text("{")
    (checkpoints / "step_99").mkdir()
    assert call("sft", *sft_args(files, tmp_path / "run", keep=9))[0] == 0
    assert not (checkpoints / "step_99").exists()
    assert json.loads((checkpoints / "step_10/state.json").read_text())["step"] == 10


def test_a_damaged_best_checkpoint_gives_the_last_weights(files, call, tmp_path):
    args = sft_args(files, tmp_path / "run", **LATE, save_every=0)
    assert call("sft", *args)[0] == 0
    best = json.loads((tmp_path / "run/checkpoints/step_40/state.json").read_text())["best"]["step"]
    assert best < 40, "the rate did not ruin the model: choose another"
    (tmp_path / f"run/checkpoints/step_{best}/state.json").unlink()
    status, printed, err = call("sft", *args)
    assert status == 0 and "the last weights are used" in err and "model: step 40\n" in printed


def test_overwrite_is_not_part_of_the_run(files, call, tmp_path, monkeypatch):
    """It is not stored, so that a copy of config.toml does not delete the run; and a stopped run says to leave it out."""
    from runtime.run import Run

    log_step = Run.log_step

    def interrupt(self, step, *args):
        log_step(self, step, *args)
        if step == 5:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(Run, "log_step", interrupt)
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    import sft

    monkeypatch.setattr(sys, "argv", ["sft.py", *sft_args(files, tmp_path / "run", overwrite="true")])
    assert sft.main() == 128 + signal.SIGTERM
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before, "handlers are put back"
    assert "overwrite = false" in (tmp_path / "run/config.toml").read_text()
    monkeypatch.undo()
    assert call("sft", *sft_args(files, tmp_path / "run"))[0] == 0


def test_a_run_without_a_checkpoint_is_not_wiped_by_another(files, call, refused, tmp_path, monkeypatch):
    """Killed before its first save, its metrics are still somebody's: other settings are refused."""
    from runtime.run import Run

    class Killed(Exception):
        pass

    def die(*_):
        raise Killed

    monkeypatch.setattr(Run, "save", die)
    with pytest.raises(Killed):
        call("sft", *sft_args(files, tmp_path / "run"))
    monkeypatch.undo()
    lines = (tmp_path / "run/metrics.jsonl").read_text()
    assert lines
    refused("sft", *sft_args(files, tmp_path / "run", lr=5e-4), says="holds a run with lr = 0.001")
    assert (tmp_path / "run/metrics.jsonl").read_text() == lines
    assert call("sft", *sft_args(files, tmp_path / "run"))[0] == 0


def test_files_that_cannot_be_written_are_refused_before_the_work(files, sft_run, refused, tmp_path):
    (tmp_path / "file").write_text("")
    for out, says in ((tmp_path, "is a folder"), (tmp_path / "file/x.json", "cannot be written")):
        refused("eval_mcq", *flags(model=sft_run / "model", data=files["mcq"], out=out), says=says)
    refused("precompute_ref", *ref_args(files, sft_run, tmp_path / "file/x.safetensors"), says="cannot be written")


def test_the_demo_deletes_only_what_it_made(refused, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.txt").write_text("years")
    refused("demo", "--out_dir", str(tmp_path / "mine"), says="was not made by a demo")
    assert (tmp_path / "mine/thesis.txt").read_text() == "years"


# --- wandb, by a stand-in: the package is optional ------------------------------------------------------------------------


@pytest.fixture
def wandb(monkeypatch):
    """A module that notes what it is told."""
    fake = types.ModuleType("wandb")
    fake.Error = type("Error", (Exception,), {})
    fake.inits, fake.logged, fake.finished = [], [], []
    run = types.SimpleNamespace(
        id="abc", log=lambda r, step: fake.logged.append((step, r)), finish=lambda: fake.finished.append(1)
    )

    def init(**keys):
        fake.inits.append(keys)
        return run

    fake.init = init
    monkeypatch.setitem(sys.modules, "wandb", fake)
    return fake


def test_wandb_gets_every_record_and_a_resumed_run_goes_on(wandb, files, call, tmp_path):
    args = sft_args(files, tmp_path / "run", wandb="p")
    assert call("sft", *args)[0] == 0
    assert wandb.inits[0]["project"] == "p" and wandb.inits[0]["id"] is None and wandb.finished == [1]
    assert wandb.inits[0]["config"]["lr"] == 1e-3
    records = metrics(tmp_path / "run")
    assert [step for step, _ in wandb.logged] == [r["step"] for r in records]
    first_train = next(r for r in records if r["split"] == "train")
    assert any(r.get("train/loss") == first_train["loss"] for _, r in wandb.logged)
    assert call("sft", *args)[0] == 0
    assert wandb.inits[1]["id"] == "abc"


def test_wandb_that_fails_or_is_missing(wandb, files, refused, tmp_path, monkeypatch):
    def fail(**_):
        raise wandb.Error("api_key not configured\nand more")

    wandb.init = fail
    refused("sft", *sft_args(files, tmp_path / "run", wandb="p"), says="key wandb: api_key not configured")
    monkeypatch.setitem(sys.modules, "wandb", None)
    refused("sft", *sft_args(files, tmp_path / "run", wandb="p"), says="pip install wandb")
