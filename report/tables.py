"""Put runs, or answers to the same prompts, side by side in one table, as Markdown and as a picture.

    python -m report.tables runs/e10 runs/e12 --out runs.md --png runs.png        # settings, losses, judge and time of each run
    python -m report.tables before.jsonl after.jsonl --labels before,after --out answers.md    # each file's answers

Of a run folder it reads config.toml, metrics.jsonl, and the results of eval_winrate.py in it (*.json).
"""

from base.script import run

import math
import warnings
from dataclasses import dataclass
from pathlib import Path

from base.errors import UserError
from base.files import parse_json, read_plain, write_whole
from data.jsonl import get, read
from report.plot import aligned, by_label, command, figure, save
from report.runs import MARGIN, Records, jumps, read_config, read_run, series, warn_of_jumps
from runtime.config import key

Table = list[list[str]]  # the first row is the head

HEAD = "run, model, batch, lr, min lr, warmup, rank/alpha, steps, val loss, perplexity, judge, time, loss jumps at".split(", ")
CELL = 500  # characters of a text that a cell shows: a prompt's last ones, an answer's first ones
LETTERS = 170  # letters in a line of the picture, all columns together


@dataclass
class Config:
    """Runs, or answers to the same prompts, side by side."""

    out: str = key("", "Markdown file to write, beside printing it", writes="")
    png: str = key("", "PNG file to draw", writes=".png")
    labels: str = key("", "a name for each path, commas between, instead of its folder's or file's")
    rows: int = key(10, "answers: use only the first so many prompts", least=1)


# --- runs -----------------------------------------------------------------------------------------------------------------


def model_of(init_from: str) -> str:
    """The model that a run's weights first came from: where `init_from` is another run's, what that run began with."""
    for _ in range(10):
        before = Path(init_from).parent
        before = before.parent if before.name == "checkpoints" else before
        if not (before / "config.toml").is_file():
            break
        init_from = str(read_config(before).get("init_from", init_from))
    return init_from if "/" not in init_from else Path(init_from).name


def judged(folder: str | Path) -> str:
    """What eval_winrate.py found, from its results in the folder: a win rate in %, or a mean score."""
    found = []
    for path in sorted(Path(folder).glob("*.json")):
        try:
            result = parse_json(read_plain(path))
            found.append(f"{100 * result['win_rate']:.1f}%" if "win_rate" in result else f"{result['mean']:.2f}")
        except (UserError, ValueError, KeyError, TypeError):
            continue  # not a judge's result
    return ", ".join(found) or "-"


def run_row(label: str, folder: str | Path, records: Records) -> list[str]:
    """One run's row. The loss is the best of validation, which is that of the saved model. Perplexity is exp of it, where the
    loss is one a token. The time is the sum of its steps' seconds, without validation and saving."""
    cfg = {name: value for name, value in read_config(folder).items() if isinstance(value, str | int | float)}
    numbers = {name: value for name, value in cfg.items() if not isinstance(value, str)}
    steps, val = series(records, "val", "loss")
    loss = min(val[steps > 0], default=None)  # step 0 is the model before training
    seconds = series(records, "train", "step_s")[1].sum()
    rank = numbers.get("lora_rank", 0)
    preference = any(MARGIN in record for record in records)
    return [
        label,
        model_of(str(cfg.get("init_from", "-"))),
        *(f"{numbers[name]:g}" if name in numbers else "-" for name in ("batch_size", "lr", "min_lr", "warmup")),
        f"{rank}/{numbers.get('lora_alpha') or rank:g}" if rank else "full",
        str(max(record["step"] for record in records)),
        "-" if loss is None else f"{loss:.3f}",
        "-" if loss is None or preference else f"{math.exp(min(loss, 700)):.3f}",
        judged(folder),
        f"{seconds / 60:.1f} min" if seconds >= 60 else f"{seconds:.1f} s",
        ", ".join(str(step) for step, _, _ in jumps(records)) or "-",
    ]


# --- answers --------------------------------------------------------------------------------------------------------------


def answers(files: dict[str, str], rows: int) -> Table:
    """The first `rows` prompts of sample.py's files (label -> file), with each file's first completion.

    Raises UserError, with file and line, where the files do not answer the same prompts in the same order.
    """
    columns = []
    for path in files.values():
        lines = []
        for where, record in read(path, rows):
            completions = get(record, "completions", list, where)
            if not completions or not isinstance(completions[0], str):
                raise UserError(f"{where}: 'completions' must be a list of texts: is it a file of sample.py?")
            lines.append((where, get(record, "prompt", str, where), completions[0]))
        columns.append(lines)
        if len(lines) != len(columns[0]):
            raise UserError(f"{path} has {len(lines)} lines, the first file {len(columns[0])}: sample the same prompts")
    table: Table = [["prompt", *files]]
    for lines in zip(*columns, strict=True):
        first, prompt, _ = lines[0]
        for where, other, _ in lines:
            if other != prompt:
                raise UserError(f"{where}: another prompt than at {first}: sample the same prompts in the same order")
        prompt, texts = prompt.strip(), [text.strip() or "(empty)" for _, _, text in lines]
        cut = [text if len(text) <= CELL else text[:CELL] + " …" for text in texts]
        table.append([prompt if len(prompt) <= CELL else "… " + prompt[-CELL:], *cut])
    return table


# --- a table on paper -----------------------------------------------------------------------------------------------------


def markdown(table: Table) -> str:
    """The table in Markdown. Cells may hold any text: what would end a cell or begin a tag is escaped."""

    def cell(text: str) -> str:
        for sign, shown in (("&", "&amp;"), ("<", "&lt;"), ("|", "\\|")):
            text = text.replace(sign, shown)
        return "<br>".join(text.splitlines())

    lines = ["| " + " | ".join(map(cell, row)) + " |" for row in table]
    return "\n".join([lines[0], "|" + "---|" * len(table[0]), *lines[1:]]) + "\n"


def draw(table: Table, out: str | Path, texts: int) -> None:
    """Draw a table into the PNG file `out`, long texts broken into lines. `texts` as in `aligned`."""
    rows = aligned(table, texts, most=max(LETTERS // len(table[0]), 13))
    fig = figure(out, 1, 1)  # the picture is cut to its text
    rule = "\n" + "─" * len(rows[0].partition("\n")[0]) + "\n"
    fig.text(0, 1, rule.join(rows), family="monospace", size=10, va="top", parse_math=False)
    with warnings.catch_warnings(action="ignore"):  # a letter that the font lacks is drawn as a box
        save(fig, out, bbox_inches="tight", pad_inches=0.2)


def main() -> None:
    paths, cfg = command(Config, "report.tables")
    sources = by_label(cfg.labels, paths)
    if all(Path(path).is_dir() for path in paths):
        records = {label: read_run(folder) for label, folder in sources.items()}
        table = [HEAD, *(run_row(label, folder, records[label]) for label, folder in sources.items())]
        warn_of_jumps(records)
    else:
        table = answers(sources, cfg.rows)
    print(markdown(table), end="")
    if cfg.out:
        write_whole(cfg.out, markdown(table))
    if cfg.png:
        draw(table, cfg.png, texts=2 if table[0] is HEAD else len(table[0]))


if __name__ == "__main__":
    run(main, alone=True)
