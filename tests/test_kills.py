"""`kill -9` in every script that writes: the same command then gives the unbroken result, and what it reads stays as it was.
And so after a full disk.

Half of the kills come at a random time; half before a random file operation (a file opened to be written, renamed, deleted, …),
where there is most to be lost. NANOPREF_KILLS is the number of kills for each script. Kills of one of several processes are in
runtime/test_distributed.py, one at every step of the loop in selftrain/test_loop.py.
"""

import importlib
import json
import os
import random
import shutil
import signal
import sys
import time
from pathlib import Path

import pytest

from tests.conftest import SCRATCH, contents, flags, metrics, script
from tests.judge.server import Server, responses

pytestmark = pytest.mark.slow
KILLS = int(os.environ.get("NANOPREF_KILLS", "1"))
SEED = int(os.environ.get("NANOPREF_SEED", "0"))
OPERATIONS = ("os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.truncate", "os.link", "os.symlink")  # audit events

TRAIN = {"data": "IN/sft.jsonl", "val_data": "IN/val_sft.jsonl", "out_dir": "OUT/run", "batch_size": 10, "lr": 1e-3}
TRAIN |= {"save_every": 2, "eval_every": 3, "dropout": 0.1, "max_steps": 12}
DPO = {**TRAIN, "init_from": "IN/model", "data": "IN/pairs.jsonl", "val_data": "IN/val_pairs.jsonl"}
GRADED, RATED = {"samples": "IN/graded.jsonl"}, {"reward": "reviews", "temperature": 1, "report": "OUT/new/r.json"}
TWO = {"out": "OUT/new/r.json", "details": "OUT/new/d.jsonl"}
LOOP = {"sample": "--n 6 --max_new_tokens 30", "eval_sample": "--n=4", "pairs": "--max_pairs 2", "grade": "--grader plain"}
LOOP |= {"data": "toy_math", "problems": 24, "eval_problems": 16, "rounds": 1, "out_dir": "OUT/loop"}
LOOP |= {"dpo": "--beta 0.5 --lr 1e-3 --batch_size 16 --save_every 1", "init_from": "IN/sums/model"}
COMMANDS = {  # name -> script, its keys; IN and OUT are folders
    "sft": ("sft", {**SCRATCH, **TRAIN, "row_len": 200}),
    "sft, anew": ("sft", {**SCRATCH, **TRAIN, "overwrite": "true"}),
    "sft, in the folder of its data": ("sft", {**TRAIN, "init_from": "IN/model", "data": "OUT/run/sft.jsonl"}),
    "sft, again": ("sft", {**SCRATCH, **TRAIN}),
    "dpo": ("dpo", {**DPO, "ref": "IN/ref.safetensors"}),
    "dpo, LoRA": ("dpo", {**DPO, "init_from": "IN/lora/adapter", "lora_rank": 4}),
    "precompute_ref": ("precompute_ref", {"init_from": "IN/model", "data": "IN/pairs.jsonl", "out": "OUT/new/r.safetensors"}),
    "sample": ("sample", {"model": "IN/model", "prompts": "IN/pairs.jsonl", "out": "OUT/new/s.jsonl", "n": 2, "batch_size": 4}),
    "eval_mcq": ("eval_mcq", {"model": "IN/model", "data": "IN/mcq.jsonl", **TWO}),
    "eval_reward": ("eval_reward", {"model": "IN/run/model", "ref": "IN/ref.safetensors", "data": "IN/pairs.jsonl", **TWO}),
    "eval_winrate": ("eval_winrate", {"responses": "IN/r.jsonl", "judge": "", "judge_model": "m", "workers": 1, **TWO}),
    "selftrain.problems": ("selftrain.problems", {"data": "toy_math", "limit": 200, "out": "OUT/new/p.jsonl"}),
    "selftrain.eval_math": ("selftrain.eval_math", {**GRADED, **TWO, "plot": "OUT/p.png"}),
    "selftrain.pairs": ("selftrain.pairs", {**GRADED, "out": "OUT/new/p.jsonl", "report": "OUT/new/p.json"}),
    "selftrain.reward_pairs": ("selftrain.reward_pairs", {**GRADED, **RATED, "out": "OUT/new/p.jsonl"}),
    "selftrain.loop": ("selftrain.loop", LOOP),
    "report.plot": ("report.plot", {"": "IN/run", "out": "OUT/p.png"}),
    "report.page": ("report.page", {"": "IN/run", "out": "OUT/p.html"}),
    "report.tables": ("report.tables", {"": "IN/run", "out": "OUT/t.md", "png": "OUT/t.png"}),
    "data": ("data.__main__", {"data": "IN/pairs.jsonl", "view": "preference", "out": "OUT/new/d.jsonl"}),
    "sample, again": ("sample", {"model": "IN/model", "prompts": "IN/pairs.jsonl", "out": "OUT/s.jsonl", "max_new_tokens": 9}),
    "tools.export": ("tools.export", {"model": "IN/run/checkpoints/step_12", "out": "OUT/new/model"}),
    "tools.convert_openai, again": ("tools.convert_openai", {"folder": "IN/openai", "out": "OUT/new/model"}),
    "tools.convert_openai": ("tools.convert_openai", {"folder": "IN/openai", "out": "OUT/new/model"}),
}


