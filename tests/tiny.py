"""Tiny random models and examples that several test files use."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

import adapters
import weights
from data.encode import Encoded
from llama import Llama, LlamaConfig
from logprobs import LanguageModel
from lora import LoRAConfig, add_lora
from model import GPT, GPTConfig

CONFIG = GPTConfig(n_layer=3, n_head=4, n_embd=32, block_size=48, vocab_size=101)


def gpt(**changes) -> GPT:
    """A GPT-2 of CONFIG's sizes in evaluation mode. Biases and norms are random too: zeros and ones would hide mistakes."""
    model = weights.empty(replace(CONFIG, **changes))
    model.load_state_dict(dict(model.initial_weights(1)), assign=True)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())))
    return model.eval()


def llama() -> Llama:
    """Two heads of keys and values for four of queries, in evaluation mode."""
    model = weights.empty(LlamaConfig(2, 4, 2, 8, 32, 64, 48, CONFIG.vocab_size))
    shapes = {name: p.shape for name, p in model.named_parameters()}
    generator = torch.Generator().manual_seed(1)
    drawn = {n: float("norm" in n) + 0.1 * torch.randn(shape, generator=generator) for n, shape in shapes.items()}
    model.load_state_dict(drawn, assign=True)
    return model.eval()


def with_lora(model: LanguageModel, rank: int = 4, alpha: float = 8.0, targets=(), **settings) -> LanguageModel:
    """`model` with adapters, none of them zero, on the layers that `targets` names (none: on all)."""
    add_lora(model, LoRAConfig(rank, alpha, targets or model.LINEAR, **settings))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.normal_(0, 0.1, generator=generator)
    return model.eval()


class NoTokenizer:
    """What `save` needs of a tokenizer that nobody uses."""

    eot = bos = 96

    def save(self, folder: Path) -> None:
        (folder / "tokenizer_config.json").write_text("{}")


def save_adapter(model: GPT, base: Path, folder: Path, tokenizer=None) -> Path:
    """Write the adapters of `model`, which sit on the weights in `base`, as a run does at its end."""
    sha256 = weights.fingerprint(weights.load(base))
    model.origin = weights.Origin(str(base), sha256, sha256)
    adapters.save(model, tokenizer or NoTokenizer(), folder)
    return folder


def example(rng: np.random.Generator, prompt: int, *completions: int) -> Encoded:
    """Random tokens: a prompt and completions of these lengths."""
    prompt, *completions = (rng.integers(0, CONFIG.vocab_size, n).astype(np.int32) for n in (prompt, *completions))
    return Encoded(prompt, completions, 0, 0)


def plain_logps(model: GPT, items: list[Encoded]) -> torch.Tensor:
    """The slow way: each completion a sequence of its own, whole logits, log-softmax. -> (completion tokens,)"""
    out = []
    for item in items:
        for completion in item.completions:
            tokens = torch.from_numpy(np.concatenate([item.prompt, completion])).long()[None]
            logps = model.logits(tokens)[0, len(item.prompt) - 1 : -1].log_softmax(-1)
            out.append(logps.gather(1, tokens[0, len(item.prompt) :, None])[:, 0])
    return torch.cat(out)
