"""Tokens into rows, rows into micro-batches, micro-batches into tensors.

Which examples make up an optimizer step depends on seed and step alone; how they are laid out in rows and spread over
forwards and ranks depends on lengths and settings, and must not change any loss.
"""

import hashlib
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from base.errors import UserError
from data import Example, load

PADDING = -1  # the example number of padded positions


@dataclass(frozen=True, eq=False)
class Encoded:
    """A tokenized example: `prompt` (p,) int32 with p >= 1, and k completions (c_j,) int32 with c_j >= 1."""

    prompt: np.ndarray
    completions: list[np.ndarray]
    number: int  # place in the loaded data, for messages and for whoever wants to find it again
    group: int  # examples of one group are alternatives: an epoch draws some of them
    label: int | None = None

    @cached_property
    def row_tokens(self) -> int:
        """Tokens that the example takes in a row: a completion's last token is predicted but never fed."""
        return len(self.prompt) + sum(len(c) - 1 for c in self.completions)

    @cached_property
    def longest(self) -> int:
        """Tokens of prompt + longest completion: what a plain, padded sequence of it would take."""
        return len(self.prompt) + max(len(c) for c in self.completions)

    @cached_property
    def completion_tokens(self) -> int:
        return sum(len(c) for c in self.completions)


@dataclass
class LengthReport:
    """What the length policy did to a data set."""

    examples: int = 0
    dropped: int = 0
    cut: int = 0
    cut_tokens: int = 0
    identical: int = 0

    def __str__(self) -> str:
        parts = [f"{self.examples:,} examples"]
        if self.dropped:
            parts.append(f"{self.dropped:,} dropped as too long")
        if self.cut:
            parts.append(f"{self.cut:,} prompts cut from the left by {self.cut_tokens:,} tokens in all")
        if self.identical:
            parts.append(f"{self.identical:,} pairs dropped, chosen and rejected being the same tokens")
        return ", ".join(parts)


def to_ids(texts: list[str | tuple[int, ...]], tokenizer) -> list[list[int]]:
    """Token ids of texts; a text that is ids already stays as it is. Raises UserError for such with another tokenizer."""
    found = iter(tokenizer.encode_batch([text for text in texts if isinstance(text, str)]))
    if tokenizer.name != "gpt2" and not all(isinstance(text, str) for text in texts):
        raise UserError(f"these data are token ids of gpt2, and the tokenizer is {tokenizer.name}: start from a GPT-2")
    return [next(found) if isinstance(text, str) else list(text) for text in texts]


def encode(
    examples: list[Example], tokenizer, max_len: int, truncation: str, *, end: bool = True
) -> tuple[list[Encoded], LengthReport]:
    """Tokenize prompt and completions apart (what is ids already stays as it is) and apply the length policy.

    An empty prompt becomes one end-of-text token, so that there is a position that predicts; `end` closes each completion
    with end-of-text. `max_len` bounds prompt + one completion in tokens; `truncation` is "drop" (leave such an example out)
    or "left" (cut the prompt's start). Raises UserError for an empty completion, for one that no cut can make fit, and when
    nothing is left.
    """
    prompts = to_ids([e.prompt for e in examples], tokenizer)
    flat = iter(to_ids([c for e in examples for c in e.completions], tokenizer))
    kept, report = [], LengthReport(examples=len(examples))
    eot = [tokenizer.eot]
    for number, (example, prompt) in enumerate(zip(examples, prompts, strict=True)):
        completions = [next(flat) + (eot if end and isinstance(c, str) else []) for c in example.completions]
        if any(len(c) <= (end and isinstance(text, str)) for c, text in zip(completions, example.completions, strict=True)):
            raise UserError(f"{example.source}: an empty completion: every completion needs at least one token")
        prompt = prompt or eot
        longest = max(len(c) for c in completions)
        over = len(prompt) + longest - max_len
        if example.label is None and len(completions) == 2 and completions[0] == completions[1]:
            report.identical += 1
            continue
        if over > 0 and truncation == "drop":
            report.dropped += 1
            continue
        if over > 0:
            if longest >= max_len:
                raise UserError(
                    f"{example.source}: a completion of {longest} tokens does not fit max_len {max_len} even with the "
                    "prompt cut to one token: raise max_len, shorten it, or leave such examples out with truncation drop"
                )
            prompt = prompt[over:]
            report.cut += 1
            report.cut_tokens += over
        kept.append(
            Encoded(
                np.array(prompt, dtype=np.int32),
                [np.array(c, dtype=np.int32) for c in completions],
                number,
                number if example.group is None else example.group,
                example.label,
            )
        )
    if not kept:
        raise UserError(
            f"no example is left of {len(examples)}: {report}; max_len is {max_len}, the first is at {examples[0].source}: "
            "raise max_len (up to the model's context) or set truncation left"
        )
    return kept, report


