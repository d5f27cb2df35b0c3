"""The loop: its steps in order, killed at each of them and gone on with, and what it says when nothing is learnt."""

import json
import os
import shutil
import signal
import sys
from pathlib import Path

import pytest

from base.errors import UserError
from data import toy_math
from runtime import config
from selftrain import loop
from tests.conftest import flags, script


@pytest.fixture(scope="module")
def start(tmp_path_factory) -> Path:
    """A small model that has seen a few sums."""
    folder = tmp_path_factory.mktemp("toy_math") / "sft"
    keys = {"init_from": "scratch", "tokenizer": "toy_math", "n_layer": 1, "n_head": 2, "n_embd": 32, "block_size": 64}
    keys |= {"data": "toy_math", "limit": 64, "val_limit": 8, "batch_size": 16, "max_steps": 60, "lr": 1e-2, "eval_every": 0}
    assert script("sft", *flags(**keys, out_dir=folder, samples=0, save_every=0)) == 0
    return folder / "model"


def keys(start: Path, out: Path, **more) -> list[str]:
    settings = {"init_from": start, "data": "toy_math", "problems": 24, "eval_problems": 16, "rounds": 2, "out_dir": out}
    settings |= {
        "sample": "--n 6 --max_new_tokens 30",
        "eval_sample": "--n=4",
        "pairs": "--max_pairs 2",
        "grade": "--grader plain",
    }
    settings |= {"dpo": "--beta 0.5 --lr 1e-3 --batch_size 16 --save_every 1", "device": "cpu"}
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
        assert len(graded) == 24 and all(len(g["grades"]) == 6 for g in graded)
        right = {(g["prompt"], c) for g in graded for c, good in zip(g["completions"], g["grades"], strict=True) if good}
        assert all((p["prompt"], p["chosen"]) in right and (p["prompt"], p["rejected"]) not in right for p in pairs)
        now, before = (loop.shares(whole / f"round_{i}/eval_graded.jsonl") for i in (r, r - 1))
        assert rows[r]["gain"] == pytest.approx(sum(now) / 16 - sum(before) / 16)
        assert rows[r]["pass_at_1"] == pytest.approx(sum(now) / 16)
    first, second = ({json.loads(line)["prompt"] for line in (whole / f"round_{r}/prompts.jsonl").open()} for r in (1, 2))
    assert not first & second, "each round takes the next problems"
    assert (whole / "rounds.md").read_text().count("\n") == 5
    assert f'init_from = "{start}"' in (whole / "config.toml").read_text()


def main() -> None:
    """The loop, killed before the first file or folder of a stage comes to its place, unless this stage was killed before. For
    a process of its own."""
    killed = Path(os.environ["KILLED"])

    def wrapped(real):
        def put(source, to, **more):
            to = Path(to)
            place = f"{Path(sys.argv[0]).stem} {to.parent.name}"
            before = killed.read_text().splitlines() if killed.exists() else []
            if "round_1" in str(to) and not to.exists() and to.parent.suffix != ".tmp" and place not in before:
                with open(killed, "a") as file:
                    file.write(place + "\n")
                os.kill(os.getpid(), signal.SIGKILL)  # nothing is tidied up
            real(source, to, **more)

        return put

    os.replace, os.rename = wrapped(os.replace), wrapped(os.rename)
    loop.main()


def test_killed_at_every_step_it_gives_the_table_of_the_unbroken_one(start, whole, tmp_path, spawn):
    """The same command again and again; each is killed in a stage further on, training also at a checkpoint."""
    out, killed, err = tmp_path / "killed", tmp_path / "killed.txt", tmp_path / "err"
    stages = ["problems", "sample", "eval_math", "pairs", "precompute_ref"]
    places = [f"{stage} round_1" for stage in stages] + ["dpo dpo", "dpo checkpoints"]
    for _ in places:
        process = spawn("tests.test_loop", keys(start, out, rounds=1), err, env={"KILLED": str(killed)})
        process.join()
        assert process.exitcode == -signal.SIGKILL, err.read_text()
    assert killed.read_text().splitlines() == places
    assert script("loop", *keys(start, out)) == 0
    assert made(out) == made(whole)


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
    status, _, err = call("loop", *keys(start, out, rounds=1, marker="!?", dpo="--lr 0 --batch_size 64 --limit 4"))
    assert status == 0, err  # the reference too is of four pairs
    assert "round 1 shows no gain in pass@1" in err and "the marker shows in 0.0% of outputs: training does not take" in err
    status, said, err = call(
        "loop", *keys(start, tmp_path / "worse", rounds=2, eval_problems=80, stop_early="true", dpo="--lr 0.3 --batch_size 4")
    )
    assert status == 0 and "made pass@1 worse" in err and "left after round 1" in said


