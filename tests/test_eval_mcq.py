"""eval_mcq.py: options that tie."""

import json

import numpy as np
import pytest

from data import Example
from data.encode import Encoded
from eval_mcq import grade_loglik
from tests.conftest import flags


def graded(options: tuple[str, ...], label: int, logps: list[float]) -> tuple[dict, dict]:
    """(result, detail) of one problem."""
    item = Encoded(np.zeros(1, np.int32), [np.zeros(2, np.int32) for _ in options], 0, 0, label)
    result, (detail,) = grade_loglik([Example("P", options, label)], [item], [logps])
    return result, detail


@pytest.mark.parametrize("order", [(0, 1, 2), (0, 2, 1), (2, 0, 1)])
def test_options_of_the_same_text_tie_whatever_rounding_says(order):
    """The first of them is chosen, and is right where the right one reads the same."""
    texts, logps = (" a dog", " a dog", " a cat"), [-3.0, -3.0000002, -4.0]
    options = tuple(texts[i] for i in order)
    for label in range(3):
        for scores in (logps, [logps[1], logps[0], logps[2]]):
            result, detail = graded(options, label, [scores[i] for i in order])
            assert detail["pred"] == detail["pred_norm"] == options.index(" a dog")
            assert result["acc"] == result["acc_norm"] == (options[label] == " a dog")
            first, second = (detail["logps"][i] for i, text in enumerate(options) if text == " a dog")
            assert first == second


def test_a_tie_of_unlike_texts_goes_to_the_first():
    for label in (0, 1):
        result, detail = graded((" one", " two"), label, [-2.0, -2.0])
        assert detail["pred"] == 0 and result["acc"] == (label == 0)


def test_equal_options_of_a_file(sft_run, call, tmp_path):
    """Equal texts at unlike places of a row get one log-prob."""
    options = [" dries the red scarf.", " cuts the big loaf.", " dries the red scarf.", " buys", " dries the red scarf."]
    lines = [{"prompt": " Mia washes the red scarf. Then Mia", "choices": options, "label": n} for n in range(5)]
    (tmp_path / "mcq.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    keys = {"model": sft_run / "model", "data": tmp_path / "mcq.jsonl", "details": tmp_path / "details.jsonl"}
    status, out, err = call("eval_mcq", *flags(**keys))
    assert status == 0, err
    details = [json.loads(line) for line in (tmp_path / "details.jsonl").read_text().splitlines()]
    for detail in details:
        assert detail["logps"][0] == detail["logps"][2] == detail["logps"][4]
    right = [options[d["pred"]] == options[d["label"]] for d in details]
    assert json.loads(out.splitlines()[-1])["acc"] == sum(right) / 5 and sum(right) in (1, 3)
