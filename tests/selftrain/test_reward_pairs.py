"""Pairs by a reward: every form by hand, labels at the probabilities of Bradley and Terry, and what is said of bad files."""

import json
import math

import pytest

from tests.conftest import flags

RATE = "def rate(prompt, completion):\n    return float(completion or 'nan')\n"  # a completion is its own reward


@pytest.fixture
def make(tmp_path, call):
    """make(lines, temperature=…) -> the lines of pairs, sorted by prompt."""
    (tmp_path / "rate.py").write_text(RATE)

    def run(lines: list[dict], **keys) -> list[dict]:
        (tmp_path / "s.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        named = {"samples": tmp_path / "s.jsonl", "reward": f"{tmp_path / 'rate.py'}:rate", "out": tmp_path / "p.jsonl"}
        status, _, err = call("selftrain.reward_pairs", *flags(**named | keys))
        assert status == 0, err
        return sorted(map(json.loads, (tmp_path / "p.jsonl").read_text().splitlines()), key=lambda row: str(row["prompt"]))

    return run


def test_pairs_by_hand(make, tmp_path):
    lines = [
        {"prompt": "a", "completions": ["2", "5", "", "2", "5.0", "1"]},  # an empty text, and one twice
        {"prompt": "b", "completions": ["3", "3.0", "3.00"]},  # ties: no pair
        {"prompt": "c", "completions": ["4"]},
    ]
    (row,) = make(lines, report=tmp_path / "r.json")
    assert row["completions"] == ["2", "5", "5.0", "1"] and row["rewards"] == [2, 5, 5, 1]
    assert row["pairs"] == [[1, 0], [2, 0], [0, 3], [1, 3], [2, 3]]
    counts = {"prompts": 3, "with_pairs": 1, "pairs": 5, "reward": (15 + 9 + 4) / 9, "margin": 3.0}
    assert json.loads((tmp_path / "r.json").read_text()) == pytest.approx(counts)
    (row,) = make(lines, partner="best")
    assert row["pairs"] == [[1, 0], [1, 3]]  # the first of two that are best


def test_a_conversation_is_answered_by_messages(make):
    asked = [{"role": "user", "content": "how many?"}]
    (row,) = make([{"messages": asked, "completions": ["1", "2"]}])
    assert row["prompt"] == asked and row["pairs"] == [[1, 0]]
    assert row["completions"] == [[{"role": "assistant", "content": text}] for text in ("1", "2")]


def test_labels_are_those_of_bradley_and_terry(make):
    n, temperature = 4000, 0.5
    lines = [{"prompt": f"{i}", "completions": ["0.3", "0", "0.0"]} for i in range(n)]
    rows = make(lines, temperature=temperature, seed=1)
    won = [sum([a, b] in row["pairs"] for row in rows) / n for a, b in ((0, 1), (0, 2), (1, 2))]
    wanted = 1 / (1 + math.exp(-0.3 / temperature))
    assert won == pytest.approx([wanted, wanted, 0.5], abs=4 * 0.5 / math.sqrt(n))
    assert make(lines, temperature=temperature, seed=1) == rows != make(lines, temperature=temperature, seed=2)
    assert [0, 1] in make([{"prompt": "x", "completions": ["900", "0"]}], temperature=1e-300)[0]["pairs"]


@pytest.mark.parametrize(
    ("line", "keys", "says"),
    [
        ({"prompt": "a", "completions": ["1", "1.0"]}, {}, "no prompt has two completions of different rewards"),
        ({"prompt": "a", "completions": []}, {}, "s.jsonl:1: 'completions' must be a list of texts"),
        ({"prompt": "a", "completions": ["1", 2]}, {}, "s.jsonl:1: 'completions' must be a list of texts"),
        ({"prompt": "a"}, {}, "s.jsonl:1: the field 'completions' is missing"),
        ({"completions": ["1", "2"]}, {}, "s.jsonl:1: the field 'prompt' is missing"),
        ({"prompt": "a", "completions": ["1", "x"]}, {}, "of the completion 'x': ValueError"),
        ({"prompt": "a", "completions": ["1", "2"]}, {"reward": "joy"}, "'joy' is not reviews, sentiment, or a file"),
        ({"prompt": "a", "completions": ["1", "2"]}, {"temperature": -1}, "temperature"),
    ],
)
def test_what_a_user_can_do_wrong(line, keys, says, refused, tmp_path):
    (tmp_path / "rate.py").write_text(RATE)
    (tmp_path / "s.jsonl").write_text(json.dumps(line) + "\n")
    named = {"samples": tmp_path / "s.jsonl", "reward": f"{tmp_path / 'rate.py'}:rate", "out": tmp_path / "p.jsonl"}
    refused("selftrain.reward_pairs", *flags(**named | keys), says=says)
    assert not (tmp_path / "p.jsonl").exists()
