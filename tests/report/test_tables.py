"""Tables of runs and of answers."""

import csv
import html
import json
import sys
from pathlib import Path

import pytest

from report import formats
from report.runs import MARGIN

SETTINGS = 'init_from = "gpt2-medium"\nbatch_size = 4\nlr = 5e-5\nmin_lr = 1e-5\nwarmup = 0.2\n'
VAL = [{"step": s, "split": "val", "loss": loss} for s, loss in ((0, 1.2), (100, 1.378), (300, 1.5))]


def samples(path: Path, *rows: tuple[str, list[str]]) -> str:
    path.write_text("".join(json.dumps({"prompt": prompt, "completions": texts}) + "\n" for prompt, texts in rows))
    return str(path)


def test_runs(folder, losses, call, tmp_path):
    full = folder("full", losses() + VAL, SETTINGS)
    lora = folder("lora", losses(jump=3.0), SETTINGS + "lora_rank = 16\nlora_alpha = 32.0\n")
    dpo = [{**r, MARGIN: 0.1} for r in losses(40)] + VAL
    chained = folder("dpo", dpo, f'init_from = "{tmp_path}/full/model"\nlora_rank = 8\n')
    for name, result in (
        ("full/a", {"mean": 36.351, "n": 2}),
        ("dpo/a", {"win_rate": 0.412, "n": 2}),
        ("dpo/b", [1]),
        ("dpo/c", {"n": 2}),
    ):
        (tmp_path / f"{name}.json").write_text(json.dumps(result))
    status, out, err = call("report.tables", full, lora, chained, "--out", tmp_path / "t.md")
    assert status == 0 and out == (tmp_path / "t.md").read_text()
    head, _, *rows = [[cell.strip() for cell in row.strip("|").split("|")] for row in out.splitlines()]
    shown = [{name: cell for name, cell in zip(head, row, strict=True) if cell != "-"} for row in rows]
    same = {"model": "gpt2-medium", "batch_size": "4", "lr": "5e-05", "steps": "300", "minutes": "2.50"}
    val = {"at step": "100", "val loss (SFT)": "1.378"}
    last = [f"{records[-1]['loss']:.3f}" for records in (losses(), losses(jump=3.0), losses(40))]
    assert shown[0] == {
        "run": "full",
        **same,
        **val,
        "train loss (SFT)": last[0],
        "perplexity": "3.967",
        "score (0 to 100)": "36.35",
    }
    lora = {"train loss (SFT)": last[1], "lora_rank": "16", "loss jumps at": "151"}
    assert shown[1] == {"run": "lora", **same, **lora}, "min_lr, warmup and lora_alpha differ in no two runs"
    dpo = {"train loss (DPO)": last[2], "val loss (DPO)": "1.378", "at step": "100", "win rate (%)": "41.20", "minutes": "0.33"}
    assert shown[2] == {"run": "dpo", "model": "gpt2-medium", "lora_rank": "8", "steps": "300", **dpo}
    assert head.index("train loss (SFT)") < head.index("train loss (DPO)") < head.index("minutes")
    assert err.startswith("warning: lora: the training loss jumped at step 151, from about ")


def test_answers(call, tmp_path):
    long = "q" * 600 + "the end"
    a = samples(tmp_path / "a.jsonl", ("x|y\n<b>", [" one", "two"]), (long, [""]))
    b = samples(tmp_path / "b.jsonl", ("x|y\n<b>", [" 1"]), (long, ["z" * 501]))
    lines = call("report.tables", a, b, "--labels", "before,after")[1].splitlines()
    assert lines[0] == "| prompt | before | after |"
    assert lines[2] == "| x&#124;y<br>&lt;b&gt; | one | 1 |"
    assert lines[3] == f"| … {long[-500:]} | (empty) | {'z' * 500} … |"
    assert len(call("report.tables", a, b, "--rows", 1)[1].splitlines()) == 3


