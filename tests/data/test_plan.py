"""The batch plan as a function of numbers, and tokenization with its length policy."""

import itertools
from collections import Counter

import numpy as np
import pytest

from base.errors import UserError
from data import Example
from data.batch import collate
from data.encode import Encoded, data_hash, encode
from data.plan import BatchPlan, describe, epoch_order, micro_batches, pack, plan_once
from data.tokenizer import get


def items_of(lengths: list[int]) -> list[Encoded]:
    return [Encoded(np.zeros(n, np.int32), [np.zeros(1, np.int32)], i, i) for i, n in enumerate(lengths)]


def flat(step) -> list[int]:
    return sorted(i for rank in step for micro in rank for row in micro for i in row)


def test_a_step_depends_on_seed_and_number_alone():
    items = items_of(np.random.default_rng(0).integers(5, 60, 50).tolist())
    plans = [
        BatchPlan(items, 8, 3, row_len=row_len, micro_tokens=micro, world=world)
        for row_len, micro, world in [(0, 4096, 1), (0, 100, 2), (64, 128, 4), (128, 1, 3)]
    ]
    for step in range(14):  # two epochs of seven steps
        assert all(flat(plan[step]) == sorted(plans[0].examples(step)) for plan in plans)
    epoch = [i for step in range(7) for i in plans[0].examples(step)]
    assert sorted(epoch) == list(range(50)) and plans[0].steps_per_epoch == 7
    assert epoch != [i for step in range(7, 14) for i in plans[0].examples(step)], "the second epoch has another order"
    assert epoch != epoch_order(list(range(50)), 4, 0).tolist(), "another seed has another order"


def items_of_pairs(counts: list[int]) -> list[Encoded]:
    """Examples of so many pairs each (which need not be possible: the plan only counts them)."""
    ids = np.zeros(2, np.int32)
    return [Encoded(ids, [ids] * 4, i, i, pairs=((0, 1),) * n) for i, n in enumerate(counts)]


