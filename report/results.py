"""Read the results of the evaluation scripts, whatever they measured, as points with intervals."""

import json
import math
from pathlib import Path
from typing import Any

from base.errors import UserError
from base.files import parse_json, read_plain
from report.formats import Table

Points = list[dict[str, Any]]


Z = 1.959964  # of a two-sided 95% interval


class NotAResult(UserError):
    """The file was not written by an evaluation script."""


# field of a result -> (its name, what it is multiplied by); braces take other fields of the result
MEASURES = {
    "win_rate": ("win rate (%)", 100),
    "mean": ("score (0 to 100)", 1),
    "acc": ("accuracy (%), {mode}, {data} {split}", 100),
    "acc_norm": ("accuracy by byte (%), {data} {split}", 100),
    "accuracy": ("chosen over rejected (%), {data} {split}", 100),
    "margin": ("reward margin (nats), {data} {split}", 1),
    "reward": ("reward, {reward_rule}", 1),
    "kl": ("KL from the reference (nats)", 1),
    "maj": ("majority of {k} (%)", 100),
    "pass": ("any of {k} right (%)", 100),
    "pass_at_1": ("right answers (%)", 100),
}


def number(value: Any) -> bool:
    """Whether it is a number that a picture can show: finite, and so is what is summed up of several."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) and abs(value) < 1e100


def read_result(path: str | Path) -> Points:
    """A point for each measure in a result file: label, parameters, measure, value, low, high (the 95% interval), n, chance.

    Of what is missing, parameters and the interval are None. A point of a reward has `kl` (value, low, high) and
    the `limit`, where they were measured. Raises NotAResult for any other file, and UserError for a result that measured
    nothing.
    """
    try:
        found = parse_json(read_plain(Path(path)))
        json.dumps(found, ensure_ascii=False).encode()  # ValueError for half a surrogate pair: no terminal or file takes it
        fields = {name: (*MEASURES[name], found[name]) for name in MEASURES if name in found}
        n = found["n"]
        if not fields or not number(n) or not all(number(value) or value is None for *_, value in fields.values()):
            raise TypeError
        size, chance = (x if number(x) and x > 0 else None for x in (found.get("parameters"), found.get("chance")))
        same = {"label": str(found.get("label") or ""), "parameters": size, "n": n}
        text = {name: Path(str(found.get(name, "?"))).name for name in ("mode", "data", "split", "reward_rule", "k")}
        points = []
        for field, (name, scale, value) in fields.items():
            if value is None:
                continue
            low, high = interval(found, field)
            scaled = {"value": scale * value, "low": low and scale * low, "high": high and scale * high}
            even = 0.5 if field in ("win_rate", "accuracy") else chance
            points.append({**same, "measure": name.format(**text), **scaled, "chance": even and scale * even})
            if field == "reward" and number(found.get("kl")):
                limit = [(float(at["kl"]), float(at["reward"])) for at in found.get("limit", []) if at["ess"] >= 10]
                kl = dict(zip(("value", "low", "high"), (found["kl"], *interval(found, "kl")), strict=True))
                points[-1] |= {"kl": kl, "limit": sorted(limit)}
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}: name a result of an evaluation script") from None
    except (ValueError, KeyError, TypeError, IndexError):
        raise NotAResult(f"{path}: no result of an evaluation script: none of {', '.join(MEASURES)} in it with n") from None
    if not points:
        raise UserError(f"{path}: holds no verdict, so there is nothing to show: leave it out")
    return points


def interval(found: dict[str, Any], field: str) -> tuple[float | None, float | None]:
    """The 95% interval of a field: as the result states it, or 1.96 standard errors to each side; (None, None) without."""
    ends = found.get("ci95" if field in ("win_rate", "mean") else f"{field}_ci95")
    error = found.get(f"{field}_stderr")
    if ends is None and number(error):
        ends = (found[field] - 1.96 * error, found[field] + 1.96 * error)
    if ends is None:
        return None, None
    low, high = ends
    if not (number(low) and number(high)):
        raise TypeError
    return low, high


def wilson(p: float, n: float) -> list[float]:
    """95% interval of a share p seen in n trials: the score interval of E. B. Wilson, 1927 (JASA 22, 209-212)."""
    middle, half = p + Z * Z / (2 * n), Z * math.sqrt(p * (1 - p) / n + Z * Z / (4 * n * n))
    return [max(0.0, (middle - half) / (1 + Z * Z / n)), min(1.0, (middle + half) / (1 + Z * Z / n))]


def results_in(folder: str | Path) -> tuple[Points, list[str]]:
    """The points of all results among a folder's .json files, and what is wrong with results that cannot be shown."""
    points, wrong = [], []
    for path in sorted(Path(folder).glob("*.json")):
        try:
            points += read_result(path)
        except NotAResult:
            continue
        except UserError as error:
            wrong.append(str(error))
    return points, wrong


def result_table(points: Points) -> Table:
    """A row a point."""
    table = [["", "parameters", "measure", "value", "95% interval", "n"]]
    for p in points:
        ends = "-" if p["low"] is None else f"{rounded(p['low'])} to {rounded(p['high'])}"
        table.append([p["label"], size(p["parameters"]), p["measure"], rounded(p["value"]), ends, str(p["n"])])
    return table


def rounded(value: float) -> str:
    """Two decimals, more of a small number."""
    return f"{value:.2f}" if abs(value) >= 1 or value == 0 else f"{value:.3g}"


def size(parameters: float | None) -> str:
    """124439808 -> "124M"; None -> "-"."""
    if parameters is None:
        return "-"
    for unit, name in ((1e9, "B"), (1e6, "M"), (1e3, "K")):
        if parameters >= 0.9995 * unit:
            return f"{parameters / unit:.2g}B" if name == "B" else f"{parameters / unit:.0f}{name}"
    return f"{parameters:.0f}"
