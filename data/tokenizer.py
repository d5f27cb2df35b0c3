"""Text <-> token ids: GPT-2's byte-level BPE (by tiktoken) and the toy tasks' word lists, behind one small interface.

All have `name`, `eot` (id of <|endoftext|>), `size`, `encode`, `encode_batch`, `decode`, `save` and `fingerprint`.
A special token written out in a text is plain text: only a caller that means to end a text appends `eot`.
"""

import functools
import hashlib
import itertools
import json
import os
import re
from pathlib import Path

import requests
import tiktoken

from base.errors import UserError
from data import toy, toy_math
from weights import HUB_NAMES as SIZES

EOT = "<|endoftext|>"
GPT2_SIZE = 50257
KEY = "nanopref_tokenizer"  # the extra key in tokenizer_config.json by which get() knows a folder that save() wrote
TOY_PATTERN = r"\n| ?[A-Za-z0-9]+| ?[^\sA-Za-z0-9]"  # a newline, a word or a mark, each with its leading space


class GPT2Tokenizer:
    """GPT-2's 50,257 tokens. Needs tiktoken's two vocabulary files: downloaded once, or found in TIKTOKEN_CACHE_DIR."""

    name, eot, size = "gpt2", GPT2_SIZE - 1, GPT2_SIZE

    def __init__(self) -> None:
        try:
            self.bpe = tiktoken.get_encoding("gpt2")
        except (requests.RequestException, PermissionError, ValueError) as e:  # ValueError: a file's checksum is wrong
            raise UserError(
                f"tiktoken could not get GPT-2's vocabulary ({type(e).__name__}), tokenizer gpt2: connect to the "
                "network once, or set TIKTOKEN_CACHE_DIR to a folder that has tiktoken's cached files"
            ) from e
        self.threads = os.cpu_count() or 1

    def encode(self, text: str) -> list[int]:
        return self.bpe.encode_ordinary(text)

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        return self.bpe.encode_ordinary_batch(list(texts), num_threads=self.threads)

    def decode(self, ids: list[int]) -> str:
        """Ids of half a character (generation may stop inside one) come out as U+FFFD."""
        return self.bpe.decode(ids)

    def fingerprint(self) -> str:
        """SHA-256 (hex) of the tokens' bytes in id order; the same for every version of tiktoken."""
        return _sha256([self.bpe.decode_single_token_bytes(i) for i in range(self.size)])

    def save(self, folder: str | Path) -> None:
        """Write vocab.json, merges.txt and two config files: AutoTokenizer.from_pretrained(folder) gives our ids."""
        folder = _make(folder)
        _write_json(folder / "vocab.json", gpt2_vocab(), indent=None)
        lines = ["#version: 0.2", *(f"{left} {right}" for left, right in gpt2_merges())]
        (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
        _write_configs(folder, self.name, "GPT2Tokenizer", add_prefix_space=False, model_max_length=1024)


class ToyTokenizer:
    """A toy task's words: what `pattern` cuts a text into, all of them in `vocab`; <|endoftext|> is last. In `toy` a token is
    a word with the space before it, a mark, or a newline; in `toy_math` a keyword or a character."""

    def __init__(self, name: str, vocab: list[str], pattern: str) -> None:
        self.name, self.cut = name, pattern
        self.tokens = [*vocab, EOT]
        self.ids = {token: i for i, token in enumerate(vocab)}  # without EOT: written out in a text it is an error
        self.eot, self.size = len(vocab), len(self.tokens)
        self.pattern = re.compile(pattern + r"|[\s\S]")  # the last alternative catches what the tokens cannot spell

    def encode(self, text: str) -> list[int]:
        """Raises UserError on a word that is not in the vocabulary."""
        try:
            return [self.ids[token] for token in self.pattern.findall(text)]
        except KeyError as e:
            raise UserError(
                f"{e.args[0]!r} is not in the {self.name} vocabulary, in {_shorten(text)!r}: "
                f"use words of data/{self.name}.py, or the tokenizer gpt2"
            ) from None

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        return [self.encode(text) for text in texts]

    def decode(self, ids: list[int]) -> str:
        return "".join(self.tokens[i] for i in ids)

    def fingerprint(self) -> str:
        """SHA-256 (hex) of the tokens in id order and the pattern that cuts a text into them."""
        return _sha256([token.encode() for token in [*self.tokens, self.cut]])

    def save(self, folder: str | Path) -> None:
        """Write a tokenizer.json and the two config files: AutoTokenizer.from_pretrained(folder) gives our ids."""
        eot = {"id": self.eot, "content": EOT, "single_word": False, "lstrip": False, "rstrip": False}
        tokenizer = {
            "version": "1.0",
            "truncation": None,
            "padding": None,
            "added_tokens": [eot | {"normalized": False, "special": True}],
            "normalizer": None,
            "pre_tokenizer": {
                "type": "Split",
                "pattern": {"Regex": self.cut},
                "behavior": "Isolated",
                "invert": False,
            },
            "post_processor": None,
            "decoder": {"type": "Fuse"},
            # The unknown token is left out of the vocabulary on purpose: an unknown word raises there too.
            "model": {
                "type": "WordLevel",
                "vocab": {t: i for i, t in enumerate(self.tokens)},
                "unk_token": "<unknown>",
            },
        }
        folder = _make(folder)
        _write_json(folder / "tokenizer.json", tokenizer)
        _write_configs(folder, self.name, "PreTrainedTokenizerFast")


Tokenizer = GPT2Tokenizer | ToyTokenizer
KNOWN = {
    "gpt2": GPT2Tokenizer,
    "toy": functools.partial(ToyTokenizer, "toy", toy.VOCAB, TOY_PATTERN),
    "toy_math": functools.partial(ToyTokenizer, "toy_math", toy_math.VOCAB, toy_math.PATTERN),
}


def get(name_or_folder: str | Path) -> Tokenizer:
    """The tokenizer of that name ("gpt2", "toy", "toy_math"), or the one that a model folder was saved with.

    A folder of somebody else's counts as GPT-2 if its vocab.json (or tokenizer.json) has GPT-2's ids, or, having
    neither, if its config.json has GPT-2's vocab_size. Raises UserError for any other name, folder or vocabulary.
    """
    if str(name_or_folder) in KNOWN:
        return _named(str(name_or_folder))
    folder = Path(name_or_folder)
    if not folder.is_dir():
        raise UserError(
            f"unknown tokenizer {str(name_or_folder)!r}: use one of {', '.join(KNOWN)}, or the folder of a saved model"
        )
    name = _read_json(folder / "tokenizer_config.json").get(KEY)
    if name not in (None, *KNOWN):
        raise UserError(f"unknown {KEY} {name!r} in {folder / 'tokenizer_config.json'}: known are {', '.join(KNOWN)}")
    path, vocab = _vocab_of(folder)
    if name in ("toy", "toy_math"):
        tokenizer = _named(name)
        if vocab != {token: i for i, token in enumerate(tokenizer.tokens)}:
            raise UserError(f"the words of {path} are not those of data/{name}.py: train the toy model again")
        return tokenizer
    if vocab is None and name is None:
        size = _read_json(folder / "config.json").get("vocab_size") or _read_json(folder / "hparams.json").get("n_vocab")
        if size is None:
            hint = f"did you mean {folder / 'model'}?" if (folder / "model").is_dir() else "name a saved model's folder"
            raise UserError(f"no tokenizer files and no vocab_size in config.json, folder {folder}: {hint}")
        if size != GPT2_SIZE:
            raise UserError(f"the config in {folder} says vocab_size {size}: nanopref knows only gpt2's {GPT2_SIZE}")
    if vocab is not None and vocab != gpt2_vocab():
        raise UserError(f"{path} does not have GPT-2's ids: nanopref knows only gpt2's vocabulary of {GPT2_SIZE}")
    return _named("gpt2")


def choose(name: str, init_from: str) -> Tokenizer:
    """The tokenizer `name`, or for "auto" the one that belongs to the weights `init_from` (gpt2 where they are no folder)."""
    if name != "auto":
        return get(name)
    folder = Path(init_from).expanduser()
    base = _read_json(folder / "adapter_config.json").get("base_model_name_or_path")
    if isinstance(base, str) and _vocab_of(folder)[1] is None:  # an adapter without a tokenizer has that of its base
        init_from, folder = base, Path(base).expanduser()
    return get(folder if init_from not in (*SIZES, "scratch") and folder.is_dir() else "gpt2")


@functools.cache
def gpt2_vocab() -> dict[str, int]:
    """GPT-2's tokens as vocab.json spells them (a printable character a byte) -> id."""
    gpt2 = _named("gpt2")
    letters = _byte_letters(gpt2.bpe)
    tokens = [gpt2.bpe.decode_single_token_bytes(i) for i in range(gpt2.eot)]
    return {"".join(letters[b] for b in token): i for i, token in enumerate(tokens)} | {EOT: gpt2.eot}


@functools.cache
def gpt2_merges() -> list[tuple[str, str]]:
    """The 50,000 merges of GPT-2's merges.txt in order, recovered from the ranks: about half a second, once a process.

    Id 256 + i is what merge i made. When it was learned its two parts were already tokens, and they are what the
    merges before it leave of its bytes.
    """
    gpt2 = _named("gpt2")
    letters = _byte_letters(gpt2.bpe)
    tokens = [gpt2.bpe.decode_single_token_bytes(i) for i in range(gpt2.eot)]
    rank = {token: i for i, token in enumerate(tokens)}
    merges = []
    for own, token in enumerate(tokens[256:], start=256):
        parts = [token[i : i + 1] for i in range(len(token))]
        while len(parts) > 2:
            # The whole token has rank `own` and comes from 2 parts only, so any pair below it is an earlier merge.
            ranks = [rank.get(a + b, own) for a, b in itertools.pairwise(parts)]
            best = min(ranks)
            assert best < own, f"token {own} is not made of two earlier tokens"
            at = ranks.index(best)
            parts[at : at + 2] = [parts[at] + parts[at + 1]]
        left, right = ("".join(letters[b] for b in part) for part in parts)
        merges.append((left, right))
    return merges


_named = functools.cache(lambda name: KNOWN[name]())


def _byte_letters(bpe: tiktoken.Encoding) -> dict[int, str]:
    """Byte -> the character GPT-2's files write for it: itself where printable, else U+0100 on, in byte order.

    The first 256 ids are the bytes: the 188 printable ones in order, then the others in order.
    """
    order = [bpe.decode_single_token_bytes(i)[0] for i in range(256)]
    return {b: chr(b) if i < 188 else chr(256 + i - 188) for i, b in enumerate(order)}


def _vocab_of(folder: Path) -> tuple[Path, dict[str, int] | None]:
    """(file, token -> id) of a folder's vocab.json or tokenizer.json; None where it has neither."""
    path = folder / "vocab.json"
    if path.exists():
        return path, _read_json(path)
    path = folder / "tokenizer.json"
    if not path.exists():
        return path, None
    found = _read_json(path)
    model, added = found.get("model"), found.get("added_tokens")
    vocab = model.get("vocab") if isinstance(model, dict) else None
    if not isinstance(vocab, dict):
        return path, {}  # a kind of model that is not ours: equal to no vocabulary of ours
    return path, vocab | {token["content"]: token["id"] for token in added or []}


def _read_json(path: Path) -> dict:
    """The object in a JSON file, {} if there is no such file. Raises UserError if it is not one."""
    if not path.exists():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as e:  # not JSON, or not UTF-8
        raise UserError(f"cannot read {path} ({e}): copy or save the model's folder again") from e
    if not isinstance(found, dict):
        raise UserError(f"{path} is not a JSON object: copy or save the model's folder again")
    return found


def _write_configs(folder: Path, name: str, tokenizer_class: str, **more: object) -> None:
    special = {"bos_token": EOT, "eos_token": EOT}
    if name == "gpt2":
        special["unk_token"] = EOT  # as the released files have it; never used, bytes spell every text
    config = {KEY: name, "tokenizer_class": tokenizer_class, "clean_up_tokenization_spaces": False, **special, **more}
    _write_json(folder / "tokenizer_config.json", config)
    _write_json(folder / "special_tokens_map.json", special)


def _write_json(path: Path, value: dict, indent: int | None = 2) -> None:
    path.write_text(json.dumps(value, ensure_ascii=False, indent=indent) + "\n", encoding="utf-8")


def _make(folder: str | Path) -> Path:
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _sha256(parts: list[bytes]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(len(part).to_bytes(4, "little") + part)  # with its length: no two lists of parts run together
    return digest.hexdigest()


def _shorten(text: str, most: int = 60) -> str:
    return text if len(text) <= most else text[:most] + "..."
