"""The loop: its table and files, a kill at every step, what it warns of, and what it refuses."""

import json
import os
import re
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
from tests.runtime.test_served import Server

pytestmark = pytest.mark.slow


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
    settings |= {"sample": "--n 6 --max_new_tokens 30", "eval_sample": "--n=4", "pairs": "--max_pairs 2", "device": "cpu"}
    settings |= {"grade": "--grader plain", "dpo": "--beta 0.5 --lr 1e-3 --batch_size 16 --save_every 1"}
    return [f"--{name}={value}" for name, value in {**settings, **more}.items()]


@pytest.fixture(scope="module")
def whole(start, tmp_path_factory) -> Path:
    """The folder of a loop that nothing interrupted."""
    out = tmp_path_factory.mktemp("loop") / "whole"
    assert script("selftrain.loop", *keys(start, out)) == 0
    return out


def made(folder: Path) -> dict[str, bytes]:
    """What a loop makes, without what depends on a clock or holds the folder's name."""
    kinds = ("rounds.*", "*.jsonl", "round_*/*.jsonl", "round_*/pairs.json", "round_*/dpo/model/*.safetensors")
    return {str(path.relative_to(folder)): path.read_bytes() for kind in kinds for path in folder.glob(kind)}


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_table_and_files(whole, start):
    rows = json.loads((whole / "rounds.json").read_text())
    assert [r["round"] for r in rows] == [0, 1, 2] and {r["k"] for r in rows} == {4}
    for r in (1, 2):
        pairs, graded = lines(whole / f"round_{r}/pairs.jsonl"), lines(whole / f"round_{r}/graded.jsonl")
        assert rows[r]["pairs"] == len(pairs) > 0
        assert len(graded) == 24 and all(len(g["grades"]) == 6 for g in graded)
        right = {(g["prompt"], c) for g in graded for c, good in zip(g["completions"], g["grades"], strict=True) if good}
        assert all((p["prompt"], p["chosen"]) in right and (p["prompt"], p["rejected"]) not in right for p in pairs)
        now, before = (loop.means(whole / f"round_{i}/eval_graded.jsonl") for i in (r, r - 1))
        assert rows[r]["gain"] == pytest.approx(sum(now) / 16 - sum(before) / 16)
        assert rows[r]["pass_at_1"] == pytest.approx(sum(now) / 16)
    first, second = ({p["prompt"] for p in lines(whole / f"round_{r}/prompts.jsonl")} for r in (1, 2))
    assert not first & second, "each round takes the next problems"
    assert (whole / "rounds.md").read_text().count("\n") == 5
    assert f'init_from = "{start}"' in (whole / "config.toml").read_text()


def main() -> None:
    """The loop in a process of its own, killed before a step puts its first file or folder in place, once for each step."""
    killed = Path(os.environ["KILLED"])

    def wrapped(real):
        def put(source, to, **more):
            to = Path(to)
            place = f"{sys.argv[0]} {to.parent.name}"
            before = killed.read_text().splitlines() if killed.exists() else []
            if "round_1" in str(to) and not to.exists() and to.parent.suffix != ".tmp" and place not in before:
                with open(killed, "a") as file:
                    file.write(place + "\n")
                os.kill(os.getpid(), signal.SIGKILL)  # nothing is tidied up
            real(source, to, **more)

        return put

    os.replace, os.rename = wrapped(os.replace), wrapped(os.rename)
    loop.main()


def test_killed_at_every_step_it_ends_in_the_same_table(start, whole, tmp_path, spawn):
    """The same command again and again; it is killed one step later each time, in training also at a checkpoint."""
    out, killed, err = tmp_path / "killed", tmp_path / "killed.txt", tmp_path / "err"
    stages = ["selftrain.problems", "sample", "selftrain.eval_math", "selftrain.pairs", "dpo"]
    places = [f"{stage} round_1" for stage in stages] + ["dpo dpo", "dpo checkpoints"]
    for _ in places:
        process = spawn("tests.selftrain.test_loop", keys(start, out, rounds=1), err, env={"KILLED": str(killed)})
        process.join()
        assert process.exitcode == -signal.SIGKILL, err.read_text()
    assert killed.read_text().splitlines() == places
    assert script("selftrain.loop", *keys(start, out)) == 0
    assert made(out) == made(whole)


def test_marker_shows_when_training_takes(start, tmp_path, call):
    out = tmp_path / "marked"
    dpo = "--beta 0.1 --lr 1e-2 --batch_size 8 --epochs 4 --sft_weight 1"
    status, said, _ = call("selftrain.loop", *keys(start, out, rounds=1, marker="!", dpo=dpo))
    assert status == 0 and "marker" in said
    before, after = json.loads((out / "rounds.json").read_text())
    assert before["marker"] < 0.05 < 0.3 < after["marker"]


