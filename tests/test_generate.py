"""Greedy completions against transformers', draws against their distribution, and samples that do not depend on the batch."""

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import generate
import weights
from generate import draw, exponential_noise, greedy, lay_out, noise_keys, stream
from llama import Llama, LlamaConfig
from model import GPT
from tests import peers, tiny

DRAWS = [{}, {"top_k": 7}, {"top_p": 0.8}, {"top_k": 30, "top_p": 0.7, "temperature": 1.7}]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A model whose tokens differ much in likelihood, as transformers saves it."""
    pytest.importorskip("transformers")
    return peers.gpt2_folder(tmp_path_factory.mktemp("generate"), n_head=4)


@pytest.fixture(scope="module")
def gpt(folder) -> GPT:
    return weights.load(folder).eval()


def prompts(n: int, most: int, size: int = 97) -> dict[int, list[int]]:
    rng = np.random.default_rng(0)
    return {i: rng.integers(0, size, rng.integers(1, most + 1)).tolist() for i in range(n)}


def collect(model: GPT, given: dict, new: int = 20, stop: int = -1, **how) -> dict[tuple[int, int], list[int]]:
    return {(i, j): ids for i, j, ids in stream(model, given, new, stop, **how)}


# --- prefill, decode, the batch ----------------------------------------------------------------------------------------


def test_greedy_equals_transformers(folder, gpt):
    """100 prompts of unlike length, whatever the batch; and up to the context's end, whose last token is not fed."""
    theirs, given = peers.generator(folder), prompts(100, 100)
    want = peers.generate(theirs, list(given.values()), 20, 8)
    for size, most in ((0, 100), (7, 100), (1, 10)):
        found = collect(gpt, {i: given[i] for i in range(most)}, batch_size=size)
        assert [found[i, 0] for i in range(most)] == want[:most]
    assert len({tuple(ids) for ids in want}) > 50
    late = [ids + [5] * (120 - len(ids)) for ids in given.values()][:5]
    assert greedy(gpt, late, 30, -1) == peers.generate(theirs, late, 9, 5)


def test_ends(gpt):
    """At the token `stop`, at max_new_tokens, at the context's end, and where `ended` says so; train mode is given back."""
    free = collect(gpt, {0: [1, 2, 3], 1: [4] * 124, 2: [4] * 128}, new=30)
    assert [len(free[i, 0]) for i in range(3)] == [30, 5, 1]
    stop = free[0, 0][3]
    assert collect(gpt, {0: [1, 2, 3]}, stop=stop)[0, 0] == free[0, 0][: free[0, 0].index(stop)]
    assert collect(gpt, {0: [1, 2, 3]}, ended=lambda ids: len(ids) == 4)[0, 0] == free[0, 0][:4]
    assert collect(gpt, {0: [1, 2, 3]}, new=1)[0, 0] == free[0, 0][:1]
    assert collect(gpt, {}) == {}
    gpt.train()
    next(stream(gpt, {0: [1]}, 3, -1)), collect(gpt, {0: [1]})
    assert gpt.training
    gpt.eval()


@pytest.mark.parametrize("how", DRAWS)
def test_samples_do_not_depend_on_the_batch(gpt, how):
    """Batch 1 and 16 (rows that stop leave, others come), a part of the prompts, and n = 3 against n = 5."""
    given, how = prompts(15, 30), {"new": 15, "stop": 77, "temperature": 1.0, "seed": 11, **how}
    want = collect(gpt, given, n=3, batch_size=1, **how)
    assert len(want) == 45 and len({len(ids) for ids in want.values()}) > 3
    assert collect(gpt, given, n=3, batch_size=16, **how) == want
    few = {i: given[i] for i in (11, 4, 7)}
    five = collect(gpt, few, n=5, batch_size=3, **how)
    assert {place: ids for place, ids in five.items() if place[1] < 3} == {p: ids for p, ids in want.items() if p[0] in few}
    assert collect(gpt, given, n=3, **how | {"seed": 12}) != want
    assert want[0, 0] != want[0, 1]


