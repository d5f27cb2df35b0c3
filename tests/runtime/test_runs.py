"""Whole runs on tiny models: the pipeline, sums that no layout may change, resuming, damage, full disks."""

import contextlib
import errno
import fcntl
import json
import math
import os
import shutil
import signal
import sys
import types
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

import sft
import weights
from data import load
from data.encode import encode, load_encoded
from data.tokenizer import get
from data.toy import problems
from losses import REFERENCE_FREE
from precompute_ref import reference_logps, share_prompts
from runtime import checkpoint
from runtime.distributed import setup
from runtime.optim import learning_rate, make, rounded_up, set_lr
from runtime.run import Run
from tests.conftest import close, contents, metrics, script, sft_args


@pytest.fixture(scope="module")
def whole(files, tmp_path_factory) -> Path:
    """The folder of a run of SFT that was never interrupted, with all its checkpoints."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    with contextlib.redirect_stdout(None):
        assert script("sft", *sft_args(files, folder, keep=9)) == 0
    return folder


# --- the pipeline --------------------------------------------------------------------------------------------------


def test_pipeline(files, run, call, tmp_path):
    """SFT, reference, DPO, evaluation; what comes out is a folder that transformers loads, with the same model in it."""
    out = tmp_path / "dpo"
    printed, _, records = run("sigmoid", out)
    assert "loss 0.6931" in printed and (out / "config.toml").read_text().count("beta = 0.1") == 1
    first, train = records[0], [r for r in records if r["split"] == "train"]
    assert (first["split"], first["step"]) == ("val", 0) and first["loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert len(train) == 12 and train[0]["loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert train[0]["rewards/margins"] == pytest.approx(0, abs=1e-5)
    assert train[-1]["rewards/accuracies"] > 0.7 and train[-1]["loss"] < 0.69
    wanted = (
        "loss lr grad_norm tokens tokens_per_s step_s "
        "rewards/chosen rewards/rejected rewards/accuracies rewards/margins logps/chosen logps/rejected"
    )
    assert set(wanted.split()) <= metrics(out, timeless=False)[1].keys()

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
    theirs = transformers.AutoModelForCausalLM.from_pretrained(out / "model").eval()
    text = problems("val", 1)[0][0].context
    ids = transformers.AutoTokenizer.from_pretrained(out / "model")(text)["input_ids"]
    assert ids == get("toy").encode(text)
    with torch.no_grad():
        gap = theirs(torch.tensor([ids])).logits - weights.load(out / "model").logits(torch.tensor([ids]))
    assert gap.abs().max() < 1e-4


def test_reference_file(files, sft_run, reference):
    """float32 logps (pairs, 2), equal to each pair scored as a plain sequence; and what it is bound to."""
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
    model, compute = weights.load(sft_run / "model"), setup("cpu")
    items, _ = encode(load("toy", "val", "preference", limit=6), get("toy"), 128, "drop")
    shared, where = share_prompts(items)
    assert len(items) == 18 and len(shared) == 6 and [len(s.completions) for s in shared] == [4] * 6
    assert where[4] == [(1, 0), (1, 2)]
    together = reference_logps(model, items, compute, 4096)
    alone = torch.cat([reference_logps(model, [item], compute, 4096) for item in items])
    assert (together - alone).abs().max() < 1e-4


# --- sums that no layout may change ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["sft", "sigmoid", "dpop", "aot", pytest.param("aot_unpaired", marks=pytest.mark.slow)])
def test_the_curve_under_any_layout(name, run, tmp_path):
    """One example a forward, several, packed rows: the same losses and gradient norms at every step. Also for losses that
    couple the pairs of a batch, and with an SFT term, whose mean runs over tokens and not over pairs."""
    keys = {"dropout": 0} if name == "sft" else {"sft_weight": 0.5, "max_steps": 5}
    keys |= {"batch_size": 48} if name == "dpop" else {}  # every pair: the first step must not take rounding for a fall
    _, _, want = run(name, tmp_path / "want", **keys)
    layouts = {"micro_tokens": 1}, {"micro_tokens": 400}, {"row_len": 200}, {"row_len": 300, "micro_tokens": 650}
    for n, layout in enumerate(layouts):
        close(run(name, tmp_path / str(n), **keys, **layout)[2], want, 1e-4)


@pytest.mark.parametrize("loss", ["robust", "ipo", "hinge", "dpop", "exo_pair", "bco_pair", "simpo"])
def test_margins_grow_under_every_kind_of_loss(loss, run, tmp_path):
    more = {"ref": None} if loss in REFERENCE_FREE else {"label_smoothing": 0.1} if loss in ("robust", "exo_pair") else {}
    margins = [r["rewards/margins"] for r in run(loss, tmp_path / "run", **more)[2] if r["split"] == "train"]
    assert margins[-1] > margins[0] + 0.002


def test_optimizers_and_schedules(run, tmp_path):
    for name, lr in {"adamw": 1e-3, "rmsprop": 1e-3, "sgd": 0.5}.items():
        _, _, records = run("sft", tmp_path / name, optimizer=name, lr=lr, schedule="constant")
        val = [r["loss"] for r in records if r["split"] == "val"]
        assert val[-1] < val[0] - 0.1, (name, val)
    cfg = types.SimpleNamespace(lr=1.0, min_lr=0.1, warmup=4, schedule="cosine")
    rates = [learning_rate(cfg, s, 20) for s in range(20)]
    assert rates[:4] == [0.25, 0.5, 0.75, 1.0] and rates[4] == 1.0 and rates[12] == pytest.approx(0.55)
    assert rates[19] == pytest.approx(0.1 + 0.9 * (1 + math.cos(math.pi * 15 / 16)) / 2)
    cfg.schedule, cfg.warmup = "linear", 0.5
    assert learning_rate(cfg, 4, 20) == 0.5 and learning_rate(cfg, 15, 20) == pytest.approx(0.55)
    cfg.schedule = "constant"
    assert learning_rate(cfg, 19, 20) == 1.0


@pytest.mark.parametrize(
    ("share", "steps", "wanted"), [(0.55, 100, 55), (0.07, 100, 7), (0.29, 100, 29), (0.3, 7, 3), (2, 5, 10)]
)
def test_a_share_of_the_steps_is_counted_as_it_is_written(share, steps, wanted):
    """As floats 0.55 * 100, 0.07 * 100 and 0.29 * 100 lie beside a whole number."""
    assert rounded_up(share, steps) == wanted


@pytest.mark.parametrize(("name", "lr"), [("adamw", 1e-3), ("rmsprop", 1e-3), ("sgd", 0.5)])
def test_weight_decay_is_decoupled(name, lr):
    """What has no gradient shrinks by lr * weight_decay a step, under every optimizer; what is no matrix stays."""
    table, bias = torch.nn.Embedding(3, 4), torch.nn.Parameter(torch.ones(4))
    model = torch.nn.ParameterList([table.weight, bias])
    cfg = types.SimpleNamespace(optimizer=name, lr=1.0, weight_decay=1e-2, adam_beta1=0.9, adam_beta2=0.999)
    start, optimizer = table.weight.detach().clone(), make(model, cfg)
    for step in range(10):
        set_lr(optimizer, lr * (step + 1))
        (table(torch.tensor([0])).square().sum() + 0 * bias.sum()).backward()  # rows 1 and 2 are not used
        optimizer.step()
        optimizer.zero_grad()
    shrunk = math.prod(1 - 1e-2 * lr * (step + 1) for step in range(10))
    torch.testing.assert_close(table.weight.detach()[1:], start[1:] * shrunk, rtol=1e-6, atol=0)
    assert bias.tolist() == [1.0] * 4 and (table.weight[0] - start[0]).abs().min() > 1e-3


@pytest.mark.parametrize("optimizer", ["rmsprop", "sgd"])
def test_weight_decay_resumes_to_the_bit(optimizer, files, tmp_path):
    keys = {"optimizer": optimizer, "weight_decay": 0.5, "lr": 1e-2, "keep": 9, "val_data": None, "samples": 0}
    args = sft_args(files, tmp_path / "run", **keys)
    with contextlib.redirect_stdout(None):
        assert script("sft", *args) == 0
        model = tmp_path / "run/model/model.safetensors"
        wanted, weights_wanted = metrics(tmp_path / "run"), model.read_bytes()
        checkpoint.drop_after(tmp_path / "run/checkpoints", 3)
        model.unlink()
        assert script("sft", *args) == 0
    assert metrics(tmp_path / "run") == wanted and model.read_bytes() == weights_wanted


# --- the best checkpoint ---------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_best_checkpoint_is_kept_and_becomes_the_model(files, run, tmp_path):
    """A rate that ruins the model late: model/ holds the weights of the best validation, or, where that checkpoint is
    damaged, the last ones."""
    folder = tmp_path / "run"
    ruin = {"epochs": 8, "schedule": "constant", "lr": 0.5, "warmup": 40, "grad_clip": 0, "dropout": 0}
    args = {**ruin, "keep": 1, "save_every": 2}
    val = {r["step"]: r["loss"] for r in run("sft", folder, **args)[2] if r["split"] == "val" and r["step"]}
    best = min(val, key=val.get)
    assert best < max(val), "the rate did not ruin the model: choose another"
    assert {f.name for f in (folder / "checkpoints").iterdir()} == {f"step_{best}", f"step_{max(val)}"}
    items = load_encoded(files["val_sft"], "val", "sft", get("toy"), 128, "drop")
    found = sft.validate(weights.load(folder / "model"), items, setup("cpu"), 4096)["loss"]
    assert found == pytest.approx(val[best], abs=1e-5)
    assert f"step {best}, which validated best" in run("sft", folder, **args)[0], "a finished run writes its model again"
    (folder / f"checkpoints/step_{best}/state.json").unlink()
    printed, err, _ = run("sft", folder, **args)
    assert "the last weights are used" in err and f"model: step {max(val)}\n" in printed


def test_a_validation_that_is_not_finite_is_never_the_best():
    run = types.SimpleNamespace(metrics=None, best=None)
    for step, loss, best in ((0, 9.0, None), (2, math.nan, None), (4, 3.0, 4), (6, math.nan, 4), (8, 3.5, 4), (10, 2.5, 10)):
        assert Run.log_val(run, step, {"loss": loss}) == (best == step)
        assert (run.best and run.best["step"]) == best


# --- resuming --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("number", "overwrite"), [(signal.SIGTERM, "false"), (signal.SIGINT, "true")])
def test_signals_finish_the_step_and_save(number, overwrite, whole, files, run, capsys, tmp_path, monkeypatch):
    """The run stops after the step it was in, says how to go on, and goes on to the unbroken run's metrics. --overwrite is
    no part of the run: a copy of its config.toml does not delete it."""
    log_step, folder = Run.log_step, tmp_path / "run"

    def interrupt(self, step, *args):
        log_step(self, step, *args)
        if step == 5:
            os.kill(os.getpid(), number)

    monkeypatch.setattr(Run, "log_step", interrupt)
    monkeypatch.setattr(sys, "argv", ["sft.py", *sft_args(files, folder, overwrite=overwrite)])
    before = signal.getsignal(number)
    assert sft.main() == 128 + number and signal.getsignal(number) == before, "handlers are put back"
    said = capsys.readouterr()
    how = "the same command without --overwrite" if overwrite == "true" else "the same command"
    assert f"stopped at step 5 of 10, saved in {folder / 'checkpoints'}: {how} goes on from there" in said.out
    assert f"{number.name}: finishing this step" in said.err and not (folder / "model").exists()
    assert "overwrite = false" in (folder / "config.toml").read_text()
    monkeypatch.undo()
    printed, _, records = run("sft", folder)
    assert "at step 5 of 10" in printed and records == metrics(whole)


def test_damaged_checkpoints_are_passed_over(whole, files, run, refused, tmp_path):
    """Cut, changed or missing; and they do not outlive the resume, or they would count as the newest ones of `keep`."""
    checkpoints, records = tmp_path / "run/checkpoints", metrics(whole)
    shutil.copytree(whole, tmp_path / "run")
    newest = checkpoints / "step_10"
    damages = {
        "tensors": lambda file: file.write_bytes(file.read_bytes()[: file.stat().st_size // 2]),
        "flipped": lambda file: file.write_bytes(file.read_bytes().replace(b"\0" * 8, b"\0\0\0\1" * 2, 1)),
        "missing": Path.unlink,
        "state": lambda _: (newest / "state.json").write_text((newest / "state.json").read_text()[:40]),
        "empty": lambda _: (checkpoints / "step_99").mkdir(),
    }
    for name, damage in damages.items():
        damage(next(newest.glob("rank_*.safetensors")))
        printed, err, after = run("sft", tmp_path / "run", keep=9)
        assert err.count("falling back to the one before") == 1 and " is damaged (" in err, name
        assert f"at step {10 if name == 'empty' else 9} of 10" in printed and after == records, name
        assert {f.name for f in checkpoints.iterdir()} == {f.name for f in (whole / "checkpoints").iterdir()}, name
        assert checkpoint.inspect(newest)[1] is None
    for state in checkpoints.glob("*/state.json"):
        state.unlink()
    refused("sft", *sft_args(files, tmp_path / "run", keep=9), says="every checkpoint is damaged: start anew with --overwrite")
    assert run("sft", tmp_path / "run", keep=9, overwrite="true")[2] == records


def test_a_run_is_not_wiped_by_another(whole, files, run, refused, tmp_path):
    """A finished one is left alone, and other settings are refused, also where a kill came before the first checkpoint."""
    shutil.copytree(whole, tmp_path / "run")
    before = metrics(whole, timeless=False)
    left = tmp_path / "run/checkpoints/step_2.tmp"  # by a kill after the last save
    left.mkdir()
    printed, _, _ = run("sft", tmp_path / "run", samples=0)  # a key that is free
    assert "at step 10 of 10" in printed and metrics(tmp_path / "run", timeless=False) == before and not left.exists()
    refused("sft", *sft_args(files, tmp_path / "run", lr=2e-3), says="holds a run with lr = 0.001, not 0.002")
    shutil.rmtree(tmp_path / "run/checkpoints")
    refused("sft", *sft_args(files, tmp_path / "run", data=files["pairs"]), says="holds a run with data =")
    assert metrics(tmp_path / "run", timeless=False) == before
    assert run("sft", tmp_path / "run", lr=2e-3, overwrite="true")[2][1]["lr"] != before[1]["lr"]


def test_two_runs_never_share_a_folder(files, run, refused, tmp_path, monkeypatch):
    """Where the file system has no locks there is no way to know: then the folder is taken on trust."""
    (tmp_path / "run").mkdir()
    with open(tmp_path / "run/.lock", "w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        refused("sft", *sft_args(files, tmp_path / "run"), says="another run is writing there")

        def no_locks(*_):
            raise OSError(errno.ENOLCK, "No locks available")

        monkeypatch.setattr(fcntl, "flock", no_locks)
        run("sft", tmp_path / "run")


@pytest.mark.parametrize("theirs", ['name = "my project"\n', "not TOML"])
def test_a_config_that_no_run_wrote_is_kept(theirs, files, refused, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run/config.toml").write_text(theirs)
    refused("sft", *sft_args(files, tmp_path / "run"), says="--overwrite")
    assert (tmp_path / "run/config.toml").read_text() == theirs


def test_overwrite_does_not_delete_behind_a_link(whole, files, refused, tmp_path):
    """Nor anything else, then."""
    shutil.copytree(whole, tmp_path / "run")
    (tmp_path / "run/adapter").mkdir()
    shutil.move(tmp_path / "run/model", tmp_path / "elsewhere")
    (tmp_path / "run/model").symlink_to(tmp_path / "elsewhere")
    before = contents(tmp_path)
    refused("sft", *sft_args(files, tmp_path / "run", overwrite="true"), says="model is a link")
    assert contents(tmp_path) == before


@pytest.mark.parametrize("overwrite", ["true", None])
@pytest.mark.parametrize("name", ["model", "adapter", "checkpoints", "metrics.jsonl", "wandb_id", "tensorboard"])
@pytest.mark.parametrize("config", [None, 'title = "mine"\n', 'out_dir = "runs/x"\noverwrite = false\n'])
def test_what_no_run_wrote_is_kept(config, name, overwrite, files, refused, tmp_path):
    """A config.toml of somebody else, or one written by hand, does not make a folder ours."""
    (tmp_path / "run").mkdir()
    if name.endswith((".jsonl", "_id")):
        (tmp_path / "run" / name).write_text("mine\n")
    else:
        (tmp_path / "run" / name).mkdir()
        (tmp_path / "run" / name / "config.json").write_text("{}")
    if config:
        (tmp_path / "run/config.toml").write_text(config)
    before = contents(tmp_path)
    first = "config.toml" if config else name
    args = sft_args(files, tmp_path / "run", overwrite=overwrite, max_steps=1)
    refused("sft", *args, says=f"{tmp_path / 'run' / first} is there, and no run wrote it: move it away")
    assert contents(tmp_path) == before


def test_overwrite_deletes_only_what_a_run_wrote(whole, files, run, refused, tmp_path):
    """Notes in the folder, a copy of a checkpoint, a backup of the model."""
    folder = tmp_path / "run"
    shutil.copytree(whole, folder)
    shutil.copytree(folder / "model", folder / "model.old")
    shutil.copytree(folder / "checkpoints/step_4", folder / "checkpoints/best_so_far")
    (folder / "notes.txt").write_text("mine")
    kept = {p: b for p, b in contents(folder).items() if p.startswith(("model.old", "checkpoints/best", "notes"))}
    assert len(kept) == 12 and run("sft", folder, overwrite="true")[2] == metrics(whole)
    assert kept.items() <= contents(folder).items()
    (folder / "model/README.md").write_text("mine")
    before = contents(folder)
    args = sft_args(files, folder)
    refused("sft", *args, "--overwrite", says="model holds README.md, which no run wrote: move it away")
    refused(
        "sft", *args, says="model is there and not a model's folder: move it away (README.md)"
    )  # a finished run writes anew
    assert contents(folder) == before


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
    fake.init = lambda **keys: fake.inits.append(keys) or run
    monkeypatch.setitem(sys.modules, "wandb", fake)
    return fake


def test_wandb_gets_every_record_and_a_resumed_run_goes_on(wandb, run, tmp_path):
    _, _, records = run("sft", tmp_path / "run", wandb="p")
    assert wandb.inits[0]["project"] == "p" and wandb.inits[0]["id"] is None and wandb.finished == [1]
    assert wandb.inits[0]["config"]["lr"] == 1e-3
    assert [step for step, _ in wandb.logged] == [r["step"] for r in records]
    first_train = next(r for r in records if r["split"] == "train")
    assert any(r.get("train/loss") == first_train["loss"] for _, r in wandb.logged)
    run("sft", tmp_path / "run", wandb="p")
    assert wandb.inits[1]["id"] == "abc"


def test_wandb_that_fails_or_is_missing(wandb, files, refused, tmp_path, monkeypatch):
    def fail(**_):
        raise wandb.Error("api_key not configured\nand more")

    wandb.init = fail
    refused("sft", *sft_args(files, tmp_path / "run", wandb="p"), says="key wandb: api_key not configured")
    monkeypatch.setitem(sys.modules, "wandb", None)
    refused("sft", *sft_args(files, tmp_path / "run", wandb="p"), says="pip install wandb")


# --- TensorBoard, by a stand-in too -------------------------------------------------------------------------------------------


def test_tensorboard_gets_every_record_and_a_resumed_run_goes_on(run, tmp_path, monkeypatch):
    """Beside wandb's key. What an unfinished start wrote of later steps no longer counts: purge_step."""
    made, logged, closed = [], [], []

    class Writer:
        def __init__(self, folder, purge_step):
            made.append((folder, purge_step))

        def add_scalar(self, name, value, step):
            logged.append((name, value, step))

        def close(self):
            closed.append(1)

    fake = types.ModuleType("torch.utils.tensorboard")
    fake.SummaryWriter = Writer
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", fake)
    folder = tmp_path / "run"
    _, _, records = run("sft", folder, tensorboard="true")
    names = {f"{r['split']}/{name}" for r in records for name in r if name not in ("step", "split")}
    assert {name for name, _, _ in logged} == {*names, "train/step_s", "train/tokens_per_s"}
    found = [(step, value) for name, value, step in logged if name == "train/loss"]
    assert found == [(r["step"], r["loss"]) for r in records if r["split"] == "train"]
    assert made == [(folder / "tensorboard", 1)] and closed == [1]
    run("sft", folder, tensorboard="true")
    assert made[1] == (folder / "tensorboard", records[-1]["step"] + 1)


def test_tensorboard_that_is_missing(files, refused, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    refused("sft", *sft_args(files, tmp_path / "run", tensorboard="true"), says="pip install tensorboard")


def test_a_run_ends_with_the_command_of_its_page(run, call, tmp_path):
    """And the command works, also a second time, when the page is there."""
    out, _, _ = run("sft", tmp_path / "run")
    words = out.partition("to look at it: python -m report.page ")[2].split()
    assert words == [str(tmp_path / "run"), "--out", str(tmp_path / "run" / "report.html")]
    for _ in range(2):
        assert call("report.page", *words)[0] == 0
    assert "val loss (SFT)" in (tmp_path / "run" / "report.html").read_text()
