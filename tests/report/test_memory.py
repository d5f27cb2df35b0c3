"""The memory formula against what a model, its optimizer and a forward really hold."""

import numpy as np
import pytest
import torch

import weights
from data.batch import collate
from data.encode import Encoded
from model import SIZES, GPTConfig, LoRAConfig
from report import memory
from runtime import optim
from runtime.keys import TrainKeys


def model_of(config: GPTConfig):
    sizes = {name: getattr(config, name) for name in ("n_layer", "n_head", "n_embd", "block_size", "vocab_size")}
    return weights.load("scratch", **sizes)


@pytest.mark.parametrize("size", SIZES)
def test_parameters(size):
    config = GPTConfig(*SIZES[size])
    assert memory.parameters(config) == sum(p.numel() for p in weights.empty(config).parameters())


def test_adapter_parameters():
    """The source's counts (recipe E)."""
    counts = {("gpt2-medium", 16): 7_898_384, ("gpt2-medium", 32): 15_796_768, ("gpt2-large", 16): 14_095_632}
    for (size, rank), count in counts.items():
        assert memory.adapter_parameters(GPTConfig(*SIZES[size]), rank) == count


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("bfloat16", [False, True])
@pytest.mark.parametrize("completions", [1, 2])
def test_activations_are_what_autograd_keeps(recompute, bfloat16, completions, lora):
    config = GPTConfig(n_layer=6, n_head=4, n_embd=128, block_size=256, vocab_size=101)
    model, adapters = model_of(config).train(), 0
    if lora:
        model.add_lora(LoRAConfig(rank=2, alpha=2), torch.bfloat16 if bfloat16 else torch.float32)
        adapters = memory.adapter_parameters(config, 2)
    for block in model.blocks:
        block.recompute = recompute
    rng = np.random.default_rng(0)
    ids = [rng.integers(0, 101, n).astype(np.int32) for n in (100, 60, 60)]
    batch = collate([[Encoded(ids[0], ids[1 : 1 + completions], 0, 0)]] * 16)
    held, own = {}, {p.untyped_storage().data_ptr() for p in model.parameters()}

    def keep(t: torch.Tensor) -> torch.Tensor:
        if (storage := t.untyped_storage()).data_ptr() not in own:
            held[storage.data_ptr()] = (storage.nbytes(), t)  # the tensor too: its memory must not be handed out again
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t), torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
        model(batch)
    case = {"bfloat16": bfloat16, "checkpointing": recompute, "adapters": adapters}
    formula = memory.needed(config, batch.tokens.numel(), len(batch.target), **case)
    expected = formula["activations"] + formula["logits"]
    if completions > 1:  # on a CPU the mask, once for all layers
        expected += 4 * batch.tokens.size(1) * batch.tokens.numel()
    if recompute:  # the block that is computed again comes only in backward
        expected -= memory.needed(GPTConfig(1, 4, 128, 256, 101), batch.tokens.numel(), 0, bfloat16=bfloat16)["activations"]
    else:
        expected += formula["working"]
    assert sum(n for n, _ in held.values()) == pytest.approx(expected, rel=0.1)


@pytest.mark.parametrize("bfloat16", [False, True])
def test_weights_of_lora(bfloat16):
    """The blocks' matrices in the compute dtype, the embeddings (most of this model) in float32."""
    config = GPTConfig(n_layer=2, n_head=2, n_embd=32, block_size=64, vocab_size=1001)
    model = model_of(config)
    model.add_lora(LoRAConfig(rank=2, alpha=2), torch.bfloat16 if bfloat16 else torch.float32)
    formula = memory.needed(config, 1, 1, adapters=memory.adapter_parameters(config, 2), bfloat16=bfloat16)
    assert sum(p.nbytes for p in model.parameters()) == formula["weights"]


@pytest.mark.parametrize("optimizer", memory.STATES)
def test_weights_gradients_and_optimizer(optimizer):
    config = GPTConfig(n_layer=2, n_head=2, n_embd=32, block_size=64, vocab_size=101)
    model = model_of(config)
    update = optim.make(model, TrainKeys(data="x", out_dir="x", optimizer=optimizer))
    ids = np.arange(9, dtype=np.int32)
    model(collate([[Encoded(ids, [ids], 0, 0)]])).sum().backward()
    update.step()
    state = sum(t.numel() * t.element_size() for s in update.state.values() for t in s.values() if t.dim())
    formula = memory.needed(config, 1, 1, optimizer=optimizer, bfloat16=False)
    assert state == formula["optimizer"]
    assert sum(4 * p.numel() for p in model.parameters()) == formula["weights"]
    assert sum(4 * p.grad.numel() for p in model.parameters()) == formula["gradients"]
