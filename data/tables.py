"""Rows of a file as records, whatever the file: parquet (by pyarrow), CSV, or what data/jsonl.py reads."""

import csv
import gzip
import itertools
import zlib
from collections.abc import Iterator
from pathlib import Path

from base.errors import UserError
from data import jsonl

ENDINGS = (".parquet", ".jsonl", ".jsonl.gz", ".json", ".json.gz", ".csv", ".csv.gz")  # of a hub repository: the first it has
ROWS = 256  # parquet rows that are Python objects at the same time
csv.field_size_limit(2**31 - 1)  # characters; Python's own limit of 131,072 is less than a long document has


def read(path: Path, limit: int = 0, columns: str = "") -> Iterator[tuple[str, dict]]:
    """("file:line", "file entry N" or "file row N", record) for each row; `limit` above 0 stops after so many.

    columns: "prompt=question,chosen=a": a record has these fields only, under the names before the `=`. "" = it has all of
    them. Raises UserError for a file that is damaged or lacks a column, and for what `jsonl.read` refuses.
    """
    wanted = parse(columns)
    if path.name.endswith(".parquet"):
        rows = _parquet(path, wanted)
    elif path.name.endswith((".csv", ".csv.gz")):
        rows = _csv(path)
    else:
        rows = jsonl.read(path, limit)
    for where, record in itertools.islice(rows, limit or None):
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
            raise UserError(
                f"{where}: no column {column!r} for {name!r}: name one of {', '.join(map(str, there))} in --columns"
            )


def _parquet(path: Path, wanted: dict[str, str]) -> Iterator[tuple[str, dict]]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise UserError(f"{path}: parquet files need the package pyarrow, which is not here: pip install pyarrow") from None
    number = 0
    with open(path, "rb") as file:
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


def _csv(path: Path) -> Iterator[tuple[str, dict]]:
    where = f"{path}:1"
    try:
        with (gzip.open if path.suffix == ".gz" else open)(path, "rt", newline="", encoding="utf-8-sig") as file:
            rows = csv.DictReader(file, strict=True)
            names = rows.fieldnames or []
            if len(set(names)) < len(names):
                raise UserError(f"{where}: two columns of one name among {', '.join(names)}: rename one")
            for record in rows:
                where = f"{path}:{rows.line_num}"
                if None in record:  # what stands behind the last column
                    raise UserError(f"{where}: more fields than columns: put a text with a comma in quotes")
                yield where, record
    except (UnicodeDecodeError, csv.Error, EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise UserError(f"{path}: damaged, or no CSV text in UTF-8, read up to {where} ({error}): mend the file") from None
