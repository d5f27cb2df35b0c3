"""Recipe C's loop: the model answers problems, its answers are graded and paired, and DPO trains it on the pairs; then again.

    python -m selftrain.loop --config configs/toy_math_loop.toml
    python -m selftrain.loop --init_from runs/sft/model --data gsm8k --rounds 2 --out_dir runs/loop \\
        --sample="--n 8 --temperature 0.8" --dpo="--beta 0.1 --lr 5e-6"

Every step is a command of its own, and is printed before it runs:

    selftrain.problems           the round's problems                   round_1/prompts.jsonl
    sample                       n answers to each                      round_1/samples.jsonl
    selftrain.eval_math          their grades                           round_1/graded.jsonl, train.json
    selftrain.pairs              right answers over wrong ones          round_1/pairs.jsonl, pairs.json
    dpo                          the next model                         round_1/dpo/model
    sample, selftrain.eval_math  held-out problems                      round_1/eval_samples.jsonl, eval.json

With `reward` (a rule of data/rewards.py) nothing is graded: `data` and `eval_data` are files of prompts, all rounds answer the
same ones, selftrain.reward_pairs makes the pairs, and eval_reward measures the mean reward and the KL from round 0's model.

A step is done when its file is there, and every file is written whole. So the same command goes on where it was killed. After
each round a warning says if nothing was learnt. `rounds.md` and `rounds.json` have the figures of all rounds.
"""

from base.script import run

import importlib
import json
import operator
import os
import shlex
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from base.errors import UserError, warn
from base.files import read_json, write_whole
from data import math_problems, rewards
from data.jsonl import read
from runtime import config, distributed
from runtime.config import REQUIRED, key
from runtime.reference import AUTO
from selftrain import eval_math, problems

MADE = ("rounds.json", "rounds.md", "eval_prompts.jsonl")  # in its folder, beside config.toml and round_N


@dataclass
class Config:
    """Sample, grade, pair, train and evaluate, round after round."""

    init_from: str = key(REQUIRED, "the model of round 0: a folder of a model or run, or gpt2 …", model=True)
    data: str = key(REQUIRED, "problems to learn from: gsm8k, math, toy_math, or a .jsonl file of problem and answer")
    data_dir: str = key("", "folder that holds a recipe's files, instead of downloading them")
    reward: str = key("", "instead of grades: reviews, sentiment, or FILE.py:NAME, your function of prompt and completion")
    problems: int = key(0, "problems a round, the next ones in the data each time; 0 = all of them in every round", least=0)
    eval_data: str = key("", "problems to evaluate on, a .jsonl file; empty = the test split of data")
    eval_problems: int = key(500, "use only the first so many of them, 0 = all", least=0)
    rounds: int = key(3, "rounds", least=1, free=True)
    prompt: str = key("", "flags of selftrain.problems, for both: --few_shot --suffix --level")
    sample: str = key("--n 8", "flags of sample.py: --n --temperature --top_p --max_new_tokens --stop --batch_size --server …")
    eval_sample: str = key("", "flags of sample.py for evaluation where they differ; with reward those of eval_reward.py")
    grade: str = key("", "flags of selftrain.eval_math: --grader --programs --program_seconds")
    pairs: str = key("", "flags of selftrain.pairs: --max_pairs --balanced --partner --shuffle; with reward of reward_pairs")
    dpo: str = key("", "flags of dpo.py: --loss --beta --lr --epochs --batch_size --schedule --lora_rank …")
    marker: str = key("", "plant this text in the chosen answers, and count the outputs that show it")
    seed: int = key(0, "seed of sampling, pairs and training", least=0)
    device: str = key("auto", "auto, cpu, cuda, cuda:1, …", free=True)
    out_dir: str = key(REQUIRED, "folder for everything; a loop that is there is gone on with", replaces=MADE, free=True)

    def check(self) -> None:
        if (self.reward or self.data not in math_problems.NAMES) and not self.eval_data:
            raise UserError("key eval_data: data is a file, which has no test split: name another file to evaluate on")
        for name in ("prompt", "grade", "marker", "data_dir"):
            if self.reward and getattr(self, name):
                raise UserError(f"key {name}: it is for problems that are graded: leave it out, or leave out reward")


# --- the steps of a round --------------------------------------------------------------------------------------------


