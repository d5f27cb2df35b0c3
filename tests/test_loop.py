"""The loop: its steps in order, killed at each of them and gone on with, and what it says when nothing is learnt."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import loop
from data import toy_math
from runtime.errors import UserError
from tests.conftest import flags, script

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def start(tmp_path_factory) -> Path:
    """A small model that has seen a few sums."""
    folder = tmp_path_factory.mktemp("toy_math") / "sft"
    keys = {"init_from": "scratch", "tokenizer": "toy_math", "n_layer": 1, "n_head": 2, "n_embd": 32, "block_size": 64}
    keys |= {"data": "toy_math", "limit": 64, "val_limit": 8, "batch_size": 16, "max_steps": 60, "lr": 1e-2, "eval_every": 0}
    assert script("sft", *flags(**keys, out_dir=folder, samples=0, save_every=0)) == 0
    return folder / "model"


def keys(start: Path, out: Path, **more) -> list[str]:
    settings = {"init_from": start, "data": "toy_math", "problems": 40, "eval_problems": 24, "rounds": 2, "out_dir": out}
    settings |= {"sample": "--n 6 --max_new_tokens 30", "eval_sample": "--n=4", "pairs": "--max_pairs 2"}
    settings |= {"dpo": "--beta 0.5 --lr 1e-3 --batch_size 8 --save_every 1", "device": "cpu"}
    return [f"--{name}={value}" for name, value in {**settings, **more}.items()]


@pytest.fixture(scope="module")
def whole(start, tmp_path_factory) -> Path:
    """An unbroken loop's folder."""
    out = tmp_path_factory.mktemp("loop") / "whole"
    assert script("loop", *keys(start, out)) == 0
    return out


def made(folder: Path) -> dict[str, bytes]:
    """What a loop leaves, apart from what a clock decides and names its folder."""
    names = ["rounds.json", "rounds.md", "eval_prompts.jsonl"]
    for r in (0, 1, 2):
        names += [f"round_{r}/{n}" for n in ("eval_samples.jsonl", "eval_graded.jsonl")]
        names += (
            [f"round_{r}/{n}" for n in ("samples.jsonl", "pairs.jsonl", "pairs.json", "dpo/model/model.safetensors")]
            if r
            else []
        )
    return {name: (folder / name).read_bytes() for name in names}


def test_table_and_files(whole, start):
    rows = json.loads((whole / "rounds.json").read_text())
    assert [r["round"] for r in rows] == [0, 1, 2] and {r["k"] for r in rows} == {4}
    for r in (1, 2):
        pairs = [json.loads(line) for line in (whole / f"round_{r}/pairs.jsonl").read_text().splitlines()]
        assert rows[r]["pairs"] == len(pairs) > 0
        graded = [json.loads(line) for line in (whole / f"round_{r}/graded.jsonl").read_text().splitlines()]
        assert len(graded) == 40 and all(len(g["grades"]) == 6 for g in graded)
        right = {(g["prompt"], c) for g in graded for c, good in zip(g["completions"], g["grades"], strict=True) if good}
        assert all((p["prompt"], p["chosen"]) in right and (p["prompt"], p["rejected"]) not in right for p in pairs)
        now, before = (loop.shares(whole / f"round_{i}/eval_graded.jsonl") for i in (r, r - 1))
        assert rows[r]["gain"] == pytest.approx(sum(now) / 24 - sum(before) / 24)
        assert rows[r]["pass_at_1"] == pytest.approx(sum(now) / 24)
    first, second = ({json.loads(line)["prompt"] for line in (whole / f"round_{r}/prompts.jsonl").open()} for r in (1, 2))
    assert not first & second, "each round takes the next problems"
    assert (whole / "rounds.md").read_text().count("\n") == 5
    assert f'init_from = "{start}"' in (whole / "config.toml").read_text()


def test_killed_at_every_step_it_gives_the_table_of_the_unbroken_one(start, whole, tmp_path):
    """The process is killed (it leaves at once, nothing is tidied up) just after the nth file of the loop came to be, and in
    the middle of training; the same command is given until it comes through."""
    out = tmp_path / "killed"
    code = (
        "import os, sys\n"
        f"sys.path.insert(0, {str(ROOT)!r})\n"
        "import runtime.files, runtime.checkpoint, runtime.run, loop\n"
        "from runtime.errors import run\n"
        "real = os.replace\n"
        "left = [int(sys.argv.pop(1))]\n"
        "def replace(*args, **kw):\n"
        "    left[0] -= 1\n"
        "    if not left[0]: os._exit(9)  # before the file is in its place\n"
        "    real(*args, **kw)\n"
        "os.replace = replace\n"
        "run(loop.main)\n"
    )
    kills, at = 0, 3
    while True:  # each try gets some files further than the last
        done = subprocess.run(
            [sys.executable, "-c", code, str(at), *keys(start, out)], capture_output=True, text=True, timeout=300, cwd=ROOT
        )
        if done.returncode == 0:
            break
        assert done.returncode == 9, done.stderr
        kills += 1
        assert kills < 60
    assert kills >= 8, "it was killed many times"
    assert made(out) == made(whole)


