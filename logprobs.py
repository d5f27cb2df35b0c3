"""What all model families share: attention in packed rows, and log-probabilities of target tokens without [B, T, V] logits.

Every stage asks a model one question: which log-probability does it give these tokens after that prompt?
`LanguageModel.forward(batch)` answers it for rows that hold a prompt once and its completions behind it (data/batch.py):

    [prompt | completion 1 | completion 2 | …]      a completion sees the prompt and itself, never a sibling
"""

import inspect
import math
from functools import partial
from importlib.util import find_spec

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lora import LoRA, LoRAConfig

# Bytes of logits that a forward on a CPU may keep for backward; past it they are computed again. Bytes that exist at once then.
LOGITS_BUDGET, LOGITS_CHUNK = 2**28, 2**26
QUERIES = 128  # of long rows with a mask, on a CPU: how many look at once


class LanguageModel(nn.Module):
    """A model family's base class. A family is one file; this is all that the rest of the project knows of it.

    Its config is a frozen dataclass:
        model_type      the name in transformers' config.json, by which weights.FAMILIES finds the file
        n_layer, n_head, n_kv_head, head_dim, n_embd, vocab_size, dropout
        block_size      positions: the longest prompt + completion, not the longest row
        tied            the output projection is the token embedding
        kept            numbers a token that a block keeps for the backward pass in the dtype of the products: what goes into
                        its products, attention and activation function
        from_hf(raw)    class method: config.json as a dict -> config; ValueError, naming the key, for what it does not compute
        to_hf()         the config as transformers reads it

    Its model is a subclass of this class:
        LINEAR          names of the layers that an adapter may sit on: ends of module names, "head" the last
        blocks          ModuleList. block(x, rotary, attention) -> x, with x (rows, length, n_embd). A block makes
                        q (rows, n_head, length, head_dim), k and v (rows, n_kv_head, length, head_dim) with lora.Linear layers
                        and lets `attention(q, k, v, dropout)` mix the values: -> (rows, n_head, length, head_dim)
        embed(tokens, positions)    both (rows, length) int64 -> x in float32, and `rotary`: what the blocks want to know of
                        the positions, or None
        embedding, norm the token embedding, and the norm behind the last block
        head            lora.Linear without bias; its weight is None where it is tied
        initial_weights(seed)       GPT-2 only, which `scratch` makes: (name, tensor) of every parameter
        PREFIX, HF_PARTS, IGNORED, transposed(name)
                        its parameters in transformers' files: a prefix that may be missing there, what parts of a name are
                        called there, a pattern of names to pass over, and whether the matrix is stored as (in, out)

    An attention object is made once a forward and asked once a layer: `attention.layer(i)` gives the one for layer i. There are
    `Packed` and `Sequences` here, and `Prefill` and `Decode` in generate.py.
    """

    lora: LoRAConfig | None = None  # set by lora.add_lora
    origin = None  # set by runtime.build.build_model: a weights.Origin
    PREFIX, HF_PARTS, IGNORED = "", {}, ""
    recompute = False  # activation checkpointing: keep only each block's input, compute the rest again in the backward pass

    @classmethod
    def hf_name(cls, name: str) -> str:
        """Our parameter's or layer's name -> transformers': blocks.0.attn.qkv.weight -> transformer.h.0.attn.c_attn.weight."""
        theirs = ".".join(cls.HF_PARTS.get(part, part) for part in name.split("."))
        return f"lm_{theirs}" if name.split(".")[0] == "head" else cls.PREFIX + theirs

    @staticmethod
    def transposed(name: str) -> bool:
        """Whether transformers stores this parameter as (in, out)."""
        return False

    @property
    def head_weight(self) -> Tensor:
        """The output projection, (vocab_size, n_embd)."""
        return self.embedding.weight if self.head.weight is None else self.head.weight

    def head_parameters(self) -> list[nn.Parameter]:
        return [*self.head.parameters(), *([self.embedding.weight] if self.head.weight is None else [])]

    def states(self, tokens: Tensor, positions: Tensor, attention) -> Tensor:
        """What the last block gives, (rows, length, n_embd) float32."""
        x, rotary = self.embed(tokens, positions)
        recompute = self.recompute and self.training and torch.is_grad_enabled()
        for i, block in enumerate(self.blocks):
            inputs = x, rotary, attention.layer(i)
            x = checkpoint(block, *inputs, use_reentrant=False) if recompute else block(*inputs)
        return x

    def forward(self, batch) -> Tensor:
        """Log-probability of every completion token of a batch of rows.

        `batch` carries integer tensors: `tokens`, `positions`, `example`, `branch`, each (rows, row_len), and `source`,
        `target`, each (completion tokens,): `target` is predicted at the flat position `source` of rows * row_len. Behind the
        last of `completion` there is padding.
        `plain` says that every row is one sequence, so that the causal rule alone will do. `keys`, `ends` and `longest` are
        the attention rule for `Sequences`.
        Returns (completion tokens,) float32, natural logarithm.
        """
        x = self.states(batch.tokens, batch.positions, packed(batch, self.config.head_dim))  # (rows, row_len, n_embd)
        x = self.norm(x.flatten(0, 1).index_select(0, batch.source))  # (completion tokens, n_embd)
        return target_logps(x, self.head_weight, batch.target, self.head.lora)[: len(batch.completion)]

    def logits(self, tokens: Tensor) -> Tensor:
        """Plain sequences (rows, length) -> (rows, length, vocab_size). For tests and curiosity: training never needs it."""
        positions = torch.arange(tokens.size(1), device=tokens.device).expand_as(tokens)
        x = self.states(tokens, positions, Packed(None))
        return self.project(x.flatten(0, 1)).unflatten(0, tokens.shape)

    def project(self, x: Tensor, n_ids: int | None = None, w: Tensor | None = None) -> Tensor:
        """What the last block gives, (rows, n_embd) -> float32 logits of the first `n_ids` tokens (None: all). w: those
        tokens' rows of `head_weight` in the dtype of products, where they were cast before."""
        x, w = self.norm(x), self.head_weight[:n_ids] if w is None else w
        h, b = self.head.lora.down(x) if self.head.lora else (None, None)
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        if self.head.product is not None:
            logits = self.head.product(x)[:, :n_ids]
        else:  # for a few rows the large matrix on the left is up to twice as fast on a CPU
            logits = _float32_product(w.to(x.dtype), x.T).T.contiguous()
        return logits if h is None else _add_product(logits, h.to(x.dtype), b[:n_ids].T.to(x.dtype))

    def inside(self, work, *args, **kwargs):
        """Run `work(self, …)`. FSDP treats it as a forward pass: until it returns, a sharded model's parameters outside
        of the blocks are gathered."""
        return work(self, *args, **kwargs)


