"""The attention rule and its masks; log-probs at target tokens, in chunks, against plain log-softmax."""

import itertools
import os
import subprocess
import sys
from importlib.util import find_spec

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import logprobs
from data.batch import collate
from logprobs import Sequences, attend, attention_mask, logits_rows, may_attend, packed, target_logps
from lora import LoRA, LoRAConfig
from tests import tiny, varlen
from tests.tiny import CONFIG, example


@pytest.mark.parametrize("budget", [2**28, 0], ids=["kept", "computed again"])
@pytest.mark.parametrize("kind", ["plain", "adapter", "adapter on frozen weights"])
def test_target_logps_and_gradient(monkeypatch, budget, kind):
    """In chunks of three rows, with the logits kept or not: values and gradients of plain log-softmax, for x, the weights
    (not if they are frozen), and the adapter's A and B."""
    monkeypatch.setattr(logprobs, "LOGITS_BUDGET", budget)
    monkeypatch.setattr(logprobs, "LOGITS_CHUNK", 3 * 4 * 50)
    g = torch.Generator().manual_seed(0)
    x = torch.randn(10, 16, generator=g, requires_grad=True)
    w = torch.randn(50, 16, generator=g).requires_grad_("frozen" not in kind)
    target, weight = torch.randint(0, 50, (10,), generator=g), torch.randn(10, generator=g)
    lora, logits, inputs = None, x @ w.T, [x, w]
    if kind != "plain":
        lora = LoRA(16, 50, LoRAConfig(4, 2.0, ("head",)), 1)
        with torch.no_grad():
            lora.a.normal_(generator=g), lora.b.normal_(generator=g)
        logits, inputs = logits + 0.5 * x @ lora.a.T @ lora.b.T, [*inputs, lora.a, lora.b]
    got = target_logps(x, w, target, lora)
    want = F.log_softmax(logits, -1).gather(1, target[:, None])[:, 0]
    torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-5)
    inputs = [p for p in inputs if p.requires_grad]
    ours, theirs = (torch.autograd.grad(value, inputs, weight) for value in (got, want))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("adapter", [False, True])
