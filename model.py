"""GPT-2, written out. The one question that every stage asks of it: which log-probability do these tokens have?

`GPT.forward(batch)` answers for rows that hold a prompt once and its completions behind it (data/packing.py makes them):

    [prompt | completion 1 | completion 2 | …]      a completion sees the prompt and itself, never a sibling

Architecture: Radford et al. 2019; parameter shapes are those of the released checkpoints with torch's (out, in) layout.
"""

import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

LOGITS_BUDGET = 2**28  # bytes of probabilities a forward may keep for backward; past it they are computed again
LOGITS_CHUNK = 2**26  # bytes of logits that exist at once otherwise


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
    """Keys and values of the tokens seen so far, per layer, for rows of unlike length. Shape (rows, heads, room, head_dim)."""

    def __init__(self, config: GPTConfig, rows: int, room: int, like: Tensor):
        shape = (rows, config.n_head, room, config.n_embd // config.n_head)
        # zeros, not empty: a masked position weighs 0, but 0 times a stray nan in unwritten memory is nan
        self.keys = [like.new_zeros(shape) for _ in range(config.n_layer)]
        self.values = [like.new_zeros(shape) for _ in range(config.n_layer)]

    def append(self, layer: int, k: Tensor, v: Tensor, position: Tensor) -> tuple[Tensor, Tensor]:
        """Write k, v (rows, heads, 1, head_dim) at `position` (rows,); returns all keys and values so far."""
        rows = torch.arange(len(position), device=position.device)
        self.keys[layer][rows, :, position] = k[:, :, 0]
        self.values[layer][rows, :, position] = v[:, :, 0]
        return self.keys[layer], self.values[layer]


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


class Linear(nn.Linear):
    """A linear layer that may have an adapter."""

    def __init__(self, n_in: int, n_out: int, bias: bool = True):
        super().__init__(n_in, n_out, bias)
        self.lora: LoRA | None = None
        self.unmerged: Tensor | None = None  # the weights without the adapter, while it is merged into them

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
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

    def forward(self, x: Tensor, mask, cache: KVCache | None = None, layer: int = 0, position: Tensor | None = None):
        rows, length, width = x.shape
        qkv = self.qkv(x).view(rows, length, 3, self.n_head, width // self.n_head)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each (rows, heads, length, head_dim)
        if cache is not None and position is not None:  # one new token a row
            k, v = cache.append(layer, k, v, position)
        elif cache is not None:  # the prompts, from position 0 on
            cache.keys[layer][:, :, :length], cache.values[layer][:, :, :length] = k, v
        y = attend(q, k, v, mask, self.dropout if self.training else 0.0)
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
        self.ln1 = nn.LayerNorm(config.n_embd)
        self.attn = Attention(config)
        self.ln2 = nn.LayerNorm(config.n_embd)
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
        self.ln_f = nn.LayerNorm(config.n_embd)
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
        """Freeze all weights, matrices cast to `dtype`, and put adapters beside them, their values still undefined: those of
        `initial_lora`, or of an adapter (adapters.py) that `keep_start` has the model remember for `as_started`."""
        for p in self.parameters():
            p.requires_grad_(False)
            if p.dim() > 1:  # biases and layer norms are few, and the CPU's layer norm wants the dtype of its input
                p.data = p.data.to(dtype)
        with self.wte.weight.device:
            for name, layer in list(self.named_modules()):
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
        return self.project(x)

    def _head_lora(self) -> LoRA | None:
        return None if self.head.unmerged is not None else self.head.lora

    def project(self, x: Tensor, n_ids: int | None = None) -> Tensor:
        """What the last block gives (…, n_embd) -> logits of the first `n_ids` tokens (None = all), (…, n_ids)."""
        x = self.ln_f(x)
        logits, lora = x @ self.head_weight[:n_ids].T, self._head_lora()
        found = lora.low(x) if lora else None
        return logits if found is None else logits + found[0] @ found[1][:n_ids].T

    @torch.compiler.set_stance("force_eager")  # each length would compile compiled blocks anew
    @torch.no_grad()
    def generate(self, prompts: list[list[int]], max_new_tokens: int, stop: int, n_ids: int | None = None):
        """Greedy continuations (token lists) of prompts of unlike length, up to and without the token `stop`.

        The prompts go through once, then one token a row a step with cached keys and values; a row that has stopped leaves
        the batch. No branch grows past `block_size` tokens. Of a sharded model every rank must ask for the same.
        `n_ids`: ids that the tokenizer has, where the model's vocabulary is padded.
        """
        device, was_training = self.wte.weight.device, self.training
        self.eval()
        lengths = torch.tensor([len(p) for p in prompts], device=device)
        longest = int(lengths.max())
        tokens = torch.zeros(len(prompts), longest, dtype=torch.long, device=device)
        for row, prompt in enumerate(prompts):
            tokens[row, : len(prompt)] = torch.tensor(prompt, device=device)
        room = min(longest + max_new_tokens, self.config.block_size)
        x = (self.wte(tokens) + self.wpe.weight[:longest]).float()
        autocast = torch.is_autocast_enabled(device.type)
        cache = KVCache(self.config, len(prompts), room, x.to(torch.get_autocast_dtype(device.type)) if autocast else x)
        for layer, block in enumerate(self.blocks):
            x = block(x, None, cache, layer)  # causal; what lies right of a shorter prompt is never looked at
        x = x[torch.arange(len(prompts), device=device), lengths - 1]  # (rows, n_embd)
        out: list[list[int]] = [[] for _ in prompts]
        rows = torch.arange(len(prompts), device=device)  # the rows still going, as numbers into `out`
        for _ in range(max_new_tokens):
            token = self.project(x, n_ids).argmax(-1)  # (rows,)
            going = token.ne(stop)
            for row, t in zip(rows[going].tolist(), token[going].tolist(), strict=True):
                out[row].append(t)
            going &= lengths.lt(room)
            if not going.any():
                break
            if not going.all():
                rows, lengths, token = rows[going], lengths[going], token[going]
                cache.keys = [k[going] for k in cache.keys]
                cache.values = [v[going] for v in cache.values]
            x = (self.wte(token) + self.wpe(lengths)).float().unsqueeze(1)  # (rows, 1, n_embd)
            mask = torch.arange(room, device=device).le(lengths.unsqueeze(1))[:, None, None]  # (rows, 1, 1, room)
            for layer, block in enumerate(self.blocks):
                x = block(x, mask, cache, layer, lengths)
            x, lengths = x[:, 0], lengths + 1
        self.train(was_training)
        return out


# --- attention ------------------------------------------------------------------------------------------------------


def may_attend(example: Tensor, branch: Tensor, row, query, key):
    """The one rule: same example, causal, and the key is the prompt's (branch 0) or of the query's own branch."""
    key_branch = branch[row, key]
    return (
        (query >= key) & (example[row, query] == example[row, key]) & ((key_branch == 0) | (key_branch == branch[row, query]))
    )


def attention_mask(example: Tensor, branch: Tensor):
    """The rule for rows (rows, row_len): on CUDA a FlexAttention BlockMask, elsewhere a boolean (rows, 1, row_len, row_len).

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
    return may_attend(example, branch, row, at[:, None], at[None, :]).unsqueeze(1)


_compiled_flex = None


def attend(q: Tensor, k: Tensor, v: Tensor, mask, dropout: float) -> Tensor:
    """softmax(q k^T / sqrt(head_dim)) v under a mask: None (causal), a boolean tensor, or a FlexAttention BlockMask.

    q, k, v: (rows, heads, length, head_dim). FlexAttention has no dropout on the weights, so there only the residual one acts.
    """
    if mask is None or isinstance(mask, Tensor):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, dropout_p=dropout)
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