def computed(raw: dict, fixed: dict[str, tuple], sizes: dict[str, str] | None = None) -> dict[str, int]:
    """Check a config file's content, and read the sizes in it. ValueError, naming the key, for what is not computed here.

    fixed: key -> the values that are computed; a config without the key means the first. sizes: key -> our name of a size.
    """
    for key, allowed in fixed.items():
        if raw.get(key, allowed[0]) not in allowed:
            raise ValueError(f"{key} is {raw[key]!r}, computed here is {' or '.join(map(repr, allowed))}")
    for key in sizes or ():
        if type(raw.get(key)) is not int or raw[key] <= 0:
            raise ValueError(f"{key} is {raw.get(key)!r}, not a positive whole number")
    return {ours: raw[key] for key, ours in (sizes or {}).items()}


# --- attention ------------------------------------------------------------------------------------------------------


class Packed:
    """Attention within whole rows, packed ones (prompts and their completions) or plain ones: for training and scoring.

    mask: None (every row is one sequence: causal), or what `attention_mask` makes.
    """

    def __init__(self, mask: Tensor | None):
        self.mask = mask

    def layer(self, number: int) -> "Packed":
        return self

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, dropout: float = 0.0) -> Tensor:
        return attend(q, k, v, self.mask, dropout)


class Sequences:
    """The same without a mask, by FlashAttention over sequences of any length: for bfloat16 on CUDA.

    `batch` lists for every sequence where its queries end, and the positions of its keys (see data/batch.py). A query sees the
    keys up to itself, the last query the last key. Dropout on the attention weights is left out: the kernel has none.
    """

    def __init__(self, batch):
        from torch.nn.attention.varlen import varlen_attn  # only here: it loads the compiler, which takes a second

        # torch 2.12 wants to be told that queries may have more heads than keys; before, it took them without a word
        grouped = {"enable_gqa": True} if "enable_gqa" in inspect.signature(varlen_attn).parameters else {}
        self.kernel = partial(varlen_attn, window_size=(-1, 0), **grouped)  # causal
        # where no prompt has several completions, the keys stand in the row as the sequences want them
        self.keys = batch.keys if len(batch.keys) > batch.tokens.numel() else None
        self.query_ends, self.key_ends = batch.ends.int()
        self.longest = batch.longest

    def layer(self, number: int) -> "Sequences":
        return self

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, dropout: float = 0.0) -> Tensor:
        rows, _, length, _ = q.shape
        q, k, v = (t.transpose(1, 2).flatten(0, 1) for t in (q, k, v))  # (rows * length, heads, head_dim)
        if self.keys is not None:
            k, v = k.index_select(0, self.keys), v.index_select(0, self.keys)
        y = self.kernel(q, k, v, self.query_ends, self.key_ends, self.longest, self.longest)
        return y.unflatten(0, (rows, length)).transpose(1, 2)


