"""Recipe C's loop: the model answers problems, its answers are graded and paired, DPO trains on the pairs; again, R times.

    python loop.py --config configs/toy_math_loop.toml
    python loop.py --init_from runs/sft/model --data gsm8k --rounds 2 --out_dir runs/loop \\
        --sample="--n 8 --temperature 0.8" --dpo="--beta 0.1 --lr 5e-6"

Every step is a command that one could type, and is printed before it runs:

    problems.py        the round's problems                        round_1/prompts.jsonl
    sample.py          n answers to each                           round_1/samples.jsonl
    eval_math.py       their grades                                round_1/graded.jsonl, train.json
    pairs.py           right over wrong                            round_1/pairs.jsonl, pairs.json
    precompute_ref.py  the reference: the model as it stands       round_1/ref.safetensors (not for LoRA)
    dpo.py             the next model                              round_1/dpo/model
    sample.py, eval_math.py   held-out problems                    round_1/eval_samples.jsonl, eval.json

A step whose file is there is done: killed anywhere, the same command goes on. A round of which nothing was learnt is said to be
one as soon as it ends; `rounds.md` and `rounds.json` have the figures of all.
"""

import dataclasses
import importlib
import json
import shlex
import sys
import tomllib
from dataclasses import dataclass
from pathlib import Path

import precompute_ref
from base.errors import UserError, run, warn
from base.files import write_whole
from data import math_problems
from data.jsonl import read
from losses import REFERENCE_FREE
from runtime import config, distributed
from runtime.config import REQUIRED, key
from selftrain import eval_math

OWN = {  # keys of a stage that the loop sets itself, so that each step finds the file of the one before
    "prompt": "config data data_dir split skip limit seed out",
    "sample": "config model prompts out limit overwrite seed",
    "eval_sample": "config model prompts out limit overwrite seed",
    "grade": "config samples grades marker out details plot",
    "pairs": "config samples grades marker out report seed",
    "dpo": "config init_from data out_dir overwrite ref seed",
}
FREE = {"rounds", "plot", "stop_early", "device", "out_dir"}  # keys that the same run may be gone on with in another value


@dataclass
class Config:
    """Sample, grade, pair, train and evaluate, round after round."""

    init_from: str = key(REQUIRED, "the model of round 0: a folder, or gpt2, gpt2-medium, …")
    data: str = key(REQUIRED, "problems to learn from: gsm8k, math, toy_math, or a .jsonl file of problem and answer")
    data_dir: str = key("", "folder that holds a recipe's files, instead of downloading them")
    problems: int = key(0, "problems a round, the next ones in the data each time; 0 = all of them in every round")
    eval_data: str = key("", "problems to evaluate on, a .jsonl file; empty = the test split of data")
    eval_problems: int = key(500, "use only the first so many of them, 0 = all")
    rounds: int = key(3, "rounds")
    prompt: str = key("", "flags of problems.py, for both: --few_shot --suffix --level")
    sample: str = key("--n 8", "flags of sample.py: --n --temperature --top_k --top_p --max_new_tokens --stop --batch_size")
    eval_sample: str = key("", "flags of sample.py for evaluation where they differ")
    grade: str = key("", "flags of eval_math.py: --grader --programs --program_seconds")
    pairs: str = key("", "flags of pairs.py: --max_pairs --balanced --partner --shuffle")
    dpo: str = key("", "flags of dpo.py: --loss --beta --lr --epochs --batch_size --schedule --lora_rank …")
    marker: str = key("", "plant this text in the chosen answers, and count the outputs that show it")
    stop_early: bool = key(False, "leave after a round that made pass@1 worse beyond its interval")
    plot: bool = key(False, "draw accuracy over k, all rounds, into rounds.png")
    seed: int = key(0, "seed of sampling, pairs and training")
    device: str = key("auto", "auto, cpu, cuda, cuda:1, …")
    out_dir: str = key(REQUIRED, "folder for everything; a loop that is there is gone on with")

    def check(self) -> None:
        for name, least in {"problems": 0, "eval_problems": 0, "rounds": 1, "seed": 0}.items():
            if getattr(self, name) < least:
                raise UserError(f"key {name}: {getattr(self, name)} is too small, the least is {least}")
        if self.data not in math_problems.NAMES and not self.eval_data:
            raise UserError("key eval_data: data is a file, which has no test split: name another file to evaluate on")
        for name, own in OWN.items():
            if taken := sorted(words(getattr(self, name), name).keys() & set(own.split())):
                raise UserError(f"key {name}: --{taken[0]} is set by the loop: leave it out (--help lists the loop's own keys)")