def load_encoded(
    source: str, split: str, view: str, tokenizer, max_len: int, truncation: str, *, data_dir="", limit=0, end=True
) -> list[Encoded]:
    """Load, tokenize, apply the length policy and print what it did."""
    examples = load(source, split, view, data_dir=data_dir, limit=limit)
    items, report = encode(examples, tokenizer, max_len, truncation, end=end)
    fed, predicted = sum(i.row_tokens for i in items), sum(i.completion_tokens for i in items)
    print(f"{split} data {source}: {report}; {fed:,} tokens in rows, {predicted:,} of them to predict", flush=True)
    return items


def data_hash(items: list[Encoded]) -> str:
    """SHA-256 of the tokenized data in order: two runs with the same hash see the same tokens, after any cutting."""
    digest = hashlib.sha256()
    for item in items:
        for ids in (item.prompt, *item.completions):
            digest.update(len(ids).to_bytes(4, "little"))
            digest.update(ids.tobytes())
        digest.update(
            len(item.completions).to_bytes(4, "little") + (item.group - items[0].group).to_bytes(8, "little", signed=True)
        )
    return digest.hexdigest()


# --- the plan: integers in, integers out --------------------------------------------------------------------------------


def epoch_order(groups: list[int], seed: int, epoch: int, per_group: int = 0, shuffle: bool = True) -> list[int]:
    """The examples of one epoch in the order of training. `per_group` > 0 draws that many of every group, anew each epoch;
    without `shuffle` the data's own order stays (and its first ones of a group are drawn)."""
    rng = np.random.default_rng([seed, epoch])
    order = rng.permutation(len(groups)).tolist() if shuffle else list(range(len(groups)))
    if per_group > 0:
        seen: dict[int, int] = {}
        drawn = []
        for i in order:
            seen[groups[i]] = seen.get(groups[i], 0) + 1
            if seen[groups[i]] <= per_group:
                drawn.append(i)
        order = drawn
    return order


def pack(step: list[int], lengths: list[int], row_len: int) -> list[list[int]]:
    """Examples into rows. row_len 0: one a row; else first-fit-decreasing into rows of `row_len` tokens (a longer example
    gets a row of its own). Rows come longest first."""
    by_length = sorted(step, key=lambda i: (-lengths[i], i))
    if row_len == 0:
        return [[i] for i in by_length]
    rows: list[list[int]] = []
    room: list[int] = []
    for i in by_length:
        r = next((r for r, free in enumerate(room) if free >= lengths[i]), None)
        if r is None:
            rows.append([i])
            room.append(row_len - lengths[i])
        else:
            rows[r].append(i)
            room[r] -= lengths[i]
    return sorted(rows, key=lambda row: -sum(lengths[i] for i in row))


