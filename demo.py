"""`make demo`: what DPO gains and what it pays, against the best that is possible. From scratch, on a CPU, without a network.

A small model learns to write reviews of films (data/reviews.py); their reward is how sure a reader can be of a good mood. It
writes four reviews a prompt, each two of which make a pair: the better one wins more often (Bradley and Terry). DPO learns
from the pairs at several strengths. What each policy gains in reward, and how far it goes from the SFT model for it (KL), is
measured on reviews that it writes. Beside it: the limit that no method can pass, the best of four samples, SFT on the chosen
reviews, and DPO with the log-probs of the wrong reference. Each command is printed before it runs.
"""

from base.script import run

import json
import math
import os
import shutil
import time
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import torch

from base.errors import UserError, warn
from base.files import read_json, write_whole
from data import reviews
from data.jsonl import read
from report import page
from report.plot import NEUTRAL, dress, figure, look, save
from runtime import config
from runtime.config import key
from selftrain.loop import run_script

MARK = ".demo"  # tells a folder in which `MADE` may be deleted from one of the user's
MADE = ("sft", "chosen", "dpo", "wrong", "prompts.jsonl", "eval_prompts.jsonl", "samples.jsonl", "pairs.jsonl")
MADE += ("chosen.jsonl", "ref.safetensors", "wrong_ref.safetensors", "results.json", "demo.png", "report.html")

BETAS = (5, 2, 1, 0.5, 0.2)
TEMPERATURE = 0.2  # of the labels: DPO at strength beta looks for the limit at b = beta * TEMPERATURE
LEAST_ESS = 20  # points of the limit that rest on fewer samples a prompt are not drawn
FAR = 2.0  # nats of KL: farther from the reference a policy is called over-optimised
SFT, CHOSEN, BEST, DPO, WRONG = "SFT", "SFT on chosen", "best of 4", "DPO", "DPO, wrong reference"
CURVES = ((DPO, 1, "-"), (DPO, 0.2, "--"), (WRONG, 1, "-"))  # drawn over the number of training steps


@dataclass
class Config:
    """The frontier of reward and KL of a small model: SFT, samples, pairs, reference, DPO, evaluation, a picture."""

    out_dir: str = key("runs/demo", "folder for everything; what an earlier demo left there is deleted")
    seed: int = key(0, "seed of weights, samples, labels and data order", least=0)
    sft_steps: int = key(400, "steps of SFT", least=1)
    dpo_steps: int = key(240, "steps of DPO", least=8)
    prompts: int = key(3000, "prompts that the model answers for pairs", least=1)
    n: int = key(128, "reviews of each of 16 prompts that a policy is measured by", least=4)


def here(name: str) -> str:
    """A file of this project, by its path from where the user stands."""
    return os.path.relpath(Path(__file__).parent / name)


def step(name: str, **keys: object) -> None:
    """Print a command and run it in this process."""
    run_script(name, [word for k, v in keys.items() for word in (f"--{k}", str(v))])


def write_lines(path: Path, records: list[dict], what: str) -> None:
    write_whole(path, "".join(json.dumps(record) + "\n" for record in records))
    print(f"\nwrote {path}: {len(records):,} lines, {what}")


