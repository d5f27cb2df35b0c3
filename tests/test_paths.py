"""No script writes over what it reads, nor two files to one place: each is refused before anything is touched."""

import json
import os
import shutil
from pathlib import Path

import pytest

import weights
from data.tokenizer import get
from tests import tiny
from tests.conftest import SCRATCH, contents, flags, metrics

SAYS = "key {}: the run would write over "


@pytest.fixture
def here(files, sft_run, reference, tmp_path, monkeypatch) -> Path:
    """A folder to stand in, with copies of a model, an adapter of it, data, a reference and graded samples."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(sft_run / "model", "X/model")
    tiny.save_adapter(tiny.with_lora(weights.load("X/model")), tmp_path / "X/model", tmp_path / "Y/adapter", get("toy"))
    for name in ("sft", "pairs", "mcq"):
        shutil.copyfile(files[name], f"{name}.jsonl")
    shutil.copyfile(reference, "ref.safetensors")
    graded = {"prompt": "q", "answer": "1", "completions": ["1", "2"], "grades": [True, False], "pred": ["1", "2"]}
    Path("graded.jsonl").write_text(json.dumps(graded) + "\n")
    Path("problems.jsonl").write_text(json.dumps({"problem": "1 + 1", "answer": "2"}) + "\n")
    Path("gsm").mkdir()
    for split in ("train", "test"):
        shutil.copyfile("problems.jsonl", f"gsm/{split}.jsonl")
    for name in ("c.toml", "a.png", "a.html", "X/model/chat_template.jinja"):
        Path(name).touch()
    return tmp_path


GRADED = {"samples": "graded.jsonl"}
JUDGE = {"judge": "http://127.0.0.1:9/v1", "judge_model": "m"}
REWARD = {"model": "X/model", "ref_model": "X/model", "data": "pairs.jsonl"}
CASES = [  # script, its keys, the key that is refused
    ("sft", {**SCRATCH, "data": "X/metrics.jsonl", "out_dir": "X"}, "out_dir"),
    ("sft", {"init_from": "X/model", "data": "sft.jsonl", "out_dir": "X"}, "out_dir"),
    ("sft", {"init_from": "X/model", "data": "sft.jsonl", "out_dir": "X", "overwrite": "true"}, "out_dir"),
    ("sft", {"init_from": "Y/adapter", "data": "sft.jsonl", "out_dir": "Y", "lora_rank": 4, "overwrite": "true"}, "out_dir"),
    ("sft", {"init_from": "Y/adapter", "data": "sft.jsonl", "out_dir": "X"}, "out_dir"),  # the adapter's base
    ("sft", {"init_from": "Y/adapter", "data": "sft.jsonl", "out_dir": "X", "lora_rank": 4}, "out_dir"),
    ("dpo", {"init_from": "X/model", "data": "X/model/d.jsonl", "ref": "ref.safetensors", "out_dir": "X"}, "out_dir"),
    ("dpo", {**SCRATCH, "data": "pairs.jsonl", "ref": "X/model/r.safetensors", "out_dir": "./Y/../X/"}, "out_dir"),
    ("dpo", {**SCRATCH, "data": "pairs.jsonl", "val_data": "X/model/x", "loss": "simpo", "out_dir": "X"}, "out_dir"),
    ("precompute_ref", {"init_from": "X/model", "data": "pairs.jsonl", "out": "X/model/model.safetensors"}, "out"),
    ("precompute_ref", {"init_from": "Y/adapter", "data": "pairs.jsonl", "out": "X/model/model.safetensors"}, "out"),
    ("sample", {"model": "X/model", "prompts": "sft.jsonl", "out": "sft.jsonl"}, "out"),
    ("sample", {"model": "X/model", "prompts": "sft.jsonl", "out": "X/model/tokenizer.json"}, "out"),
    ("sample", {"model": "X/model", "prompts": "sft.jsonl", "out": "X/model/chat_template.jinja"}, "out"),
    ("eval_mcq", {"model": "X/model", "data": "mcq.jsonl", "out": "mcq.jsonl"}, "out"),
    ("eval_mcq", {"model": "X/model", "data": "mcq.jsonl", "out": "X/model/config.json"}, "out"),
    ("eval_mcq", {"model": "X/model", "data": "mcq.jsonl", "out": "r", "details": "r"}, "details"),
    ("eval_reward", {**REWARD, "out": "pairs.jsonl"}, "out"),
    ("eval_reward", {**REWARD, "out": "r", "details": "./r"}, "details"),
    ("eval_winrate", {**JUDGE, "responses": "graded.jsonl", "out": "graded.jsonl"}, "out"),
    ("eval_winrate", {**JUDGE, "responses": "graded.jsonl", "out": "r.json", "table": "r.cache.jsonl"}, "cache"),
    ("eval_winrate", {**JUDGE, "responses": "graded.jsonl", "judge_prompt": "c.toml", "out": "c.toml"}, "out"),
    ("selftrain.eval_math", {**GRADED, "out": "graded.jsonl"}, "out"),
    ("selftrain.eval_math", {**GRADED, "details": "graded.jsonl"}, "details"),
    ("selftrain.eval_math", {**GRADED, "out": "r", "details": "r"}, "details"),
    ("selftrain.pairs", {**GRADED, "out": "graded.jsonl"}, "out"),
    ("selftrain.pairs", {**GRADED, "out": "p", "report": "p"}, "report"),
    ("selftrain.reward_pairs", {"samples": "graded.jsonl", "reward": "reviews", "out": "graded.jsonl"}, "out"),
    ("selftrain.problems", {"data": "problems.jsonl", "out": "problems.jsonl"}, "out"),
    ("selftrain.problems", {"data": "gsm8k", "data_dir": "gsm", "split": "test", "out": "gsm/test.jsonl"}, "out"),
    ("selftrain.loop", {"init_from": "X/model", "data": "toy_math", "data_dir": "L/rounds.md", "out_dir": "L"}, "out_dir"),
    ("data.__main__", {"data": "pairs.jsonl", "out": "pairs.jsonl"}, "out"),
    ("report.plot", {"": "a.png", "out": "a.png"}, "out"),
    ("report.page", {"": "a.html", "out": "a.html"}, "out"),
    ("report.tables", {"": "graded.jsonl", "out": "graded.jsonl"}, "out"),
    ("report.tables", {"": "graded.jsonl", "config": "c.toml", "out": "c.toml"}, "out"),
    ("bench.__main__", {"data": "pairs.jsonl", "out": "pairs.jsonl"}, "out"),
    ("tools.convert_openai", {"folder": "X/model", "out": "X/model"}, "out"),
    ("tools.convert_openai", {"folder": "X/model", "out": "X"}, "out"),
]


@pytest.mark.parametrize(("script", "keys", "key"), CASES)
def test_what_is_read_is_not_written_over(script, keys, key, here, refused):
    before = contents(here)
    refused(script, *keys.get("", "").split(), *flags(**{k: v for k, v in keys.items() if k}), says=SAYS.format(key))
    assert contents(here) == before


@pytest.mark.parametrize("link", ["symbolic", "hard", "of the folder", "of the output"])
def test_links_are_the_same_path(link, here, refused):
    """A run that replaces a link replaces what lies behind it."""
    if link == "of the folder":
        Path("Z").symlink_to("X")
        args = flags(init_from="Z/model", data="sft.jsonl", out_dir=here / "X")
    elif link == "of the output":
        Path("Z").mkdir(), Path("Z/model").symlink_to(here / "X/model")
        args = flags(init_from="X/model", data="sft.jsonl", out_dir="Z")
    else:
        (os.symlink if link == "symbolic" else os.link)("graded.jsonl", "other.jsonl")
        args = None
    before = contents(here)
    if args:
        refused("sft", *args, says=SAYS.format("out_dir"))
    else:
        refused("selftrain.pairs", *flags(samples="graded.jsonl", out="other.jsonl"), says=SAYS.format("out"))
    assert contents(here) == before


def test_what_is_no_danger_still_works(here, files, sft_run, call):
    """A run from another run's model; again with its own config.toml; data in the folder or above it; results beside a model,
    once more; a label that is called like a folder."""
    Path("R").mkdir()
    shutil.copyfile("sft.jsonl", "R/model.jsonl")
    run = flags(init_from="X/model", data="R/model.jsonl", out_dir="R", max_steps=2, batch_size=8)
    assert call("sft", *run)[0] == 0
    records = metrics("R")
    again = flags(config="R/config.toml")
    assert call("sft", *run)[0] == 0 and call("sft", *again)[0] == 0 and call("sft", *run, "--overwrite")[0] == 0
    assert call("sft", *again, "--overwrite")[0] == 0 and metrics("R") == records
    assert call("sft", *flags(config="R/config.toml", init_from="R/model", out_dir="R/model"))[0] == 0
    assert call("sft", *flags(config="R/config.toml", init_from="R/model", out_dir="R/model"))[0] == 0
    mcq = flags(model="R/model", data="mcq.jsonl", data_dir=".", out="R/model/mcq.json", details="R/model/mcq.jsonl")
    reward = {**REWARD, "out": "X/model/reward.json", "label": "X"}
    problems = flags(data="gsm8k", data_dir="gsm", split="test", out="gsm/prompts.jsonl")
    for _ in range(2):
        assert call("eval_mcq", *mcq)[0] == 0 and call("eval_reward", *flags(**reward))[0] == 0
        assert call("selftrain.problems", *problems)[0] == 0
        assert call("report.tables", "R", "--out", "R/table.md")[0] == 0


def test_texts_that_are_no_paths(here, call):
    """Longer than a file name may be, or with a character that no path has."""
    Path("t.toml").write_text('stop = "\\u0000"\n')
    args = flags(model="X/model", prompts="pairs.jsonl", out="s.jsonl", limit=2, max_new_tokens=2)
    assert call("sample", *args, "--config", "t.toml")[0] == 0
    assert call("sample", *args, "--stop", "x" * 5000)[0] == 0
