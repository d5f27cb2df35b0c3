"""Draw the curves of runs, or the results of evaluations, as PNG, PDF or SVG, and print the same as a table.

    python -m report.plot runs/dpo runs/dpo-ipo --out curves.png --labels "sigmoid,ipo"
    python -m report.plot runs/small.json runs/medium.json --out results.pdf    # results of any eval script

The table needs no matplotlib.
"""

from base.script import run

import io
import re
import textwrap
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from base.errors import UserError, warn
from base.files import write_whole
from report.formats import aligned, markdown, turned
from report.results import MEASURES, Points, read_result, result_table, size
from report.runs import ACCURACY, GAINS, MARGIN, Run, series, side_by_side
from runtime import config
from runtime.config import REQUIRED, key

T = TypeVar("T")

# Okabe and Ito's palette, which colour-blind readers can tell apart; from the eighth run on it repeats, dashed
COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000"]
MARKERS = "osD^vPX"
EAST_ASIAN = (
    "Noto Sans CJK JP|Noto Sans CJK SC|Source Han Sans|WenQuanYi Zen Hei|WenQuanYi Micro Hei|IPAGothic|Droid Sans Fallback"
    "|Hiragino Sans|PingFang SC|Microsoft YaHei|Yu Gothic|Malgun Gothic|Unifont"
).split("|")
NEUTRAL = {"color": "0.3", "linewidth": 1.4, "linestyle": (0, (2, 3)), "zorder": 1}  # where nothing is won and nothing lost


# --- pictures: what all of them share ---------------------------------------------------------------------------------


def figure(out: str | Path, width: float, height: float):
    """An empty matplotlib Figure of so many inches at 100 dots each. It needs no display.

    Raises UserError, naming `out`, the file it is for, if matplotlib is missing.
    """
    try:
        from matplotlib import rcParams
        from matplotlib.figure import Figure  # not pyplot, which looks for a display
    except ImportError:
        raise UserError(f"matplotlib is needed to draw {out}: pip install matplotlib") from None
    rcParams["font.family"] = ["sans-serif", *east_asian()]
    return Figure(figsize=(width, height), dpi=100, layout="constrained")


