"""Run folders read back, and the steps where a loss jumped."""

import json
from pathlib import Path

import numpy as np
import pytest

from base.errors import UserError
from report import runs

RECORDS = [{"step": step, "split": "train", "loss": 2.0} for step in range(1, 6)]


@pytest.mark.parametrize("tail", ["", '{"step": 6, "spl', '{"step": 6, "spl\n', "\n", "12", '{"step": 6}'])
def test_a_torn_last_line_is_left_out(folder, tail):
    assert runs.read_run(folder("r", RECORDS, tail=tail)) == RECORDS


def test_a_whole_last_line_needs_no_newline(folder):
    assert runs.read_run(folder("r", RECORDS[:4], tail=json.dumps(RECORDS[4]))) == RECORDS


@pytest.mark.parametrize("line", ["{", "", '{"step": 1}', '{"step": "1", "split": "val"}', '{"step": 1, "split": 0}'])
def test_a_damaged_line_is_named(folder, line):
    with pytest.raises(UserError, match=r"metrics\.jsonl:6: "):
        runs.read_run(folder("r", RECORDS, tail=f"{line}\n{json.dumps(RECORDS[0])}\n"))


def test_a_folder_without_records(folder, tmp_path):
    with pytest.raises(UserError, match=r"cannot read .*metrics\.jsonl: No such file"):
        runs.read_run(tmp_path)
    with pytest.raises(UserError, match="no records yet"):
        runs.read_run(folder("torn", [], tail='{"st'))


def test_series_leaves_out_what_is_no_number():
    losses = [2.0, float("nan"), None, "text", 3, float("inf"), 1.7e308, True]
    records = [{"step": step, "split": "train", "loss": loss} for step, loss in enumerate(losses)]
    records += [{"step": 6, "split": "val", "loss": 1.0}, {"step": 7, "split": "train"}]
    steps, values = runs.series(records, "train", "loss")
    assert steps.tolist() == [0, 4] and values.tolist() == [2, 3]
    assert [len(a) for a in runs.series([], "train", "loss")] == [0, 0]


@pytest.mark.parametrize("settings", ["", "lr = 1e-3\n", 'beta = 0.25\nloss = "simpo"\n', 'beta = 0.25\nloss = "sigmoid"\n'])
def test_log_prob_gains_are_rewards_over_beta(folder, settings):
    rewards = [{**r, "rewards/chosen": 0.5, "rewards/rejected": -r["step"] / 10} for r in RECORDS]
    found = runs.read_run(folder("r", rewards, settings))
    if "sigmoid" not in settings:
        assert found == rewards, "SFT has no gains, nor has a loss without a reference"
    else:
        assert [r["gain/chosen"] for r in found] == [2.0] * 5
        assert [r["gain/rejected"] for r in found] == pytest.approx([-0.4, -0.8, -1.2, -1.6, -2.0])


def test_the_model_that_a_chain_of_runs_began_with(folder):
    """As far as it can be read: a damaged settings file of another run is no reason to show nothing."""
    first = folder("first", RECORDS, 'init_from = "gpt2"\n')
    second = folder("second", RECORDS, f'init_from = "{first}/checkpoints/step_5"\n')
    assert runs.model_of(f"{second}/model") == "gpt2"
    Path(first, "config.toml").write_text("init_from = ")
    assert runs.model_of(f"{second}/model") == "step_5"


@pytest.mark.parametrize("seed", range(5))
def test_jumps(losses, seed):
    assert runs.jumps(losses(seed=seed)) == [], "noise and a falling loss are no jump"
    assert runs.jumps(losses(seed=seed, jump=3.0, lasting=1)) == [], "nor is one hard batch"
    ((step, before, after),) = runs.jumps(losses(seed=seed, jump=3.0))
    assert step == 151 and 1.5 < before < 2.5 < 4 < after
    assert runs.jumps(losses(seed=seed, jump=-1.0, lasting=150)) == [], "a fall is no jump"
    twice = losses(seed=seed, jump=3.0, at=80)
    for record in twice[220:230]:
        record["loss"] += 3
    assert [step for step, _, _ in runs.jumps(twice)] == [81, 221]


@pytest.mark.parametrize("seed", range(3))
def test_jumps_of_small_batches(losses, seed):
    """At batch 2 losses differ by half a nat from step to step: a lasting rise by 1.5 is seen, and none is made up."""
    noisy = losses(4000, seed=seed)
    for record, noise in zip(noisy, np.random.default_rng(seed).normal(0, 0.5, 4000), strict=True):
        record["loss"] += noise
    assert runs.jumps(noisy) == []
    for record in noisy[2000:2200]:
        record["loss"] += 1.5
    assert [abs(step - 2000) < 30 for step, *_ in runs.jumps(noisy)] == [True]


def test_jumps_of_short_and_flat_runs(losses):
    assert runs.jumps([]) == runs.jumps(losses(5, jump=9, at=3)) == []
    flat = [{"step": i, "split": "train", "loss": 0.6931} for i in range(30)]
    assert runs.jumps(flat + [{**r, "loss": 0.72} for r in flat]) == [], "DPO leaves ln 2"
