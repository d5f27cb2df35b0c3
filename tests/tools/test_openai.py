"""OpenAI's TensorFlow checkpoints: what TensorFlow wrote, what the format's description says, and what neither would write."""

import json
import shutil
import struct
from pathlib import Path

import numpy as np
import pytest
import torch

import weights
from base.errors import UserError
from data import tokenizer
from model import GPT, GPTConfig
from tests.hub import serving
from tests.tools.fixture.make import HPARAMS, shapes, value
from tools import tf_checkpoint
from tools.tf_checkpoint import crc32c, read_index, read_tensor

FIXTURE = Path(__file__).parent / "fixtures" / "openai"  # written by TensorFlow 2.21.0, see make.py there
FILES = (weights.HPARAMS, weights.INDEX, weights.DATA)


@pytest.fixture
def folder(tmp_path):
    """A copy of TensorFlow's files, to be damaged."""
    for name in FILES:
        shutil.copy(FIXTURE / name, tmp_path / name)
    return tmp_path


def ours(theirs: str) -> str:
    """Their name -> ours, written out apart from weights.py."""
    if theirs in ("model/wte", "model/wpe"):
        return theirs[6:] + ".weight"
    parts = theirs.split("/")[1:]
    names = {"attn c_attn": "attn.qkv", "attn c_proj": "attn.proj", "mlp c_fc": "mlp.fc", "mlp c_proj": "mlp.proj"}
    layer = names.get(" ".join(parts[1:-1])) or parts[-2].replace("ln_1", "ln1").replace("ln_2", "ln2")
    block = f"blocks.{parts[0][1:]}." if len(parts) > 2 else ""
    return f"{block}{layer}.{'bias' if parts[-1] == 'b' else 'weight'}"


def check(model: GPT, hparams: dict) -> None:
    found = dict(model.named_parameters())
    assert len(found) == len(shapes(hparams))
    for name, shape in shapes(hparams).items():
        wanted = torch.from_numpy(value(name, shape))
        assert torch.equal(found[ours(name)], wanted[0].T if wanted.dim() == 3 else wanted), name


def test_reads_what_tensorflow_wrote():
    entries = read_index(FIXTURE / weights.INDEX)
    assert {e.name: e.shape for e in entries} == shapes(HPARAMS)
    for entry in entries:
        assert np.array_equal(read_tensor(entry, FIXTURE / weights.DATA), value(entry.name, entry.shape))
    model = weights.load(FIXTURE)
    assert model.config == GPTConfig(n_layer=2, n_head=2, n_embd=4, block_size=8, vocab_size=13)
    check(model, HPARAMS)


# --- a writer of the format, from its description alone: LevelDB's table_format.md, tensor_bundle.proto, and protocol buffers'
# encoding. It cuts blocks and prefixes where TensorFlow would not.


def slow_crc(data: bytes) -> int:
    register = 0xFFFFFFFF
    for byte in data:
        register ^= byte
        for _ in range(8):
            register = register >> 1 ^ (0x82F63B78 if register & 1 else 0)
    return register ^ 0xFFFFFFFF


def mask(crc: int) -> int:
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) % 2**32


