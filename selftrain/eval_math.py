"""Accuracy of sampled answers: of the majority (maj@k), and of any one among them (pass@k), for every k that the file allows.

    python -m selftrain.eval_math --samples runs/gsm8k_samples.jsonl --out runs/gsm8k.json --plot runs/gsm8k.png

n samples of a problem are there, c of them right; k of the n are drawn.

pass@k is the chance that one of the k is right: 1 - C(n-c, k) / C(n, k) (Chen et al. 2021, arXiv 2107.03374, eq. 1).

maj@k is the chance that the right answer gets the most votes of the k. It is exact over all C(n, k) draws; nothing is random.
Answers with one normal form vote together, all right ones too; a sample without an answer does not vote. Where t answers tie,
each wins with chance 1/t. Taking the first of them comes to the same where the order of samples means nothing.
"""

from base.script import run

import functools
import json
import math
from collections import Counter, defaultdict
from dataclasses import dataclass

import numpy as np

from base.errors import UserError
from base.files import write_whole
from report.formats import markdown
from report.plot import dress, figure, save
from report.results import wilson
from runtime import config
from runtime.config import key
from selftrain import grading
from selftrain.samples import GradeKeys, Sample, load_graded

SHOWN = 20  # disagreements with stored grades that are printed
MOST = 1000  # completions of a problem: C(n, n/2) of more would be above the largest float


@dataclass
class Config(GradeKeys):
    """maj@k and pass@k of sampled answers, with 95% intervals."""

    k: int = key(0, "the k of `maj` and `pass`; 0 = as many as every problem has samples", least=0)
    marker: str = key("", "also the share of completions that hold this text (planted by `selftrain.pairs --marker`)")
    out: str = key("", "JSON file for the result", writes="")
    details: str = key("", "JSONL file: the samples with `pred` and `grades`, as `selftrain.pairs` reads them", writes="")
    plot: str = key("", "picture of the accuracy over k: .png, .pdf or .svg", writes=".png .pdf .svg")


def pass_at_k(n: int, right: int, k: int) -> float:
    """The chance that k of n samples hold a right one, where `right` of the n are right."""
    return 1 - math.comb(n - right, k) / math.comb(n, k)


@functools.lru_cache(maxsize=100_000)
def maj_at_k(right: int, wrong: tuple[int, ...], silent: int) -> tuple[float, ...]:
    """maj@k for k = 1..n: `right` of n samples give the right answer, `wrong[j]` the wrong answer j, `silent` none.

    Let r be the number of right samples in a draw. For each r we count the ways to draw the others so that no wrong answer has
    more than r votes, apart for each number t of wrong answers that tie with r votes. A wrong answer with fewer than r samples
    can neither win nor tie, so it is drawn like the silent ones.
    """
    n = right + sum(wrong) + silent
    wins = np.zeros(n + 1)
    for r in range(1, right + 1):
        # ways[t, m]: draws of m samples in which t wrong answers have r votes and no other has more
        rivals = [count for count in wrong if count >= r]
        free = n - right - sum(rivals)
        ways = np.zeros((len(rivals) + 1, n + 1))
        ways[0, : free + 1] = [math.comb(free, m) for m in range(free + 1)]
        for count in rivals:
            more = np.zeros_like(ways)
            for drawn in range(r + 1):
                t = int(drawn == r)
                more[t:, drawn:] += math.comb(count, drawn) * ways[: len(ways) - t, : n + 1 - drawn]
            ways = more
        share = (ways / np.arange(1, len(ways) + 1)[:, None]).sum(0)  # row t: a tie with t wrong answers
        wins[r:] += math.comb(right, r) * share[: n + 1 - r]
    return tuple(round(float(wins[k]) / math.comb(n, k), 12) for k in range(1, n + 1))  # rounding: 1 must be exactly 1


