"""The memory formula against what a model, its optimizer and a forward really hold."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

import weights
from base.errors import UserError
from data.batch import collate
from data.encode import Encoded
from llama import LlamaConfig
from lora import LoRAConfig, add_lora
from model import SIZES, GPTConfig
from report import memory
from runtime import build, optim
from runtime.distributed import Compute
from runtime.keys import TrainKeys


def model_of(config: GPTConfig, rank: int = 0, dtype: torch.dtype = torch.float32):
    sizes = {name: getattr(config, name) for name in ("n_layer", "n_head", "n_embd", "block_size", "vocab_size")}
    model = weights.load("scratch", **sizes).train()
    if rank:
        add_lora(model, LoRAConfig(rank, rank, model.LINEAR), dtype)
    return model


def held_for_backward(model, batch, bfloat16: bool) -> int:
    """Bytes that autograd keeps of a forward, beside the parameters."""
    held, own = {}, {p.untyped_storage().data_ptr() for p in model.parameters()}

    def keep(t: torch.Tensor) -> torch.Tensor:
        if (storage := t.untyped_storage()).data_ptr() not in own:
            held[storage.data_ptr()] = (storage.nbytes(), t)  # the tensor too: its memory must not be handed out again
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t), torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
        model(batch)
    return sum(n for n, _ in held.values())


@pytest.mark.parametrize("rank", [0, 2])
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("bfloat16", [False, True])
@pytest.mark.parametrize("completions", [1, 2])
def test_activations_are_what_autograd_keeps(checkpointing, bfloat16, completions, rank):
    config = GPTConfig(n_layer=6, n_head=4, n_embd=128, block_size=256, vocab_size=101)
    model = model_of(config, rank, torch.bfloat16 if bfloat16 else torch.float32)
    model.recompute = checkpointing
    rng = np.random.default_rng(0)
    ids = [rng.integers(0, 101, n).astype(np.int32) for n in (100, 60, 60)]
    batch = collate([[Encoded(ids[0], ids[1 : 1 + completions], 0, 0)]] * 16)
    held = held_for_backward(model, batch, bfloat16)
    positions = batch.tokens.numel()
    case = {"bfloat16": bfloat16, "checkpointing": checkpointing, "rank": rank}
    formula = memory.needed(config, positions, len(batch.target), **case)
    expected = formula["activations"] + formula["logits"]
    if completions > 1 and not checkpointing:  # on a CPU the mask, once for all layers; checkpoint() holds it unseen
        expected += 4 * batch.tokens.size(1) * positions
    if checkpointing:  # the block that is computed again comes only in backward
        one = GPTConfig(n_layer=1, n_head=4, n_embd=128, block_size=256, vocab_size=101)
        expected -= memory.needed(one, positions, 0, bfloat16=bfloat16)["activations"]
    else:
        expected += formula["working"]
    assert held == pytest.approx(expected, rel=0.1)


@pytest.mark.parametrize("bfloat16", [False, True])
def test_activations_of_the_llama_family(bfloat16):
    """On a CPU RMSNorm is several operations, which keep more than the one that CUDA has: so the formula need only be near."""
    config = LlamaConfig(n_layer=6, n_head=4, n_kv_head=2, head_dim=32, n_embd=128, n_inner=352, block_size=256, vocab_size=101)
    model = weights.empty(config).to_empty(device="cpu").train()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.02)
    ids = np.arange(100, dtype=np.int32)
    batch = collate([[Encoded(ids, [ids[:60]], 0, 0)]] * 16)
    formula = optim.forward_memory(model, batch.tokens.numel(), len(batch.target), bfloat16)
    assert 0.8 < sum(formula.values()) / held_for_backward(model, batch, bfloat16) < 1.2


@pytest.mark.parametrize(("free", "tokens"), [(80e9, 16384), (6e9, 4096), (4e9, 2048), (1e9, 1024)])
def test_micro_tokens_from_free_memory(monkeypatch, free, tokens):
    """`micro_tokens 0` for GPT-2 124M, whose weights are on the GPU already."""
    model = weights.empty(GPTConfig(12, 12, 768))
    cfg = TrainKeys(data="x", out_dir="x", micro_tokens=0)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, 80e9))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(total_memory=int(80e9)))
    assert build.fitting_tokens(cfg, model, Compute(torch.device("cuda"), torch.bfloat16)) == tokens
    assert build.fitting_tokens(cfg, model, Compute(torch.device("cpu"), torch.float32)) == 4096


@pytest.mark.parametrize("bfloat16", [False, True])
def test_weights_of_lora(bfloat16):
    """The blocks' matrices in the compute dtype, the embeddings (most of this model) in float32."""
    config = GPTConfig(n_layer=2, n_head=2, n_embd=32, block_size=64, vocab_size=1001)
    model = model_of(config, 2, torch.bfloat16 if bfloat16 else torch.float32)
    formula = memory.needed(config, 1, 1, rank=2, bfloat16=bfloat16)
    assert sum(p.nbytes for p in model.parameters()) == formula["weights"]


@pytest.mark.parametrize("optimizer", optim.OPTIMIZERS)
def test_weights_gradients_and_optimizer(optimizer):
    config = GPTConfig(n_layer=2, n_head=2, n_embd=32, block_size=64, vocab_size=101)
    model = model_of(config)
    update = optim.make(model, TrainKeys(data="x", out_dir="x", optimizer=optimizer))
    ids = np.arange(9, dtype=np.int32)
    model(collate([[Encoded(ids, [ids], 0, 0)]])).sum().backward()
    update.step()
    formula = memory.needed(config, 1, 1, optimizer=optimizer, bfloat16=False)
    assert sum(t.nbytes for s in update.state.values() for t in s.values() if t.dim()) == formula["optimizer"]
    assert sum(p.nbytes for p in model.parameters()) == formula["weights"]
    assert sum(p.grad.nbytes for p in model.parameters()) == formula["gradients"]


@pytest.mark.parametrize(
    ("bfloat16", "tokens", "checkpointing"), [(True, 4096, False), (False, 1024, False), (False, 4096, True)]
)
def test_lora_of_gpt2_medium_fits_into_a_gpu_of_8_gb(bfloat16, tokens, checkpointing, monkeypatch):
    """With 1 GB left for CUDA itself, in bfloat16, and in float32, as cards before Ampere compute. Training all weights of
    gpt2-large does not fit, and ends before it begins."""
    card = Compute(torch.device("cuda"), torch.bfloat16 if bfloat16 else torch.float32)
    monkeypatch.setattr(Compute, "memory", 8 * 10**9)
    medium, large = (GPTConfig(*SIZES[name]) for name in ("gpt2-medium", "gpt2-large"))
    formula = memory.needed(medium, tokens, tokens // 2, rank=16, bfloat16=bfloat16, checkpointing=checkpointing)
    assert sum(formula.values()) < card.memory - 1e9
    cfg, model = TrainKeys(data="x", out_dir="x", init_from="m"), weights.empty(medium)
    add_lora(model, LoRAConfig(16, 16.0, model.LINEAR), card.dtype)
    assert optim.memory(model, cfg.optimizer) == sum(formula[name] for name in ("weights", "gradients", "optimizer"))
    build.check_memory(cfg, model, card)
    with pytest.raises(UserError, match=r"take 12\.4 GB on each process, cuda has 8\.0 GB"):
        build.check_memory(cfg, weights.empty(large), card)
