"""The one forward against transformers' GPT-2, and rows that share a prompt against one plain sequence a completion."""

import copy
from dataclasses import asdict

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import model as model_file
import weights
from data.encode import Encoded, collate
from losses import completion_sums
from model import GPT, GPTConfig, attention_mask, may_attend, target_logps

CONFIG = GPTConfig(n_layer=3, n_head=4, n_embd=32, block_size=48, vocab_size=101)


@pytest.fixture(scope="module")
def gpt() -> GPT:
    model = weights.load("scratch", seed=1, **asdict(CONFIG))
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())))
    return model.eval()


def example(rng, prompt: int, *completions: int) -> Encoded:
    def ids(n):
        return rng.integers(0, CONFIG.vocab_size, n).astype(np.int32)

    return Encoded(ids(prompt), [ids(c) for c in completions], 0, 0)


def plain_logps(gpt: GPT, item: Encoded) -> torch.Tensor:
    """Each completion as a sequence of its own, through the whole-logits path: (completion tokens,)."""
    out = []
    for c in item.completions:
        tokens = torch.from_numpy(np.concatenate([item.prompt, c])).long()[None]
        logps = gpt.logits(tokens)[0, :-1].log_softmax(-1)
        out.append(logps[len(item.prompt) - 1 :].gather(1, tokens[0, len(item.prompt) :, None])[:, 0])
    return torch.cat(out)


def test_logits_equal_transformers(gpt):
    transformers = pytest.importorskip("transformers")
    theirs = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            vocab_size=101, n_positions=48, n_embd=32, n_layer=3, n_head=4, attn_pdrop=0, embd_pdrop=0, resid_pdrop=0
        )
    ).eval()
    from weights import hf_name, transposed

    state = {hf_name(n): (p.T if transposed(n) else p).clone() for n, p in gpt.state_dict().items()}
    theirs.transformer.load_state_dict(state)  # the head is tied
    tokens = torch.randint(0, 101, (4, 48), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert (gpt.logits(tokens) - theirs(tokens).logits).abs().max() < 1e-4


@pytest.mark.parametrize("packed", [False, True])
def test_shared_prompt_rows_equal_plain_sequences(gpt, packed):
    rng = np.random.default_rng(0)
    items = [example(rng, 7, 3, 5), example(rng, 1, 1, 1, 9, 2), example(rng, 20, 28, 1), example(rng, 4, 6)]
    rows = [items] if packed else [[item] for item in items]
    batch = collate(rows, multiple=8)
    with torch.no_grad():
        got, want = gpt(batch), torch.cat([plain_logps(gpt, item) for item in items])
    assert batch.tokens.shape[1] % 8 == 0 and len(got) == sum(i.completion_tokens for i in items)
    assert (got - want).abs().max() < 1e-4
    sums = completion_sums(got, batch.completion, batch.n_completions)
    assert sums.shape == (9,) and torch.allclose(sums[1], want[3:8].sum(), atol=1e-4)
    assert batch.completion_lengths.tolist() == [3, 5, 1, 1, 9, 2, 28, 1, 6]


def test_rows_may_be_longer_than_the_context(gpt):
    """Six completions of 20 tokens behind a prompt of 20 make a row of 134 tokens for a model with 48 positions."""
    item = example(np.random.default_rng(1), 20, *[20] * 6)
    batch = collate([[item]])
    assert batch.tokens.shape == (1, 134) and batch.positions.max() == 38
    with torch.no_grad():
        assert (gpt(batch) - plain_logps(gpt, item)).abs().max() < 1e-4


def test_gradients_equal_plain_sequences(gpt):
    rng = np.random.default_rng(2)
    items = [example(rng, 9, 4, 6), example(rng, 3, 2, 8)]
    grads = []
    for loss in (lambda: gpt(collate([items])).sum(), lambda: sum(plain_logps(gpt, i).sum() for i in items)):
        gpt.zero_grad()
        loss().backward()
        grads.append({n: p.grad.clone() for n, p in gpt.named_parameters()})
    for name, g in grads[0].items():
        assert torch.allclose(g, grads[1][name], atol=1e-4, rtol=1e-4), name
    gpt.zero_grad()


def test_plain_rows_take_the_causal_path(gpt):
    rng = np.random.default_rng(3)
    items = [example(rng, 9, 4), example(rng, 3, 8)]
    batch = collate([[i] for i in items])
    assert batch.plain and not collate([items]).plain
    with torch.no_grad():
        assert (gpt(batch) - torch.cat([plain_logps(gpt, i) for i in items])).abs().max() < 1e-4


@pytest.mark.parametrize("budget", [2**28, 0], ids=["kept", "computed again"])
def test_target_logps_and_gradient(monkeypatch, budget):
    """In chunks of three rows, with the probabilities kept or not: value and gradients of plain log-softmax."""
    monkeypatch.setattr(model_file, "LOGITS_BUDGET", budget)
    monkeypatch.setattr(model_file, "LOGITS_CHUNK", 3 * 4 * 50)
    g = torch.Generator().manual_seed(0)
    x = torch.randn(10, 16, generator=g, requires_grad=True)
    w = torch.randn(50, 16, generator=g, requires_grad=True)
    target, weight = torch.randint(0, 50, (10,), generator=g), torch.randn(10, generator=g)
    got = target_logps(x, w, target)
    want = F.log_softmax(x @ w.T, -1).gather(1, target[:, None])[:, 0]
    assert torch.allclose(got, want, atol=1e-5)
    ours = torch.autograd.grad(got, (x, w), weight)
    theirs = torch.autograd.grad(want, (x, w), weight)
    assert all(torch.allclose(a, b, atol=1e-4) for a, b in zip(ours, theirs, strict=True))


def test_logits_are_never_whole(gpt, monkeypatch):
    """No tensor of vocabulary width has more rows than a chunk, in forward or backward."""
    monkeypatch.setattr(model_file, "LOGITS_BUDGET", 0)
    monkeypatch.setattr(model_file, "LOGITS_CHUNK", 4 * 4 * CONFIG.vocab_size)
    from torch.utils._python_dispatch import TorchDispatchMode

    rows = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor) and out.dim() >= 2 and out.shape[-1] == CONFIG.vocab_size:
                rows.append(out.numel() // CONFIG.vocab_size)
            return out

    batch = collate([[example(np.random.default_rng(0), 5, 12, 12)]])
    with Watch():
        gpt(batch).sum().backward()
    gpt.zero_grad()
    sizes = [n for n in rows if n != CONFIG.n_embd]  # (n_embd, vocab) is the transposed weight
    assert len(sizes) > 12 and max(sizes) == 4


def test_flex_rule_is_the_boolean_mask():
    """The function that FlexAttention gets, evaluated point by point, against the mask of the CPU path."""
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


def test_generate_equals_transformers(gpt, tmp_path):
    """Greedy, prompts of unlike length in one batch, some stopping early, some at the end of the context."""
    transformers = pytest.importorskip("transformers")
    import weights
    from data.tokenizer import get

    toy = get("toy")
    small = weights.load("scratch", seed=3, n_layer=2, n_head=2, n_embd=32, block_size=24, vocab_size=toy.size)
    with torch.no_grad():
        small.wte.weight.mul_(20)
    weights.save(small, toy, tmp_path / "model")
    theirs = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "model").eval()
    rng = np.random.default_rng(0)
    prompts = [rng.integers(0, toy.size, n).tolist() for n in (1, 5, 9, 20, 23, 24, 3)]
    free = small.generate(prompts, 30, stop=-1)
    assert [len(p) + len(o) for p, o in zip(prompts, free, strict=True)] == [25] * len(prompts)  # the last one is not fed
    stop = free[1][2]
    for prompt, got in zip(prompts, small.generate(prompts, 8, stop), strict=True):
        tokens = list(prompt)
        for _ in range(8):
            if len(tokens) > 24:
                break
            with torch.no_grad():
                token = theirs(torch.tensor([tokens])).logits[0, -1].argmax().item()
            if token == stop:
                break
            tokens.append(token)
        assert got == tokens[len(prompt) :]
    assert small.training


