"""Any state of a run is a model: its folder when it has ended or was stopped, and each of its checkpoints."""

import contextlib
import json
import os
import pickle
import shutil
import signal
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load, save

import adapters
import weights
from data.tokenizer import choose
from runtime.checkpoint import weights_of
from runtime.run import Run
from tests.conftest import contents, flags, good, metrics, script, sft_args
from tests.runtime.test_checkpoint import written


def stopped(monkeypatch, name: str, args: list[str], at: int) -> None:
    """Run a script that gets SIGTERM at a step."""
    log_step = Run.log_step

    def interrupt(self, step, *more):
        log_step(self, step, *more)
        if step == at:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(Run, "log_step", interrupt)
    assert script(name, *args) == 128 + signal.SIGTERM
    monkeypatch.undo()


def same(one: str | Path, other: str | Path) -> None:
    """Assert that two names give one model, to the bit, with one fingerprint and one tokenizer."""
    a, b = (weights.load(adapters.source(str(name))) for name in (one, other))
    assert a.config == b.config
    for (name, p), q in zip(a.named_parameters(), b.parameters(), strict=True):
        assert torch.equal(p, q), name
    assert choose("auto", str(one)).fingerprint() == choose("auto", str(other)).fingerprint()
    assert weights.fingerprint(a) == weights.fingerprint(b)


@pytest.fixture(scope="module")
def whole(files, tmp_path_factory) -> Path:
    """A run with all its checkpoints whose last step validated best, so that model/ is that step."""
    folder = tmp_path_factory.mktemp("states") / "run"
    with contextlib.redirect_stdout(None):
        assert script("sft", *sft_args(files, folder, keep=9, dropout=0, samples=0)) == 0
    assert min((r for r in metrics(folder) if r["split"] == "val"), key=lambda r: r["loss"])["step"] == 10
    return folder


@pytest.fixture(scope="module")
def adapted(files, sft_run, tmp_path_factory) -> Path:
    """The same with LoRA, on sft_run's model."""
    folder = tmp_path_factory.mktemp("adapted") / "run"
    more = dict.fromkeys(("n_layer", "n_head", "n_embd", "block_size", "tokenizer"))
    keys = {**more, "init_from": sft_run / "model", "lora_rank": 4, "keep": 9, "dropout": 0, "samples": 0}
    with contextlib.redirect_stdout(None):
        assert script("sft", *sft_args(files, folder, **keys)) == 0
    return folder


def test_a_run_folder_is_its_model(whole, adapted, tmp_path):
    assert weights_of("model", str(whole)) == str(whole / "model")
    assert weights_of("model", str(whole / "model")) == str(whole / "model")
    same(whole / "checkpoints/step_10", whole / "model")
    shutil.copytree(adapted, tmp_path / "run")
    assert weights_of("model", str(tmp_path / "run")) == str(tmp_path / "run/model")
    shutil.rmtree(tmp_path / "run/model")
    assert weights_of("model", str(tmp_path / "run")) == str(tmp_path / "run/adapter")
    same(adapted / "checkpoints/step_10", adapted / "adapter")
    for name in ("gpt2", "scratch", "", "no/such", str(tmp_path)):
        assert weights_of("model", name) == name


def test_what_each_script_takes(whole, files, call, tmp_path):
    """A reference made from the run's folder fits a run from its model/, and one from the checkpoint of that step."""
    assert call("precompute_ref", *flags(init_from=whole, data=files["pairs"], out=tmp_path / "ref.safetensors"))[0] == 0
    for n, name in enumerate((whole, whole / "model", whole / "checkpoints/step_10")):
        keys = {"init_from": name, "data": files["pairs"], "ref": tmp_path / "ref.safetensors", "max_steps": 2, "samples": 0}
        status, _, err = call("dpo", *flags(**keys, out_dir=tmp_path / str(n)))
        assert status == 0, err
        assert ("the weights in" in err) == (n == 0)
    assert metrics(tmp_path / "0") == metrics(tmp_path / "1") == metrics(tmp_path / "2")
    results = []
    for name in (whole, whole / "checkpoints/step_10", whole / "checkpoints/step_3"):
        status, out, err = call("eval_mcq", *flags(model=name, data=files["mcq"], mode="loglik"))
        assert status == 0, err
        status, _, err = call("eval_reward", *flags(model=name, ref_model=whole, data=files["pairs"], out=tmp_path / "r.json"))
        assert status == 0, err
        results.append((out.splitlines()[-1], json.loads((tmp_path / "r.json").read_text())["margin"]))
    assert results[0] == results[1] and results[0][1] == 0 and results[2][1] != 0


def test_a_stopped_run_is_its_newest_whole_checkpoint(files, call, tmp_path, monkeypatch, capsys):
    folder = tmp_path / "run"
    args = sft_args(files, folder, keep=9, samples=0, epochs=None, max_steps=10)
    stopped(monkeypatch, "sft", args, 5)
    assert weights_of("model", str(folder)) == str(folder / "checkpoints/step_5")
    file = next((folder / "checkpoints/step_5").glob("rank_*"))
    whole_file = file.read_bytes()
    file.write_bytes(whole_file[:-1] + b"\1")
    assert weights_of("model", str(folder)) == str(folder / "checkpoints/step_4"), "damaged ones are passed over"
    file.write_bytes(whole_file)
    assert call("sft", *args)[0] == 0 and weights_of("model", str(folder)) == str(folder / "model")
    stopped(monkeypatch, "sft", [*args, "--max_steps", "20"], 13)
    assert weights_of("model", str(folder)) == str(folder / "checkpoints/step_13"), "model/ is older"