def votes(sample: Sample) -> tuple[int, tuple[int, ...], int]:
    """A graded sample as the arguments of `maj_at_k`: (right, how many give each wrong answer, how many give none)."""
    right = sum(sample.grades)
    wrong = [p for p, good in zip(sample.pred, sample.grades, strict=True) if not good]
    parties = Counter(grading.normal(p) for p in wrong if p is not None)
    return right, tuple(sorted(parties.values())), wrong.count(None)


def interval(values: list[float], samples: int) -> list[float]:
    """95% interval of the mean of `values`, one in 0..1 for each problem; `samples` is the number of samples behind them.

    It is Wilson's score interval (1927) with an effective number of problems: n p (1-p) / variance of the values. The less they
    vary, the better their mean is known (Korn and Graubard 1998, Survey Methodology 24). It is never more certain than
    `samples` independent samples would be.
    """
    values = [round(v, 12) for v in values]  # so that rounding alone makes no variance
    n, p = len(values), sum(values) / len(values)
    spread = float(np.var(values, ddof=1)) if n > 1 else 0.0
    n = min(n * p * (1 - p) / spread, samples) if spread > 0 else n if p in (0, 1) else samples
    return wilson(p, n)


def measure(samples: list[Sample], top: int) -> dict:
    """All figures of a list of graded samples; `maj` and `pass` are those at k = top."""
    n_samples = sum(len(s.completions) for s in samples)
    by_k, maj = [], [maj_at_k(*votes(s)) for s in samples]
    for k in range(1, min(len(s.completions) for s in samples) + 1):
        passed, row = [pass_at_k(len(s.grades), sum(s.grades), k) for s in samples], {"k": k}
        for name, values in (("maj", [m[k - 1] for m in maj]), ("pass", passed)):
            row |= {name: sum(values) / len(values), f"{name}_ci95": interval(values, n_samples)}
        by_k.append(row)
    at, one = by_k[top - 1], by_k[0]
    return {
        "n": len(samples),
        **at,
        "pass_at_1": one["pass"],
        "pass_at_1_ci95": one["pass_ci95"],
        "samples": n_samples,
        "all_right": sum(all(s.grades) for s in samples),
        "all_wrong": sum(not any(s.grades) for s in samples),
        "no_answer": sum(p is None for s in samples for p in s.pred),
        "by_k": by_k,
    }


def evaluate(samples: list[Sample], k: int = 0) -> dict:
    """`measure` of all samples, and of each level and subject that the data names. `k` = 0: the largest k.

    Raises UserError where a problem has fewer than k completions, or more than can be counted.
    """
    fewest, most = (pick(samples, key=lambda s: len(s.completions)) for pick in (min, max))
    if k > len(fewest.completions):
        raise UserError(f"{fewest.source}: {len(fewest.completions)} completions, k is {k}: sample more of them, or lower k")
    if len(most.completions) > MOST:
        raise UserError(f"{most.source}: {len(most.completions):,} completions, at most {MOST:,} can be counted: take fewer")
    top = k or len(fewest.completions)
    result = measure(samples, top)
    for name in ("level", "subject"):
        groups = defaultdict(list)
        for s in samples:
            groups[s.kind.get(name, "(none)")].append(s)
        if set(groups) != {"(none)"}:
            parts = {value: measure(group, top) for value, group in sorted(groups.items())}
            result[f"by_{name}"] = {value: {f: p[f] for f in p if f != "by_k"} for value, p in parts.items()}
    return result


# --- tables and pictures ---------------------------------------------------------------------------------------------


def cell(row: dict, field: str) -> str:
    """A figure as text: a share with its 95% interval, a change with its ± half-width, or a plain number; "" if missing."""
    value, ci95 = row.get(field, ""), row.get(f"{field}_ci95")
    if isinstance(ci95, list):
        return f"{value:.3f} ({ci95[0]:.3f} to {ci95[1]:.3f})"
    if ci95 is not None:
        return f"{value:+.3f} ± {ci95:.3f}"
    return f"{value:.3f}" if isinstance(value, float) else str(value)