def test_prompts_that_are_read_together():
    """In one forward at most 1/8 is padding, and a prompt stands there once, for all of its samples."""
    queue = [generate.Draft(i, j, [0] * length) for i, length in enumerate(range(1, 31)) for j in (1, 0)]
    left, sizes = len(queue), []
    while queue:
        group = generate.take(queue, 20, 200)
        lengths = {b.number: len(b.prompt) for b in group}
        most = max(lengths.values()) * len(lengths)
        assert len(group) <= 20 and (most <= 200 or len(lengths) == 1) and 8 * sum(lengths.values()) >= 7 * most
        sizes.append(len(group))
    assert sum(sizes) == left and max(sizes) > 10


@pytest.mark.parametrize("n, batch_size", [(16, 16), (3, 8), (20, 8)])
def test_a_prompt_is_read_once_for_all_of_its_samples(n, batch_size, gpt, monkeypatch):
    reads, prefill = [], generate.Prefill
    monkeypatch.setattr(generate, "Prefill", lambda cache: reads.append(cache.kv.size(2)) or prefill(cache))
    assert len(collect(gpt, prompts(6, 30), stop=5, n=n, temperature=1.0, batch_size=batch_size)) == 6 * n
    assert sum(reads) == 6


def test_the_batch_is_kept_full(gpt, monkeypatch):
    """While there are prompts enough, and then as many as are left, with a short one among long ones."""
    steps, decode = [], generate.decode
    monkeypatch.setattr(generate, "decode", lambda model, live, cache: steps.append(len(live)) or decode(model, live, cache))
    found = collect(gpt, prompts(20, 30), stop=5, n=3, temperature=1.0, batch_size=8)
    assert len(found) == 60 and max(steps) == 8 and sum(steps) <= sum(map(len, found.values()))
    full = steps[: len(steps) // 2]
    assert sum(full) / len(full) > 7
    steps.clear()
    given = {0: [5] * 30, **{i: [1 + i] * 27 for i in range(1, 15)}, 15: [3, 1]}
    collect(gpt, given, new=12, n=3, batch_size=50)
    assert steps == [48] * 11


def test_unwritten_memory_is_not_read(gpt, monkeypatch):
    """Memory that nobody has written may hold nan."""
    given = {0: [1, 2, 3], 1: [4, 5, 6, 7, 8, 9, 10]}
    want = collect(gpt, given)
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda self, shape: self.new_full(shape, float("nan")))
    monkeypatch.setattr(torch, "empty", lambda *shape, **kw: torch.full(shape, float("nan"), **kw))
    assert collect(gpt, given) == want


def test_ids_that_the_tokenizer_lacks_are_never_drawn(gpt):
    found = collect(gpt, prompts(20, 9, 30), n_ids=30, temperature=5.0)
    assert max(max(ids) for ids in found.values()) == 29


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="torch without oneDNN")
@pytest.mark.parametrize("rows", [1, 2, 16])
@pytest.mark.parametrize("kind", ["tied", "untied", "lora"])
def test_matrices_laid_out_for_a_cpu_give_the_same(gpt, kind, rows):
    given, how = prompts(10, 30), {"new": 10, "temperature": 1.0, "n": 2, "n_ids": 60}
    plain = copy.deepcopy(gpt)
    if kind == "untied":
        plain.head.weight = torch.nn.Parameter(plain.wte.weight.flip(0))
    if kind == "lora":
        tiny.with_lora(plain)
    fast = copy.deepcopy(plain)
    lay_out(fast, rows)
    assert fast.head.product is not None and fast.blocks[1].attn.qkv.product is not None
    want = collect(plain, given, **how)
    for size in {1, rows}:
        assert collect(fast, given, batch_size=size, **how) == want
    x = torch.randn(rows, 32, generator=torch.Generator().manual_seed(0))
    for n_ids in (60, None):
        torch.testing.assert_close(fast.project(x, n_ids), plain.project(x, n_ids))


