"""One page for any set of runs, results and answers: a single HTML file that needs no network.

    python -m report.page runs/sft runs/dpo --out report.html
    python -m report.page runs --out report.html         # all runs in a folder
    python -m report.page runs/dpo mcq.json samples.jsonl --out report.html

Of a run folder, or a folder of runs, it shows the results (*.json) and the answers (*.jsonl with completions) in it, too.
"""

from base.script import run

import contextlib
import html
import io
import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from base.errors import UserError, warn
from base.files import write_whole
from report import plot
from report.formats import Table, turned
from report.results import Points, read_result, result_table, results_in
from report.runs import Run, differing, read_config, read_run, run_table, shorten, troubles
from report.tables import Answers, answers, read_answers
from runtime.config import REQUIRED, key

NOT_ALLOWED = "[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]"  # in HTML and XML
FRAME = Path(__file__).with_name("page.html")
SEARCH = '<input id="search" type="search" placeholder="search prompts and answers" /> <span id="found"></span>'


@dataclass
class Config:
    """One page: curves, settings, evaluation and answers of runs."""

    out: str = key(REQUIRED, "the page to write", writes=".html")
    labels: str = key("", "a name for each path, commas between, instead of its folder's or file's")
    rows: int = key(200, "answers: show only the first so many prompts of a file", least=1)


@dataclass
class Found:
    """What a page shows, each by its label; and what is to be said about it."""

    runs: dict[str, Run] = field(default_factory=dict)
    folders: dict[str, str] = field(default_factory=dict)
    points: Points = field(default_factory=list)
    answers: Answers = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)


def collect(paths: dict[str, str], rows: int) -> Found:
    """Read runs, results and answers (label -> path). What a run folder lacks or what is damaged in it becomes a warning.

    Raises UserError for a path that is not there, and for a file that is neither a result nor answers.
    """
    found = Found()
    for label, name in paths.items():
        path = Path(name)
        if not path.is_dir():
            if path.suffix == ".json":
                found.points += [{**p, "label": p["label"] or label} for p in read_result(path)]
            else:
                found.answers[label] = read_answers(path, rows)
            continue
        begun = [*path.glob("*/config.toml"), *path.rglob("metrics.jsonl")]
        inside = sorted({file.parent for file in begun} - {path})
        is_run = (path / "metrics.jsonl").exists() or ((path / "config.toml").exists() and not inside)
        if not is_run and not inside:
            raise UserError(f"{path}: neither a run folder nor a folder of runs: it has no config.toml and no metrics.jsonl")
        for folder in [path] if is_run else [path, *inside]:
            name = str(folder.relative_to(path)) if len(paths) == 1 else f"{label}/{folder.relative_to(path)}"
            add_folder(found, label if folder == path else name, folder, rows)
    return found


def add_folder(found: Found, label: str, folder: Path, rows: int) -> None:
    """Add the run in a folder, and the results and answers beside it."""
    points, wrong = results_in(folder)
    found.points += [{**p, "label": p["label"] or label} for p in points]
    found.warnings += wrong
    for path in sorted(folder.glob("*.jsonl")):
        try:
            found.answers[f"{label} {path.stem}"] = read_answers(path, rows)
        except UserError:
            continue  # no answers: metrics, details
    if not any((folder / name).exists() for name in ("config.toml", "metrics.jsonl")):
        return
    try:
        records = read_run(folder)
    except UserError as error:
        found.warnings.append(f"{label}: {error}")
        records = Run()
        with contextlib.suppress(UserError):
            records.settings = read_config(folder)
    found.runs[label], found.folders[label] = records, str(folder)
    found.warnings += troubles(label, records)
    if records and not (folder / "model").exists():
        found.warnings.append(f"{label}: no model yet: the run is going on, or was stopped, at step {records[-1]['step']}")


# --- HTML -----------------------------------------------------------------------------------------------------------------


def html_table(table: Table, texts: int, kind: str = "") -> str:
    """texts: how many columns are text; those after them are numbers."""
    rows = []
    for row in table[1:]:
        cells = [(html.escape(text), "text" if i < texts else "number") for i, text in enumerate(row)]
        rows.append("<tr>" + "".join(f'<td class="{side}" dir="auto">{text}</td>' for text, side in cells) + "</tr>")
    head = "".join(f"<th>{html.escape(text)}</th>" for text in table[0])
    body = "\n".join(rows)
    return f'<div class="wide"><table class="{kind}"><thead><tr>{head}</tr></thead><tbody>\n{body}\n</tbody></table></div>'


def svg(fig, number: int) -> str:
    """A matplotlib Figure as an SVG element whose texts stay texts. number: tells its ids from those of other pictures."""
    from matplotlib import rc_context

    picture = io.StringIO()
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "nanopref"}), warnings.catch_warnings(action="ignore"):
        fig.savefig(picture, format="svg", metadata={"Date": None})  # a letter that a font here lacks, a browser's may have
    text = re.sub(r"(?s)<metadata>.*?</metadata>", "", picture.getvalue())
    text = re.sub(r' xmlns(:\w+)?="[^"]*"', "", text[text.index("<svg") :]).replace("xlink:href", "href")
    return re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>p{number}-", text)


def page(found: Found) -> str:
    """The whole page."""
    said, parts = list(found.warnings), []

    def picture(number: int, make: Callable, what: object) -> str:
        try:
            return svg(make(what, "the page's pictures"), number)
        except UserError as error:  # without matplotlib, or without a finite loss, there is no picture
            said.append(str(error))
            return ""

    if runs := {label: records for label, records in found.runs.items() if records}:
        parts += ["<h2>Runs</h2>", html_table(turned(run_table(runs, found.folders)), 1)]
        parts += ["<h2>Curves</h2>", picture(1, plot.runs_figure, runs)]
    if settings := {label: records.settings for label, records in found.runs.items() if records.settings}:
        parts.append("<h2>Settings</h2>")
        every = list(dict.fromkeys(name for of in settings.values() for name in of))
        for title, keys in (("Those that differ", differing(list(settings.values()))), ("All", every)):
            rows = [[name, *(shorten(of[name]) if name in of else "-" for of in settings.values())] for name in keys]
            shown = html_table([["key", *settings], *rows], len(settings) + 1)
            opened = 'open="open"' if keys is not every else ""
            parts.append(f"<details {opened}><summary>{title}</summary>{shown}</details>" if keys else "")
    if found.points:
        parts += ["<h2>Evaluation</h2>", html_table(result_table(found.points), 3)]
        parts.append(picture(2, plot.results_figure, found.points))
    if found.answers:
        table = answers(found.answers)
        parts += ["<h2>Answers</h2>", SEARCH, html_table(table, len(table[0]), "answers")]
    listed = "".join(f"<li>{html.escape(text)}</li>" for text in said)
    top = f'<ul class="warnings">{listed}</ul>' if said else "<p>No warnings.</p>"
    content = re.sub(NOT_ALLOWED, "\ufffd", "\n".join([top, *parts]))
    return FRAME.read_text(encoding="utf-8").replace("<!-- content -->", content)


def write(paths: list[str], out: str | Path, labels: str = "", rows: int = 200) -> None:
    """Write the page for run folders, folders of runs, results and answers to the file `out`."""
    found = collect(plot.by_label(labels, paths), rows)
    for text in found.warnings:
        warn(text)
    write_whole(out, page(found))


def main() -> None:
    paths, cfg = plot.command(Config, "report.page")
    write(paths, cfg.out, cfg.labels, cfg.rows)
    print(f"wrote {cfg.out}")


if __name__ == "__main__":
    run(main, alone=True)
