"""GPT-2, written out. The one question that every stage asks of it: which log-probability do these tokens have?

`GPT.forward(batch)` answers for rows that hold a prompt once and its completions behind it (data/batch.py makes them):

    [prompt | completion 1 | completion 2 | …]      a completion sees the prompt and itself, never a sibling

Architecture: Radford et al. 2019; parameter shapes are those of the released checkpoints with torch's (out, in) layout.
"""

import contextlib
import math
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from hashlib import blake2b

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

LOGITS_BUDGET = 2**28  # bytes of probabilities a forward may keep for backward; past it they are computed again
LOGITS_CHUNK = 2**26  # bytes of logits that exist at once otherwise
PROMPT_TOKENS, CPU_PROMPT_TOKENS = 8192, 2048  # most tokens of prompts that generation reads in one forward


@dataclass(frozen=True)
class GPTConfig:
    n_layer: int
    n_head: int
    n_embd: int
    block_size: int = 1024  # positions: the longest branch (prompt + one completion), not the longest row
    vocab_size: int = 50257
    dropout: float = 0.0
    tied: bool = True  # the output projection is the token embedding; False: it has weights of its own, `head.weight`


SIZES = {  # name -> (n_layer, n_head, n_embd); 124M, 355M, 774M, 1558M parameters
    "gpt2": (12, 12, 768),
    "gpt2-medium": (24, 16, 1024),
    "gpt2-large": (36, 20, 1280),
    "gpt2-xl": (48, 25, 1600),
}


class KVCache:
    """Keys and values of the tokens seen so far, for rows of unlike length: `kv` (layers, 2, rows, heads, room, head_dim)."""

    def __init__(self, config: GPTConfig, rows: int, room: int, like: Tensor):
        # zeros, not empty: a masked position weighs 0, but 0 times a stray nan in unwritten memory is nan
        self.kv = like.new_zeros(config.n_layer, 2, rows, config.n_head, room, config.n_embd // config.n_head)

    def append(self, layer: int, kv: Tensor, at: tuple) -> Tensor:
        """Write kv (2, rows, heads, 1, head_dim) of the first rows at (row numbers, positions), two tensors (rows,) or, of a
        single row, two numbers; returns all keys and values of these rows."""
        rows, position = at
        new = kv[:, :, :, 0].transpose(0, 1)  # (rows, 2, heads, head_dim): indexing by tensors puts the rows first
        self.kv[layer][:, rows, :, position] = new
        return self.kv[layer, :, : kv.size(1)]

    def copy(self, to: int, source: "KVCache", row: int, length: int) -> None:
        """Make row `to` the first `length` positions of another cache's (or this one's) row."""
        self.kv[:, :, to, :, :length] = source.kv[:, :, row, :, :length]


class LayerNorm(nn.LayerNorm):
    """In float32, also where its parameters were gathered in bfloat16: as autocast has it on CUDA, not on a CPU."""

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x.float(), self.normalized_shape, self.weight.float(), self.bias.float(), self.eps)


# --- low-rank adapters ----------------------------------------------------------------------------------------------

LINEAR = ("attn.qkv", "attn.proj", "mlp.fc", "mlp.proj", "head")  # the layers that an adapter may sit on


@dataclass(frozen=True)
class LoRAConfig:
    """Which layers get an adapter W x + scale * B A x, W frozen (Hu et al. 2021, arXiv 2106.09685, eq. 3), and how large."""

    rank: int
    alpha: float
    dropout: float = 0.0  # on what goes into A, in training
    targets: tuple[str, ...] = LINEAR
    stabilised: bool = False  # scale alpha / sqrt(rank) (Kalajdzievski 2023, arXiv 2312.03732, eq. 2), else alpha / rank
    qkv_parts: int = 3  # an adapter each for q, k and v; 1 = one for the fused layer, as peft makes it

    @property
    def scale(self) -> float:
        return self.alpha / (math.sqrt(self.rank) if self.stabilised else self.rank)


