"""Run folders, or files of sample.py, -> one table, as Markdown and as a picture.

    python tables.py runs/e10 runs/e12 runs/e15 --out runs.md --png runs.png     # settings, losses, judge and time of each run
    python tables.py before.jsonl after.jsonl --labels before,after --out answers.md    # the same prompts, answered by each

Of a run folder it reads config.toml, metrics.jsonl, and the results of eval_winrate.py that lie in it (*.json).
"""

import io
import json
import math
import os
import textwrap
import tomllib
import warnings
from pathlib import Path
from typing import Any

from base.errors import UserError, run
from base.files import check_file, write_whole
from data.jsonl import get, read
from report.plot import MARGIN, Parser, Records, check_out, jumps, read_run, series, warn_of_jumps

Table = list[list[str]]  # the first row is the head

HEAD = "run, model, batch, lr, min lr, warmup, rank/alpha, steps, val loss, perplexity, judge, time, loss jumps at".split(", ")
CELL = 500  # characters of a text that a cell shows: a prompt's last ones, an answer's first ones
LETTERS = 170  # of a picture's width
LETTER, LINE, PAD = 0.0836, 0.19, 0.12  # inches, of DejaVu Sans Mono in 10 points


# --- runs -----------------------------------------------------------------------------------------------------------------


def read_config(folder: str | Path) -> dict[str, Any]:
    """A run folder's config.toml. Raises UserError where it is missing or damaged."""
    path = Path(folder) / "config.toml"
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}: give the out_dir of a run") from None
    except ValueError as error:
        raise UserError(f"{path}: not valid TOML ({error}): copy the run's folder again") from None


def model_of(init_from: str) -> str:
    """The model that a run began with: the name where its weights came from, past the runs that trained them in between."""
    for _ in range(10):
        before = Path(init_from).parent
        if not (before / "config.toml").is_file():
            break
        init_from = str(read_config(before).get("init_from", init_from))
    return init_from if "/" not in init_from else Path(init_from).name


def judged(folder: str | Path) -> str:
    """What eval_winrate.py found, of its result files in the folder: a win rate in %, or a mean score."""
    found = []
    for path in sorted(Path(folder).glob("*.json")):
        try:
            result = json.loads(path.read_bytes())
            if isinstance(result.get("win_rate"), int | float):
                found.append(f"{100 * result['win_rate']:.1f}%")
            elif isinstance(result.get("mean"), int | float):
                found.append(f"{result['mean']:.2f}")
        except (ValueError, AttributeError, OSError):
            continue  # no result of a judge
    return ", ".join(found) or "-"


def run_row(label: str, folder: str | Path, records: Records) -> list[str]:
    """A run's line. The loss is the best of validation, that of the saved model; perplexity, where the loss is one a token, is
    exp of it; time is the sum of its steps' seconds, without validation and saving."""
    cfg = read_config(folder)
    steps, val = series(records, "val", "loss")
    val = val[steps > 0]  # the first is that of the model it began with
    seconds = series(records, "train", "step_s")[1].sum()
    rank = cfg.get("lora_rank", 0)
    preference = any(MARGIN in record for record in records)
    return [
        label,
        model_of(str(cfg.get("init_from", "-"))),
        str(cfg.get("batch_size", "-")),
        *(f"{cfg[name]:g}" if name in cfg else "-" for name in ("lr", "min_lr", "warmup")),
        f"{rank}/{cfg.get('lora_alpha') or rank:g}" if rank else "full",
        str(max(record["step"] for record in records)),
        f"{val.min():.3f}" if len(val) else "-",
        f"{math.exp(min(val.min(), 700)):.3f}" if len(val) and not preference else "-",
        judged(folder),
        f"{seconds / 60:.1f} min" if seconds >= 60 else f"{seconds:.1f} s",
        ", ".join(str(step) for step, _, _ in jumps(records)) or "-",
    ]


# --- answers --------------------------------------------------------------------------------------------------------------


def answers(files: dict[str, str], rows: int) -> Table:
    """The first `rows` prompts of sample.py's files (label -> file), with each file's first completion.

    Raises UserError, with file and line, where the files do not answer the same prompts in the same order.
    """
    table: Table = [["prompt", *files]]
    loaded = {}
    for label, path in files.items():
        loaded[label] = []
        for where, record in read(path, rows):
            completions = get(record, "completions", list, where)
            if not completions or not isinstance(completions[0], str):
                raise UserError(f"{where}: 'completions' must be a list of texts: is it a file of sample.py?")
            loaded[label].append((where, get(record, "prompt", str, where), completions[0]))
    first, *others = files
    for label in others:
        if (here := len(loaded[label])) != (there := len(loaded[first])):
            raise UserError(f"{files[label]} has {here} lines, {files[first]} has {there}: sample the same prompts")
    for lines in zip(*loaded.values(), strict=True):
        for where, prompt, _ in lines:
            if prompt != lines[0][1]:
                raise UserError(f"{where}: another prompt than at {lines[0][0]}: sample the same prompts in the same order")
        prompt = lines[0][1].strip()
        shown = [text.strip() or "(empty)" for _, _, text in lines]
        cut = [text if len(text) <= CELL else text[:CELL] + " …" for text in shown]
        table.append([prompt if len(prompt) <= CELL else "… " + prompt[-CELL:], *cut])
    return table


