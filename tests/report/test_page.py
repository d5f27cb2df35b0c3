"""The one page: what is in it, that no text can leave its place, and that it needs no network."""

import json
import re
import shutil
import subprocess
import sys
import xml.etree.ElementTree as ET
from html.parser import HTMLParser
from pathlib import Path

import pytest

from base.errors import UserError
from report import page
from report.runs import MARGIN

NASTY = "</script><b>é 日本 \x00\x1b & \"'</td><img src=http://evil.example/x.png onerror=alert(1)>"
SETTINGS = 'init_from = "gpt2"\nlr = {}\nbatch_size = 4\nout_dir = "{}"\n'
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome", "msedge")


class Reader(HTMLParser):
    """An HTML parser's view: elements with their attributes, and the text within each kind of element."""

    def __init__(self, text: str):
        super().__init__()
        self.open, self.elements, self.texts = [], [], {}
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.open.append(tag)
        self.elements.append((tag, dict(attrs)))

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, f"</{tag}> closes another element"

    def handle_data(self, data):
        self.texts.setdefault(self.open[-1] if self.open else "", []).append(data)


def checked(path) -> Reader:
    """The page read by two parsers: as XML, which wants every element closed and every character allowed, and as HTML."""
    text = path.read_text(encoding="utf-8")
    ET.fromstring(text.removeprefix("<!DOCTYPE html>"))
    found = Reader(text)
    assert not found.open, "every element is closed"
    names = {tag for tag, _ in found.elements}
    assert not names & {"img", "link", "iframe", "object", "a", "b", "base", "form", "image", "foreignobject"}
    for tag, attributes in found.elements:
        for name, value in attributes.items():
            assert not name.startswith("on") and name not in ("src", "action", "srcset"), (tag, name)
            assert name != "href" or value.startswith("#"), value
            assert "url(" not in (value or "") or "url(#" in value
    assert "@import" not in text and "url(http" not in text
    assert ("meta", "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'") in [
        (tag, attributes.get("content")) for tag, attributes in found.elements
    ]
    ids = [attributes["id"] for _, attributes in found.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    return found


@pytest.fixture
def demo(folder, losses, tmp_path):
    """A folder of two runs: SFT with results and answers, and DPO."""
    sft = folder("demo/sft", [*losses(30), {"step": 30, "split": "val", "loss": 1.5}], SETTINGS.format(1e-3, "a"))
    dpo = [{**r, MARGIN: 0.1} for r in losses(40)]
    folder("demo/dpo", dpo, SETTINGS.format(1e-5, "b") + 'loss = "ipo"\nbeta = 0.1\n')
    for name in ("sft", "dpo"):
        (tmp_path / "demo" / name / "model").mkdir()
        rows = [{"prompt": "2 + 2", "completions": [f"four, says {name}"]}, {"prompt": NASTY, "completions": [NASTY]}]
        (tmp_path / "demo" / name / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "demo/sft/mcq.json").write_text(
        '{"n": 9, "acc": 0.5, "acc_stderr": 0.1, "mode": "loglik", "data": "toy", "split": "test"}'
    )
    (tmp_path / "demo/sft/details.jsonl").write_text('{"id": 1, "label": 2}\n')
    return sft.removesuffix("/sft")


def test_a_folder_of_runs(demo, call, tmp_path):
    pytest.importorskip("matplotlib")
    status, out, err = call("report.page", demo, "--out", tmp_path / "new" / "r.html")
    assert (status, err) == (0, "") and out == f"wrote {tmp_path}/new/r.html\n"
    found = checked(tmp_path / "new" / "r.html")
    assert found.texts["h2"] == ["Runs", "Curves", "Settings", "Evaluation", "Answers"]
    assert [tag for tag, _ in found.elements].count("svg") == 2 and found.texts["p"] == ["No warnings."]
    cells, heads = found.texts["td"], found.texts["th"]
    assert heads.count("dpo") == heads.count("sft") == 3 and "dpo samples" in heads and "sft samples" in heads
    assert {"train loss (SFT)", "val loss (SFT)", "train loss (ipo)", "accuracy (%), loglik, toy test", "lr"} <= {*cells}
    assert "four, says sft" in cells and "four, says dpo" in cells
    assert cells.count(NASTY.replace("\x00", "\ufffd").replace("\x1b", "\ufffd")) == 3, "shown as it was written"
    assert any("ipo loss (per pair)" in text for text in found.texts["text"]), "text in a picture stays text"
    first = cells[cells.index("lr", cells.index("minutes")) :][:3]
    assert first == ["lr", "1e-05", "0.001"], "settings that differ: dpo, sft"


def test_runs_at_any_depth(demo, call, tmp_path):
    """As a loop leaves them, with its own config.toml beside the rounds."""
    shutil.copytree(demo, tmp_path / "loop/round_1/dpo")
    (tmp_path / "loop/config.toml").write_text('data = "x"\n')
    assert call("report.page", tmp_path / "loop", "--out", tmp_path / "all.html")[0] == 0
    runs = [path.parent.relative_to(demo) for path in Path(demo).rglob("metrics.jsonl")]
    shown = "".join(checked(tmp_path / "all.html").texts["th"])
    assert runs and all(f"round_1/dpo/{run}" in shown for run in runs)


@pytest.mark.parametrize("tail", ["", '{"step": 1, "sp'])
def test_empty_metrics(tail, folder, call, tmp_path):
    run = folder("r", [], SETTINGS.format(1e-3, "a"), tail=tail)
    status, _, err = call("report.page", run, "--out", tmp_path / "r.html")
    assert status == 0 and "no records yet" in err
    found = checked(tmp_path / "r.html")
    assert "no records yet" in found.texts["li"][0] and found.texts["h2"] == ["Settings"]


def test_a_damaged_config_is_a_warning(demo, call, tmp_path):
    """The other runs are shown."""
    (tmp_path / "demo/dpo/config.toml").write_text("lr = ")
    status, _, err = call("report.page", demo, "--out", tmp_path / "r.html")
    assert status == 0 and "config.toml: not valid TOML" in err
    found = checked(tmp_path / "r.html")
    assert "config.toml: not valid TOML" in found.texts["li"][0] and "sft" in found.texts["th"]


def test_a_run_that_goes_on_with_a_nan_and_a_jump(folder, losses, call, tmp_path):
    pytest.importorskip("matplotlib")
    records = [*losses(jump=3.0), {"step": 300, "split": "val", "loss": float("nan")}]
    run = folder("<i>", records, SETTINGS.format(1e-3, "a"), tail='{"step": 301, "spl')
    status, _, err = call("report.page", run, "--out", tmp_path / "r.html")
    assert status == 0 and err.count("warning: ") == 3
    said = checked(tmp_path / "r.html").texts["li"]
    assert said[0].startswith("<i>: the training loss jumped at step 151")
    assert said[1:] == [
        "<i>: the val loss is not a finite number at step 300",
        "<i>: no model yet: the run is going on, or was stopped, at step 300",
    ]


def test_files_of_their_own_and_no_matplotlib(demo, call, tmp_path, monkeypatch):
    """Labels for results and answers; without matplotlib the page says so."""
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    files = [f"{demo}/sft/mcq.json", f"{demo}/sft/samples.jsonl", f"{demo}/dpo"]
    assert call("report.page", *files, "--labels", "A,B,<C>", "--rows", "1", "--out", tmp_path / "r.html")[0] == 0
    found = checked(tmp_path / "r.html")
    assert any("pip install matplotlib" in text for text in found.texts["li"]) and "svg" not in dict(found.elements)
    assert "A" in found.texts["td"] and {"B", "<C>", "<C> samples"} <= {*found.texts["th"]} and "2 + 2" in found.texts["td"]
    assert not any("script" in text for text in found.texts["td"]), "the second prompt is left out"


def test_mistakes(demo, refused, tmp_path):
    (tmp_path / "x").mkdir()
    out = ["--out", tmp_path / "r.html"]
    refused("report.page", tmp_path / "x", *out, says="neither a run folder nor a folder of runs")
    refused("report.page", tmp_path / "no.json", *out, says="cannot read")
    refused("report.page", f"{demo}/sft/details.jsonl", *out, says="'completions'")
    refused("report.page", demo, "--out", tmp_path / "r.pdf", says="must end in .html")
    assert not (tmp_path / "r.html").exists()
    with pytest.raises(UserError, match="one name"):
        page.write([f"{demo}/sft", f"{tmp_path}/x/../demo/sft"], tmp_path / "r.html")


@pytest.mark.slow
def test_in_a_browser(demo, tmp_path):
    """The search hides the rows that lack the word; no script of a text ran; the page is drawn."""
    pytest.importorskip("matplotlib")
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if not browser:
        pytest.skip("no Chromium or Chrome is installed")
    page.write([demo], tmp_path / "r.html")
    text = (tmp_path / "r.html").read_text()
    typed = """<script>const box = document.getElementById("search"); box.value = "SAYS DPO";
    box.dispatchEvent(new Event("input"));</script></body>"""
    (tmp_path / "typed.html").write_text(text.replace("</body>", typed))
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--window-size=1400,2400", f"--user-data-dir={tmp_path}/profile"]

    def browse(*args: str) -> str:
        return subprocess.run([browser, *options, *args], capture_output=True, text=True, timeout=120, check=True).stdout

    shown = browse("--dump-dom", f"file://{tmp_path}/typed.html")
    rows = re.findall(r"<tr( hidden=\"\")?>", shown[shown.index('class="answers"') :])
    assert rows == ["", "", ' hidden=""'] and "1 shown" in shown  # the head, and two prompts
    assert "<img" not in shown
    browse(f"--screenshot={tmp_path}/r.png", f"file://{tmp_path}/r.html")
    assert (tmp_path / "r.png").stat().st_size > 50_000
