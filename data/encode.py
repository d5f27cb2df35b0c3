"""Text and conversations -> tokens: `load_encoded` gives a recipe or a file as `Encoded` examples that fit the context."""

import collections
import hashlib
import itertools
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from base.errors import UserError, warn
from base.progress import count
from data import RECIPES, Example, cache, files, load, own
from data.examples import PLAIN


@dataclass(frozen=True, eq=False)
class Encoded:
    """A tokenized example: `prompt` (p,) int32 with p >= 1, and k completions (c_j,) int32 with c_j >= 1.

    targets: which tokens of each completion are to be predicted, (c_j,) bool; the others are read only. None: all of them.
    pairs: in preference data, the completions' numbers (chosen, rejected); else not read, and one is counted.
    """

    prompt: np.ndarray
    completions: list[np.ndarray]
    number: int  # its place in the loaded data: messages and result files name an example by it
    group: int  # examples of one group are alternatives: an epoch may draw only some of them
    label: int | None = None  # the right completion, where the completions are options; of unpaired data, see `own.lend`
    targets: list[np.ndarray] | None = None
    pairs: tuple[tuple[int, int], ...] = PLAIN

    @cached_property
    def row_tokens(self) -> int:
        """Tokens that the example takes in a row: a completion's last token is predicted but never fed."""
        return len(self.prompt) + sum(len(c) - 1 for c in self.completions)

    @cached_property
    def longest(self) -> int:
        """Tokens of prompt + longest completion: the length of a plain sequence, which shares nothing."""
        return len(self.prompt) + max(len(c) for c in self.completions)

    @cached_property
    def completion_tokens(self) -> int:
        """Tokens to predict, over all completions."""
        return sum(map(len, self.completions)) if self.targets is None else sum(int(t.sum()) for t in self.targets)

    @property
    def n_completions(self) -> int:
        return len(self.completions)

    @property
    def n_pairs(self) -> int:
        return len(self.pairs)


GROUPED = 1 << 40  # more than there are examples
CHUNK = 1000  # examples tokenized at once: a token in a Python list takes ten times the memory
# what the cache keeps of an Encoded, beside its tokens
KEPT = ("number", "group", "label", "row_tokens", "completion_tokens", "n_completions", "n_pairs")


def packed(item: Encoded) -> tuple[list[np.ndarray], list[int]]:
    """An example as a record of data/cache.py; `unpacked` makes it again."""
    values = (getattr(item, name) for name in KEPT)
    targets = [wanted.astype(np.int32) for wanted in item.targets or ()]
    parts = [item.prompt, *item.completions, *targets, np.array(item.pairs, np.int32).reshape(-1)]
    return parts, [-1 if value is None else value for value in values]


def unpacked(parts: list[np.ndarray], numbers: list[int]) -> Encoded:
    number, group, label, _, _, k, _ = numbers
    targets = [part.astype(bool) for part in parts[1 + k : -1]] or None
    pairs = tuple(map(tuple, parts[-1].reshape(-1, 2).tolist()))
    return Encoded(parts[0], parts[1 : 1 + k], number, group, None if label < 0 else label, targets, pairs)


def column(items: Sequence[Encoded], name: str) -> Sequence[int]:
    """What one of KEPT is for every item; where they are in the cache, none of them is made for it."""
    if isinstance(items, cache.Records):
        return items.numbers[:, KEPT.index(name)]
    return [getattr(item, name) for item in items]


def places(counts: Sequence[int], numbers: Sequence[int]) -> np.ndarray:
    """Where the completions of the examples `numbers` stand among those of all examples, one behind the other, int64.
    counts: completions of each example."""
    ends = np.cumsum(counts)
    return np.concatenate([np.zeros(0, np.int64), *(np.arange(ends[i] - counts[i], ends[i]) for i in numbers)])


def pair_places(items: Sequence[Encoded]) -> np.ndarray:
    """Where chosen and rejected of every pair stand among the completions of `items`, one behind the other, (pairs, 2)."""
    begins = itertools.accumulate((item.n_completions for item in items), initial=0)
    found = [(begin + w, begin + l) for begin, item in zip(begins, items, strict=False) for w, l in item.pairs]
    return np.array(found, np.int64).reshape(-1, 2)


