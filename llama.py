"""The Llama family: Llama (Touvron et al. 2023, arXiv 2302.13971), Mistral without a sliding window, Qwen2 and Qwen3.

They differ from GPT-2 in four things: RMSNorm, rotary positions, a gated MLP (SwiGLU), and fewer heads of keys and values than
of queries. Layers have transformers' names (q_proj … down_proj). What it shares with GPT-2 is in logprobs.py.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from logprobs import LanguageModel, computed
from lora import Linear

# In config.json's words: key -> the values computed here. A config without the key means the first.
FIXED = {
    "hidden_act": ("silu",),
    "use_sliding_window": (False,),
    "partial_rotary_factor": (1.0,),
    "quantization_config": (None,),
    "auto_map": (None,),  # code that the folder brings
    "tie_word_embeddings": (False, True),
    "attention_bias": (False, True),
    "mlp_bias": (False, True),
}
HF_SIZES = {
    "num_hidden_layers": "n_layer",
    "num_attention_heads": "n_head",
    "num_key_value_heads": "n_kv_head",
    "head_dim": "head_dim",
    "hidden_size": "n_embd",
    "intermediate_size": "n_inner",
    "max_position_embeddings": "block_size",
    "vocab_size": "vocab_size",
}
ROPE_TYPES = {  # how rotary positions are scaled -> the numbers that it needs
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}


@dataclass(frozen=True)
class LlamaConfig:
    n_layer: int
    n_head: int
    n_kv_head: int  # each serves n_head / n_kv_head heads of queries
    head_dim: int
    n_embd: int
    n_inner: int  # width between gate, up and down
    block_size: int  # positions: the longest branch (prompt + one completion), not the longest row
    vocab_size: int
    model_type: str = "llama"
    dropout: float = 0.0
    tied: bool = False  # the output projection is the token embedding
    eps: float = 1e-6
    theta: float = 10_000.0
    rope_type: str = "default"
    rope: tuple[float, ...] = ()  # the numbers of ROPE_TYPES
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False

    def __post_init__(self) -> None:
        if self.n_head % self.n_kv_head:
            raise ValueError(f"num_attention_heads {self.n_head} is no multiple of num_key_value_heads {self.n_kv_head}")
        if self.head_dim % 2:
            raise ValueError(f"head_dim is {self.head_dim}, rotary positions need an even number")

    @property
    def kept(self) -> int:
        return 6 * self.n_embd + 2 * (self.n_head + self.n_kv_head) * self.head_dim + 4 * self.n_inner

    @property
    def qk_norm(self) -> bool:
        return self.model_type == "qwen3"

    @classmethod
    def from_hf(cls, raw: dict, dropout: float = 0.0) -> "LlamaConfig":
        """config.json as transformers writes it. Raises ValueError, naming the key, for what is not computed here."""
        kind = raw["model_type"]
        heads, width = raw.get("num_attention_heads"), raw.get("hidden_size")
        divides = type(width) is type(heads) is int and heads > 0 and width % heads == 0
        head_dim = 128 if kind == "qwen3" else width // heads if divides else None
        follow = {"num_key_value_heads": heads, "head_dim": head_dim}  # from the others, where they are not there
        raw = raw | {key: size for key, size in follow.items() if raw.get(key) is None}
        sizes = computed(raw, FIXED, HF_SIZES)
        window = raw.get("sliding_window", 4096) if kind == "mistral" else None
        if window is not None and not (type(window) is int and window >= sizes["block_size"]):
            raise ValueError(f"sliding_window is {window!r}: a window below max_position_embeddings is not computed here")
        if any(layer != "full_attention" for layer in raw.get("layer_types") or ()):
            raise ValueError(f"layer_types is {raw['layer_types']!r}, computed here is full_attention")
        bias = kind in ("llama", "qwen3") and raw.get("attention_bias", False)
        return cls(
            **sizes,
            **_rope(raw),
            model_type=kind,
            dropout=dropout,
            tied=raw.get("tie_word_embeddings", False),
            eps=_positive(raw, "rms_norm_eps", 1e-6),
            qkv_bias=bias or kind == "qwen2",
            o_bias=bias,
            mlp_bias=kind == "llama" and raw.get("mlp_bias", False),
        )

    def to_hf(self) -> dict:
        """rope_theta and rope_scaling stand where transformers 4 has them: 5 and vLLM read them there too."""
        scaling = {"rope_type": self.rope_type, **dict(zip(ROPE_TYPES[self.rope_type], self.rope, strict=True))}
        return {
            "architectures": [self.model_type.capitalize() + "ForCausalLM"],
            **{key: getattr(self, ours) for key, ours in HF_SIZES.items()},
            "hidden_act": "silu",
            "rms_norm_eps": self.eps,
            "rope_theta": self.theta,
            "rope_scaling": scaling if self.rope else None,
            "tie_word_embeddings": self.tied,
            "attention_bias": self.o_bias,
            "mlp_bias": self.mlp_bias,
            "sliding_window": None,
        }


def _rope(raw: dict) -> dict:
    """theta, rope_type and rope out of a config.json, of transformers 4 (rope_theta, rope_scaling) or 5 (rope_parameters)."""
    given = {"rope_theta": raw.get("rope_theta", 10_000.0)}
    for key in ("rope_scaling", "rope_parameters"):
        if not isinstance(raw.get(key) or {}, dict):
            raise ValueError(f"{key} is {raw[key]!r}, not an object")
        given |= raw.get(key) or {}
    kind = given.get("rope_type", given.get("type", "default"))
    if not isinstance(kind, str) or kind not in ROPE_TYPES:
        raise ValueError(f"rope_type is {kind!r}, computed here are {', '.join(ROPE_TYPES)}")
    numbers = tuple(_positive(given, key) for key in ROPE_TYPES[kind])
    if kind == "llama3" and not numbers[1] < numbers[2]:
        raise ValueError(f"low_freq_factor is {numbers[1]!r}, not below high_freq_factor {numbers[2]!r}")
    return {"theta": _positive(given, "rope_theta"), "rope_type": kind, "rope": numbers}


def _positive(raw: dict, key: str, default: float | None = None) -> float:
    value = raw.get(key, default)
    if type(value) not in (int, float) or not 0 < value < 2**63:
        raise ValueError(f"{key} is {value!r}, not a number above 0 and below 2^63")
    return value


class RMSNorm(nn.RMSNorm):
    """In float32, also where its scale was gathered in bfloat16."""

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x.float(), self.normalized_shape, self.weight.float(), self.eps)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn each pair (i, i + head_dim / 2) by its position's angle (RoPE, Su et al. 2021, arXiv 2104.09864, eq. 34).

    x (rows, heads, length, head_dim); cos, sin (rows, 1, length, head_dim / 2).
    """
    a, b = x.float().chunk(2, -1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1).to(x.dtype)


