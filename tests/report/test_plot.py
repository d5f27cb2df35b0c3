import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from base.errors import UserError
from report import plot

ROOT = Path(__file__).parents[2]


def record(step, split="train", loss=1.0, **more):
    return {"step": step, "split": split, "loss": loss, **more}


SFT = [record(s, loss=4 - s / 10, lr=1e-4 / s, tokens_per_s=1000.0 + s) for s in range(1, 21)]
SFT[10:10] = [record(10, "val", 3.5)]
SFT += [record(20, "val", 3.75)]
DPO = [record(s, loss=0.7 - s / 100, lr=1e-5, **{plot.MARGIN: s / 10, plot.ACCURACY: 0.5}) for s in range(1, 21)]
DPO += [record(20, "val", 0.6, **{plot.MARGIN: 1.25, plot.ACCURACY: 0.625})]


def folder(path, records, tail=""):
    path.mkdir(parents=True)
    (path / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records) + tail)
    return str(path)


def size(png):
    data = Path(png).read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n" and data[-8:-4] == b"IEND"
    return int.from_bytes(data[16:20], "big"), int.from_bytes(data[20:24], "big")


def figure(runs, tmp_path, monkeypatch):
    """The matplotlib Figure that `draw` saved."""
    pytest.importorskip("matplotlib")
    from matplotlib.figure import Figure

    saved, savefig = [], Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *a, **k: (saved.append(self), savefig(self, *a, **k)))
    plot.draw(runs, tmp_path / "x.png")
    return saved[0]


def main(monkeypatch, *argv):
    monkeypatch.setattr(sys, "argv", ["plot.py", *map(str, argv)])
    plot.main()


@pytest.mark.parametrize("tail", ["", '{"step": 21, "spl', '{"step": 21, "spl\n', "\n", "12", '{"step": 21}'])
def test_read_run_leaves_a_torn_last_line_out(tmp_path, tail):
    assert plot.read_run(folder(tmp_path / "r", SFT, tail)) == SFT


def test_read_run_keeps_a_whole_last_line_without_its_newline(tmp_path):
    assert plot.read_run(folder(tmp_path / "r", SFT, json.dumps(record(21))))[-1] == record(21)


@pytest.mark.parametrize("line", ["{", "", '{"step": 1}', '{"step": "1", "split": "val"}', '{"step": 1, "split": 0}'])
def test_read_run_names_a_malformed_line(tmp_path, line):
    path = folder(tmp_path / "r", SFT[:2], f"{line}\n{json.dumps(SFT[3])}\n")
    with pytest.raises(UserError, match=r"metrics\.jsonl:3: "):
        plot.read_run(path)


def test_read_run_without_records(tmp_path):
    with pytest.raises(UserError, match=r"cannot read .*metrics\.jsonl: No such file"):
        plot.read_run(tmp_path)
    for name, tail in (("empty", ""), ("torn", '{"st')):
        with pytest.raises(UserError, match="no records yet"):
            plot.read_run(folder(tmp_path / name, [], tail))


def test_series_leaves_out_what_is_no_number():
    bad = [record(2, loss=float("nan")), record(3, loss=None), record(4, "val"), {"step": 5, "split": "train"}]
    bad.append(record(6, loss=float("inf")))
    steps, values = plot.series([record(1, loss=2.0), *bad, record(7, loss=3)], "train", "loss")
    assert steps.tolist() == [1, 7] and values.tolist() == [2, 3]
    assert [len(a) for a in plot.series([], "train", "loss")] == [0, 0]


@pytest.mark.parametrize("n", [0, 1, 2, 15, 16, 17, 400])
def test_smooth_keeps_length_and_level_and_lowers_noise(n):
    assert np.allclose(plot.smooth(np.full(n, 3.0)), np.full(n, 3.0))
    noise = np.random.default_rng(0).normal(size=n)
    assert plot.smooth(noise).shape == (n,)
    assert n < 400 or plot.smooth(noise).std() < 0.5 * noise.std()