CUT = "prompts cut from the left"
SAME = "pairs dropped, chosen and rejected being the same tokens"


class Report(collections.Counter):
    """What `encode` did: of what in words, how many. And what looks like a mistake in the texts."""

    marked = glued = 0  # examples with a special token spelled out in a completion; without white space before a completion

    def __str__(self) -> str:
        return ", ".join(count(n, what) for what, n in self.items() if n)

    def look(self, example: Example, tokenizer) -> None:
        """Count what looks like a mistake in an example of texts."""
        prompt, texts = example.prompt, example.completions
        if isinstance(prompt, str) and all(isinstance(text, str) for text in texts):
            self.marked += any(tokenizer.written.search(text) is not None for text in texts)
            # ASCII only: Chinese, for one, does without spaces
            self.glued += any(re.fullmatch(r"[!-~]{2}", prompt[-1:] + text[:1]) is not None for text in texts)

    def doubts(self) -> list[str]:
        """A warning for each thing that looks like a mistake."""
        found, n = [], self["examples"]
        if self.marked:
            said = f"{self.marked:,} of {n:,} examples spell out a special token in a completion, where it is plain text"
            found.append(f"{said}: leave it out; the end-of-text token is added behind each completion")
        if self.glued > n / 2:
            said = f"in {self.glued:,} of {n:,} examples no white space stands between prompt and completion"
            found.append(f"{said}: begin the completions with a space, or end the prompts with a new line")
        return found + [f"{count(self[SAME], SAME)}: look for what made them"] * bool(self[SAME])


def to_ids(texts: list[str | tuple[int, ...]], tokenizer, encode_batch: Callable) -> list[list[int]]:
    """Token ids of texts, by a method of the tokenizer. What is ids already stays as it is: such data need GPT-2's tokenizer,
    else UserError."""
    found = iter(encode_batch([text for text in texts if isinstance(text, str)]))
    if tokenizer.name != "gpt2" and not all(isinstance(text, str) for text in texts):
        raise UserError(f"these data are token ids of gpt2, and the tokenizer is {tokenizer.name}: start from a GPT-2")
    return [next(found) if isinstance(text, str) else list(text) for text in texts]


def tokenize(examples: Iterable[Example], tokenizer, end: bool) -> Iterator[tuple[Example, tuple | None]]:
    """Each example with (prompt ids, completions' ids, targets as in `Encoded`), or with None for a conversation to be dropped.
    CHUNK examples are tokenized at a time."""
    examples = iter(examples)
    while chunk := list(itertools.islice(examples, CHUNK)):
        texts = [e for e in chunk if not e.is_chat]
        prompts = iter(to_ids([e.prompt for e in texts], tokenizer, tokenizer.encode_batch))
        flat = iter(to_ids([c for e in texts for c in e.completions], tokenizer, tokenizer.encode_behind))
        for e in chunk:
            if e.is_chat:
                yield e, tokenize_chat(e, tokenizer)
                continue
            prompt, completions = next(prompts), [next(flat) for _ in e.completions]
            if not all(completions):
                raise UserError(f"{e.source}: an empty completion: every completion needs at least one token")
            if end and isinstance(e.completions[0], str):
                completions = [[*ids, tokenizer.eot] for ids in completions]
            yield e, ([*tokenizer.start, *prompt] if isinstance(e.prompt, str) else prompt, completions, None)


