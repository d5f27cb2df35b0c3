"""The tokenizers: their ids, what they write for transformers, and which one a folder gets."""

import gzip
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import tiktoken

from base.errors import UserError
from data import tokenizer as tok
from data.toy import VOCAB
from tests.conftest import SHARED

TEXTS = [
    "",
    "Hello world",
    " two  spaces,\n\n\nlines \n and\ttabs \t\r\n ",
    "I'm sure you're WE'LL don't 's 'tis",
    "naïve café 日本語 한국어 e\u0301 \u00a0x\u3000y",
    "👩‍👩‍👧 🎉🎉 \U0001f1e9\U0001f1ea",
    "123456789 ٣٤ 1,000.50 $5%",
    " " * 50 + "x" + "\n" * 30,
    "def f(x):\n    return x**2  # {}[]\x00\x7f",
]
TOY_TEXT = "\n".join(VOCAB)


@pytest.fixture(scope="module")
def gpt2():
    return tok.get("gpt2")


@pytest.fixture(scope="module")
def gpt2_folder(gpt2, tmp_path_factory):
    folder = tmp_path_factory.mktemp("gpt2") / "model"
    gpt2.save(folder)
    return folder


def test_gpt2_ids(gpt2):
    assert (gpt2.name, gpt2.eot, gpt2.size) == ("gpt2", 50256, 50257)
    assert gpt2.encode("Hello world") == [15496, 995]
    assert gpt2.encode_batch(TEXTS) == [gpt2.encode(text) for text in TEXTS]
    assert [gpt2.decode(gpt2.encode(text)) for text in TEXTS] == TEXTS
    assert gpt2.eot not in gpt2.encode("a<|endoftext|>b")  # a special token in the text is plain text
    assert gpt2.decode([gpt2.eot]) == "<|endoftext|>"
    assert gpt2.fingerprint() == "a5623714bcf19049eb0fd78df19b6daa1e61ac435b86a5deae767768e7fcdc3d"


@pytest.mark.slow
def test_gpt2_ids_are_tiktokens_on_all_texts_at_hand(gpt2, monkeypatch):
    if not (SHARED / "tiktoken").is_dir() or not (SHARED / "data").is_dir():
        pytest.skip("no ../shared with tiktoken's own files and texts")
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(SHARED / "tiktoken"))
    theirs = tiktoken.get_encoding("gpt2")
    texts = list(TEXTS)
    for path in sorted((SHARED / "data").glob("*.gz")):
        with gzip.open(path, "rt", encoding="utf-8") as lines:
            texts += [str(value) for line in lines for value in json.loads(line).values()]
    assert len(texts) > 10_000
    assert gpt2.encode_batch(texts) == theirs.encode_ordinary_batch(texts)
    assert [gpt2.bpe.decode_single_token_bytes(i) for i in range(50257)] == theirs.decode_tokens_bytes(range(50257))


def test_gpt2_needs_no_network_and_no_variable(tmp_path):
    code = (
        "import socket; socket.socket.connect = None\n"
        "from data.tokenizer import get\nassert get('gpt2').encode('Hello world') == [15496, 995]"
    )
    repository = Path(tok.__file__).parents[1]
    subprocess.run([sys.executable, "-c", code], cwd=repository, env={"HOME": str(tmp_path)}, check=True)
    assert not list(tmp_path.iterdir())


def test_gpt2_files_are_the_released_ones(gpt2_folder):
    if not (SHARED / "tiktoken").is_dir():
        pytest.skip("no ../shared with the released files")
    released = {path.read_bytes()[:8]: path.read_text(encoding="utf-8") for path in (SHARED / "tiktoken").iterdir()}
    assert (gpt2_folder / "merges.txt").read_text(encoding="utf-8") == released[b"#version"]
    vocab = json.loads(next(text for start, text in released.items() if start != b"#version"))
    assert json.loads((gpt2_folder / "vocab.json").read_text(encoding="utf-8")) == vocab


def test_gpt2_folder_in_transformers(gpt2, gpt2_folder):
    theirs = pytest.importorskip("transformers").AutoTokenizer.from_pretrained(gpt2_folder)
    assert (theirs.eos_token, theirs.eos_token_id, len(theirs)) == ("<|endoftext|>", 50256, 50257)
    for text in TEXTS:
        assert theirs(text)["input_ids"] == gpt2.encode(text), text
        assert theirs.decode(gpt2.encode(text)) == text