def test_warnings(start, tmp_path, call):
    still = keys(start, tmp_path / "still", rounds=1, marker="!?", dpo="--lr 0 --batch_size 64 --limit 4")
    status, _, err = call("selftrain.loop", *still)
    assert status == 0, err  # --limit goes to the reference too
    assert "round 1 shows no gain in pass@1" in err and "the marker shows in 0.0% of outputs: training does not take" in err
    worse = {"eval_problems": 80, "rounds": 1, "dpo": "--lr 0.3 --batch_size 4"}
    status, _, err = call("selftrain.loop", *keys(start, tmp_path / "worse", **worse))
    assert status == 0 and "made pass@1 worse" in err


def test_bad_settings_are_refused_before_anything_runs(start, tmp_path, refused):
    out = tmp_path / "loop"
    for bad, says in (
        ({"dpo": "--betta 1"}, "unknown key 'betta': the nearest known key is 'beta'"),
        ({"sample": "--n many"}, "n = 'many' is not an int"),
        ({"pairs": "max_pairs 2"}, "key pairs: 'max_pairs 2': write --key value"),
        ({"grade": "--grader 'plain"}, "key grade"),
        ({"prompt": "--level 9"}, "toy_math: no problem is left"),
        ({"sample": "--out x"}, "key sample: --out is set by the loop"),
        ({"eval_sample": "--seed 1"}, "key eval_sample: --seed is set by the loop"),
        ({"prompt": "--split test"}, "key prompt: --split is set by the loop"),
        ({"dpo": "--ref x"}, "key dpo: --ref is set by the loop"),
        ({"dpo": "--lora_rank 4 --config x"}, "key dpo: --config is set by the loop"),
        ({"data": "problems.jsonl"}, "key eval_data: data is a file"),
        ({"data": "problems.jsonl", "eval_data": "e.jsonl"}, "e.jsonl: no such file"),
    ):
        refused("selftrain.loop", *keys(start, out, **bad), says=says)
    assert not out.exists()


def test_other_settings_are_refused_and_more_rounds_are_not(start, whole, tmp_path, refused, call):
    refused("selftrain.loop", *keys(start, whole, problems=23), says="holds a loop with problems = 24, not 23")
    (tmp_path / "torn").mkdir()
    (tmp_path / "torn" / "config.toml").write_text("rounds = ")
    refused("selftrain.loop", *keys(start, tmp_path / "torn"), says="config.toml: not valid TOML")
    out = tmp_path / "more"
    shutil.copytree(whole, out)
    assert call("selftrain.loop", *keys(start, out, rounds=3))[0] == 0
    assert len(json.loads((out / "rounds.json").read_text())) == 4


@pytest.mark.parametrize("name", ["rounds.md", "rounds.json", "eval_prompts.jsonl", "config.toml"])
def test_files_that_no_loop_wrote_are_kept(name, start, tmp_path, refused):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / name).write_text('data = "mine"\n')
    refused("selftrain.loop", *keys(start, tmp_path / "out"), says=f"{name} is there, and no run wrote it: move it away")
    assert [(p.name, p.read_text()) for p in (tmp_path / "out").iterdir()] == [(name, 'data = "mine"\n')]