def test_files_that_answer_other_prompts(call, tmp_path):
    """Each prompt has one row, in whatever order the files have it; what a file lacks is a dash."""
    a = samples(tmp_path / "a.jsonl", ("x", ["1"]), ("y", ["2"]), ("x", ["again"]))
    b = samples(tmp_path / "b.jsonl", ("z", ["3"]), ("x", ["4"]))
    lines = call("report.tables", a, b)[1].splitlines()
    assert lines[0] == "| prompt | a | b |" and lines[2:] == ["| x | 1 | 4 |", "| y | 2 | - |", "| z | - | 3 |"]


def test_texts_stay_texts_in_markdown():
    """No text ends its cell or brings a picture along."""
    nasty = "a | b ![x](http://h/x.png) `c` <img src=x>\n\\| *d*"
    _, _, row = formats.markdown([["answer"], [nasty]]).splitlines()
    assert row.count("|") == 2 and not any(mark in row for mark in ("![", "`", "<img", "*"))
    assert html.unescape(row).count(nasty.replace("\n", "<br>")) == 1


def test_csv(call, folder, losses, tmp_path):
    """By the ending .csv. Texts stand there whole, with their commas, quotes and line breaks."""
    texts = ('say "a, b"\n\n=1', "x" * 900)
    a = samples(tmp_path / "a.jsonl", (texts[0], [texts[1]]))
    assert call("report.tables", a, "--out", tmp_path / "t.csv")[0] == 0
    with open(tmp_path / "t.csv", newline="") as file:
        assert list(csv.reader(file)) == [["prompt", "a"], [*texts]]
    call("report.tables", folder("run", losses(20) + VAL, SETTINGS), "--out", tmp_path / "t.csv")
    with open(tmp_path / "t.csv", newline="") as file:
        (row,) = csv.DictReader(file)
    assert float(row["val loss (SFT)"]) == 1.378 and row["model"] == "gpt2-medium"


def test_conversations(call, tmp_path):
    turns = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hi"}]
    (tmp_path / "a.jsonl").write_text(json.dumps({"messages": turns, "completions": ["hello"]}) + "\n")
    assert "| System: be brief<br><br>User: hi | hello |" in call("report.tables", tmp_path / "a.jsonl")[1]


def test_wide_letters_take_two_columns():
    lines = formats.aligned([["日本", "1"], ["abcdef", "22"]])
    assert lines == ["日本     1", "abcdef  22"]


def test_pictures(folder, losses, call, refused, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    run = folder("run", losses() + VAL, SETTINGS)
    text = samples(tmp_path / "a.jsonl", ("costs $5 and $6\n\nor more", ["word " * 80]))
    for source in (run, text):
        assert call("report.tables", source, "--png", tmp_path / "new" / "t.png")[0] == 0
        picture = (tmp_path / "new" / "t.png").read_bytes()
        width, height = (int.from_bytes(picture[at : at + 4], "big") for at in (16, 20))
        assert picture[:4] == b"\x89PNG" and 250 < width < 2000 and 60 < height < 600
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    refused("report.tables", run, "--png", tmp_path / "other.png", says="pip install matplotlib")


def test_mistakes(folder, losses, refused, tmp_path):
    run = folder("run", losses(20), SETTINGS)
    a = samples(tmp_path / "a.jsonl", ("x", ["1"]), ("y", ["2"]))
    d = samples(tmp_path / "d.jsonl", ("x", []))
    for argv, words in (
        ([d], "d.jsonl:1: 'completions' must be a list of texts"),
        ([run, a], "run: not a file"),
        ([folder("bare", losses(20))], "config.toml: No such file"),
        ([folder("torn", losses(20), "lr = ")], "config.toml: not valid TOML"),
        ([run, "--out", tmp_path], "is a folder"),
        ([a, "--rows", "0"], "key rows"),
    ):
        refused("report.tables", *argv, says=words)