def words(text: str, name: str) -> dict[str, str]:
    """The flags in key `name`: `--n 8 --temperature=0.7` -> {"n": "8", "temperature": "0.7"}. UserError for anything else."""
    try:
        parts = [w for word in shlex.split(text) for w in (word.split("=", 1) if word.startswith("--") else [word])]
    except ValueError as error:
        raise UserError(f"key {name}: {text!r}: {error}") from None
    if len(parts) % 2 or not all(p.startswith("--") for p in parts[::2]):
        raise UserError(f"key {name}: {text!r}: write --key value --key value …")
    return {k.removeprefix("--"): v for k, v in zip(parts[::2], parts[1::2], strict=True)}


def step(cfg: Config, script: str, names: str, own: dict) -> tuple[str, dict]:
    """(script, its keys): the loop's defaults, then the user's flags from the keys `names`, then `own`.

    `own` connects the step to the others. Raises UserError where the user sets one of these.
    """
    defaults = {"sample": {"batch_size": 256}, "eval_reward": {}, "dpo": {"save_every": 100, "samples": 0}}
    keys = {**defaults[script], "device": cfg.device} if script in defaults else {}
    for name in names.split():
        given = words(getattr(cfg, name), name)
        if taken := sorted(given.keys() & {*own, "config", "overwrite"}):
            raise UserError(f"key {name}: --{taken[0]} is set by the loop: leave it out (--help lists the loop's own keys)")
        keys |= given
    return script, keys | own


def model_after(cfg: Config, r: int) -> str:
    """The model that round r ends with; round 0 trains nothing."""
    return f"{cfg.out_dir}/round_{r}/dpo/model" if r else cfg.init_from


def steps(cfg: Config, r: int) -> list[tuple[str, dict]]:
    """(script, its keys) of every step of round r, in order. Round 0 only evaluates."""
    if cfg.reward:
        return reward_steps(cfg, r)
    at, eval_prompts = f"{cfg.out_dir}/round_{r}", f"{cfg.out_dir}/eval_prompts.jsonl"
    samples, graded = f"{at}/eval_samples.jsonl", f"{at}/eval_graded.jsonl"
    ask = {"data_dir": cfg.data_dir, "seed": cfg.seed}
    draw = {"model": model_after(cfg, r), "prompts": eval_prompts, "seed": cfg.seed, "out": samples}
    grade = {"samples": samples, "marker": cfg.marker, "details": graded, "out": f"{at}/eval.json"}
    evaluation = [step(cfg, "sample", "sample eval_sample", draw), step(cfg, "selftrain.eval_math", "grade", grade)]
    if r == 0:
        ask |= {"data": cfg.eval_data or cfg.data, "split": "test", "skip": 0, "limit": cfg.eval_problems, "out": eval_prompts}
        return [step(cfg, "selftrain.problems", "prompt", ask), *evaluation]

    before = model_after(cfg, r - 1)
    prompts, samples, graded = (f"{at}/{name}.jsonl" for name in ("prompts", "samples", "graded"))
    ask |= {"data": cfg.data, "split": "train", "skip": (r - 1) * cfg.problems, "limit": cfg.problems, "wrap": True}
    draw = {"model": before, "prompts": prompts, "seed": 1000 * cfg.seed + r, "out": samples}  # a seed that no other round has
    grade = {"samples": samples, "marker": "", "details": graded, "out": f"{at}/train.json"}
    pair = {"samples": graded, "marker": cfg.marker, "seed": cfg.seed, "report": f"{at}/pairs.json", "out": f"{at}/pairs.jsonl"}
    return [
        step(cfg, "selftrain.problems", "prompt", ask | {"out": prompts}),
        step(cfg, "sample", "sample", draw),
        step(cfg, "selftrain.eval_math", "grade", grade),
        step(cfg, "selftrain.pairs", "pairs", pair),
        training(cfg, r),
        *evaluation,
    ]