class Demo:
    """The commands with what they have in common."""

    def __init__(self, cfg: Config):
        self.cfg, self.out = cfg, Path(cfg.out_dir)
        self.model = self.out / "sft" / "model"

    def prepare(self) -> None:
        """SFT, the model's own reviews, pairs, and the log-probs of both references."""
        cfg, out = self.cfg, self.out
        step("sft", config=here("configs/reviews_sft.toml"), max_steps=cfg.sft_steps, seed=cfg.seed, out_dir=out / "sft")
        prompts, samples, pairs = (out / f"{name}.jsonl" for name in ("prompts", "samples", "pairs"))
        step("data", data="reviews", split="train", view="sft", limit=cfg.prompts, out=prompts)
        how = {"n": 4, "max_new_tokens": 32, "batch_size": 512, "seed": cfg.seed}
        step("sample", model=self.model, prompts=prompts, **how, out=samples)
        how = {"reward": "reviews", "temperature": TEMPERATURE, "seed": cfg.seed}
        step("selftrain.reward_pairs", samples=samples, **how, out=pairs)
        rows = [record for _, record in read(pairs)]
        chosen = [{"prompt": row["prompt"], "completion": row["completions"][a]} for row in rows for a, _ in row["pairs"]]
        write_lines(out / "chosen.jsonl", chosen, "the chosen review of each pair")
        step("precompute_ref", init_from=self.model, data=pairs, out=out / "ref.safetensors")
        # the failure of the HellaSwag source, on purpose: the reference is not the model that DPO starts from
        untrained = {"init_from": "scratch", "tokenizer": "reviews", "n_layer": 2, "n_head": 2, "n_embd": 64, "block_size": 64}
        step("precompute_ref", **untrained, seed=cfg.seed, data=pairs, out=out / "wrong_ref.safetensors")
        asked = sorted({prompt for prompt, _ in reviews.reviews("test", 1000)})
        write_lines(out / "eval_prompts.jsonl", [{"prompt": prompt} for prompt in asked], "each beginning that reviews have")

    def folder(self, name: str, beta: float, steps: int) -> Path:
        """Where a run of DPO is."""
        return self.out / ("wrong" if name == WRONG else "dpo") / f"beta_{beta}_steps_{steps}"

    def chosen(self) -> Path:
        """More SFT, on the chosen reviews."""
        keys = {"config": here("configs/reviews_sft.toml"), "init_from": self.model, "seed": self.cfg.seed + 1, "warmup": 15}
        keys |= {"n_layer": 0, "n_head": 0, "n_embd": 0, "block_size": 0, "lr": 1e-3, "min_lr": 0}
        step("sft", **keys, data=self.out / "chosen.jsonl", max_steps=self.cfg.dpo_steps, out_dir=self.out / "chosen")
        return self.out / "chosen"

    def dpo(self, name: str, beta: float, steps: int) -> Path:
        """DPO for so many steps, with the right or the wrong reference."""
        folder = self.folder(name, beta, steps)
        ref = {"ref": self.out / "ref.safetensors"}
        if name == WRONG:
            ref = {"ref": self.out / "wrong_ref.safetensors", "allow_ref_mismatch": "true"}
        keys = {"config": here("configs/reviews_dpo.toml"), "init_from": self.model, "data": self.out / "pairs.jsonl"}
        step("dpo", **keys, beta=beta, **ref, max_steps=steps, seed=self.cfg.seed, out_dir=folder)
        return folder

    def measure(self, folder: Path, **more: object) -> dict:
        """Reward and KL of a run's model: the result of eval_reward.py, which lies in the run's folder."""
        result = folder / "reward.json"
        keys = {"model": folder / "model", "ref_model": self.model, "prompts": self.out / "eval_prompts.jsonl"}
        keys |= {"reward": "reviews", "n": self.cfg.n, "max_new_tokens": 32, "batch_size": 1024, "seed": self.cfg.seed + 1000}
        step("eval_reward", **keys, **more, out=result)
        return read_json(result)

    def write_page(self) -> None:
        """A page of the runs that the table is made of, with their results."""
        runs = [self.out / "sft", self.out / "chosen"]
        runs += [self.folder(name, b, self.cfg.dpo_steps) for name, b in [*((DPO, b) for b in BETAS), (WRONG, 1)]]
        paths, labels = [str(path) for path in runs], ",".join(str(path.relative_to(self.out)) for path in runs)
        print(f"$ python -m report.page {' '.join(paths)} --labels {labels} --out {self.out}/report.html")
        page.write(paths, self.out / "report.html", labels)


def policy(name: str, beta: float | None, result: dict) -> dict:
    """An entry of results.json."""
    return {"name": name, "beta": beta, **{k: result[k] for k in ("reward", "reward_stderr", "kl", "kl_stderr")}}


