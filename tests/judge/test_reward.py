"""eval_reward.py: the implicit reward equals what dpo.py logged, whatever the reference comes from."""

import contextlib
import json
import statistics
from pathlib import Path

import numpy as np
import pytest
import torch

from data.encode import Encoded
from eval_reward import grade
from tests.conftest import dpo_args, flags, metrics, ref_args, script


@pytest.fixture(scope="module")
def dpo_run(files, sft_run, reference, tmp_path_factory) -> Path:
    """A finished tiny DPO run on sft_run's model."""
    folder = tmp_path_factory.mktemp("dpo") / "run"
    with contextlib.redirect_stdout(None):
        assert script("dpo", *dpo_args(files, sft_run, reference, folder)) == 0
    return folder


def reward_args(files, dpo_run, out, **keys) -> list[str]:
    return flags(**{"model": dpo_run / "model", "data": files["val_pairs"], "out": out, **keys})


def test_reward_is_what_dpo_validated(files, call, dpo_run, sft_run, reference, tmp_path):
    """The reference from a file (as its validation pairs, or as its own) and from a model give the figures of dpo.py."""

    def measure(name: str, **keys) -> dict:
        status, printed, err = call("eval_reward", *reward_args(files, dpo_run, tmp_path / name, **keys))
        assert status == 0 and "16 pairs: accuracy " in printed and ", margin " in printed, err
        return json.loads((tmp_path / name).read_text())

    found = measure("a.json", ref=reference, label="DPO")
    kept = min((r for r in metrics(dpo_run) if r["split"] == "val" and r["step"]), key=lambda r: r["loss"])  # is in model/
    assert found["n"] == 16 and found["accuracy"] == pytest.approx(kept["rewards/accuracies"])
    assert found["margin"] == pytest.approx(kept["rewards/margins"], abs=1e-5)
    assert 0.1 * found["gain_chosen"] == pytest.approx(kept["rewards/chosen"], abs=1e-5)
    assert 0.1 * found["gain_rejected"] == pytest.approx(kept["rewards/rejected"], abs=1e-5)
    assert found["accuracy_stderr"] == pytest.approx((found["accuracy"] * (1 - found["accuracy"]) / 15) ** 0.5)
    assert (found["mode"], found["label"]) == ("reward", "DPO") and found["parameters"] > 0

    details = tmp_path / "d.jsonl"
    other = measure("b.json", ref_model=sft_run / "model", details=details, micro_tokens=64)
    rows = [json.loads(line) for line in details.read_text().splitlines()]
    for name in ("accuracy", "margin", "margin_stderr", "gain_chosen"):
        assert other[name] == pytest.approx(found[name], abs=1e-5)
    margins = [0.1 * (r["logps"][0] - r["ref_logps"][0] - r["logps"][1] + r["ref_logps"][1]) for r in rows]
    assert statistics.fmean(margins) == pytest.approx(found["margin"], abs=1e-5)
    assert statistics.stdev(margins) / 4 == pytest.approx(found["margin_stderr"], abs=1e-5)

    own = tmp_path / "own.safetensors"
    assert call("precompute_ref", *ref_args(files, sft_run, own, data=files["val_pairs"], val_data=None))[0] == 0
    assert measure("c.json", ref=own)["margin"] == found["margin"]


@pytest.mark.slow
def test_two_processes_find_the_same(files, dpo_run, sft_run, reference, call, world, tmp_path):
    assert call("eval_reward", *reward_args(files, dpo_run, tmp_path / "one.json", ref=reference))[0] == 0
    statuses, err = world(2, "eval_reward", reward_args(files, dpo_run, tmp_path / "two.json", ref_model=sft_run / "model"))
    assert statuses == [0, 0], err
    one, two = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("one", "two"))
    for name in ("accuracy", "margin", "gain_chosen", "gain_rejected", "margin_stderr"):
        assert two[name] == pytest.approx(one[name], abs=1e-5)


def test_what_a_user_can_do_wrong(files, call, refused, dpo_run, reference, tmp_path):
    out = tmp_path / "x.json"
    for keys, says in (
        ({}, "give either --ref FILE.safetensors or --ref_model DIR"),
        ({"ref": "a", "ref_model": "b"}, "give either --ref"),
        ({"ref": reference, "beta": 0}, "key beta"),
        ({"ref": reference, "limit": 5}, "does not hold these pairs (it was made from"),
        ({"ref": tmp_path / "no.safetensors"}, "no such file"),
        ({"ref_model": tmp_path / "no"}, "is no folder and no known model"),
        ({"ref_model": dpo_run / "model", "data": files["sft"]}, "sft.jsonl:1"),
    ):
        refused("eval_reward", *reward_args(files, dpo_run, out, **keys), says=says)
        assert not out.exists()
    _, _, err = call("eval_reward", *reward_args(files, dpo_run, out, ref_model=dpo_run / "model"))
    assert "they are the same model" in err and json.loads(out.read_text())["equal"] == 16


def test_standard_errors_count_a_group_once():
    """Three copies of a pair in one group tell no more than one."""
    ids = np.zeros(2, dtype=np.int32)
    policy = torch.randn(6, 2, generator=torch.Generator().manual_seed(0))
    single, _ = grade(policy, torch.zeros(6, 2), [Encoded(ids, [ids, ids], i, i) for i in range(6)], 0.5)
    tripled = [Encoded(ids, [ids, ids], i, i // 3) for i in range(18)]
    grouped, _ = grade(policy.repeat_interleave(3, 0), torch.zeros(18, 2), tripled, 0.5)
    for name in ("accuracy", "margin", "gain_chosen"):
        assert grouped[name] == pytest.approx(single[name])
        assert grouped[f"{name}_stderr"] == pytest.approx(single[f"{name}_stderr"])
