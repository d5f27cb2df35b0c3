"""Samples -> preference pairs for DPO, by a reward: a rule that gives each completion a number (data/rewards.py).

    python -m selftrain.reward_pairs --samples runs/samples.jsonl --reward sentiment --out runs/pairs.jsonl
    python -m selftrain.reward_pairs --samples runs/samples.jsonl --reward sentiment --temperature 0.2 --out runs/pairs.jsonl

Completion a is chosen over b with the probability sigmoid((reward a - reward b) / temperature), the model of Bradley and Terry
(1952) from which DPO is derived (Rafailov et al. 2023, equation 1). DPO at strength beta then looks for the policy pi_ref
exp(reward / b), normalised, with b = beta * temperature. At temperature 0 the larger reward wins, and equal ones make no pair.

A line of the output is a prompt with all its pairs, by the numbers of the completions: {"prompt", "completions", "rewards",
"pairs": [[chosen, rejected], …]}. Equal texts of a prompt make pairs once, empty ones are left out. `reward` in the report is
the mean over all samples that are not empty, equal ones included.
"""

from base.script import run

import itertools
import json
import math
import random
from dataclasses import dataclass

from base.errors import UserError
from base.files import write_whole
from data import messages, rewards
from data.jsonl import entries, read
from runtime import config
from runtime.config import REQUIRED, key


@dataclass
class Config:
    """Make preference pairs of samples by their rewards."""

    samples: str = key(REQUIRED, 'a file of sample.py: "prompt" (or "messages") and "completions" on each line')
    reward: str = key(REQUIRED, "reviews, sentiment, or FILE.py:NAME, your function of prompt and completion")
    temperature: float = key(0.0, "how noisy the labels are: see above; 0 = the larger reward wins", least=0)
    partner: str = key("all", "the pairs of a prompt: each two completions, or the best one and each other", ["all", "best"])
    out: str = key(REQUIRED, "the .jsonl file of prompts, completions and pairs to write", writes="")
    report: str = key("", "JSON file for the counts", writes="")
    seed: int = key(0, "seed of the labels and of the order of lines")


def pair(values: list[float], cfg: Config, rng: random.Random) -> list[list[int]]:
    """[chosen, rejected] of the completions that have these rewards, by their numbers."""
    best = max(range(len(values)), key=values.__getitem__, default=0)
    found = []
    for a, b in itertools.combinations(range(len(values)), 2):
        gap = values[a] - values[b]
        if cfg.partner == "best" and best not in (a, b):
            continue
        if not gap and not cfg.temperature:
            continue
        wins = rng.random() < 0.5 + 0.5 * math.tanh(gap / cfg.temperature / 2) if cfg.temperature else gap > 0
        found.append([a, b] if wins else [b, a])
    return found


def main() -> None:
    cfg = config.load(Config, prog="-m selftrain.reward_pairs")
    reward, rows, values = rewards.get(cfg.reward), [], []
    for number, (where, record) in enumerate(read(cfg.samples)):
        prompt, texts = messages.prompt_of(record, where), entries(record, "completions", str, "texts", where)
        rated = {text: reward(messages.as_text(prompt), text) for text in dict.fromkeys(texts) if text}
        values += [rated[text] for text in texts if text]
        if pairs := pair([*rated.values()], cfg, random.Random(f"reward pairs {cfg.seed} {number}")):
            answers = [*rated] if isinstance(prompt, str) else [[{"role": "assistant", "content": text}] for text in rated]
            rows.append({"prompt": prompt, "completions": answers, "rewards": [*rated.values()], "pairs": pairs})
    if not rows:
        raise UserError(f"{cfg.samples}: no prompt has two completions of different rewards: sample more, or at a temperature")
    random.Random(f"order {cfg.seed}").shuffle(rows)
    agree = [row["rewards"][a] - row["rewards"][b] for row in rows for a, b in row["pairs"]]
    counts = {"prompts": number + 1, "with_pairs": len(rows), "pairs": len(agree), "reward": sum(values) / len(values)}
    counts["margin"] = sum(agree) / len(agree)
    if cfg.report:
        write_whole(cfg.report, json.dumps(counts, indent=1) + "\n")
    write_whole(cfg.out, "".join(json.dumps(row) + "\n" for row in rows))
    print(
        f"wrote {cfg.out}: {counts['pairs']:,} pairs of {len(rows):,} of {number + 1:,} prompts; mean reward "
        f"{counts['reward']:.4f}, of chosen less rejected {counts['margin']:.4f}"
    )


if __name__ == "__main__":
    run(main, alone=True)
