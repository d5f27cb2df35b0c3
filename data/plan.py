"""Which examples make a step, a row, a forward: integers in, integers out.

A plan names examples by their index in the list of `Encoded`, and nests them like this:

    plan = [                           one optimizer step of 7 examples on 2 ranks, rows of at most 64 tokens
        [ [[3], [0, 5]], [[1]] ],      rank 0: two forwards; the first has two rows, the second row holds examples 0 and 5
        [ [[2, 6, 4]],   []    ],      rank 1: one forward with one row of three examples, then an empty one
    ]
    plan[rank][micro-batch][row][example]

Which examples a step takes depends on the seed and the step's number alone. How they are laid out in rows, forwards and
ranks depends on lengths and settings, and must not change any loss (dropout apart: its random numbers follow the layout).
"""

from collections.abc import Sequence
from dataclasses import KW_ONLY, InitVar, dataclass
from functools import lru_cache

import numpy as np

from base.errors import UserError
from base.progress import count
from data.batch import padded
from data.encode import Encoded, column

Rows = list[list[int]]  # a micro-batch: rows of examples
# Padded positions that cost less than one more forward (and so one more pass over all gradients), about: measured for GPT-2
# 124M on 2 CPU cores. On a GPU a micro-batch is one row, see runtime.distributed.Compute.row_multiple
SPARE_PADDING = 64


def epoch_order(groups: Sequence[int], seed: int, epoch: int, per_group: int = 0, shuffle: bool = True) -> np.ndarray:
    """The examples of one epoch in the order of training, (examples,) int64.

    per_group: above 0, draw that many examples of every group, anew each epoch. shuffle: without it the data's own order
    stays, and the first examples of a group are drawn.
    """
    n = len(groups)
    order = np.random.default_rng([seed, epoch]).permutation(n) if shuffle else np.arange(n)
    if not per_group:
        return order
    drawn = np.asarray(groups)[order]
    by_group = np.argsort(drawn, kind="stable")  # places in `order`, one group behind the other, each in the order's order
    drawn = drawn[by_group]
    place = np.arange(n) - np.searchsorted(drawn, drawn)  # within its group, from 0
    return order[np.sort(by_group[place < per_group])]


def pack(step: list[int], lengths: list[int], row_len: int) -> Rows:
    """Examples into rows, the longest row first.

    row_len 0: one example a row. Above 0: rows of at most `row_len` tokens by first-fit-decreasing, that is, each example,
    longest first, goes to the first row with room for it. A longer example gets a row of its own.
    """
    by_length = sorted(step, key=lambda i: (-lengths[i], i))
    if row_len == 0:
        return [[i] for i in by_length]
    rows: Rows = []
    room = np.full(len(step), row_len)
    for i in by_length:
        # the first row with room, among them one that is not begun: there a longer example fits, too
        r = int((room[: len(rows) + 1] >= min(lengths[i], row_len)).argmax())
        if r == len(rows):
            rows.append([])
        rows[r].append(i)
        room[r] -= lengths[i]
    return sorted(rows, key=lambda row: -sum(lengths[i] for i in row))


def micro_batches(
    rows: Rows, lengths: list[int], micro_tokens: int, spare_padding: int = SPARE_PADDING, row_multiple: int = 1
) -> list[Rows]:
    """Rows, longest first, into micro-batches of at most `micro_tokens` positions, padding counted, but at least one row.

    A row's length is rounded up to a `row_multiple`. A micro-batch also ends where its padding would pass `spare_padding`
    positions: then another forward costs less.
    """
    out: list[Rows] = []
    width = padding = 0
    for row in rows:
        tokens = padded(sum(lengths[i] for i in row), row_multiple)
        padding += width - tokens
        if not out or (len(out[-1]) + 1) * width > micro_tokens or padding > spare_padding:
            out.append([])
            width, padding = tokens, 0
        out[-1].append(row)
    return out


