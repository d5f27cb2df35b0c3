"""The tokenizers: their ids, what they write for transformers, and which one a folder gets."""

import gzip
import itertools
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import tiktoken

from base import download
from base.errors import UserError
from data import tokenizer as tok
from data.toy import VOCAB
from tests.chats import CHATML, spaced_tokenizer_folder, tokenizer_folder
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


def theirs_of(folder):
    return pytest.importorskip("transformers").AutoTokenizer.from_pretrained(folder)


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
    assert tok.choose("auto", "openai-community/gpt2") is gpt2, "without a request"
    with pytest.raises(UserError, match=r"gpt3.*gpt2, reviews, toy"):
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

    vocab["Ġthe"], vocab["Ġof"] = vocab["Ġof"], vocab["Ġthe"]
    (tmp_path / "vocab.json").write_text(json.dumps(vocab))
    with pytest.raises(UserError, match=r"no tokenizer\.json, and no vocab\.json of GPT-2: copy it there"):
        tok.get(tmp_path)


def test_gpt2_with_tokens_of_a_chat_is_another_tokenizer(gpt2_folder, tmp_path):
    """transformers leaves vocab.json as it was, and writes the new ones into tokenizer.json."""
    theirs = theirs_of(gpt2_folder)
    theirs.add_special_tokens({"additional_special_tokens": ["<|turn|>"]})
    theirs.save_pretrained(tmp_path)
    shutil.copy(gpt2_folder / "vocab.json", tmp_path)
    ours = tok.get(tmp_path)
    assert ours.size == 50258 and ours.encode_rendered("a<|turn|>")[0] == theirs("a<|turn|>")["input_ids"] == [64, 50257]


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "has no tokenizer.json, and no vocab.json of GPT-2: copy it there"),
        ({"model/x": ""}, "did you mean .*model"),
        ({"tokenizer.json": "{"}, "tokenizer.json is not valid JSON"),
        ({"vocab.json": "[1]"}, "does not hold a JSON object"),
        (
            {"tokenizer.json": '{"model": {"type": "Unigram", "vocab": [["a", 0.5]]}}'},
            "tokenizer.json: no token that ends a text",
        ),
        ({"tokenizer.json": '{"model": {"type": "Quantum", "vocab": {}}}'}, "tokenizer.json: damaged, or too new"),
        ({"vocab.json": json.dumps({w: 0 for w in VOCAB})}, "and no vocab.json of GPT-2"),
    ],
)
def test_folders_of_other_tokenizers_are_refused(files, message, tmp_path):
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=message):
        tok.get(tmp_path)


ODD_TEXTS = [
    *TEXTS,
    "שלום עולם",
    "مرحبا بالعالم \u200f!",
    "a<|done|>b</s><s> <|turn|>",
    "<think>x</think>",
    "\u202eabc",
    "\ufffd",
]


@pytest.mark.parametrize("bos", [False, True])
def test_ids_of_a_tokenizer_json_are_those_of_transformers(bos, tmp_path):
    ours, theirs = tok.get(tokenizer_folder(tmp_path, None, bos)), theirs_of(tmp_path)
    assert isinstance(ours, tok.JsonTokenizer) and (ours.size, ours.eot, ours.bos) == (len(theirs), 2, 1)
    assert ours.chat is None and ours.named == theirs.special_tokens_map
    found = ours.encode_batch(ODD_TEXTS)
    for text, ids in zip(ODD_TEXTS, found, strict=True):
        assert [*ours.start, *ids] == theirs(text, split_special_tokens=True)["input_ids"], text
        assert ours.encode(text) == ids and ours.decode(ids) == text == theirs.decode(ids)
        assert ours.special.isdisjoint(ids), "a special token written out is text"
    assert ours.encode("<think>") == [ours.vocab["<think>"]], "a token of the vocabulary that is not special is one"
    assert ours.encode("a\ud800b\udc00") == theirs.encode("a\ufffdb\ufffd", add_special_tokens=False)
    assert ours.encode("\ud83d\ude00") == theirs.encode("😀", add_special_tokens=False), "two halves are a whole"


@pytest.mark.slow
def test_ids_of_smollm2_on_all_texts_at_hand():
    folder = os.environ.get("NANOPREF_SMOLLM2")
    if not folder or not (SHARED / "data").is_dir():
        pytest.skip("NANOPREF_SMOLLM2 names no folder of SmolLM2, or no ../shared with texts")
    ours, theirs = tok.get(folder), theirs_of(folder)
    texts = list(ODD_TEXTS)
    for path in sorted((SHARED / "data").glob("*.gz")):
        with gzip.open(path, "rt", encoding="utf-8") as lines:
            texts += [str(value) for line in itertools.islice(lines, 500) for value in json.loads(line).values()]
    assert ours.encode_batch(texts) == theirs(texts, split_special_tokens=True)["input_ids"]
    talk = ({"role": "user", "content": "Why is the sky blue?"}, {"role": "assistant", "content": "It scatters blue light."})
    text, _ = ours.chat.render(talk, "")
    assert text == theirs.apply_chat_template(list(talk), tokenize=False)
    assert ours.encode_rendered(text)[0] == theirs.apply_chat_template(list(talk))["input_ids"]
    assert ours.stops == {theirs.eos_token_id} == {ours.turn_end()}