def tokenize_chat(example: Example, tokenizer) -> tuple | None:
    """A conversation as `tokenize` gives it.

    A token with a part of an answer in it belongs to the answer. What ends a turn is always to be predicted, also where the
    template does not mark it as generated: the first special token in or behind the turn, or, at the end, an end-of-text token.
    """
    parts = tokenizer.need_chat(example.source).parts(example)
    if parts is None:
        return None
    found, special = [], tokenizer.special | tokenizer.stops
    for ids, wanted in (tokenizer.encode_rendered(text, spans) for text, spans in parts):
        begins = np.flatnonzero(np.diff(wanted, prepend=False) & wanted).tolist()
        if not begins:
            raise UserError(f"{example.source}: the chat template of {tokenizer.name} writes no answer: give another")
        for begin, behind in zip(begins, [*begins[1:], len(ids)], strict=True):
            end = next((i for i in range(begin, behind) if ids[i] in special), behind)
            wanted[end : end + 1] = True
        if end == len(ids):
            ids, wanted = [*ids, tokenizer.eot], np.append(wanted, True)
        found.append((ids, wanted))
    together = zip(*(ids for ids, _ in found), strict=False)  # what all share may end before the prompt's end
    shared = sum(1 for _ in itertools.takewhile(lambda tokens: len(set(tokens)) == 1, together))
    begin = min(shared, *(int(wanted.argmax()) for _, wanted in found))
    targets = None if example.prompt else [wanted[begin:] for _, wanted in found]
    return found[0][0][:begin], [ids[begin:] for ids, _ in found], targets


def shorten(prompt: list[int], over: int, tokenizer) -> list[int]:
    """A prompt without its first `over` tokens; a beginning-of-text token stays."""
    start = len(tokenizer.start) if prompt[: len(tokenizer.start)] == list(tokenizer.start) else 0
    return prompt[:start] + prompt[start + over :] if over else prompt


def usable(completions: list[list[int]], pairs: Sequence[tuple[int, int]], most: int, report: Report) -> tuple[list, tuple]:
    """An example's pairs that are of different tokens, and of `most` tokens each or fewer, and the completions that they need.
    Counts the other pairs in `report`."""
    differ = [(w, l) for w, l in pairs if completions[w] != completions[l]]
    short = [pair for pair in differ if max(len(completions[i]) for i in pair) <= most]
    report[SAME] += len(pairs) - len(differ)
    report["pairs dropped as too long" if len(pairs) > 1 else "dropped as too long"] += len(differ) - len(short)
    needed = sorted({i for pair in short for i in pair})
    return [completions[i] for i in needed], tuple((needed.index(w), needed.index(l)) for w, l in short)


def encode(examples: list[Example], tokenizer, max_len: int, truncation: str, *, end=True) -> tuple[list[Encoded], Report]:
    """`encoded` as a list, with what it did."""
    report = Report()
    return list(encoded(examples, report, tokenizer, max_len, truncation, end)), report


def encoded(
    examples: Iterable[Example], report: Report, tokenizer, max_len: int, truncation: str, end: bool
) -> Iterator[Encoded]:
    """Tokenize prompts and completions, each on its own, and apply the length policy.

    max_len: most tokens of prompt + one completion. truncation: what to do with longer examples, "drop" them or cut the
    prompt's start ("left"). end: put end-of-text behind each completion that is text.
    Conversations become text by the tokenizer's chat template. An empty prompt becomes one end-of-text token, because the first
    completion token needs a position that predicts it. A pair whose two completions are the same tokens is dropped (`usable`).
    Counts in `report`. Raises UserError for an empty completion, for a completion that fits with no cut, and when no example is
    left.
    """
    first, kept = "", 0
    for number, (example, ids) in enumerate(tokenize(examples, tokenizer, end)):
        first = first or example.source
        report["examples"] += 1
        report.look(example, tokenizer)
        if ids is None:
            report["conversations dropped, which do not begin with what asks for their answer"] += 1
            continue
        prompt, completions, targets = ids
        prompt, pairs = prompt or [tokenizer.eot], PLAIN
        if example.label is None and len(completions) > 1:
            most = max_len - len(prompt) if truncation == "drop" else sys.maxsize
            completions, pairs = usable(completions, example.pairs, most, report)
            if not pairs:
                continue
        longest = max(map(len, completions))
        over = max(0, len(prompt) + longest - max_len)
        if over and truncation == "drop":
            report["dropped as too long"] += 1
            continue
        if over and longest >= max_len:
            raise UserError(
                f"{example.source}: a completion of {longest} tokens does not fit max_len {max_len} even with the "
                "prompt cut to one token: raise max_len, shorten it, or leave such examples out with truncation drop"
            )
        if over:
            report.update({CUT: 1, "tokens cut off them": over})
        arrays = [np.array(ids, dtype=np.int32) for ids in (shorten(prompt, over, tokenizer), *completions)]
        # an example without a group is one of its own: its number is no other's
        group = number if example.group is None else GROUPED + example.group
        kept += 1
        yield Encoded(arrays[0], arrays[1:], number, group, example.label, targets, pairs)
    if not kept:
        raise UserError(
            f"no example is left of {report['examples']}: {report}; max_len is {max_len}, the first is at {first}: "
            "raise max_len (up to the model's context) or set truncation left"
        )


