"""report.plot of the results of eval_winrate.py: win rate against model size."""

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
    assert "| SFT | 124M | 20.0 |" in printed and "| SFT | 355M | 40.0 |" in printed and plot.size(2.8e9) == "2.8B"

    (tmp_path / "mcq.json").write_text('{"n": 3, "acc": 0.5}')
    for path, says in (
        (result("bare", parameters=None), "judge again with --model"),
        (result("none", win_rate=None, ci95=None), "holds no verdict"),
        (tmp_path / "mcq.json", "no result of eval_winrate.py"),
        (tmp_path / "no.json", "cannot read"),
    ):
        refused("report.plot", made[0], path, "--out", tmp_path / "x.png", says=says)
    refused("report.plot", *made, "--out", tmp_path / "x.png", "--labels", "a,b", says="--labels has 2 names for 3 results")
    assert not (tmp_path / "x.png").exists()
