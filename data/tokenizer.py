"""Text <-> token ids: GPT-2's byte-level BPE (by tiktoken) and the word lists of the toy tasks, behind one interface.

A special token that is written out in a text is plain text: only a caller that means to end a text appends `eot`.
"""

import base64
import functools
import gzip
import hashlib
import itertools
import os
import re
from pathlib import Path

import tiktoken

from base.errors import UserError
from base.files import read_json, write_json
from data import reviews, toy, toy_math
from weights import on_hub

EOT = "<|endoftext|>"
GPT2_RANKS = Path(__file__).parent / "gpt2.tiktoken.gz"  # line i: token i in base64, a space, i
# How GPT-2 cuts a text before it merges bytes: a contraction, a word, a number, other marks, white space. The last space before
# a word belongs to the word.
GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"
TOY_PATTERN = r"\n| ?[A-Za-z0-9]+| ?[^\sA-Za-z0-9]"  # a newline, a word or a mark, each with its leading space
KEY = "nanopref_tokenizer"  # the key in tokenizer_config.json that holds the name of a tokenizer saved by this project


class Tokenizer:
    """What the project asks of a tokenizer. One for another family is a class with these, and a line in `KNOWN` or `get`.

    name: what a run and a reference file say of it. eot: the id of <|endoftext|>. size: how many ids there are.
    vocab: token -> id, the tokens spelled as in the saved files.
    encode(text) -> ids. decode(ids) -> text. encode_batch(texts) -> a list of ids for each text.
    save(folder): write files with which transformers' AutoTokenizer gives the same ids.
    fingerprint(): SHA-256 (hex) of all that decides the ids. A reference file names it.
    """

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        return [self.encode(text) for text in texts]

    def _save_config(self, folder: Path, tokenizer_class: str, **more: object) -> None:
        config = {KEY: self.name, "tokenizer_class": tokenizer_class, "clean_up_tokenization_spaces": False}
        write_json(folder / "tokenizer_config.json", config | {"bos_token": EOT, "eos_token": EOT} | more)


class GPT2Tokenizer(Tokenizer):
    """GPT-2's 50,257 tokens, from the vocabulary that comes with the project."""

    name, eot, size = "gpt2", 50256, 50257

    def __init__(self) -> None:
        self.tokens = [base64.b64decode(word) for word in gzip.decompress(GPT2_RANKS.read_bytes()).split()[::2]]
        self.ranks = {token: i for i, token in enumerate(self.tokens)}
        self.bpe = tiktoken.Encoding("gpt2", pat_str=GPT2_PATTERN, mergeable_ranks=self.ranks, special_tokens={EOT: self.eot})

    def encode(self, text: str) -> list[int]:
        return self.bpe.encode_ordinary(text)

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        return self.bpe.encode_ordinary_batch(list(texts), num_threads=os.cpu_count() or 1)

    def decode(self, ids: list[int]) -> str:
        """An incomplete character (sampling may stop inside one) becomes U+FFFD."""
        return self.bpe.decode(ids)

    def fingerprint(self) -> str:
        return _sha256([*self.tokens, EOT.encode()])

    def save(self, folder: str | Path) -> None:
        folder = Path(folder)
        write_json(folder / "vocab.json", self.vocab, indent=None)
        (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *self.merges, ""]), encoding="utf-8")
        self._save_config(folder, "GPT2Tokenizer", unk_token=EOT, add_prefix_space=False, model_max_length=1024)

    @functools.cached_property
    def vocab(self) -> dict[str, int]:
        return {self._spell(token): i for i, token in enumerate(self.tokens)} | {EOT: self.eot}

    @functools.cached_property
    def merges(self) -> list[str]:
        """The 50,000 lines of merges.txt, recovered from the ranks in about half a second.

        Merge i made token 256 + i. Its two parts are what the earlier merges, those of lower rank, leave of its bytes.
        """
        lines = []
        for own, token in enumerate(self.tokens[256:], start=256):
            parts = [token[i : i + 1] for i in range(len(token))]
            while len(parts) > 2:
                ranks = [self.ranks.get(a + b, own) for a, b in itertools.pairwise(parts)]
                at = ranks.index(min(ranks))
                parts[at : at + 2] = [parts[at] + parts[at + 1]]
            lines.append(" ".join(map(self._spell, parts)))
        return lines

    def _spell(self, token: bytes) -> str:
        """A token as GPT-2's files write it: a character for each byte, itself where printable, else U+0100 and up.

        The first 256 ids are the bytes: the 188 printable ones in order, then the others in order.
        """
        ids = (self.ranks[token[i : i + 1]] for i in range(len(token)))
        return "".join(chr(self.tokens[i][0] if i < 188 else 256 + i - 188) for i in ids)