class Attention(nn.Module):
    def __init__(self, c: LlamaConfig):
        super().__init__()
        self.head_dim, self.dropout = c.head_dim, c.dropout
        self.q_proj = Linear(c.n_embd, c.n_head * c.head_dim, c.qkv_bias)
        self.k_proj, self.v_proj = (Linear(c.n_embd, c.n_kv_head * c.head_dim, c.qkv_bias) for _ in range(2))
        self.o_proj = Linear(c.n_head * c.head_dim, c.n_embd, c.o_bias)
        self.q_norm, self.k_norm = (RMSNorm(c.head_dim, c.eps) if c.qk_norm else nn.Identity() for _ in range(2))

    def forward(self, x: Tensor, rotary: tuple[Tensor, Tensor], attention) -> Tensor:
        q, k, v = (layer(x).unflatten(-1, (-1, self.head_dim)) for layer in (self.q_proj, self.k_proj, self.v_proj))
        q, k = self.q_norm(q).to(v.dtype), self.k_norm(k).to(v.dtype)
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))  # (rows, heads, length, head_dim)
        y = attention(rotate(q, *rotary), rotate(k, *rotary), v, self.dropout if self.training else 0.0)
        return self.o_proj(y.transpose(1, 2).flatten(2))


class MLP(nn.Module):
    """SwiGLU (Shazeer 2020, arXiv 2002.05202, eq. 6): down(silu(gate x) * up x)."""

    def __init__(self, c: LlamaConfig):
        super().__init__()
        self.gate_proj = Linear(c.n_embd, c.n_inner, c.mlp_bias)
        self.up_proj = Linear(c.n_embd, c.n_inner, c.mlp_bias)
        self.down_proj = Linear(c.n_inner, c.n_embd, c.mlp_bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    def __init__(self, c: LlamaConfig):
        super().__init__()
        self.input_layernorm = RMSNorm(c.n_embd, c.eps)
        self.self_attn = Attention(c)
        self.post_attention_layernorm = RMSNorm(c.n_embd, c.eps)
        self.mlp = MLP(c)
        self.drop = nn.Dropout(c.dropout)

    def forward(self, x: Tensor, rotary: tuple[Tensor, Tensor], attention) -> Tensor:
        x = x + self.drop(self.self_attn(self.input_layernorm(x), rotary, attention))
        return x + self.drop(self.mlp(self.post_attention_layernorm(x)))


class Llama(LanguageModel):
    LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "head")
    PREFIX, HF_PARTS = "model.", {"blocks": "layers", "embedding": "embed_tokens"}
    IGNORED = r"(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq"  # a buffer that old checkpoints carry

    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding.from_pretrained(torch.empty(config.vocab_size, config.n_embd), freeze=False)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.norm = RMSNorm(config.n_embd, config.eps)
        self.head = Linear(config.n_embd, config.vocab_size, bias=False)
        if config.tied:
            self.head.weight = None  # the embedding's

    def embed(self, tokens: Tensor, positions: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        angles = positions[:, None, :, None] * self.frequencies(tokens.device)  # (rows, 1, length, head_dim / 2)
        return self.embedding(tokens).float(), (angles.cos(), angles.sin())

    def frequencies(self, device: torch.device) -> Tensor:
        """Radians that each pair turns by from one position to the next, (head_dim / 2,) float32.

        "llama3" (Llama 3.1, as transformers computes it) slows the pairs down that turn seldom within the context of
        pretraining: fully below `low` turns, not at all above `high`.
        """
        c = self.config
        rate = 1.0 / c.theta ** (torch.arange(0, c.head_dim, 2, device=device) / c.head_dim)
        if c.rope_type == "default":
            return rate
        factor, *rest = c.rope
        if c.rope_type == "linear":
            return rate / factor
        low, high, context = rest
        kept = ((context * rate / (2 * math.pi) - low) / (high - low)).clamp(0, 1)
        return rate * (kept + (1 - kept) / factor)


Config, Model = LlamaConfig, Llama  # by these names weights.py takes them
