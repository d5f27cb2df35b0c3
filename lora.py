"""The adapter layer: W x + scale * B A x, W frozen, A and B trained (LoRA, Hu et al. 2021, arXiv 2106.09685, eq. 3).

Adapters on disk, in peft's format, are the subject of adapters.py.
"""

import contextlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class LoRAConfig:
    """Which layers get an adapter, and how large it is. `targets`: ends of layer names, some of the model's LINEAR."""

    rank: int
    alpha: float
    targets: tuple[str, ...]
    dropout: float = 0.0  # on the adapter's input, in training
    stabilised: bool = False  # scale alpha / sqrt(rank) (Kalajdzievski 2023, arXiv 2312.03732, eq. 2), else alpha / rank
    split: bool = True  # a fused layer gets an adapter a part (q, k, v); False: one for all of it, as peft makes it

    @property
    def scale(self) -> float:
        return self.alpha / (math.sqrt(self.rank) if self.stabilised else self.rank)


class LoRA(nn.Module):
    """The adapter of a layer (n_in -> n_out), or `parts` of them on equal slices of its output.

    a: (parts * rank, n_in), b: (n_out, rank). Slice i of the output is made of the i-th slices of a and b.
    All parts see the same dropout.
    """

    def __init__(self, n_in: int, n_out: int, config: LoRAConfig, parts: int):
        super().__init__()
        self.a = nn.Parameter(torch.empty(parts * config.rank, n_in))
        self.b = nn.Parameter(torch.empty(n_out, config.rank))
        self.start_a = self.start_b = None  # frozen copies, where training goes on from an adapter: see `as_started`
        self.parts, self.scale, self.dropout = parts, config.scale, config.dropout
        self.at_start = False

    def keep_start(self) -> None:
        self.start_a = nn.Parameter(torch.empty_like(self.a), requires_grad=False)
        self.start_b = nn.Parameter(torch.empty_like(self.b), requires_grad=False)

    def down(self, x: Tensor) -> tuple[Tensor, Tensor] | tuple[None, None]:
        """x (…, n_in) -> scale * A x (…, parts * rank), and the B to multiply it with; two None where the adapter is off."""
        a, b = (self.start_a, self.start_b) if self.at_start else (self.a, self.b)
        if a is None:
            return None, None
        return F.linear(F.dropout(x, self.dropout, self.training), a) * self.scale, b

    def add_to(self, y: Tensor, x: Tensor) -> Tensor:
        """The layer's output y (…, n_out) for its input x (…, n_in), plus what the adapter adds."""
        h, b = self.down(x)
        if h is None:
            return y
        if self.parts == 1:
            return y + F.linear(h, b)
        slices = zip(h.chunk(self.parts, -1), b.chunk(self.parts), strict=True)
        return y + torch.cat([F.linear(h, b) for h, b in slices], -1)


class Linear(nn.Linear):
    """A linear layer that may have an adapter. `parts`: equal slices of its output that are layers of their own (q, k, v)."""

    def __init__(self, n_in: int, n_out: int, bias: bool = True, parts: int = 1):
        super().__init__(n_in, n_out, bias)
        self.parts = parts
        self.lora: LoRA | None = None
        self.product: Callable[[Tensor], Tensor] | None = None  # a faster x W^T + b, see generate.lay_out

    def reset_parameters(self) -> None:
        """Leave them undefined: weights.py brings the values. To draw random ones first takes a second."""

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x) if self.product is None else self.product(x)
        return y if self.lora is None else self.lora.add_to(y, x)


def is_target(name: str, targets: tuple[str, ...]) -> bool:
    """Whether a layer's name (blocks.0.attn.proj) is, or ends in, one of `targets` (attn.proj)."""
    return f".{name}".endswith(tuple(f".{target}" for target in targets))


def lora_delta(a: Tensor, b: Tensor, scale: float, parts: int) -> Tensor:
    """What an adapter adds to its layer's weights, (n_out, n_in)."""
    return torch.cat([scale * (b @ a) for a, b in zip(a.chunk(parts), b.chunk(parts), strict=True)])


def add_lora(model: nn.Module, config: LoRAConfig, dtype: torch.dtype = torch.float32, keep_start: bool = False) -> None:
    """Freeze all weights of `model` and put adapters beside them. The adapters' values are still undefined: they come from
    `initial_lora`, or from an adapter on disk, of which `keep_start` keeps a copy for `as_started`.

    Linear layers' matrices are cast to `dtype`, the type that their products are computed in. Embeddings stay float32, and
    with them a tied head.
    """
    model.requires_grad_(False)
    with next(model.parameters()).device:  # new parameters are made there
        for name, layer in list(model.named_modules()):
            if isinstance(layer, Linear) and layer.weight is not None:
                layer.weight.data = layer.weight.data.to(dtype)
            if isinstance(layer, Linear) and is_target(name, config.targets):
                parts = layer.parts if config.split else 1
                layer.lora = LoRA(layer.in_features, layer.out_features, config, parts)
                if keep_start:
                    layer.lora.keep_start()
    model.lora = config


def initial_lora(model: nn.Module, seed: int) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) of every adapter's A and B, on the CPU: A uniform within 1 / sqrt(n_in) (what torch and peft take), B
    zero, so that the model starts as it was."""
    generator = torch.Generator().manual_seed(seed)
    for name, layer in model.named_modules():
        if isinstance(layer, LoRA):
            bound = 1 / math.sqrt(layer.a.shape[1])
            yield f"{name}.a", torch.empty(layer.a.shape).uniform_(-bound, bound, generator=generator)
            yield f"{name}.b", torch.zeros(layer.b.shape)


@contextlib.contextmanager
def as_started(model: nn.Module):
    """Inside, the model is the one that training began from: without adapters, or with those that it began with."""
    adapters = [module for module in model.modules() if isinstance(module, LoRA)]
    for adapter in adapters:
        adapter.at_start = True
    try:
        yield
    finally:
        for adapter in adapters:
            adapter.at_start = False