def reward_steps(cfg: Config, r: int) -> list[tuple[str, dict]]:
    """The steps of a round in which a reward takes the place of grades."""
    at = f"{cfg.out_dir}/round_{r}"
    measure = {"model": model_after(cfg, r), "ref_model": cfg.init_from, "prompts": cfg.eval_data, "limit": cfg.eval_problems}
    measure |= {"reward": cfg.reward, "seed": cfg.seed, "details": f"{at}/eval_graded.jsonl", "out": f"{at}/eval.json"}
    evaluation = step(cfg, "eval_reward", "eval_sample", measure)
    if r == 0:
        return [evaluation]
    draw = {"model": model_after(cfg, r - 1), "prompts": cfg.data, "limit": cfg.problems, "out": f"{at}/samples.jsonl"}
    pair = {"samples": draw["out"], "reward": cfg.reward, "report": f"{at}/pairs.json", "out": f"{at}/pairs.jsonl"}
    return [
        step(cfg, "sample", "sample", draw | {"seed": 1000 * cfg.seed + r}),
        step(cfg, "selftrain.reward_pairs", "pairs", pair | {"seed": cfg.seed}),
        training(cfg, r),
        evaluation,
    ]


def training(cfg: Config, r: int) -> tuple[str, dict]:
    """DPO on a round's pairs. It makes the log-probs of the model that it starts from, or finds those that it made before."""
    at = f"{cfg.out_dir}/round_{r}"
    train = {"init_from": model_after(cfg, r - 1), "data": f"{at}/pairs.jsonl", "seed": cfg.seed, "out_dir": f"{at}/dpo"}
    script, train = step(cfg, "dpo", "dpo", train | {"ref": AUTO})
    if load_stage(script, train).lora_rank:  # an adapter's reference is the model without it
        train["ref"] = ""
    return script, train


def arguments(keys: dict) -> list[str]:
    return [f"--{name}={value}" for name, value in keys.items() if value != ""]


def load_stage(script: str, keys: dict):
    """A step's settings, as its script will read them. UserError for what is wrong with them."""
    return config.load(importlib.import_module(script).Config, arguments(keys))


def check_steps(cfg: Config) -> None:
    """Raise UserError for a wrong flag, or where no problem is left, before anything runs."""
    if cfg.reward:
        rewards.get(cfg.reward)
        for name in ("data", "eval_data"):
            if not Path(getattr(cfg, name)).is_file():
                raise UserError(f"key {name}: {getattr(cfg, name)}: no such file: with a reward it holds prompts")
    for script, keys in [*steps(cfg, 0), *steps(cfg, 1)]:
        settings = load_stage(script, keys)
        if script == "selftrain.problems":
            problems.select(settings)


def run_script(name: str, words: list[str], how: Callable = operator.call) -> None:
    """Print a script's command, to be typed where the user stands, and run it in this process. how: what calls its `main`."""
    module = importlib.import_module("data.__main__" if name == "data" else name)
    alone = Path(module.__file__).name == f"{name}.py"
    print(f"\n$ python {os.path.relpath(module.__file__) if alone else f'-m {name}'} {shlex.join(words)}", flush=True)
    sys.argv = [name, *words]
    if status := how(module.main):  # Ctrl-C or SIGTERM: the stage has saved and said so
        sys.exit(status)


def run_step(script: str, keys: dict, compute) -> None:
    """Run a step, unless what it makes is there. This room's scripts run on rank 0."""
    makes = Path(keys.get("out") or f"{keys['out_dir']}/model")
    left = makes.with_name(f"{makes.name}.part0")  # sample.py, killed when all was written, deletes it
    if compute.once(lambda: makes.exists() and not left.exists()):
        return
    run_script(script, arguments(keys), compute.once if script.startswith("selftrain.") else operator.call)


# --- what came out of it ---------------------------------------------------------------------------------------------


def take(cfg: Config) -> None:
    """Make the folder this loop's. Raises UserError if it holds a loop with other settings, or files that no loop wrote."""
    if before := config.written(cfg, MADE):
        config.check_same(cfg, before, "a loop")
    write_whole(Path(cfg.out_dir) / "config.toml", config.to_toml(cfg))


def means(path: Path) -> list[float]:
    """The share of right answers, or the mean reward, of each prompt in a file of graded samples."""
    found = (record.get("grades") or record["rewards"] for _, record in read(path))
    return [sum(values) / len(values) for values in found]