class WordTokenizer(Tokenizer):
    """A word list: `pattern` cuts a text into words, all of which must be in the list. <|endoftext|> is the last id.

    In `toy` a token is a word with the space before it, a mark, or a newline; in `toy_math` a keyword, a number or a character.
    """

    def __init__(self, name: str, words: list[str], pattern: str) -> None:
        self.name, self.pattern = name, pattern
        self.tokens = [*words, EOT]
        self.vocab = {token: i for i, token in enumerate(self.tokens)}
        self.eot, self.size = len(words), len(self.tokens)
        self.cut = re.compile(pattern + r"|[\s\S]")  # the last alternative catches what the list cannot spell

    def encode(self, text: str) -> list[int]:
        """Raises UserError on a word that is not in the list."""
        try:
            return [self.vocab[token] for token in self.cut.findall(text)]
        except KeyError as e:
            where = f"not in the {self.name} vocabulary, in {text[:60]!r}"
            raise UserError(f"{e.args[0]!r} is {where}: use words of data/{self.name}.py, or the tokenizer gpt2") from None

    def decode(self, ids: list[int]) -> str:
        return "".join(self.tokens[i] for i in ids)

    def fingerprint(self) -> str:
        return _sha256([text.encode() for text in (*self.tokens, self.pattern)])

    def save(self, folder: str | Path) -> None:
        flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
        tokenizer = {
            "version": "1.0",
            "added_tokens": [{"id": self.eot, "content": EOT, "special": True, **flags}],
            "pre_tokenizer": {"type": "Split", "pattern": {"Regex": self.pattern}, "behavior": "Isolated", "invert": False},
            "decoder": {"type": "Fuse"},
            # The unknown token is left out of the vocabulary on purpose, so that an unknown word raises there too.
            "model": {"type": "WordLevel", "vocab": self.vocab, "unk_token": "<unknown>"},
        }
        write_json(Path(folder) / "tokenizer.json", tokenizer)
        self._save_config(Path(folder), "PreTrainedTokenizerFast")


KNOWN = {
    "gpt2": GPT2Tokenizer,
    "reviews": functools.partial(WordTokenizer, "reviews", reviews.VOCAB, reviews.PATTERN),
    "toy": functools.partial(WordTokenizer, "toy", toy.VOCAB, TOY_PATTERN),
    "toy_math": functools.partial(WordTokenizer, "toy_math", toy_math.VOCAB, toy_math.PATTERN),
}
_named = functools.cache(lambda name: KNOWN[name]())  # each is made once a process


def get(name_or_folder: str | Path) -> Tokenizer:
    """The tokenizer of that name ("gpt2", "toy", "toy_math"), or the one that a model folder was saved with.

    A folder that this project did not save has GPT-2's tokenizer if its vocab.json (or tokenizer.json) holds GPT-2's ids, or,
    having neither, if its config.json has GPT-2's vocab_size. Raises UserError for any other name, folder or vocabulary.
    """
    if str(name_or_folder) in KNOWN:
        return _named(str(name_or_folder))
    folder = Path(name_or_folder)
    if not folder.is_dir():
        raise UserError(f"unknown tokenizer {str(folder)!r}: use one of {', '.join(KNOWN)}, or the folder of a saved model")
    name = read_json(folder / "tokenizer_config.json").get(KEY, "gpt2")
    if not isinstance(name, str) or name not in KNOWN:
        raise UserError(f"{folder}/tokenizer_config.json: unknown {KEY} {name!r}: known are {', '.join(KNOWN)}")
    tokenizer = _named(name)
    path, found = _vocab_of(folder)
    if found is None:
        path = folder / "config.json"
        found = read_json(path).get("vocab_size")
        if found is None:
            hint = f"did you mean {folder / 'model'}?" if (folder / "model").is_dir() else "name a saved model's folder"
            raise UserError(f"no tokenizer files and no vocab_size in config.json, folder {folder}: {hint}")
    if found != (tokenizer.size if isinstance(found, int) else tokenizer.vocab):
        help = "this project knows no other of that kind" if name == "gpt2" else f"train the {name} model again"
        raise UserError(f"{path} does not have the {tokenizer.size:,} tokens of the tokenizer {name}: {help}")
    return tokenizer


def choose(name: str, init_from: str) -> Tokenizer:
    """The tokenizer `name`; for "auto" the one of the model folder `init_from`, and GPT-2's where that is no folder."""
    if name != "auto":
        return get(name)
    folder = Path(init_from).expanduser()
    base = read_json(folder / "adapter_config.json").get("base_model_name_or_path")
    if isinstance(base, str) and _vocab_of(folder)[1] is None:  # an adapter without a tokenizer has that of its base
        init_from, folder = base, Path(base).expanduser()
    return get(folder if not on_hub(init_from) and folder.is_dir() else "gpt2")


def _vocab_of(folder: Path) -> tuple[Path, dict[str, int] | None]:
    """(file, token -> id) of a folder's vocab.json or tokenizer.json; None where it has neither."""
    path = folder / "vocab.json"
    if path.exists():
        return path, read_json(path)
    if not (found := read_json(path := folder / "tokenizer.json")):
        return path, None
    try:
        return path, found["model"]["vocab"] | {token["content"]: token["id"] for token in found.get("added_tokens") or []}
    except (TypeError, KeyError):
        return path, {}  # another kind of model: equal to no vocabulary of ours


def _sha256(parts: list[bytes]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(len(part).to_bytes(4, "little") + part)  # with its length: no two lists of parts run together
    return digest.hexdigest()