def test_table():
    lines = plot.table({"sft": SFT, "a longer name": DPO, "val only": [record(3, "val", 1.5)]}).splitlines()
    assert len(lines) == 4 and len({len(line) for line in lines}) == 1
    assert " ".join(lines[1].split()) == "sft 20 2.0000 3.5000 @ 10 3.7500 1.00e-04 / 5.00e-06 - - 1,010"
    assert lines[2].split()[-3:] == ["1.2500", "0.6250", "-"]  # validation's, not training's 2.0
    assert " ".join(lines[3].split()) == "val only 3 - 1.5000 @ 3 1.5000 - - - -"


def test_draw_has_the_panels_the_runs_have(tmp_path, monkeypatch):
    sft = figure({"sft": SFT}, tmp_path, monkeypatch)
    assert [ax.get_ylabel() for ax in sft.axes] == ["loss (nats per token)", "learning rate"]
    dpo = figure({"dpo": DPO}, tmp_path, monkeypatch)
    names = [ax.get_ylabel().partition(" (")[0] for ax in dpo.axes]
    assert names == ["loss", "learning rate", "chosen over rejected", "reward margin"]
    assert all(ax.get_xlabel() == "optimizer step" for ax in dpo.axes)
    assert size(tmp_path / "x.png")[0] == 1600


def test_accuracy_begins_with_the_first_update(tmp_path, monkeypatch):
    values = {0: 0.0, 1: 0.6, 2: 0.7}
    records = [record(s, "val", **{plot.MARGIN: 0.0, plot.ACCURACY: values[s]}) for s in values]
    records += [record(s, **{plot.MARGIN: 0.0, plot.ACCURACY: values[s]}) for s in (1, 2)]
    lines = figure({"dpo": records}, tmp_path, monkeypatch).axes[1].lines
    shown = [line.get_ydata().tolist() for line in lines if len(line.get_xdata()) and line.get_color() != "0.3"]
    assert shown == [[0.7], [0.7], [0.6, 0.7]]  # training, training smoothed, validation


def test_log_prob_gains_are_rewards_over_beta(tmp_path, monkeypatch):
    rewards = [{**r, "rewards/chosen": 0.5, "rewards/rejected": -r["step"] / 10} for r in DPO]
    path = folder(tmp_path / "r", rewards)
    config = tmp_path / "r" / "config.toml"
    for text in (None, "beta = ", 'beta = "much"\nloss = "ipo"', 'beta = 0.25\nloss = "simpo"', "beta = 0.25"):
        if text:
            config.write_text(text)
        assert plot.read_run(path) == rewards, "unknown without config.toml, and none without a reference"
    config.write_text('beta = 0.25\nloss = "sigmoid"\n')
    found = plot.read_run(path)
    assert plot.series(found, "val", "gain/chosen")[1].tolist() == [2.0]
    assert plot.series(found, "train", "gain/rejected")[1][:2].tolist() == pytest.approx([-0.4, -0.8])
    fig = figure({"dpo": found}, tmp_path, monkeypatch)
    assert [ax.get_ylabel() for ax in fig.axes[4:]] == ["log-prob gain of chosen (nats)", "log-prob gain of rejected (nats)"]
    assert fig.axes[4].get_ylim() == fig.axes[5].get_ylim()


def test_draw_shows_single_points_and_every_run_in_one_legend(tmp_path, monkeypatch):
    fig = figure({"a": DPO, "_b": [record(1), record(1, "val", 2.0)], "$c": SFT}, tmp_path, monkeypatch)
    lines = [line for line in fig.axes[0].lines if len(line.get_xdata()) == 1]
    shown = [float(line.get_ydata()[0]) for line in lines if line.get_marker() not in ("", "None", None)]
    assert sorted(shown) == [0.6, 1.0, 2.0]  # DPO's one validation point, and both of _b
    assert not any(ax.get_legend() for ax in fig.axes) and len(fig.legends) == 1
    texts = [text.get_text().strip().replace("\\", "") for text in fig.legends[0].get_texts()]
    assert texts == ["a", "_b", "$c", "training (smoothed)", "validation"]
    assert len({line.get_color() for line in fig.axes[0].lines}) == 3


def test_draw_makes_the_folder_and_leaves_nothing_else(tmp_path):
    pytest.importorskip("matplotlib")
    plot.draw({"sft": SFT}, tmp_path / "new" / "deep" / "x.png", title="A title")
    assert size(tmp_path / "new" / "deep" / "x.png")[0] == 1600
    assert [p.name for p in (tmp_path / "new" / "deep").iterdir()] == ["x.png"]