def test_bfloat16(gpt):
    """Under autocast the same samples on every call and the first tokens mostly those of float32; logits stay float32."""
    given, how = prompts(40, 30), {"temperature": 1.0, "batch_size": 8}
    with torch.autocast("cpu", torch.bfloat16):
        found = collect(gpt, given, **how)
        assert collect(gpt, given, **how) == found
        assert gpt.project(torch.randn(3, 32)).dtype == torch.float32
    want = collect(gpt, given, **how)
    assert found != want, "autocast did nothing"
    assert sum(found[place][0] == want[place][0] for place in want) >= 32  # of 40


@pytest.mark.parametrize("how", [{}, *({"temperature": 1.0, **how} for how in DRAWS)])
@pytest.mark.parametrize("name", ["blocks.0.mlp.fc.bias", "ln_f.bias", "wte.weight 50", "wpe.weight 3"])
def test_a_model_of_nan_is_reported(gpt, name, how):
    """All of its weights, those of a token that no prompt has, or those of a position behind the prompt."""
    model = copy.deepcopy(gpt)
    name, _, row = name.partition(" ")
    with torch.no_grad():
        damaged = model.get_parameter(name)
        (damaged[int(row)] if row else damaged).fill_(float("nan"))
    with pytest.raises(FloatingPointError, match="not finite"):
        collect(model, {0: [1], 1: [2, 4]}, 5, **how)


# --- steps without the host, as on CUDA --------------------------------------------------------------------------------


@pytest.fixture
def fixed(monkeypatch):
    """Call it, and the CPU decodes as CUDA does: 5 tokens at a time, windows of a multiple of 16."""

    def turn_on() -> None:
        monkeypatch.setitem(generate.STEPS, "cpu", 5)
        monkeypatch.setattr(generate, "WINDOW", 16)

    return turn_on


GROUPED = LlamaConfig(n_layer=2, n_head=4, n_kv_head=2, head_dim=8, n_embd=24, n_inner=40, block_size=48, vocab_size=101)


def model_of(kind: str):
    if kind != "grouped heads":
        return tiny.with_lora(tiny.gpt()) if kind == "lora" else tiny.gpt()
    model, generator = Llama(GROUPED).eval(), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(0, 0.5, generator=generator)
    return model


@pytest.mark.parametrize(
    "kind, how", [("gpt2", how) for how in (*DRAWS, {"temperature": 0})] + [("lora", {}), ("grouped heads", {})]
)
def test_steps_without_the_host_give_the_same(kind, how, fixed):
    """Whatever the batch; with ends by a token, by what is written, by the most tokens, and by the context of 48."""
    model, given = model_of(kind), prompts(9, 47, 101)
    how = {"new": 13, "stop": 7, "temperature": 1.0, "seed": 11, "n": 2, "ended": lambda ids: ids[-1] % 16 == 3, **how}
    want = collect(model, given, **how)
    assert len({len(ids) for ids in want.values()}) > 2
    fixed()
    for size in (1, 3, 0):
        assert collect(model, given, batch_size=size, **how) == want


def test_what_is_drawn_behind_an_end_is_not_looked_at(fixed):
    """What is drawn there may be nan."""
    model = tiny.gpt()
    free = collect(model, {0: [1, 2, 3]}, new=4)[0, 0]
    with torch.no_grad():
        model.wpe.weight[5] = float("nan")  # where the third token would be read
    fixed()
    for end in ({"new": 3}, {"ended": lambda ids: len(ids) == 3}):
        with pytest.raises(FloatingPointError, match="not finite"):
            collect(model, {0: [1, 2, 3]})
        assert collect(model, {0: [1, 2, 3]}, **end)[0, 0] == free[:3]


