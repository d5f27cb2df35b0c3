"""Reads float32 tensors out of a TensorFlow checkpoint without TensorFlow: what OpenAI's released files need, and no more.

NAME.data-00000-of-00001 holds the numbers of all tensors, one after another. NAME.index says where each one lies. It is a
table as LevelDB's (github.com/google/leveldb, doc/table_format.md):

    block    entries, their restart points, 1 byte of compression (always 0 here), 4 bytes of checksum
    entry    length of what the key shares with the one before, length of the rest, length of the value, rest, value
    footer   the last 48 bytes: where the metadata's block and the index block lie, padding, a magic number

The index block lists the other blocks. Their keys are the tensors' names, their values BundleEntryProto messages
(tensor_bundle.proto in TensorFlow) in protocol-buffer coding.
"""

import functools
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from base.errors import UserError

FOOTER, MAGIC = 48, 0xDB4775248B80FB57
DT_FLOAT = 1
DTYPE, SHARD, OFFSET, SIZE, CRC = 1, 3, 4, 5, 6  # fields of a BundleEntryProto

Index = dict[str, dict[int, int]]  # a tensor's name -> the fields of its entry


def read_index(path: Path) -> Index:
    """What a NAME.index file lists. Raises UserError where it is damaged."""
    data = path.read_bytes()
    try:
        if int.from_bytes(data[-8:], "little") != MAGIC:
            raise ValueError("no magic number at its end")
        footer, at = data[-FOOTER:], 0
        for _ in range(2):  # the offset and size of the metadata, which are not needed
            _, at = _varint(footer, at)
        blocks = [handle for _, handle in _block(data, footer[at:])]
        return {key.decode(): _fields(value) for handle in blocks for key, value in _block(data, handle)}
    except (ValueError, IndexError) as error:
        raise UserError(f"{path}: damaged, or no index of a TensorFlow checkpoint ({error}): get it again") from None


def read_tensor(index: Index, name: str, count: int, path: Path) -> np.ndarray:
    """The `count` numbers of a tensor out of the data file, a flat float32 array.

    Raises UserError where the index does not list such a tensor, or the numbers do not fit its checksum.
    """
    entry = index.get(name, {})
    if (entry.get(DTYPE), entry.get(SHARD, 0), entry.get(SIZE)) != (DT_FLOAT, 0, 4 * count):
        raise UserError(f"{path}: its index lists no tensor {name} of {count:,} float32 numbers: is it this model's?")
    raw = np.fromfile(path, np.uint8, 4 * count, offset=entry.get(OFFSET, 0))
    if len(raw) < 4 * count or masked(crc32c(raw)) != entry.get(CRC):
        raise UserError(f"{path}: damaged or cut off: the checksum of {name} does not fit: get the file again")
    return raw.view("<f4")


def _block(data: bytes, handle: bytes) -> Iterator[tuple[bytes, bytes]]:
    """(key, value) of every entry of a block. `handle` codes its offset and size."""
    offset, at = _varint(handle, 0)
    size, _ = _varint(handle, at)
    block = data[offset : offset + size + 1]
    if masked(crc32c(np.frombuffer(block, np.uint8))) != int.from_bytes(data[offset + size + 1 :][:4], "little"):
        raise ValueError("the checksum of a block does not fit")
    if block[size]:
        raise ValueError("a compressed block")
    end = size - 4 - 4 * int.from_bytes(block[size - 4 : size], "little")  # after the entries: restart points, their number
    key, at = b"", 0
    while at < end:
        shared, at = _varint(block, at)
        rest, at = _varint(block, at)
        length, at = _varint(block, at)
        key = key[:shared] + block[at : at + rest]
        if len(key) > 1000:  # each may share what the one before has: keys could take the square of the file's size
            raise ValueError("a name of more than 1,000 letters")
        yield key, block[at + rest : at + rest + length]
        at += rest + length


def _fields(message: bytes) -> dict[int, int]:
    """Field number -> value of a message in protocol-buffer coding, for fields of whole numbers."""
    found, at = {}, 0
    while at < len(message):
        tag, at = _varint(message, at)
        if tag & 7 == 0:
            found[tag >> 3], at = _varint(message, at)
            continue
        length = 4  # of a fixed 32-bit number: the checksum
        if tag & 7 == 2:  # a message in the message: the shape, which is known from the model
            length, at = _varint(message, at)
        found[tag >> 3] = int.from_bytes(message[at : at + length], "little")
        at += length
    return found


def _varint(data: bytes, at: int) -> tuple[int, int]:
    """The number that begins at byte `at`, in groups of 7 bits, lowest first, the last one below 128; and where it ends."""
    value, shift = 0, 0
    while data[at] > 127 and shift < 56:  # 64 bits at most
        value |= (data[at] & 127) << shift
        at, shift = at + 1, shift + 7
    return value | data[at] << shift, at + 1


# --- the checksum: CRC-32C (Castagnoli, RFC 3720 appendix B.4) ---
# A CRC is linear: that of a row of bytes is the XOR of those of its parts, each moved on by as many zero bytes as come behind
# the part. So numpy goes through many parts (lanes) at once, and joins them in pairs.

LANES, LANE = 4096, 1024  # how many lanes at once, bytes of one


def crc32c(data: np.ndarray) -> int:
    """CRC-32C of a uint8 array: of 4 bytes to 4 MiB, or of whole 4-byte words."""
    register = 0xFFFFFFFF
    for at in range(0, len(data), LANES * LANE):
        piece = data[at : at + LANES * LANE]
        padded = np.zeros(LANES * LANE, np.uint8)  # zeros in front change nothing
        padded[-len(piece) :] = piece
        padded[-len(piece) :][:4] ^= np.frombuffer(register.to_bytes(4, "little"), np.uint8)
        states = np.zeros(LANES, np.uint32)
        for words in np.ascontiguousarray(padded.view("<u4").reshape(LANES, -1).T):
            states = _move(states ^ words, 4)
        size = LANE
        while len(states) > 1:
            states = _move(states[0::2], size) ^ states[1::2]
            size *= 2
        register = int(states[0])
    return register ^ 0xFFFFFFFF


def masked(crc: int) -> int:
    """A checksum as the tables store it: changed, because checksums of data that hold checksums are weak."""
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF


def _move(states: np.ndarray, zeros: int) -> np.ndarray:
    """CRC registers (uint32) after so many zero bytes, a power of two."""
    low, high = _tables(zeros)
    return low.take(states & 0xFFFF) ^ high.take(states >> 16)


@functools.cache
def _tables(zeros: int) -> list[np.ndarray]:
    """What a register becomes after so many zero bytes, by its lower and by its upper 16 bits."""
    bits = np.uint32(1) << np.arange(32, dtype=np.uint32)
    if zeros > 1:
        bits = _move(_move(bits, zeros // 2), zeros // 2)
    else:
        for _ in range(8):
            bits = bits >> np.uint32(1) ^ np.where(bits & 1, np.uint32(0x82F63B78), np.uint32(0))
    tables = [np.zeros(1, np.uint32), np.zeros(1, np.uint32)]
    for i, bit in enumerate(bits):
        tables[i // 16] = np.concatenate([tables[i // 16], tables[i // 16] ^ bit])
    return tables