def words(text: str, name: str) -> dict[str, str]:
    """`--n 8 --temperature=0.7` -> {"n": "8", "temperature": "0.7"}."""
    try:
        parts = [w for word in shlex.split(text) for w in (word.split("=", 1) if word.startswith("--") else [word])]
    except ValueError as error:
        raise UserError(f"key {name}: {text!r}: {error}") from None
    if len(parts) % 2 or not all(p.startswith("--") for p in parts[::2]):
        raise UserError(f"key {name}: {text!r}: write --key value --key value …")
    return {k.removeprefix("--"): v for k, v in zip(parts[::2], parts[1::2], strict=True)}


def arguments(keys: dict) -> list[str]:
    return [f"--{name}={value}" for name, value in keys.items() if value != ""]


def load_stage(name: str, keys: dict):
    """A stage's settings as the stage will read them: what is wrong with them is said before anything runs."""
    return config.load(importlib.import_module(name).Config, arguments(keys), prog=f"{name}.py")


def step(name: str, keys: dict, makes: Path, compute, alone: bool = False) -> None:
    """Print a stage's command and run it in this process, unless what it makes is there; `alone`: on rank 0 only."""
    if compute.once(makes.exists):
        return
    print(f"\n$ python {name}.py {shlex.join(arguments(keys))}", flush=True)
    sys.argv = [f"{name}.py", *arguments(keys)]
    main = importlib.import_module(name).main
    status = compute.once(main) if alone else main()
    if status:  # Ctrl-C or SIGTERM: the stage has saved and said so
        sys.exit(status)


class Plan:
    """Which command makes which file. `round(r)` gives the steps of a round, in their order; round 0 only evaluates."""

    def __init__(self, cfg: Config, total: int):
        self.cfg, self.total, self.out = cfg, total, Path(cfg.out_dir)
        seeds = {"seed": cfg.seed}
        self.sample = {"batch_size": 256, "device": cfg.device, **words(cfg.sample, "sample")}
        self.eval_sample = {**self.sample, **words(cfg.eval_sample, "eval_sample"), **seeds}
        self.prompt = {"data_dir": cfg.data_dir, **words(cfg.prompt, "prompt"), **seeds}
        self.grade = {"grades": "own", **words(cfg.grade, "grade")}
        self.pairs = {"marker": cfg.marker, **words(cfg.pairs, "pairs")}
        self.dpo = {"save_every": 100, "samples": 0, "device": cfg.device, **words(cfg.dpo, "dpo")}

    def folder(self, r: int) -> Path:
        return self.out / f"round_{r}"

    def model(self, r: int) -> str:
        return str(self.folder(r) / "dpo" / "model") if r else self.cfg.init_from

    def round(self, r: int) -> list[tuple[str, dict, Path]]:
        """(script, its keys, the file or folder that says it is done) of every step of round r."""
        cfg, at, before = self.cfg, self.folder(r), self.model(r - 1) if r else ""
        steps = []
        if r == 0:
            source = {"data": cfg.eval_data or cfg.data, "split": "test", "limit": cfg.eval_problems, **self.prompt}
            steps.append(("problems", {**source, "out": self.out / "eval_prompts.jsonl"}, self.out / "eval_prompts.jsonl"))
        else:
            skip = (r - 1) * cfg.problems % self.total  # after the last ones it begins again with the first
            source = {"data": cfg.data, "split": "train", "skip": skip, "limit": cfg.problems, **self.prompt}
            prompts, samples, graded, pairs = (at / f"{n}.jsonl" for n in ("prompts", "samples", "graded", "pairs"))
            steps.append(("problems", {**source, "out": prompts}, prompts))
            drawn = {"seed": 1000 * cfg.seed + r}  # no answer is drawn as in another round
            steps.append(("sample", {"model": before, "prompts": prompts, "out": samples, **drawn, **self.sample}, samples))
            grades = {"samples": samples, **self.grade, "details": graded, "out": at / "train.json"}
            steps.append(("eval_math", grades, at / "train.json"))
            made = {"samples": graded, "grades": "stored", **self.pairs, "report": at / "pairs.json", "out": pairs}
            steps.append(("pairs", {**made, "seed": cfg.seed}, pairs))
            train = {"init_from": before, "data": pairs}
            dpo = {**train, "out_dir": at / "dpo", "seed": cfg.seed, **self.dpo}
            ref = at / "ref.safetensors"
            asked = load_stage("dpo", {**dpo, "ref": ref})
            if asked.loss not in REFERENCE_FREE and not getattr(asked, "lora_rank", 0):
                known = {f.name for f in dataclasses.fields(precompute_ref.Config)}
                shared = {name: value for name, value in self.dpo.items() if name in known}
                steps.append(("precompute_ref", {**train, **shared, "out": ref}, ref))
                dpo["ref"] = ref
            steps.append(("dpo", dpo, at / "dpo" / "model"))
        samples, result = at / "eval_samples.jsonl", at / "eval.json"
        drawn = {"model": self.model(r), "prompts": self.out / "eval_prompts.jsonl", "out": samples}
        steps.append(("sample", {**drawn, **self.eval_sample}, samples))
        graded = {"samples": samples, **self.grade, "marker": cfg.marker, "details": at / "eval_graded.jsonl", "out": result}
        return [*steps, ("eval_math", graded, result)]