class LoRA(nn.Module):
    """The adapter of a layer (n_in -> n_out), or `parts` of them on equal slices of its output.

    a: (parts * rank, n_in), b: (n_out, rank); slice i is made of a's and b's i-th slices. The parts share dropout's draw.
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

    def low(self, x: Tensor) -> tuple[Tensor, Tensor] | None:
        """x (…, n_in) -> scale * A x (…, parts * rank), and the B that takes it further; None where the adapter is off."""
        a, b = (self.start_a, self.start_b) if self.at_start else (self.a, self.b)
        if a is None:
            return None
        return F.linear(F.dropout(x, self.dropout, self.training), a) * self.scale, b

    def add_to(self, y: Tensor, x: Tensor) -> Tensor:
        """The layer's output y (…, n_out) for its input x, with the adapter's share."""
        found = self.low(x)
        if found is None:
            return y
        h, b = found
        if self.parts == 1:
            return y + F.linear(h, b)
        slices = zip(h.chunk(self.parts, -1), b.chunk(self.parts), strict=True)
        return y + torch.cat([F.linear(h, b) for h, b in slices], -1)


def lora_delta(a: Tensor, b: Tensor, scale: float, parts: int) -> Tensor:
    """What an adapter adds to its layer's weights, (n_out, n_in)."""
    return torch.cat([scale * (b @ a) for a, b in zip(a.chunk(parts), b.chunk(parts), strict=True)])


SHARES = 32  # of a matrix, for at most so many threads to read: see Linear.lay_out