# --- a table on paper -----------------------------------------------------------------------------------------------------


def markdown(table: Table) -> str:
    """Cells may hold any text: what would end a cell or begin a tag is written so that it is shown."""

    def cell(text: str) -> str:
        for sign, shown in (("&", "&amp;"), ("<", "&lt;"), ("|", "\\|"), ("\r\n", "<br>"), ("\n", "<br>"), ("\r", "<br>")):
            text = text.replace(sign, shown)
        return text

    lines = ["| " + " | ".join(map(cell, row)) + " |" for row in table]
    return "\n".join([lines[0], "|" + "---|" * len(table[0]), *lines[1:]]) + "\n"


def draw(table: Table, out: str | Path, texts: int) -> None:
    """Draw a table into the PNG file `out`, long texts broken into lines; it is written whole or not at all.

    texts: so many columns are text, the others numbers, which stand flush right.
    """
    try:
        from matplotlib.figure import Figure
        from matplotlib.lines import Line2D
    except ImportError:
        raise UserError(f"matplotlib is needed to draw {out}: pip install matplotlib") from None

    columns = range(len(table[0]))
    widths = [max(len(line) for row in table for line in row[i].splitlines() or [""]) for i in columns]
    length = [sum(len(row[i]) for row in table) for i in columns]
    while sum(widths) > LETTERS:  # the text with the fewest lines gives way
        wide = [i for i in columns if widths[i] > 20] or columns
        widths[min(wide, key=lambda i: length[i] / widths[i])] -= 1
    rows = []
    for row in table:
        cells = []
        for text, width in zip(row, widths, strict=True):
            lines = [part for line in text.splitlines() for part in textwrap.wrap(line, max(width, 1)) or [""]]
            cells.append(lines or [""])
        rows.append(cells)
    heights = [max(len(cell) for cell in cells) * LINE + PAD for cells in rows]
    wide, high = sum(widths) * LETTER + (len(widths) + 1) * 2 * PAD, sum(heights) + 2 * PAD
    fig = Figure(figsize=(wide, high), dpi=100)
    y = high - PAD
    for n, (cells, height) in enumerate(zip(rows, heights, strict=True)):
        x = 2 * PAD
        for i, (lines, width) in enumerate(zip(cells, widths, strict=True)):
            right = i >= texts
            style = {"family": "monospace", "size": 10, "weight": "bold" if n == 0 else "normal", "parse_math": False}
            for k, line in enumerate(lines, start=1):
                at = (x + width * LETTER if right else x) / wide, (y - k * LINE) / high
                fig.text(*at, line, ha="right" if right else "left", va="baseline", **style)
            x += width * LETTER + 2 * PAD
        y -= height
        fig.add_artist(Line2D([0, 1], [y / high] * 2, color="0.3" if n == 0 else "0.85", linewidth=1.4 if n == 0 else 0.8))
    picture = io.BytesIO()
    with warnings.catch_warnings(action="ignore"):  # a sign that the font lacks is drawn as a box
        fig.savefig(picture, format="png")
    write_whole(out, picture.getvalue())


def main() -> None:
    parser = Parser(prog="tables.py", description="Runs, or answers, side by side.", allow_abbrev=False)
    parser.add_argument("sources", nargs="+", metavar="RUN_FOLDER|FILE.jsonl", help="out_dirs of runs, or files of sample.py")
    parser.add_argument("--labels", metavar="A,B", help="a name for each, instead of its folder's or file's")
    parser.add_argument("--rows", type=int, default=10, help="answers: the first so many prompts (default: 10)")
    parser.add_argument("--out", metavar="FILE.md", default="", help="Markdown file to write, beside printing it")
    parser.add_argument("--png", metavar="FILE.png", default="", help="picture to draw")
    args = parser.parse_intermixed_args()

    for name in ("out", "png"):
        check_file(name, getattr(args, name))
    if args.png:
        check_out(args.png)
    if args.rows < 1:
        raise UserError(f"--rows is {args.rows}: the least is 1")
    labels = args.labels.split(",") if args.labels else [Path(os.path.realpath(s)).name.split(".")[0] for s in args.sources]
    if not args.labels and len(set(labels)) < len(labels):
        labels = args.sources
    if len(labels) != len(args.sources) or len(set(labels)) < len(labels):
        raise UserError(f"--labels: {', '.join(labels)} for {len(args.sources)} sources: give each one name of its own")
    sources = dict(zip(labels, args.sources, strict=True))
    if all(Path(source).is_dir() for source in args.sources):
        records = {label: read_run(folder) for label, folder in sources.items()}
        table = [HEAD, *(run_row(label, folder, records[label]) for label, folder in sources.items())]
        warn_of_jumps(records)
    else:
        table = answers(sources, args.rows)
    text = markdown(table)
    print(text, end="")
    if args.out:
        write_whole(args.out, text)
    if args.png:
        draw(table, args.png, texts=2 if table[0] is HEAD else len(table[0]))


if __name__ == "__main__":
    run(main, alone=True)