def test_draw_that_fails_keeps_the_old_picture(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    from matplotlib.figure import Figure

    def half(self, path, **_):
        Path(path).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    (tmp_path / "x.png").write_bytes(b"old")
    monkeypatch.setattr(Figure, "savefig", half)
    with pytest.raises(OSError, match="No space"):
        plot.draw({"sft": SFT}, tmp_path / "x.png")
    assert [(p.name, p.read_bytes()) for p in tmp_path.iterdir()] == [("x.png", b"old")]


def test_draw_refuses_what_it_cannot_write(tmp_path):
    pytest.importorskip("matplotlib")
    with pytest.raises(UserError, match=r"curves\.pdf"):
        plot.draw({"sft": SFT}, tmp_path / "curves.pdf")
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write"):
        plot.draw({"sft": SFT}, tmp_path / "file" / "x.png")
    (tmp_path / "folder.png").mkdir()
    with pytest.raises(UserError, match="cannot write"):
        plot.draw({"sft": SFT}, tmp_path / "folder.png")
    with pytest.raises(UserError, match="nothing to draw: no finite loss in bad"):
        plot.draw({"bad": [record(1, loss=float("nan"))]}, tmp_path / "x.png")


def test_without_matplotlib_the_table_still_prints(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(UserError, match="pip install matplotlib"):
        main(monkeypatch, folder(tmp_path / "sft", SFT), "--out", tmp_path / "x.png")
    assert capsys.readouterr().out.splitlines()[1].startswith("sft ")
    assert not (tmp_path / "x.png").exists()


def test_main_names_runs(tmp_path, monkeypatch, capsys):
    drawn = []
    monkeypatch.setattr(plot, "draw", lambda runs, out: drawn.append(list(runs)))
    a, b, c = (folder(tmp_path / name, SFT) for name in ("x/run", "y/run", "z/other"))
    main(monkeypatch, a, "--out", "o.png", c)
    main(monkeypatch, a + "/", b, "--out=o.png")
    main(monkeypatch, a, b, "--out", "o.png", "--labels", "one,two")
    assert drawn == [["run", "other"], [a + "/", b], ["one", "two"]]
    capsys.readouterr()
    main(monkeypatch, a, "--out", "o.png", "--table", "false")
    assert capsys.readouterr().out == "wrote o.png\n"


@pytest.mark.parametrize(
    "argv, words",
    [
        (["RUN"], "--out"),
        (["--out", "x.png"], "RUN_FOLDER"),
        (["RUN", "--out", "x.jpg"], "x.jpg"),
        (["RUN", "--out", "x.png", "--lables", "a"], "--lables"),
        (["RUN", "--out", "x.png", "--labels", "a,b"], "2 names for 1 runs"),
        (["RUN", "RUN", "--out", "x.png"], "two runs have one name"),
        (["RUN", "RUN", "--out", "x.png", "--labels", "a,a"], "two runs have one name"),
        (["RUN", "nowhere", "--out", "x.png"], "nowhere"),
    ],
)
def test_mistakes(tmp_path, monkeypatch, argv, words):
    run = folder(tmp_path / "r", SFT)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as error:
        main(monkeypatch, *[run if word == "RUN" else word for word in argv])
    assert words in str(error.value) and "\n" not in str(error.value)
    assert [p.name for p in tmp_path.iterdir()] == ["r"]


def test_as_a_script(tmp_path):
    pytest.importorskip("matplotlib")
    env = {**os.environ, "DISPLAY": "", "MPLBACKEND": "TkAgg"}  # a display that is not there must not matter

    def script(*argv):
        command = [sys.executable, ROOT / "plot.py", *argv]
        return subprocess.run(command, capture_output=True, text=True, env=env, cwd=tmp_path)

    good = script(folder(tmp_path / "dpo", DPO), "--out", "x.png")
    assert (good.returncode, good.stderr) == (0, "") and good.stdout.splitlines()[-1] == "wrote x.png"
    assert size(tmp_path / "x.png")[0] == 1600
    bad = script("dpo")
    assert (bad.returncode, bad.stdout) == (2, "") and bad.stderr.startswith("error: ") and bad.stderr.count("\n") == 1
