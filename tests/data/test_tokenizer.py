"""The two tokenizers: their ids, what they write for transformers, and which one a folder gets."""

import json
import shutil
from pathlib import Path

import pytest
import requests
import tiktoken

from base.errors import UserError
from data import tokenizer as tok
from data.toy import VOCAB

CACHE = Path(__file__).parents[3] / "shared" / "tiktoken"

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
    with pytest.MonkeyPatch.context() as patch:
        if CACHE.is_dir():
            patch.setenv("TIKTOKEN_CACHE_DIR", str(CACHE))
        try:
            return tok.get("gpt2")
        except UserError as e:
            pytest.skip(f"no vocabulary: {e}")


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


def test_gpt2_files_are_the_released_ones(gpt2_folder):
    if not CACHE.is_dir():
        pytest.skip("no released files to compare with")
    released = {path.read_bytes()[:8]: path.read_text(encoding="utf-8") for path in CACHE.iterdir()}
    assert (gpt2_folder / "merges.txt").read_text(encoding="utf-8") == released[b"#version"]
    vocab = json.loads(next(text for start, text in released.items() if start != b"#version"))
    assert json.loads((gpt2_folder / "vocab.json").read_text(encoding="utf-8")) == vocab


def test_gpt2_folder_in_transformers(gpt2, gpt2_folder):
    theirs = pytest.importorskip("transformers").AutoTokenizer.from_pretrained(gpt2_folder)
    assert (theirs.eos_token, theirs.eos_token_id, len(theirs)) == ("<|endoftext|>", 50256, 50257)
    for text in TEXTS:
        assert theirs(text)["input_ids"] == gpt2.encode(text), text
        assert theirs.decode(gpt2.encode(text)) == text


def test_gpt2_without_network(monkeypatch, tmp_path):
    def refuse(*args, **kwargs):
        raise requests.ConnectionError("no route")

    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(requests, "get", refuse)
    monkeypatch.setattr(requests.Session, "request", refuse)
    monkeypatch.setattr(tiktoken.registry, "ENCODINGS", {})
    with pytest.raises(UserError, match="TIKTOKEN_CACHE_DIR"):
        tok.GPT2Tokenizer()


def test_toy_ids():
    toy = tok.get("toy")
    assert toy.size == len(VOCAB) + 1 == len(set(VOCAB)) + 1
    assert toy.eot == len(VOCAB) and toy.decode([toy.eot]) == "<|endoftext|>"
    for token in VOCAB:  # each is cut out whole wherever it stands
        assert toy.decode(toy.encode("\n" + token + "\n")) == "\n" + token + "\n"
        assert toy.ids[token] in toy.encode("\n" + token + "\n") and len(toy.encode(token)) == 1
    assert toy.decode(toy.encode(TOY_TEXT)) == TOY_TEXT
    assert toy.encode_batch([TOY_TEXT, "\n"]) == [toy.encode(TOY_TEXT), [toy.ids["\n"]]]


@pytest.mark.parametrize("bad", [" xylophone", "  ", "\t", "ü", "<|endoftext|>"])
def test_toy_unknown_word(bad):
    word = {"  ": " ", "<|endoftext|>": "<"}.get(bad, bad)
    with pytest.raises(UserError) as e:
        tok.get("toy").encode("\n" + bad)
    assert repr(word) in str(e.value)


def test_toy_folder_in_transformers(tmp_path):
    toy = tok.get("toy")
    toy.save(tmp_path)
    theirs = pytest.importorskip("transformers").AutoTokenizer.from_pretrained(tmp_path)
    assert (theirs.eos_token_id, len(theirs)) == (toy.eot, toy.size)
    assert theirs(TOY_TEXT)["input_ids"] == toy.encode(TOY_TEXT)
    assert theirs.decode(toy.encode(TOY_TEXT)) == TOY_TEXT
    with pytest.raises(Exception, match="WordLevel"):  # an unknown word does not become some other token in silence
        theirs(" xylophone")


def test_fingerprints(gpt2):
    toy = tok.get("toy").fingerprint()
    assert len(toy) == 64 and toy != gpt2.fingerprint()
    assert toy == tok.ToyTokenizer("another name", VOCAB, tok.TOY_PATTERN).fingerprint()
    assert toy != tok.ToyTokenizer("toy", [VOCAB[1], VOCAB[0], *VOCAB[2:]], tok.TOY_PATTERN).fingerprint()


def test_get_knows_what_it_saved(gpt2, gpt2_folder, tmp_path):
    tok.get("toy").save(tmp_path)
    assert tok.get(tmp_path).name == "toy"
    assert tok.get(str(gpt2_folder)) is gpt2


def test_get_foreign_folders(gpt2, gpt2_folder, tmp_path):
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
    with pytest.raises(UserError, match="only gpt2's vocabulary"):
        tok.get(tmp_path)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "no tokenizer files"),
        ({"config.json": '{"vocab_size": 32000}'}, "vocab_size 32000"),
        ({"config.json": "{"}, "cannot read .*config.json"),
        ({"config.json": "[1]"}, "not a JSON object"),
        ({"tokenizer_config.json": '{"nanopref_tokenizer": "bert"}'}, "'bert'"),
        ({"tokenizer_config.json": '{"nanopref_tokenizer": "toy"}'}, "data/toy.py"),
        ({"tokenizer.json": '{"model": {"type": "Unigram", "vocab": [["a", 0.5]]}}'}, "only gpt2's vocabulary"),
    ],
)
def test_get_refuses(files, message, tmp_path, gpt2):
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=message):
        tok.get(tmp_path)


def test_get_refuses_an_older_toy_vocabulary(tmp_path, monkeypatch):
    tok.get("toy").save(tmp_path)
    path = tmp_path / "tokenizer.json"
    saved = json.loads(path.read_text(encoding="utf-8"))
    saved["model"]["vocab"][VOCAB[0]], saved["model"]["vocab"][VOCAB[1]] = 1, 0
    path.write_text(json.dumps(saved))
    with pytest.raises(UserError, match="train the toy model again"):
        tok.get(tmp_path)


def test_get_hints(tmp_path):
    with pytest.raises(UserError, match=r"gpt3.*gpt2, toy"):
        tok.get("gpt3")
    (tmp_path / "model").mkdir()
    with pytest.raises(UserError, match="did you mean"):
        tok.get(tmp_path)
