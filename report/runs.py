"""Read a run folder: its metrics, its settings, the steps where its training loss jumped; and put runs side by side.

A run may still be going on while it is read.
"""

import math
from collections.abc import Iterable
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np

from base.errors import UserError, warn
from base.files import parse_json, parse_toml, read_plain
from losses import REFERENCE_FREE
from report.formats import Table
from report.results import number, results_in, rounded
from runtime.config import rules
from runtime.keys import SCRATCH, TrainKeys

Records = list[dict[str, Any]]

MARGIN, ACCURACY = "rewards/margins", "rewards/accuracies"
GAINS = {"gain/chosen": "rewards/chosen", "gain/rejected": "rewards/rejected"}  # gain = reward / beta
FREE = {f.name for f in fields(TrainKeys) if rules(f).free}  # settings that do not change what is learnt
ALWAYS = ("batch_size", "lr")  # settings that a table shows even where all runs share them


class Run(Records):
    """The records of a run, with the settings in its config.toml ({} where it has none)."""

    def __init__(self, records: Iterable[dict[str, Any]] = ()):
        super().__init__(records)
        self.settings: dict[str, Any] = {}

    def kind(self) -> str:
        """Which loss its numbers are: SFT, or the name of a preference loss. Losses of two kinds cannot be compared."""
        return str(self.settings.get("loss") or "") or ("DPO" if any(MARGIN in record for record in self) else "SFT")


def content(path: Path) -> bytes:
    """A file of a run folder. UserError where it cannot be read."""
    try:
        return read_plain(path)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}: give the out_dir of a run") from None


def read_run(folder: str | Path) -> Run:
    """The records of a run folder's metrics.jsonl, in the file's order. DPO's get their log-prob gains, see `add_gains`.

    A last line that does not parse is one that the run is still writing, or was killed in: it is left out.
    Raises UserError for a missing or empty file, and for a line before the last that is no record of metrics.
    """
    path, records = Path(folder) / "metrics.jsonl", Run()
    lines = content(path).splitlines()
    for line_number, line in enumerate(lines, 1):
        try:
            record = parse_json(line)
            if not isinstance(record["step"], int) or record["split"] not in ("train", "val"):
                raise ValueError
            records.append(record)
        except (ValueError, KeyError, TypeError):
            if line_number < len(lines):
                raise UserError(f'{path}:{line_number}: no metrics record {{"step", "split", …}}: correct the line') from None
    if not records:
        raise UserError(f"{path}: no records yet: wait for the run's first step")
    if path.with_name("config.toml").exists():
        records.settings = read_config(folder)
        add_gains(records, records.settings)
    return records


def read_config(folder: str | Path) -> dict[str, Any]:
    """The settings in a run folder's config.toml. Raises UserError where it is missing or damaged."""
    path = Path(folder) / "config.toml"
    try:
        return parse_toml(content(path).decode())
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
            if number(record.get(reward)):
                record[name] = record[reward] / beta


