"""The attention rule and its masks; log-probs at target tokens, in chunks, against plain log-softmax."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import logprobs
from data.batch import collate
from logprobs import attend, attention_mask, may_attend, target_logps
from lora import LoRA, LoRAConfig
from tests import tiny
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


def test_mask_on_a_cpu_is_the_rule_that_flex_attention_gets():
    from torch.nn.attention.flex_attention import create_mask

    rng = np.random.default_rng(0)
    rows = [[example(rng, 5, 3, 4), example(rng, 2, 2)], [example(rng, 6, 1, 1)]]
    batch = collate(rows, multiple=16)
    mask = attention_mask(batch.example, batch.branch)
    assert set(mask.unique().tolist()) == {0.0, -float("inf")}
    mask = mask == 0
    rule = create_mask(lambda b, h, q, k: may_attend(batch.example, batch.branch, b, q, k), 2, 1, 16, 16, device="cpu")
    assert mask.shape == (2, 1, 16, 16) and torch.equal(mask, rule)
    assert mask.any(-1).all(), "a row of the mask is empty: softmax would give nan"
    # by hand, row 0: prompt 0-4, completion one 5-6 (3 tokens, 2 fed), completion two 7-9, then the second example
    assert mask[0, 0, 8].nonzero()[:, 0].tolist() == [0, 1, 2, 3, 4, 7, 8]
    assert mask[0, 0, 12].nonzero()[:, 0].tolist() == [10, 11, 12]


def test_attention_with_fewer_key_value_heads():
    """Each key/value head serves its group of query heads."""
    q, k, v = (torch.randn(2, heads, 5, 8, generator=torch.Generator().manual_seed(heads)) for heads in (4, 2, 2))
    weights = (q @ k.repeat_interleave(2, 1).mT / 8**0.5).masked_fill(torch.ones(5, 5).triu(1).bool(), -float("inf"))
    torch.testing.assert_close(attend(q, k, v, None), weights.softmax(-1) @ v.repeat_interleave(2, 1))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gpu_flex_rows_equal_the_mask_on_a_cpu(dtype):
    """FlexAttention rows against the CPU path; bfloat16 within 2e-2 nats a token."""
    rng, model = np.random.default_rng(0), tiny.gpt(n_embd=128, block_size=256)
    items = [example(rng, 40, 30, 50), example(rng, 100, 20, 9), example(rng, 7, 90, 3)]
    batch = collate([items[:2], items[2:]], multiple=128)
    with torch.no_grad():
        want = model(batch)
        model.cuda()
        with torch.autocast("cuda", dtype=dtype, enabled=dtype != torch.float32):
            got = model(batch.to(torch.device("cuda"))).cpu()
    assert (got - want).abs().max() < (1e-3 if dtype == torch.float32 else 2e-2)
