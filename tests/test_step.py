"""Whole optimizer steps of dpo.py and sft.py against TRL's trainers: same texts, same tiny random weights, float32, CPU."""

import json
import random

import pytest
import torch

import weights
from data import load
from data.encode import encode
from data.plan import epoch_order
from data.tokenizer import get
from data.toy import VOCAB
from tests import peers, tiny
from tests.conftest import flags, metrics

pytest.importorskip("trl")
METRICS = ["loss", "grad_norm", "rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies",
           "logps/chosen", "logps/rejected"]  # fmt: skip
BATCH, STEPS = 4, 3


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """Folders `policy` and `reference` (two random models, one tokenizer), and pairs of very unlike lengths as texts."""
    folder = tmp_path_factory.mktemp("step")
    tokenizer = get("toy")
    for seed, name in enumerate(("policy", "reference")):
        peers.gpt2_folder(folder / name, vocab_size=tokenizer.size, seed=seed)
        tokenizer.save(folder / name)
    rng = random.Random(0)
    words = [word for word in VOCAB if word.startswith(" ")]

    def text(most):
        return "".join(rng.choices(words, k=rng.randint(1, most)))

    pairs = [{"prompt": text(20), "chosen": text(40), "rejected": text(40)} for _ in range(BATCH * STEPS)]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(p) + "\n" for p in pairs))
    return folder, pairs


@pytest.fixture
def ours(call, work, tmp_path):
    """ours("dpo", key=value, …) runs a stage's three steps -> (the training records, the model)."""

    def run(stage: str, **settings):
        keys = {"init_from": work[0] / "policy", "data": work[0] / "pairs.jsonl", "out_dir": tmp_path / stage,
                "batch_size": BATCH, "device": "cpu", "schedule": "constant", "lr": 1e-4, "samples": 0}  # fmt: skip
        status, _, err = call(stage, *flags(**keys | settings))
        assert status == 0, err
        return [r for r in metrics(tmp_path / stage) if r["split"] == "train"], weights.load(tmp_path / stage / "model")

    return run


def in_our_order(rows: list[dict]) -> list[dict]:
    return [rows[i] for i in epoch_order(list(range(len(rows))), 0, 0)]


def theirs(trainer, watch, tmp_path):
    with peers.quiet():
        trainer.train()
        trainer.model.save_pretrained(tmp_path / "trl")
    return watch.logs, weights.load(tmp_path / "trl")


def close(records, logs, names, slack=1.0):
    """What the tolerances allow is what float32 knows."""
    assert len(records) == len(logs) == STEPS
    for record, log in zip(records, logs, strict=True):
        for name in names:
            # a reward is beta times a difference of sums near -100, known to some 1e-5
            absolute = 2e-5 if name.startswith("rewards") else 5e-6
            wanted = pytest.approx(log[name], rel=1e-5 * slack, abs=absolute * slack)
            assert record[name] == wanted, (name, record["step"])


def compare(records, logs, names, model, peer, start):
    """`start` is the model before training."""
    close(records, logs, names)
    peer, start = dict(peer.named_parameters()), dict(start.named_parameters())
    for name, p in model.named_parameters():
        q, before = peer[name], start[name]
        if name.endswith("qkv.bias"):  # softmax does not see the keys' bias: its gradient is rounding, and Adam magnifies it
            p, q, before = (torch.cat([x.chunk(3)[0], x.chunk(3)[2]]) for x in (p, q, before))
        torch.testing.assert_close(p, q, rtol=1e-5, atol=5e-6, msg=lambda m, name=name: f"{name}: {m}")
        assert (p - before).abs().max() > 1e-4, f"{name} has not moved"


