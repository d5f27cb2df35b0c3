"""Several completions of a prompt in a line of preference data: what is read, what is tokenized and kept, what is refused."""

import json

import pytest

import data
from base.errors import UserError
from data import cache
from data.encode import data_hash, encode, load_encoded
from data.plan import BatchPlan
from data.tokenizer import get
from tests.chats import ASKED, SAID, SYSTEM, tokenizer_folder
from tests.conftest import flags
from tests.data.published import labels_folder, write

FOUR = [" red", " old", " red scarf", " scarf"]
LINE = {"prompt": " the", "completions": FOUR}
NO, MAYBE = ([{"role": "assistant", "content": text}] for text in ("No.", "Maybe."))
CHAT = {"prompt": [SYSTEM, ASKED], "completions": [[SAID], NO, MAYBE]}


def load(folder, *records, view="preference", **more):
    return data.load(str(write(folder / "x.jsonl", *records)), "train", view, **more)


def test_pairs_and_scores(tmp_path, capsys):
    (e,) = load(tmp_path, LINE | {"pairs": [[1, 0], [3, 2], [1, 0]]})
    assert (e.prompt, e.completions, e.pairs) == (" the", tuple(FOUR), ((1, 0), (3, 2), (1, 0))) and e.source.endswith(":1")
    scored = LINE | {"scores": [0.5, 2, -1.0, 0.5]}
    (e,) = load(tmp_path, scored)
    assert set(e.pairs) == {(0, 2), (1, 0), (1, 2), (1, 3), (3, 2)} and len(e.pairs) == 5, "all but the tie of 0 and 3"
    (e,) = load(tmp_path, scored, min_gap=1.6)
    assert set(e.pairs) == {(1, 2)}
    (e,) = load(tmp_path, scored, min_gap=1.5)
    assert set(e.pairs) == {(0, 2), (1, 0), (1, 2), (1, 3), (3, 2)}, "just as far apart is far enough"
    capsys.readouterr()
    found = load(tmp_path, LINE | {"scores": [1, 1, 1, 1]}, scored, LINE | {"scores": [0, 1, 0, 0]}, min_gap=2)
    assert [e.source[-1] for e in found] == ["2"]
    assert "1 kept; 2 dropped: their scores make no pair" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"no example is left; 1 dropped: their scores make no pair"):
        load(tmp_path, LINE | {"scores": [1, 1, 1, 1]})


def test_columns_and_sft(tmp_path):
    row = {"q": " the", "answers": FOUR, "stars": [1, 2, 9, 2]}
    (e,) = load(tmp_path, row, columns="prompt=q,completions=answers,scores=stars")
    assert e.completions == tuple(FOUR) and (2, 0) in e.pairs
    (e,) = load(tmp_path, row, view="sft", columns="prompt=q,completions=answers,scores=stars")
    assert e == data.Example(" the", (" red scarf",), source=e.source), "the best is learnt"
    (e,) = load(tmp_path, LINE | {"pairs": [[0, 1], [3, 0], [3, 2]]}, view="sft")
    assert e.completions == (" scarf",), "chosen most often"
    with pytest.raises(UserError, match="no multiple-choice"):
        load(tmp_path, LINE | {"pairs": [[0, 1]]}, view="mcq")


