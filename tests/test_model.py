"""GPT-2 against transformers', and rows that share a prompt against one plain sequence a completion."""

import copy

import numpy as np
import pytest
import torch

import weights
from data.batch import collate
from losses import completion_sums
from model import GPT, SIZES, GPTConfig
from tests import tiny
from tests.tiny import example, plain_logps


@pytest.fixture(scope="module")
def gpt() -> GPT:
    return tiny.gpt()


@pytest.mark.parametrize("tied", [True, False])
def test_logits_equal_transformers(tied):
    transformers = pytest.importorskip("transformers")
    model = tiny.gpt(tied=tied)
    theirs = transformers.GPT2LMHeadModel(transformers.GPT2Config.from_dict(model.config.to_hf())).eval()
    state = {model.hf_name(n): (p.T if model.transposed(n) else p).clone() for n, p in model.named_parameters()}
    missing, unexpected = theirs.load_state_dict(state, strict=False)
    assert missing == (["lm_head.weight"] if tied else []) and not unexpected
    theirs.tie_weights()
    tokens = torch.randint(0, 101, (4, 48), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert (model.logits(tokens) - theirs(tokens).logits).abs().max() < 1e-4


def test_released_sizes():
    counts = [sum(p.numel() for p in weights.empty(GPTConfig(*size)).parameters()) for size in SIZES.values()]
    assert counts == [124_439_808, 354_823_168, 774_030_080, 1_557_611_200]


@pytest.mark.parametrize("packed", [False, True])
def test_shared_prompt_rows_equal_plain_sequences(gpt, packed):
    rng = np.random.default_rng(0)
    items = [example(rng, 7, 3, 5), example(rng, 1, 1, 1, 9, 2), example(rng, 20, 28, 1), example(rng, 4, 6)]
    batch = collate([items] if packed else [[item] for item in items], multiple=8)
    with torch.no_grad():
        got, want = gpt(batch), plain_logps(gpt, items)
    assert batch.tokens.shape[1] % 8 == 0 and len(got) == sum(i.completion_tokens for i in items)
    assert (got - want).abs().max() < 1e-4
    sums = completion_sums(got, batch.completion, batch.n_completions)
    assert sums.shape == (9,) and torch.allclose(sums[1], want[3:8].sum(), atol=1e-4)


def test_padding_changes_neither_log_probs_nor_gradients(gpt):
    """Rows and predicted tokens are padded on CUDA; the losses must see nothing of it."""
    rng, found = np.random.default_rng(1), []
    items = [example(rng, 7, 3, 6), example(rng, 20, 18), example(rng, 4, 6)]
    for multiple in (1, 128):
        batch, model = collate([items], multiple), copy.deepcopy(gpt)
        logps = model(batch)
        (logps * torch.linspace(-1, 1, len(logps))).sum().backward()
        found.append([logps, completion_sums(logps, batch.completion, 4), *(p.grad for p in model.parameters())])
    assert len(logps) == len(batch.completion) == 33 < len(batch.target) == 40
    for plain, padded in zip(*found, strict=True):
        torch.testing.assert_close(padded, plain, atol=1e-5, rtol=1e-4)


def test_plain_rows_take_the_causal_path(gpt):
    rng = np.random.default_rng(3)
    items = [example(rng, 9, 4), example(rng, 3, 8)]
    batch = collate([[i] for i in items])
    assert batch.plain and not collate([items]).plain
    with torch.no_grad():
        assert (gpt(batch) - plain_logps(gpt, items)).abs().max() < 1e-4


def test_rows_may_be_longer_than_the_context(gpt):
    """Six completions of 20 tokens behind a prompt of 20 make a row of 134 tokens for a model with 48 positions."""
    item = example(np.random.default_rng(1), 20, *[20] * 6)
    batch = collate([[item]])
    assert batch.tokens.shape == (1, 134) and batch.positions.max() == 38
    with torch.no_grad():
        assert (gpt(batch) - plain_logps(gpt, [item])).abs().max() < 1e-4


@pytest.mark.parametrize("recompute", [False, True])
def test_gradients_equal_plain_sequences(recompute):
    """With activation checkpointing, too."""
    rng, model, grads = np.random.default_rng(2), tiny.gpt().train(), []
    items = [example(rng, 9, 4, 6), example(rng, 3, 2, 8)]
    model.recompute = recompute
    for compute in (lambda: model(collate([items])), lambda: plain_logps(model, items)):
        model.zero_grad()
        compute().sum().backward()
        grads.append({n: p.grad.clone() for n, p in model.named_parameters()})
        model.recompute = False
    for name, g in grads[0].items():
        assert torch.allclose(g, grads[1][name], atol=1e-4, rtol=1e-4), name