CASES = {
    "one forward": ({}, {}),
    "micro-batches": ({"micro_tokens": 1}, {}),
    "packed rows": ({"row_len": 256}, {}),
    "rows and micro-batches": ({"row_len": 128, "micro_tokens": 128}, {}),
    "sft term": ({"sft_weight": 0.5, "micro_tokens": 1}, {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.5]}),
    "aot in micro-batches": ({"loss": "aot", "micro_tokens": 1}, {"loss_type": ["aot"]}),
    "ipo": ({"loss": "ipo", "beta": 0.3}, {"loss_type": ["ipo"], "beta": 0.3}),
    "no clipping, sgd": (
        {"optimizer": "sgd", "grad_clip": 0, "lr": 0.1},
        {"optim": "sgd", "max_grad_norm": 1e9, "learning_rate": 0.1},
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_dpo_steps_equal_trl(case, ours, call, work, tmp_path):
    """Three steps: loss, rewards, log-probs, gradient norm of each, and the parameters in the end."""
    from transformers import AutoModelForCausalLM

    our_settings, their_settings = CASES[case]
    folder, pairs = work
    made = {"init_from": folder / "reference", "data": folder / "pairs.jsonl", "out": tmp_path / "ref.safetensors"}
    assert call("precompute_ref", *flags(**made, device="cpu"))[0] == 0
    records, model = ours("dpo", ref=made["out"], allow_ref_mismatch="true", **our_settings)
    reference = AutoModelForCausalLM.from_pretrained(folder / "reference")
    trainer, watch = peers.dpo_trainer(
        folder / "policy", in_our_order(pairs), tmp_path / "o", ref_model=reference,
        **{"per_device_train_batch_size": BATCH, "learning_rate": 1e-4} | their_settings,
    )  # fmt: skip
    logs, peer = theirs(trainer, watch, tmp_path)
    assert max(log["grad_norm"] for log in logs) > 1  # the default clipping acted
    compare(records, logs, METRICS, model, peer, weights.load(folder / "policy"))


SFT_CASES = {  # our settings, how TRL splits the batch
    "one forward": ({}, 4),
    "micro-batches of unequal length": ({"micro_tokens": 1}, 1),
    "packed rows": ({"row_len": 200}, 2),
    "weight decay": ({"weight_decay": 50.0}, 4),  # times lr: half a per cent a step
}


LIKELIHOOD = {"sft_weight": 0.5, "loss": "cpo", "beta": 0.2}
FREE_CASES = {  # our settings, TRL's
    "cpo": (LIKELIHOOD, {"cpo_alpha": 0.5, "beta": 0.2}),
    "cpo, smoothed, in micro-batches": (
        LIKELIHOOD | {"label_smoothing": 0.1, "micro_tokens": 1},
        {"cpo_alpha": 0.5, "beta": 0.2, "label_smoothing": 0.1},
    ),
    "orpo": ({"loss": "orpo", "sft_weight": 1.0, "beta": 0.2}, {"beta": 0.2}),
    "orpo, packed rows": ({"loss": "orpo", "sft_weight": 1.0, "beta": 5.0, "row_len": 128, "micro_tokens": 128}, {"beta": 5.0}),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", FREE_CASES)
def test_steps_without_a_reference_equal_trl(case, ours, work, tmp_path, monkeypatch):
    """Three steps of CPO and ORPO: loss, likelihood, gradient norm of each, and the parameters in the end. TRL's ORPO takes the
    likelihood of prompt and completion, ours that of the completion: they are the same where prompts are empty. TRL puts a
    token that begins a text before each, as we do before empty ones only."""
    our_settings, their_settings = FREE_CASES[case]
    name, (folder, pairs) = our_settings["loss"], work
    if name == "orpo":
        pairs = [pair | {"prompt": ""} for pair in pairs]
        (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(p) + "\n" for p in pairs))
        our_settings = our_settings | {"data": tmp_path / "pairs.jsonl"}
    records, model = ours("dpo", **our_settings)
    settings = {"per_device_train_batch_size": BATCH, "learning_rate": 1e-4, "max_length": 128} | their_settings
    trainer, watch = peers.free_trainer(name, folder / "policy", in_our_order(pairs), tmp_path / "o", **settings)
    logs, peer = theirs(trainer, watch, tmp_path)
    names = [*METRICS, "nll_loss"] if name == "cpo" else ["loss", "grad_norm", "nll_loss"]  # TRL's ORPO: means over tokens
    compare(records, logs, names, model, peer, weights.load(folder / "policy"))


KTO_CASES = {  # our settings
    "one forward": {},
    "micro-batches": {"micro_tokens": 1},
    "packed rows": {"row_len": 256, "micro_tokens": 256},
    "weights": {"desirable_weight": 1.4, "undesirable_weight": 0.7, "beta": 0.3},
}


@pytest.mark.slow
@pytest.mark.parametrize("case", KTO_CASES)
def test_kto_steps_equal_trl(case, ours, call, work, tmp_path):
    """Three steps, each of all the data: then TRL, which lends completions within a batch, lends the same ones as we do. (The
    policy is the other tests' reference, which gives a KL estimate above 0.)"""
    from transformers import AutoModelForCausalLM

    folder, pairs = work
    rows = [{"prompt": p["prompt"], "completion": p["chosen"], "label": n % 3 > 0} for n, p in enumerate(pairs)]
    data = tmp_path / "unpaired.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    made = {"init_from": folder / "policy", "data": data, "out": tmp_path / "ref.safetensors"}
    assert call("precompute_ref", *flags(**made, device="cpu"))[0] == 0
    settings = {
        "init_from": folder / "reference",
        "loss": "kto",
        "data": data,
        "batch_size": len(rows),
        "epochs": STEPS,
    } | KTO_CASES[case]
    records, model = ours("dpo", ref=made["out"], allow_ref_mismatch="true", **settings)
    reference = AutoModelForCausalLM.from_pretrained(folder / "policy")
    same = {name: value for name, value in KTO_CASES[case].items() if name == "beta" or name.endswith("weight")}
    trainer, watch = peers.kto_trainer(
        folder / "reference", rows, tmp_path / "o", ref_model=reference, per_device_train_batch_size=len(rows),
        learning_rate=1e-4, num_train_epochs=STEPS, **same,
    )  # fmt: skip
    logs, peer = theirs(trainer, watch, tmp_path)
    assert max(log["kl"] for log in logs) > 1, "the KL estimate was 0"
    names = [name for name in METRICS if name != "rewards/accuracies"] + ["kl"]
    compare(records, logs, names, model, peer, weights.load(folder / "reference"))
    assert not [record for record in records if "rewards/accuracies" in record]


@pytest.mark.parametrize("case", SFT_CASES)
def test_sft_steps_equal_trl(case, ours, work, tmp_path):
    """The mean over the whole batch's completion tokens, however either side splits the batch up."""
    our_settings, per_forward = SFT_CASES[case]
    folder, pairs = work
    records, model = ours("sft", **our_settings)
    rows = [{"prompt": p["prompt"], "completion": p["chosen"]} for p in in_our_order(pairs)]
    trainer, watch = peers.sft_trainer(
        folder / "policy", rows, tmp_path / "o", per_device_train_batch_size=per_forward,
        gradient_accumulation_steps=BATCH // per_forward, learning_rate=1e-4,
        weight_decay=our_settings.get("weight_decay", 0.0),
    )  # fmt: skip
    logs, peer = theirs(trainer, watch, tmp_path)
    compare(records, logs, ["loss", "grad_norm"], model, peer, weights.load(folder / "policy"))


@pytest.mark.parametrize("start", ["peft's", "ours"])
def test_dpo_steps_with_adapters_equal_trl_and_peft(start, ours, work, tmp_path):
    """Both sides go on from one adapter, and it, as it starts, is the reference."""
    pytest.importorskip("peft")
    folder, (base, pairs) = tmp_path / "adapter", (work[0] / "policy", work[1])
    if start == "ours":  # q, k and v apart have more freedom fused: without them both train the same numbers
        model = tiny.with_lora(weights.load(base), targets=("attn.proj", "mlp.fc", "mlp.proj"))
        tiny.save_adapter(model, base, folder, get("toy"))
    else:
        peers.peft_adapter(base, folder, r=4, lora_alpha=8, target_modules=["c_attn", "c_proj", "c_fc"])
    records, model = ours("dpo", init_from=folder, lr=1e-3, lora_rank=4, micro_tokens=200, tokenizer="toy")
    trainer, watch = peers.dpo_trainer(
        base, in_our_order(pairs), tmp_path / "o", model=peers.peft_model(base, folder, trainable=True),
        per_device_train_batch_size=BATCH, learning_rate=1e-3,
    )  # fmt: skip
    with peers.quiet():
        trainer.train()
    close(records, watch.logs, METRICS, slack=2.0)
    assert max(abs(log["rewards/margins"]) for log in watch.logs) > 0.01
    tokens = torch.randint(0, get("toy").size, (3, 20), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(model.logits(tokens), trainer.model.eval()(tokens).logits, atol=1e-3, rtol=0)


def test_same_tokens_as_trl(work, tmp_path):
    """TRL tokenizes prompt and completion together and cuts them apart; here it must come to what we tokenize apart."""
    folder, pairs = work
    trainer, _ = peers.dpo_trainer(folder / "policy", pairs, tmp_path, precompute_ref_log_probs=False)
    items, _ = encode(load(str(folder / "pairs.jsonl"), "train", "preference"), get("toy"), 128, "drop")
    assert len(items) == len(trainer.train_dataset) == len(pairs)
    for item, row in zip(items, trainer.train_dataset, strict=True):
        assert [item.prompt.tolist(), *(c.tolist() for c in item.completions)] == [
            row["prompt_ids"], row["chosen_ids"], row["rejected_ids"]
        ]  # fmt: skip