def figures(cfg: Config, r: int) -> dict:
    """A round's row of the table. `gain` is its pass@1 or mean reward less that of the round before; `gain_ci95` is the
    half-width of the 95% interval, from the differences prompt by prompt.

    Raises UserError where a file that it is made of is damaged.
    """
    at, before = (Path(cfg.out_dir) / f"round_{i}" for i in (r, r - 1))
    try:
        result, row = read_json(at / "eval.json"), {"round": r}
        if cfg.reward:
            row |= {name: result[name] for name in ("reward", "reward_stderr", "kl", "kl_stderr", "tokens")}
        else:
            row |= {"k": result["k"]}
            row |= {n: result[n] for name in ("pass_at_1", "maj", "pass") for n in (name, f"{name}_ci95")}
            row |= {"marker": result["marker"]} if "marker" in result else {}
        if r:
            pairs, train = read_json(at / "pairs.json"), read_json(at / "train.json")
            if cfg.reward:
                row |= {"train_reward": pairs["reward"], "pairs": pairs["pairs"]}
            else:
                row |= {"train_pass_at_1": train["pass_at_1"], "problems": train["n"]}
                row |= {name: pairs[name] for name in ("all_right", "all_wrong", "pairs")}
            both = zip(means(at / "eval_graded.jsonl"), means(before / "eval_graded.jsonl"), strict=True)
            change = [now - then for now, then in both]
            spread = float(np.std(change, ddof=min(1, len(change) - 1)))
            row |= {"gain": sum(change) / len(change), "gain_ci95": 1.96 * spread / len(change) ** 0.5}
        if not all(isinstance(value, int | float) for name, value in row.items() if not name.endswith("_ci95")):
            raise TypeError("a number is missing")
        table([row])
    except (KeyError, IndexError, TypeError, ValueError, ArithmeticError) as error:
        damaged = f"{at}: its *.json or *_graded.jsonl are damaged ({error!r})"
        raise UserError(f"{damaged}: delete these, they are made anew") from None
    return row


def table(rows: list[dict]) -> str:
    """The rounds as a Markdown table, with the columns that the rows have."""
    k, gain = rows[0].get("k"), "gain in reward" if "reward" in rows[0] else "gain in pass@1"
    columns = {"round": "round", "pairs": "pairs", "all_right": "all right", "all_wrong": "all wrong"}
    columns |= {"train_pass_at_1": "train pass@1", "pass_at_1": "pass@1", "maj": f"maj@{k}", "pass": f"pass@{k}"}
    columns |= {"train_reward": "train reward", "reward": "reward", "kl": "KL (nats)", "tokens": "tokens"}
    return eval_math.listed(rows, columns | {"gain": gain, "marker": "marker"})


def warn_of(row: dict, cfg: Config) -> None:
    """Warn of what went wrong in a round."""
    gain, doubt, r, what = row["gain"], row["gain_ci95"], row["round"], "the reward" if cfg.reward else "pass@1"
    if cfg.marker and row["marker"] < 0.01:
        warn(f"round {r}: the marker shows in {row['marker']:.1%} of outputs: training does not take (lr, epochs?)")
    if not cfg.reward and row["all_wrong"] > 0.8 * row["problems"]:
        warn(f"round {r}: all answers wrong in {row['all_wrong']:,} problems: too hard for this model; sample more")
    if not cfg.reward and row["all_right"] > 0.8 * row["problems"]:
        warn(f"round {r}: all answers right in {row['all_right']:,} problems: too easy; raise the temperature")
    if gain < -doubt:
        warn(f"round {r} made {what} worse: {gain:+.3f} ± {doubt:.3f} (a lower lr, a higher beta, sft_weight?)")
    elif gain <= doubt:
        warn(f"round {r} shows no gain in {what} beyond its interval: {gain:+.3f} ± {doubt:.3f}")


def main() -> None:
    cfg = config.load(Config, prog="-m selftrain.loop")
    compute = distributed.setup(cfg.device)
    compute.once(lambda: check_steps(cfg))
    compute.once(lambda: take(cfg))
    rows, out = [], Path(cfg.out_dir)
    for r in range(cfg.rounds + 1):
        for script, keys in steps(cfg, r):
            if keys.get("server_model") and keys["model"] != cfg.init_from:
                warn(f"round {r}: the server must have {keys['model']} under the name {keys['server_model']} by now")
            run_step(script, keys, compute)
        rows.append(compute.once(lambda r=r: figures(cfg, r)))
        compute.once(lambda: write_whole(out / "rounds.json", json.dumps(rows, indent=1) + "\n"))
        compute.once(lambda: write_whole(out / "rounds.md", table(rows)))
        print(f"\n{table(rows)}", flush=True)
        if r:
            warn_of(rows[-1], cfg)
    print(f"wrote {out / 'rounds.md'}; the last model is {model_after(cfg, cfg.rounds)}")


if __name__ == "__main__":
    run(main)
