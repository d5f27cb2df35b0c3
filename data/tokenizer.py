"""Text <-> token ids: GPT-2's byte-level BPE (by tiktoken), any model's tokenizer.json (by the package tokenizers), and the
word lists of the toy tasks, behind one interface.

A special token that is written out in a text is plain text. Real ones come from a chat template (data/chat.py), and from a
caller that means to begin a text (`start`) or to end one (`eot`).
"""

import copy
import functools
import gzip
import hashlib
import json
import os
import re
import secrets
from bisect import bisect_right
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import tiktoken

from base.download import hub_files
from base.errors import UserError
from base.files import expand, read_json
from data import reviews, toy, toy_math
from data.chat import MARK, Chat, Span
from weights import HUB_NAMES, on_hub
from weights import TOKENIZER_FILES as FILES

EOT = "<|endoftext|>"
GPT2_MERGES = Path(__file__).parent / "gpt2.merges.gz"  # line i, from 0, is `left right`: token 256 + i is these two joined
PRINTABLE = [*range(33, 127), *range(161, 173), *range(174, 256)]
# GPT-2's first 256 tokens are the bytes: the printable ones, then the others. In its files a character stands for a byte: a
# printable one for itself, those from U+0100 on for the others.
BYTES = {chr(byte): byte for byte in PRINTABLE}
BYTES |= {chr(256 + n): byte for n, byte in enumerate(byte for byte in range(256) if byte not in PRINTABLE)}
# How GPT-2 cuts a text before it merges bytes: a contraction, a word, a number, other marks, white space. The last space before
# a word belongs to the word.
GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"
TOY_PATTERN = r"\n| ?[A-Za-z0-9]+| ?[^\sA-Za-z0-9]"  # a newline, a word or a mark, each with its leading space
JSON, CONFIG, TEMPLATE, GENERATION = "tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"
SPECIAL_MAP = "special_tokens_map.json"
NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
REAL = f"{secrets.randbelow(10**18):018}"  # behind a special token that is one: no text can hold it
LEADS = "\n", "a"  # no tokenizer joins the first with a word behind it, nor the second with a newline
AT_ONCE = 1000  # texts that the package tokenizers is given at once: what it returns takes far more memory than the ids


class Tokenizer:
    """What the project asks of a tokenizer. One for another family is a class with these, and a line in `KNOWN` or `get`.

    name: what a run and a reference file say of it. size: how many ids there are. special: the ids of special tokens. eot: the
    one that ends a text. stops: those that end what a model writes, `eot` among them. bos: the one that begins a text, or None.
    start: what stands before every text, [bos] where the model wants that, else [].
    chat: the chat template, or None. named: what it is told of special tokens. written: a pattern of special tokens in a text.
    vocab: token -> id, the tokens spelled as in the saved files.
    files: what is saved, {name: bytes}. With it transformers' AutoTokenizer gives the same ids.
    encode(text) -> ids. decode(ids) -> text, with the space that it begins with. encode_batch(texts) -> a list of ids for each
    text. encode_behind(texts): the same for texts that stand behind a prompt, so without a mark of a text's beginning.
    encode_rendered(text, spans): the ids of a text that a chat template wrote, and which of them overlap the spans of
    characters, (ids,) bool. A special token in the text is a real one, but for one with a `chat.MARK` in it: that was written
    out in a message.
    fingerprint(): SHA-256 (hex) of all that decides the ids. A reference file names it.
    """

    start: list[int] = []  # noqa: RUF012 (nobody writes to it)
    chat: Chat | None = None

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        return [self.encode(text) for text in texts]

    def encode_behind(self, texts: list[str]) -> list[list[int]]:
        return self.encode_batch(texts)

    def with_chat(self, text: str | None, **settings: str) -> "Tokenizer":
        """This tokenizer with another chat template, which is saved with it; None: with its own. settings: those of `Chat`."""
        new = copy.copy(self)
        if text is not None:
            new.files = self.files | {TEMPLATE: text.encode()}
        if text is not None or self.chat:
            new.chat = Chat(self.chat.text if text is None else text, self, **settings)
        return new

    def need_chat(self, where: str) -> Chat:
        """The chat template for a conversation at `where`, or a UserError."""
        if self.chat is None:
            raise UserError(f"{where}: a conversation, and {self.name} has no chat template: give --chat_template FILE")
        return self.chat

    def turn_end(self) -> int:
        """The special token with which the chat template ends an answer, or `eot` where it writes none."""
        asked, word = {"role": "user", "content": "Say zebra."}, "Zebra!"
        text, _ = self.chat.render((asked, {"role": "assistant", "content": word}), "an example")
        ids, behind = self.encode_rendered(text, [(text.rfind(word) + len(word), len(text))])
        return next((i for i, its in zip(ids, behind, strict=True) if its and i in self.special), self.eot)

    def save(self, folder: str | Path) -> None:
        """Write `files`."""
        Path(folder).mkdir(parents=True, exist_ok=True)
        for name, content in self.files.items():
            (Path(folder) / name).write_bytes(content)