def test_a_user_s_problems_from_a_folder_of_theirs(start, tmp_path, call, monkeypatch):
    """After the last problem a round goes on with the first. The commands that it prints are right where the user stands."""
    monkeypatch.chdir(tmp_path)
    for split in ("train", "test"):
        rows = [{"problem": p, "answer": a} for p, _, a, _ in toy_math.problems(split, 30)]
        Path(f"{split}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    files = {"data": "train.jsonl", "eval_data": "test.jsonl", "problems": 20, "sample": "--n 24 --max_new_tokens 9"}
    status, said, err = call("selftrain.loop", *keys(start, "out", **files))
    assert status == 0, err
    first, second = ([p["prompt"] for p in lines(Path(f"out/round_{r}/prompts.jsonl"))] for r in (1, 2))
    assert len(second) == 20 and second[10:] == first[:10] and not set(second[:10]) & set(first)
    commands = re.findall(r"^\$ python (-m selftrain\.\w+|\S+\.py) --", said, re.M)
    assert len(commands) == said.count("$ python") > 15
    assert all(c.startswith("-m ") or Path(c).resolve() == Path(loop.__file__).parents[1] / Path(c).name for c in commands)


def test_samples_of_a_server_that_is_asked_for_each_round_s_model(start, tmp_path, call, refused, monkeypatch):
    """By its folder. A name that stays the same is warned of; a server that does not have the new model ends the loop."""

    class Sums(Server):
        def text(self, body: dict, k: int) -> str:
            total = eval(re.findall(r"Question: ([\d+-]+)", body["prompt"])[-1])
            return f"####{total + k % 2}"  # every second answer is wrong

    monkeypatch.chdir(tmp_path)
    with Sums() as server:
        served = {"rounds": 1, "sample": f"--n 4 --max_new_tokens 30 --server {server.url}"}
        status, _, err = call("selftrain.loop", *keys(start, "out", **served))
        assert status == 0 and "the server must have" not in err, err
        assert {body["model"] for _, body, _ in server.asked} == {str(start), "out/round_1/dpo/model"}
        assert json.loads(Path("out/rounds.json").read_text())[1]["pairs"] == 24
        named = served | {"sample": f"{served['sample']} --server_model wise"}
        status, _, err = call("selftrain.loop", *keys(start, "named", **named))
        assert status == 0 and "round 1: the server must have named/round_1/dpo/model under the name wise by now" in err
        evaluated = next(p for p in lines(Path("out/eval_prompts.jsonl")))["prompt"]
        asked = [body for _, body, _ in server.asked if body["prompt"] == evaluated]
        assert len(asked) == 4 and {body["n"] for body in asked} == {4}
        server.plan = {evaluated: [None, (404, {"error": "no such model"})]}
        refused("selftrain.loop", *keys(start, "gone", **served), says="no such model")
        assert (tmp_path / "gone/round_1/dpo/model").exists() and not (tmp_path / "gone/round_1/eval.json").exists()
        assert call("selftrain.loop", *keys(start, "gone", **served))[0] == 0
    assert json.loads(Path("gone/rounds.json").read_text())[1]["pairs"] == 24


def test_a_reward_takes_the_place_of_grades(tmp_path, call, refused, monkeypatch):
    """A model that hardly knows its words learns those that a rule likes."""
    monkeypatch.chdir(tmp_path)
    small = {"init_from": "scratch", "tokenizer": "reviews", "n_layer": 1, "n_head": 2, "n_embd": 32, "block_size": 32}
    keys = {**small, "data": "reviews", "limit": 64, "val_limit": 8, "max_steps": 40, "lr": 1e-2, "eval_every": 0, "samples": 0}
    assert script("sft", *flags(**keys, out_dir="sft")) == 0
    Path("r.py").write_text("def rate(prompt, completion): return completion.count('e')")
    Path("p.jsonl").write_text('{"prompt": " the cast was"}\n{"prompt": " the plot was"}\n' * 20)
    keys = {"init_from": "sft/model", "reward": "r.py:rate", "data": "p.jsonl", "eval_data": "p.jsonl", "eval_problems": 8}
    keys |= {"sample": "--n 4 --max_new_tokens 8", "eval_sample": "--n 8 --max_new_tokens 8", "rounds": 2, "device": "cpu"}
    keys |= {"dpo": "--beta 0.3 --lr 1e-3 --warmup 3 --batch_size 32 --epochs 2"}
    status, said, err = call("selftrain.loop", *flags(**keys, out_dir="out"))
    assert status == 0, err
    rows = json.loads(Path("out/rounds.json").read_text())
    assert [row["reward"] for row in rows] == sorted(row["reward"] for row in rows) and rows[0]["kl"] == 0 < rows[1]["kl"]
    assert rows[2]["gain"] == pytest.approx(rows[2]["reward"] - rows[1]["reward"]) and rows[1]["pairs"] > 100
    assert "| gain in reward |" in Path("out/rounds.md").read_text() and "pass@1" not in said
    for name in ("out/rounds.json", "out/round_2/eval.json"):
        Path(name).unlink()
    assert call("selftrain.loop", *flags(**keys, out_dir="out"))[0] == 0
    assert json.loads(Path("out/rounds.json").read_text()) == rows
    for bad, says in (
        ({"grade": "--grader plain"}, "key grade: it is for problems that are graded"),
        ({"eval_data": None}, "key eval_data"),
        ({"reward": "r.py:joy"}, "has no function 'joy'"),
        ({"pairs": "--max_pairs 2"}, "unknown key 'max_pairs'"),
        ({"data": "none.jsonl"}, "none.jsonl: no such file"),
        ({"eval_data": "none.jsonl"}, "key eval_data: none.jsonl: no such file"),
    ):
        refused("selftrain.loop", *flags(**keys | bad, out_dir="bad"), says=says)
    assert not Path("bad").exists(), "nothing has run before the mistake is found"


LOOPS = [
    p for p in sorted((Path(__file__).parents[2] / "configs").glob("*.toml")) if "selftrain.loop --config" in p.read_text()
]


@pytest.mark.parametrize("path", LOOPS, ids=lambda path: path.stem)
def test_the_configs_of_loops(path):
    """Every step's script takes what a loop's TOML has for it."""
    cfg = config.load(loop.Config, ["--config", str(path)])
    stages = {script: loop.load_stage(script, keys) for script, keys in loop.steps(cfg, 0) + loop.steps(cfg, 1)}
    assert {"selftrain.problems", "sample", "selftrain.eval_math", "selftrain.pairs", "dpo"} <= set(stages)


def test_words():
    assert loop.words("--n 8 --stop='a b' --lr -1", "x") == {"n": "8", "stop": "a b", "lr": "-1"}
    with pytest.raises(UserError, match="key x"):
        loop.words("--n", "x")