def packed(batch, head_dim: int) -> Packed | Sequences:
    """The attention for a batch: without a mask where the kernel for that is, else with one, or causal if it is plain."""
    if is_flash(batch.tokens.device.type) and head_dim % 8 == 0 and head_dim <= 256:
        return Sequences(batch)
    return Packed(None if batch.plain else attention_mask(batch.example, batch.branch))


def is_flash(device: str) -> bool:
    """Whether products on this device are now in a dtype that FlashAttention takes."""
    return device == "cuda" and torch.is_autocast_enabled(device) and torch.cuda.is_bf16_supported(including_emulation=False)


def may_attend(example: Tensor, branch: Tensor, row, query, key):
    """The one rule: same example, causal, and the key is the prompt's (branch 0) or of the query's own branch.

    example, branch: (rows, row_len). row, query, key: integer tensors that broadcast together: who looks, and at whom.
    """
    key_branch = branch[row, key]
    return (
        (query >= key) & (example[row, query] == example[row, key]) & ((key_branch == 0) | (key_branch == branch[row, query]))
    )


def attention_mask(example: Tensor, branch: Tensor) -> Tensor:
    """The rule for rows (rows, row_len) as 0 or -inf, (rows, 1, row_len, row_len).

    Padding has an example number of its own (data.batch.PADDING): a padded position sees itself, so no row is empty.
    """
    rows, length = example.shape
    at = torch.arange(length, device=example.device)
    row = torch.arange(rows, device=example.device).view(-1, 1, 1)
    allowed = may_attend(example, branch, row, at[:, None], at[None, :]).unsqueeze(1)
    return torch.where(allowed, 0.0, -math.inf)  # from booleans every layer would make such a tensor and keep it


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, dropout: float = 0.0) -> Tensor:
    """softmax(q k^T / sqrt(head_dim)) v under a mask: None (causal; a single query is the last and sees all), or a tensor.

    q: (rows, heads, length, head_dim); k, v: (rows, kv_heads, length, head_dim), where kv_heads divides heads.
    """
    grouped = q.size(1) != k.size(1)
    causal = q.size(2) > 1 and mask is None  # in this order a bool also while torch.compile traces
    if q.is_cpu and mask is not None and q.size(2) == k.size(2) > 2 * QUERIES and not torch.compiler.is_compiling():

        def part(start: int) -> Tensor:  # keys behind its queries are masked for all of them
            end = start + QUERIES
            seen = q[:, :, start:end], k[:, :, :end], v[:, :, :end], mask[:, :, start:end, :end]
            return F.scaled_dot_product_attention(*seen, dropout, enable_gqa=grouped)

        return torch.cat([part(start) for start in range(0, q.size(2), QUERIES)], 2)
    if grouped and q.is_cuda:  # else no kernel there would do without the whole matrix of scores
        k, v, grouped = *(t.repeat_interleave(q.size(1) // t.size(1), 1) for t in (k, v)), False
    return F.scaled_dot_product_attention(q, k, v, mask, dropout, causal, enable_gqa=grouped)


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
            lse[i : i + chunk], at = normaliser(logits, target[i : i + chunk])
            logps[i : i + chunk] = at - lse[i : i + chunk]
            if keep:
                kept.append(logits)
        ctx.save_for_backward(x, *cast, target, lse, *kept)
        ctx.chunk, ctx.dtypes = chunk, [m if m is None else m.dtype for m in (w, h, b)]
        return logps

    @staticmethod
    def backward(ctx, grad: Tensor):
        x, w, h, b, target, lse, *kept = ctx.saved_tensors
        need_x, need_w, need_h, need_b, *_ = ctx.needs_input_grad
        dx, dh = (torch.empty_like(m) if need else None for m, need in ((x, need_x), (h, need_h)))
        dw = db = None
        for n, i in enumerate(range(0, len(x), ctx.chunk)):
            part = slice(i, i + ctx.chunk)
            logits = kept[n] if kept else _logits(x, w, h, b, part)
            d = derivative(logits, lse[part], target[part], grad[part], x.dtype)
            if dx is not None:
                dx[part] = d @ w
            if dh is not None:
                dh[part] = d @ b
                db = _add_product(db, d.T, h[part])
            if need_w:
                dw = _add_product(dw, d.T, x[part])
        if not len(x):  # with nothing to predict the gradients are zero: a sharded model's ranks must all have them
            dw, db = (torch.zeros_like(m) if need else None for m, need in ((w, need_w), (b, need_b)))
        return dx, *(g if g is None else g.to(t) for g, t in zip((dw, dh, db), ctx.dtypes, strict=True)), None, None, None


def logits_rows(vocab_size: int, card: int) -> tuple[int, int]:
    """Rows of logits that a forward may keep for backward, and rows that exist at once where it keeps none.

    card: bytes of memory of the GPU; 0 = a CPU.
    """
    row = 4 * vocab_size
    if not card:
        return LOGITS_BUDGET // row, max(1, LOGITS_CHUNK // row)
    return card // 16 // row, max(256, 2**30 // row // 256 * 256)  # 1 GiB, in whole tiles of the products


def normaliser(logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """logits (n, vocab) float32, target (n,) -> log-sum-exp of each row (n,), and the target's logit (n,)."""
    if in_triton(logits):
        import head_kernels

        return head_kernels.normaliser(logits, target)
    return torch.logsumexp(logits, 1), logits.gather(1, target[:, None])[:, 0]


def derivative(logits: Tensor, lse: Tensor, target: Tensor, grad: Tensor, dtype: torch.dtype) -> Tensor:
    """d logp_target / d logits = onehot(target) - softmax(logits), times the incoming gradient (n,), in `dtype`. `logits` is
    used up."""
    if in_triton(logits):
        import head_kernels

        return head_kernels.derivative(logits, lse, target, grad, dtype)
    d = logits.sub_(lse[:, None]).exp_().mul_(-grad[:, None])
    return d.scatter_add_(1, target[:, None], grad[:, None]).to(dtype)


def in_triton(logits: Tensor) -> bool:
    """Whether the kernels of head_kernels.py work on this tensor; not on one that only pretends to be on a GPU."""
    return logits.is_cuda and type(logits) is Tensor and has_triton()


def has_triton() -> bool:
    """Whether Triton is installed and knows this GPU: it takes NVIDIA's from compute capability 7.0 (Volta) on."""
    return find_spec("triton") is not None and torch.cuda.get_device_capability() >= (7, 0)


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
    if a.is_cuda:
        return torch.addmm(total, a, b, out_dtype=torch.float32, out=total)
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
    h, b = lora.down(x) if lora else (None, None)
    if torch.is_autocast_enabled(x.device.type):
        x = x.to(torch.get_autocast_dtype(x.device.type))
    card = torch.cuda.get_device_properties(x.device).total_memory if x.is_cuda else 0
    kept, chunk = logits_rows(len(w), card)
    keep = torch.is_grad_enabled() and len(x) <= kept
    return _TargetLogps.apply(x, w, h, b, target, chunk, keep)
