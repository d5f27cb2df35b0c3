"""Tables of runs and of answers, and the warning where a loss jumped."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest

from base.errors import UserError
from report import plot, tables


def losses(n: int = 300, jump: float = 0.0, at: int = 150, lasting: int = 40, seed: int = 0) -> list[dict]:
    """A noisy, falling training loss; `jump` nats more for some steps from index `at` on."""
    loss = 1.5 + np.exp(-np.arange(n) / 50) + np.random.default_rng(seed).gamma(2, 0.15, n)
    loss[at : at + lasting] += jump
    return [{"step": i + 1, "split": "train", "loss": x, "lr": 1e-5, "step_s": 0.5} for i, x in enumerate(loss.tolist())]


@pytest.mark.parametrize("seed", range(5))
def test_jumps(seed):
    assert plot.jumps(losses(seed=seed)) == [], "noise and a falling loss are no jump"
    assert plot.jumps(losses(seed=seed, jump=3.0, lasting=1)) == [], "nor is one hard batch"
    ((step, before, after),) = plot.jumps(losses(seed=seed, jump=3.0))
    assert step == 151 and 1.5 < before < 2.5 < 4 < after
    assert plot.jumps(losses(seed=seed, jump=-1.0, lasting=150)) == [], "down is fine"
    twice = losses(seed=seed, jump=3.0, at=80)
    for record in twice[220:230]:
        record["loss"] += 3
    assert [step for step, _, _ in plot.jumps(twice)] == [81, 221]


@pytest.mark.parametrize("seed", range(3))
def test_jumps_of_small_batches(seed):
    """At batch 2 losses differ by half a nat from step to step: a rise of one that lasts is seen, none is made up."""
    noisy = losses(4000, seed=seed)
    for record, noise in zip(noisy, np.random.default_rng(seed).normal(0, 0.5, 4000), strict=True):
        record["loss"] += noise
    assert plot.jumps(noisy) == []
    for record in noisy[2000:2200]:
        record["loss"] += 1.5
    assert [abs(step - 2000) < 30 for step, *_ in plot.jumps(noisy)] == [True]


def test_jumps_of_short_and_flat_runs():
    assert plot.jumps([]) == plot.jumps(losses(5, jump=9, at=3)) == []
    flat = [{"step": i, "split": "train", "loss": 0.6931} for i in range(30)]
    assert plot.jumps(flat + [{**r, "loss": 0.72} for r in flat]) == [], "DPO leaves ln 2"


def run_folder(path: Path, records: list[dict], settings: str, judge: dict | None = None) -> str:
    path.mkdir(parents=True)
    (path / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    (path / "config.toml").write_text(settings)
    if judge:
        (path / "score.json").write_text(json.dumps(judge))
        (path / "other.json").write_text("[1]")
    return str(path)


SETTINGS = 'init_from = "gpt2-medium"\nbatch_size = 4\nlr = 5e-5\nmin_lr = 1e-5\nwarmup = 0.2\n'
VAL = [{"step": s, "split": "val", "loss": loss} for s, loss in ((0, 1.2), (100, 1.378), (300, 1.5))]


def main(monkeypatch, *argv) -> None:
    monkeypatch.setattr(sys, "argv", ["tables.py", *map(str, argv)])
    tables.main()


def test_runs(tmp_path, monkeypatch, capsys):
    full = run_folder(tmp_path / "full", losses() + VAL, SETTINGS, {"mean": 36.351, "n": 100})
    lora = run_folder(tmp_path / "lora", losses(jump=3.0), SETTINGS + "lora_rank = 16\nlora_alpha = 32.0\n")
    dpo = [{**r, plot.MARGIN: 0.1} for r in losses(40)] + VAL
    chained = run_folder(tmp_path / "dpo", dpo, f'init_from = "{tmp_path}/full/model"\nlora_rank = 8\n', {"win_rate": 0.412})
    main(monkeypatch, full, lora, chained, "--out", tmp_path / "t.md")
    said = capsys.readouterr()
    assert said.out == (tmp_path / "t.md").read_text()
    head, _, *rows = said.out.splitlines()
    assert head.count("|") == len(tables.HEAD) + 1
    cells = [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]
    assert cells[0] == "full, gpt2-medium, 4, 5e-05, 1e-05, 0.2, full, 300, 1.378, 3.967, 36.35, 2.5 min, -".split(", ")
    assert cells[1] == "lora, gpt2-medium, 4, 5e-05, 1e-05, 0.2, 16/32, 300, -, -, -, 2.5 min, 151".split(", ")
    assert cells[2] == "dpo, gpt2-medium, -, -, -, -, 8/8, 300, 1.378, -, 41.2%, 20.0 s, -".split(", ")
    assert said.err.startswith("warning: lora: the training loss jumped at step 151, from about ")


def samples(path: Path, *rows: dict) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_answers(tmp_path, monkeypatch, capsys):
    long = "q" * 600 + "the end"
    a = samples(
        tmp_path / "a.jsonl", {"prompt": "x|y\n<b>", "completions": [" one", "two"]}, {"prompt": long, "completions": [""]}
    )
    b = samples(
        tmp_path / "b.jsonl", {"prompt": "x|y\n<b>", "completions": [" 1"]}, {"prompt": long, "completions": ["z" * 501]}
    )
    main(monkeypatch, a, b, "--labels", "before,after")
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "| prompt | before | after |"
    assert lines[2] == "| x\\|y<br>&lt;b> | one | 1 |"
    assert lines[3] == f"| … {long[-500:]} | (empty) | {'z' * 500} … |"
    main(monkeypatch, a, b, "--rows", 1)
    assert len(capsys.readouterr().out.splitlines()) == 3


def test_pictures(tmp_path, monkeypatch, capsys):
    pytest.importorskip("matplotlib")
    run = run_folder(tmp_path / "run", losses() + VAL, SETTINGS)
    text = samples(tmp_path / "a.jsonl", {"prompt": "costs $5 and $6\n\nor more", "completions": ["word " * 80]})
    for source in (run, text):
        main(monkeypatch, source, "--png", tmp_path / "new" / "t.png")
        picture = (tmp_path / "new" / "t.png").read_bytes()
        width, height = (int.from_bytes(picture[at : at + 4], "big") for at in (16, 20))
        assert picture[:4] == b"\x89PNG" and 500 < width < 2000 and 60 < height < 600
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(UserError, match="pip install matplotlib"):
        main(monkeypatch, run, "--png", tmp_path / "other.png")


def test_mistakes(tmp_path, monkeypatch, capsys):
    run = run_folder(tmp_path / "run", losses(20), SETTINGS)
    a = samples(tmp_path / "a.jsonl", {"prompt": "x", "completions": ["1"]}, {"prompt": "y", "completions": ["2"]})
    b = samples(tmp_path / "b.jsonl", {"prompt": "x", "completions": ["1"]}, {"prompt": "z", "completions": ["2"]})
    c = samples(tmp_path / "c.jsonl", {"prompt": "x", "completions": ["1"]})
    d = samples(tmp_path / "d.jsonl", {"prompt": "x", "completions": []})
    e = samples(tmp_path / "e.jsonl", {"prompt": "x", "response": "1"})
    bare = run_folder(tmp_path / "bare", losses(20), SETTINGS)
    (tmp_path / "bare" / "config.toml").unlink()
    torn = run_folder(tmp_path / "torn", losses(20), "lr = ")
    for argv, words in (
        ([a, b], r"b\.jsonl:2: another prompt than at .*a\.jsonl:2"),
        ([a, c], r"c\.jsonl has 1 lines, .*a\.jsonl has 2"),
        ([d], r"d\.jsonl:1: 'completions' must be a list of texts"),
        ([e], r"e\.jsonl:1: the field 'completions' is missing"),
        ([run, a], "run: not a file"),
        ([tmp_path / "nowhere"], "no such file"),
        ([bare], r"cannot read .*config\.toml"),
        ([torn], r"config\.toml: not valid TOML"),
        ([run, "--png", tmp_path / "x.pdf"], r"x\.pdf"),
        ([run, "--out", tmp_path], "is a folder"),
        ([run, "--labels", "p,q"], "p, q for 1 sources"),
        ([a, "--rows", "0"], "--rows is 0"),
        ([a, "--row", "1"], "--row"),
    ):
        with pytest.raises(UserError, match=words):
            main(monkeypatch, *argv)
