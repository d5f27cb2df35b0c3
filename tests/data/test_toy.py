"""The toy task: the same for everyone, disjoint splits, options that give nothing away by themselves."""

from collections import Counter

import data
from data.tokenizer import get
from data.toy import ROUTINES, VOCAB, problems


def test_same_seed_same_problems_and_disjoint_splits():
    train, val, test = ([p for p, _ in problems(split, 3000)] for split in ("train", "val", "test"))
    assert problems("train", 50) == problems("train", 50) != problems("train", 50, seed=1)
    contexts = [{p.context for p in split} for split in (train, val, test)]
    assert not contexts[0] & contexts[1] and not contexts[0] & contexts[2] and not contexts[1] & contexts[2]
    assert len(contexts[0]) > 2950, "problems hardly ever repeat"


def test_the_right_ending_is_the_routine_s_next_step():
    for p, shown in problems("val", 200):
        *_, last, then = p.context.split(". ")
        who, verb, *what = last.split()
        routine = ROUTINES[what[-1]]
        right, skipping = ((routine * 2)[routine.index(verb) + n] for n in (1, 2))
        assert then == f"Then {who}" and p.endings[p.label] == f"{right} {' '.join(what)}."
        assert shown == p.label or p.endings[shown] == f"{skipping} {' '.join(what)}."
        assert len(set(p.endings)) == 4 and all(e.endswith(" ".join(what) + ".") for e in p.endings)


def test_neither_place_nor_verb_gives_the_answer_away():
    made = [p for p, _ in problems("train", 20_000)]
    places = Counter(p.label for p in made)
    assert all(abs(n / 20_000 - 0.25) < 0.015 for n in places.values())
    # what is right most often for a thing, and was not told, is no better than chance on held-out problems
    right = Counter(p.endings[p.label].split(" the ")[0] + p.endings[p.label].split()[-1] for p in made)
    val = [p for p, _ in problems("val", 2000)]
    guess = [max(p.endings, key=lambda e: right[e.split(" the ")[0] + e.split()[-1]]) for p in val]
    assert abs(sum(p.endings[p.label] == g for p, g in zip(val, guess, strict=True)) / 2000 - 0.25) < 0.05


def test_words_and_views():
    toy = get("toy")
    assert toy.size == len(VOCAB) + 1 < 200
    demonstrations = data.load("toy", "train", "sft", limit=1000)
    sft = demonstrations[0]
    assert toy.decode(toy.encode(sft.prompt + sft.completions[0])) == sft.prompt + sft.completions[0]
    assert len(toy.encode(sft.prompt)) < 80 and sft.prompt.endswith("\nAnswer:")
    pairs = data.load("toy", "train", "preference", limit=2)
    assert len(pairs) == 6 and len({p.completions[0] for p in pairs[:3]}) == 1
    right = data.load("toy", "train", "preference", limit=1000)[::3]
    careless = sum(a.completions[0] != b.completions[0] for a, b in zip(demonstrations, right, strict=True))
    assert 450 < careless < 550 and [a.prompt for a in demonstrations] == [b.prompt for b in right]
    mcq = data.load("toy", "val", "mcq")
    assert len(mcq) == 2000 and mcq == data.load("toy", "val", "loglik")