def test_logits_are_never_whole(monkeypatch, adapter):
    """No tensor of vocabulary width has more rows than a chunk, in forward or backward."""
    monkeypatch.setattr(logprobs, "LOGITS_BUDGET", 0)
    monkeypatch.setattr(logprobs, "LOGITS_CHUNK", 4 * 4 * CONFIG.vocab_size)
    rows = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor) and out.dim() >= 2 and out.shape[-1] == CONFIG.vocab_size:
                rows.append(out.numel() // CONFIG.vocab_size)
            return out

    model = tiny.gpt()
    if adapter:
        tiny.with_lora(model, rank=3)
    batch = collate([[example(np.random.default_rng(0), 5, 12, 12)]])
    with Watch():
        model(batch).sum().backward()
    sizes = [n for n in rows if n not in (CONFIG.n_embd, 3)]  # transposed: the weight, and the adapter's B
    assert len(sizes) > 12 and max(sizes) == 4


@pytest.mark.slow
@pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed: it comes with torch for CUDA")
def test_kernels_equal_torch_in_tritons_interpreter():
    command = [sys.executable, "-m", "tests.interpreted"]
    done = subprocess.run(command, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.gpu
def test_gpu_kernels_equal_torch():
    from tests.interpreted import check

    check("cuda")


def test_rows_of_logits_on_a_gpu():
    """A gibibyte in whole tiles at once; a sixteenth of the card's memory is kept."""
    assert logits_rows(50_257, 80 * 2**30) == (26_706, 5120) and logits_rows(2_000_000, 80 * 2**30) == (671, 256)
    assert logits_rows(50_257, 8 * 2**30) == (2670, 5120)
    assert logits_rows(50_257, 0) == (1335, 333)


def test_the_mask_is_the_rule():
    rng = np.random.default_rng(0)
    rows = [[example(rng, 5, 3, 4), example(rng, 2, 2)], [example(rng, 6, 1, 1)]]
    batch = collate(rows, multiple=16)
    mask = attention_mask(batch.example, batch.branch)
    assert set(mask.unique().tolist()) == {0.0, -float("inf")}
    mask = mask == 0
    pairs = itertools.product(range(2), range(16), range(16))
    rule = [may_attend(batch.example, batch.branch, *pair) for pair in pairs]
    assert mask.shape == (2, 1, 16, 16) and torch.equal(mask.flatten(), torch.stack(rule))
    assert mask.any(-1).all(), "a row of the mask is empty: softmax would give nan"
    # by hand, row 0: prompt 0-4, completion one 5-6 (3 tokens, 2 fed), completion two 7-9, then the second example
    assert mask[0, 0, 8].nonzero()[:, 0].tolist() == [0, 1, 2, 3, 4, 7, 8]
    assert mask[0, 0, 12].nonzero()[:, 0].tolist() == [10, 11, 12]


ROWS = {  # the lengths of each example's prompt and completions
    "packed, with padding": [[(5, 3, 4), (2, 2)], [(6, 1, 1, 5)], []],
    "one flat row": [[(1, 1), (1, 1, 2), (9, 4, 3, 2, 6), (3, 7)]],
    "one completion a prompt": [[(5, 3), (2, 2)], [(6, 4)]],
    "nothing": [],
}


@pytest.mark.parametrize("rows", ROWS.values(), ids=ROWS)
@pytest.mark.parametrize("kv_heads", [4, 2])
def test_sequences_are_the_rule(rows, kv_heads):
    """In float64, values and gradients, with torch's own varlen_attn around a kernel for the CPU."""
    varlen.on_cpu()
    rng, g = np.random.default_rng(0), torch.Generator().manual_seed(0)
    batch = collate([[example(rng, *lengths) for lengths in row] for row in rows], multiple=8)
    (n, length), heads = batch.tokens.shape, (4, kv_heads, kv_heads)
    q, k, v, weight = (torch.rand(n, h, length, 8, generator=g, dtype=torch.float64) - 0.5 for h in (*heads, 4))
    inputs = [t.requires_grad_() for t in (q, k, v)]
    sequences = Sequences(batch)
    assert (sequences.keys is None) == all(len(lengths) < 3 for row in rows for lengths in row)
    got = sequences.layer(0)(q, k, v)
    row, at = torch.arange(n).view(-1, 1, 1, 1), torch.arange(length)
    seen = may_attend(batch.example, batch.branch, row, at[:, None], at)
    k, v = (t.repeat_interleave(4 // kv_heads, 1) for t in (k, v))
    want = (q @ k.mT / 8**0.5).masked_fill(~seen, -float("inf")).softmax(-1) @ v
    assert (got - want).abs().max() < 1e-15
    ours, theirs = (torch.autograd.grad(value, inputs, weight) for value in (got, want))
    assert max((a - b).abs().max() for a, b in zip(ours, theirs, strict=True)) < 1e-15


@pytest.mark.parametrize("family", [tiny.gpt, tiny.llama])
def test_models_without_a_mask_give_the_same(family, monkeypatch):
    varlen.on_cpu()
    model = family()
    rng = np.random.default_rng(0)
    batch = collate([[example(rng, 9, 4, 6), example(rng, 3, 2, 8)], [example(rng, 5, 5)]])
    want = model(batch)
    monkeypatch.setattr(logprobs, "is_flash", lambda device: True)
    assert isinstance(packed(batch, 8), Sequences) and not isinstance(packed(batch, 12), Sequences)
    torch.testing.assert_close(model(batch), want, atol=1e-5, rtol=1e-5)


def test_attention_with_fewer_key_value_heads():
    """Each key/value head serves its group of query heads."""
    q, k, v = (torch.randn(2, heads, 5, 8, generator=torch.Generator().manual_seed(heads)) for heads in (4, 2, 2))
    weights = (q @ k.repeat_interleave(2, 1).mT / 8**0.5).masked_fill(torch.ones(5, 5).triu(1).bool(), -float("inf"))
    torch.testing.assert_close(attend(q, k, v, None), weights.softmax(-1) @ v.repeat_interleave(2, 1))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gpu_rows_equal_those_of_a_cpu(dtype):
    """Packed rows, with a mask or as sequences, against the CPU's; bfloat16 within 2e-2 nats a token."""
    rng, model = np.random.default_rng(0), tiny.gpt(n_embd=128, block_size=256)
    items = [example(rng, 40, 30, 50), example(rng, 100, 20, 9), example(rng, 7, 90, 3)]
    batch = collate([items[:2], items[2:]], multiple=128)
    with torch.no_grad():
        want = model(batch)
        model.cuda()
        with torch.autocast("cuda", dtype=dtype, enabled=dtype != torch.float32):
            got = model(batch.to(torch.device("cuda"))).cpu()
    assert (got - want).abs().max() < (1e-3 if dtype == torch.float32 else 2e-2)


@pytest.mark.parametrize("kv_heads", [1, 2])
def test_attention_in_parts_of_the_queries_equals_the_rule(monkeypatch, kv_heads):
    """Long rows look in parts of 3 queries, the last one shorter: values and gradients of softmax over all keys, and no part
    is given the keys behind it."""
    monkeypatch.setattr(logprobs, "QUERIES", 3)
    rng, g = np.random.default_rng(0), torch.Generator().manual_seed(0)
    batch = collate([[example(rng, 5, 3, 4)], [example(rng, 2, 2), example(rng, 1, 3)]])
    mask = attention_mask(batch.example, batch.branch)
    length, looked = mask.shape[-1], []
    assert length == 10
    qkv = [torch.randn(2, heads, length, 8, generator=g, requires_grad=True) for heads in (2, kv_heads, kv_heads)]

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if "attention" in str(func):
                looked.append((args[0].size(2), args[1].size(2)))
            return func(*args, **(kwargs or {}))

    with Watch():
        got = attend(*qkv, mask)
    assert looked == [(3, 3), (3, 6), (3, 9), (1, 10)]
    q, k, v = qkv[0], *(t.repeat_interleave(2 // kv_heads, 1) for t in qkv[1:])
    want = (q @ k.mT / 8**0.5 + mask).softmax(-1) @ v
    torch.testing.assert_close(got, want)
    weight = torch.randn(got.shape, generator=g)
    for ours, theirs in zip(*(torch.autograd.grad(y, qkv, weight) for y in (got, want)), strict=True):
        torch.testing.assert_close(ours, theirs)
