"""Prompts -> completions: a KV cache, prefill and decode, and sampling whose draws do not depend on the batch.

for number, sample, tokens in stream(model, {0: [464, 3290]}, 20, stop=50256, n=4, temperature=0.7, seed=1): …
"""

import math
import struct
import sys
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field
from functools import partial
from hashlib import blake2b

import torch
from torch import Tensor

from logprobs import LanguageModel, attend
from lora import Linear

Stop = int | Collection[int]
Place = tuple[int, int, int]  # of a token: the prompt's number, which of its samples, position in the completion
PREFILL_TOKENS, CPU_PREFILL_TOKENS = 8192, 2048  # most tokens of prompts that one forward reads
STEPS = {"cpu": 1, "cuda": 8}  # tokens a row that a device makes before the host looks at them
LOGITS_HELD = 8  # copies of a row's logits, or tensors as large, that drawing holds: counted in `draw`, not measured
WINDOW = 128  # on CUDA the positions that are looked at are rounded up to a multiple of this


class KVCache:
    """Keys and values of the tokens read so far, in rows of unlike length: `kv` (layers, 2, rows, kv_heads, room, head_dim)."""

    def __init__(self, model: LanguageModel, rows: int, room: int):
        c, device = model.config, model.embedding.weight.device
        autocast = torch.is_autocast_enabled(device.type)
        dtype = torch.get_autocast_dtype(device.type) if autocast else torch.float32
        # zeros, not empty: a masked position weighs 0, but 0 times a stray nan in unwritten memory is nan
        self.kv = torch.zeros(c.n_layer, 2, rows, c.n_kv_head, room, c.head_dim, dtype=dtype, device=device)

    def copy(self, to: int, source: "KVCache", row: int, length: int) -> None:
        """Make row `to` the first `length` positions of another cache's (or this one's) row."""
        self.kv[:, :, to, :, :length] = source.kv[:, :, row, :, :length]


class Prefill:
    """Attention over whole prompts, causal, from position 0 on; it writes their keys and values into the cache."""

    def __init__(self, cache: KVCache):
        self.cache = cache

    def layer(self, number: int) -> "Prefill":
        self.keys, self.values = self.cache.kv[number]
        return self

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, dropout: float = 0.0) -> Tensor:
        self.keys[:, :, : k.size(2)] = k
        self.values[:, :, : v.size(2)] = v
        return attend(q, k, v, None)  # causal; what lies right of a shorter prompt is never looked at


class Decode:
    """Attention of one new token a row over the cache's first rows, which hold `lengths` tokens each; it adds the new token.

    lengths: a list; or a tensor that the host does not read, and `window`, the positions that the rows look at, of which
    none may hold more than window - 1 tokens.
    """

    def __init__(self, cache: KVCache, lengths: list[int] | Tensor, window: int = 0):
        self.cache, self.fixed, device = cache, window > 0, cache.kv.device
        self.position = torch.as_tensor(lengths, device=device)
        self.at = torch.arange(len(lengths), device=device), self.position
        if len(lengths) == 1 and not self.fixed:
            self.at = 0, lengths[0]  # plain numbers: no kernel that scatters
        self.window, self.mask = window or max(lengths) + 1, None
        if self.fixed or min(lengths) + 1 < self.window:  # 0 or -inf, (rows, 1, 1, window): from booleans every layer would
            beyond = torch.arange(self.window, device=device).gt(self.position[:, None])[:, None, None]
            self.mask = cache.kv.new_zeros(beyond.shape).masked_fill_(beyond, -math.inf)

    def layer(self, number: int) -> "Decode":
        self.keys, self.values = self.cache.kv[number]
        return self

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, dropout: float = 0.0) -> Tensor:
        row, position = self.at
        self.keys[row, :, position] = k[:, :, 0]
        self.values[row, :, position] = v[:, :, 0]
        keys, values = (cached[: len(q), :, : self.window] for cached in (self.keys, self.values))
        if self.fixed:  # query heads that share keys are so many queries: CUDA's kernels with a mask know no groups of heads
            return attend(q.reshape(len(q), k.size(1), -1, q.size(3)), keys, values, self.mask).reshape(q.shape)
        return attend(q, keys, values, self.mask)