def test_generate_does_not_read_unwritten_memory(gpt, monkeypatch):
    """Unwritten memory may hold nan; it must not change what is written."""
    prompts = [[1, 2, 3], [4, 5, 6, 7, 8, 9, 10]]
    want = gpt.generate(prompts, 20, stop=-1)
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda self, shape: self.new_full(shape, float("nan")))
    monkeypatch.setattr(torch, "empty", lambda *shape, **kw: torch.full(shape, float("nan"), **kw))
    assert gpt.generate(prompts, 20, stop=-1) == want


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gpu_flex_rows_equal_the_boolean_mask(dtype):
    """On CUDA: FlexAttention rows against the CPU path; bfloat16 within 2e-2 a token."""
    rng = np.random.default_rng(0)
    config = GPTConfig(n_layer=3, n_head=4, n_embd=128, block_size=256, vocab_size=101)
    model = weights.load("scratch", seed=1, **asdict(config)).eval()
    items = [example(rng, 40, 30, 50), example(rng, 100, 20, 9), example(rng, 7, 90, 3)]
    batch = collate([items[:2], items[2:]], multiple=128)
    with torch.no_grad():
        want = model(batch)
        model.cuda()
        with torch.autocast("cuda", dtype=dtype, enabled=dtype != torch.float32):
            got = model(batch.to(torch.device("cuda"))).cpu()
    assert (got - want).abs().max() < (1e-3 if dtype == torch.float32 else 2e-2)


@pytest.mark.parametrize("completions", [1, 3])
def test_blocks_compile_in_one_piece(gpt, completions):
    """Without a break in the graph, also for rows of other lengths, plain ones and those with a mask."""
    rng = np.random.default_rng(0)
    model = copy.deepcopy(gpt)
    for block in model.blocks:
        block.forward = torch.compile(block.forward, dynamic=True, fullgraph=True, backend="eager")
    for length in (9, 14):
        batch = collate([[example(rng, length, *[5] * completions)]])
        assert batch.plain == (completions == 1)
        torch.testing.assert_close(model(batch), gpt(batch))


@pytest.mark.gpu
def test_gpu_compiled_blocks_equal_eager():
    rng = np.random.default_rng(0)
    model = weights.load("scratch", seed=1, n_layer=2, n_head=4, n_embd=128, block_size=256, vocab_size=101).cuda()
    batch = collate([[example(rng, 40, 30, 50)]], multiple=128).to(torch.device("cuda"))
    want = model(batch)
    for block in model.blocks:
        block.compile(dynamic=True)
    assert (model(batch) - want).abs().max() < 1e-3
