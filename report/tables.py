"""Put runs, or answers to the same prompts, side by side in one table, as Markdown or CSV and as a picture.

    python -m report.tables runs/e10 runs/e12 --out runs.md --png runs.png        # settings, losses, judge and time of each run
    python -m report.tables before.jsonl after.jsonl --labels before,after --out answers.md    # each file's answers

Of a run folder it reads config.toml, metrics.jsonl, and the results of evaluations in it (*.json).
"""

from base.script import run

from dataclasses import dataclass
from pathlib import Path

from base.files import write_whole
from data import messages
from data.jsonl import entries, read
from report.formats import Table, aligned, as_csv, markdown, turned, width
from report.plot import by_label, command, east_asian, figure, save
from report.runs import read_config, side_by_side
from runtime.config import key

CELL = 500  # characters of a text that a cell shows: a prompt's last ones, an answer's first ones
LETTERS = 170  # letters in a line of the picture, all columns together


@dataclass
class Config:
    """Runs, or answers to the same prompts, side by side."""

    out: str = key("", "file to write, beside printing it: CSV if it ends in .csv, else Markdown", writes="")
    png: str = key("", "PNG file to draw", writes=".png")
    labels: str = key("", "a name for each path, commas between, instead of its folder's or file's")
    rows: int = key(10, "answers: use only the first so many prompts", least=1)


# --- answers --------------------------------------------------------------------------------------------------------------


Answers = dict[str, dict[str, str]]  # label -> prompt -> answer


def read_answers(path: str | Path, rows: int) -> dict[str, str]:
    """Prompt -> first completion, in the first `rows` lines of a file of sample.py. A prompt counts once."""
    found = {}
    for where, record in read(path, rows):
        first, *_ = entries(record, "completions", str, "texts", where)
        prompt = messages.as_text(messages.prompt_of(record, where)).strip()
        found.setdefault(prompt, first.strip() or "(empty)")
    return found


def answers(files: Answers) -> Table:
    """A row a prompt, with each file's answer; "-" where a file has none."""
    prompts = dict.fromkeys(prompt for texts in files.values() for prompt in texts)
    return [["prompt", *files], *([prompt, *(texts.get(prompt, "-") for texts in files.values())] for prompt in prompts)]


def cut(table: Table) -> Table:
    """The table with CELL letters of a text at most: of the first column's, the prompts, the last ones."""
    shown = table[:1]
    for prompt, *texts in table[1:]:
        prompt = prompt if len(prompt) <= CELL else "… " + prompt[-CELL:]
        shown.append([prompt, *(text if len(text) <= CELL else text[:CELL] + " …" for text in texts)])
    return shown


# --- a table as a picture -------------------------------------------------------------------------------------------------


def draw(table: Table, out: str | Path, texts: int) -> None:
    """Draw a table into the PNG file `out`, long texts broken into lines. `texts` as in `aligned`."""
    rows = aligned(table, texts, max(LETTERS // len(table[0]), 13))
    rule = "─" * max(width(line) for row in rows for line in row.splitlines())
    fig = figure(out, 1, 1)  # the picture is cut to its text
    font = {"family": ["monospace", *east_asian()], "size": 10, "parse_math": False}
    fig.text(0, 0, f"\n{rule}\n".join(rows), **font)
    save(fig, out, bbox_inches="tight", pad_inches=0.2)


def main() -> None:
    paths, cfg = command(Config, "report.tables")
    sources = by_label(cfg.labels, paths)
    are_runs, is_csv = all(Path(path).is_dir() for path in paths), cfg.out.endswith(".csv")
    if are_runs:
        for folder in paths:
            read_config(folder)  # a table without settings says too little
        _, table = side_by_side(sources)
    else:
        table = answers({label: read_answers(path, cfg.rows) for label, path in sources.items()})
        table = table if is_csv else cut(table)
    text = as_csv(table) if is_csv else markdown(table)
    print(text, end="")
    if cfg.out:
        write_whole(cfg.out, text)
    if cfg.png:
        draw(*(turned(table), cfg.png, 1) if are_runs else (table, cfg.png, len(table[0])))


if __name__ == "__main__":
    run(main, alone=True)
