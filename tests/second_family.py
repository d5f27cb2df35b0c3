"""A second model family, as small as the contract of logprobs.LanguageModel allows: grouped keys and values, rotary positions,
attention and MLP side by side, a head of its own. It exists to prove that a family needs one file and one line in a table."""

from dataclasses import asdict, dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import weights
from logprobs import LanguageModel
from lora import Linear

weights.FAMILIES["rotary_toy"] = "tests.second_family"


@dataclass(frozen=True)
class Config:
    model_type: ClassVar[str] = "rotary_toy"

    n_layer: int = 2
    n_head: int = 4
    n_kv_head: int = 2
    head_dim: int = 8
    n_embd: int = 24
    block_size: int = 128
    vocab_size: int = 65
    tied: bool = False
    dropout: float = 0.0

    @classmethod
    def from_hf(cls, raw: dict, dropout: float = 0.0) -> "Config":
        return cls(**{name: raw[name] for name in ("n_layer", "n_embd", "block_size", "vocab_size")}, dropout=dropout)

    def to_hf(self) -> dict:
        return asdict(self)


class Block(nn.Module):
    def __init__(self, c: Config):
        super().__init__()
        self.c, self.norm = c, nn.LayerNorm(c.n_embd)
        self.q, self.o = Linear(c.n_embd, c.n_head * c.head_dim, bias=False), Linear(c.n_head * c.head_dim, c.n_embd)
        self.k, self.v = (Linear(c.n_embd, c.n_kv_head * c.head_dim, bias=False) for _ in range(2))
        self.up, self.down = Linear(c.n_embd, 2 * c.n_embd), Linear(2 * c.n_embd, c.n_embd)

    def forward(self, x: Tensor, rotary: tuple[Tensor, Tensor], attention) -> Tensor:
        h = self.norm(x.float())
        q, k, v = (layer(h).unflatten(-1, (-1, self.c.head_dim)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        y = attention(rotate(q, *rotary), rotate(k, *rotary), v).transpose(1, 2).flatten(2)
        return x + self.o(y) + self.down(F.silu(self.up(h)))


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x (rows, heads, length, head_dim); cos and sin (rows, 1, length, head_dim / 2)."""
    a, b = x.float().chunk(2, -1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1).to(x.dtype)


class Model(LanguageModel):
    LINEAR = ("q", "k", "v", "o", "up", "down", "head")
    PREFIX = "model."

    def __init__(self, c: Config):
        super().__init__()
        self.config = c
        self.embedding, self.norm = nn.Embedding(c.vocab_size, c.n_embd), nn.LayerNorm(c.n_embd)
        self.blocks = nn.ModuleList(Block(c) for _ in range(c.n_layer))
        self.head = Linear(c.n_embd, c.vocab_size, bias=False)

    def embed(self, tokens: Tensor, positions: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        rate = 10_000 ** -(torch.arange(0, self.config.head_dim, 2, device=tokens.device) / self.config.head_dim)
        angles = positions[:, None, :, None] * rate  # (rows, 1, length, head_dim / 2)
        return self.embedding(tokens).float(), (angles.cos(), angles.sin())

    def initial_weights(self, seed: int):
        generator = torch.Generator().manual_seed(seed)
        for name, p in self.named_parameters():
            yield name, torch.randn(p.shape, generator=generator) * 0.1 + name.endswith("norm.weight")

    @classmethod
    def hf_name(cls, name: str) -> str:
        return name if name.split(".")[0] == "head" else cls.PREFIX + name

    @staticmethod
    def transposed(name: str) -> bool:
        return False