def measured(cfg: Config) -> dict:
    """Run everything: what results.json holds."""
    demo = Demo(cfg)
    demo.prepare()
    first = demo.measure(demo.out / "sft", optimum=4 * cfg.n)
    best = next(entry for entry in first["best_of"] if entry["k"] == 4)
    policies = [policy(SFT, None, first), policy(CHOSEN, None, demo.measure(demo.chosen())), policy(BEST, None, best)]
    policies += [policy(DPO, beta, demo.measure(demo.dpo(DPO, beta, cfg.dpo_steps))) for beta in BETAS]
    policies.append(policy(WRONG, 1, demo.measure(demo.dpo(WRONG, 1, cfg.dpo_steps))))
    curves = []
    for name, beta, _ in CURVES:
        curves.append({**policy(name, beta, first), "steps": 0})
        for steps in (cfg.dpo_steps // 8, cfg.dpo_steps // 4, cfg.dpo_steps // 2):
            curves.append({**policy(name, beta, demo.measure(demo.dpo(name, beta, steps))), "steps": steps})
        last = next(p for p in policies if p["name"] == name and p["beta"] == beta)
        curves.append({**last, "steps": cfg.dpo_steps})
    return {"seed": cfg.seed, "policies": policies, "limit": first["limit"], "steps": curves}


# --- what came out ---------------------------------------------------------------------------------------------------


def drawn(limit: list[dict]) -> list[dict]:
    """The points of the limit that rest on enough samples."""
    return [point for point in limit if point["ess"] >= LEAST_ESS]


def limit_at(kl: float, limit: list[dict]) -> float | None:
    """The largest reward at this KL, between two points of the limit; None where no two of them enclose it."""
    for a, b in pairwise(drawn(limit)):
        if a["kl"] <= kl <= b["kl"]:
            return a["reward"] + (b["reward"] - a["reward"]) * (kl - a["kl"]) / (b["kl"] - a["kl"])
    return None


def findings(results: dict) -> dict[str, float]:
    """What the picture is to show. gap: how far DPO's policies under FAR nats are below the limit, at most; lead: how far the
    best of them is above SFT on chosen; far: how many times the right reference's KL the wrong one has, at the same beta."""
    near = [p for p in results["policies"] if p["name"] == DPO and p["kl"] < FAR]
    chosen, wrong = (next(p for p in results["policies"] if p["name"] == name) for name in (CHOSEN, WRONG))
    right = next(p for p in results["policies"] if p["name"] == DPO and p["beta"] == wrong["beta"])
    gaps = [(limit_at(p["kl"], results["limit"]) or math.inf) - p["reward"] for p in near]
    best = max((p["reward"] for p in near), default=-math.inf)
    return {"gap": max(gaps, default=math.inf), "lead": best - chosen["reward"], "far": wrong["kl"] / right["kl"]}


def label(p: dict) -> str:
    return f"{p['name']}, beta {p['beta']:g}" if p["name"] == DPO else p["name"]


def table(results: dict) -> str:
    lines = [f"{'':22}{'reward':>15}{'KL (nats)':>18}{'limit at this KL':>20}"]
    for p in results["policies"]:
        best = limit_at(p["kl"], results["limit"])
        numbers = "".join(f"{p[k]:>{w}.3f} ± {p[k + '_stderr']:.3f}" for k, w in (("reward", 7), ("kl", 10)))
        lines.append(f"{label(p):22}{numbers}" + (f"{best:>20.3f}" if best else ""))
    return "\n".join([*lines, "± one standard error. KL: how far the policy is from the SFT model"])


def sentences(results: dict) -> str:
    """What to see, with the figures of this run; less where a run this small does not show it."""
    found = findings(results)
    if found["gap"] > 0.1 or found["lead"] < 0.05 or found["far"] < 2:
        return "These runs are too small to show how DPO, SFT on chosen and the wrong reference differ."
    last = max((p for p in results["policies"] if p["name"] == DPO), key=lambda p: p["kl"])
    return (
        f"1. Within {FAR:g} nats DPO comes to {found['gap']:.3f} of the limit, the largest reward there is at its KL.\n"
        f"2. SFT on the chosen reviews stays {found['lead']:.2f} below: it imitates them, and can go no farther.\n"
        f"3. Too small a beta goes too far ({last['kl']:.1f} nats at {last['beta']:g}), and so does the wrong reference: "
        f"{found['far']:.0f} times the KL of the right one."
    )


def draw(results: dict, path: Path) -> None:
    """Left reward over KL, with the limit; right reward and KL over the steps of training."""
    fig = figure(path, 15, 6.8)
    grid = fig.add_gridspec(2, 2, width_ratios=(3, 2))
    frontier, rewards, kls = fig.add_subplot(grid[:, 0]), fig.add_subplot(grid[0, 1]), fig.add_subplot(grid[1, 1])
    limit = [p for p in drawn(results["limit"]) if p["kl"] > 0.02]
    frontier.plot([p["kl"] for p in limit], [p["reward"] for p in limit], color="black", label="the limit of any method")
    looks = {name: look(number) for number, name in enumerate((DPO, WRONG, CHOSEN, BEST))}
    for name, style in looks.items():
        found = [p for p in results["policies"] if p["name"] == name]
        x, y, dx, dy = ([p[k] for p in found] for k in ("kl", "reward", "kl_stderr", "reward_stderr"))
        frontier.errorbar(x, y, dy, dx, label=name, linestyle=":" if name == DPO else "", **style)
        for p in found if name == DPO else ():
            shift = (-28, 10) if p["beta"] == BETAS[-1] else (9, -14)  # the last two are often near each other
            place = {"xytext": shift, "textcoords": "offset points", "color": style["color"], "fontsize": 12}
            frontier.annotate(f"beta {p['beta']:g}", (p["kl"], p["reward"]), **place)
    frontier.axhline(results["policies"][0]["reward"], **NEUTRAL, label="the SFT model, KL 0")
    frontier.set(xlim=(0.025, 40), ylim=(None, 1.02))
    frontier.set_xscale("log")
    frontier.set_xticks([0.03, 0.1, 0.3, 1, 3, 10, 30], ["0.03", "0.1", "0.3", "1", "3", "10", "30"])
    frontier.legend(loc="lower right", fontsize=12, framealpha=1)
    frontier.set_title("what each policy gains, and how far it goes for it", fontsize=14)
    dress(frontier, "KL from the SFT model (nats)", "reward")
    for name, beta, line in CURVES:
        found = [p for p in results["steps"] if (p["name"], p["beta"]) == (name, beta)]
        for ax, k in ((rewards, "reward"), (kls, "kl")):
            x, y, errors = ([p[n] for p in found] for n in ("steps", k, f"{k}_stderr"))
            ax.errorbar(x, y, errors, linestyle=line, label=label(found[0]), **looks[name])
    kls.set_yscale("symlog", linthresh=0.1)
    kls.set_yticks([0, 0.1, 1, 10], ["0", "0.1", "1", "10"])
    rewards.set_title("runs of so many steps", fontsize=14)
    dress(rewards, "", "reward")
    dress(kls, "steps", "KL (nats)")
    kls.legend(loc="lower right", fontsize=12, framealpha=1)
    save(fig, path)


def main() -> None:
    cfg = config.load(Config, prog="demo.py")
    cfg.out_dir = os.path.normpath(cfg.out_dir)  # what is looked at is then what is written, whatever ".." stands in it
    begin, cpu, out = time.monotonic(), time.process_time(), Path(cfg.out_dir)
    if out.exists() and not (out / MARK).exists():
        raise UserError(f"out_dir {out} is there and was not made by a demo: name another folder")
    write_whole(out / MARK, "made by demo.py, which deletes what it made here when it runs again\n")
    for path in (out / name for name in MADE):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
    torch.set_num_threads(1)  # on matrices this small two threads mostly wait for each other where cores are shared
    results = measured(cfg)
    results |= {"seconds": round(time.monotonic() - begin, 1), "cpu_seconds": round(time.process_time() - cpu, 1)}
    write_whole(out / "results.json", json.dumps(results, indent=1) + "\n")
    try:
        draw(results, out / "demo.png")
    except UserError as error:  # without matplotlib there is no picture
        warn(str(error))
    print(f"\n{table(results)}\n\n{sentences(results)}\n")
    Demo(cfg).write_page()
    print(f"\n{results['seconds']:.0f} s; {out}/results.json, {out}/demo.png, {out}/report.html")


if __name__ == "__main__":
    run(main)