def test_conversations(tmp_path):
    (e,) = load(tmp_path, CHAT | {"scores": [1, 0, 2]})
    assert (e.prompt, e.completions) == ((SYSTEM, ASKED), ((SAID,), tuple(NO), tuple(MAYBE))) and e.is_chat
    assert set(e.pairs) == {(0, 1), (2, 0), (2, 1)}
    tokenizer = get(str(tokenizer_folder(tmp_path / "chatml")))
    (together,), _ = encode([e], tokenizer, 128, "drop")
    pairs = [data.Example(e.prompt, (e.completions[w], e.completions[l]), source="f:1") for w, l in e.pairs]
    apart, _ = encode(pairs, tokenizer, 128, "drop")
    for (w, l), one in zip(together.pairs, apart, strict=True):
        wanted = [together.prompt.tolist(), *(together.completions[i].tolist() for i in (w, l))]
        assert [one.prompt.tolist(), *(c.tolist() for c in one.completions)] == wanted


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({}, "must be two or more, and with them either 'pairs' or 'scores' must stand"),
        ({"pairs": [[0, 1]], "scores": [1, 2, 3, 4]}, "either 'pairs' or 'scores' must stand"),
        ({"completions": [" red"], "scores": [1]}, "'completions' must be two or more"),
        ({"completions": " red", "scores": [1]}, "the field 'completions' must be a list"),
        ({"completions": [" red", ""], "scores": [1, 2]}, "'completions[1]' is empty"),
        ({"completions": [" red", 3], "scores": [1, 2]}, "'completions[1]' must be text, not 3"),
        ({"completions": [" red", NO], "scores": [1, 2]}, "'completions[1]' must be text"),
        ({"prompt": 3, "pairs": [[0, 1]]}, "the field 'prompt' must be text"),
        ({"prompt": [ASKED], "pairs": [[0, 1]]}, "the field 'completions[0]' must be a list"),
        ({"prompt": [ASKED], "completions": [[SAID], [ASKED]], "pairs": [[0, 1]]}, "'completions[1]': a turn of the user"),
        ({"pairs": []}, "'pairs' must be a list of [chosen, rejected], the numbers of two completions (0 to 3), not []"),
        ({"pairs": "0,1"}, "the field 'pairs' must be a list"),
        ({"pairs": [[0, 1], [0, 4]]}, "not [0, 4]"),
        ({"pairs": [[-1, 1]]}, "not [-1, 1]"),
        ({"pairs": [[2, 2]]}, "not [2, 2]"),
        ({"pairs": [[0, 1, 2]]}, "not [0, 1, 2]"),
        ({"pairs": [0, 1]}, "not 0"),
        ({"pairs": [[0, True]]}, "not [0, True]"),
        ({"pairs": [[0, 1.0]]}, "not [0, 1.0]"),
        ({"scores": [1, 2, 3]}, "3 'scores' for 4 'completions': give one each"),
        ({"scores": 1}, "the field 'scores' must be a list"),
        ({"scores": [1, 2, 3, "4"]}, "'scores' holds '4': a score is a finite number"),
        ({"scores": [1, 2, 3, True]}, "'scores' holds True: a score is a finite number"),
        ({"scores": [1, 2, 3, float("nan")]}, "'scores' holds nan: a score is a finite number"),
        ({"scores": [1, 2, 3, float("-inf")]}, "'scores' holds -inf: a score is a finite number"),
        ({"scores": [1, 2, 3, 10**400]}, "'scores' holds 1000000"),
        ({"scores": [1, 2, 3, None]}, "'scores' holds None: a score is a finite number"),
    ],
)  # fmt: skip
def test_wrong_lines_name_file_and_line(tmp_path, change, message):
    with pytest.raises(UserError) as error:
        load(tmp_path, LINE | {"pairs": [[0, 1]]}, LINE | change)
    assert "x.jsonl:2: " in str(error.value) and message in str(error.value) and "\n" not in str(error.value)


def test_what_cannot_be_used_leaves_the_row(tmp_path):
    """Pairs of the same tokens, pairs too long, and completions that no pair needs. The rest stays one row."""
    toy = get("toy")
    e = data.Example(" the the the", (*FOUR, " red"), pairs=((0, 4), (1, 0), (4, 1), (2, 1)), source="f:1")
    (item,), report = encode([e], toy, 100, "drop")
    assert [toy.decode(c[:-1].tolist()) for c in item.completions] == [" red", " old", " red scarf", " red"]
    assert item.pairs == ((1, 0), (3, 1), (2, 1)) and (item.n_completions, item.n_pairs) == (4, 3)
    assert str(report) == "1 example, 1 pair dropped, chosen and rejected being the same tokens"
    room = len(item.prompt) + len(item.completions[1])
    (item,), report = encode([e], toy, room, "drop")
    assert item.pairs == ((1, 0), (2, 1)) and item.n_completions == 3 and "1 pair dropped as too long" in str(report)
    (item,), _ = encode([e], toy, room, "left")
    assert item.n_pairs == 3 and len(item.prompt) + max(map(len, item.completions)) == room
    with pytest.raises(UserError, match="no example is left of 1"):
        encode([data.Example(" the", (" red", " red", " red"), pairs=((0, 1), (1, 2)), source="f:1")], toy, 100, "drop")