def load_encoded(
    source: str, split: str, view: str, tokenizer, max_len: int, truncation: str, *, data_dir="", limit=0, end=True, **rows
) -> Sequence[Encoded]:
    """`data.load`, then `encode`; prints how many examples and tokens there are, what was dropped or cut, and the first one.

    A file of `cache.SMALL` bytes or more, and a data set of the hub of that size, is tokenized once: its tokens are kept on the
    disk, and what is returned then holds none of them in memory. rows: `columns`, `min_gap`, `half` and `unpaired`, see
    `own.load`.
    """
    report, digest = Report(), hashlib.sha256()
    how = {"max_len": max_len, "truncation": truncation, "end": end}
    paths = [] if source in RECIPES else files(source, split)
    if 0 < limit < CHUNK or sum(path.stat().st_size for path in paths if path.exists()) < cache.SMALL:
        examples = load(source, split, view, data_dir=data_dir, limit=limit, **rows)
        items: Sequence[Encoded] = list(encoded(examples, report, tokenizer, **how))
    else:
        # all that decides the tokens, beside the files and the code of this folder
        chat = tokenizer.chat and tokenizer.chat.decisive()
        rows |= {"view": view, "limit": limit}
        decisive = {"tokenizer": tokenizer.fingerprint(), "chat": chat, **rows, **how}
        items = cache.kept(
            cache.name(paths, decisive),
            lambda: map(packed, hashed(encoded(own.load(paths, **rows), report, tokenizer, **how), digest)),
            lambda: {"report": str(report), "doubts": report.doubts(), "sha256": digest.hexdigest()},
            unpacked,
        )
    for doubt in items.about["doubts"] if isinstance(items, cache.Records) else report.doubts():
        warn(f"data {source}: {doubt}")
    said = report or f"{items.about['report']} (tokens of an earlier start)"
    fed, predicted = (int(np.sum(column(items, name))) for name in ("row_tokens", "completion_tokens"))
    split, _ = rows.get("half") or (split, 0)
    print(f"{split} data {source}: {said}; {fed:,} tokens in rows, {predicted:,} of them to predict")
    plain = view == "preference" and items[0].label is None and items[0].n_completions == 2 and items[0].pairs == PLAIN
    names = ("chosen", "rejected") if plain else itertools.repeat("completion")
    texts = [("prompt", items[0].prompt), *zip(names, items[0].completions, strict=False)]
    print("the first:", ", ".join(f"{name} {tokenizer.decode(ids.tolist())!r:.100}" for name, ids in texts), flush=True)
    return items


def hashed(items: Iterable[Encoded], digest) -> Iterator[Encoded]:
    """The items again, each added to the digest as it passes."""
    first = None
    for item in items:
        first = item.group if first is None else first
        for ids in (item.prompt, *item.completions):
            digest.update(len(ids).to_bytes(4, "little"))
            digest.update(ids.tobytes())
        for wanted in item.targets or ():
            digest.update(wanted.tobytes())
        digest.update(len(item.completions).to_bytes(4, "little"))
        if item.pairs != PLAIN:
            digest.update(np.array(item.pairs, np.int32).tobytes())
        if item.label is not None:
            digest.update(bytes([item.label]))
        digest.update((item.group - first).to_bytes(8, "little", signed=True))
        yield item


def data_hash(items: Sequence[Encoded]) -> str:
    """SHA-256 of the tokenized data in order: two runs with the same hash see the same tokens, after any cutting.

    Reference files and run folders hold this hash, so what goes into it must not change.
    """
    if isinstance(items, cache.Records):
        return items.about["sha256"]
    digest = hashlib.sha256()
    for _ in hashed(items, digest):
        pass
    return digest.hexdigest()