def test_toy_ids():
    toy = tok.get("toy")
    assert toy.size == len(VOCAB) + 1 == len(set(VOCAB)) + 1
    assert toy.eot == len(VOCAB) and toy.decode([toy.eot]) == "<|endoftext|>"
    for token in VOCAB:  # each is cut out whole wherever it stands
        assert toy.decode(toy.encode("\n" + token + "\n")) == "\n" + token + "\n"
        assert toy.vocab[token] in toy.encode("\n" + token + "\n") and len(toy.encode(token)) == 1
    assert toy.decode(toy.encode(TOY_TEXT)) == TOY_TEXT
    assert toy.encode_batch([TOY_TEXT, "\n"]) == [toy.encode(TOY_TEXT), [toy.vocab["\n"]]]
    fingerprint = toy.fingerprint()
    assert len(fingerprint) == 64 and fingerprint == tok.WordTokenizer("another name", VOCAB, tok.TOY_PATTERN).fingerprint()
    assert fingerprint != tok.WordTokenizer("toy", [VOCAB[1], VOCAB[0], *VOCAB[2:]], tok.TOY_PATTERN).fingerprint()
    for bad in (" xylophone", "  ", "\t", "ü", "<|endoftext|>"):
        word = {"  ": " ", "<|endoftext|>": "<"}.get(bad, bad)
        with pytest.raises(UserError) as e:
            toy.encode("\n" + bad)
        assert repr(word) in str(e.value)


@pytest.mark.parametrize("name", ["toy", "toy_math"])
def test_toy_folder_in_transformers(tmp_path, name):
    toy = tok.get(name)
    toy.save(tmp_path)
    theirs = pytest.importorskip("transformers").AutoTokenizer.from_pretrained(tmp_path)
    assert (theirs.eos_token_id, len(theirs)) == (toy.eot, toy.size)
    text = "\n".join(toy.tokens[:-1])
    assert theirs(text)["input_ids"] == toy.encode(text)
    assert theirs.decode(toy.encode(text)) == text
    with pytest.raises(Exception, match="WordLevel"):  # an unknown word does not become some other token in silence
        theirs(" xylophone")


def test_a_folder_gets_the_tokenizer_that_it_was_saved_with(gpt2, gpt2_folder, tmp_path):
    tok.get("toy").save(tmp_path)
    assert tok.get(tmp_path).name == tok.choose("auto", str(tmp_path)).name == "toy"
    assert tok.get(str(gpt2_folder)) is gpt2
    assert tok.choose("toy", str(gpt2_folder)).name == "toy"
    assert tok.choose("auto", "gpt2-medium") is tok.choose("auto", "scratch") is gpt2
    with pytest.raises(UserError, match=r"gpt3.*gpt2, toy"):
        tok.get("gpt3")
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(tmp_path)}))
    assert tok.choose("auto", str(adapter)).name == "toy", "an adapter without a tokenizer has that of its base"


def test_a_folder_with_the_ids_of_gpt2_gets_gpt2(gpt2, gpt2_folder, tmp_path):
    shutil.copy(gpt2_folder / "vocab.json", tmp_path)
    assert tok.get(tmp_path) is gpt2
    vocab = json.loads((tmp_path / "vocab.json").read_text(encoding="utf-8"))
    (tmp_path / "vocab.json").unlink()
    (tmp_path / "tokenizer.json").write_text(json.dumps({"model": {"type": "BPE", "vocab": vocab}}))
    assert tok.get(tmp_path) is gpt2
    (tmp_path / "tokenizer.json").unlink()
    (tmp_path / "config.json").write_text('{"vocab_size": 50257}')
    assert tok.get(tmp_path) is gpt2

    vocab["Ġthe"], vocab["Ġof"] = vocab["Ġof"], vocab["Ġthe"]
    (tmp_path / "vocab.json").write_text(json.dumps(vocab))
    with pytest.raises(UserError, match=r"vocab\.json does not have the 50,257 tokens of the tokenizer gpt2"):
        tok.get(tmp_path)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "no tokenizer files"),
        ({"model/x": ""}, "did you mean .*model"),
        ({"config.json": '{"vocab_size": 32000}'}, "config.json does not have the 50,257 tokens"),
        ({"config.json": "{"}, "config.json is not valid JSON"),
        ({"config.json": "[1]"}, "does not hold a JSON object"),
        ({"tokenizer_config.json": '{"nanopref_tokenizer": "bert"}'}, "'bert'"),
        ({"tokenizer.json": '{"model": {"type": "Unigram", "vocab": [["a", 0.5]]}}'}, "tokenizer.json does not have"),
        (
            {"tokenizer_config.json": '{"nanopref_tokenizer": "toy"}', "vocab.json": json.dumps({w: 0 for w in VOCAB})},
            "vocab.json does not have the .* tokens of the tokenizer toy: train the toy model again",
        ),
    ],
)
def test_folders_of_other_tokenizers_are_refused(files, message, tmp_path):
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=message):
        tok.get(tmp_path)
