"""The converter of OpenAI's checkpoints, on files that TensorFlow 2.21.0 wrote (see fixture/make.py)."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

import weights
from base.errors import UserError
from data import tokenizer
from model import GPTConfig
from tests.hub import serving
from tests.tools.fixture.make import HPARAMS, shapes, value
from tools import tf_checkpoint
from tools.convert_openai import DATA, INDEX
from tools.convert_openai import HPARAMS as HPARAMS_FILE
from tools.tf_checkpoint import crc32c, read_index, read_tensor

FIXTURE = Path(__file__).parent / "fixture"
LAYERS = {"attn.qkv": "attn/c_attn", "attn.proj": "attn/c_proj", "mlp.fc": "mlp/c_fc", "mlp.proj": "mlp/c_proj"}


@pytest.fixture
def folder(tmp_path):
    """A copy of TensorFlow's files, to be damaged."""
    for name in (HPARAMS_FILE, INDEX, DATA):
        shutil.copy(FIXTURE / name, tmp_path / name)
    return tmp_path


def test_a_downloaded_checkpoint_becomes_a_model_folder(tmp_path, monkeypatch, call):
    monkeypatch.setenv("NANOPREF_CACHE", str(tmp_path / "cache"))
    with serving({"gpt-2/models/355M": FIXTURE}, monkeypatch) as hub:
        monkeypatch.setenv("OPENAIPUBLIC_ENDPOINT", hub.url + "/files/")
        for out in ("a", "b"):
            status, _, err = call("tools.convert_openai", "--size", "355M", "--out", tmp_path / out)
            assert status == 0, err
        assert len(hub.requests) == 3, "each file is downloaded once"
    model = weights.load(tmp_path / "a")
    assert model.config == GPTConfig(n_layer=2, n_head=2, n_embd=4, block_size=8, vocab_size=13)
    assert tokenizer.choose("auto", str(tmp_path / "a")).name == "gpt2"
    found = dict(model.named_parameters())
    wanted = {name: torch.from_numpy(value(name, shape)) for name, shape in shapes(HPARAMS).items()}
    assert len(found) == len(wanted)
    for i in range(2):
        for ours, theirs in LAYERS.items():
            assert torch.equal(found[f"blocks.{i}.{ours}.weight"], wanted[f"model/h{i}/{theirs}/w"][0].T)
            assert torch.equal(found[f"blocks.{i}.{ours}.bias"], wanted[f"model/h{i}/{theirs}/b"])
        for n in (1, 2):
            assert torch.equal(found[f"blocks.{i}.ln{n}.weight"], wanted[f"model/h{i}/ln_{n}/g"])
            assert torch.equal(found[f"blocks.{i}.ln{n}.bias"], wanted[f"model/h{i}/ln_{n}/b"])
    for ours, theirs in (("wte.weight", "wte"), ("wpe.weight", "wpe"), ("ln_f.weight", "ln_f/g"), ("ln_f.bias", "ln_f/b")):
        assert torch.equal(found[ours], wanted[f"model/{theirs}"])


def test_checksums(monkeypatch):
    def slow(data: bytes) -> int:
        register = 0xFFFFFFFF
        for byte in data:
            register ^= byte
            for _ in range(8):
                register = register >> 1 ^ (0x82F63B78 if register & 1 else 0)
        return register ^ 0xFFFFFFFF

    assert crc32c(np.frombuffer(b"123456789", np.uint8)) == 0xE3069283  # the check value that tables of CRCs list
    for lanes, lane in ((4096, 1024), (4, 64), (1, 256)):
        monkeypatch.setattr(tf_checkpoint, "LANES", lanes)
        monkeypatch.setattr(tf_checkpoint, "LANE", lane)
        for n in (4, 100, 256, 1000, 4096, 2**16 + 8):
            data = np.random.default_rng(n).integers(0, 256, n, dtype=np.uint8)
            assert crc32c(data) == slow(data.tobytes()), (lanes, lane, n)


@pytest.mark.slow
def test_damaged_files_are_told(folder, monkeypatch):
    monkeypatch.setattr(tf_checkpoint, "LANES", 4)  # faster on small files
    index = read_index(FIXTURE / INDEX)
    whole, unread = (FIXTURE / INDEX).read_bytes(), []
    for at in range(0, len(whole), 2):
        (folder / INDEX).write_bytes(whole[:at] + bytes([whole[at] ^ 1 << at % 7]) + whole[at + 1 :])
        try:
            assert read_index(folder / INDEX) == index
            unread.append(at)
        except UserError as error:
            assert "model.ckpt.index: damaged" in str(error) and "\n" not in str(error)
    assert len(unread) < 30, "the block of metadata and the footer's padding"
    for end in range(0, len(whole), 7):
        (folder / INDEX).write_bytes(whole[:end])
        with pytest.raises(UserError, match="damaged"):
            read_index(folder / INDEX)
    whole = (FIXTURE / DATA).read_bytes()
    for changed in (whole[:-1], *(whole[:at] + bytes([whole[at] ^ 4]) + whole[at + 1 :] for at in range(0, len(whole), 99))):
        (folder / DATA).write_bytes(changed)
        with pytest.raises(UserError, match=r"the checksum of model/.* does not fit"):
            for name, shape in shapes(HPARAMS).items():
                read_tensor(index, name, int(np.prod(shape)), folder / DATA)


def test_what_is_wrong_is_told_in_one_line(folder, refused):
    def says(message: str, out: str = "out") -> None:
        refused("tools.convert_openai", "--folder", folder, "--out", folder / out, says=message)
        assert not (folder / out).exists()

    for content, message in (
        ("{", "is not valid JSON"),
        ("[]", "does not hold a JSON object"),
        ('{"n_layer": 2}', "n_head is None, not a positive"),
        ('{"n_vocab": 13, "n_ctx": 8, "n_embd": 4, "n_head": 2, "n_layer": 3}', "no tensor model/h2/ln_1/g of 4 float32"),
        ('{"n_vocab": 14, "n_ctx": 8, "n_embd": 4, "n_head": 2, "n_layer": 2}', "no tensor model/wte of 56 float32"),
    ):
        (folder / HPARAMS_FILE).write_text(content)
        says(message)
    (folder / DATA).unlink()
    (folder / HPARAMS_FILE).unlink()
    says("key folder: no hparams.json in")