def series(records: Records, split: str, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Steps and values of metric `name`, float64 (n,) each. Values that are missing, null, inf or nan are left out."""
    points = [(r["step"], r[name]) for r in records if r["split"] == split and number(r.get(name))]
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


def troubles(label: str, records: Records) -> list[str]:
    """What a person should know of a run's losses: where they jumped, and where they are no number."""
    said = []
    for step, before, after in jumps(records):
        change = f"from about {before:.3f} to {after:.3f}"
        said.append(f"{label}: the training loss jumped at step {step}, {change}: lr may be too high")
    for split in ("train", "val"):
        finite = set(series(records, split, "loss")[0])
        bad = [str(r["step"]) for r in records if r["split"] == split and "loss" in r and r["step"] not in finite]
        if bad:
            said.append(f"{label}: the {split} loss is not a finite number at step {', '.join(bad[:5])}")
    return said


# --- runs side by side ------------------------------------------------------------------------------------------------


def differing(settings: list[dict[str, Any]], always: tuple[str, ...] = ()) -> list[str]:
    """The keys in which two runs differ that both have it, and those of `always`. Keys that a resumed run may change do not
    count, nor the sizes of a model from scratch where there is none."""
    keys = dict.fromkeys(name for run in settings for name in run if name not in FREE)
    sized = [run for run in settings if run.get("init_from") == "scratch"]
    values = {name: {str(run[name]) for run in (sized if name in SCRATCH else settings) if name in run} for name in keys}
    return [name for name in keys if len(values[name]) > 1 or name in always]


def model_of(init_from: str) -> str:
    """The model that a run's weights first came from: where `init_from` is another run's, what that run began with."""
    for _ in range(10):
        before = Path(init_from).parent
        before = before.parent if before.name == "checkpoints" else before
        try:
            init_from = str(read_config(before).get("init_from", init_from))
        except UserError:  # no run, or a damaged one
            break
    return init_from if "/" not in init_from else Path(init_from).name


def numbers(run: Run) -> list[dict[str, str]]:
    """What a run came to, as {heading: text}, in groups: losses, preferences, times.

    Loss, accuracy and margin are those of the saved model: of the best validation, or else of the last training step. Each
    kind of loss has a heading of its own. Perplexity is exp of a loss that is one a token. The time is the sum of the steps'
    seconds, without validation and saving; tokens/s is the median.
    """
    after = [r for r in run if r["split"] == "val" and r["step"] > 0]  # step 0 is the model before training
    best = min((r for r in after if number(r.get("loss"))), key=lambda r: r["loss"], default={})
    train = series(run, "train", "loss")[1]
    end = best or next((r for r in reversed(run) if r["split"] == "train"), {})
    seconds, speed = (series(run, "train", name)[1] for name in ("step_s", "tokens_per_s"))
    found = {"steps": str(max(r["step"] for r in run))}
    if len(train):
        found[f"train loss ({run.kind()})"] = f"{train[-1]:.3f}"
    if best:
        found |= {f"val loss ({run.kind()})": f"{best['loss']:.3f}", "at step": str(best["step"])}
        if run.kind() == "SFT":
            found["perplexity"] = f"{math.exp(min(best['loss'], 700)):.3f}"
    wanted = {"accuracy": end.get(ACCURACY), "margin": end.get(MARGIN)}
    preferred = {name: f"{value:.3f}" for name, value in wanted.items() if number(value)}
    times = {"minutes": f"{seconds.sum() / 60:.2f}"} if len(seconds) else {}
    times |= {"tokens/s": f"{np.median(speed):.0f}"} if len(speed) else {}
    jumped = ", ".join(str(step) for step, _, _ in jumps(run))
    return [found, preferred, times | ({"loss jumps at": jumped} if jumped else {})]


def run_table(runs: dict[str, Run], folders: dict[str, str]) -> Table:
    """A row a run: its model, the settings that differ, what it came to, and the results in its folder.

    runs, folders: label -> records, and -> path. A heading that no run has anything for is left out.
    """
    keys = differing([run.settings for run in runs.values()], ALWAYS)
    rows = []
    for label, run in runs.items():
        known = {"model": model_of(str(run.settings["init_from"]))} if "init_from" in run.settings else {}
        found: dict[str, str] = {}
        for point in results_in(folders[label])[0]:
            text = rounded(point["value"])
            found[point["measure"]] = f"{found[point['measure']]}, {text}" if point["measure"] in found else text
        *reached, times = numbers(run)
        shown = {name: shorten(run.settings[name]) for name in keys if name in run.settings and name != "init_from"}
        rows.append([{"run": label, **known}, shown, *reached, found, times])
    head = list(dict.fromkeys(name for groups in zip(*rows, strict=True) for group in groups for name in group))
    whole = [{name: text for group in row for name, text in group.items()} for row in rows]
    return [head, *([row.get(name, "-") for name in head] for row in whole)]


def side_by_side(folders: dict[str, str]) -> tuple[dict[str, Run], Table]:
    """The runs in folders (label -> path), and their table. The troubles of each are told on stderr."""
    runs = {label: read_run(folder) for label, folder in folders.items()}
    for label, run in runs.items():
        for text in troubles(label, run):
            warn(text)
    return runs, run_table(runs, folders)


def shorten(value: Any) -> str:
    """A setting as a table shows it: a long path by its end."""
    text = f"{value:g}" if isinstance(value, float) else str(value).lower() if isinstance(value, bool) else str(value)
    return text if len(text) <= 40 else "…" + text[-39:]
