"""Unpaired data, a completion with a label: what is read, whose completion each line borrows, what is refused."""

import gzip
import json

import pytest

import data
from base.errors import UserError
from data import cache
from data.encode import data_hash, encode, load_encoded
from data.tokenizer import get
from tests.chats import ASKED, SAID, SYSTEM
from tests.data.published import write

NO = {"role": "assistant", "content": "No."}
FOUR = [
    {"prompt": " the", "completion": " red", "label": True},
    {"prompt": " old", "completion": " scarf", "label": False},
    {"prompt": " red", "completion": " red", "label": False},
    {"prompt": " new", "completion": " card", "label": True},
]


def load(folder, *records, view="preference", unpaired=True, **more):
    return data.load(str(write(folder / "x.jsonl", *records)), "train", view, unpaired=unpaired, **more)


def test_each_borrows_the_completion_before_it(tmp_path):
    found = load(tmp_path, *FOUR)
    assert [(e.prompt, *e.completions, e.label) for e in found] == [
        (" old", " scarf", " red", 0), (" red", " red", " scarf", 0), (" new", " card", " red", 1), (" the", " red", " card", 1)
    ]  # fmt: skip
    assert [e.source[-1] for e in found] == ["2", "3", "4", "1"]
    assert len(load(tmp_path, *FOUR, limit=2)) == 2
    assert [e.completions for e in load(tmp_path, *FOUR, view="sft")] == [(" red",), (" scarf",), (" red",), (" card",)]


def test_no_prompt_borrows_an_answer_of_its_own(tmp_path):
    """Pairs that were taken apart stand line behind line."""
    asked = [("a", 1), ("a", 2), ("b", 3), ("b", 4), ("a", 5), ("a", 6)]
    found = load(tmp_path, *({"prompt": p, "completion": str(n), "label": n % 2 > 0} for p, n in asked))
    assert [(e.prompt, *map(int, e.completions)) for e in found] == [
        ("b", 3, 2), ("b", 4, 2), ("a", 5, 4), ("a", 6, 4), ("a", 1, 4), ("a", 2, 4)
    ]  # fmt: skip
    with pytest.raises(UserError, match=r"x\.jsonl:1: unpaired data need two prompts or more"):
        load(tmp_path, *(FOUR[0] | {"completion": text} for text in (" red", " old")))
    with pytest.raises(UserError, match="need two prompts or more"):
        load(tmp_path, FOUR[0])


def test_conversations_and_columns(tmp_path):
    chats = [
        {"prompt": [ASKED], "completion": [SAID], "label": True},
        {"prompt": [SYSTEM, ASKED], "completion": [NO], "label": False},
    ]
    found = load(tmp_path, *chats)
    assert [(e.prompt, e.completions, e.label) for e in found] == [
        ((SYSTEM, ASKED), ((NO,), (SAID,)), 0), ((ASKED,), ((SAID,), (NO,)), 1)
    ]  # fmt: skip
    rows = [{"q": e["prompt"], "a": e["completion"], "good": e["label"]} for e in FOUR]
    assert load(tmp_path, *rows, columns="prompt=q,completion=a,label=good") == load(tmp_path, *FOUR)


def test_equal_completions_stay(tmp_path):
    """What is no pair is not dropped where both completions are the same tokens."""
    same = [{"prompt": word, "completion": " red", "label": word == " old"} for word in (" the", " old", " new")]
    items, report = encode(load(tmp_path, *same), get("toy"), 60, "drop")
    assert len(items) == 3 and str(report) == "3 examples"
    assert [item.label for item in items] == [1, 0, 0]


def test_the_hash_knows_the_labels_and_the_cache_keeps_them(tmp_path, monkeypatch):
    turned = [FOUR[0] | {"label": False}, *FOUR[1:]]
    plain, other = (encode(load(tmp_path, *records), get("toy"), 60, "drop")[0] for records in (FOUR, turned))
    assert data_hash(plain) != data_hash(other)
    monkeypatch.setattr(cache, "SMALL", 0)
    monkeypatch.setenv("NANOPREF_CACHE", str(tmp_path / "cache"))
    kept = load_encoded(str(write(tmp_path / "x.jsonl", *FOUR)), "train", "preference", get("toy"), 60, "drop", unpaired=True)
    assert isinstance(kept, cache.Records) and data_hash(kept) == data_hash(plain)
    assert [item.label for item in kept] == [item.label for item in plain]


def test_a_share_for_validation_borrows_within_itself(tmp_path):
    many = [{"prompt": f" {n}", "completion": str(n), "label": n % 2 == 0} for n in range(40)]
    halves = [load(tmp_path, *many, half=(half, 0.3)) for half in ("train", "val")]
    for examples in halves:
        assert {e.completions[0] for e in examples} == {e.completions[1] for e in examples}
    assert sum(map(len, halves)) == 40 and all(halves)


@pytest.mark.parametrize(
    ("second", "says"),
    [
        ({"prompt": "a", "completion": "b"}, ":2: the field 'label' is missing (fields there: completion, prompt): unpaired"),
        ({"prompt": "a", "completion": "b", "label": 1}, ":2: the field 'label' must be true or false, not 1"),
        ({"prompt": "a", "completion": "b", "label": "true"}, ":2: the field 'label' must be true or false, not 'true'"),
        ({"prompt": "a", "completion": "b", "label": None}, ":2: the field 'label' must be true or false, not None"),
        ({"prompt": "a", "completion": "", "label": True}, ":2: 'completion' is empty"),
        ({"completion": "b", "label": True}, ":2: the field 'prompt' is missing"),
        ({"prompt": "a", "chosen": "b", "rejected": "c"}, ":2: a pair where unpaired lines were expected"),
        ({"prompt": "a", "completions": ["b", "c"], "pairs": [[0, 1]]}, ":2: a pair where unpaired lines were expected"),
    ],
)
def test_refused_lines(second, says, tmp_path):
    with pytest.raises(UserError) as error:
        load(tmp_path, FOUR[0], second)
    assert says in str(error.value)


def test_mixed_up_files(tmp_path):
    pair = {"prompt": "a", "chosen": "b", "rejected": "c"}
    with pytest.raises(UserError, match=r":2: an unpaired line where pairs were expected: keep both in files of their own"):
        load(tmp_path, pair, FOUR[0])
    with pytest.raises(UserError, match=r":1: the field 'label' is missing .* pairs have chosen and rejected"):
        load(tmp_path, {"prompt": "a", "completion": "b"})
    with pytest.raises(UserError, match=r":1: an unpaired line where pairs were expected"):
        load(tmp_path, *FOUR, unpaired=False)


def test_any_file(tmp_path):
    path = tmp_path / "x.json.gz"
    path.write_bytes(gzip.compress(json.dumps(FOUR).encode()))
    found = data.load(str(path), "train", "preference", unpaired=True)
    assert [e.completions for e in found] == [e.completions for e in load(tmp_path, *FOUR)]
