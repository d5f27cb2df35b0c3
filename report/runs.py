"""Read a run folder: its metrics, its settings, and the steps where its training loss jumped.

A run may still be going on while it is read.
"""

import math
from pathlib import Path
from typing import Any

import numpy as np

from base.errors import UserError, warn
from base.files import parse_json, parse_toml, read_plain
from losses import REFERENCE_FREE

Records = list[dict[str, Any]]

MARGIN, ACCURACY = "rewards/margins", "rewards/accuracies"
GAINS = {"gain/chosen": "rewards/chosen", "gain/rejected": "rewards/rejected"}  # gain = reward / beta


def read_run(folder: str | Path) -> Records:
    """The records of a run folder's metrics.jsonl, in the file's order. DPO's get their log-prob gains, see `add_gains`.

    A last line that does not parse is one that the run is still writing, or was killed in: it is left out.
    Raises UserError for a missing or empty file, and for a line before the last that is no record of metrics.
    """
    path = Path(folder) / "metrics.jsonl"
    try:
        lines = read_plain(path).splitlines()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}: give the out_dir of a run") from None
    records = []
    for number, line in enumerate(lines, 1):
        try:
            record = parse_json(line)
            if not isinstance(record["step"], int) or record["split"] not in ("train", "val"):
                raise ValueError
            records.append(record)
        except (ValueError, KeyError, TypeError):
            if number < len(lines):
                raise UserError(f'{path}:{number}: no metrics record {{"step", "split", …}}: correct the line') from None
    if not records:
        raise UserError(f"{path}: no records yet: wait for the run's first step")
    if path.with_name("config.toml").exists():
        add_gains(records, read_config(folder))
    return records


def read_config(folder: str | Path) -> dict[str, Any]:
    """The settings in a run folder's config.toml. Raises UserError where it is missing or damaged."""
    path = Path(folder) / "config.toml"
    try:
        return parse_toml(read_plain(path).decode())
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}: give the out_dir of a run") from None
    except ValueError as error:
        raise UserError(f"{path}: not valid TOML ({error}): copy the run's folder again") from None


def add_gains(records: Records, settings: dict[str, Any]) -> None:
    """Add log pi - log ref of chosen and rejected, in nats, mean over pairs, to the records of a DPO run.

    It is the logged reward divided by beta. A run without a reference has no gains.
    """
    beta = settings.get("beta")
    if settings.get("loss") in (None, *REFERENCE_FREE) or not isinstance(beta, int | float) or not beta > 0:
        return
    for record in records:
        for name, reward in GAINS.items():
            if isinstance(record.get(reward), int | float):
                record[name] = record[reward] / beta


def series(records: Records, split: str, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Steps and values of metric `name`, float64 (n,) each. Values that are missing, null, inf or nan are left out."""
    points = [(r["step"], r[name]) for r in records if r["split"] == split and isinstance(r.get(name), int | float)]
    points = [point for point in points if math.isfinite(point[1])]
    return tuple(np.array(points, dtype=np.float64).reshape(-1, 2).T)


def jumps(records: Records) -> list[tuple[int, float, float]]:
    """Where the training loss jumped: (step, loss before, loss after), at most once in 50 records.

    Two rules, each on medians, so that one hard batch does not count. Sharp: the median of 3 losses lies more than 5 robust
    deviations above the median of the 50 before them (or of as many as there are, at least 10). Lasting, for small batches
    whose losses scatter widely: the median of 30 losses lies more than 1.5 deviations above that of the 150 before them.
    The robust deviation is 1.4826 times the median distance from the median, and at least 2% of the median.
    """
    steps, loss = series(records, "train", "loss")
    found, free = [], 10
    for at in range(10, len(loss) - 2):
        if at < free:
            continue
        for length, least, width, times in ((50, 10, 3, 5), (150, 150, 30, 1.5)):
            before, after = loss[max(0, at - length) : at], loss[at : at + width]
            if len(before) < least or len(after) < width:
                continue
            middle = np.median(before)
            bound = middle + times * max(1.4826 * np.median(np.abs(before - middle)), 0.02 * abs(middle))
            if loss[at] > bound and np.median(after) > bound:
                found.append((int(steps[at]), float(middle), float(np.median(after))))
                free = at + length
                break
    return found


def warn_of_jumps(runs: dict[str, Records]) -> None:
    """Print a warning on stderr for each jump of each run (label -> records)."""
    for label, records in runs.items():
        for step, before, after in jumps(records):
            change = f"from about {before:.3f} to {after:.3f}"
            warn(f"{label}: the training loss jumped at step {step}, {change}: lr may be too high")