def test_a_step_counts_pairs_and_keeps_an_examples_pairs_together():
    counts = np.random.default_rng(5).integers(1, 7, 100).tolist()
    plan = BatchPlan(items_of_pairs(counts), 10, 0, row_len=64, world=2)
    total, n = sum(counts), plan.steps_per_epoch
    assert plan.epoch_size == total and n == -(-total // 10), "as many steps as with the pairs apart"
    for first in (0, n):
        steps = [plan.examples(step) for step in range(first, first + n)]
        assert sorted(i for step in steps for i in step) == list(range(100)), "an epoch has every example once"
        sizes = [sum(counts[i] for i in step) for step in steps]
        assert all(5 <= size <= 15 for size in sizes[:-1]) and 1 <= sizes[-1] <= 15 and len(set(sizes)) > 1
        done = np.cumsum(sizes)
        assert all(10 * k - 5 <= d <= 10 * k for k, d in enumerate(done[:-1], start=1)), "no step's rest is carried on for long"
    six = BatchPlan(items_of_pairs([6] * 20), 12, 0)
    assert [len(six.examples(step)) for step in range(10)] == [2] * 10, "where it comes out even, every step is full"
    three = BatchPlan(items_of_pairs([3] * 20), 4, 0)
    assert [3 * len(three.examples(step)) for step in range(4)] == [3, 3, 6, 3]
    with pytest.raises(UserError, match=r"key batch_size: 5 is less than the 6 pairs of example 2 \(from 0\)"):
        BatchPlan(items_of_pairs([1, 5, 6, 6]), 5, 0)


def test_every_rank_gets_as_many_forwards_and_a_fair_share():
    lengths = np.random.default_rng(1).integers(5, 60, 33).tolist()
    step = BatchPlan(items_of(lengths), 33, 0, micro_tokens=128, world=4)[0]
    assert len({len(rank) for rank in step}) == 1
    loads = [sum(lengths[i] for i in flat([rank])) for rank in step]
    assert max(loads) - min(loads) <= 60
    assert BatchPlan(items_of([5]), 1, 0, world=2)[0] == [[[[0]]], [[]]], "a rank without work has an empty forward"


def test_packing_fills_rows_and_never_overfills():
    lengths = [*np.random.default_rng(2).integers(5, 60, 200).tolist(), 100]
    rows = pack(list(range(201)), lengths, 64)
    sums = [sum(lengths[i] for i in row) for row in rows]
    assert sums[0] == 100 and max(sums[1:]) <= 64, "only an example longer than the row may pass it"
    assert sum(sums) / (64 * len(rows)) > 0.9 and flat([[rows]]) == list(range(201))


def test_micro_batches_respect_their_size_and_their_padding():
    lengths, rows = [50, 49, 48, 20, 20, 19, 5], [[i] for i in range(7)]
    for size, padding, rows_each in [(10_000, 10_000, [7]), (1, 0, [1] * 7), (110, 10_000, [2, 2, 3]), (10_000, 3, [3, 3, 1])]:
        micros = micro_batches(rows, lengths, size, padding)
        assert [len(m) for m in micros] == rows_each and [row for m in micros for row in m] == rows


def test_where_rows_are_rounded_up_every_forward_is_one_row_of_one_shape():
    """CUDA's layout: a row is a whole micro-batch, and only an example that is longer than one takes more."""
    lengths = [*np.random.default_rng(3).integers(5, 120, 300).tolist(), 700]
    items = items_of(lengths)
    plan = BatchPlan(items, 301, 0, row_len=512, micro_tokens=520, row_multiple=512, world=3)
    for ranks in (plan[0], plan_once(items, 520, 512, world=3)):
        rows = [row for micros in ranks for micro in micros for row in micro]
        assert all(len(micro) <= 1 for micros in ranks for micro in micros) and len({len(micros) for micros in ranks}) == 1
        assert sorted(i for row in rows for i in row) == list(range(301))
        batches = [collate([[items[i] for i in row]], 512) for row in rows]
        shapes = Counter(batch.tokens.shape for batch in batches)
        assert shapes == {(1, 512): len(rows) - 1, (1, 1024): 1} and collate([], 512).tokens.shape == (1, 512)
        assert sum(lengths) / (512 * (len(rows) + 1)) > 0.95, "hardly any padding"
        assert all(len(batch.target) % 32 == 0 for batch in batches), "one of 16 numbers of predicted tokens"
    positions = 512 * (len(rows) + 1)
    assert f"{sum(lengths):,} tokens in {positions:,} positions" in describe(plan, items)


def test_an_epoch_draws_some_of_every_group():
    groups = [i // 3 for i in range(30)]
    first, second = (epoch_order(groups, 0, epoch, per_group=1) for epoch in (0, 1))
    assert sorted(groups[i] for i in first) == list(range(10)) and sorted(first) != sorted(second)
    assert len(epoch_order(groups, 0, 0, per_group=2)) == 20 and len(epoch_order(groups, 0, 0)) == 30
    assert epoch_order(groups, 0, 0, per_group=1, shuffle=False).tolist() == list(range(0, 30, 3))
    mixed = np.random.default_rng(0).integers(-5, 5, 200).tolist()
    for per_group, shuffle in itertools.product((0, 1, 3, 99), (True, False)):
        order, seen, drawn = epoch_order(mixed, 7, 1, 0, shuffle).tolist(), Counter(), []
        for i in order:  # the rule, one example at a time
            seen[mixed[i]] += 1
            drawn += [i] if seen[mixed[i]] <= (per_group or 200) else []
        assert epoch_order(mixed, 7, 1, per_group, shuffle).tolist() == drawn


def test_plan_once_has_everything_once():
    items = items_of([9, 3, 7, 30, 2])
    (alone,) = plan_once(items, 12)
    assert flat([alone]) == [0, 1, 2, 3, 4] and alone[0] == [[3]]
    for world in (2, 3, 7):
        ranks = plan_once(items, 12, world=world)
        assert len(ranks) == world and len({len(micros) for micros in ranks}) == 1
        turns = [rows for turn in zip(*ranks, strict=True) for rows in turn if rows]
        assert turns == alone, "the micro-batches do not depend on the number of processes"


def test_what_a_layout_costs():
    items = [Encoded(np.zeros(n, np.int32), [np.zeros(3, np.int32)] * 2, i, i) for i, n in enumerate([4, 6, 16])]
    said = describe(BatchPlan(items, 3, 0), items)  # rows of 8, 10 and 20 tokens; plain, 6 sequences of 19
    assert said.startswith(
        "1 step of an epoch, 3 examples each: 38 tokens in 60 positions (36.7% padding); "
        "padded and unshared they would be 114 (1.90x)"
    )


def test_length_policies():
    toy = get("toy")
    words = " the red scarf"
    n = len(toy.encode(words))
    short, long = Example(words, (words,), source="f:1"), Example(words * 5, (words,), source="f:2")
    kept, report = encode([short, long], toy, 3 * n, "drop")
    assert [i.number for i in kept] == [0] and str(report) == "2 examples, 1 dropped as too long"
    kept, report = encode([short, long], toy, 3 * n, "left")
    assert str(report) == f"2 examples, 1 prompt cut from the left, {6 * n + 1 - 3 * n} tokens cut off them"
    assert kept[1].longest == 3 * n and kept[1].completions[0].tolist() == [*toy.encode(words), toy.eot]
    assert kept[1].prompt.tolist() == toy.encode(words * 5)[-(2 * n - 1) :], "the prompt's start is cut, not its end"
    with pytest.raises(UserError, match=r"f:1: a completion of 4 tokens does not fit max_len 4"):
        encode([short], toy, n + 1, "left")
    with pytest.raises(UserError, match=r"no example is left of 2.*2 dropped"):
        encode([short, long], toy, n + 1, "drop")


def test_what_encode_adds_and_what_it_leaves_out():
    toy = get("toy")
    pairs = [Example("", (" red", " red")), Example("", (" red", " old"))]
    (item,), report = encode(pairs, toy, 10, "drop")
    assert str(report) == "2 examples, 1 pair dropped, chosen and rejected being the same tokens"
    assert item.prompt.tolist() == [toy.eot] and item.completions[1].tolist() == [*toy.encode(" old"), toy.eot]
    (item,), _ = encode([Example(" the", (" red",), label=0)], toy, 10, "drop", end=False)
    assert item.completions[0].tolist() == toy.encode(" red")
    with pytest.raises(UserError, match="f:3: an empty completion"):
        encode([Example(" the", ("",), source="f:3")], toy, 10, "drop")


def test_the_hash_of_data_stays_the_same():
    items = [
        Encoded(np.array([5, 6], np.int32), [np.array([7], np.int32), np.array([8, 9], np.int32)], i, 4 + i) for i in (0, 1)
    ]
    assert data_hash(items) == "1816aac7f8ffb2347fecffd2d7827dc6db7e0419f382469b80e8c2a1a58be77a"
    assert data_hash(items[1:]) == data_hash(items[:1]), "it counts groups from the first one"