@dataclass
class Draft:
    """A completion being written: of which prompt, which of its samples, and its tokens so far."""

    number: int
    sample: int
    prompt: list[int]
    tokens: list[int] = field(default_factory=list)

    @property
    def read(self) -> int:
        """Tokens whose keys and values are in the cache: all but the last one."""
        return len(self.prompt) + max(0, len(self.tokens) - 1)

    def places(self, steps: int) -> list[Place]:
        """Those of the next tokens."""
        return [(self.number, self.sample, len(self.tokens) + k) for k in range(steps)]


# a prompt's number -> a cache, its row there, and the state at its last token, (n_embd,)
Ready = dict[int, tuple[KVCache, int, Tensor]]


def greedy(model: LanguageModel, prompts: list[list[int]], max_new_tokens: int, stop: Stop, n_ids: int | None = None):
    """The likeliest token each time, for prompts of unlike length in one batch -> a list of tokens a prompt.

    Of a sharded model every rank must ask for the same.
    """

    def work(model: LanguageModel) -> list[list[int]]:
        out = {i: ids for i, _, ids in stream(model, dict(enumerate(prompts)), max_new_tokens, stop, n_ids=n_ids)}
        return [out[i] for i in range(len(prompts))]

    return model.inside(work)


@torch.compiler.set_stance("force_eager")  # each length would compile compiled blocks anew
@torch.no_grad()
def stream(
    model: LanguageModel,
    prompts: dict[int, list[int]],
    max_new_tokens: int,
    stop: Stop,
    *,
    n: int = 1,
    n_ids: int | None = None,
    batch_size: int = 0,
    ended: Callable[[list[int]], bool] | None = None,
    seed: int = 0,
    **how,
) -> Iterator[tuple[int, int, list[int]]]:
    """n completions of every prompt {number: tokens}: (number, which of the n, tokens) as each is finished.

    A completion ends before the token `stop` (or one of several), after `max_new_tokens`, where the model's positions are used
    up, or where `ended(tokens so far)` says so. `how`: the settings of `draw`; greedy by default. What is drawn follows from
    seed, number and sample alone. `n_ids`: ids that the tokenizer has, where the model's vocabulary is padded.
    Raises FloatingPointError if the model computes logits of nan.

    At most `batch_size` (0: no limit) completions are written at once, a token each a step; fewer where the memory of a GPU
    holds no more. One that ends leaves the batch and others take its place, a few at a time; the longest prompts come first,
    so that those side by side are of like length. On CUDA the host looks at the tokens after `STEPS` steps only, and throws
    away those behind a completion's end.
    """
    if not prompts:
        return
    was_training, block_size = model.training, model.config.block_size
    stops = {stop} if isinstance(stop, int) else stop
    queue = [Draft(i, j, ids) for i, ids in sorted(prompts.items(), key=lambda item: len(item[1])) for j in reversed(range(n))]
    room = min(len(queue[-1].prompt) + max_new_tokens, block_size)
    sharded = hasattr(model, "set_requires_gradient_sync")  # its processes take the same steps, whatever memory each has
    slots = min(batch_size or len(queue), len(queue), sys.maxsize if sharded else rows_that_fit(model, room))
    live: list[Draft] = []  # live[r] has row r of the cache
    ready: Ready = {}  # the prompt that was read and has drafts left in the queue
    cache = KVCache(model, slots, room)
    kind = cache.kv.device.type
    head = model.head_weight[:n_ids].to(cache.kv.dtype)  # once for all tokens

    def pick(x: Tensor, keys: Tensor) -> Tensor:
        return draw(model.project(x, n_ids, head), keys, **how)

    def one_step(x: Tensor, drafts: list[Draft]) -> list[list[int]]:  # [step][draft], as FixedSteps gives
        keys = noise_keys([place for b in drafts for place in b.places(1)], seed)
        return [pick(x, keys.to(x.device)).tolist()]

    steps = FixedSteps(model, cache, STEPS[kind], pick) if STEPS[kind] > 1 and not sharded else None
    model.eval()
    try:
        while queue or live:
            free = slots - len(live)
            if queue and (not live or 8 * free >= slots or free >= len(queue)):
                first = len(live)
                live += take(queue, free, CPU_PREFILL_TOKENS if kind == "cpu" else PREFILL_TOKENS)
                x = prefill(model, live[first:], cache, first, ready)
                ready = {number: read for number, read in ready.items() if queue and queue[-1].number == number}
                tokens = one_step(x, live[first:])
            else:
                first, tokens = 0, steps(live, seed) if steps else one_step(decode(model, live, cache), live)
            for row in reversed(range(first, len(live))):
                b = live[row]
                for token in (drawn[row - first] for drawn in tokens):
                    if token == NOT_FINITE:
                        raise FloatingPointError("the model's output is not finite")
                    if token in stops:
                        break
                    b.tokens.append(token)
                    if len(b.tokens) == max_new_tokens or b.read == block_size or (ended and ended(b.tokens)):
                        break
                else:
                    continue
                last = live.pop()
                if last is not b:  # the last row fills the hole
                    live[row] = last
                    cache.copy(row, cache, len(live), last.read)
                yield b.number, b.sample, b.tokens
    finally:
        model.train(was_training)