class ListTokenizer(Tokenizer):
    """A list of tokens that comes with the project. Its last one, <|endoftext|>, is its only special token."""

    named, written = dict.fromkeys(NAMED[:3], EOT), re.compile(re.escape(EOT))

    def __init__(self, name: str, tokens: list[str], pieces: list[bytes], config: dict) -> None:
        """tokens: as the saved files spell them. pieces: their bytes. config: for tokenizer_config.json."""
        self.name, self.tokens, self.pieces = name, [*tokens, EOT], [*pieces, EOT.encode()]
        self.vocab = {token: i for i, token in enumerate(self.tokens)}
        self.size, self.eot, self.bos = len(self.tokens), len(tokens), len(tokens)
        self.special = self.stops = frozenset([self.eot])
        config = {"clean_up_tokenization_spaces": False, "bos_token": EOT, "eos_token": EOT, **config}
        self.files = {CONFIG: json.dumps(config, indent=2).encode()}

    def decode(self, ids: list[int]) -> str:
        """An incomplete character (sampling may stop inside one) becomes U+FFFD."""
        return b"".join(self.pieces[i] for i in ids).decode(errors="replace")

    def encode_rendered(self, text: str, spans: Sequence[Span] = ()) -> tuple[list[int], np.ndarray]:
        ids: list[int] = []
        for n, part in enumerate(text.split(EOT)):
            ids += [self.eot] * (n > 0) + self.encode(part.replace(MARK, ""))
        at = np.cumsum([0, *(len(self.pieces[i]) for i in ids)])  # in bytes: a token may end within a character
        spans = [[len(text[:edge].replace(MARK, "").encode()) for edge in span] for span in spans]
        return ids, _overlap(spans, at[:-1], at[1:])


class GPT2Tokenizer(ListTokenizer):
    """GPT-2's 50,257 tokens, from the merges that come with the project."""

    def __init__(self) -> None:
        merges = gzip.decompress(GPT2_MERGES.read_bytes())
        tokens = [*BYTES, *(line.replace(" ", "") for line in merges.decode().splitlines()[1:])]
        pieces = [bytes(map(BYTES.get, token)) for token in tokens]
        config = {"tokenizer_class": "GPT2Tokenizer", "unk_token": EOT, "add_prefix_space": False, "model_max_length": 1024}
        super().__init__("gpt2", tokens, pieces, config)
        self.files |= {"merges.txt": merges, "vocab.json": json.dumps(self.vocab, ensure_ascii=False).encode()}
        ranks = {piece: i for i, piece in enumerate(pieces)}
        self.bpe = tiktoken.Encoding("gpt2", pat_str=GPT2_PATTERN, mergeable_ranks=ranks, special_tokens={EOT: self.eot})

    def encode(self, text: str) -> list[int]:
        return self.bpe.encode_ordinary(text)

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        return self.bpe.encode_ordinary_batch(list(texts), num_threads=os.cpu_count() or 1)

    def fingerprint(self) -> str:
        return _sha256(self.pieces)


class WordTokenizer(ListTokenizer):
    """A word list: `pattern` cuts a text into words, all of which must be in the list.

    In `toy` a token is a word with the space before it, a mark, or a newline; in `toy_math` a keyword, a number or a character.
    """

    def __init__(self, name: str, words: list[str], pattern: str) -> None:
        super().__init__(name, words, [word.encode() for word in words], {"tokenizer_class": "PreTrainedTokenizerFast"})
        self.pattern = pattern
        self.cut = re.compile(pattern + r"|[\s\S]")  # the last alternative catches what the list cannot spell
        flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
        tokenizer = {
            "version": "1.0",
            "added_tokens": [{"id": self.eot, "content": EOT, "special": True, **flags}],
            "pre_tokenizer": {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False},
            "decoder": {"type": "Fuse"},
            # The unknown token is left out of the vocabulary on purpose, so that an unknown word raises there too.
            "model": {"type": "WordLevel", "vocab": self.vocab, "unk_token": "<unknown>"},
        }
        self.files |= {JSON: json.dumps(tokenizer, ensure_ascii=False).encode()}

    def encode(self, text: str) -> list[int]:
        """Raises UserError on a word that is not in the list."""
        try:
            return [self.vocab[token] for token in self.cut.findall(text)]
        except KeyError as e:
            where = f"not in the {self.name} vocabulary, in {text[:60]!r}"
            raise UserError(f"{e.args[0]!r} is {where}: use words of data/{self.name}.py, or the tokenizer gpt2") from None

    def fingerprint(self) -> str:
        return _sha256([*self.pieces, self.pattern.encode()])


