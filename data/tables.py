"""Rows of a file as records, whatever the file: parquet (by pyarrow), CSV, or what data/jsonl.py reads."""

import csv
import io
import re
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import BinaryIO

from base.errors import UserError
from data import jsonl

ENDINGS = (".parquet", ".jsonl", ".jsonl.gz", ".json", ".json.gz", ".csv", ".csv.gz")  # of a hub repository: the first it has
ROWS = 256  # parquet rows that are Python objects at the same time
MESSAGES = re.compile(r"""\s*\[\s*\{\s*["'](role|content)["']\s*:""")  # how a list of messages begins, written as text
csv.field_size_limit(2**31 - 1)  # characters; Python's own limit of 131,072 is less than a long document has


def read(path: Path, limit: int = 0, columns: str = "") -> Iterator[tuple[str, dict]]:
    """("file:line", "file entry N" or "file row N", record) for each row; `limit` above 0 stops after so many.

    columns: "prompt=question,chosen=a": a record has these fields only, under the names before the `=`. "" = it has all of
    them. Raises UserError for a file that is damaged or lacks a column, and for what `jsonl.read` refuses.
    """
    wanted = parse(columns)
    parquet, text = path.name.endswith(".parquet"), path.name.endswith((".csv", ".csv.gz"))
    rows = partial(_parquet, wanted) if parquet else _csv if text else None
    for where, record in jsonl.read(path, limit, rows):
        if wanted:
            _check(wanted, record, where)
            record = {name: record[column] for name, column in wanted.items()}
        yield where, record


def parse(columns: str) -> dict[str, str]:
    """The key `columns` as {field: column}."""
    pairs = [[word.strip() for word in pair.split("=")] for pair in columns.split(",")] if columns else []
    if not all(len(pair) == 2 and all(pair) for pair in pairs) or len({pair[0] for pair in pairs}) < len(pairs):
        raise UserError(f"key columns: {columns!r} is not of the form prompt=question,chosen=a,rejected=b, each field once")
    return dict(pairs)


def _check(wanted: dict[str, str], there, where: str) -> None:
    for name, column in wanted.items():
        if column not in there:
            raise UserError(f"{where}: no column {column!r} for {name!r} of --columns: use {', '.join(map(str, there))}")


def _parquet(wanted: dict[str, str], path: Path, file: BinaryIO) -> Iterator[tuple[str, dict]]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise UserError(f"{path}: parquet files need the package pyarrow, which is not here: pip install pyarrow") from None
    number = 0
    try:
        table = parquet.ParquetFile(file)
        _check(wanted, table.schema_arrow.names, str(path))
        for batch in table.iter_batches(ROWS, columns=list(wanted.values()) or None):
            for record in batch.to_pylist():
                number += 1
                yield f"{path} row {number}", record
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        why = str(error).splitlines()[0]
        raise UserError(f"{path}: damaged or no parquet file, read up to row {number} ({why}): get it anew") from None


def _csv(path: Path, file: BinaryIO) -> Iterator[tuple[str, dict]]:
    rows = csv.DictReader(io.TextIOWrapper(file, "utf-8-sig", newline=""), strict=True)
    names = rows.fieldnames or []
    if len(names) == 1 and (mark := next((mark for mark in ";\t|" if mark in names[0]), "")):
        raise UserError(f"{path}:1: {mark!r} stands between its columns, not a comma: save it with commas, or as .jsonl")
    if len(set(names)) < len(names):
        raise UserError(f"{path}:1: two columns of one name among {', '.join(names)}: rename one")
    for record in rows:
        if any(isinstance(text, str) and MESSAGES.match(text) for text in record.values()):
            raise UserError(f"{path}:{rows.line_num}: JSON messages in CSV, which holds plain texts: save them as .jsonl")
        if None in record:  # what stands behind the last column
            raise UserError(f"{path}:{rows.line_num}: more fields than columns: put a text with a comma in quotes")
        yield f"{path}:{rows.line_num}", record