def micro_batches(rows: list[list[int]], lengths: list[int], micro_tokens: int, spare_padding: int) -> list[list[list[int]]]:
    """Rows, longest first, into micro-batches of at most `micro_tokens` positions, padding counted (one row at the least).

    A micro-batch ends where its padding would pass `spare_padding` positions: what another forward costs.
    """
    out: list[list[list[int]]] = []
    width = padding = 0
    for row in rows:
        tokens = sum(lengths[i] for i in row)
        padding += width - tokens
        if not out or (len(out[-1]) + 1) * width > micro_tokens or padding > spare_padding:
            out.append([])
            width, padding = tokens, 0
        out[-1].append(row)
    return out


def plan_step(
    step: list[int], lengths: list[int], row_len: int, micro_tokens: int, spare_padding: int, world: int = 1
) -> list[list[list[list[int]]]]:
    """One optimizer step for every rank: [rank][micro-batch][row][example].

    Rows go, longest first, to the rank with the fewest tokens; ranks with fewer micro-batches get empty ones at the end, so
    that all of them run the same number of forwards.
    """
    shares: list[list[list[int]]] = [[] for _ in range(world)]
    load = [0] * world
    for row in pack(step, lengths, row_len):
        rank = load.index(min(load))
        shares[rank].append(row)
        load[rank] += sum(lengths[i] for i in row)
    ranks = [micro_batches(rows, lengths, micro_tokens, spare_padding) for rows in shares]
    most = max(len(r) for r in ranks)
    return [r + [[] for _ in range(most - len(r))] for r in ranks]


