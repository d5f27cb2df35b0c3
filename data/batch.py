"""Rows of examples -> tensors. One row, a prompt `a b` with the completions `c d e` and `f g`:

    tokens      a  b  c  d  f       a completion's last token is not fed
    branch      0  0  1  1  2       0 = prompt
    positions   0  1  2  3  2       each branch goes on from the prompt's end
    predicts       c  d  e  g       `b` predicts the first token of both branches: `c` and `f`

A completion may have tokens that are fed but not predicted (`Encoded.targets`): the user's turns in a conversation.
A row may hold several such examples, one behind the other; tokens of different examples do not see each other.

The attention rule as a list of sequences, for a GPU (logprobs.Sequences). A sequence's queries stand side by side in the row
and are the last of its keys; the keys before them are the prompt's:

    queries     a b c d   f
    keys        a b c d   a b f       the first completion is read with its prompt, each other one behind a copy of it
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

import numpy as np
import torch
from torch import Tensor

from data.encode import Encoded, column, pair_places

PADDING = -1  # the example number of padded positions
LENGTHS = 16  # different numbers of predicted tokens that rows of one shape may have


@dataclass
class Batch:
    """Rows as tensors, all int64 but `desirable`. The first four are (rows, row_len), the next three
    (completion tokens,), `keys` (n_keys,), `ends` (2, sequences + 1).

    tokens; positions (0.. on each branch, going on from the prompt's end); example (a number within the row, -1 = padding);
    branch (0 = prompt, 1..k); source (flat position in rows * row_len that predicts); target (token predicted there);
    completion (number of the completion, 0..n_completions - 1, in the order of `items` and their completions). Where `collate`
    rounds up, padding stands behind `source` and `target`: what the model makes of it is cut off to the length of `completion`.
    keys (flat positions of all sequences' keys, one sequence behind the other); ends (where each sequence's queries end, and
    its keys, with a 0 in front). `longest` is the most keys of a sequence.
    """

    tokens: Tensor
    positions: Tensor
    example: Tensor
    branch: Tensor
    source: Tensor
    target: Tensor
    completion: Tensor
    keys: Tensor
    ends: Tensor
    pairs: Tensor  # (pairs, 2): numbers of the chosen and the rejected completion
    lengths: Tensor  # (n_completions,): their tokens
    desirable: Tensor  # (pairs,) bool: of unpaired data the label, else True
    longest: int
    n_completions: int
    plain: bool  # at most one example a row, with one completion: then causal attention is enough
    items: list[Encoded]
    at: Tensor | None = None  # (n_completions,): where they stand among those of all items that `batches` was given

    def to(self, device: torch.device) -> "Batch":
        tensors = {n: v for n, v in vars(self).items() if isinstance(v, Tensor)}
        return replace(self, **dict(zip(tensors, moved(list(tensors.values()), device), strict=True)))


def moved(tensors: list[Tensor], device: torch.device) -> list[Tensor]:
    """Tensors on the device. To CUDA they travel in one pinned buffer, for which the host does not wait."""
    if device.type == "cpu":
        return tensors
    there = torch.cat([t.flatten() for t in tensors]).pin_memory().to(device, non_blocking=True)
    parts = there.split([t.numel() for t in tensors])
    return [part.view(t.shape).to(t.dtype) for part, t in zip(parts, tensors, strict=True)]


def pair_tensors(items: list[Encoded]) -> tuple[Tensor, Tensor, Tensor]:
    """`pairs`, `lengths` and `desirable` of a Batch of these items."""
    lengths = torch.tensor([len(c) for item in items for c in item.completions]).long()
    desirable = torch.tensor([item.label != 0 for item in items for _ in item.pairs], dtype=torch.bool)
    return torch.from_numpy(pair_places(items)), lengths, desirable


def padded(n: int, multiple: int) -> int:
    """n, rounded up to a multiple."""
    return -(-n // multiple) * multiple


def collate(rows: list[list[Encoded]], multiple: int = 1) -> Batch:
    """Rows of examples -> Batch, padded on the right to the longest row, rounded up to a `multiple`. Then the number of
    predicted tokens is rounded up, too, to one of `LENGTHS` parts of the positions, so that a device sees few shapes.

    No rows: one row of padding without completions. A rank that has no work left runs it, because the forward of a sharded
    model needs all ranks.
    """
    width = padded(max((sum(item.row_tokens for item in row) for row in rows), default=1), multiple)
    rows = rows or [[]]
    tokens, positions, branch, example = np.zeros((4, len(rows), width), dtype=np.int64)
    example[:] = PADDING
    source, target, completion = [], [], []  # a list of arrays each, joined at the end
    queries, keys = [], []  # an array of flat positions a sequence
    for r, row in enumerate(rows):
        places = np.arange(r * width, (r + 1) * width)
        at = 0
        for e, item in enumerate(row):
            p = len(item.prompt)
            prompt = places[at : at + p]
            for b, ids in enumerate([item.prompt, *item.completions]):
                fed = ids[:-1] if b else ids
                here, begin = slice(at, at + len(fed)), p if b else 0
                own = places[here]
                tokens[r, here], branch[r, here], example[r, here] = fed, b, e
                positions[r, here] = np.arange(begin, begin + len(fed))
                if b:
                    wanted = np.ones(len(ids), bool) if item.targets is None else item.targets[b - 1]
                    source.append(np.append(prompt[-1], own)[wanted])
                    completion.append(np.full(wanted.sum(), len(target)))
                    target.append(ids[wanted])
                if b == 1:
                    queries[-1] = keys[-1] = np.append(prompt, own)
                elif len(own):
                    queries.append(own), keys.append(np.append(prompt, own) if b else own)
                at = here.stop
        if at < width:  # padding, as an example of its own
            queries.append(places[at:]), keys.append(places[at:])
    n = len(target)
    plain = all(len(row) <= 1 and all(len(item.completions) == 1 for item in row) for row in rows)
    joined = [np.concatenate([np.zeros(0, np.int64), *parts], dtype=np.int64) for parts in (source, target, completion, keys)]
    if multiple > 1:
        predicted = len(joined[0])
        more = padded(max(predicted, 1), max(tokens.size // LENGTHS, 1)) - predicted
        joined[:2] = (np.pad(a, (0, more)) for a in joined[:2])
    ends = np.cumsum([[0, *map(len, parts)] for parts in (queries, keys)], axis=1)
    arrays = map(torch.from_numpy, (tokens, positions, example, branch, *joined, ends))
    items = [item for row in rows for item in row]
    return Batch(*arrays, *pair_tensors(items), max(map(len, keys)), n, plain, items)


def batches(items: Sequence[Encoded], micros: list[list[list[int]]], multiple: int = 1) -> Iterator[Batch]:
    """A Batch for each micro-batch of [micro-batch][row][item]."""
    begin = [0, *accumulate(column(items, "n_completions"))]
    for rows in micros:
        batch = collate([[items[i] for i in row] for row in rows], multiple)
        at = [n for row in rows for i in row for n in range(begin[i], begin[i + 1])]
        yield replace(batch, at=torch.tensor(at, dtype=torch.int64))