def test_tokens_of_an_earlier_start_have_the_pairs(tmp_path, monkeypatch):
    lines = [LINE | {"pairs": [[n % 3, 3], [3, 0]][: 1 + n % 2]} for n in range(9)] + [
        {"prompt": " the", "chosen": " red", "rejected": " old"}
    ]
    path = write(tmp_path / "rows.jsonl", *lines)
    plain = load_encoded(str(path), "train", "preference", get("toy"), 60, "drop")
    monkeypatch.setenv("NANOPREF_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(cache, "SMALL", 0)
    items = load_encoded(str(path), "train", "preference", get("toy"), 60, "drop")
    assert isinstance(items, cache.Records) and data_hash(items) == data_hash(plain)
    for a, b in zip(items, plain, strict=True):
        assert a.pairs == b.pairs and [c.tolist() for c in a.completions] == [c.tolist() for c in b.completions]
    plans = [BatchPlan(of, 4, 1) for of in (items, plain)]
    assert plans[0].epoch_size == 14 and all(plans[0].examples(step) == plans[1].examples(step) for step in range(8))
    scored = write(tmp_path / "scored.jsonl", LINE | {"scores": [1, 2, 3, 5]})
    for gap, n in ((0.0, 6), (2.0, 4), (0.0, 6)):
        (item,) = load_encoded(str(scored), "train", "preference", get("toy"), 60, "drop", min_gap=gap)
        assert item.n_pairs == n, "another min_gap makes other tokens"


def test_the_hash_binds_the_pairs():
    def hashed(*pairs):
        return data_hash(encode([data.Example(" the", tuple(FOUR), pairs=pairs)], get("toy"), 60, "drop")[0])

    every = ((0, 1), (1, 2), (2, 3))
    assert len({hashed(*every), hashed(*every[::-1]), hashed(*every, (0, 1)), hashed((1, 0), *every[1:])}) == 4


def test_a_recipe_of_four_samples_as_a_file(tmp_path, call):
    """human_labels: one line a query, the best over the other three, also when it is written and read again."""
    out = tmp_path / "rows.jsonl"
    args = flags(
        data="human_labels:tldr", data_dir=labels_folder(tmp_path / "labels"), split="train", view="preference", limit=5
    )
    status, said, err = call("data.__main__", *args, "--out", out)
    assert status == 0 and said.endswith(f"wrote {out}: 5 lines\n"), err
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert {(len(line["completions"]), str(line["pairs"])) for line in lines} == {(4, "[[0, 1], [0, 2], [0, 3]]")}
    assert [e.pairs for e in data.load(str(out), "train", "preference")] == [((0, 1), (0, 2), (0, 3))] * 5


@pytest.mark.parametrize("given", [{"scores": [0, 1]}, {"pairs": [[1, 0]]}])
def test_two_completions_keep_their_order_when_written_as_a_file(given, call, tmp_path):
    line = {"prompt": " the", "completions": [" old", " red"], **given}
    (tmp_path / "two.jsonl").write_text(json.dumps(line) + "\n")
    args = ["--data", str(tmp_path / "two.jsonl"), "--view", "preference", "--out", str(tmp_path / "out.jsonl")]
    assert call("data.__main__", *args)[0] == 0
    (found,) = data.load(str(tmp_path / "out.jsonl"), "train", "preference")
    assert [found.completions[i] for i in found.pairs[0]] == [" red", " old"]


def test_sft_takes_the_best_score(tmp_path):
    line = {"prompt": " the", "completions": [" old", " red", " blue"], "scores": [9.5, 10, 0]}
    (tmp_path / "s.jsonl").write_text(json.dumps(line) + "\n")
    (found,) = data.load(str(tmp_path / "s.jsonl"), "train", "sft", min_gap=1.0)
    assert found.completions == (" red",)
    with pytest.raises(UserError, match=r"key min_gap: 1\.0: the recipe toy has no scores"):
        data.load("toy", "train", "preference", min_gap=1.0)


def test_a_name_that_is_there_is_no_pattern(tmp_path):
    for name in ("d1", "d[1]"):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps({"prompt": " the", "completion": f" {name}"}) + "\n")
    (found,) = data.load(str(tmp_path / "d[1].jsonl"), "train", "sft")
    assert found.completions == (" d[1]",)
    assert len(data.load(f"{tmp_path}/d1.jsonl,{tmp_path}/d[1].jsonl,", "train", "sft")) == 2
