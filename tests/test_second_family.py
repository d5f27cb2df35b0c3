"""The door for a model family is open: one that is not GPT-2 goes through every stage."""

import json

import pytest
import torch

import adapters
import generate
import weights
from data.batch import collate
from data.encode import Encoded
from data.tokenizer import get
from losses import completion_sums
from tests.conftest import dpo_args, flags, metrics, ref_args, sft_args
from tests.second_family import Config, Model

SCRATCH = dict.fromkeys(("n_layer", "n_head", "n_embd", "block_size"))


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """The folder of a random model of the family."""
    folder = tmp_path_factory.mktemp("family") / "base"
    config = Config(vocab_size=get("toy").size)
    weights.save_tensors(config, weights.empty(config).initial_weights(0), get("toy"), folder)
    return folder


@pytest.fixture(scope="module")
def sft(base, files, world, tmp_path_factory):
    """Its run of SFT in one process."""
    out = tmp_path_factory.mktemp("family") / "sft"
    codes, err = world(1, "sft", sft_args(files, out, **SCRATCH, init_from=base, tokenizer=None))
    assert codes == [0], err
    return out


def close(a, b):
    assert len(a) == len(b)
    for x, y in zip(a, b, strict=True):
        assert x["loss"] == pytest.approx(y["loss"], abs=1e-4) and x["step"] == y["step"]


def test_packed_rows_equal_plain_sequences(base):
    model = weights.load(base)
    items = [
        Encoded(torch.arange(3, 3 + p).numpy(), [torch.arange(9, 9 + c).numpy() for c in lengths], n, n)
        for n, (p, lengths) in enumerate([(4, (3, 5)), (7, (1, 2, 6))])
    ]
    batch = collate([items])
    sums = iter(completion_sums(model(batch), batch.completion, batch.n_completions))
    for item in items:
        for completion in item.completions:
            ids = torch.tensor([*item.prompt, *completion])[None]
            logps = model.logits(ids[:, :-1]).log_softmax(-1).gather(2, ids[:, 1:, None])[0, :, 0]
            torch.testing.assert_close(next(sums), logps[len(item.prompt) - 1 :].sum())


def test_greedy_decoding_equals_whole_forwards(base):
    model = weights.load(base)
    prompts = [[5, 6, 7], [8], [9, 10, 11, 12, 13]]
    written = generate.greedy(model, prompts, 12, stop=-1)
    for prompt, tokens in zip(prompts, written, strict=True):
        ids = list(prompt)
        for token in tokens:
            assert model.logits(torch.tensor([ids]))[0, -1].argmax() == token
            ids.append(token)
        assert len(tokens) == 12


def test_sft_learns_and_two_processes_give_the_same_curve(base, sft, files, world, tmp_path):
    curve = metrics(sft)
    assert curve[-1]["loss"] < 0.9 * curve[0]["loss"]
    model = weights.load(sft / "model")
    assert isinstance(model, Model) and not torch.equal(model.blocks[0].q.weight, weights.load(base).blocks[0].q.weight)
    args = sft_args(files, tmp_path / "two", **SCRATCH, init_from=base, tokenizer=None, replicate=1, dropout=0)
    codes, err = world(2, "sft", args)
    assert codes == [0, 0], err
    codes, err = world(1, "sft", sft_args(files, tmp_path / "one", **SCRATCH, init_from=base, tokenizer=None, dropout=0))
    assert codes == [0], err
    close(metrics(tmp_path / "one"), metrics(tmp_path / "two"))


def test_a_resumed_run_equals_an_unbroken_one(base, sft, files, world, tmp_path):
    args = sft_args(files, tmp_path / "run", **SCRATCH, init_from=base, tokenizer=None)
    codes, err = world(1, "sft", args, limits={0: 30_000})  # too little room for a second checkpoint, as on a full disk
    assert codes == [2], err
    codes, err = world(1, "sft", args)
    assert codes == [0], err
    assert metrics(tmp_path / "run") == metrics(sft)


def test_reference_dpo_lora_and_sampling(sft, files, call, tmp_path):
    status, _, err = call("precompute_ref", *ref_args(files, sft, tmp_path / "ref.safetensors"))
    assert status == 0, err
    status, _, err = call("dpo", *dpo_args(files, sft, tmp_path / "ref.safetensors", tmp_path / "dpo"))
    assert status == 0, err
    curve = metrics(tmp_path / "dpo")
    assert curve[0]["loss"] == pytest.approx(0.6931, abs=1e-3) and curve[-1]["loss"] < curve[0]["loss"]

    status, _, err = call("dpo", *dpo_args(files, sft, None, tmp_path / "lora", lora_rank=2, lr=1e-2))
    assert status == 0, err
    adapter = json.loads((tmp_path / "lora" / "adapter" / "adapter_config.json").read_text())
    assert adapter["target_modules"] == ["q", "k", "v", "o", "up", "down", "head"] and not adapter["fan_in_fan_out"]
    merged, adapted = weights.load(tmp_path / "lora" / "model"), adapters.load(str(tmp_path / "lora" / "adapter"))
    torch.testing.assert_close(merged.state_dict(), adapted.state_dict())
    assert metrics(tmp_path / "lora")[-1]["loss"] < 0.69

    (tmp_path / "prompts.jsonl").write_text('{"prompt": "Today Tom"}\n')
    keys = {"model": tmp_path / "lora" / "adapter", "prompts": tmp_path / "prompts.jsonl", "out": tmp_path / "out.jsonl"}
    status, _, err = call("sample", *flags(**keys, n=3, max_new_tokens=5))
    assert status == 0, err
    assert len(json.loads((tmp_path / "out.jsonl").read_text())["completions"]) == 3
    status, out, err = call("eval_mcq", "--model", tmp_path / "dpo" / "model", "--data", files["mcq"])
    assert status == 0 and json.loads(out.splitlines()[-1])["n"] == 48, err
