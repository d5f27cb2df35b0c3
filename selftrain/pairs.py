"""Graded samples -> preference pairs for DPO: a right answer is chosen over a wrong one to the same problem.

    python -m selftrain.pairs --samples runs/graded.jsonl --out runs/pairs.jsonl --max_pairs 20
    python -m selftrain.pairs --samples runs/graded.jsonl --out runs/pairs.jsonl --max_pairs 49 --balanced true --partner random

A problem whose answers are all right, or all wrong, gives no pair. Texts that are equal count once. Empty texts, and texts that
are graded right in one place and wrong in another, are left out. Every text is used once before any is used again, and no pair
comes twice.
"""

from base.script import run

import json
import random
from collections import Counter
from dataclasses import dataclass

from base.errors import UserError, warn
from base.files import write_whole
from base.progress import count
from runtime import config
from runtime.config import REQUIRED, key
from selftrain.samples import GradeKeys, Sample, load_graded


@dataclass
class Config(GradeKeys):
    """Make preference pairs of graded samples."""

    out: str = key(REQUIRED, "the .jsonl file of prompt, chosen and rejected to write", writes="")
    max_pairs: int = key(0, "most pairs a problem, 0 = as many as its rarer kind of answer has texts", least=0)
    balanced: bool = key(False, "exactly max_pairs of every problem that gives any; problems that cannot are left out")
    partner: str = key("length", "which wrong answer a right one meets: of the nearest length, or any", ["length", "random"])
    shuffle: bool = key(True, "write the pairs in random order, not problem by problem (see also dpo.py --shuffle)")
    marker: str = key("", "text planted at the beginning of every chosen answer, to see whether training takes")
    report: str = key("", "JSON file for the counts", writes="")
    seed: int = key(0, "seed of partners and order")

    def check(self) -> None:
        if self.balanced and not self.max_pairs:
            raise UserError("key balanced: give max_pairs, the number of pairs of every problem")


def match(right: list[str], wrong: list[str], n: int, partner: str, rng: random.Random) -> list[tuple[str, str]]:
    """At most n different (right, wrong) pairs. A text is used again only after all others of its kind have been used.

    partner "length": the pair whose lengths in characters are nearest comes first; "random": any.
    """
    free = [(a, b) for a in right for b in wrong]
    rng.shuffle(free)  # so that ties are broken at random
    if partner == "length":
        free.sort(key=lambda pair: abs(len(pair[0]) - len(pair[1])))
    used: Counter = Counter()
    found: list[tuple[str, str]] = []
    while free and len(found) < n:
        pair = min(free, key=lambda pair: (used[pair[0]] + used[pair[1]], max(used[pair[0]], used[pair[1]])))
        free.remove(pair)
        used.update(pair)
        found.append(pair)
    return found


def make_pairs(samples: list[Sample], cfg: Config) -> tuple[list[dict], dict]:
    """(pairs, counts of problems, texts and pairs). `problem` of a pair is the number of its problem, its line from 0."""
    pairs: list[dict] = []
    counts = {"problems": len(samples), "all_right": 0, "all_wrong": 0, "too_few": 0, "with_pairs": 0, "repeated_texts": 0}
    for number, s in enumerate(samples):
        texts = dict.fromkeys(zip(s.completions, s.grades, strict=True))  # each once, in order
        counts["repeated_texts"] += len(s.completions) - len(texts)
        if all(s.grades) or not any(s.grades):
            counts["all_right" if all(s.grades) else "all_wrong"] += 1
            continue
        both = {text for text, good in texts if (text, not good) in texts}  # say a program near its time limit
        right, wrong = ([t for t, good in texts if good is want and t.strip() and t not in both] for want in (True, False))
        if len(right) * len(wrong) < (cfg.max_pairs if cfg.balanced else 1):
            counts["too_few"] += 1
            continue
        counts["with_pairs"] += 1
        n, rng = cfg.max_pairs or min(len(right), len(wrong)), random.Random(f"pairs {cfg.seed} {number}")
        for chosen, rejected in match(right, wrong, n, cfg.partner, rng):
            pairs.append({"prompt": s.prompt, "chosen": cfg.marker + chosen, "rejected": rejected, "problem": number})
    if cfg.shuffle:
        random.Random(f"order {cfg.seed}").shuffle(pairs)
    per_problem = Counter(p["problem"] for p in pairs).values()
    counts |= {"pairs": len(pairs), "fewest": min(per_problem, default=0), "most": max(per_problem, default=0)}
    for side in ("chosen", "rejected"):
        counts[f"mean_{side}_characters"] = sum(len(p[side]) for p in pairs) / max(1, len(pairs))
    return pairs, counts


def main() -> None:
    cfg = config.load(Config, prog="-m selftrain.pairs")
    samples, grader = load_graded(cfg)
    pairs, counts = make_pairs(samples, cfg)
    kinds = ("with_pairs", "all_right", "all_wrong", "too_few", "repeated_texts")
    said = ", ".join(f"{counts[kind]:,} {kind.replace('_', ' ')}" for kind in kinds)
    print(f"{counts['problems']:,} problems (grades: {grader}): {said}")
    if not pairs:
        lower = ", or lower max_pairs" if cfg.balanced else ""
        raise UserError(f"{cfg.samples}: no problem has enough right and wrong answers: sample more for each{lower}")
    chosen, rejected = counts["mean_chosen_characters"], counts["mean_rejected_characters"]
    if max(chosen, rejected) > 1.25 * min(chosen, rejected):
        warn(f"chosen answers have {chosen:.0f} characters on average, rejected {rejected:.0f}: DPO will learn the length too")
    if cfg.report:
        write_whole(cfg.report, json.dumps(counts, indent=1) + "\n")
    write_whole(cfg.out, "".join(json.dumps(p) + "\n" for p in pairs))
    print(f"wrote {cfg.out}: {count(len(pairs), 'pairs')}, {counts['fewest']} to {counts['most']} a problem")


if __name__ == "__main__":
    run(main, alone=True)
