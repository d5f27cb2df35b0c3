"""GPT-2, and nothing else (Radford et al. 2019). Parameters have the released weights' shapes, in torch's (out, in) layout.

What it shares with other families, the forward pass over packed rows included, is in logprobs.py; its adapters in lora.py.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from logprobs import LanguageModel, computed
from lora import Linear

SIZES = {  # name on the hub -> (n_layer, n_head, n_embd); 124M, 355M, 774M, 1558M parameters
    "gpt2": (12, 12, 768),
    "gpt2-medium": (24, 16, 1024),
    "gpt2-large": (36, 20, 1280),
    "gpt2-xl": (48, 25, 1600),
}

# What GPT-2 is, in config.json's words: key -> the values computed here. The first is written, and is what a config without
# the key means.
FIXED = {
    "activation_function": ("gelu_new", "gelu_pytorch_tanh"),
    "layer_norm_epsilon": (1e-5,),
    "scale_attn_weights": (True,),
    "scale_attn_by_inverse_layer_idx": (False,),
    "reorder_and_upcast_attn": (False,),
    "add_cross_attention": (False,),
    "tie_word_embeddings": (True, False),
}
HF_SIZES = {name: name for name in ("n_layer", "n_head", "n_embd", "vocab_size")} | {"n_positions": "block_size"}


@dataclass(frozen=True)
class GPTConfig:
    model_type: ClassVar[str] = "gpt2"

    n_layer: int
    n_head: int
    n_embd: int
    block_size: int = 1024  # positions: the longest branch (prompt + one completion), not the longest row
    vocab_size: int = 50257
    dropout: float = 0.0
    tied: bool = True  # the output projection is the token embedding; False: it has weights of its own, `head.weight`

    def __post_init__(self) -> None:
        if self.n_embd % self.n_head:
            raise ValueError(f"n_embd {self.n_embd} is no multiple of n_head {self.n_head}")

    @property
    def n_kv_head(self) -> int:
        return self.n_head

    @property
    def head_dim(self) -> int:
        return self.n_embd // self.n_head

    @property
    def kept(self) -> int:
        return 14 * self.n_embd

    @classmethod
    def from_hf(cls, raw: dict, dropout: float = 0.0) -> "GPTConfig":
        """config.json as transformers writes it. Raises ValueError, naming the key, for what is not computed here."""
        sizes = computed(raw, FIXED, HF_SIZES)
        if raw.get("n_inner") not in (None, 4 * sizes["n_embd"]):
            raise ValueError(f"n_inner is {raw['n_inner']!r}, GPT-2 here has 4 * n_embd = {4 * sizes['n_embd']}")
        return cls(**sizes, dropout=dropout, tied=raw.get("tie_word_embeddings", True))

    def to_hf(self) -> dict:
        return {
            "architectures": ["GPT2LMHeadModel"],
            **{key: allowed[0] for key, allowed in FIXED.items()},
            "tie_word_embeddings": self.tied,
            **{key: getattr(self, ours) for key, ours in HF_SIZES.items()},
            "n_ctx": self.block_size,
            "n_inner": None,
            **dict.fromkeys(("attn_pdrop", "embd_pdrop", "resid_pdrop"), self.dropout),
            "initializer_range": 0.02,
        }


class LayerNorm(nn.LayerNorm):
    """In float32, also where its parameters were gathered in bfloat16: as autocast has it on CUDA, not on a CPU."""

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x.float(), self.normalized_shape, self.weight.float(), self.bias.float(), self.eps)


class Attention(nn.Module):
    def __init__(self, config: GPTConfig):
        super().__init__()
        self.n_head, self.dropout = config.n_head, config.dropout
        self.qkv = Linear(config.n_embd, 3 * config.n_embd, parts=3)
        self.proj = Linear(config.n_embd, config.n_embd)

    def forward(self, x: Tensor, attention) -> Tensor:
        rows, length, width = x.shape
        qkv = self.qkv(x).view(rows, length, 3, self.n_head, width // self.n_head)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each (rows, heads, length, head_dim)
        y = attention(q, k, v, self.dropout if self.training else 0.0)
        return self.proj(y.transpose(1, 2).reshape(rows, length, width))


class MLP(nn.Module):
    def __init__(self, config: GPTConfig):
        super().__init__()
        self.fc = Linear(config.n_embd, 4 * config.n_embd)
        self.proj = Linear(4 * config.n_embd, config.n_embd)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(F.gelu(self.fc(x), approximate="tanh"))  # "gelu_new" of the released weights


class Block(nn.Module):
    def __init__(self, config: GPTConfig):
        super().__init__()
        self.ln1 = LayerNorm(config.n_embd)
        self.attn = Attention(config)
        self.ln2 = LayerNorm(config.n_embd)
        self.mlp = MLP(config)
        self.drop = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, rotary: None, attention) -> Tensor:
        x = x + self.drop(self.attn(self.ln1(x), attention))
        return x + self.drop(self.mlp(self.ln2(x)))


class GPT(LanguageModel):
    LINEAR = ("attn.qkv", "attn.proj", "mlp.fc", "mlp.proj", "head")
    PREFIX = "transformer."
    HF_PARTS: ClassVar = {"blocks": "h", "ln1": "ln_1", "ln2": "ln_2", "qkv": "c_attn", "proj": "c_proj", "fc": "c_fc"}
    IGNORED = r"h\.\d+\.attn\.(bias|masked_bias)"  # the causal mask, which old checkpoints carry as a buffer

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.config = config
        sizes = (config.vocab_size, config.n_embd), (config.block_size, config.n_embd)
        self.wte, self.wpe = (nn.Embedding.from_pretrained(torch.empty(size), freeze=False) for size in sizes)
        self.drop = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.ln_f = LayerNorm(config.n_embd)
        self.head = Linear(config.n_embd, config.vocab_size, bias=False)
        if config.tied:
            self.head.weight = None  # the embedding's

    @property
    def embedding(self) -> nn.Embedding:
        return self.wte

    @property
    def norm(self) -> nn.Module:
        return self.ln_f

    def embed(self, tokens: Tensor, positions: Tensor) -> tuple[Tensor, None]:
        # float32 also where the embeddings were gathered in bfloat16: so is what the blocks add to
        return self.drop((self.wte(tokens) + self.wpe(positions)).float()), None

    def initial_weights(self, seed: int) -> Iterator[tuple[str, Tensor]]:
        """GPT-2's initialisation (Radford et al. 2019, 2.3): N(0, 0.02), residual projections scaled by 1/sqrt(2 n_layer).

        (name, tensor) of every parameter, made one at a time, on the CPU.
        """
        generator = torch.Generator().manual_seed(seed)
        for name, p in self.named_parameters():
            if name.endswith("bias"):
                value = torch.zeros(p.shape)
            elif p.dim() == 1:
                value = torch.ones(p.shape)  # layer-norm scales
            else:
                residual = name.endswith("proj.weight")
                std = 0.02 / math.sqrt(2 * self.config.n_layer) if residual else 0.02
                value = torch.empty(p.shape).normal_(0.0, std, generator=generator)
            yield name, value

    @staticmethod
    def transposed(name: str) -> bool:
        """The matrices of transformers' Conv1D layers."""
        return name.startswith("blocks.") and name.endswith(".weight") and ".ln" not in name


Config, Model = GPTConfig, GPT  # by these names weights.py takes them