class Linear(nn.Linear):
    """A linear layer that may have an adapter."""

    def __init__(self, n_in: int, n_out: int, bias: bool = True):
        super().__init__(n_in, n_out, bias)
        self.lora: LoRA | None = None
        self.unmerged: Tensor | None = None  # the weights without the adapter, while it is merged into them
        self.shares: tuple[Tensor, ...] | None = None
        self.reordered = False

    @property
    def laid_out(self) -> bool:
        return self.reordered or self.shares is not None

    def lay_out(self, rows: int) -> None:
        """Make `product` fast for so few rows, float32, on a CPU. For one row the weights stay as they are, but each thread
        reads a share of them, where torch's own product with a vector leaves most to one. For more, they are put into oneDNN's
        own order of blocks, which nothing but `product` can read."""
        if rows == 1:
            n_out, n_in = self.weight.shape
            bias = torch.zeros(n_out) if self.bias is None else self.bias
            even = n_out - n_out % SHARES
            self.shares = (
                self.weight[:even].view(SHARES, even // SHARES, n_in).mT,
                bias[:even].view(SHARES, 1, even // SHARES),
                self.weight[even:],
                bias[even:],
            )
        elif torch.backends.mkldnn.is_available():
            self.weight = nn.Parameter(torch.ops.mkldnn._reorder_linear_weight(self.weight, rows), requires_grad=False)
            self.reordered = True

    def product(self, x: Tensor) -> Tensor:
        """The layer's output without the adapter's share."""
        if self.reordered:
            return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")
        if self.shares is not None and x.numel() == self.in_features:
            w, bias, rest, rest_bias = self.shares
            y = torch.baddbmm(bias, x.expand(SHARES, 1, self.in_features), w).view(*x.shape[:-1], bias.numel())
            return y if not len(rest) else torch.cat([y, F.linear(x, rest, rest_bias)], -1)
        return super().forward(x)

    def forward(self, x: Tensor) -> Tensor:
        y = self.product(x)
        return y if self.lora is None or self.unmerged is not None else self.lora.add_to(y, x)


@contextlib.contextmanager
def as_started(model: nn.Module):
    """Inside, the model is the one that training began from: adapters off, or, if it began from some, as those were then."""
    adapters = [module for module in model.modules() if isinstance(module, LoRA)]
    for adapter in adapters:
        adapter.at_start = True
    try:
        yield
    finally:
        for adapter in adapters:
            adapter.at_start = False


# --- the model ------------------------------------------------------------------------------------------------------


class Attention(nn.Module):
    def __init__(self, config: GPTConfig):
        super().__init__()
        self.n_head, self.dropout = config.n_head, config.dropout
        self.qkv = Linear(config.n_embd, 3 * config.n_embd)
        self.proj = Linear(config.n_embd, config.n_embd)

    def forward(self, x: Tensor, mask, cache: KVCache | None = None, layer: int = 0, at: tuple | None = None):
        rows, length, width = x.shape
        qkv = self.qkv(x).view(rows, length, 3, self.n_head, width // self.n_head)
        qkv = qkv.permute(2, 0, 3, 1, 4)  # (3, rows, heads, length, head_dim)
        if cache is not None and at is not None:  # one new token a row
            q, (k, v) = qkv[0], cache.append(layer, qkv[1:], at)
            parts = [attend(q[r], k[r, :, :window], v[r, :, :window], m, 0.0) for r, window, m in mask]
            y = parts[0] if len(parts) == 1 else torch.cat(parts)
            return self.proj(y.transpose(1, 2).reshape(rows, length, width))
        if cache is not None:  # the prompts, from position 0 on
            cache.kv[layer, :, :, :, :length] = qkv[1:]
        y = attend(*qkv, mask, self.dropout if self.training else 0.0)
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
        self.recompute = False  # activation checkpointing: keep only the block's input, compute the rest again in backward

    def forward(self, x: Tensor, mask, *cache) -> Tensor:
        if self.recompute and self.training and torch.is_grad_enabled():
            return checkpoint(self._forward, x, mask, use_reentrant=False)
        return self._forward(x, mask, *cache)

    def _forward(self, x: Tensor, mask, *cache) -> Tensor:
        x = x + self.drop(self.attn(self.ln1(x), mask, *cache))
        return x + self.drop(self.mlp(self.ln2(x)))


class GPT(nn.Module):
    def __init__(self, config: GPTConfig):
        super().__init__()
        self.config = config
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.wpe = nn.Embedding(config.block_size, config.n_embd)
        self.drop = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.ln_f = LayerNorm(config.n_embd)
        self.head = Linear(config.n_embd, config.vocab_size, bias=False)
        if config.tied:
            self.head.weight = None  # the embedding's
        self.lora: LoRAConfig | None = None

    @property
    def head_weight(self) -> Tensor:
        """The output projection, (vocab_size, n_embd)."""
        return self.wte.weight if self.head.weight is None else self.head.weight

    def head_parameters(self) -> list[nn.Parameter]:
        return [*self.head.parameters(), *([self.wte.weight] if self.head.weight is None else [])]

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

    def add_lora(self, config: LoRAConfig, dtype: torch.dtype = torch.float32, keep_start: bool = False) -> None:
        """Freeze all weights and put adapters beside them, their values still undefined: those of `initial_lora`, or of an
        adapter (adapters.py) that `keep_start` has the model remember for `as_started`.

        Matrices are cast to `dtype`, as their products would do; not the embeddings, whose sum is float32 without LoRA.
        """
        self.requires_grad_(False)
        with self.wte.weight.device:
            for name, layer in list(self.named_modules()):
                if isinstance(layer, Linear) and layer.weight is not None:
                    layer.weight.data = layer.weight.data.to(dtype)
                if isinstance(layer, Linear) and name.endswith(config.targets):
                    parts = config.qkv_parts if name.endswith("qkv") else 1
                    layer.lora = LoRA(layer.in_features, layer.out_features, config, parts)
                    if keep_start:
                        layer.lora.keep_start()
        self.lora = config

    def initial_lora(self, seed: int) -> Iterator[tuple[str, Tensor]]:
        """(name, tensor) of every adapter's A and B: A uniform within 1 / sqrt(n_in) (a linear layer's own initialisation in
        torch, which peft takes too), B zero, so that the model is as it was. On the CPU."""
        generator = torch.Generator().manual_seed(seed)
        for name, layer in self.named_modules():
            if isinstance(layer, LoRA):
                bound = 1 / math.sqrt(layer.a.shape[1])
                yield f"{name}.a", torch.empty(layer.a.shape).uniform_(-bound, bound, generator=generator)
                yield f"{name}.b", torch.zeros(layer.b.shape)

    @torch.no_grad()
    def merge(self) -> None:
        """Add the adapters to the weights beside them, for speed in use. A tied head's stays an adapter: its weights are the
        embedding's too. `unmerge` gives the weights back to the bit: they are kept."""
        for layer in self.modules():
            if isinstance(layer, Linear) and layer.lora and layer.weight is not None and layer.unmerged is None:
                lora, layer.unmerged = layer.lora, layer.weight.data
                delta = lora_delta(lora.a, lora.b, lora.scale, lora.parts)
                layer.weight.data = (layer.unmerged + delta).to(layer.unmerged.dtype)

    def unmerge(self) -> None:
        for layer in self.modules():
            if isinstance(layer, Linear) and layer.unmerged is not None:
                layer.weight.data, layer.unmerged = layer.unmerged, None

    @torch.no_grad()
    def lay_out(self, rows: int) -> None:
        """Ready the matrices for `stream` with so many rows at once, on a CPU, in float32. From here on the model is good for
        nothing else; for several rows a tied output projection becomes a copy of the embedding."""
        self.head.weight = self.head_weight
        for layer in self.modules():
            if isinstance(layer, Linear):
                layer.lay_out(rows)

    def forward(self, batch) -> Tensor:
        """Log-probability of every completion token of a batch of rows.

        `batch` carries integer tensors: `tokens`, `positions`, `example`, `branch`, each (rows, row_len), and `source`,
        `target`, each (completion tokens,): `target` is predicted at the flat position `source` of rows * row_len.
        `plain` says that every row is one sequence, so that the causal rule alone will do.
        Returns (completion tokens,) float32, natural logarithm.
        """
        mask = None if batch.plain else attention_mask(batch.example, batch.branch)
        # float32 also where the embeddings were gathered in bfloat16: so is what the blocks add to
        x = self.drop((self.wte(batch.tokens) + self.wpe(batch.positions)).float())  # (rows, row_len, n_embd)
        for block in self.blocks:
            x = block(x, mask)
        x = self.ln_f(x.flatten(0, 1).index_select(0, batch.source))  # (completion tokens, n_embd)
        return target_logps(x, self.head_weight, batch.target, self._head_lora())

    def logits(self, tokens: Tensor) -> Tensor:
        """Plain sequences (rows, length) -> (rows, length, vocab_size). For tests and curiosity: training never needs it."""
        x = self.wte(tokens) + self.wpe.weight[: tokens.size(1)]
        for block in self.blocks:
            x = block(x, None)
        return self.project(x.flatten(0, 1)).unflatten(0, tokens.shape)

    def _head_lora(self) -> LoRA | None:
        return None if self.head.unmerged is not None else self.head.lora

    def project(self, x: Tensor, n_ids: int | None = None) -> Tensor:
        """What the last block gives, (rows, n_embd) -> float32 logits of `n_ids` tokens (None: all), (rows, n_ids)."""
        x, w, lora = self.ln_f(x), self.head_weight, self._head_lora()
        h, b = (lora and lora.low(x)) or (None, None)
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        if self.head.laid_out:
            logits = self.head.product(x)[:, :n_ids]
        else:  # for a few rows the large matrix on the left is up to twice as fast on a CPU
            logits = _float32_product(w[:n_ids].to(x.dtype), x.T).T.contiguous()
        return logits if h is None else _add_product(logits, h.to(x.dtype), b[:n_ids].T.to(x.dtype))

    @torch.compiler.set_stance("force_eager")  # each length would compile compiled blocks anew
    def generate(self, prompts: list[list[int]], max_new_tokens: int, stop: int, n_ids: int | None = None) -> list[list[int]]:
        """Greedy continuations (token lists) of prompts of unlike length, all in one batch: `stream`, drained.

        Of a sharded model every rank must ask for the same, and by this method: what it is sharded with knows no `stream`.
        """
        out = {i: ids for i, _, ids in self.stream(dict(enumerate(prompts)), max_new_tokens, stop, n_ids=n_ids)}
        return [out[i] for i in range(len(prompts))]

    @torch.no_grad()
    def stream(
        self,
        prompts: dict[int, list[int]],
        max_new_tokens: int,
        stop: int,
        *,
        n: int = 1,
        n_ids: int | None = None,
        batch_size: int = 0,
        ended: Callable[[list[int]], bool] | None = None,
        **how,
    ) -> Iterator[tuple[int, int, list[int]]]:
        """n continuations of every prompt {number: tokens}: (number, which of the n, tokens) as each is finished.

        A continuation ends before the token `stop`, after `max_new_tokens`, where the branch has `block_size` tokens and one
        more, or where `ended(tokens so far)` says so. `how`: the settings of `draw`; greedy by default. What is drawn follows
        from seed, number and sample alone. `n_ids`: ids that the tokenizer has, where the model's vocabulary is padded.
        Raises FloatingPointError if the model computes logits of nan.

        At most `batch_size` (0: no limit) continuations are written at once, a token each a step. One that ends leaves the
        batch and the next takes its place; the longest prompts come first, so that those side by side are of like length.
        """
        was_training = self.training
        waiting = sorted(prompts, key=lambda i: len(prompts[i]))  # taken from the end
        slots = min(batch_size or math.inf, n * len(prompts))
        ready: list[tuple[Branch, KVCache, int, Tensor]] = []  # prompts gone through the model, to be continued
        live: list[Branch] = []  # row i of the cache is the branch live[i]
        cache = None

        def extend(branches: list[Branch], x: Tensor) -> list[bool]:
            """Draw the next token of each from its last state, x (branches, n_embd); whether it goes on."""
            tokens = draw(self.project(x, n_ids), [b.place for b in branches], **how)
            going = []
            for b, token in zip(branches, tokens, strict=True):
                b.tokens += [token] * (token != stop)
                going.append(
                    token != stop
                    and len(b.tokens) < max_new_tokens
                    and b.length < self.config.block_size
                    and not (ended and ended(b.tokens))
                )
            return going

        self.eval()
        try:
            while waiting or ready or live:
                free = slots - len(live)
                all_fit = len(ready) + n * len(waiting) <= free
                if (waiting or ready) and (not live or 8 * free >= slots or all_fit):  # the prompts of several at once
                    if not ready:
                        most_tokens = CPU_PROMPT_TOKENS if self.wte.weight.device.type == "cpu" else PROMPT_TOKENS
                        group = _alike(waiting, prompts, max(1, free // n), most_tokens)
                        x, read = self._read([prompts[i] for i in group])
                        ready = [(Branch(i, j, len(prompts[i])), read, r, x[r]) for r, i in enumerate(group) for j in range(n)]
                    new, ready = ready[:free], ready[free:]
                    if cache is None:  # the first prompt is the longest
                        room = min(new[0][0].length + max_new_tokens, self.config.block_size)
                        cache = KVCache(self.config, slots, room, read.kv)
                    going = extend([b for b, *_ in new], torch.stack([x for *_, x in new]))
                    for (b, read, row, _), goes_on in zip(new, going, strict=True):
                        if goes_on:
                            cache.copy(len(live), read, row, b.length)
                            live.append(b)
                        else:
                            yield b.number, b.sample, b.tokens
                    continue
                x = self._step([b.tokens[-1] for b in live], [b.length for b in live], cache)
                for b in live:
                    b.length += 1
                going = extend(live, x)
                for i in reversed(range(len(live))):
                    if not going[i]:
                        done, last = live[i], live.pop()
                        if done is not last:  # the last row fills the hole
                            live[i] = last
                            cache.copy(i, cache, len(live), last.length)
                        yield done.number, done.sample, done.tokens
        finally:
            self.train(was_training)

    def _read(self, prompts: list[list[int]]) -> tuple[Tensor, KVCache]:
        """Prompts from position 0 on -> the state at each one's last token, (prompts, n_embd), and their keys and values."""
        device = self.wte.weight.device
        longest = max(map(len, prompts))
        tokens = torch.tensor([p + [0] * (longest - len(p)) for p in prompts], device=device)
        x = (self.wte(tokens) + self.wpe.weight[:longest]).float()
        autocast = torch.is_autocast_enabled(device.type)
        cache = KVCache(self.config, len(prompts), longest, x.to(torch.get_autocast_dtype(device.type)) if autocast else x)
        for layer, block in enumerate(self.blocks):
            x = block(x, None, cache, layer)  # causal; what lies right of a shorter prompt is never looked at
        return x[torch.arange(len(prompts), device=device), torch.tensor([len(p) - 1 for p in prompts], device=device)], cache

    def _step(self, tokens: list[int], lengths: list[int], cache: KVCache) -> Tensor:
        """One more token behind each of the cache's first rows, which have `lengths` -> its state, (rows, n_embd)."""
        device = self.wte.weight.device
        position = torch.tensor(lengths, device=device)
        x = (self.wte(torch.tensor(tokens, device=device)) + self.wpe(position)).float().unsqueeze(1)  # (rows, 1, n_embd)
        # a few rows at a time look no further than the longest of them: on a GPU more calls would cost more than that saves
        few = 4 if device.type == "cpu" else len(lengths)
        mask = []
        for r in (slice(i, i + few) for i in range(0, len(lengths), few)):
            window = max(lengths[r]) + 1
            allowed = None
            if min(lengths[r]) + 1 < window:  # 0 or -inf, (few rows, 1, 1, window): from booleans every layer would make it
                beyond = torch.arange(window, device=device).gt(position[r, None])[:, None, None]
                allowed = cache.kv.new_zeros(beyond.shape).masked_fill_(beyond, -math.inf)
            mask.append((r, window, allowed))
        at = (torch.arange(len(lengths), device=device), position) if len(lengths) > 1 else (0, lengths[0])
        for layer, block in enumerate(self.blocks):
            x = block(x, mask, cache, layer, at)
        return x[:, 0]


# --- sampling -------------------------------------------------------------------------------------------------------


@dataclass
class Branch:
    """A continuation being written: of which prompt, which of its n, tokens the model has read, tokens written."""

    number: int
    sample: int
    length: int
    tokens: list[int] = field(default_factory=list)

    @property
    def place(self) -> tuple[int, int, int]:
        return self.number, self.sample, len(self.tokens)


def _alike(waiting: list[int], prompts: dict[int, list[int]], most: int, most_tokens: int) -> list[int]:
    """Take the next prompts, at most so many, off the end of `waiting`: padded to the longest, 1/8 at most is padding."""
    group = [waiting.pop()]
    longest = used = len(prompts[group[0]])
    while waiting and len(group) < most and (len(group) + 1) * longest <= most_tokens:
        used += len(prompts[waiting[-1]])
        if 8 * used < 7 * longest * (len(group) + 1):
            break
        group.append(waiting.pop())
    return group


def draw(
    logits: Tensor,
    places: list[tuple[int, int, int]],
    *,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 0,
) -> list[int]:
    """A token for each row of logits (rows, vocab), float32; `places`: its (prompt number, sample, position).

    Softmax at `temperature` (below 1e-6: the likeliest token); of that the `top_k` likeliest (0: all); of those the fewest
    likeliest that have `top_p` of their probability. Of what is left the token with the largest p / e is taken, e exponential
    noise: that is a draw from p (the Gumbel-max trick). Unlike one uniform number compared with running sums, it gives
    another token for logits that differ by rounding only where two tokens are that close.
    Raises FloatingPointError for a row whose largest logit is nan (one of its logits is) or infinite.
    """
    most, tokens = logits.max(-1)
    if temperature >= 1e-6:  # one that is 0 in float32 would make 0 / 0 of the likeliest
        tokens = _draw((logits - most[:, None]) / temperature, places, top_k, top_p, seed)
    found = tokens.masked_fill(~most.isfinite(), -1).tolist()  # marked on the device: looking there would be one more wait
    if -1 in found:
        raise FloatingPointError("the model's output is not finite")
    return found


def _draw(logits: Tensor, places: list[tuple[int, int, int]], top_k: int, top_p: float, seed: int) -> Tensor:
    """`draw` from logits that the temperature has divided -> (rows,) token ids."""
    p = logits.softmax(-1)
    size = p.size(-1)
    ids = torch.arange(size, device=p.device)
    if 0 < top_k < size:
        p, ids = p.topk(top_k)  # largest first
        p = p / p.sum(-1, keepdim=True)
    if top_p < 1:
        if ids.dim() == 1:
            for width in (1024, 8192, size):  # sorting all would take longer than the model
                top, ids = p.topk(min(width, size))
                if top.sum(-1).min() >= top_p:
                    break
            p = top
        p = p.masked_fill(p.cumsum(-1) - p >= top_p, 0)
    best = (p / exponential_noise(ids, places, seed)).argmax(-1, keepdim=True)
    return ids.expand_as(p).gather(1, best)[:, 0]


def exponential_noise(ids: Tensor, places: list[tuple[int, int, int]], seed: int) -> Tensor:
    """Exponential random numbers (rows, ids), a function of seed, place of the row, and id alone, on any device.

    A 64-bit key a row, by a cryptographic hash; with it each id is scrambled by multiplications and shifts as in
    MurmurHash3's finalizer (Appleby 2011), all modulo 2^32.
    """
    keys = [struct.unpack("<2i", blake2b(struct.pack("<4q", seed, *place), digest_size=8).digest()) for place in places]
    a, b = torch.tensor(keys, dtype=torch.int32, device=ids.device).T.unsqueeze(-1)  # each (rows, 1)
    x = (ids.int() * -1640531527) ^ a  # 2^32 / golden ratio
    for shift, multiplier in ((16, -2048144789), (13, -1028477387)):
        x ^= (x >> shift) & (2 ** (32 - shift) - 1)  # a logical shift
        x = x * multiplier + b
    x ^= (x >> 16) & 0xFFFF
    u = x.float() * 2.0**-32  # in [-1/2, 1/2), finest near 0, where the winners lie
    u = (u + (u < 0) + 2.0**-33).clamp_(max=1 - 2.0**-24)  # below 1, so that no noise is infinite: it would lose to p = 0
    return torch.log1p(-u).neg_()


# --- attention ------------------------------------------------------------------------------------------------------


def may_attend(example: Tensor, branch: Tensor, row, query, key):
    """The one rule: same example, causal, and the key is the prompt's (branch 0) or of the query's own branch."""
    key_branch = branch[row, key]
    return (
        (query >= key) & (example[row, query] == example[row, key]) & ((key_branch == 0) | (key_branch == branch[row, query]))
    )


def attention_mask(example: Tensor, branch: Tensor):
    """The rule for rows (rows, row_len): on CUDA a FlexAttention BlockMask, elsewhere 0 or -inf, (rows, 1, row_len, row_len).

    Padding carries an example number of its own, so that a padded position sees itself and no row of the mask is empty.
    """
    rows, length = example.shape
    if example.is_cuda:
        from torch.nn.attention.flex_attention import create_block_mask

        def rule(row, _head, query, key):
            return may_attend(example, branch, row, query, key)

        return create_block_mask(rule, rows, None, length, length, device=example.device)
    at = torch.arange(length, device=example.device)
    row = torch.arange(rows, device=example.device).view(-1, 1, 1)
    allowed = may_attend(example, branch, row, at[:, None], at[None, :]).unsqueeze(1)
    return torch.where(allowed, 0.0, -math.inf)  # from booleans every layer would make such a tensor and keep it


_compiled_flex = None


def attend(q: Tensor, k: Tensor, v: Tensor, mask, dropout: float) -> Tensor:
    """softmax(q k^T / sqrt(head_dim)) v under a mask: None (causal; a single query is the last and sees all), a tensor, or a
    FlexAttention BlockMask.

    q, k, v: (rows, heads, length, head_dim). FlexAttention has no dropout on the weights, so there only the residual one acts.
    """
    if mask is None or isinstance(mask, Tensor):
        causal = q.size(2) > 1 and mask is None  # in this order a bool also while torch.compile traces
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, dropout_p=dropout)
    global _compiled_flex
    if _compiled_flex is None:  # uncompiled it would write out the whole matrix of scores
        from torch.nn.attention.flex_attention import flex_attention

        _compiled_flex = torch.compile(flex_attention, dynamic=True)
    return _compiled_flex(q, k, v, block_mask=mask)


# --- the vocabulary projection --------------------------------------------------------------------------------------


class _TargetLogps(torch.autograd.Function):
    """log softmax(x w^T + h b^T)[target] in chunks of rows, without autograd's three copies of the logits.

    h, b: an adapter's scaled A x (n, rank) and its B (vocab, rank), or None. A frozen w costs no gradient.

    Kept for backward: nothing but x and the log-normaliser, or, while they fit LOGITS_BUDGET, the logits too. Products are in
    the dtype of x, sums and logits in float32: GPT-2's logits lie near -100, where bfloat16 steps by half a nat.
    """

    @staticmethod
    def forward(ctx, x: Tensor, w: Tensor, h: Tensor | None, b: Tensor | None, target: Tensor, chunk: int, keep: bool):
        logps = torch.empty(len(x), dtype=torch.float32, device=x.device)
        lse = torch.empty_like(logps)
        kept = []
        cast = [m if m is None else m.to(x.dtype) for m in (w, h, b)]
        for i in range(0, len(x), chunk):
            logits = _logits(x, *cast, slice(i, i + chunk))  # (chunk, vocab)
            at = logits.gather(1, target[i : i + chunk, None])[:, 0]
            lse[i : i + chunk] = torch.logsumexp(logits, 1)
            logps[i : i + chunk] = at - lse[i : i + chunk]
            if keep:
                kept.append(logits)
        ctx.save_for_backward(x, *cast, target, lse, *kept)
        ctx.chunk, ctx.dtypes = chunk, [m if m is None else m.dtype for m in (w, h, b)]
        return logps

    @staticmethod
    def backward(ctx, grad: Tensor):
        x, w, h, b, target, lse, *kept = ctx.saved_tensors
        dx, dh = (torch.empty_like(m) if need else None for m, need in zip((x, h), ctx.needs_input_grad[::2], strict=False))
        dw = db = None
        for n, i in enumerate(range(0, len(x), ctx.chunk)):
            part = slice(i, i + ctx.chunk)
            logits = kept[n] if kept else _logits(x, w, h, b, part)
            # d logp_t / d logits = onehot(target) - softmax(logits), times the incoming gradient
            d = logits.sub_(lse[part, None]).exp_().mul_(-grad[part, None])
            d.scatter_add_(1, target[part, None], grad[part, None])
            d = d.to(x.dtype)
            if dx is not None:
                dx[part] = d @ w
            if dh is not None:
                dh[part] = d @ b
                db = _add_product(db, d.T, h[part])
            if ctx.needs_input_grad[1]:
                dw = _add_product(dw, d.T, x[part])
        if not len(x):  # with nothing to predict the gradients are zero: a sharded model's ranks must all have them
            dw, db = (
                torch.zeros_like(m) if need else None for m, need in zip((w, b), ctx.needs_input_grad[1::2], strict=False)
            )
        return dx, *(g if g is None else g.to(t) for g, t in zip((dw, dh, db), ctx.dtypes, strict=True)), None, None, None


def _logits(x: Tensor, w: Tensor, h: Tensor | None, b: Tensor | None, part: slice) -> Tensor:
    """x w^T + h b^T for a part of their rows, float32."""
    logits = _float32_product(x[part], w.T)
    return logits if h is None else _add_product(logits, h[part], b.T)


def _add_product(total: Tensor | None, a: Tensor, b: Tensor) -> Tensor:
    """total + a @ b in float32, in place; None is zero."""
    if total is None:
        return _float32_product(a, b)
    if a.dtype == torch.float32:
        return total.addmm_(a, b)
    return total.add_(_float32_product(a, b))


def _float32_product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b of float32 or bfloat16 matrices, added up and returned in float32, autocast or not."""
    with torch.autocast(a.device.type, enabled=False):
        if a.dtype == torch.float32:
            return a @ b
        return torch.mm(a, b, out_dtype=torch.float32) if a.is_cuda else a.float() @ b.float()


def target_logps(x: Tensor, w: Tensor, target: Tensor, lora: LoRA | None = None) -> Tensor:
    """log softmax(x w^T) at the target tokens. x: (n, n_embd), w: (vocab, n_embd), target: (n,) -> (n,) float32.

    lora: the adapter beside w.
    """
    h, b = (lora and lora.low(x)) or (None, None)
    if torch.is_autocast_enabled(x.device.type):
        x = x.to(torch.get_autocast_dtype(x.device.type))
    row_bytes = 4 * len(w)
    keep = torch.is_grad_enabled() and len(x) * row_bytes <= LOGITS_BUDGET
    return _TargetLogps.apply(x, w, h, b, target, max(1, LOGITS_CHUNK // row_bytes), keep)