def test_tokenizer_files_are_saved_byte_for_byte(tmp_path):
    folder = tokenizer_folder(tmp_path / "a", add_bos_token=False)
    (folder / "special_tokens_map.json").write_text('{ "pad_token" : "<unk>"}')
    (folder / "generation_config.json").write_text('{"eos_token_id":[2,\n4], "temperature": 0.6}')
    (folder / "config.json").write_text("{}")
    ours = tok.choose("auto", str(folder))
    assert ours.stops == {2, 4} and ours.named["pad_token"] == "<unk>"
    (tmp_path / "b").mkdir()
    ours.save(tmp_path / "b")
    written = {path.name: path.read_bytes() for path in (tmp_path / "b").iterdir()}
    assert written == {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "config.json"}
    again = tok.get(tmp_path / "b")
    assert again.fingerprint() == ours.fingerprint() != tok.get(tokenizer_folder(tmp_path / "c", None, True)).fingerprint()
    assert again.encode("Paris") == ours.encode("Paris") and again.chat.text == ours.chat.text
    mine = ours.with_chat("{{ messages }}")
    mine.save(tmp_path / "b")
    assert (tmp_path / "b" / "chat_template.jinja").read_text() == "{{ messages }}", "a template that was given is saved"


def test_where_a_chat_template_comes_from(gpt2, gpt2_folder, tmp_path):
    folder = tokenizer_folder(tmp_path / "a", None, chat_template="in the config")
    assert tok.get(folder).chat.text == "in the config"
    several = [{"name": "tool_use", "template": "no"}, {"name": "default", "template": "yes"}]
    folder = tokenizer_folder(tmp_path / "a", None, chat_template=several)
    assert tok.get(folder).chat.text == "yes"
    assert tok.get(tokenizer_folder(tmp_path / "a", "a file", chat_template=several)).chat.text == "a file"
    shutil.copytree(gpt2_folder, tmp_path / "b")
    (tmp_path / "b" / "chat_template.jinja").write_text("for GPT-2")
    ours = tok.get(tmp_path / "b")
    assert ours.chat.text == "for GPT-2" and ours.encode("x") == gpt2.encode("x") and gpt2.chat is None
    ours.save(tmp_path / "a")
    assert (tmp_path / "a" / "chat_template.jinja").read_text() == "for GPT-2"


def test_the_end_of_a_turn_is_found_in_the_template(tmp_path):
    ours = tok.get(tokenizer_folder(tmp_path))
    assert ours.stops == {2} and ours.turn_end() == ours.vocab["<|done|>"]


def test_a_tokenizer_of_the_hub(tmp_path, monkeypatch):
    """The files that there are, in one go; later without a request."""
    monkeypatch.setenv("NANOPREF_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HOME", str(tmp_path / "none"))
    folder, asked = tokenizer_folder(tmp_path / "a"), []

    def fetch(url, dest):
        asked.append(dest.name)
        if not (folder / dest.name).exists():
            raise download.NotFound(f"{url}: no such file")
        dest.parent.mkdir(parents=True, exist_ok=True)
        return Path(shutil.copy(folder / dest.name, dest))

    monkeypatch.setattr(download, "fetch", fetch)
    ours = tok.choose("auto", "owner/name")
    assert ours.name == "owner/name" and ours.encode("Paris") == tok.get(folder).encode("Paris") and ours.chat
    assert asked[-1] == "tokenizer.json", "where it is, all others are"
    count = len(asked)
    assert tok.get("owner/name").files == ours.files and len(asked) == count


def test_without_the_package_tokenizers(tmp_path, monkeypatch):
    folder = tokenizer_folder(tmp_path)
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(UserError, match=r"its tokenizer\.json needs the package tokenizers: pip install tokenizers"):
        tok.get(folder)


def test_a_tokenizer_that_cannot_keep_text_apart(tmp_path):
    """In a list of words a special token may be a word."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    made = Tokenizer(models.WordLevel({"a": 0, "</s>": 1, "<unk>": 2}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made.add_special_tokens(["</s>", "<unk>"])
    made.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "</s>", "unk_token": "<unk>"}')
    ours = tok.get(tmp_path)
    assert ours.encode("a b") == [0, 2]
    with pytest.raises(UserError, match="takes a part of 'a </s>' for a special token"):
        ours.encode_batch(["a", "a </s>"])


@pytest.mark.parametrize("scheme", ["always", "first", "legacy"])
def test_a_completion_begins_with_no_mark_of_a_texts_beginning(tmp_path, scheme):
    """Llama 2's kind writes a text's beginning as a space; behind a prompt that would make two of one."""
    ours = tok.get(spaced_tokenizer_folder(tmp_path, scheme, CHATML))
    prompt, completions = "the sky is", [" blue, and so on", "blue", "\nblue", " ", "\u00e9 \U0001f600"]
    for completion, ids in zip(completions, ours.encode_behind(completions), strict=True):
        assert ours.decode(ids) == completion
        assert ours.decode([*ours.encode(prompt), *ids]) == f" {prompt}{completion}"
    plain = tok.get(tokenizer_folder(tmp_path / "plain"))
    assert plain.encode_behind(completions) == plain.encode_batch(completions)