def test_lora_from_any_state(adapted, files, call, tmp_path):
    """Training goes on with the adapter of a checkpoint; without lora_rank it is merged."""
    same(adapted / "checkpoints/step_10", adapted / "adapter")
    for n, name in enumerate((adapted / "adapter", adapted / "checkpoints/step_10")):
        keys = {"init_from": name, "data": files["pairs"], "max_steps": 3, "samples": 0, "lora_rank": 4, "lr": 1e-3}
        status, _, err = call("dpo", *flags(**keys, out_dir=tmp_path / str(n)))
        assert status == 0, err
    assert metrics(tmp_path / "0") == metrics(tmp_path / "1")
    assert contents(tmp_path / "0/adapter") == contents(tmp_path / "1/adapter")
    before = adapters.source(str(adapted / "checkpoints/step_3"), merge=False).adapter
    assert before.config.rank == 4 and before.base_sha256


@pytest.mark.slow
@pytest.mark.parametrize("lora", [0, 3])
def test_sharded_checkpoints(lora, sft_run, files, world, tmp_path):
    """Two processes, each with its shards on the disk."""
    more = dict.fromkeys(("n_layer", "n_head", "n_embd", "block_size", "tokenizer"))
    keys = {
        **more,
        "init_from": sft_run / "model",
        "lora_rank": lora,
        "keep": 9,
        "samples": 0,
        "replicate": 1,
        "val_data": None,
    }
    good(world(2, "sft", sft_args(files, tmp_path / "run", **keys)))
    assert len([*(tmp_path / "run/checkpoints/step_10").glob("rank_*")]) == 2
    same(tmp_path / "run/checkpoints/step_10", tmp_path / "run" / ("adapter" if lora else "model"))


@pytest.mark.slow
def test_a_checkpoint_as_a_model_folder(whole, adapted, call, refused, tmp_path):
    """transformers loads it; of LoRA the adapter is merged."""
    transformers = pytest.importorskip("transformers")
    for n, run in enumerate((whole, adapted)):
        out = tmp_path / str(n)
        status, _, err = call("tools.export", *flags(model=run / "checkpoints/step_10", out=out))
        assert status == 0, err
        assert contents(out) == contents(run / "model")
        transformers.AutoModelForCausalLM.from_pretrained(out), transformers.AutoTokenizer.from_pretrained(out)
    place = whole / "checkpoints/step_3"
    refused("tools.export", *flags(model=place, out=place), says="key out: the run would write over")
    refused("tools.export", *flags(model=tmp_path, out=tmp_path / "new"), says=f"no config.json in {tmp_path}")


def test_a_run_does_not_write_over_what_it_starts_from(whole, files, refused):
    before = contents(whole)
    for name in (whole, whole / "checkpoints/step_3"):
        refused("sft", *flags(init_from=name, data=files["sft"], out_dir=whole), says="the run would write over")
    assert contents(whole) == before


def test_a_damaged_checkpoint_is_refused(whole, files, refused, tmp_path):
    shutil.copytree(whole / "checkpoints/step_3", tmp_path / "step_3")
    (tmp_path / "step_3/config.json").write_text("{}")
    args = flags(model=tmp_path / "step_3", data=files["mcq"])
    refused("eval_mcq", *args, says="step_3 is a damaged checkpoint (config.json is missing, or does not have the bytes")


def test_the_date_and_template_are_the_runs(whole, tmp_path):
    """A checkpoint has the tokenizer's files of model/."""
    tokenizer = {p.name: p.read_bytes() for p in (whole / "model").iterdir() if p.name not in ("model.safetensors",)}
    saved = {p.name: p.read_bytes() for p in (whole / "checkpoints/step_10").iterdir()}
    assert tokenizer.items() <= saved.items()


@pytest.mark.parametrize("lora", [False, True])
def test_a_checkpoint_from_somebody_else(lora, whole, adapted, files, refused, tmp_path):
    """Whatever is in it, under the right hashes, ends in one line."""
    place = tmp_path / "step_3"
    shutil.copytree((adapted if lora else whole) / "checkpoints/step_3", place)
    file = next(place.glob("rank_*"))
    tensors = load(file.read_bytes())
    with safe_open(file, "pt") as opened:
        starts = opened.metadata()
    name = next(name for name in tensors if name.endswith("lora.b" if lora else "wpe.weight"))
    wrong = {
        "missing": {n: t for n, t in tensors.items() if n != name},
        "all missing": {},
        "scalar": {**tensors, name: torch.tensor(1.0)},
        "flat": {**tensors, name: tensors[name].flatten()},
        "empty": {**tensors, name: tensors[name][:, :0].contiguous()},
        "cut": {**tensors, name: tensors[name][:-1].contiguous()},
    }
    for what, changed in wrong.items():
        content = save(changed, {n: start for n, start in starts.items() if n in changed})
        written(place, **{file.name: content})
        line = refused("eval_mcq", *flags(model=place, data=files["mcq"]), says=str(place))
        assert "name another" in line or "shape" in line or "no LoRA" in line or "fits" in line, (what, line)
    for content in (b"no", save(tensors, {n: "x" for n in starts}), save(tensors)):
        written(place, **{file.name: content})
        refused("eval_mcq", *flags(model=place, data=files["mcq"]), says=str(place))
    written(place, **{file.name: save(tensors, starts), "config.json": pickle.dumps({})})
    refused(
        "eval_mcq", *flags(model=place, data=files["mcq"]), says="config.json is not valid JSON" if not lora else str(place)
    )
