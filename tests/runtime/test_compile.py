"""Compiled blocks: in one piece, compiled in the first step only, and equal to blocks that are not compiled."""

import copy

import numpy as np
import pytest
import torch
from torch._dynamo.utils import counters

import logprobs
from base.errors import UserError
from data.batch import collate
from logprobs import LanguageModel
from runtime.build import compile_blocks
from runtime.config import load
from runtime.keys import SpeedKeys
from tests import tiny, varlen
from tests.tiny import example


@pytest.fixture(autouse=True)
def forget():
    yield
    torch.compiler.reset()
    counters.clear()


def gradients(model: LanguageModel, batch) -> dict[str, torch.Tensor]:
    model.zero_grad()
    model(batch).sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def graphs() -> int:
    assert not counters["graph_break"]
    return counters["stats"]["unique_graphs"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "family, whole, backend",
    [(tiny.gpt, False, "eager"), (tiny.llama, True, "eager"), (tiny.llama, False, "eager"), (tiny.gpt, True, "aot_eager")],
)
def test_only_the_first_step_compiles(family, whole, backend, monkeypatch):
    """Rows of one length, as on CUDA, with other sequences in each step; the second validation compiles nothing either.

    whole: all weights are trained; otherwise adapters, with activation checkpointing."""
    varlen.on_cpu()
    monkeypatch.setattr(logprobs, "is_flash", lambda device: True)
    model = family() if whole else tiny.with_lora(family())
    model.train().recompute = not whole
    eager = copy.deepcopy(model)
    compile_blocks(model, backend)
    rng, n = np.random.default_rng(0), []
    for _ in range(3):
        a, b, c, d, e, f = rng.integers(2, 12, 6)
        batch = collate([[example(rng, a, b, c), example(rng, d, e, f)]], multiple=64)
        want = gradients(eager, batch)
        for name, grad in gradients(model, batch).items():
            torch.testing.assert_close(grad, want[name], atol=1e-5, rtol=1e-4)
        n.append(graphs())
        with torch.no_grad():
            torch.testing.assert_close(model.eval()(batch), eager.eval()(batch))
        model.train(), eager.train()
        n.append(graphs())
    assert 1 <= n[0] <= 2, "one compilation serves all blocks; with adapters only the first block's input needs no gradient"
    assert n[1] <= n[0] + 1 and n[2:] == n[1:2] * 4


@pytest.mark.parametrize("completions", [1, 3])
def test_rows_of_other_lengths_and_a_mask(completions):
    rng, model = np.random.default_rng(0), tiny.gpt()
    eager = copy.deepcopy(model)
    compile_blocks(model, backend="eager")
    for length in (9, 14, 20):
        batch = collate([[example(rng, length, *[5] * completions)]])
        assert batch.plain == (completions == 1)
        torch.testing.assert_close(model(batch), eager(batch))
    assert graphs() == 1


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", [tiny.gpt, tiny.llama])
def test_gpu_compiled_blocks_equal_eager(family, dtype):
    """Values and gradients, with activation checkpointing."""
    model = family().cuda().train()
    model.recompute = True
    eager = copy.deepcopy(model)
    compile_blocks(model)
    rng = np.random.default_rng(0)
    batch = collate([[example(rng, 10, 5, 9), example(rng, 4, 8, 2)]], multiple=128).to(torch.device("cuda"))
    with torch.autocast("cuda", dtype=dtype, enabled=dtype != torch.float32):
        a, b = gradients(model, batch), gradients(eager, batch)
    for name, grad in a.items():
        assert (grad - b[name]).norm() <= (1e-3 if dtype == torch.float32 else 0.05) * b[name].norm() + 1e-6, name


def test_the_key_is_auto_true_or_false(tmp_path):
    """Written as a truth value, too, as it was before there was `auto`."""
    path = tmp_path / "c.toml"
    path.write_text("compile = true\n")
    given = [], ["--compile"], ["--compile=False"], ["--compile", "auto"], ["--config", str(path)]
    assert [load(SpeedKeys, args, "train").compile for args in given] == ["auto", "true", "false", "auto", "true"]
    with pytest.raises(UserError, match="compile = 'yes' is not one of auto, true, false"):
        load(SpeedKeys, ["--compile", "yes"], "train")
