"""The curves of runs: what is drawn, what the table says, and what is refused."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from base.errors import UserError
from report import plot
from report.runs import ACCURACY, MARGIN, Run, read_run, run_table

ROOT = Path(__file__).parents[2]


def record(step, split="train", loss=1.0, **more):
    return {"step": step, "split": split, "loss": loss, **more}


SFT = [record(s, loss=4 - s / 10, lr=1e-4 / s, tokens_per_s=1000.0 + s) for s in range(1, 21)]
SFT += [record(10, "val", 3.5), record(20, "val", 3.75)]
DPO = [record(s, loss=0.7 - s / 100, lr=1e-5, **{MARGIN: s / 10, ACCURACY: 0.5}) for s in range(1, 21)]
DPO += [record(20, "val", 0.6, **{MARGIN: 1.25, ACCURACY: 0.625})]


@pytest.fixture
def figure(tmp_path):
    """figure(runs) draws them and returns the matplotlib Figure."""
    pytest.importorskip("matplotlib")
    out = tmp_path / "new" / "deep" / "x.png"

    def make(runs):
        fig = plot.runs_figure({label: Run(records) for label, records in runs.items()}, out)
        plot.save(fig, out)
        return fig

    return make


@pytest.mark.parametrize("n", [0, 1, 2, 15, 16, 17, 400])
def test_smooth_keeps_length_and_level_and_lowers_noise(n):
    assert np.allclose(plot.smooth(np.full(n, 3.0)), np.full(n, 3.0))
    noise = np.random.default_rng(0).normal(size=n)
    assert plot.smooth(noise).shape == (n,)
    assert n < 400 or plot.smooth(noise).std() < 0.5 * noise.std()


@pytest.mark.parametrize("n", [16, 60, 400])
def test_smooth_keeps_the_first_and_the_last_value_and_a_slope(n):
    falling = 4.22 - np.linspace(0, 3, n)
    assert np.allclose(plot.smooth(falling), falling)
    noisy = falling + np.random.default_rng(0).normal(size=n)
    assert plot.smooth(noisy)[[0, -1]].tolist() == noisy[[0, -1]].tolist()


def test_table(tmp_path):
    runs = {"sft": Run(SFT), "a longer name": Run(DPO), "val only": Run([record(3, "val", 1.5)])}
    head, sft, dpo, val = run_table(runs, dict.fromkeys(runs, str(tmp_path)))
    rows = [dict(zip(head, row, strict=True)) for row in (sft, dpo, val)]
    shown = [{name: text for name, text in row.items() if text != "-"} for row in rows]
    losses = {"train loss (SFT)": "2.000", "val loss (SFT)": "3.500", "at step": "10", "perplexity": "33.115"}
    assert shown[0] == {"run": "sft", "steps": "20", **losses, "tokens/s": "1010"}
    losses = {"train loss (DPO)": "0.500", "val loss (DPO)": "0.600", "at step": "20"}
    preferred = {"accuracy": "0.625", "margin": "1.250"}  # validation's, not training's 2.0
    assert shown[1] == {"run": "a longer name", "steps": "20", **losses, **preferred}
    assert shown[2] == {"run": "val only", "steps": "3", "val loss (SFT)": "1.500", "at step": "3", "perplexity": "4.482"}


def test_each_kind_of_loss_has_a_panel(folder, tmp_path):
    pytest.importorskip("matplotlib")
    paths = [folder("sft", SFT), *(folder(loss, DPO, f'loss = "{loss}"\n') for loss in ("sigmoid", "ipo"))]
    fig = plot.runs_figure({Path(path).name: read_run(path) for path in paths}, "x.png")
    assert [ax.get_ylabel() for ax in fig.axes][:3] == [
        "loss (nats per token)",
        "sigmoid loss (per pair)",
        "ipo loss (per pair)",
    ]
    for ax, mine in zip(fig.axes, ([10, 20], [20], [20]), strict=False):
        marked = [line.get_xdata().tolist() for line in ax.lines if line.get_marker() in set(plot.MARKERS)]
        assert sorted(marked) == [[], [], mine], "the other kinds' runs are not in it"


def test_panels(figure, tmp_path):
    """A run gets the panels that it has metrics for; the two gains are on one scale."""
    assert [ax.get_ylabel() for ax in figure({"sft": SFT}).axes] == ["loss (nats per token)", "learning rate"]
    gains = [{**r, "gain/chosen": r["step"] / 10, "gain/rejected": -5.0} for r in DPO]
    axes = figure({"dpo": gains}).axes
    names = ["DPO loss", "learning rate", "chosen over rejected", "reward margin"]
    assert [ax.get_ylabel().partition(" (")[0] for ax in axes] == [
        *names,
        "log-prob gain of chosen",
        "log-prob gain of rejected",
    ]
    assert axes[4].get_ylim() == axes[5].get_ylim() and axes[4].get_ylim()[0] < -5 and axes[4].get_ylim()[1] > 2
    picture = (tmp_path / "new" / "deep" / "x.png").read_bytes()
    assert picture[:8] == b"\x89PNG\r\n\x1a\n" and int.from_bytes(picture[16:20], "big") == 1600


def test_accuracy_begins_with_the_first_update(figure):
    values = {0: 0.0, 1: 0.6, 2: 0.7}
    records = [record(s, "val", **{MARGIN: 0.0, ACCURACY: values[s]}) for s in values]
    records += [record(s, **{MARGIN: 0.0, ACCURACY: values[s]}) for s in (1, 2)]
    lines = figure({"dpo": records}).axes[1].lines
    shown = [line.get_ydata().tolist() for line in lines if len(line.get_xdata()) and line.get_color() != "0.3"]
    assert shown == [[0.7], [0.7], [0.6, 0.7]]  # training, training smoothed, validation


def test_single_points_show_and_every_run_is_in_the_one_legend(figure):
    fig = figure({"a": DPO, "_b": [record(1), record(1, "val", 2.0)], "$c": SFT})
    lines = [line for ax in fig.axes[:2] for line in ax.lines if len(line.get_xdata()) == 1]  # both kinds of loss
    shown = [float(line.get_ydata()[0]) for line in lines if line.get_marker() not in ("", "None", None)]
    assert sorted(shown) == [0.6, 1.0, 2.0]  # DPO's one validation point, and both of _b
    assert not any(ax.get_legend() for ax in fig.axes) and len(fig.legends) == 1
    assert [text.get_text().strip().replace("\\", "") for text in fig.legends[0].get_texts()] == ["a", "_b", "$c"]
    assert len({line.get_color() for line in fig.axes[0].lines}) == 3


def test_labels():
    assert plot.by_label("", ["x/run/", "z/other.jsonl"]) == {"run": "x/run/", "other": "z/other.jsonl"}
    assert plot.by_label("one,two", ["x/run", "y/run"]) == {"one": "x/run", "two": "y/run"}
    assert plot.by_label("", ["x/run", "y/run"]) == {"x/run": "x/run", "y/run": "y/run"}
    for labels, words in (("a,a", "one name"), ("a", "1 names for 2")):
        with pytest.raises(UserError, match=words):
            plot.by_label(labels, ["x/run", "y/run"])
    with pytest.raises(UserError, match="one name"):
        plot.by_label("", ["x/run", "y/../x/run"])


def test_what_cannot_be_drawn(folder, refused, call, tmp_path, monkeypatch):
    run, bad, out = folder("sft", SFT), folder("bad", [record(1, loss=float("nan"))]), tmp_path / "x.png"
    refused("report.plot", run, says="--out")
    refused("report.plot", "--out", out, says="no path")
    refused("report.plot", run, "--out", tmp_path / "x.gif", says="must end in .png or .pdf or .svg")
    refused("report.plot", run, "--out", out, "--lables", "a", says="'labels'")
    refused("report.plot", run, tmp_path / "nowhere", "--out", out, says="nowhere")
    refused("report.plot", bad, "--out", out, says="nothing to draw: no finite loss in bad")
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    status, printed, err = call("report.plot", run, "--out", out)
    assert status == 2 and "pip install matplotlib" in err and printed.splitlines()[0].split() == ["run", "sft"]
    assert not out.exists()


def test_pdf_and_svg_by_the_ending(folder, call, tmp_path):
    pytest.importorskip("matplotlib")
    run = folder("sft", SFT)
    for ending, begin in (("pdf", b"%PDF-"), ("svg", b"<?xml"), ("png", b"\x89PNG")):
        assert call("report.plot", run, "--out", tmp_path / f"x.{ending}")[0] == 0
        assert (tmp_path / f"x.{ending}").read_bytes().startswith(begin)


def test_letters_that_no_font_has_are_told(folder, call, tmp_path):
    """U+E123 is a private letter, which no font here draws."""
    pytest.importorskip("matplotlib")
    status, _, err = call("report.plot", folder("sft", SFT), "--out", tmp_path / "x.png", "--labels", "\ue123")
    assert status == 0 and "no font here has 1 of its letters (\ue123)" in err and "Noto Sans CJK" in err


@pytest.mark.slow
def test_as_a_command(folder, tmp_path):
    pytest.importorskip("matplotlib")
    env = {
        **os.environ,
        "DISPLAY": "",
        "MPLBACKEND": "TkAgg",
        "PYTHONPATH": str(ROOT),
    }  # there is no display, and none is needed
    command = [sys.executable, "-m", "report.plot", folder("a", DPO), "--out", "x.png", folder("b", SFT), "--labels=one,two"]
    done = subprocess.run(command, capture_output=True, text=True, env=env, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    assert lines[0].split() == ["run", "one", "two"] and lines[-1] == "wrote x.png"
    assert (tmp_path / "x.png").stat().st_size > 10_000
