"""The KL that dpo.py estimates as it trains, and the choice of weights by a reward."""

import json
import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from data.encode import Encoded
from data.tokenizer import get
from runtime.build import build_model
from runtime.distributed import Compute
from runtime.drift import Drift
from runtime.keys import ModelKeys
from runtime.score import texts_of, written
from tests.chats import tokenizer_folder
from tests.conftest import SCRATCH, dpo_args, flags

REWARD = "def words(prompt, completion):\n    return float(len(completion.split()))\n"


def validations(run) -> list[dict]:
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [r for r in lines if r["split"] == "val" and "kl" in r]


@pytest.mark.parametrize("lora", [False, True])
def test_the_kl_of_a_run_is_that_of_its_model(lora, files, sft_run, reference, call, tmp_path):
    """eval_reward.py finds the same on the same prompts, from the saved model and the one that the run began with."""
    (tmp_path / "reward.py").write_text(REWARD)
    keys = {"kl_prompts": 6, "lr": 0.01, "max_steps": 4, "eval_every": 4, "save_every": 0}
    keys |= {"lora_rank": 4, "ref": None} if lora else {}
    assert call("dpo", *dpo_args(files, sft_run, reference, tmp_path / "run", **keys))[0] == 0
    (last,) = validations(tmp_path / "run")
    assert last["kl"] > 0.01, "the start is not the model as it is now"
    prompts = dict.fromkeys(json.loads(line)["prompt"] for line in Path(files["val_pairs"]).read_text().splitlines())
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps({"prompt": p}) + "\n" for p in list(prompts)[:6]))
    named = {"model": tmp_path / "run/model", "ref_model": sft_run / "model", "prompts": tmp_path / "prompts.jsonl"}
    named |= {"reward": f"{tmp_path / 'reward.py'}:words", "n": 4, "max_new_tokens": 64, "out": tmp_path / "reward.json"}
    assert call("eval_reward", *flags(**named))[0] == 0
    assert last["kl"] == pytest.approx(json.loads((tmp_path / "reward.json").read_text())["kl"], abs=1e-4)


@pytest.mark.parametrize("max_kl", [1e9, 1e-9])
def test_weights_are_kept_by_reward_where_the_kl_allows(max_kl, files, sft_run, reference, call, tmp_path):
    """The best loss is the last here, the best reward is not; beyond max_kl no weights are kept by reward."""
    (tmp_path / "reward.py").write_text("calls = []\ndef fading(prompt, text):\n    calls.append(1)\n    return -len(calls)\n")
    keys = {"kl_prompts": 2, "reward": f"{tmp_path / 'reward.py'}:fading", "max_kl": max_kl}
    keys |= {"lr": 1e-3, "max_steps": 6, "eval_every": 2, "save_every": 0}
    status, out, err = call("dpo", *dpo_args(files, sft_run, reference, tmp_path / "run", **keys))
    assert status == 0
    losses = [r["loss"] for r in validations(tmp_path / "run")]
    assert min(losses) == losses[-1]
    assert ("step 2, which validated best" in out) == (max_kl > 1)
    assert ("too far" in err) == ("every validation was beyond max_kl" in err) == (max_kl < 1)


@pytest.mark.parametrize(
    ("keys", "says"),
    [
        ({"reward": "reviews"}, "key reward: it is measured on what the model writes: give --kl_prompts"),
        ({"kl_prompts": 2, "val_data": None}, "key kl_prompts: there are no validation prompts"),
        ({"kl_prompts": 2, "reward": "joy"}, "'joy' is not reviews, sentiment, or a file"),
    ],
)
def test_bad_settings(keys, says, files, sft_run, reference, refused, tmp_path):
    refused("dpo", *dpo_args(files, sft_run, reference, tmp_path / "run", **keys), says=says)


def test_the_start_of_a_run_from_scratch_has_its_seed(files, call, tmp_path):
    keys = {"data": files["pairs"], "val_data": files["val_pairs"], "loss": "simpo", "kl_prompts": 2, "seed": 3, "lr": 0}
    args = flags(**SCRATCH, **keys, max_steps=1, batch_size=12, out_dir=tmp_path / "run")
    assert call("dpo", *args)[0] == 0
    assert validations(tmp_path / "run")[0]["kl"] == 0


def test_completions_end_at_the_token_that_is_asked_for(sft_run):
    """In a conversation that is the end of a turn, which need not be the end of a text."""
    toy = get("toy")
    model = build_model(ModelKeys(init_from=str(sft_run / "model")), toy, Compute(torch.device("cpu"), torch.float32))
    end = toy.encode(".")[0] if "." in toy.vocab else toy.encode(" the")[0]
    how = {"n": 8, "max_new_tokens": 20, "end": end, "seed": 0}
    (item,) = written(model, [toy.encode(" the red")], toy, Compute(torch.device("cpu"), torch.float32), **how)
    assert any(ids[-1] == end for ids in item.completions)
    assert all(end not in ids[:-1] and (ids[-1] == end or len(ids) == 20) for ids in item.completions)
    assert all(toy.decode([end]) not in text for text in texts_of(item, toy, end))


def test_a_completion_ends_as_those_of_the_data(tmp_path):
    chat = get(tokenizer_folder(tmp_path))
    assert chat.turn_end() != chat.eot
    cfg = SimpleNamespace(kl_prompts=1, reward="", lora_rank=1)
    model = SimpleNamespace(config=SimpleNamespace(block_size=128))
    for last, end in ((chat.turn_end(), chat.turn_end()), (chat.eot, chat.eot), (chat.encode("a")[0], chat.eot)):
        item = Encoded(np.array([5], np.int32), [np.array([6, last], np.int32)], 0, 0)
        assert Drift(cfg, [item], model, chat, None).end == end


@pytest.mark.slow
def test_two_processes_estimate_the_same(files, sft_run, reference, world, call, tmp_path):
    """Also where a reward is another one in each process: rank 0 decides."""
    (tmp_path / "reward.py").write_text("import random\ndef any_(prompt, text):\n    return random.random()\n")
    keys = {
        "reward": f"{tmp_path / 'reward.py'}:any_",
        "kl_prompts": 3,
        "lr": 0.01,
        "max_steps": 2,
        "eval_every": 2,
        "save_every": 0,
    }
    assert call("dpo", *dpo_args(files, sft_run, reference, tmp_path / "one", **keys))[0] == 0
    statuses, err = world(2, "dpo", dpo_args(files, sft_run, reference, tmp_path / "two", **keys))
    assert statuses == [0, 0], err
    one, two = (validations(tmp_path / name)[0]["kl"] for name in ("one", "two"))
    assert math.isfinite(one) and one == pytest.approx(two, abs=1e-3)
