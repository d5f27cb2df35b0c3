"""Reading JSON files: one object a line, or, unless named .jsonl, one list of objects; plain or gzipped. And reading fields."""

import csv
import gzip
import itertools
import json
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

from base.errors import UserError

BYTE_ORDER_MARK = b"\xef\xbb\xbf"
KINDS = {str: "text", int: "a whole number", list: "a list", bool: "true or false"}


def read(path: str | Path, limit: int = 0, rows: Callable | None = None) -> Iterator[tuple[str, dict]]:
    """("file:line", object) for every line that is not empty; ("file entry N", object) where the file is one list.

    `limit` above 0 stops after so many objects. rows(path, open file) gives such pairs, where the file is no JSON. Raises
    UserError for a file that is missing, damaged or empty, and for what is no JSON object.
    """
    where = path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: {'not a file' if path.exists() else 'no such file'}")
    try:
        with (gzip.open if path.suffix == ".gz" else open)(path, "rb") as file:
            for where, record in itertools.islice((rows or _objects)(path, file), limit or None):
                if not isinstance(record, dict):
                    raise UserError(f"{where}: a {type(record).__name__} where a JSON object {{…}} was expected")
                yield where, record
    except (EOFError, gzip.BadGzipFile, zlib.error, csv.Error, UnicodeDecodeError) as error:
        raise UserError(f"{path}: damaged, or not what its name says, read up to {where} ({error}): get it anew") from None
    if where == path:
        raise UserError(f"{path}: an empty file or list: it needs at least one row")


def _objects(path: Path, file: BinaryIO) -> Iterator[tuple[str, object]]:
    is_list = file.peek(64).removeprefix(BYTE_ORDER_MARK).lstrip().startswith(b"[")
    if is_list and not path.name.endswith((".jsonl", ".jsonl.gz")):
        for number, record in enumerate(_parsed(str(path), file.read()), start=1):
            yield f"{path} entry {number}", record
        return
    for number, line in enumerate(file, start=1):
        if line.strip():
            yield f"{path}:{number}", _parsed(f"{path}:{number}", line)


def _parsed(where: str, text: bytes):
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: not JSON in UTF-8: {error}") from None


def missing(record: dict, field: str, where: str, hint: str = "") -> UserError:
    """The error of a field that a record has not."""
    there = ", ".join(sorted(record)) or "none"
    return UserError(f"{where}: the field {field!r} is missing (fields there: {there}){hint}")


def get(record: dict, field: str, kind: type, where: str):
    """A field of the type `kind` (one of KINDS). UserError if it is missing, of another type, or no Unicode text."""
    if field not in record:
        raise missing(record, field, where)
    value = record[field]
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise UserError(f"{where}: the field {field!r} must be {KINDS[kind]}, not {value!r:.60}")
    try:
        for text in value if kind is list else [value]:
            if isinstance(text, str):
                text.encode()
    except UnicodeEncodeError:
        raise UserError(f"{where}: the field {field!r} holds half a surrogate pair (\\ud800…): no Unicode text") from None
    return value


def entries(record: dict, field: str, kind: type, what: str, where: str, n: int = 0) -> list:
    """A field that is a list of `kind`, of `n` entries or (0) at least one. Raises UserError for anything else."""
    values = get(record, field, list, where)
    if not values or (n and len(values) != n) or not all(isinstance(v, kind) for v in values):
        count = f"one for each of the {n} completions" if n else "at least one"
        raise UserError(f"{where}: {field!r} must be a list of {what}, {count}")
    return values


def index(record: dict, field: str, n: int, where: str) -> int:
    """A field that is the index of one of `n` options, or a UserError."""
    value = get(record, field, int, where)
    if not 0 <= value < n:
        raise UserError(f"{where}: {field} {value} is out of range: there are {n}, numbered from 0")
    return value


def completion(record: dict, field: str, where: str) -> str:
    """A field that is a text to learn or to score; UserError if it is empty."""
    text = get(record, field, str, where)
    if not text:
        raise UserError(f"{where}: {field!r} is empty: a completion needs at least one token")
    return text