class BatchPlan:
    """Which examples each optimizer step takes: a pure function of lengths, batch size, seed, epoch and world size.

    `plan[step]` gives [rank][micro-batch][row][example] for the global step number; epochs follow each other.
    """

    def __init__(
        self,
        items: list[Encoded],
        batch_size: int,
        seed: int,
        *,
        row_len: int = 0,
        micro_tokens: int = 4096,
        spare_padding: int = 64,
        world: int = 1,
        per_group: int = 0,
        shuffle: bool = True,
    ):
        self.lengths = [item.row_tokens for item in items]
        self.groups = [item.group for item in items]
        self.batch_size, self.seed, self.per_group, self.shuffle = batch_size, seed, per_group, shuffle
        self.row_len, self.micro_tokens, self.spare_padding, self.world = row_len, micro_tokens, spare_padding, world
        self._epoch = (-1, [])
        self.examples_per_epoch = len(self.order(0))
        self.steps_per_epoch = -(-self.examples_per_epoch // batch_size)

    def order(self, epoch: int) -> list[int]:
        if self._epoch[0] != epoch:
            self._epoch = (epoch, epoch_order(self.groups, self.seed, epoch, self.per_group, self.shuffle))
        return self._epoch[1]

    def examples(self, step: int) -> list[int]:
        """The examples of a global step, over all ranks."""
        epoch, at = divmod(step, self.steps_per_epoch)
        return self.order(epoch)[at * self.batch_size : (at + 1) * self.batch_size]

    def __getitem__(self, step: int) -> list[list[list[list[int]]]]:
        return plan_step(self.examples(step), self.lengths, self.row_len, self.micro_tokens, self.spare_padding, self.world)


def plan_once(items: list[Encoded], micro_tokens: int, spare_padding: int = 64, world: int = 1) -> list[list[list[list[int]]]]:
    """Every example once, longest first, rows of like length together: [rank][micro-batch][row][one example]. For validation,
    the reference pass and scoring.

    Micro-batches are the same for every `world`; ranks take them in turns, and those that get one less an empty one.
    """
    lengths = [item.row_tokens for item in items]
    micros = micro_batches(pack(list(range(len(items))), lengths, 0), lengths, micro_tokens, spare_padding)
    micros += [[]] * (-len(micros) % world)
    return [micros[rank::world] for rank in range(world)]


def describe(plan: BatchPlan, items: list[Encoded], most: int = 200) -> str:
    """What the layout costs, from the first epoch (its first `most` steps): tokens, padding, and the unshared alternative."""
    fed = positions = padded = n_rows = forwards = 0
    steps = range(min(plan.steps_per_epoch, most))
    for step in steps:
        ranks = plan[step]
        forwards += len(ranks[0])
        for rows in (rows for rank in ranks for rows in rank if rows):
            widths = [sum(plan.lengths[i] for i in row) for row in rows]
            n_rows += len(rows)
            fed += sum(widths)
            positions += max(widths) * len(rows)
        chosen = [items[i] for i in plan.examples(step)]
        padded += max(i.longest for i in chosen) * sum(len(i.completions) for i in chosen)
    share = 100 * (1 - fed / positions)
    return (
        f"{len(steps)} steps of {plan.batch_size}: {fed:,} tokens in {positions:,} positions ({share:.1f}% padding); "
        f"padded and unshared they would be {padded:,} ({padded / positions:.2f}x)\n"
        f"a step: {fed / len(steps):,.0f} tokens in {n_rows / len(steps):.1f} rows, {forwards / len(steps):.1f} forwards a rank"
    )


# --- tensors ------------------------------------------------------------------------------------------------------------


@dataclass
class Batch:
    """Rows as tensors. The first four are (rows, row_len), the next three (completion tokens,), all int64.

    tokens; positions (0.. on each branch, going on from the prompt's end); example (a number within the row, -1 = padding);
    branch (0 = prompt, 1..k); source (flat position in rows * row_len that predicts); target (token predicted there);
    completion (number of the completion, 0..n_completions - 1, in the order of `items` and their completions).
    """

    tokens: Tensor
    positions: Tensor
    example: Tensor
    branch: Tensor
    source: Tensor
    target: Tensor
    completion: Tensor
    n_completions: int
    plain: bool  # one example with one completion a row: causal attention is all it needs
    items: list[Encoded]

    def to(self, device: torch.device) -> "Batch":
        names = ("tokens", "positions", "example", "branch", "source", "target", "completion")
        moved = {n: getattr(self, n).to(device, non_blocking=True) for n in names}
        return Batch(**moved, n_completions=self.n_completions, plain=self.plain, items=self.items)

    @property
    def completion_lengths(self) -> Tensor:
        """Tokens in each completion, (n_completions,)."""
        return torch.bincount(self.completion, minlength=self.n_completions)


def collate(rows: list[list[Encoded]], multiple: int = 1) -> Batch:
    """Rows of examples -> Batch, padded on the right to the longest row, rounded up to a `multiple`.

    No rows: a row of padding without completions, for a rank that has to run the forward of a sharded model with the others.
    """
    width = max((sum(item.row_tokens for item in row) for row in rows), default=1)
    width = -(-width // multiple) * multiple
    rows = rows or [[]]
    tokens, positions, branch = (np.zeros((len(rows), width), dtype=np.int64) for _ in range(3))
    example = np.full((len(rows), width), PADDING, dtype=np.int64)
    none = np.zeros(0, dtype=np.int64)
    source, target, completion = [none], [none], [none]
    items = []
    n = 0
    for r, row in enumerate(rows):
        at = 0
        for e, item in enumerate(row):
            p = len(item.prompt)
            tokens[r, at : at + p] = item.prompt
            positions[r, at : at + p] = np.arange(p)
            example[r, at : at + item.row_tokens] = e
            last = r * width + at + p - 1
            at += p
            for b, ids in enumerate(item.completions, start=1):
                fed = len(ids) - 1
                tokens[r, at : at + fed] = ids[:-1]
                positions[r, at : at + fed] = np.arange(p, p + fed)
                branch[r, at : at + fed] = b
                source.append([last])
                source.append(np.arange(r * width + at, r * width + at + fed))
                target.append(ids)
                completion.append(np.full(len(ids), n))
                at += fed
                n += 1
            items.append(item)
    plain = all(len(row) <= 1 and all(len(item.completions) == 1 for item in row) for row in rows)
    arrays = (tokens, positions, example, branch, np.concatenate(source), np.concatenate(target), np.concatenate(completion))
    return Batch(*(torch.from_numpy(np.asarray(a, dtype=np.int64)) for a in arrays), n_completions=n, plain=plain, items=items)
