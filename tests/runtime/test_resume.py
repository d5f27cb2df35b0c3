"""A run that goes on: longer, with data that have moved, and with another layout after running out of memory."""

import json
import os
import shutil

import pytest

from runtime import optim
from tests.conftest import close, dpo_args, flags, metrics, sft_args


@pytest.mark.parametrize(
    ("schedule", "longer"), [("constant", {"max_steps": 20}), pytest.param("cosine", {"epochs": 4}, marks=pytest.mark.slow)]
)
def test_more_steps_extend_a_run(schedule, longer, run, tmp_path):
    """With a constant rate it becomes the run that was that long from the start; another schedule is that of the longer run
    from there on."""
    keys = {"schedule": schedule, "keep": 9}
    run("sft", tmp_path / "run", **keys)
    printed, _, records = run("sft", tmp_path / "run", **keys, **longer)
    whole = run("sft", tmp_path / "whole", **keys, **longer)[2]
    assert "extended from 10 to 20 steps" in printed and f"the {schedule} schedule covers all 20 now" in printed
    rates = [[r["lr"] for r in found if r["split"] == "train"] for found in (records, whole)]
    assert len(rates[0]) == 20 and rates[0][10:] == rates[1][10:]
    assert f"goes on at {rates[1][10]:.3g}, after {rates[0][9]:.3g}" in printed
    if schedule == "constant":
        before = {(r["step"], r["split"]): r for r in records}
        assert all(before[r["step"], r["split"]] == r for r in whole)
        assert before.keys() - {(r["step"], r["split"]) for r in whole} == {(10, "val")}, "the end of the first part"
    assert "extended" not in run("sft", tmp_path / "run", **keys, **longer)[0]
    assert (
        "max_steps = 20" in (tmp_path / "run/config.toml").read_text()
        or "epochs = 4.0" in (tmp_path / "run/config.toml").read_text()
    )


def test_fewer_steps_are_refused(run, files, refused, tmp_path):
    run("sft", tmp_path / "run", keep=9)
    for fewer in ({"max_steps": 9}, {"epochs": 1}):
        refused("sft", *sft_args(files, tmp_path / "run", **fewer), says="holds a run of 10 steps, not")
    run("sft", tmp_path / "run", max_steps=10)
    shutil.rmtree(tmp_path / "run/checkpoints")  # nothing to go on from: the run that was is not wiped
    refused("sft", *sft_args(files, tmp_path / "run", max_steps=20), says="holds a run with max_steps = 10, not 20")


@pytest.mark.slow
def test_data_are_known_by_their_content(run, files, sft_run, reference, call, refused, tmp_path, monkeypatch):
    """Everything moved to another folder, and named from there."""
    folder, moved = tmp_path / "run", tmp_path / "moved"
    records = run("sigmoid", folder)[2]
    moved.mkdir()
    for name in ("pairs", "val_pairs", "sft"):
        shutil.copyfile(files[name], moved / f"{name}.jsonl")
    shutil.copytree(sft_run / "model", moved / "model")
    shutil.copyfile(reference, moved / "ref.safetensors")
    shutil.move(folder, moved / "run")
    monkeypatch.chdir(moved)
    keys = {
        "init_from": "model",
        "data": "pairs.jsonl",
        "val_data": "val_pairs.jsonl",
        "ref": "ref.safetensors",
        "max_steps": 13,
    }
    status, _, err = call("dpo", *dpo_args(files, sft_run, reference, "run", **keys))
    assert status == 0, err
    assert metrics("run")[: len(records)] == records and metrics("run")[-1]["step"] == 13
    lines = (moved / "pairs.jsonl").read_text().splitlines(keepends=True)
    (moved / "pairs.jsonl").write_text("".join(lines[1:]))
    args = dpo_args(files, sft_run, reference, "run", **keys | {"ref": None, "loss": "simpo"})
    refused("dpo", *args, says="holds a run with loss = 'sigmoid'")
    keys = {"init_from": "model", "data": "sft.jsonl", "out_dir": "other", "max_steps": 3, "save_every": 1, "samples": 0}
    assert call("sft", *flags(**keys))[0] == 0
    (moved / "sft.jsonl").write_text((moved / "sft.jsonl").read_text().replace("Mia", "Ben"))
    refused("sft", *flags(**keys), says="the data differs from when its run was begun")
    shutil.copyfile(files["sft"], moved / "sft.jsonl")
    assert call("sft", *flags(**keys))[0] == 0
    weights = moved / "model/model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4] + b"\0\0\0\0")
    refused("sft", *flags(**keys), says="the base differs from when its run was begun")


def test_a_checkpoint_of_an_earlier_version_goes_on(run, tmp_path):
    """It has no model beside it, and is not bound to base and tokenizer."""
    run("sft", tmp_path / "run", keep=9)
    for path in (tmp_path / "run/checkpoints").glob("*/state.json"):
        state = json.loads(path.read_text())
        state["files"] = {name: entry for name, entry in state["files"].items() if name.startswith("rank_")}
        for name in ("steps", "base", "tokenizer", "base_sha256"):
            del state[name]
        path.write_text(json.dumps(state))
        for file in path.parent.iterdir():
            if file.name not in (*state["files"], "state.json"):
                os.remove(file)
    assert "at step 10 of 12" in run("sft", tmp_path / "run", keep=9, max_steps=12)[0]


@pytest.mark.slow
def test_another_layout_after_running_out_of_memory(run, files, refused, tmp_path, monkeypatch):
    """Also where not one checkpoint was saved."""
    keys = {"dropout": 0, "schedule": "constant"}
    want = run("sft", tmp_path / "want", **keys)[2]
    clip, calls = optim.clip, []

    def exhausted(*args):
        calls.append(args)
        if len(calls) == 3:
            raise MemoryError
        return clip(*args)

    with monkeypatch.context() as patch:
        patch.setattr(optim, "clip", exhausted)
        args = sft_args(files, tmp_path / "run", **keys, max_steps=5)
        refused("sft", *args, says="out of memory (): lower micro_tokens or batch_size")
    calls.clear()  # with the run that holds the folder
    assert not [*(tmp_path / "run/checkpoints").glob("step_*")] and len(metrics(tmp_path / "run")) == 3
    for steps, layout, said in (
        (5, {"micro_tokens": 300}, ["micro_tokens is 300 now, not 4096"]),
        (8, {"micro_tokens": 200, "row_len": 150}, ["micro_tokens is 200 now, not 300", "row_len is 150 now, not 0"]),
        (10, {"activation_checkpointing": "true"}, ["activation_checkpointing is True now, not False"]),
    ):
        printed, _, records = run("sft", tmp_path / "run", **keys, max_steps=steps, **layout)
        assert all(f"{text}: the last bits will differ from an unbroken run's" in printed for text in said)
        assert "dropout draws" not in printed
    train = [[r for r in found if r["split"] == "train"] for found in (records, want)]
    close(*train, 1e-4)
    assert train[0] != train[1]
    printed, _, _ = run("sft", tmp_path / "drop")
    printed, _, _ = run("sft", tmp_path / "drop", micro_tokens=200)
    assert "micro_tokens is 200 now, not 4096: the last bits will differ" in printed and "dropout draws other" in printed
