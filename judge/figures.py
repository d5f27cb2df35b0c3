"""From judgements to figures: win rate or mean score, its 95% interval, its spread over trials."""

import math
import statistics
from dataclasses import dataclass

from judge.client import Decision
from report.results import Z, wilson

SHARE = {"win": 1.0, "tie": 0.5, "loss": 0.0}  # what an outcome adds to the wins


@dataclass(frozen=True)
class Judgement:
    """What came of prompt `number` in one trial.

    outcome: "win", "loss" or "tie" for the response, or its score; None = failed. sides: where the response stood in each
    question, "A", "B", "AB", or "" for a score. lengths: characters of the response and of the other text. share: the
    probability that the judge gives to the response, where it gives one.
    """

    number: int
    trial: int
    outcome: str | float | None
    sides: str
    lengths: tuple[int, int]
    decisions: tuple[Decision, ...]
    share: float | None = None


def spread(values: list[float]) -> dict:
    """Mean, standard deviation (n - 1), least and largest of some values; None each if there are no values."""
    if not values:
        return dict.fromkeys(("mean", "std", "min", "max"))
    std = statistics.stdev(values) if len(values) > 1 else 0.0
    return {"mean": statistics.fmean(values), "std": std, "min": min(values), "max": max(values)}


def means_by(name: str, judgements: list[Judgement]) -> list[float]:
    """The mean value of each `number` or `trial` (`name`) that has a verdict; a win is 1, a tie 1/2, a loss 0."""
    found: dict[int, list[float]] = {}
    for j in judgements:
        if j.outcome is not None:
            found.setdefault(getattr(j, name), []).append(SHARE.get(j.outcome, j.outcome))
    return [statistics.fmean(values) for values in found.values()]


def figures(judgements: list[Judgement]) -> dict:
    """What win rates and scores have in common."""
    trials = means_by("trial", judgements)
    return {
        "n": len(judgements),
        "failed": sum(j.outcome is None for j in judgements),
        "trials": len({j.trial for j in judgements}),
        "prompts": len({j.number for j in judgements}),
        "over_trials": {**spread(trials), "values": trials},
    }


def grade_pairwise(judgements: list[Judgement]) -> dict:
    """Win rate, its interval, the counts behind it, and the lengths of better and worse texts.

    The interval counts prompts, not judgements: more trials of a prompt are not more prompts.
    """
    outcomes = [j.outcome for j in judgements]
    decided = [SHARE[outcome] for outcome in outcomes if outcome is not None]
    rate = statistics.fmean(decided) if decided else None
    unlike = [j for j in judgements if j.outcome in ("win", "loss")]
    better_first = [j.lengths if j.outcome == "win" else j.lengths[::-1] for j in unlike]  # (better, worse)
    soft = [j.share for j in judgements if j.share is not None]
    longer_won = [better > worse for better, worse in better_first if better != worse]
    return {
        "win_rate": rate,
        "ci95": wilson(rate, len(means_by("number", judgements))) if decided else None,
        **({"soft_win_rate": statistics.fmean(soft)} if soft else {}),
        "wins": outcomes.count("win"),
        "losses": outcomes.count("loss"),
        "ties": outcomes.count("tie"),
        **figures(judgements),
        "characters": {
            "winners": statistics.fmean(better for better, _ in better_first) if better_first else None,
            "losers": statistics.fmean(worse for _, worse in better_first) if better_first else None,
            "longer_won": statistics.fmean(longer_won) if longer_won else None,
        },
    }


def grade_score(judgements: list[Judgement]) -> dict:
    """Mean score, standard deviation over prompts, and the mean's interval: mean +- 1.96 std / sqrt(prompts). One prompt alone
    says nothing of the spread: its interval is all scores that there are."""
    scores = means_by("number", judgements)
    mean, std = (spread(scores)[name] for name in ("mean", "std"))
    half = Z * std / math.sqrt(len(scores)) if len(scores) > 1 else 100.0
    return {
        "mean": mean,
        "std": std,
        "ci95": [max(0.0, mean - half), min(100.0, mean + half)] if scores else None,
        **figures(judgements),
    }


def say(result: dict) -> str:
    """The result in a line."""
    if result["ci95"] is None:
        return f"no verdict at all: {result['failed']} failed of {result['n']}"
    low, high = result["ci95"]
    if "win_rate" in result:
        counts = ", ".join(f"{result[name]} {name}" for name in ("wins", "losses", "ties", "failed"))
        interval = f"95% interval {100 * low:.1f} to {100 * high:.1f}, Wilson"
        soft = f", soft {100 * result['soft_win_rate']:.1f}%" if "soft_win_rate" in result else ""
        return f"win rate {100 * result['win_rate']:.1f}%{soft} ({interval}): {counts} of {result['n']}"
    return f"score {result['mean']:.2f} (95% interval {low:.2f} to {high:.2f}), {result['failed']} failed of {result['n']}"
