"""Draw the curves of runs, or win rates against model size, into a PNG, and print the same as a table.

    python -m report.plot runs/dpo runs/dpo-ipo --out curves.png --labels "sigmoid,ipo"
    python -m report.plot runs/small.json runs/medium.json --out winrate.png    # results of eval_winrate.py

The table needs no matplotlib.
"""

from base.script import run

import io
import itertools
import math
import textwrap
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from base.errors import UserError
from base.files import parse_json, read_plain, write_whole
from report.runs import ACCURACY, GAINS, MARGIN, Records, read_run, series, warn_of_jumps
from runtime import config
from runtime.config import REQUIRED, key

T = TypeVar("T")

# Okabe and Ito's palette, which colour-blind readers can tell apart; from the eighth run on it repeats, dashed
COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000"]
MARKERS = "osD^vPX"
NEUTRAL = {"color": "0.3", "linewidth": 1.4, "linestyle": (0, (2, 3)), "zorder": 1}  # where nothing is won and nothing lost


# --- pictures: what all of them share ---------------------------------------------------------------------------------


def figure(out: str | Path, width: float, height: float):
    """An empty matplotlib Figure of so many inches at 100 dots each. It needs no display.

    Raises UserError, naming `out`, the file it is for, if matplotlib is missing.
    """
    try:
        from matplotlib.figure import Figure  # not pyplot, which looks for a display
    except ImportError:
        raise UserError(f"matplotlib is needed to draw {out}: pip install matplotlib") from None
    return Figure(figsize=(width, height), dpi=100, layout="constrained")


def save(fig, out: str | Path, **options: Any) -> None:
    """Write a Figure to the PNG file `out`, whole or not at all. options: those of matplotlib's savefig."""
    picture = io.BytesIO()
    fig.savefig(picture, format="png", **options)
    write_whole(out, picture.getvalue())


def dress(ax, xlabel: str, ylabel: str) -> None:
    """Labels, grid and frame of one panel."""
    ax.set_xlabel(xlabel, fontsize=14)
    ax.set_ylabel(ylabel, fontsize=14)
    ax.tick_params(labelsize=12)
    ax.grid(color="0.9")
    ax.set_axisbelow(True)
    ax.spines[["top", "right"]].set_visible(False)


def legend_text(label: str) -> str:
    """`label` as matplotlib shows it unchanged: it takes $ for mathematics and leaves out a label that starts with _."""
    return (" " if label.startswith("_") else "") + label.replace("$", r"\$")


# --- runs -------------------------------------------------------------------------------------------------------------


