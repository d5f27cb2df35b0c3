"""Tokens on disk: made once, then mapped into memory, where all processes of a machine share them.

A file holds records. A record is a list of int32 arrays (the parts) and a few whole numbers. In the file stand

    stream   int32: for each record the number of its parts, their lengths, and the parts themselves
    table    int64, a row for each record: where it begins in the stream; then its numbers
    about    a line of JSON: where the table begins, its columns, the size and CRC-32 of all before this line, and what the
             maker has to say

The file's name is the SHA-256 of all that its content depends on (`name`). So it is never out of date, only unused.
"""

import hashlib
import json
import zlib
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np

from base.download import cache_dir
from base.errors import UserError, warn
from base.files import sha256_of, write_whole

SMALL = 4_000_000  # bytes of data: to tokenize so little takes about a second
ABOUT = 1 << 16  # bytes: the most that the last line has


def name(files: Iterable[Path], depends_on: dict) -> Path:
    """Where the tokens of these files belong. `depends_on` holds, as JSON values, everything else that decides the tokens.

    The code of this folder counts too, since it turns the ones into the others: an edit there makes the tokens anew.
    """
    digest = hashlib.sha256(json.dumps(depends_on, sort_keys=True).encode())
    for path in (*sorted(Path(__file__).parent.glob("*.py")), *files):
        digest.update(f"\n{path.name} {sha256_of(path)}".encode())
    return cache_dir() / "tokens" / f"{digest.hexdigest()}.tokens"


class Records(Sequence):
    """The records of a cache file, each made by `make(parts, numbers)` when it is asked for. Pickled as its path.

    about: what the maker of the file had to say. numbers: int64 (records, kinds). OSError where there is no such file,
    ValueError where it is damaged; `check` compares the checksum too, which reads all of it.
    """

    def __init__(self, path: Path, make: Callable, check: bool = False):
        self.path, self.make = path, make
        content = np.asarray(np.memmap(path, np.uint8, "r"))
        line = content[-ABOUT:].tobytes().rpartition(b"\n")[2]
        self.about = json.loads(line)
        content, size = content[: self.about["bytes"]], len(content)
        if size != len(content) + 1 + len(line) or (check and zlib.crc32(content) != self.about["crc32"]):
            raise ValueError("other bytes than were written")
        begin = self.about["table"]
        table = content[begin:].view(np.int64).reshape(-1, self.about["columns"])
        self.stream, self.begins, self.numbers = content[:begin].view(np.int32), table[:, 0], table[:, 1:]

    def __reduce__(self):
        return _shared, (self.path, self.make)

    def __len__(self) -> int:
        return len(self.begins)

    def __getitem__(self, i):
        if isinstance(i, slice):
            return [self[j] for j in range(*i.indices(len(self)))]
        at = self.begins[i]
        begin = at + 1 + self.stream[at]
        parts = []
        for length in self.stream[at + 1 : begin].tolist():
            parts.append(self.stream[begin : begin + length])
            begin += length
        return self.make(parts, self.numbers[i].tolist())


def _shared(path: Path, make: Callable) -> Records | None:
    """What another process has mapped; None where this machine does not see the file."""
    return Records(path, make) if path.is_file() else None


def _content(records: Iterable[tuple[list[np.ndarray], list[int]]], about: Callable[[], dict]) -> Iterator[bytes]:
    """The file, piece by piece: of the parts no more than one record is held. There must be a record."""
    table, columns, at, crc = array("q"), 0, 0, 0
    for parts, numbers in records:
        columns = 1 + len(numbers)
        table.extend((at, *numbers))
        head = np.array([len(parts), *map(len, parts)], np.int32)
        piece = b"".join(part.tobytes() for part in (head, *parts))
        at, crc = at + len(piece) // 4, zlib.crc32(piece, crc)
        yield piece
    piece = bytes(4 * (at % 2)) + table.tobytes()  # the table begins at a multiple of 8
    yield piece
    size = 4 * at + len(piece)
    said = {"table": size - 8 * len(table), "columns": columns, "bytes": size, "crc32": zlib.crc32(piece, crc)}
    yield b"\n" + json.dumps(said | about()).encode()


def kept(path: Path, records: Callable[[], Iterable], about: Callable[[], dict], make: Callable) -> Records:
    """The records that the file `path` holds. If it is not there, or damaged, it is written from `records()` first, whole or
    not at all; `about()` is asked when they are through.

    records: gives (parts, numbers) for each. UserError where the file cannot be written.
    """
    try:
        if path.exists():
            return Records(path, make, check=True)
    except (ValueError, KeyError, TypeError) as error:
        warn(f"{path} is damaged ({error}): made anew")
    try:
        write_whole(path, _content(records(), about))
    except OSError as error:
        what = f"{path}: the tokens cannot be kept there ({error.strerror})"
        raise UserError(f"{what}: make room, or name another folder with NANOPREF_CACHE") from None
    return Records(path, make)