def varint(n: int) -> bytes:
    return (bytes([n % 128 + 128]) + varint(n // 128)) if n > 127 else bytes([n])


def block(entries: list[tuple[bytes, bytes]], restart_every: int) -> bytes:
    out, restarts, before = b"", [], b""
    for i, (key, content) in enumerate(entries):
        shared = 0
        if i % restart_every:
            while shared < min(len(key), len(before)) and key[shared] == before[shared]:
                shared += 1
        else:
            restarts.append(len(out))
        out += varint(shared) + varint(len(key) - shared) + varint(len(content)) + key[shared:] + content
        before = key
    return out + b"".join(struct.pack("<I", n) for n in (restarts or [0])) + struct.pack("<I", len(restarts or [0]))


def table(entries: dict[str, bytes], per_block: int, restart_every: int, compression: int = 0) -> bytes:
    out = b""

    def put(content: bytes) -> bytes:
        nonlocal out
        handle = varint(len(out)) + varint(len(content))
        content += bytes([compression])
        out += content + struct.pack("<I", mask(slow_crc(content)))
        return handle

    rows = [(key.encode(), content) for key, content in sorted(entries.items())]
    parts = [rows[i : i + per_block] for i in range(0, len(rows), per_block)]
    index = [(part[-1][0], put(block(part, restart_every))) for part in parts]
    footer = put(block([], 1)) + put(block(index, 1))
    return out + footer.ljust(40, b"\0") + struct.pack("<Q", 0xDB4775248B80FB57)


HEADER = b"\x08\x01\x1a\x02\x08\x01"  # num_shards 1, version { producer 1 }


def entry(array: np.ndarray, at: int, **change: bytes) -> bytes:
    raw = array.tobytes()
    dims = b"".join(b"\x12" + varint(len(d)) + d for d in (b"\x08" + varint(n) for n in array.shape))
    fields = {
        "dtype": b"\x08\x01",
        "shape": b"\x12" + varint(len(dims)) + dims,
        "shard": b"",
        "offset": b"\x20" + varint(at),
        "size": b"\x28" + varint(len(raw)),
        "crc": b"\x35" + struct.pack("<I", mask(slow_crc(raw) if len(raw) < 2**14 else crc32c(raw))),
    }
    return b"".join({**fields, **change}.values())


def write(folder: Path, hparams: dict, tensors: dict[str, np.ndarray], per_block=5, restart_every=3, **change) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    data, entries = b"\0" * 12, {"": HEADER}  # numbers need not begin at 0
    for name, array in tensors.items():
        entries[name] = entry(array, len(data), **(change if name == "model/ln_f/b" else {}))
        data += array.tobytes()
    (folder / weights.DATA).write_bytes(data)
    (folder / weights.INDEX).write_bytes(table(entries, per_block, restart_every))
    (folder / weights.HPARAMS).write_text(json.dumps(hparams))
    return folder


def values(hparams: dict) -> dict[str, np.ndarray]:
    return {name: value(name, shape) for name, shape in shapes(hparams).items()}


def gpt2_files(folder: Path, **sizes) -> Path:
    """Small weights with GPT-2's vocabulary, as OpenAI hands its out."""
    hparams = {"n_vocab": 50257, "n_ctx": 1024, "n_embd": 4, "n_head": 2, "n_layer": 1, **sizes}
    return write(folder, hparams, {name: array / 8 for name, array in values(hparams).items()})


@pytest.mark.parametrize(("per_block", "restart_every"), [(5, 3), (1, 1), (1000, 16)])
def test_reads_what_the_description_says(tmp_path, per_block, restart_every):
    hparams = {**HPARAMS, "n_layer": 12}  # h10 stands before h2
    check(weights.load(write(tmp_path, hparams, values(hparams), per_block, restart_every)), hparams)


@pytest.mark.parametrize("n", [0, 1, 3, 4, 63, 64, 65, 1000, 4096, 2**16 + 7])
def test_checksums(n):
    data = np.random.default_rng(n).integers(0, 256, n, dtype=np.uint8)
    assert crc32c(data) == crc32c(data.tobytes()) == slow_crc(data.tobytes())


def test_checksums_of_several_pieces(monkeypatch):
    assert crc32c(b"123456789") == 0xE3069283  # RFC 3720's neighbours: the value every table of CRCs lists
    data = bytes(range(256)) * 40
    wanted = slow_crc(data)
    for piece in (64, 4096, len(data) // 2, len(data)):
        monkeypatch.setattr(tf_checkpoint, "PIECE", piece)
        assert crc32c(data) == wanted


def test_downloads_once_and_goes_on_from_a_cut(tmp_path, monkeypatch, call):
    monkeypatch.setenv("NANOPREF_CACHE", str(tmp_path / "cache"))
    with serving({"gpt-2/models/355M": write(tmp_path / "355M", HPARAMS, values(HPARAMS))}, monkeypatch) as hub:
        monkeypatch.setenv("OPENAIPUBLIC_ENDPOINT", hub.url + "/files/")
        monkeypatch.setattr("data.download.DELAY", 0.01)
        hub.fault(weights.DATA, cut=100)
        check(weights.load("openai:355M"), HPARAMS)
        asked = [r.path.rpartition("/")[2] for r in hub.requests]
        assert asked == [*FILES[:2], weights.DATA, weights.DATA]
        check(weights.load("openai:355M"), HPARAMS)
        assert len(hub.requests) == 4
        with pytest.raises(UserError, match=r"hparams\.json: no such file there \(404\)"):
            weights.load("openai:774M")


def test_a_run_begins_from_openai(tmp_path, monkeypatch, call, files):
    folder = gpt2_files(tmp_path / "124M")
    monkeypatch.setenv("NANOPREF_CACHE", str(tmp_path / "cache"))
    with serving({"gpt-2/models/124M": folder}, monkeypatch) as hub:
        monkeypatch.setenv("OPENAIPUBLIC_ENDPOINT", hub.url + "/files")
        args = ["--data", files["sft"], "--out_dir", tmp_path / "run", "--max_steps", 1, "--samples", 0, "--lr", 0]
        status, _, err = call("sft", "--init_from", "openai:124M", *args)
        assert status == 0, err
    assert weights.fingerprint(weights.load(tmp_path / "run" / "model")) == weights.fingerprint(weights.load(folder))
    assert tokenizer.choose("auto", str(folder)).name == "gpt2"


# --- what is wrong with it ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dtype": b"\x08\x02"}, "model/ln_f/b has the data type 2, not float32's 1"),
        ({"shard": b"\x18\x01"}, "model/ln_f/b lies in another data file"),
        ({"shard": b"\x3a\x00"}, "model/ln_f/b is cut in slices"),
        ({"size": b"\x28\x08"}, r"model/ln_f/b of shape \(4,\) has 8 bytes"),
        ({"offset": b"\x20" + b"\xff" * 9 + b"\x01"}, "model/ln_f/b has no whole offset and size"),
        ({"offset": b"\x20" + varint(10**9)}, "cut off: model/ln_f/b ends at byte 1,000,000,016"),
        ({"crc": b"\x35abcd"}, "the checksum of model/ln_f/b does not fit"),
        ({"shape": b"\x12\x02\x18\x01"}, "the shape of model/ln_f/b"),
        ({"shape": b"\x10\x04"}, "a number where a message belongs"),
    ],
)
def test_entries_that_are_not_gpt2s(tmp_path, change, message):
    with pytest.raises(UserError, match=message):
        weights.load(write(tmp_path, HPARAMS, values(HPARAMS), **change))


def test_tables_that_are_not_gpt2s(tmp_path):
    def refused(message: str, hparams: dict = HPARAMS, **tensors) -> None:
        shutil.rmtree(tmp_path, ignore_errors=True)
        found = {**values(HPARAMS), **{name.replace("__", "/"): array for name, array in tensors.items()}}
        with pytest.raises(UserError, match=message):
            weights.load(write(tmp_path, hparams, {name: array for name, array in found.items() if array is not None}))

    refused("transformer.ln_f.weight missing", model__ln_f__g=None)
    refused(r"tensor h\.2\.ln_1\.weight is none of a 2-layer GPT-2's", model__h2__ln_1__g=np.ones(4, np.float32))
    refused("tensor global_step is none of", global_step=np.ones(1, np.float32))
    refused(
        r"tensor h\.0\.mlp\.c_fc\.weight has shape \(16, 4\), not \(4, 16\)", model__h0__mlp__c_fc__w=np.ones((1, 16, 4), "f")
    )
    refused("n_embd is '4', not a positive whole number", {**HPARAMS, "n_embd": "4"})
    refused("n_layer is None", {})
    refused("n_embd 4 is no multiple of n_head 3", {**HPARAMS, "n_head": 3})
    for content, message in (
        (HEADER.replace(b"\x08\x01\x1a", b"\x08\x02\x1a"), "2 data files"),
        (b"\x08\x01\x10\x01", "big-endian"),
    ):
        (tmp_path / weights.INDEX).write_bytes(table({"": content}, 1, 1))
        with pytest.raises(UserError, match=message):
            read_index(tmp_path / weights.INDEX)
    for content, message in ((table({"a": b""}, 1, 1), "no header"), (table({"": HEADER}, 1, 1, 1), "a compressed block")):
        (tmp_path / weights.INDEX).write_bytes(content)
        with pytest.raises(UserError, match=message):
            read_index(tmp_path / weights.INDEX)


def test_names_and_folders(folder, refused):
    refused(
        "sft", "--init_from", "openai:117M", "--data", "toy", "--out_dir", folder / "r", says="known are openai:124M, openai:3"
    )
    (folder / weights.DATA).unlink()
    with pytest.raises(UserError, match=r"data-00000-of-00001 is missing beside model\.ckpt\.index"):
        weights.load(folder)
    (folder / weights.HPARAMS).unlink()
    with pytest.raises(UserError, match=r"no hparams\.json in .*, beside model\.ckpt\.index"):
        weights.load(folder)
    with pytest.raises(UserError, match="n_layer is 3, but"):
        weights.load(FIXTURE, n_layer=3)


@pytest.mark.parametrize("checked", [True, False])
def test_every_damaged_byte_of_the_index_is_told(folder, monkeypatch, checked):
    """With checksums nothing passes; without them nothing but a UserError may come of it."""
    path = folder / weights.INDEX
    whole, wanted = path.read_bytes(), read_index(path)
    if not checked:
        monkeypatch.setattr(tf_checkpoint, "crc32c", lambda data: 0)
        monkeypatch.setattr(tf_checkpoint, "masked", lambda crc: AnyNumber())
    passed = 0
    for at in range(0, len(whole), 3 if checked else 2):
        for new in {whole[at] ^ 1 << at % 7} | (set() if checked else {whole[at] ^ 128}):
            path.write_bytes(whole[:at] + bytes([new]) + whole[at + 1 :])
            try:
                found = read_index(path)
            except UserError as error:
                assert str(error).startswith(str(path)) and "\n" not in str(error)
            else:
                passed += 1
                # the footer's padding
                assert not checked or (found == wanted and len(whole) - 48 <= at < len(whole) - 8), at
    assert passed and (checked or 50 < passed < 800)
    for end in range(0, len(whole), 7):
        path.write_bytes(whole[:end])
        with pytest.raises(UserError):
            read_index(path)


class AnyNumber(int):
    """A checksum that fits."""

    def __ne__(self, other):
        return False


def test_damaged_numbers_are_told(folder):
    path = folder / weights.DATA
    whole = path.read_bytes()
    for at in range(0, len(whole), 99):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 4]) + whole[at + 1 :])
        with pytest.raises(UserError, match="the checksum of model/"):
            weights.load(folder)
    path.write_bytes(whole[:-1])
    with pytest.raises(UserError, match=r"cut off: model/wte ends at byte 2,320, the file at 2,319"):
        weights.load(folder)
