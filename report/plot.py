"""Run folders -> one picture of their curves, and the same as a table.

    python plot.py runs/dpo runs/dpo-ipo --out curves.png --labels "sigmoid,ipo"
    python plot.py runs/small.json runs/medium.json --out winrate.png    # eval_winrate.py's: win rate against model size

Reads only `metrics.jsonl` (and beta from `config.toml`), so a run can be looked at while it goes on. The table needs no
matplotlib.
"""

import argparse
import json
import math
import os
import tomllib
from pathlib import Path
from typing import Any

import numpy as np

from base.errors import UserError, run, warn
from losses import REFERENCE_FREE

Records = list[dict[str, Any]]

# Okabe and Ito's palette, which colour-blind readers can tell apart; from the eighth run on it repeats, dashed
COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000"]
MARKERS = "osD^vPX"
MARGIN, ACCURACY = "rewards/margins", "rewards/accuracies"
GAINS = {"gain/chosen": "rewards/chosen", "gain/rejected": "rewards/rejected"}  # what is drawn, and of which metric it is made


def read_run(folder: str | Path) -> Records:
    """The records of a run folder's metrics.jsonl, in the file's order.

    A last line that does not parse is one the run is still writing, or was killed in: it is left out.
    Raises UserError for a missing or empty file, and for a line before the last that is not a metrics record.
    """
    path = Path(folder) / "metrics.jsonl"
    try:
        lines = path.read_bytes().splitlines()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}: give the out_dir of a run") from None
    records = []
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
            if not isinstance(record["step"], int) or record["split"] not in ("train", "val"):
                raise ValueError
            records.append(record)
        except (ValueError, KeyError, TypeError):
            if number < len(lines):
                raise UserError(f'{path}:{number}: no metrics record {{"step", "split", …}}: mend the line') from None
    if not records:
        raise UserError(f"{path}: no records yet: wait for the run's first step")
    add_gains(records, path.with_name("config.toml"))
    return records


def add_gains(records: Records, config: Path) -> None:
    """Give a DPO run's records log pi - log ref of chosen and rejected, in nats, mean over pairs: a reward over its beta.

    A run without a reference has none, and without its config.toml they stay unknown.
    """
    try:
        settings = tomllib.loads(config.read_text(encoding="utf-8"))
        beta, free = float(settings["beta"]), settings["loss"] in REFERENCE_FREE
    except (OSError, ValueError, KeyError, TypeError):
        return
    for record in records if beta > 0 and not free else []:
        for name, reward in GAINS.items():
            if isinstance(record.get(reward), int | float):
                record[name] = record[reward] / beta


def series(records: Records, split: str, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Steps and values of metric `name`, float64 (n,) each; what is missing, null, inf or nan is left out."""
    points = [(r["step"], r[name]) for r in records if r["split"] == split and isinstance(r.get(name), int | float)]
    points = [point for point in points if math.isfinite(point[1])]
    return tuple(np.array(points, dtype=np.float64).reshape(-1, 2).T)


def smooth(values: np.ndarray) -> np.ndarray:
    """Centred mean under a bell an eighth of the curve wide, cut off at its ends; under 16 points nothing changes."""
    if len(values) < 16:
        return values
    bell = np.hanning(len(values) // 16 * 2 + 3)
    return np.convolve(values, bell, "same") / np.convolve(np.ones(len(values)), bell, "same")


def jumps(records: Records) -> list[tuple[int, float, float]]:
    """Where the training loss jumped: (step, loss before, loss after), once for every 50 records at most.

    A jump is where the median of three losses lies more than 5 robust deviations over the median of the 50 before them (at
    least 10), so that one hard batch is none; or, for small batches, whose losses differ much, the median of 30 more than 1.5
    over that of the 150 before. The robust deviation is 1.4826 times the median distance from that median, and at the least 2%
    of it.
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
    for label, records in runs.items():
        for step, before, after in jumps(records):
            warn(
                f"{label}: the training loss jumped at step {step}, from about {before:.3f} to {after:.3f}: lr may be too high"
            )


def table(runs: dict[str, Records]) -> str:
    """A line a run. Margin and accuracy are the last of validation, or of training where a run has no validation;
    tokens/s is the median over its training records.
    """
    head = "run, steps, last train loss, best val loss, last val loss, lr peak / last, margin, accuracy, tokens/s"
    rows = [head.split(", ")]
    for label, records in runs.items():
        loss, rate, speed = (series(records, "train", name)[1] for name in ("loss", "lr", "tokens_per_s"))
        val_steps, val = series(records, "val", "loss")
        trained = val_steps > 0  # the model that it began with is no result
        val_steps, val = (val_steps[trained], val[trained]) if trained.any() else (val_steps, val)
        row = [label, str(max(r["step"] for r in records)), f"{loss[-1]:.4f}" if len(loss) else "-"]
        row += [f"{val.min():.4f} @ {val_steps[val.argmin()]:.0f}", f"{val[-1]:.4f}"] if len(val) else ["-", "-"]
        row += [f"{rate.max():.2e} / {rate[-1]:.2e}" if len(rate) else "-"]
        for name in (MARGIN, ACCURACY):
            last = [*series(records, "train", name)[1][-1:], *series(records, "val", name)[1][-1:]][-1:]
            row.append(f"{last[0]:.4f}" if last else "-")
        rows.append([*row, f"{np.median(speed):,.0f}" if len(speed) else "-"])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join([row[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(row[1:], widths[1:], strict=True))])
        for row in rows
    )