class NeverLook(TorchDispatchMode):
    """No number of a tensor may become Python's."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func is not torch.ops.aten._local_scalar_dense.default, "the host looked"
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("kind", ["gpt2", "lora", "grouped heads"])
def test_the_steps_never_wait_for_the_device(kind):
    model, size, how = model_of(kind), (4, 32), {"temperature": 1.0, "top_k": 7}
    cache = generate.KVCache(model, 4, 48)
    steps = generate.FixedSteps(model, cache, 8, lambda x, keys: draw(model.project(x), keys, **how))
    with torch.no_grad(), NeverLook():
        steps.steps(*size)
        with pytest.raises(AssertionError, match="looked"):
            steps.drawn[0, 0].item()


@pytest.mark.parametrize("how", DRAWS)
def test_draws_on_cuda_never_wait_for_the_device(how):
    """Traced with tensors that are on no CPU and hold no numbers: to look at one raises."""
    logits, keys = torch.empty(4, 3000, device="meta"), torch.empty(4, 2, dtype=torch.int32, device="meta")
    assert draw(logits, keys, **{"temperature": 1.0, **how}).shape == (4,)


def test_sizes_that_come_again_are_captured(fixed, monkeypatch):
    """Capturing computes nothing, and replaying reads and writes the same memory. Sizes are powers of 2 and multiples of 16."""
    model, given, how = tiny.gpt(), prompts(20, 20, 101), {"temperature": 1.0, "new": 25, "batch_size": 6, "stop": 7}
    want = collect(model, given, **how)
    plain, ran, replayed, graphs = generate.FixedSteps.steps, [], [], []

    class Graph:
        def replay(self):
            replayed.append(self.size)
            plain(*self.captured)

    class capture:
        def __init__(self, graph, pool, capture_error_mode):
            graphs.append(graph)

        def __enter__(self):
            def note(steps, *size):
                graphs[-1].size, graphs[-1].captured = size, (steps, *size)

            monkeypatch.setattr(generate.FixedSteps, "steps", note)

        def __exit__(self, *_):
            monkeypatch.setattr(generate.FixedSteps, "steps", run)

    def run(steps, *size):
        steps.pool = "a GPU's"
        ran.append(size)
        plain(steps, *size)

    fixed()
    monkeypatch.setattr(generate.FixedSteps, "steps", run)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", capture)
    assert collect(model, given, **how) == want
    assert len(ran) == len(set(ran)), "each size runs once without a graph"
    assert len(graphs) == len(set(replayed)) < len(replayed) and set(replayed) <= set(ran)
    assert {rows for rows, _ in ran} <= {1, 2, 4, 6} and {window for _, window in ran} <= {16, 32, 45}


def test_rows_are_as_many_as_fit_into_a_gpus_memory(gpt, monkeypatch):
    steps, decode = [], generate.decode
    monkeypatch.setattr(generate, "decode", lambda model, live, cache: steps.append(len(live)) or decode(model, live, cache))
    given = prompts(20, 30)
    want = collect(gpt, given)
    assert max(steps) == 20
    room = max(map(len, given.values())) + 20
    row = 4 * (2 * gpt.config.n_layer * gpt.config.n_embd * room + generate.LOGITS_HELD * gpt.config.vocab_size)
    for free, rows in ((8 * row, 6), (0, 1)):
        steps.clear()
        monkeypatch.setattr(generate, "free_memory", lambda device, free=free: free)
        assert collect(gpt, given) == want and max(steps) == rows


def test_the_head_is_cast_once(monkeypatch):
    model, asked = tiny.gpt(), []
    head = GPT.head_weight.fget
    monkeypatch.setattr(GPT, "head_weight", property(lambda self: asked.append(1) or head(self)))
    with torch.autocast("cpu", torch.bfloat16):
        assert len(collect(model, {0: [1, 2, 3]}, new=20)[0, 0]) == 20
    assert len(asked) == 1


@pytest.mark.gpu
def test_gpu_draws_are_those_of_the_cpu(gpt):
    given, how = prompts(30, 30), {"new": 60, "temperature": 1.0, "n": 2, "batch_size": 16}
    want = collect(gpt, given, **how)
    found = collect(copy.deepcopy(gpt).cuda(), given, **how)
    assert sum(found[place] == want[place] for place in want) >= 58  # of 60: rounding may turn a draw


# --- draws -------------------------------------------------------------------------------------------------------------


def test_draws_follow_the_distribution():
    """Frequencies of 60,000 draws against softmax: chi-square of 5 degrees of freedom below its 99.9th percentile, 20.5."""
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0, -2.0, 1.5])
    places = [(i, j, k) for i in range(100) for j in range(6) for k in range(100)]
    for how, p in (
        ({"temperature": 1.0}, logits.softmax(0)),
        ({"temperature": 0.5}, (2 * logits).softmax(0)),
        ({"temperature": 1.0, "top_k": 3}, torch.tensor([1.0, 1, 0, 0, 0, 1]) * logits.exp()),
        ({"temperature": 1.0, "top_p": 0.7}, torch.tensor([1.0, 0, 0, 0, 0, 1]) * logits.exp()),  # 0.46 + 0.28
    ):
        p = p / p.sum()
        counts = torch.bincount(draw(logits.repeat(len(places), 1), noise_keys(places, 0), **how), minlength=6)
        assert not counts[p == 0].any()
        want = p[p > 0] * len(places)
        assert ((counts[p > 0] - want) ** 2 / want).sum() < 20.5, how
    rows, few = torch.randn(300, 97, generator=torch.Generator().manual_seed(0)), noise_keys(places[:300], 4)
    for cold in (0, 1e-50, 1e-40, 1e-7):
        assert torch.equal(draw(rows, few, temperature=cold, top_k=5, top_p=0.9), rows.argmax(-1))
    noise = exponential_noise(torch.arange(97), few)
    assert torch.equal(draw(rows, few, temperature=0.7), ((rows / 0.7).softmax(-1) / noise).argmax(-1))


@pytest.mark.parametrize("how", [{"top_k": 5}, {"top_p": 0.6}, {"top_k": 20, "top_p": 0.9}, {"top_k": 1}, {"top_p": 1e-9}])
def test_what_is_kept_is_what_transformers_keeps(how):
    """Over a vocabulary with a long tail, past the widths at which it is sorted in parts."""
    transformers = pytest.importorskip("transformers")
    g = torch.Generator().manual_seed(0)
    kept = logits = torch.cat([4 * torch.randn(1, 300, generator=g), torch.randn(1, 9000, generator=g)], 1) / 2
    if "top_k" in how:
        kept = transformers.TopKLogitsWarper(how["top_k"])(None, kept)
    if "top_p" in how:
        kept = transformers.TopPLogitsWarper(how["top_p"])(None, kept)
    allowed = set(kept[0].isfinite().nonzero()[:, 0].tolist())
    keys = noise_keys([(0, 0, k) for k in range(500)], 0)
    drawn = set(draw(logits.expand(500, -1), keys, temperature=1.0, **how).tolist())
    assert drawn <= allowed and len(drawn) > min(len(allowed), 150) / 2


def test_noise_is_exponential_and_independent():
    """Between places, and between ids."""
    places = [(i, j, k) for i in range(4) for j in range(2) for k in range(4)]
    keys = noise_keys(places, 0)
    e = exponential_noise(torch.arange(20000), keys)
    assert e.shape == (32, 20000) and e.min() > 0 and e.isfinite().all()
    u, n = (-e).exp(), e.numel()
    counts = torch.histc(u, 100, 0, 1)
    assert ((counts - n / 100) ** 2 / (n / 100)).sum() < 149  # 99 degrees of freedom: the 99.9th percentile
    by_place, by_id = torch.corrcoef(e), torch.corrcoef(e[:, :200].T)
    assert (by_place - torch.eye(32)).abs().max() < 6 / 20000**0.5
    assert (by_id - torch.eye(200)).abs().mean() < 1 / 32**0.5
    few = exponential_noise(torch.tensor([[7, 3], [3, 19999]]), keys[:2])
    assert torch.equal(few, torch.stack([e[0, [7, 3]], e[1, [3, 19999]]])), "a function of the id, not of where it stands"
    assert not torch.equal(exponential_noise(torch.arange(9), noise_keys(places, 1)), e[:, :9])