def take(cfg: Config) -> None:
    """Make the folder this loop's, or see that it is: a loop goes on with the settings that it began with."""
    path = Path(cfg.out_dir) / "config.toml"
    if path.exists():
        try:
            before = tomllib.loads(path.read_text())
        except ValueError:
            raise UserError(f"{path}: cannot be read, so this loop cannot be gone on with: name another out_dir") from None
        for name, now in dataclasses.asdict(cfg).items():
            if name not in FREE and before.get(name, now) != now:
                raise UserError(
                    f"out_dir {cfg.out_dir} holds a loop with {name} = {before[name]!r}, not {now!r}: go on with the same "
                    "settings, or name another out_dir"
                )
    write_whole(path, config.to_toml(cfg))


def shares(path: Path) -> list[float]:
    """The share of right answers, a problem, in a file of graded samples."""
    return [sum(record["grades"]) / len(record["grades"]) for _, record in read(path)]


def figures(plan: Plan, r: int) -> dict:
    """A round's line in the table; `gain` is pass@1 over the round before with the half-width of its 95% interval, problem by
    problem."""
    at = plan.folder(r)
    result = json.loads((at / "eval.json").read_text())
    row = {"round": r, "k": result["k"]}
    row |= {n: result[n] for name in ("pass_at_1", "maj", "pass") for n in (name, f"{name}_ci95")}
    if "marker" in result:
        row["marker"] = result["marker"]
    if r:
        train, pairs = (json.loads((at / f"{n}.json").read_text()) for n in ("train", "pairs"))
        row |= {"train_pass_at_1": train["pass_at_1"], "problems": train["n"]}
        row |= {name: pairs[name] for name in ("all_right", "all_wrong", "pairs")}
        now, before = (shares(plan.folder(i) / "eval_graded.jsonl") for i in (r, r - 1))
        change = [a - b for a, b in zip(now, before, strict=True)]
        mean = sum(change) / len(change)
        variance = sum((c - mean) ** 2 for c in change) / max(1, len(change) - 1)
        row |= {"gain": mean, "gain_ci95": 1.96 * (variance / len(change)) ** 0.5}
    return row