def rows_that_fit(model: LanguageModel, room: int) -> int:
    """Rows of a cache, with their logits, that 3/4 of a GPU's free memory holds, at least 1: the rest is for reading prompts.
    On a CPU without a limit."""
    row = KVCache(model, 1, room).kv.nbytes + LOGITS_HELD * 4 * model.config.vocab_size
    return max(1, free_memory(model.embedding.weight.device) * 3 // 4 // row)


def free_memory(device: torch.device) -> int:
    """Bytes of a GPU that nothing is kept in."""
    if device.type != "cuda":
        return sys.maxsize
    spare = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)  # torch's own, for the next tensors
    return torch.cuda.mem_get_info(device)[0] + spare


def take(queue: list[Draft], most: int, most_tokens: int) -> list[Draft]:
    """Take drafts off the end of `queue`, at most so many, whose prompts one forward can read: padded to the longest, they
    come to `most_tokens` at the most (or are one prompt), and an eighth of that at most is padding (a guess, not tuned)."""
    group = [queue.pop()]
    longest = used = len(group[0].prompt)
    prompts = 1
    while queue and len(group) < most:
        if queue[-1].number != group[-1].number:
            prompts, used = prompts + 1, used + len(queue[-1].prompt)
            if prompts * longest > most_tokens or 8 * used < 7 * longest * prompts:
                break
        group.append(queue.pop())
    return group


def prefill(model: LanguageModel, drafts: list[Draft], cache: KVCache, first: int, ready: Ready) -> Tensor:
    """Bring the drafts' prompts into the cache's rows from `first` on. Prompts that are not `ready` are read, each once, and
    are ready then. Returns the state at each draft's last token, (drafts, n_embd)."""
    device = cache.kv.device
    prompts = {d.number: d.prompt for d in drafts if d.number not in ready}
    if prompts:
        longest = max(map(len, prompts.values()))
        tokens = torch.tensor([p + [0] * (longest - len(p)) for p in prompts.values()], device=device)
        own = KVCache(model, len(prompts), longest)
        x = model.states(tokens, torch.arange(longest, device=device).expand_as(tokens), Prefill(own))
        for row, (number, prompt) in enumerate(prompts.items()):
            ready[number] = own, row, x[row, len(prompt) - 1]
    for row, d in enumerate(drafts, start=first):
        source, at, _ = ready[d.number]
        cache.copy(row, source, at, len(d.prompt))
    return torch.stack([ready[d.number][2] for d in drafts])