@pytest.fixture(scope="module")
def inputs(files, sft_run, reference, tmp_path_factory) -> Path:
    """A folder with all that the commands read."""
    here = tmp_path_factory.mktemp("kills") / "in"
    shutil.copytree(sft_run, here / "run")
    shutil.copytree(sft_run / "model", here / "model")
    for name, path in files.items():
        shutil.copyfile(path, here / f"{name}.jsonl")
    shutil.copyfile(reference, here / "ref.safetensors")
    shutil.copytree(Path(__file__).parent / "tools/fixture", here / "openai")
    responses(here / "r.jsonl", 12, 7)
    rows = [{"prompt": f"{i}", "answer": "1", "completions": ["1", "2"], "grades": [i > 2, False]} for i in range(9)]
    (here / "graded.jsonl").write_text("".join(json.dumps({**row, "pred": ["1", "2"]}) + "\n" for row in rows))
    lora = {"init_from": here / "model", "out_dir": here / "lora", "lora_rank": 4, "max_steps": 2, "batch_size": 10}
    sums = {
        **SCRATCH,
        "tokenizer": "toy_math",
        "data": "toy_math",
        "limit": 64,
        "val_limit": 8,
        "batch_size": 16,
        "max_steps": 60,
    }
    for keys in ({**TRAIN, **lora}, {**sums, "lr": 1e-2, "eval_every": 0, "samples": 0, "out_dir": here / "sums"}):
        assert script("sft", *flags(**{k: str(v).replace("IN", str(here)) for k, v in keys.items()})) == 0
    return here


def main() -> int | None:
    """SCRIPT, killed before its file operation number AT. How many there were goes to the file COUNT."""
    number = 0

    def watch(event: str, args: tuple) -> None:
        nonlocal number
        written = event == "open" and isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR)
        if written or event in OPERATIONS:
            number += 1
            if number == int(os.environ["AT"]):
                os.kill(os.getpid(), signal.SIGKILL)

    module = importlib.import_module(os.environ["SCRIPT"])
    sys.addaudithook(watch)
    status = module.main()
    Path(os.environ["COUNT"]).write_text(str(number))
    return status


def found(out: Path) -> dict[str, object]:
    """What a command has left, without what a clock decides; of checkpoints the names."""
    made: dict[str, object] = contents(out)
    for name in made:
        if name.endswith("metrics.jsonl"):
            made[name] = metrics((out / name).parent)
        elif name.endswith(".cache.jsonl"):  # a line that a full disk has cut stays there, and is skipped
            made[name] = [line for line in (out / name).read_bytes().splitlines() if line.endswith(b"}")]
        elif "checkpoints" in name:
            made[name] = None
    return made


@pytest.mark.parametrize("name", COMMANDS)
def test_the_same_command_goes_on_after_kills_and_a_full_disk(name, inputs, spawn, tmp_path):
    module, keys = COMMANDS[name]
    out, err, count = tmp_path / "out", tmp_path / "err", tmp_path / "count"
    rng, before = random.Random(f"{SEED} {name}"), contents(inputs)

    def prepare() -> None:
        shutil.rmtree(out, ignore_errors=True)
        out.mkdir()
        (out / "users.txt").write_text("mine")
        if name.endswith("again") and (tmp_path / "done").exists():
            shutil.copytree(tmp_path / "done", out, dirs_exist_ok=True)
        if "folder of its data" in name:
            (out / "run").mkdir()
            shutil.copyfile(inputs / "sft.jsonl", out / "run/sft.jsonl")

    with Server() as server:
        server.pause = 0.01
        texts = {k: str(v).replace("IN/", f"{inputs}/").replace("OUT/", f"{out}/") for k, v in keys.items()}
        texts |= {"judge": server.url} if "judge" in keys else {}
        args = [*texts.pop("", "").split(), *(f"--{k}={v}" for k, v in texts.items())]

        def start(at: int = 0, limit: int = 0):
            return spawn("tests.test_kills", args, err, limit, env={"SCRIPT": module, "AT": str(at), "COUNT": str(count)})

        for _ in range(2):  # the first has more to import
            prepare()
            begin = time.monotonic()
            process = start()
            process.join()
            seconds = time.monotonic() - begin
            assert process.exitcode == 0, err.read_text()
            shutil.copytree(out, tmp_path / "done", dirs_exist_ok=True)
        wanted, operations = found(out), int(count.read_text())

        prepare()  # a full disk, for which a limit on the size of files stands
        sizes = {path: len(content) for path, content in contents(tmp_path / "done").items() if path != "users.txt"}
        limit = max(size for path, size in sizes.items() if "checkpoints" not in path) // 2
        process = start(limit=limit)
        process.join(120)
        assert process.exitcode == 2, err.read_text()
        assert err.read_text().splitlines()[-1].startswith("error: no space left on the disk"), err.read_text()
        assert contents(inputs) == before and not [path for path in contents(out) if ".nanopref-" in path]
        process = start()
        process.join(120)
        assert process.exitcode == 0 and found(out) == wanted, err.read_text()

        kills = 0
        while kills < KILLS:
            prepare()
            said = []
            for _ in range(rng.choice((1, 1, 2))):
                by_time = rng.random() < 0.5
                at, moment = (0, rng.uniform(0, seconds)) if by_time else (rng.randint(1, operations), 60)
                said.append(f"after {moment:.2f} s of {seconds:.2f}" if by_time else f"before operation {at} of {operations}")
                process = start(at)
                process.join(moment)
                process.kill()
                process.join()
                kills += process.exitcode == -signal.SIGKILL
            left = sorted(contents(out))
            assert contents(inputs) == before, (SEED, said)
            process = start()
            process.join(120)
            assert process.exitcode == 0, (SEED, said, left, err.read_text())
            now = found(out)
            assert now.keys() == wanted.keys(), (SEED, said, left)
            assert now == wanted, (SEED, said, left, [k for k in now if now[k] != wanted[k]])
            assert contents(inputs) == before, (SEED, said)
        print(f"{name}: {kills} kills, seed {SEED}; {operations} file operations in {seconds:.1f} s")