def table(rows: list[dict]) -> str:
    """The rounds as Markdown."""
    k = rows[0]["k"]
    marker = ["marker"] if "marker" in rows[0] else []
    head = ["round", "pairs", "all right", "all wrong", "train pass@1", "pass@1", f"maj@{k}", f"pass@{k}", "gain in pass@1"]
    lines = [f"| {' | '.join(head + marker)} |", "|" + "---|" * (len(head) + len(marker))]
    for row in rows:
        cells = [str(row["round"])]
        for name in ("pairs", "all_right", "all_wrong"):
            cells.append(f"{row[name]:,}" if name in row else "")
        cells.append(f"{row['train_pass_at_1']:.3f}" if "pairs" in row else "")
        for name in ("pass_at_1", "maj", "pass"):
            low, high = row[f"{name}_ci95"]
            cells.append(f"{row[name]:.3f} [{low:.3f}, {high:.3f}]")
        cells.append(f"{row['gain']:+.3f} ± {row['gain_ci95']:.3f}" if "gain" in row else "")
        cells += [f"{row['marker']:.1%}" for _ in marker]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def verdict(row: dict, cfg: Config) -> bool:
    """Say early when the loop does not work; True if this round made the model worse beyond doubt."""
    gain, doubt = row["gain"], row["gain_ci95"]
    if cfg.marker and row["marker"] < 0.01:
        warn(f"round {row['round']}: the marker shows in {row['marker']:.1%} of outputs: training does not take (lr, epochs?)")
    if row["all_wrong"] > 0.8 * row["problems"]:
        warn(f"round {row['round']}: all answers wrong in {row['all_wrong']:,} problems: too hard for this model; sample more")
    if row["all_right"] > 0.8 * row["problems"]:
        warn(f"round {row['round']}: all answers right in {row['all_right']:,} problems: too easy; raise the temperature")
    if gain < -doubt:
        warn(f"round {row['round']} made pass@1 worse: {gain:+.3f} ± {doubt:.3f} (a lower lr, a higher beta, sft_weight?)")
    elif gain <= doubt:
        warn(f"round {row['round']} shows no gain in pass@1 beyond its interval: {gain:+.3f} ± {doubt:.3f}")
    return gain < -doubt


def main() -> None:
    cfg = config.load(Config, prog="loop.py")
    compute = distributed.setup(cfg.device)
    total = compute.once(lambda: count(cfg))
    plan = Plan(cfg, total)
    for r in (0, 1):
        for name, keys, _ in plan.round(r):
            load_stage(name, keys)
    compute.once(lambda: take(cfg))

    rows: list[dict] = []
    for r in range(cfg.rounds + 1):
        for name, keys, makes in plan.round(r):
            step(name, keys, makes, compute, alone=name in ("problems", "eval_math", "pairs"))
        rows.append(compute.once(lambda r=r: figures(plan, r)))
        compute.once(lambda: write_whole(plan.out / "rounds.json", json.dumps(rows, indent=1) + "\n"))
        compute.once(lambda: write_whole(plan.out / "rounds.md", table(rows) + "\n"))
        print(f"\n{table(rows)}", flush=True)
        if r and verdict(rows[-1], cfg) and cfg.stop_early:
            print(f"left after round {r} (stop_early)")
            break
    if cfg.plot:
        results = {f"round {row['round']}": plan.folder(row["round"]) / "eval.json" for row in rows}
        read_all = {label: json.loads(path.read_text()) for label, path in results.items()}
        compute.once(lambda: eval_math.draw(read_all, str(plan.out / "rounds.png")))
    print(f"wrote {plan.out / 'rounds.md'}; the last model is {plan.model(rows[-1]['round'])}")


def count(cfg: Config) -> int:
    """How many problems there are to learn from."""
    keys = {"data": cfg.data, "split": "train", "data_dir": cfg.data_dir, "out": "unused", **words(cfg.prompt, "prompt")}
    asked = load_stage("problems", keys)
    found = math_problems.problems(asked.data, asked.split, data_dir=asked.data_dir)
    total = sum(not asked.level or p.kind.get("level") == asked.level for p in found) - asked.few_shot
    if total < 1:
        raise UserError(f"key prompt: no problem of {cfg.data} is left to learn from: see --level and --few_shot")
    return total


if __name__ == "__main__":
    run(main)