def test_each_step_alone_missing_is_made_again_the_same(start, whole, tmp_path):
    """Whatever step's file is gone, with all that came after it: what comes out is the same."""
    steps = ["round_1/prompts.jsonl", "round_1/samples.jsonl", "round_1/train.json", "round_1/pairs.jsonl"]
    steps += ["round_1/ref.safetensors", "round_1/dpo", "round_1/eval_samples.jsonl", "round_1/eval.json"]
    out = tmp_path / "again"
    for n in (1, 4, 6):
        shutil.copytree(whole, out)
        for name in steps[n:]:
            path = out / name
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        shutil.rmtree(out / "round_2")
        assert script("loop", *keys(start, out)) == 0
        assert made(out) == made(whole)
        shutil.rmtree(out)


def test_marker_shows_when_training_takes(start, tmp_path, call):
    out = tmp_path / "marked"
    dpo = "--beta 0.1 --lr 1e-2 --batch_size 8 --epochs 4 --sft_weight 1"
    status, said, _ = call("loop", *keys(start, out, rounds=1, marker="!", dpo=dpo, plot="true"))
    assert status == 0 and "marker" in said
    before, after = json.loads((out / "rounds.json").read_text())
    assert before["marker"] < 0.05 < 0.3 < after["marker"]
    assert (out / "rounds.png").read_bytes().startswith(b"\x89PNG")


def test_it_says_early_that_nothing_is_learnt(start, tmp_path, call):
    out = tmp_path / "still"
    status, _, err = call("loop", *keys(start, out, rounds=1, marker="!", dpo="--lr 0 --batch_size 64"))
    assert status == 0
    assert "round 1 shows no gain in pass@1" in err and "the marker shows in 0.0% of outputs: training does not take" in err
    status, said, err = call(
        "loop", *keys(start, tmp_path / "worse", rounds=3, stop_early="true", dpo="--lr 0.1 --batch_size 8")
    )
    assert status == 0 and "made pass@1 worse" in err and "left after round 1" in said


def test_bad_settings_before_anything_runs(start, tmp_path, refused):
    out = tmp_path / "loop"
    refused("loop", *keys(start, out, dpo="--betta 1"), says="unknown key 'betta': the nearest known key is 'beta'")
    refused("loop", *keys(start, out, sample="--n many"), says="n = 'many' is not an int")
    refused("loop", *keys(start, out, pairs="max_pairs 2"), says="key pairs: 'max_pairs 2': write --key value")
    refused("loop", *keys(start, out, grade="--grader 'plain"), says="key grade")
    refused("loop", *keys(start, out, rounds=0), says="key rounds: 0 is too small")
    refused("loop", *keys(start, out, data="problems.jsonl"), says="key eval_data: data is a file")
    refused("loop", *keys(start, out, data="problems.jsonl", eval_data="e.jsonl"), says="problems.jsonl: no such file")
    assert not out.exists()


def test_other_settings_are_refused_and_more_rounds_are_not(start, whole, tmp_path, refused, call):
    refused("loop", *keys(start, whole, problems=39), says="holds a loop with problems = 40, not 39")
    out = tmp_path / "more"
    shutil.copytree(whole, out)
    assert call("loop", *keys(start, out, rounds=3))[0] == 0
    assert len(json.loads((out / "rounds.json").read_text())) == 4


def test_a_user_s_problems(start, tmp_path, call):
    """A file to learn from and one to evaluate on, each with problem and answer; it begins again when all were asked."""
    for name, split in (("train", "train"), ("test", "test")):
        rows = [{"problem": p, "answer": a} for p, _, a, _ in toy_math.problems(split, 30)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    files = {"data": tmp_path / "train.jsonl", "eval_data": tmp_path / "test.jsonl", "problems": 20}
    status, _, err = call("loop", *keys(start, tmp_path / "out", **files))
    assert status == 0, err
    assert (tmp_path / "out/round_2/prompts.jsonl").read_text().count("\n") == 10


def test_words():
    assert loop.words("--n 8 --stop='a b' --lr -1", "x") == {"n": "8", "stop": "a b", "lr": "-1"}
    with pytest.raises(UserError, match="key x"):
        loop.words("--n", "x")
