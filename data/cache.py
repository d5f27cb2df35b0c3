"""Tokens on disk: made once, then mapped into memory, where all processes of a machine share them.

A file holds records. A record is a list of int32 arrays (the parts) and a few whole numbers. In the file stand

    stream   int32: for each record the number of its parts, their lengths, and the parts themselves
    table    int64 (1 + numbers, records): where each record begins in the stream; then its numbers, a row for each kind
    shape    int64 (2,): of the table
    about    a line of JSON: the size and CRC-32 of all before it, and what the maker has to say

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
from base.files import write_whole

SMALL = 4_000_000  # bytes of data: to tokenize so little takes about a second
ABOUT = 1 << 16  # bytes: the most that the last line has


def name(files: Iterable[Path], depends_on: dict) -> Path:
    """Where the tokens of these files belong. `depends_on` holds, as JSON values, everything else that decides the tokens.

    The code of this folder counts too, since it turns the ones into the others: an edit there makes the tokens anew.
    """
    digest = hashlib.sha256(json.dumps(depends_on, sort_keys=True).encode())
    for path in (*sorted(Path(__file__).parent.glob("*.py")), *files):
        with open(path, "rb") as file:
            digest.update(f"\n{path.name} {hashlib.file_digest(file, 'sha256').hexdigest()}".encode())
    return cache_dir() / "tokens" / f"{digest.hexdigest()}.tokens"


class Records(Sequence):
    """The records of a cache file, each made by `make(parts, numbers)` when it is asked for. Pickled as its path.

    about: what the maker of the file had to say. numbers: int64 (kinds, records). OSError where there is no such file,
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
        shape = content[-16:].view(np.int64)
        begin = len(content) - 16 - 8 * shape.prod()
        table = content[begin:-16].view(np.int64).reshape(shape)
        self.stream, self.begins, self.numbers = content[:begin].view(np.int32), table[0], table[1:]

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
        return self.make(parts, self.numbers[:, i].tolist())


def _shared(path: Path, make: Callable) -> Records | None:
    """What another process has mapped; None where this machine does not see the file."""
    return Records(path, make) if path.is_file() else None


def _content(records: Iterable[tuple[list[np.ndarray], list[int]]]) -> Iterator[bytes]:
    """Stream and table, piece by piece: of the parts no more than one record is held. There must be a record."""
    columns, at = [], 0
    for parts, numbers in records:
        columns = columns or [array("q") for _ in (at, *numbers)]
        for column, number in zip(columns, (at, *numbers), strict=True):
            column.append(number)
        head = np.array([len(parts), *map(len, parts)], np.int32)
        at += len(head) + sum(map(len, parts))
        yield b"".join(part.tobytes() for part in (head, *parts))
    yield bytes(4 * (at % 2))  # so that the int64 behind it begin at a multiple of 8
    yield from (column.tobytes() for column in columns)
    yield np.array([len(columns), len(columns[0])]).tobytes()


def _sealed(pieces: Iterable[bytes], about: Callable[[], dict]) -> Iterator[bytes]:
    """The pieces, and the last line behind them."""
    size = crc = 0
    for piece in pieces:
        size, crc = size + len(piece), zlib.crc32(piece, crc)
        yield piece
    yield b"\n" + json.dumps({"bytes": size, "crc32": crc, **about()}).encode()


def kept(path: Path, records: Callable[[], Iterable], about: Callable[[], dict], make: Callable) -> Records:
    """The records that the file `path` holds. If it is not there, or damaged, it is written from `records()` first, whole or
    not at all; `about()` is asked when they are through.

    records: gives (parts, numbers) for each. UserError where the file cannot be written.
    """
    try:
        return Records(path, make, check=True)
    except (FileNotFoundError, NotADirectoryError):
        pass
    except (ValueError, KeyError, TypeError) as error:
        warn(f"{path} is damaged ({error}): made anew")
    try:
        write_whole(path, _sealed(_content(records()), about))
    except OSError as error:
        what = f"{path}: the tokens cannot be kept there ({error.strerror})"
        raise UserError(f"{what}: make room, or name another folder with NANOPREF_CACHE") from None
    return Records(path, make)