def smooth(values: np.ndarray) -> np.ndarray:
    """Centred mean under a bell an eighth of the curve wide, cut off at its ends; under 16 points nothing changes."""
    if len(values) < 16:
        return values
    bell = np.hanning(len(values) // 16 * 2 + 3)
    return np.convolve(values, bell, "same") / np.convolve(np.ones(len(values)), bell, "same")


def table(runs: dict[str, Records]) -> str:
    """One line a run. Margin and accuracy are the last of validation, or of training where a run has no validation;
    tokens/s is the median over its training records.
    """
    head = "run, steps, last train loss, best val loss, last val loss, lr peak / last, margin, accuracy, tokens/s"
    rows = [head.split(", ")]
    for label, records in runs.items():
        loss, rate, speed = (series(records, "train", name)[1] for name in ("loss", "lr", "tokens_per_s"))
        steps, val = series(records, "val", "loss")
        if steps.any():  # step 0 is the model before training
            steps, val = steps[steps > 0], val[steps > 0]
        row = [label, str(max(r["step"] for r in records)), f"{loss[-1]:.4f}" if len(loss) else "-"]
        row += [f"{val.min():.4f} @ {steps[val.argmin()]:.0f}", f"{val[-1]:.4f}"] if len(val) else ["-", "-"]
        row += [f"{rate.max():.2e} / {rate[-1]:.2e}" if len(rate) else "-"]
        for name in (MARGIN, ACCURACY):
            last = [*series(records, "train", name)[1][-1:], *series(records, "val", name)[1][-1:]][-1:]
            row.append(f"{last[0]:.4f}" if last else "-")
        rows.append([*row, f"{np.median(speed):,.0f}" if len(speed) else "-"])
    return "\n".join(aligned(rows))


def aligned(table: list[list[str]], texts: int = 1, most: int = 1000) -> list[str]:
    """Each row of a table as lines of plain text, its cells broken into lines of `most` letters and padded to one width.

    texts: how many columns are text; those after them are numbers, and are aligned on the right.
    """
    cells = [
        [[part for line in text.splitlines() for part in textwrap.wrap(line, most) or [""]] for text in row] for row in table
    ]
    widths = [max(len(line) for cell in column for line in cell) for column in zip(*cells, strict=True)]
    row_format = "  ".join(f"{{:{'<' if i < texts else '>'}{width}}}" for i, width in enumerate(widths))
    return ["\n".join(row_format.format(*line) for line in itertools.zip_longest(*row, fillvalue="")) for row in cells]


def draw(runs: dict[str, Records], out: str | Path) -> None:
    """Draw the runs (label -> records) over each other into the PNG file `out`, 1600 pixels wide.

    Panels: loss and learning rate, and for DPO runs accuracy, reward margin and log-prob gains. Raises UserError if there is
    nothing to draw, or if matplotlib is missing.
    """
    is_dpo = [any(MARGIN in record for record in records) for records in runs.values()]
    loss = "loss (per pair)" if all(is_dpo) else "loss" if any(is_dpo) else "loss (nats per token)"
    names = {"loss": loss, "lr": "learning rate", ACCURACY: "chosen over rejected (share of pairs)"}
    names |= {MARGIN: "reward margin (nats)", **{name: f"log-prob gain of {name[5:]} (nats)" for name in GAINS}}
    curves = {name: [[series(r, split, name) for split in ("train", "val")] for r in runs.values()] for name in names}
    # before the first update the model is the reference itself, which prefers nothing and so is never right
    for pair in curves[ACCURACY]:
        pair[:] = [(at[at > first], values[at > first]) for (at, values), first in zip(pair, (1, 0), strict=True)]
    curves = {name: runs for name, runs in curves.items() if any(len(steps) for run in runs for steps, _ in run)}
    if not curves:
        raise UserError(f"nothing to draw: no finite loss in {', '.join(runs)}")

    rows = 2 if len(curves) > 3 else 1
    fig = figure(out, 16, 9.5 if rows == 2 else 6.5)
    fig.get_layout_engine().set(w_pad=0.12, h_pad=0.1)  # inches
    ratios = [3, 2] if len(curves) == 2 else None
    axes = fig.subplots(rows, -(-len(curves) // rows), squeeze=False, width_ratios=ratios).flatten()
    for ax in axes[len(curves) :]:
        ax.remove()
    panels = dict(zip(curves, axes, strict=False))
    for name, ax in panels.items():
        draw_panel(ax, name, dict(zip(runs, curves[name], strict=True)))
        dress(ax, "optimizer step", names[name])
    gains = [panels[name] for name in GAINS if name in panels]
    for ax in gains[1:]:  # one scale, so that the two can be compared
        ax.sharey(gains[0])
        ax.autoscale(axis="y")
    columns = max(1, min(len(runs), 1600 // (12 * max(map(len, runs)) + 90)))  # pixels: a letter is about 12
    style = {"loc": "outside lower center", "ncols": columns, "fontsize": 14, "frameon": False}
    fig.legend(*axes[0].get_legend_handles_labels(), **style, title="thin: training, smoothed; with marks: validation")
    save(fig, out)


def draw_panel(ax, name: str, curves: dict[str, list]) -> None:
    """Draw one metric of all runs. curves: label -> (steps, values) of training and of validation."""
    from matplotlib.ticker import MaxNLocator

    for i, (label, ((steps, values), (val_steps, val_values))) in enumerate(curves.items()):
        style = {"color": COLOURS[i % 7], "linestyle": "-" if i < 7 else "--"}
        width = 1.6
        if name == "lr":
            width += 6 * (1 - (i + 1) / len(curves))  # runs often share a schedule: the one below shows on both sides
        else:
            ax.plot(steps, values, color=style["color"], alpha=0.18, linewidth=1, zorder=1)
            values = smooth(values)
        ax.plot(steps, values, **style, linewidth=width, marker="." if len(steps) == 1 else "", zorder=2)
        style |= {"marker": MARKERS[i % 7], "markersize": 9, "markeredgecolor": "white", "label": legend_text(label)}
        ax.plot(val_steps, val_values, **style, markevery=max(1, len(val_steps) // 20), linewidth=2.4, zorder=3)
    if name in (MARGIN, ACCURACY, *GAINS):  # where the reference stands
        ax.axhline(0.5 if name == ACCURACY else 0, **NEUTRAL)
    ax.xaxis.set_major_locator(MaxNLocator(nbins=8, steps=[1, 2, 2.5, 5, 10], integer=True, min_n_ticks=1))
    if name == "lr":
        ax.ticklabel_format(axis="y", style="sci", scilimits=(-2, 3), useMathText=True)
        ax.set_ylim(bottom=0)


# --- win rate against model size --------------------------------------------------------------------------------------


def read_result(path: str | Path) -> dict[str, Any]:
    """Read a result of eval_winrate.py: label, parameters, unit, value and its interval (low, high), in % or points, n.

    Raises UserError for any other file, and for a result without a verdict or without the model's size.
    """
    try:
        found = parse_json(read_plain(Path(path)))
        unit, name, scale = ("win rate (%)", "win_rate", 100) if "win_rate" in found else ("score (0 to 100)", "mean", 1)
        value, n, (low, high) = found[name], found["n"], (None, None) if found["ci95"] is None else found["ci95"]
        if not all(x is None or isinstance(x, int | float) for x in (value, low, high, found.get("parameters"))):
            raise TypeError
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}: name a result of eval_winrate.py") from None
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{path}: no result of eval_winrate.py --mode pairwise or score: it has no win_rate or mean") from None
    if None in (value, low, high):
        raise UserError(f"{path}: holds no verdict, so there is nothing to draw: leave it out")
    if not 0 < (found.get("parameters") or 0) < math.inf:
        raise UserError(f"{path}: does not hold the model's size: judge again with --model or --parameters (verdicts are kept)")
    numbers = {"value": scale * value, "low": scale * low, "high": scale * high}
    return {"label": str(found.get("label") or ""), "parameters": found["parameters"], "unit": unit, **numbers, "n": n}


def size(parameters: float) -> str:
    """124439808 -> "124M"."""
    return f"{parameters / 1e9:.2g}B" if parameters >= 999.5e6 else f"{parameters / 1e6:.0f}M"


def result_table(results: list[dict[str, Any]]) -> str:
    """One line a result, as Markdown."""
    lines = [f"| | parameters | {results[0]['unit']} | 95% interval | judged |", "|---|---|---|---|---|"]
    for r in results:
        interval = f"{r['low']:.1f} to {r['high']:.1f}"
        lines.append(f"| {r['label']} | {size(r['parameters'])} | {r['value']:.1f} | {interval} | {r['n']} |")
    return "\n".join(lines)


def draw_results(results: list[dict[str, Any]], out: str | Path) -> None:
    """Draw each label's results over the size of their models, with their intervals, into the PNG file `out`."""
    fig = figure(out, 11, 6.5)
    ax = fig.subplots()
    sizes = sorted({r["parameters"] for r in results})
    labels = list(dict.fromkeys(r["label"] for r in results))
    for i, label in enumerate(labels):
        mine = [r for r in results if r["label"] == label]
        aside = 1.015 ** (i - (len(labels) - 1) / 2)  # so that intervals of one size do not hide each other
        bars = [[r["value"] - r["low"] for r in mine], [r["high"] - r["value"] for r in mine]]
        style = {"color": COLOURS[i % 7], "marker": MARKERS[i % 7], "markersize": 10, "markeredgecolor": "white"}
        style |= {"linewidth": 2.4, "elinewidth": 1.8, "capsize": 5, "label": legend_text(label) or None}
        ax.errorbar([r["parameters"] * aside for r in mine], [r["value"] for r in mine], bars, **style)
    win_rate = results[0]["unit"].startswith("win")
    if win_rate:
        ax.axhline(50, **NEUTRAL)
    dress(ax, "parameters", results[0]["unit"] + ", 95% interval")
    ax.set_xscale("log")
    ax.set_xlim(sizes[0] / 1.3, sizes[-1] * 1.3)
    ax.set_ylim(0, max(60 if win_rate else 100, *(1.08 * r["high"] for r in results)))
    ax.set_xticks(sizes, [size(p) for p in sizes])
    ax.minorticks_off()
    if any(labels):
        fig.legend(loc="outside lower center", ncols=min(len(labels), 5), fontsize=14, frameon=False)
    save(fig, out)


# --- the command line -------------------------------------------------------------------------------------------------


@dataclass
class Config:
    """Curves of runs, or win rates against model size: a table and a PNG."""

    out: str = key(REQUIRED, "the PNG file to draw", writes=".png")
    labels: str = key("", "a name for each path, commas between, instead of its folder's or file's")


def command(cls: type[T], name: str) -> tuple[list[str], T]:
    """Read `python -m name PATH … --key value`, in any order: (the paths, the settings)."""
    paths: list[str] = []
    settings = config.load(cls, prog=f"-m {name} PATH …", paths=paths)
    if not paths:
        raise UserError(f"{config.COMMAND_LINE}: no path: see python -m {name} --help")
    return paths, settings


def split_labels(labels: str, paths: list[str]) -> list[str]:
    """`A,B` -> one label for each path. Raises UserError where there are more or fewer."""
    names = labels.split(",")
    if len(names) != len(paths):
        raise UserError(f"--labels has {len(names)} names for {len(paths)} results or runs: give each one, commas between")
    return names


def by_label(labels: str, paths: list[str]) -> dict[str, str]:
    """{label: path}. Without labels it is the folder's or file's name."""
    names = split_labels(labels, paths) if labels else [Path(path).resolve().name.split(".jsonl")[0] for path in paths]
    if len(set(names)) < len(names):
        raise UserError(f"two of {', '.join(names)} have one name: tell them apart with --labels")
    return dict(zip(names, paths, strict=True))


def main() -> None:
    paths, cfg = command(Config, "report.plot")
    if all(path.endswith(".json") for path in paths):
        results = [read_result(path) for path in paths]
        if cfg.labels:
            results = [{**r, "label": label} for r, label in zip(results, split_labels(cfg.labels, paths), strict=True)]
        if len({r["unit"] for r in results}) > 1:
            raise UserError("some results are win rates and some are scores: draw them apart")
        results.sort(key=lambda r: r["parameters"])
        print(result_table(results), flush=True)
        draw_results(results, cfg.out)
    else:
        runs = {label: read_run(folder) for label, folder in by_label(cfg.labels, paths).items()}
        print(table(runs), flush=True)
        warn_of_jumps(runs)
        draw(runs, cfg.out)
    print(f"wrote {cfg.out}")


if __name__ == "__main__":
    run(main, alone=True)
