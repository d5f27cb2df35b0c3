"""report.plot of the results of evaluations: over model size, as bars, reward over KL."""

import json

import pytest


def test_picture_of_win_rates(call, refused, tmp_path, monkeypatch):
    """A line a label, a point a size, bars as long as the interval."""
    pytest.importorskip("matplotlib")
    from matplotlib.axes import Axes

    from report import plot

    def result(name: str, **fields) -> str:
        path = tmp_path / f"{name}.json"
        path.write_text(json.dumps({"label": "DPO", "parameters": 1, "win_rate": 0.6, "ci95": [0.3, 0.8], "n": 10, **fields}))
        return str(path)

    made = [
        result("a", label="SFT", parameters=355e6, win_rate=0.4, ci95=[0.2, 0.7]),
        result("b", label="SFT", parameters=124e6, win_rate=0.2, ci95=[0.1, 0.5]),
        result("c", label="DPO", parameters=124e6),
    ]
    drawn, errorbar = {}, Axes.errorbar

    def spy(self, x, y, bars, **keys):
        drawn[keys["label"]] = (x, y, bars)
        return errorbar(self, x, y, bars, **keys)

    monkeypatch.setattr(Axes, "errorbar", spy)
    status, printed, err = call("report.plot", *made, "--out", tmp_path / "w.png")
    assert status == 0, err
    assert (tmp_path / "w.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert list(drawn) == ["SFT", "DPO"] and drawn["SFT"][1] == pytest.approx([20, 40])
    assert [bar[0] for bar in drawn["SFT"][2]] == pytest.approx([10, 30])
    assert "| SFT | 124M | win rate (%) | 20.00 | 10.00 to 50.00 | 10 |" in printed
    assert "| SFT | 355M | win rate (%) | 40.00 |" in printed
    assert [plot.size(n) for n in (2.8e9, 124e6, 12_345, 9, None)] == ["2.8B", "124M", "12K", "9", "-"]

    (tmp_path / "other.json").write_text('{"n": 3, "wins": 0.5}')
    for path, says in (
        (result("none", win_rate=None, ci95=None), "holds no verdict"),
        (result("text", win_rate="0.5"), "no result of an evaluation script"),
        (tmp_path / "other.json", "no result of an evaluation script"),
        (tmp_path / "no.json", "cannot read"),
    ):
        refused("report.plot", made[0], path, "--out", tmp_path / "x.png", says=says)
    refused("report.plot", *made, "--out", tmp_path / "x.png", "--labels", "a,b", says="--labels has 2 names for 3 results")
    assert not (tmp_path / "x.png").exists()


CI = {"ci95": [0.3, 0.5]}
LIMIT, NONE = {"kl": 1, "reward": 2, "ess": 99}, {"pass_at_1_ci95": [0, 0]}
RESULTS = {  # a result of each script -> its points: (measure, value, low, high)
    "win": ({"win_rate": 0.4, **CI, "n": 9}, [("win rate (%)", 40, 30, 50)]),
    "score": ({"mean": 40, "ci95": [30, 50], "n": 9}, [("score (0 to 100)", 40, 30, 50)]),
    "mcq": (
        {"n": 9, "acc": 0.4, "acc_stderr": 0.1, "mode": "generate", "data": "/a/toy", "split": "test", "chance": 0.25},
        [("accuracy (%), generate, toy test", 40, 20.4, 59.6)],
    ),
    "reward": (
        {"n": 9, "accuracy": 0.4, "accuracy_stderr": 0.1, "margin": -2.0, "data": "hh", "split": "val", "reward_rule": ""},
        [("chosen over rejected (%), hh val", 40, 20.4, 59.6), ("reward margin (nats), hh val", -2, None, None)],
    ),
    "kl": (
        {"n": 9, "reward": 0.5, "reward_stderr": 0.0, "kl": 3.0, "reward_rule": "sentiment", "limit": [LIMIT]},
        [("reward, sentiment", 0.5, 0.5, 0.5), ("KL from the reference (nats)", 3, None, None)],
    ),
    "math": (
        {"n": 9, "k": 4, "maj": 0.4, "maj_ci95": [0.3, 0.5], "pass": 1, "pass_ci95": [1, 1], "pass_at_1": 0, **NONE},
        [("majority of 4 (%)", 40, 30, 50), ("any of 4 right (%)", 100, 100, 100), ("right answers (%)", 0, 0, 0)],
    ),
}


@pytest.mark.parametrize("name", RESULTS)
def test_results_of_every_kind(name, call, tmp_path):
    pytest.importorskip("matplotlib")
    from report import plot

    fields, points = RESULTS[name]
    path = tmp_path / f"{name}.json"
    path.write_text(json.dumps(fields))
    found = plot.read_results([str(path)])
    for point, (measure, *numbers) in zip(found, points, strict=True):
        assert (point["label"], point["measure"], point["n"]) == (name, measure, 9)
        assert [point[field] for field in ("value", "low", "high")] == pytest.approx(numbers)
    assert call("report.plot", path, "--out", tmp_path / "x.png")[0] == 0
    axes = plot.results_figure(found, "x.png").axes
    if name == "kl":  # one panel: reward over KL, with the limit
        assert len(axes) == 1 and axes[0].get_xlabel() == "KL from the reference (nats)"
        assert any(line.get_label() == "limit" for line in axes[0].lines)
    else:  # the size is unknown: bars
        assert [[bar.get_height() for bar in ax.patches] for ax in axes] == [[pytest.approx(p[1])] for p in points]


@pytest.mark.parametrize("damage", [{"win_rate": 1e308}, {"n": -1e200}, {"label": "\ud800"}])
def test_no_number_or_label_that_cannot_be_drawn(damage, refused, tmp_path):
    path = tmp_path / "odd.json"
    path.write_text(json.dumps({"win_rate": 0.4, **CI, "n": 9, **damage}))
    refused("report.plot", path, "--out", tmp_path / "x.png", says="no result of an evaluation script")


def test_a_reward_whose_rule_is_called_score():
    """Its axis is not that of a judge's score, 0 to 100."""
    pytest.importorskip("matplotlib")
    from report import plot

    point = {"label": "a", "parameters": None, "measure": "reward, score.py:f", "n": 9, "value": 0.4, "low": None, "high": None}
    (ax,) = plot.results_figure([{**point, "chance": None}], "x.png").axes
    assert ax.get_ylim()[1] < 1


def test_bars_where_one_size_is_unknown(tmp_path):
    """Result files of one name are told apart by their folders."""
    pytest.importorskip("matplotlib")
    from report import plot

    paths = []
    for name, size in (("a", 124e6), ("b", 355e6), ("c", None)):
        (tmp_path / name).mkdir()
        paths.append(str(tmp_path / name / "win.json"))
        (tmp_path / name / "win.json").write_text(json.dumps({"win_rate": 0.4, **CI, "n": 9, "parameters": size}))
    (ax,) = plot.results_figure(plot.read_results(paths), "x.png").axes
    assert len(ax.patches) == 3 and [text.get_text() for text in ax.get_xticklabels()] == ["a/win", "b/win", "c/win"]
    (ax,) = plot.results_figure(plot.read_results(paths[:2]), "x.png").axes
    assert not ax.patches and ax.get_xlabel() == "parameters"
