"""TensorFlow's checkpoints, read without TensorFlow: an index of names, shapes and offsets over one flat file of numbers.

The index is a table as LevelDB's (github.com/google/leveldb, doc/table_format.md) whose values are the messages of TensorFlow's
tensor_bundle.proto in protocol-buffer coding:

    block    entries (shared, own, size, key's own end, value), restart points, 1 byte of compression, 4 of checksum
    footer   the last 48 bytes: where the block of metadata and the block of blocks lie, padding, a magic number
    ""       the first key: BundleHeaderProto. Every other key is a tensor's name, its value a BundleEntryProto

Whatever bytes stand there, the functions return what the format says of them or raise UserError.
"""

import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from base.errors import UserError

FOOTER, MAGIC = 48, 0xDB4775248B80FB57
MOST = 2**20  # bytes of an index: GPT-2 1.5B's has 21 thousand
LONGEST = 1000  # bytes of a name
DT_FLOAT = 1


class _Damaged(Exception):
    pass


@dataclass(frozen=True)
class Entry:
    """One tensor: float32, little-endian, `size` bytes from `offset` of the data file on."""

    name: str
    shape: tuple[int, ...]
    offset: int
    size: int
    crc: int  # masked CRC-32C of the bytes


def read_index(path: Path) -> list[Entry]:
    """What a NAME.index file lists, sorted by name. Raises UserError where it is damaged or holds more than plain float32
    tensors in one data file."""
    try:
        if (size := path.stat().st_size) > MOST:
            raise _Damaged(f"{size:,} bytes, an index has at most {MOST:,}")
        return list(_entries(path.read_bytes()))
    except _Damaged as error:
        raise UserError(f"{path}: damaged, or no index of a TensorFlow checkpoint ({error}): delete it, get it again") from None


def read_tensor(entry: Entry, path: Path) -> np.ndarray:
    """The entry's numbers out of the data file, checked: a float32 array of its shape. Raises UserError where it is damaged."""
    with open(path, "rb") as file:
        have = file.seek(0, 2)
        if entry.offset + entry.size > have:
            end = entry.offset + entry.size
            raise UserError(
                f"{path}: cut off: {entry.name} ends at byte {end:,}, the file at {have:,}: delete it, get it again"
            )
        file.seek(entry.offset)
        raw = np.fromfile(file, np.uint8, entry.size)
    if masked(crc32c(raw)) != entry.crc:
        raise UserError(f"{path}: damaged: the checksum of {entry.name} does not fit: delete it, get it again")
    return raw.view("<f4").reshape(entry.shape)


# --- the table ------------------------------------------------------------------------------------------------------------


def _entries(data: bytes) -> Iterator[Entry]:
    if len(data) < FOOTER or int.from_bytes(data[-8:], "little") != MAGIC:
        raise _Damaged("no footer with the magic number")
    footer, at = data[-FOOTER:-8], 0
    list(_block(data, footer))  # metadata: nothing in it concerns us
    for _ in range(2):
        _, at = _varint(footer, at)
    before = None
    for _, place in _block(data, footer[at:]):
        for key, value in _block(data, place):
            if before is None:
                if key:
                    raise _Damaged("no header")
                _check_header(value)
            elif key <= before:  # so no name stands twice, and no block is gone through twice
                raise _Damaged("names out of order")
            else:
                yield _entry(key, value)
            before = key
    if before is None:
        raise _Damaged("no entries")


def _block(data: bytes, handle: bytes) -> Iterator[tuple[bytes, bytes]]:
    """(key, value) of the block whose offset and size `handle` codes."""
    offset, at = _varint(handle, 0)
    size, _ = _varint(handle, at)
    if size < 4 or offset + size + 5 > len(data) - FOOTER:
        raise _Damaged("a block out of bounds")
    block, end = data[offset : offset + size], offset + size + 1
    if data[end - 1]:
        raise _Damaged("a compressed block")
    if masked(crc32c(data[offset:end])) != int.from_bytes(data[end : end + 4], "little"):
        raise _Damaged("the checksum of a block does not fit")
    entries = size - 4 - 4 * int.from_bytes(block[-4:], "little")  # behind them: the restart points and their number
    if entries < 0:
        raise _Damaged("restart points out of bounds")
    key, at = b"", 0
    while at < entries:
        shared, at = _varint(block, at)
        own, at = _varint(block, at)
        length, at = _varint(block, at)
        if shared > len(key) or shared + own > LONGEST or at + own + length > entries:
            raise _Damaged("an entry out of bounds")
        key = key[:shared] + block[at : at + own]
        yield key, block[at + own : at + own + length]
        at += own + length


def _check_header(value: bytes) -> None:
    header = dict(_fields(value))
    if header.get(1) != 1:
        raise _Damaged(f"{header.get(1)!r} data files, not one")
    if header.get(2, 0) != 0:
        raise _Damaged("numbers in big-endian order")