def grid(out: str | Path, n: int, columns: int, width: float, **options: Any):
    """(a Figure so many inches wide, its n panels in rows of `columns`). options: those of matplotlib's subplots."""
    rows = -(-n // columns)
    fig = figure(out, width, 6.5 if rows == 1 else 4.75 * rows)
    fig.get_layout_engine().set(w_pad=0.12, h_pad=0.1)  # inches
    axes = fig.subplots(rows, columns, squeeze=False, **options).flatten()
    for ax in axes[n:]:
        ax.remove()
    return fig, axes[:n]


def east_asian() -> list[str]:
    """The first installed font with Chinese, Japanese and Korean letters; matplotlib takes it where another lacks a letter."""
    from matplotlib.font_manager import fontManager

    return [name for name in EAST_ASIAN if name in fontManager.get_font_names()][:1]


def save(fig, out: str | Path, **options: Any) -> None:
    """Write a Figure to the file `out`, .png, .pdf or .svg, whole or not at all. options: those of matplotlib's savefig.

    Warns of letters that no installed font has.
    """
    picture = io.BytesIO()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        fig.savefig(picture, format=Path(out).suffix[1:], **options)
    write_whole(out, picture.getvalue())
    missing = {chr(int(found[1])) for w in said if (found := re.match(r"Glyph (\d+)", str(w.message)))}
    if missing:
        some = "".join(sorted(missing)[:8])
        warn(f"{out}: no font here has {len(missing)} of its letters ({some}), boxes stand there: install Noto Sans CJK")


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
    return (" " if label.startswith("_") else "") + label.encode(errors="replace").decode().replace("$", r"\$")


# --- runs -------------------------------------------------------------------------------------------------------------


def smooth(values: np.ndarray) -> np.ndarray:
    """Centred mean under a bell an eighth of the curve wide; under 16 points nothing changes.

    Near an end the bell is as narrow as the way to the end: so the first and the last value stay, and a slope is not bent.
    """
    half = len(values) // 16
    if not half:
        return values
    bells = [np.hanning(2 * reach + 3)[1:-1] for reach in range(half + 1)]
    smoothed = np.convolve(values, bells[half] / bells[half].sum(), "same")
    for reach, bell in enumerate(bells[:half]):
        for at in (reach, len(values) - 1 - reach):
            smoothed[at] = np.average(values[at - reach : at + reach + 1], weights=bell)
    return smoothed


def runs_figure(runs: dict[str, Run], out: str | Path):
    """Panels: the loss, one panel for each kind, and the learning rate; for preference runs accuracy, reward margin and
    log-prob gains.

    out: the file that a message is to name. Raises UserError if there is nothing to draw, or if matplotlib is missing.
    """
    kinds = dict.fromkeys(run.kind() for run in runs.values())
    names = {
        f"loss {kind}": "loss (nats per token)" if kind == "SFT" else f"{legend_text(kind)} loss (per pair)" for kind in kinds
    }
    names |= {"lr": "learning rate", ACCURACY: "chosen over rejected (share of pairs)"}
    names |= {MARGIN: "reward margin (nats)", **{name: f"log-prob gain of {name[5:]} (nats)" for name in GAINS}}
    curves = {name: [[series(r, split, name) for split in ("train", "val")] for r in runs.values()] for name in names}
    for kind in kinds:
        shown = [run if run.kind() == kind else [] for run in runs.values()]
        curves[f"loss {kind}"] = [[series(r, split, "loss") for split in ("train", "val")] for r in shown]
    # before the first update the model is the reference itself, which prefers nothing and so is never right
    for pair in curves[ACCURACY]:
        pair[:] = [(at[at > first], values[at > first]) for (at, values), first in zip(pair, (1, 0), strict=True)]
    curves = {name: runs for name, runs in curves.items() if any(len(steps) for run in runs for steps, _ in run)}
    if not curves:
        raise UserError(f"nothing to draw: no finite loss in {', '.join(runs)}")

    columns = len(curves) if len(curves) <= 3 else max(-(-len(curves) // 2), 3) if len(curves) <= 8 else 4
    fig, axes = grid(out, len(curves), columns, 16, width_ratios=[3, 2] if len(curves) == 2 else None)
    panels = dict(zip(curves, axes, strict=True))
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
    return fig


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


# --- results ----------------------------------------------------------------------------------------------------------


def results_figure(points: Points, out: str | Path):
    """Lines over the models' sizes where all are known and differ; else bars; a reward over its KL where that was measured.

    out: the file that a message is to name. Raises UserError if matplotlib is missing.
    """
    measures: dict[str, Points] = {}
    for point in points:
        measures.setdefault(point["measure"], []).append(point)
    if any("kl" in point for point in points):
        measures = {name: group for name, group in measures.items() if not name.startswith("KL ")}  # it is an axis
    columns = min(len(measures), 3)
    fig, axes = grid(out, len(measures), columns, 11 if columns == 1 else 7 * columns)
    colours = {label: i % 7 for i, label in enumerate(dict.fromkeys(p["label"] for p in points))}
    for ax, (name, group) in zip(axes, measures.items(), strict=True):
        if all("kl" in p for p in group):
            draw_frontier(ax, group, colours)
        elif len({p["parameters"] for p in group}) > 1 and all(p["parameters"] for p in group):
            draw_sizes(ax, group, colours)
        else:
            draw_bars(ax, group, colours)
        for chance in {p["chance"] for p in group} - {None}:
            ax.axhline(chance, **NEUTRAL)
        dress(ax, ax.get_xlabel(), "")
        ax.set_title("\n".join(textwrap.wrap(legend_text(name), 45)), fontsize=14)
        ax.margins(y=0.12)
        least = 60 if "(%)" in name else 100 if name == MEASURES["mean"][0] else 0  # a reward's rule may be score.py:f
        if least:
            ax.set_ylim(0, max(least, *(1.08 * (p["high"] or p["value"]) for p in group)))
    fig.suptitle("with 95% intervals", fontsize=11, color="0.3")
    handles = {}
    for ax in axes:
        handles |= {label: handle for handle, label in zip(*ax.get_legend_handles_labels(), strict=True)}
    if handles:
        style = {"ncols": min(len(handles), 5), "fontsize": 14, "frameon": False}
        fig.legend(handles.values(), handles, loc="outside lower center", **style)
    return fig


def look(colour: int) -> dict[str, Any]:
    """How a label's points look."""
    style = {"color": COLOURS[colour], "marker": MARKERS[colour], "markersize": 10, "markeredgecolor": "white"}
    return {**style, "elinewidth": 1.8, "capsize": 5}


def arms(points: Points) -> list[list[float]]:
    """How far the intervals reach below and above the values; 0 where there is none."""
    ends = [(p["value"], *((p["value"],) * 2 if p["low"] is None else (p["low"], p["high"]))) for p in points]
    return [[max(value - low, 0) for value, low, _ in ends], [max(high - value, 0) for value, _, high in ends]]


def draw_sizes(ax, points: Points, colours: dict[str, int]) -> None:
    """A line a label over the models' sizes."""
    sizes = sorted({p["parameters"] for p in points})
    labels = list(dict.fromkeys(p["label"] for p in points))
    for i, label in enumerate(labels):
        mine = sorted((p for p in points if p["label"] == label), key=lambda p: p["parameters"])
        aside = 1.015 ** (i - (len(labels) - 1) / 2)  # so that intervals of one size do not hide each other
        style = {**look(colours[label]), "linewidth": 2.4, "label": legend_text(label) or None}
        ax.errorbar([p["parameters"] * aside for p in mine], [p["value"] for p in mine], arms(mine), **style)
    ax.set_xlabel("parameters")
    ax.set_xscale("log")
    ax.set_xlim(sizes[0] / 1.3, sizes[-1] * 1.3)
    ax.set_xticks(sizes, [size(p) for p in sizes])
    ax.minorticks_off()


def draw_bars(ax, points: Points, colours: dict[str, int]) -> None:
    """A bar a point."""
    style = {"color": [COLOURS[colours[p["label"]]] for p in points], "capsize": 5, "width": min(0.7, 0.2 * len(points))}
    bars = ax.bar(range(len(points)), [p["value"] for p in points], yerr=arms(points), **style)
    ax.bar_label(bars, [f"{p['value']:.3g}" for p in points], padding=3, fontsize=12)
    names = [legend_text("\n".join(textwrap.wrap(p["label"], 14))) or "-" for p in points]
    ax.set_xticks(range(len(points)), names, rotation=0 if len(points) < 6 else 30)
    ax.set_xlim(-0.6, len(points) - 0.4)


def draw_frontier(ax, points: Points, colours: dict[str, int]) -> None:
    """Each reward over the KL divergence that it cost; and the limit that no method can pass."""
    for p in points:
        style = {**look(colours[p["label"]]), "linestyle": "", "label": legend_text(p["label"])}
        ax.errorbar([p["kl"]["value"]], [p["value"]], arms([p]), arms([p["kl"]]), **style)
    limit = max((p["limit"] for p in points), key=len)
    if limit:
        ax.plot(*zip(*limit, strict=True), color="0.3", label="limit")
    ax.set_xlabel("KL from the reference (nats)")


# --- the command line -------------------------------------------------------------------------------------------------


@dataclass
class Config:
    """Curves of runs, or results of evaluations: a table and a picture."""

    out: str = key(REQUIRED, "the picture to draw: .png, .pdf or .svg", writes=".png .pdf .svg")
    labels: str = key("", "a name for each path, commas between, instead of its folder's or file's")


def command(cls: type[T], name: str) -> tuple[list[str], T]:
    """Read `python -m name PATH … --key value`, in any order: (the paths, the settings)."""
    paths: list[str] = []
    settings = config.load(cls, prog=f"-m {name} PATH …", paths=paths)
    if not paths:
        raise UserError(f"{config.COMMAND_LINE}: no path: see python -m {name} --help")
    return paths, settings


def names_of(paths: list[str], labels: str) -> list[str]:
    """A name for each path, from `A,B`; else that of its file or folder, with the folder around it where two are alike.

    Raises UserError where there are more or fewer labels than paths.
    """
    if labels:
        names = labels.split(",")
        if len(names) != len(paths):
            raise UserError(f"--labels has {len(names)} names for {len(paths)} results or runs: give each one, commas between")
        return names
    places = [Path(path).resolve() for path in paths]
    names = [place.name.partition(".json")[0] for place in places]
    alike = len(set(names)) < len(names)
    return [f"{place.parent.name}/{name}" for place, name in zip(places, names, strict=True)] if alike else names


def by_label(labels: str, paths: list[str]) -> dict[str, str]:
    """{label: path}. UserError where two paths have one name."""
    names = names_of(paths, labels)
    if len(set(names)) < len(names):
        raise UserError(f"two of {', '.join(names)} have one name: tell them apart with --labels")
    return dict(zip(names, paths, strict=True))


def read_results(paths: list[str], labels: str = "") -> Points:
    """The points of result files, with a label each: the given one, the result's own, or the name of its file or folder."""
    names = zip(names_of(paths, labels), paths, strict=True)
    return [{**p, "label": name if labels else p["label"] or name} for name, path in names for p in read_result(path)]


def main() -> None:
    paths, cfg = command(Config, "report.plot")
    if all(path.endswith(".json") for path in paths):
        points = read_results(paths, cfg.labels)
        print(markdown(result_table(points)), end="", flush=True)
        save(results_figure(points, cfg.out), cfg.out)
    else:
        runs, table = side_by_side(by_label(cfg.labels, paths))
        print("\n".join(aligned(turned(table))), flush=True)
        save(runs_figure(runs, cfg.out), cfg.out)
    print(f"wrote {cfg.out}")


if __name__ == "__main__":
    run(main, alone=True)