class JsonTokenizer(Tokenizer):
    """A model's own tokenizer.json, read by the package tokenizers, and the files that came with it."""

    def __init__(self, name: str, paths: dict[str, Path]) -> None:
        """paths: those of FILES that there are. UserError for what is missing or damaged."""
        try:
            from tokenizers import Tokenizer as Package
        except ImportError:
            raise UserError(f"tokenizer {name}: its {JSON} needs the package tokenizers: pip install tokenizers") from None
        self.name, self.files = name, {file: path.read_bytes() for file, path in paths.items()}
        try:
            self.package = package = Package.from_buffer(self.files[JSON])
            package.no_truncation()
            package.no_padding()
            framed, plain = (package.encode("a", add_special_tokens=framed).ids[:1] for framed in (True, False))
        except Exception as error:  # the package has no class for what is wrong with a file
            raise UserError(f"{paths[JSON]}: damaged, or too new for the package tokenizers ({error}): get both anew") from None
        config, more, generation = (read_json(paths[f]) if f in paths else {} for f in (CONFIG, SPECIAL_MAP, GENERATION))
        config = config if "added_tokens_decoder" in config else config | more  # as in transformers
        named = {key: token.get("content") if isinstance(token := config.get(key), dict) else token for key in NAMED}
        self.named = {key: token for key, token in named.items() if isinstance(token, str)}
        known = {token.content for token in package.get_added_tokens_decoder().values()}
        package.add_special_tokens([token for token in self.named.values() if token not in known])
        self.vocab = package.get_vocab()
        self.size = max(self.vocab.values(), default=-1) + 1
        self.bos, self.eot, self.unknown = (self.vocab.get(self.named.get(key)) for key in NAMED[:3])
        self.start = framed if framed == [self.bos] != plain else []
        ends = generation.get("eos_token_id", [])
        ends = [id for id in [self.eot, *(ends if isinstance(ends, list) else [ends])] if type(id) is int]
        if not ends:
            raise UserError(f"{paths[JSON]}: no token that ends a text: name it as eos_token in {CONFIG} beside it")
        self.eot, self.stops = ends[0], frozenset(ends)

        # A special token in a text is to be read as text, and a real one is written with REAL behind it. The package knows that
        # as a token of its own, with an id that is not used anywhere else.
        package.encode_special_tokens = True
        tokens = {id: token for id, token in package.get_added_tokens_decoder().items() if token.special}
        self.special, texts = frozenset(tokens), sorted((token.content for token in tokens.values()), key=len, reverse=True)
        self.written = re.compile("|".join(map(re.escape, texts)) or "(?!)")
        for token in tokens.values():
            token.content, token.special = token.content + REAL, False
        package.add_tokens(list(tokens.values()))
        self.real_ids = {package.token_to_id(token.content): id for id, token in tokens.items()}
        if (text := _template(paths)) is not None:
            self.chat = Chat(text, self)
        # Llama 2's kind marks a text's beginning as a space. A text behind a prompt is read behind a lead, so without the mark.
        self.leads = {lead: self.encode(lead) for lead in LEADS}
        if self.encode("\na") == [*self.leads["\n"], *self.encode("a")]:
            self.leads = {}

    def encode(self, text: str) -> list[int]:
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        """Half a surrogate pair becomes U+FFFD. UserError for a text in which the package sees a special token all the same."""
        found: list[list[int]] = []
        for at in range(0, len(texts), AT_ONCE):
            part = [text.encode("utf-16", "surrogatepass").decode("utf-16", "replace") for text in texts[at : at + AT_ONCE]]
            try:
                found += [made.ids for made in self.package.encode_batch_fast(part, add_special_tokens=False)]
            except Exception as error:  # a vocabulary without a token for what it does not know
                raise UserError(f"tokenizer {self.name} cannot read a text ({error}): leave that out") from None
        special = self.special - {self.unknown}
        for text, ids in zip(texts, found, strict=True):
            if not special.isdisjoint(ids):
                raise UserError(f"tokenizer {self.name} takes a part of {text!r:.60} for a special token: leave that out")
        return found

    def encode_rendered(self, text: str, spans: Sequence[Span] = ()) -> tuple[list[int], np.ndarray]:
        made = self.package.encode(self.written.sub(rf"\g<0>{REAL}", text).replace(MARK, ""), add_special_tokens=False)
        ends = [found.end() for found in self.written.finditer(text)]
        more, less = len(REAL), len(MARK)
        spans = [[at + more * bisect_right(ends, at) - less * text.count(MARK, 0, at) for at in span] for span in spans]
        ids = [self.real_ids.get(i, i) for i in made.ids]
        return ids, _overlap(spans, *np.array(made.offsets, dtype=np.int64).reshape(-1, 2).T)

    def encode_behind(self, texts: list[str]) -> list[list[int]]:
        if not self.leads:
            return self.encode_batch(texts)
        leads = [LEADS[text.startswith(LEADS[0])] for text in texts]
        found = self.encode_batch([lead + text for lead, text in zip(leads, texts, strict=True)])
        behind = [ids[len(self.leads[lead]) :] for lead, ids in zip(leads, found, strict=True)]
        if any([*self.leads[lead], *own] != ids for lead, own, ids in zip(leads, behind, found, strict=True)):
            raise UserError(f"tokenizer {self.name} joins a completion with what stands before it: use another tokenizer")
        return behind

    def decode(self, ids: list[int]) -> str:
        lead = LEADS[0] if self.leads else ""
        return self.package.decode([*self.leads.get(lead, ()), *ids], skip_special_tokens=False).removeprefix(lead)

    def fingerprint(self) -> str:
        return _sha256([self.files[JSON], repr((self.start, self.eot)).encode()])