@dataclass
class BatchPlan:
    """The steps of a run, numbered from 0 through all epochs: `plan[step]` is [rank][micro-batch][row][example].

    An example's pairs stay in one step: that into which its last pair falls, where the epoch's pairs are counted off
    `batch_size` at a time. So with m pairs an example a step has between batch_size - m + 1 and batch_size + m - 1 of them, and
    an epoch as many steps as with all pairs apart. UserError where an example has more than `batch_size` pairs.
    """

    items: InitVar[list[Encoded]]
    batch_size: int  # examples (of preference data: pairs) a step, over all ranks
    seed: int
    _: KW_ONLY
    row_len: int = 0
    micro_tokens: int = 4096
    row_multiple: int = 1
    world: int = 1
    per_group: int = 0
    shuffle: bool = True

    def __post_init__(self, items: list[Encoded]):
        self.lengths, self.groups = column(items, "row_tokens"), column(items, "group")
        self.pairs = np.array(column(items, "n_pairs"))
        if (most := self.pairs.max()) > self.batch_size:
            number = column(items, "number")[self.pairs.argmax()]
            raise UserError(
                f"key batch_size: {self.batch_size} is less than the {most} pairs of example {number} (from 0), "
                f"which stay in one step: make it {most} or more"
            )
        self.epoch = lru_cache(maxsize=1)(self.epoch)
        self.epoch_size = int(self.epoch(0)[1][-1])
        self.steps_per_epoch = -(-self.epoch_size // self.batch_size)

    def epoch(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """The examples of an epoch in their order, and how many pairs there are up to the end of each."""
        order = epoch_order(self.groups, self.seed, epoch, self.per_group, self.shuffle)
        return order, self.pairs[order].cumsum()

    def examples(self, step: int) -> list[int]:
        """The examples of a step, over all ranks."""
        epoch, at = divmod(step, self.steps_per_epoch)
        order, ends = self.epoch(epoch)
        begin, end = np.searchsorted(ends, (at * self.batch_size, (at + 1) * self.batch_size), side="right")
        return order[begin:end].tolist()

    def __getitem__(self, step: int) -> list[list[Rows]]:
        """Rows go, longest first, to the rank with the fewest positions. Ranks with fewer micro-batches get empty ones at the
        end, so that all ranks run the same number of forwards."""
        shares: list[Rows] = [[] for _ in range(self.world)]
        positions = [0] * self.world
        for row in pack(self.examples(step), self.lengths, self.row_len):
            rank = positions.index(min(positions))
            shares[rank].append(row)
            positions[rank] += padded(sum(self.lengths[i] for i in row), self.row_multiple)
        ranks = [micro_batches(rows, self.lengths, self.micro_tokens, row_multiple=self.row_multiple) for rows in shares]
        most = max(map(len, ranks))
        return [micros + [[]] * (most - len(micros)) for micros in ranks]


def plan_once(items: list[Encoded], micro_tokens: int, row_multiple: int = 1, world: int = 1) -> list[list[Rows]]:
    """Every example once, longest row first: [rank][micro-batch][row][example]. For validation, the reference pass and
    scoring. One example a row, or, where rows are rounded up, rows of `row_multiple` tokens.

    The micro-batches are the same for every `world`. Ranks take them in turns; a rank that gets one less has an empty one.
    """
    lengths = column(items, "row_tokens")
    rows = pack(list(range(len(items))), lengths, row_multiple if row_multiple > 1 else 0)
    micros = micro_batches(rows, lengths, micro_tokens, row_multiple=row_multiple)
    micros += [[]] * (-len(micros) % world)
    return [micros[rank::world] for rank in range(world)]


def describe(plan: BatchPlan, items: list[Encoded], most: int = 200) -> str:
    """What the layout costs, counted on the first epoch's first `most` steps: tokens, padding, forwards, and the positions
    that plain sequences (prompts not shared, each step padded to its longest) would take."""
    steps = range(min(plan.steps_per_epoch, most))
    planned = [plan[step] for step in steps]
    micros = [rows for ranks in planned for micros in ranks for rows in micros if rows]
    widths = [[sum(plan.lengths[i] for i in row) for row in rows] for rows in micros]
    fed, positions = sum(map(sum, widths)), sum(padded(max(row), plan.row_multiple) * len(row) for row in widths)
    chosen = [[items[i] for i in plan.examples(step)] for step in steps]
    plain = sum(max(i.longest for i in step) * sum(len(i.completions) for i in step) for step in chosen)
    n_rows, forwards = sum(map(len, micros)), sum(len(ranks[0]) for ranks in planned)
    epoch = count(plan.steps_per_epoch, "steps")
    return (
        f"{f'the first {most} of ' if len(steps) == most else ''}{epoch} of an epoch, {plan.batch_size} examples each: "
        f"{fed:,} tokens in {positions:,} positions "
        f"({100 * (1 - fed / positions):.1f}% padding); "
        f"padded and unshared they would be {plain:,} ({plain / positions:.2f}x)\n"
        f"a step: {fed / len(steps):,.0f} tokens in {n_rows / len(steps):.1f} rows, {forwards / len(steps):.1f} forwards a rank"
    )