def decode(model: LanguageModel, live: list[Draft], cache: KVCache) -> Tensor:
    """Read each live draft's last token -> its state, (drafts, n_embd)."""
    attention = Decode(cache, [b.read for b in live])
    tokens = torch.tensor([[b.tokens[-1]] for b in live], device=cache.kv.device)
    return model.states(tokens, attention.position[:, None], attention)[:, 0]


class FixedSteps:
    """Several steps of `decode` and `pick` without the host, on rows and windows of few sizes: for CUDA.

    A size is run as it is when it first comes, and captured as a CUDA graph when it comes again: launching the kernels one by
    one takes longer than they take. What changes from call to call stands in tensors that stay where they are.

    pick: (state (rows, n_embd), noise keys (rows, 2)) -> tokens (rows,).
    """

    def __init__(self, model: LanguageModel, cache: KVCache, n: int, pick: Callable[[Tensor, Tensor], Tensor]):
        self.model, self.cache, self.n, self.pick = model, cache, n, pick
        self.rows, self.room, device = cache.kv.size(2), cache.kv.size(4), cache.kv.device
        # of a row: its last token, that token's position, and two numbers a step from which the noise is made
        self.inputs = torch.zeros(self.rows, 2 + 2 * n, dtype=torch.int32, device=device)
        self.drawn = torch.zeros(n, self.rows, dtype=torch.long, device=device)
        self.graphs: dict[tuple[int, ...], torch.cuda.CUDAGraph | None] = {}  # None: of a size that came once
        self.pool = torch.cuda.graph_pool_handle() if device.type == "cuda" else None

    def __call__(self, live: list[Draft], seed: int) -> list[list[int]]:
        """The live drafts' next `n` tokens each, [step][draft]. A draft's tokens behind its end mean nothing."""
        rows = min(2 ** (len(live) - 1).bit_length(), self.rows)
        window = min(-(-(max(b.read for b in live) + self.n) // WINDOW) * WINDOW, self.room)
        standing = torch.tensor([(b.tokens[-1], b.read) for b in live], dtype=torch.int32)
        keys = noise_keys([place for b in live for place in b.places(self.n)], seed)
        self.inputs[: len(live)] = torch.cat([standing, keys.view(len(live), -1)], 1)
        self.launch(rows, window)
        return self.drawn[:, : len(live)].tolist()

    def launch(self, *size: int) -> None:
        """`steps` of (rows, window)."""
        if size not in self.graphs or self.pool is None:
            self.graphs[size] = None
            return self.steps(*size)
        if self.graphs[size] is None:
            self.graphs[size] = torch.cuda.CUDAGraph()
            # the pool: graphs that run one after the other share memory. thread_local: other threads may wait for the GPU
            with torch.cuda.graph(self.graphs[size], self.pool, capture_error_mode="thread_local"):
                self.steps(*size)
        self.graphs[size].replay()

    def steps(self, rows: int, window: int) -> None:
        """From the first rows of `inputs` to those of `drawn`. Rows that hold no draft, or one that has ended, only must stay
        within the window."""
        token, position = self.inputs[:rows, :2].long().T
        for k, drawn in enumerate(self.drawn[:, :rows]):
            position = position.clamp(max=window - 1)
            attention = Decode(self.cache, position, window)
            x = self.model.states(token[:, None], attention.position[:, None], attention)[:, 0]
            drawn.copy_(self.pick(x, self.inputs[:rows, 2 + 2 * k : 4 + 2 * k]))
            token, position = drawn.clamp(min=0), position + 1


# --- a CPU's layout of the weights -----------------------------------------------------------------------------------


@torch.no_grad()
def lay_out(model: LanguageModel, rows: int) -> None:
    """Put the matrices into oneDNN's own order of blocks, for decoding `rows` rows at once on a CPU in float32.

    The model is good for nothing else afterwards.
    """
    for layer in model.modules():
        if isinstance(layer, Linear) and torch.backends.mkldnn.is_available():
            weight = model.head_weight if layer is model.head else layer.weight
            weight = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), rows)
            layer.product = partial(_blocked_product, weight, layer.bias)
            layer.weight = None