def draw(runs: dict[str, Records], out: str | Path, title: str = "") -> None:
    """Draw the runs over each other into the PNG file `out`, 1600 pixels wide; it is written whole or not at all.

    runs: label -> records. Panels: loss and learning rate, and for DPO runs accuracy, reward margin and log-prob gains.
    Raises UserError if `out` is no .png or cannot be written, or if matplotlib is missing.
    """
    out = check_out(out)
    try:
        from matplotlib.figure import Figure  # no pyplot: a bare Figure draws with Agg and needs no display
        from matplotlib.lines import Line2D
        from matplotlib.ticker import MaxNLocator
    except ImportError:
        raise UserError(f"matplotlib is needed to draw {out}: pip install matplotlib") from None

    is_dpo = [any(MARGIN in record for record in records) for records in runs.values()]
    loss = "loss (per pair)" if all(is_dpo) else "loss" if any(is_dpo) else "loss (nats per token)"
    labels = {"loss": loss, "lr": "learning rate", ACCURACY: "chosen over rejected (share of pairs)"}
    labels |= {MARGIN: "reward margin (nats)", **{name: f"log-prob gain of {name[5:]} (nats)" for name in GAINS}}
    curves = {name: [[series(r, split, name) for split in ("train", "val")] for r in runs.values()] for name in labels}
    # before the first update the model is the reference itself, which prefers nothing and so is never right
    for pair in curves[ACCURACY]:
        pair[:] = [(at[at > first], values[at > first]) for (at, values), first in zip(pair, (1, 0), strict=True)]
    panels = [name for name in labels if any(len(steps) for run in curves[name] for steps, _ in run)]
    if not panels:
        raise UserError(f"nothing to draw: no finite loss in {', '.join(runs)}")
    rows = 2 if len(panels) > 3 else 1
    columns = -(-len(panels) // rows)
    fig = Figure(figsize=(16, 9.5 if rows == 2 else 6.5), dpi=100, layout="constrained")
    fig.get_layout_engine().set(w_pad=0.12, h_pad=0.1)  # inches
    axes = fig.subplots(rows, columns, squeeze=False, width_ratios=[3, 2] if len(panels) == 2 else None)
    for ax in axes.flat[len(panels) :]:
        ax.remove()
    for name, ax in zip(panels, axes.flat, strict=False):
        for i, ((steps, values), (val_steps, val_values)) in enumerate(curves[name]):
            style = {"color": COLOURS[i % 7], "linestyle": "-" if i < 7 else "--"}
            width = 1.6
            if name == "lr":
                width += 6 * (1 - (i + 1) / len(runs))  # runs often share a schedule: the one below shows on both sides
            else:
                ax.plot(steps, values, color=style["color"], alpha=0.18, linewidth=1, zorder=1)
                values = smooth(values)
            one = "." if len(steps) == 1 else ""  # a line through one point would not show
            ax.plot(steps, values, **style, linewidth=width, marker=one, zorder=2)
            marks = {"marker": MARKERS[i % 7], "markersize": 9, "markeredgecolor": "white"}
            every = max(1, len(val_steps) // 20)
            ax.plot(val_steps, val_values, **style, **marks, markevery=every, linewidth=2.4, zorder=3)
        if name in (MARGIN, ACCURACY, *GAINS):  # where the reference stands
            ax.axhline(0.5 if name == ACCURACY else 0, color="0.3", linewidth=1.4, linestyle=(0, (2, 3)), zorder=1)
        ax.set_xlabel("optimizer step", fontsize=14)
        ax.set_ylabel(labels[name], fontsize=14)
        ax.tick_params(labelsize=12)
        ax.xaxis.set_major_locator(MaxNLocator(nbins=8, steps=[1, 2, 2.5, 5, 10], integer=True, min_n_ticks=1))
        if name == "lr":
            ax.ticklabel_format(axis="y", style="sci", scilimits=(-2, 3), useMathText=True)
            ax.yaxis.get_offset_text().set_size(12)
            ax.set_ylim(bottom=0)
        ax.grid(color="0.9")
        ax.set_axisbelow(True)
        ax.spines[["top", "right"]].set_visible(False)
    gained = [ax for name, ax in zip(panels, axes.flat, strict=False) if name in GAINS]
    for ax in gained:  # to be compared
        ax.set_ylim(*(pick(ax.get_ylim()[side] for ax in gained) for side, pick in ((0, min), (1, max))))
    handles = []
    for i, label in enumerate(runs):
        # matplotlib takes $ for mathematics and leaves out a label that starts with _
        label = (" " if label.startswith("_") else "") + label.replace("$", r"\$")
        handles.append(Line2D([], [], color=COLOURS[i % 7], linestyle="-" if i < 7 else "--", linewidth=4, label=label))
    handles.append(Line2D([], [], color="0.35", linewidth=1.6, label="training (smoothed)"))
    marks = {"marker": "o", "markersize": 9, "markeredgecolor": "white"}
    handles.append(Line2D([], [], color="0.35", linewidth=2.4, **marks, label="validation"))
    longest = max(len(handle.get_label()) for handle in handles)
    columns = max(1, min(len(handles), 1600 // (12 * longest + 90)))  # pixels: a letter is about 12, a line and gaps 90
    fig.legend(handles=handles, loc="outside lower center", ncols=columns, fontsize=14, frameon=False)
    if title:
        fig.suptitle(title, fontsize=18)

    write(fig, out)


def write(fig, out: Path) -> None:
    """A matplotlib Figure -> the PNG file `out`, whole or not at all."""
    temporary = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        try:
            fig.savefig(temporary, format="png")
            temporary.replace(out)
        finally:
            temporary.unlink(missing_ok=True)
    except (FileExistsError, NotADirectoryError, IsADirectoryError, PermissionError) as error:
        raise UserError(f"cannot write {out}: {error.strerror}: choose another --out") from None


# --- win rate against model size --------------------------------------------------------------------------------------


def read_result(path: str | Path) -> dict[str, Any]:
    """What is drawn of a result of eval_winrate.py: label, parameters, value and its interval (low, high), in % or points.

    Raises UserError for any other file, and for a result without a verdict or without the model's size.
    """
    try:
        found = json.loads(Path(path).read_bytes())
        unit, name, scale = ("win rate (%)", "win_rate", 100) if "win_rate" in found else ("score (0 to 100)", "mean", 1)
        value, interval = found[name], found["ci95"]
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{path}: no result of eval_winrate.py --mode pairwise or score (no win_rate or mean)") from None
    if value is None or interval is None:
        raise UserError(f"{path}: holds no verdict, so there is nothing to draw: leave it out")
    if not found.get("parameters"):
        raise UserError(
            f"{path}: the model's size is not in it: judge again with --model or --parameters (nothing is asked anew)"
        )
    numbers = {"value": scale * value, "low": scale * interval[0], "high": scale * interval[1]}
    return {"label": found.get("label") or "", "parameters": found["parameters"], "unit": unit, **numbers, "n": found["n"]}


def size(parameters: float) -> str:
    """124439808 -> "124M"."""
    return f"{parameters / 1e9:.2g}B" if parameters >= 999.5e6 else f"{parameters / 1e6:.0f}M"


def result_table(results: list[dict[str, Any]]) -> str:
    """A line a result, as Markdown."""
    lines = [f"| | parameters | {results[0]['unit']} | 95% interval | judged |", "|---|---|---|---|---|"]
    for r in results:
        lines.append(
            f"| {r['label']} | {size(r['parameters'])} | {r['value']:.1f} | {r['low']:.1f} to {r['high']:.1f} | {r['n']} |"
        )
    return "\n".join(lines)


def draw_results(results: list[dict[str, Any]], out: str | Path, title: str = "") -> None:
    """Draw each label's results over the size of their models, with their intervals, into the PNG file `out`."""
    out = check_out(out)
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise UserError(f"matplotlib is needed to draw {out}: pip install matplotlib") from None

    fig = Figure(figsize=(11, 6.5), dpi=100, layout="constrained")
    ax = fig.subplots()
    sizes = sorted({r["parameters"] for r in results})
    labels = list(dict.fromkeys(r["label"] for r in results))
    for i, label in enumerate(labels):
        mine = sorted((r for r in results if r["label"] == label), key=lambda r: r["parameters"])
        aside = 1.015 ** (i - (len(labels) - 1) / 2)  # so that the bars of one size do not hide each other
        x = [r["parameters"] * aside for r in mine]
        bars = [[r["value"] - r["low"] for r in mine], [r["high"] - r["value"] for r in mine]]
        style = {"color": COLOURS[i % 7], "marker": MARKERS[i % 7], "markersize": 10, "markeredgecolor": "white"}
        name = (" " if label.startswith("_") else "") + label.replace("$", r"\$") or None
        ax.errorbar(x, [r["value"] for r in mine], bars, **style, linewidth=2.4, elinewidth=1.8, capsize=5, label=name)
    if results[0]["unit"].startswith("win"):
        ax.axhline(50, color="0.3", linewidth=1.4, linestyle=(0, (2, 3)), zorder=1)
        ax.annotate(
            "as good as what it is held against", (0.995, 50), (0, 4), ("axes fraction", "data"), "offset points", ha="right"
        )
    ax.set_xscale("log")
    ax.set_xlim(sizes[0] / 1.3, sizes[-1] * 1.3)
    ax.set_ylim(0, max(100 if results[0]["unit"].startswith("score") else 60, *(1.08 * r["high"] for r in results)))
    ax.set_xticks(sizes, [size(p) for p in sizes])
    ax.minorticks_off()
    ax.set_xlabel("parameters", fontsize=14)
    ax.set_ylabel(results[0]["unit"] + ", 95% interval", fontsize=14)
    ax.tick_params(labelsize=12)
    ax.grid(color="0.9")
    ax.set_axisbelow(True)
    ax.spines[["top", "right"]].set_visible(False)
    if any(labels):
        fig.legend(loc="outside lower center", ncols=min(len(labels), 5), fontsize=14, frameon=False)
    if title:
        fig.suptitle(title, fontsize=18)
    write(fig, out)


# --- the command line -------------------------------------------------------------------------------------------------


def check_out(out: str | Path) -> Path:
    """`out` as a Path. Raises UserError if it is not named .png."""
    if Path(out).suffix.lower() != ".png":
        raise UserError(f"cannot draw to {out}: the picture is a PNG: name it FILE.png")
    return Path(out)


class Parser(argparse.ArgumentParser):
    def error(self, message: str):
        raise UserError(f"{message}: see python {self.prog} --help")


def main() -> None:
    parser = Parser(prog="plot.py", description="Curves of one or several runs: a table and a PNG.", allow_abbrev=False)
    what = "out_dir of a run, which holds metrics.jsonl; or results of eval_winrate.py, FILE.json"
    parser.add_argument("folders", nargs="+", metavar="RUN_FOLDER", help=what)
    parser.add_argument("--out", required=True, metavar="FILE.png", help="where the picture goes")
    parser.add_argument("--labels", metavar="A,B", help="a name for each run, instead of its folder's")
    parser.add_argument("--table", choices=["true", "false"], default="true", help="print the table (default: true)")
    args = parser.parse_intermixed_args()

    check_out(args.out)
    if all(name.endswith(".json") for name in args.folders):
        return plot_results(args)
    labels = args.labels.split(",") if args.labels else [Path(folder).resolve().name for folder in args.folders]
    if not args.labels and len(set(labels)) < len(labels):
        labels = args.folders  # runs/a/dpo and runs/b/dpo
    if len(labels) != len(args.folders):
        raise UserError(f"--labels has {len(labels)} names for {len(args.folders)} runs: give each one, commas between")
    if len(set(labels)) < len(labels):
        raise UserError(f"two runs have one name in {', '.join(labels)}: name them apart with --labels")
    runs = {label: read_run(folder) for label, folder in zip(labels, args.folders, strict=True)}
    if args.table == "true":
        print(table(runs), flush=True)
    warn_of_jumps(runs)
    draw(runs, args.out)
    print(f"wrote {args.out}")


def plot_results(args: argparse.Namespace) -> None:
    """Win rates (or scores) against model size; results of one label make a line."""
    results = [read_result(path) for path in args.folders]
    if args.labels:
        labels = args.labels.split(",")
        if len(labels) != len(results):
            raise UserError(f"--labels has {len(labels)} names for {len(results)} results: give each one, commas between")
        results = [{**r, "label": label} for r, label in zip(results, labels, strict=True)]
    if len({r["unit"] for r in results}) > 1:
        raise UserError("some results are win rates and some are scores: draw them apart")
    results.sort(key=lambda r: r["parameters"])
    if args.table == "true":
        print(result_table(results), flush=True)
    draw_results(results, args.out)
    print(f"wrote {args.out}")


if __name__ == "__main__":
    run(main, alone=True)