def _entry(key: bytes, value: bytes) -> Entry:
    name = ascii(key.decode("utf-8", "replace"))[1:-1]
    fields = dict(_fields(value))
    if 7 in fields:
        raise _Damaged(f"{name} is cut in slices")
    if fields.get(1) != DT_FLOAT:
        raise _Damaged(f"{name} has the data type {fields.get(1)!r}, not float32's {DT_FLOAT}")
    if fields.get(3, 0) != 0:
        raise _Damaged(f"{name} lies in another data file")
    shape = _shape(fields.get(2, b""), name)
    offset, size, crc = (fields.get(number, 0) for number in (4, 5, 6))
    if not all(isinstance(number, int) for number in (offset, size, crc)) or max(offset, size) >= 2**63:
        raise _Damaged(f"{name} has no whole offset and size")
    if size != 4 * math.prod(shape):
        raise _Damaged(f"{name} of shape {shape} has {size:,} bytes")
    return Entry(name, shape, offset, size, crc)


def _shape(value: int | bytes, name: str) -> tuple[int, ...]:
    """A TensorShapeProto: field 2, once a dimension, is a message with the size in field 1."""
    shape = []
    for number, dimension in _fields(value):
        if number == 2:
            size = dict(_fields(dimension)).get(1, 0)
            if not isinstance(size, int) or size >= 2**63 or len(shape) == 8:
                raise _Damaged(f"the shape of {name}")
            shape.append(size)
        elif dimension:  # field 3: of unknown rank
            raise _Damaged(f"the shape of {name}")
    return tuple(shape)


def _fields(message: int | bytes) -> Iterator[tuple[int, int | bytes]]:
    """(field number, value) of a message in protocol-buffer coding: bytes where it gives a length, else a whole number."""
    if not isinstance(message, bytes):
        raise _Damaged("a number where a message belongs")
    at = 0
    while at < len(message):
        tag, at = _varint(message, at)
        kind = tag & 7
        if kind == 0:
            value, at = _varint(message, at)
            yield tag >> 3, value
            continue
        if kind == 2:
            length, at = _varint(message, at)
        elif kind in (1, 5):
            length = 8 if kind == 1 else 4
        else:
            raise _Damaged("a field of an unknown kind")
        if at + length > len(message):
            raise _Damaged("a message out of bounds")
        value = message[at : at + length]
        yield tag >> 3, value if kind == 2 else int.from_bytes(value, "little")
        at += length


def _varint(data: bytes, at: int) -> tuple[int, int]:
    """A number in 7-bit groups, lowest first, the last one below 128; and where it ends."""
    value = 0
    for shift in range(0, 70, 7):
        if at >= len(data):
            raise _Damaged("cut off")
        value |= (data[at] & 127) << shift
        at += 1
        if data[at - 1] < 128:
            return value, at
    raise _Damaged("a number too long")


# --- the checksum ---------------------------------------------------------------------------------------------------------
# A CRC is linear: that of a row of bytes is the XOR of those of its parts, each moved on by the zeros that stand for the parts
# behind it. So numpy goes through many parts at once, and they are joined in pairs.

PIECE = 2**22  # bytes at once


def crc32c(data: bytes | np.ndarray) -> int:
    """CRC-32C (Castagnoli, RFC 3720 appendix B.4) of bytes or of a uint8 array."""
    data = np.frombuffer(data, np.uint8) if isinstance(data, bytes) else data
    state, at = np.array([0xFFFFFFFF], dtype=np.uint32), 0
    while at < len(data):
        piece = data[at : at + ((len(data) - at) % PIECE or PIECE)]
        for bit in range(len(piece).bit_length()):
            if len(piece) >> bit & 1:
                state = _move(state, 1 << bit)
        state = state ^ _from_zero(piece)
        at += len(piece)
    return int(state[0]) ^ 0xFFFFFFFF


def masked(crc: int) -> int:
    """A checksum as LevelDB's tables store it, lest data with checksums inside have odd ones."""
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF


def _from_zero(piece: np.ndarray) -> np.ndarray:
    """The CRC register (1,) after the bytes, beginning with 0: zeros put in front of them change nothing."""
    width = 256 if len(piece) > 2**16 else 16  # words a lane
    lanes = 1 << max(0, -(-len(piece) // (4 * width)) - 1).bit_length()
    padded = np.zeros(4 * width * lanes, np.uint8)
    padded[len(padded) - len(piece) :] = piece
    words = np.ascontiguousarray(padded.view("<u4").reshape(lanes, width).T)
    state = np.zeros(lanes, np.uint32)
    for word in words:
        state = _move(state ^ word, 4)
    size = 4 * width
    while len(state) > 1:
        state = _move(state[0::2], size) ^ state[1::2]
        size *= 2
    return state


def _move(state: np.ndarray, zeros: int) -> np.ndarray:
    """CRC registers, uint32 of any shape, after so many zero bytes (a power of two) more."""
    low, high = _tables(zeros)
    return low.take(state & 0xFFFF) ^ high.take(state >> 16)


@functools.cache
def _tables(zeros: int) -> tuple[np.ndarray, np.ndarray]:
    """What a register becomes after so many zero bytes, by its lower and by its upper 16 bits."""
    bits = np.uint32(1) << np.arange(32, dtype=np.uint32)
    if zeros == 1:
        for _ in range(8):
            bits = bits >> np.uint32(1) ^ np.where(bits & 1, np.uint32(0x82F63B78), np.uint32(0))
    else:
        bits = _move(_move(bits, zeros // 2), zeros // 2)
    tables = []
    for half in (bits[:16], bits[16:]):
        table = np.zeros(1, np.uint32)
        for bit in half:
            table = np.concatenate([table, table ^ bit])
        tables.append(table)
    return tuple(tables)