def _blocked_product(weight: Tensor, bias: Tensor | None, x: Tensor) -> Tensor:
    """x (…, n_in) -> (…, n_out)."""
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


# --- sampling --------------------------------------------------------------------------------------------------------


NOT_FINITE = -1  # in the place of a token


def draw(logits: Tensor, keys: Tensor, *, temperature: float = 0.0, top_k: int = 0, top_p: float = 1.0) -> Tensor:
    """A token for each row of logits (rows, vocab), float32 -> (rows,); `keys`: its `noise_keys`, (rows, 2).

    Softmax at `temperature` (below 1e-6: the likeliest token); of that the `top_k` likeliest (0: all); of those the fewest
    likeliest that have `top_p` of their probability. Of what is left the token with the largest p / e is taken, e exponential
    noise: that is a draw from p (the Gumbel-max trick). Unlike one uniform number compared with running sums, it gives
    another token for logits that differ by rounding only where two tokens are that close.
    NOT_FINITE stands for a row whose largest logit is nan (one of its logits is) or infinite.
    """
    most, tokens = logits.max(-1)
    if temperature >= 1e-6:  # one that is 0 in float32 would make 0 / 0 of the likeliest
        tokens = _draw((logits - most[:, None]) / temperature, keys, top_k, top_p)
    return tokens.masked_fill(~most.isfinite(), NOT_FINITE)  # marked on the device: looking there would be one more wait


def _draw(logits: Tensor, keys: Tensor, top_k: int, top_p: float) -> Tensor:
    """`draw` from logits that the temperature has divided -> (rows,) token ids."""
    p = logits.softmax(-1)
    size = p.size(-1)
    ids = torch.arange(size, device=p.device)
    if 0 < top_k < size:
        p, ids = p.topk(top_k)  # largest first
        p = p / p.sum(-1, keepdim=True)
    if top_p < 1:
        if ids.dim() == 1:
            # on a CPU sorting all would take longer than the model; on CUDA the host must not look
            for width in (1024, 8192, size) if p.device.type == "cpu" else (size,):
                top, ids = p.topk(min(width, size))
                if width >= size or top.sum(-1).min() >= top_p:
                    break
            p = top
        p = p.masked_fill(p.cumsum(-1) - p >= top_p, 0)
    best = (p / exponential_noise(ids, keys)).argmax(-1, keepdim=True)
    return ids.expand_as(p).gather(1, best)[:, 0]


def noise_keys(places: list[Place], seed: int) -> Tensor:
    """A key of 64 bits for each place, by a cryptographic hash: (places, 2) int32."""
    keys = b"".join(blake2b(struct.pack("<4q", seed, *place), digest_size=8).digest() for place in places)
    return torch.frombuffer(bytearray(keys), dtype=torch.int32).view(-1, 2)


def exponential_noise(ids: Tensor, keys: Tensor) -> Tensor:
    """Exponential random numbers (rows, ids), a function of the row's key and the id alone, on any device.

    With the key each id is scrambled by multiplications and shifts as in MurmurHash3's finalizer (Appleby 2011), all modulo
    2^32.
    """
    a, b = keys.T.unsqueeze(-1)  # each (rows, 1)
    x = (ids.int() * -1640531527) ^ a  # 2^32 / golden ratio
    for shift, multiplier in ((16, -2048144789), (13, -1028477387)):
        x ^= (x >> shift) & (2 ** (32 - shift) - 1)  # a logical shift
        x = x * multiplier + b
    x ^= (x >> 16) & 0xFFFF
    u = x.float() * 2.0**-32  # in [-1/2, 1/2), finest near 0, where the winners lie
    u = (u + (u < 0) + 2.0**-33).clamp_(max=1 - 2.0**-24)  # below 1, so that no noise is infinite: it would lose to p = 0
    return torch.log1p(-u).neg_()