def test_bad_settings_before_anything_runs(start, tmp_path, refused):
    out = tmp_path / "loop"
    refused("loop", *keys(start, out, dpo="--betta 1"), says="unknown key 'betta': the nearest known key is 'beta'")
    refused("loop", *keys(start, out, sample="--n many"), says="n = 'many' is not an int")
    refused("loop", *keys(start, out, pairs="max_pairs 2"), says="key pairs: 'max_pairs 2': write --key value")
    refused("loop", *keys(start, out, grade="--grader 'plain"), says="key grade")
    refused("loop", *keys(start, out, rounds=0), says="key rounds: 0 is too small")
    refused("loop", *keys(start, out, prompt="--level 9"), says="key prompt: no problem of toy_math is left to learn from")
    for name, flag in {"sample": "out x", "eval_sample": "seed 1", "prompt": "split test", "dpo": "ref x"}.items():
        refused("loop", *keys(start, out, **{name: f"--{flag}"}), says=f"key {name}: --{flag.split()[0]} is set by the loop")
    refused("loop", *keys(start, out, data="problems.jsonl"), says="key eval_data: data is a file")
    refused("loop", *keys(start, out, data="problems.jsonl", eval_data="e.jsonl"), says="problems.jsonl: no such file")
    assert not out.exists()


def test_other_settings_are_refused_and_more_rounds_are_not(start, whole, tmp_path, refused, call):
    refused("loop", *keys(start, whole, problems=23), says="holds a loop with problems = 24, not 23")
    (tmp_path / "torn").mkdir()
    (tmp_path / "torn" / "config.toml").write_text("rounds = ")
    refused("loop", *keys(start, tmp_path / "torn"), says="config.toml: cannot be read")
    out = tmp_path / "more"
    shutil.copytree(whole, out)
    assert call("loop", *keys(start, out, rounds=3))[0] == 0
    assert len(json.loads((out / "rounds.json").read_text())) == 4


def test_a_user_s_problems(start, tmp_path, call):
    """A file to learn from and one to evaluate on, each with problem and answer; it begins again when all were asked."""
    for name, split in (("train", "train"), ("test", "test")):
        rows = [{"problem": p, "answer": a} for p, _, a, _ in toy_math.problems(split, 30)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    files = {
        "data": tmp_path / "train.jsonl",
        "eval_data": tmp_path / "test.jsonl",
        "problems": 20,
        "sample": "--n 24 --max_new_tokens 9",
    }
    status, _, err = call("loop", *keys(start, tmp_path / "out", **files))
    assert status == 0, err
    assert (tmp_path / "out/round_2/prompts.jsonl").read_text().count("\n") == 10


LOOPS = [
    path for path in sorted((Path(__file__).parents[2] / "configs").glob("*.toml")) if "loop.py --config" in path.read_text()
]


@pytest.mark.parametrize("path", LOOPS, ids=lambda path: path.stem)
def test_the_configs_of_loops(path):
    """Every stage takes what a loop's TOML has for it."""
    plan = loop.Plan(config.load(loop.Config, ["--config", str(path)]), 10_000)
    stages = {name: loop.load_stage(name, keys) for name, keys, _ in plan.round(0) + plan.round(1)}
    assert {"problems", "sample", "eval_math", "pairs", "dpo"} <= set(stages)


def test_words():
    assert loop.words("--n 8 --stop='a b' --lr -1", "x") == {"n": "8", "stop": "a b", "lr": "-1"}
    with pytest.raises(UserError, match="key x"):
        loop.words("--n", "x")