KNOWN = {
    "gpt2": GPT2Tokenizer,
    "reviews": functools.partial(WordTokenizer, "reviews", reviews.VOCAB, reviews.PATTERN),
    "toy": functools.partial(WordTokenizer, "toy", toy.VOCAB, TOY_PATTERN),
    "toy_math": functools.partial(WordTokenizer, "toy_math", toy_math.VOCAB, toy_math.PATTERN),
}
_named = functools.cache(lambda name: KNOWN[name]())  # each is made once a process


def get(source: str | Path) -> Tokenizer:
    """The tokenizer of that name ("gpt2", "toy", "toy_math"), or the one of a model's folder, or of the hub's "owner/name".

    That is one of these three if its tokenizer.json or vocab.json holds the same ids, else that of its tokenizer.json.
    """
    if str(source) in KNOWN:
        return _named(str(source))
    folder = Path(source)
    if folder.is_dir():
        paths = {name: folder / name for name in FILES if (folder / name).is_file()}
    elif on_hub(str(source)):
        paths = hub_files(str(source), FILES)
    else:
        raise UserError(f"unknown tokenizer {str(folder)!r}: use one of {', '.join(KNOWN)}, or a saved model's folder")
    if path := paths.get(JSON, paths.get("vocab.json")):
        vocab = _vocab_of(read_json(path))
        for tokenizer in map(_named, KNOWN):
            if vocab == tokenizer.vocab:
                return tokenizer.with_chat(text) if (text := _template(paths)) is not None else tokenizer
    if JSON in paths:
        return JsonTokenizer(str(source), paths)
    hint = f"did you mean {folder / 'model'}?" if (folder / "model").is_dir() else "copy it there, or name a --tokenizer"
    raise UserError(f"{source} has no {JSON}, and no vocab.json of GPT-2: {hint}")


def choose(name: str, init_from: str) -> Tokenizer:
    """The tokenizer `name`; for "auto" that of the model `init_from`, and GPT-2's for GPT-2's names and for scratch."""
    if name != "auto":
        return get(name)
    folder = expand(init_from)
    base = read_json(folder / "adapter_config.json").get("base_model_name_or_path")
    if isinstance(base, str) and not any((folder / file).exists() for file in FILES):  # one without a tokenizer has its base's
        init_from, folder = base, expand(base)
    if init_from.removeprefix("openai-community/") in (*HUB_NAMES, "scratch"):
        return get("gpt2")
    return get(init_from if on_hub(init_from) else folder if folder.is_dir() else "gpt2")


def _template(paths: dict[str, Path]) -> str | None:
    """The chat template among a tokenizer's files."""
    if TEMPLATE in paths:
        return paths[TEMPLATE].read_text(encoding="utf-8")
    found = read_json(paths[CONFIG]).get("chat_template") if CONFIG in paths else None
    if isinstance(found, list):
        found = next((one.get("template") for one in found if isinstance(one, dict) and one.get("name") == "default"), None)
    return found if isinstance(found, str) else None


def _vocab_of(found: dict) -> dict[str, int]:
    """Token -> id of what stands in a vocab.json or a tokenizer.json; nothing where that has no such list."""
    if not isinstance(found.get("model"), dict):
        return found
    try:
        return found["model"]["vocab"] | {token["content"]: token["id"] for token in found.get("added_tokens") or []}
    except (TypeError, KeyError):
        return {}


def _overlap(spans: Sequence[Sequence[int]], starts: np.ndarray, ends: np.ndarray) -> np.ndarray:
    """Which tokens, by where they start and end, have a part of a span in them, (tokens,) bool."""
    found = np.zeros(len(starts), dtype=bool)
    for begin, end in spans:
        found |= (ends > begin) & (starts < end)
    return found


def _sha256(parts: list[bytes]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(len(part).to_bytes(4, "little") + part)  # with its length: no two lists of parts run together
    return digest.hexdigest()
