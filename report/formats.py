"""Tables as plain text, Markdown and CSV. Texts may hold any characters."""

import csv
import html
import io
import itertools
import re
import textwrap
import unicodedata

Table = list[list[str]]  # the first row is the head


def width(text: str) -> int:
    """Columns of a terminal: a Chinese, Japanese or Korean letter takes two."""
    return len(text) + sum(unicodedata.east_asian_width(letter) in "WF" for letter in text)


def aligned(table: Table, texts: int = 1, most: int = 1000) -> list[str]:
    """Each row of a table as lines of plain text, its cells broken into lines of `most` letters and padded to one width.

    texts: how many columns are text; those after them are numbers, and are aligned on the right.
    """
    cells = [
        [[part for line in text.splitlines() for part in textwrap.wrap(line, most) or [""]] for text in row] for row in table
    ]
    widths = [max((width(line) for cell in column for line in cell), default=0) for column in zip(*cells, strict=True)]

    def padded(i: int, text: str) -> str:
        space = " " * (widths[i] - width(text))
        return text + space if i < texts else space + text

    rows = (itertools.zip_longest(*row, fillvalue="") for row in cells)
    return ["\n".join("  ".join(padded(i, text) for i, text in enumerate(line)) for line in row) for row in rows]


def turned(table: Table) -> Table:
    """The table with its rows as columns: it stays narrow where it has few rows and many columns."""
    return [list(column) for column in zip(*table, strict=True)]


def markdown(table: Table) -> str:
    """The table in Markdown. Cells may hold any text: what would end a cell or begin a tag is escaped. So are Markdown's own
    marks, or a text could bring a picture along that the reader's browser fetches."""

    def cell(text: str) -> str:
        text = re.sub(r"[|\[\]`*~\\]", lambda mark: f"&#{ord(mark[0])};", html.escape(text, quote=False))
        return "<br>".join(text.splitlines())

    lines = ["| " + " | ".join(map(cell, row)) + " |" for row in table]
    return "\n".join([lines[0], "|" + "---|" * len(table[0]), *lines[1:]]) + "\n"


def as_csv(table: Table) -> str:
    """The table in CSV, as spreadsheets read it: commas, quotes where needed, a line break within a cell kept."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(table)
    return text.getvalue()