def listed(rows: list[dict], columns: dict[str, str]) -> str:
    """Rows as a Markdown table. columns: {field: heading}; one that no row has is left out."""
    columns = {field: heading for field, heading in columns.items() if any(field in row for row in rows)}
    return markdown([list(columns.values()), *([cell(row, field) for field in columns] for row in rows)])


def table(result: dict) -> str:
    """The result as text: a row for each k up to 16, for its powers of two and its last, then for each level and subject."""
    k, by_k = result["k"], result["by_k"]
    shown = [row for row in by_k if row["k"] <= 16 or row is by_k[-1] or row["k"].bit_count() == 1]
    tables = [listed(shown, {"k": "k", "maj": "maj@k (95%)", "pass": "pass@k (95%)"})]
    for name in ("level", "subject"):
        if parts := result.get(f"by_{name}"):
            columns = {name: name, "maj": f"maj@{k}", "pass": f"pass@{k}", "pass_at_1": "pass@1", "n": "n"}
            tables.append(listed([{name: value, **part} for value, part in parts.items()], columns))
    kinds = ("samples", "all_right", "all_wrong", "no_answer")
    said = ", ".join(f"{result[kind]:,} {kind.replace('_', ' ')}" for kind in kinds)
    return "\n".join([*tables, f"{result['n']:,} problems: {said}"])


def draw(result: dict, path: str) -> None:
    """A picture of maj@k and pass@k over k with 95% bands."""
    fig, by_k = figure(path, 8, 5), result["by_k"]
    axes, ks = fig.subplots(), [row["k"] for row in by_k]
    for name, style in (("maj", "o-"), ("pass", "s--")):
        low, high = zip(*(row[f"{name}_ci95"] for row in by_k), strict=True)
        axes.plot(ks, [row[name] for row in by_k], style, markersize=4, label=f"{name}@k")
        axes.fill_between(ks, low, high, alpha=0.12, linewidth=0)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter("{x:g}")
    axes.set_ylim(-0.02, 1.02)
    axes.legend()
    dress(axes, "k, samples a problem", "share of problems")
    save(fig, path)


def compare(samples: list[Sample], grader: str) -> str:
    """Where our grades differ from those that the file stores, as text."""
    graded = [s for s in samples if s.stored is not None]
    total = sum(len(s.stored) for s in graded)
    lines = [
        f"  {s.source}, completion {i}: answer {s.answer!r}, given {p!r}: stored {was}, {grader} {now}"
        for s in graded
        for i, (p, was, now) in enumerate(zip(s.pred, s.stored, s.grades, strict=True))
        if was != now
    ]
    head = f"{grader} agrees with the stored grades on {total - len(lines):,} of {total:,} answers"
    return "\n".join([head, *lines[:SHOWN]])


def main() -> None:
    cfg = config.load(Config, prog="-m selftrain.eval_math")
    samples, grader = load_graded(cfg)
    result = evaluate(samples, cfg.k) | {"grades": grader}
    print(f"{cfg.samples}, grades: {grader}")
    if grader != "stored" and any(s.stored is not None for s in samples):
        print(compare(samples, grader))
    print(table(result))
    if cfg.marker:
        result["marker"] = sum(cfg.marker in c for s in samples for c in s.completions) / result["samples"]
        print(f"marker {cfg.marker!r}: in {result['marker']:.1%} of completions")
    if cfg.details:
        write_whole(cfg.details, "".join(json.dumps({**s.record, "pred": s.pred, "grades": s.grades}) + "\n" for s in samples))
    if cfg.plot:
        draw(result, cfg.plot)
    if cfg.out:
        write_whole(cfg.out, json.dumps(result | {"file": cfg.samples}, indent=1) + "\n")
    print(json.dumps({name: result[name] for name in ("n", "k", "maj", "pass", "pass_at_1")}))


if __name__ == "__main__":
    run(main, alone=True)
