"""Prompts -> completions: a KV cache, prefill and decode, and sampling whose draws do not depend on the batch.

for number, sample, tokens in stream(model, {0: [464, 3290]}, 20, stop=50256, n=4, temperature=0.7, seed=1): …
"""

import math
import struct
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field
from functools import partial
from hashlib import blake2b

import torch
import torch.nn.functional as F
from torch import Tensor

from logprobs import LanguageModel, attend
from lora import Linear

Stop = int | Collection[int]
PREFILL_TOKENS, CPU_PREFILL_TOKENS = 8192, 2048  # most tokens of prompts that one forward reads


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

    A few rows at a time look no further than the longest of them. On a GPU more calls would cost more than that saves.
    """

    def __init__(self, cache: KVCache, lengths: list[int]):
        self.cache, device = cache, cache.kv.device
        self.position = torch.tensor(lengths, device=device)
        # for a single row plain numbers: no kernel that scatters
        self.at = (torch.arange(len(lengths), device=device), self.position) if len(lengths) > 1 else (0, lengths[0])
        few = 4 if device.type == "cpu" else len(lengths)
        self.parts = []  # (rows, positions that they look at, mask)
        for rows in (slice(i, i + few) for i in range(0, len(lengths), few)):
            window, mask = max(lengths[rows]) + 1, None
            if min(lengths[rows]) + 1 < window:  # 0 or -inf, (few rows, 1, 1, window): from booleans every layer would make it
                beyond = torch.arange(window, device=device).gt(self.position[rows, None])[:, None, None]
                mask = cache.kv.new_zeros(beyond.shape).masked_fill_(beyond, -math.inf)
            self.parts.append((rows, window, mask))

    def layer(self, number: int) -> "Decode":
        self.keys, self.values = self.cache.kv[number]
        return self

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, dropout: float = 0.0) -> Tensor:
        row, position = self.at
        self.keys[row, :, position] = k[:, :, 0]
        self.values[row, :, position] = v[:, :, 0]
        keys, values = self.keys[: len(q)], self.values[: len(q)]
        out = [attend(q[rows], keys[rows, :, :window], values[rows, :, :window], mask) for rows, window, mask in self.parts]
        return out[0] if len(out) == 1 else torch.cat(out)


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

    @property
    def place(self) -> tuple[int, int, int]:
        return self.number, self.sample, len(self.tokens)


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
    **how,
) -> Iterator[tuple[int, int, list[int]]]:
    """n completions of every prompt {number: tokens}: (number, which of the n, tokens) as each is finished.

    A completion ends before the token `stop` (or one of several), after `max_new_tokens`, where the model's positions are used
    up, or where `ended(tokens so far)` says so. `how`: the settings of `draw`; greedy by default. What is drawn follows from
    seed, number and sample alone. `n_ids`: ids that the tokenizer has, where the model's vocabulary is padded.
    Raises FloatingPointError if the model computes logits of nan.

    At most `batch_size` (0: no limit) completions are written at once, a token each a step. One that ends leaves the batch
    and others take its place, a few at a time; the longest prompts come first, so that those side by side are of like length.
    """
    was_training, block_size = model.training, model.config.block_size
    stops = {stop} if isinstance(stop, int) else stop
    queue = [Draft(i, j, ids) for i, ids in sorted(prompts.items(), key=lambda item: len(item[1])) for j in reversed(range(n))]
    slots = min(batch_size or len(queue), len(queue))
    live: list[Draft] = []  # live[r] has row r of the cache
    ready: Ready = {}  # the prompt that was read and has drafts left in the queue
    model.eval()
    try:
        cache = KVCache(model, slots, min(len(queue[-1].prompt) + max_new_tokens, block_size)) if queue else None
        while queue or live:
            free = slots - len(live)
            if queue and (not live or 8 * free >= slots or free >= len(queue)):
                first = len(live)
                live += take(queue, free, CPU_PREFILL_TOKENS if cache.kv.device.type == "cpu" else PREFILL_TOKENS)
                x = prefill(model, live[first:], cache, first, ready)
                ready = {number: read for number, read in ready.items() if queue and queue[-1].number == number}
            else:
                first = 0
                x = decode(model, live, cache)
            tokens = draw(model.project(x, n_ids), [b.place for b in live[first:]], **how)
            for row in reversed(range(first, len(live))):
                b, token = live[row], tokens[row - first]
                if token not in stops:
                    b.tokens.append(token)
                    full = len(b.tokens) == max_new_tokens or b.read == block_size
                    if not full and not (ended and ended(b.tokens)):
                        continue
                last = live.pop()
                if last is not b:  # the last row fills the hole
                    live[row] = last
                    cache.copy(row, cache, len(live), last.read)
                yield b.number, b.sample, b.tokens
    finally:
        model.train(was_training)


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


# --- a CPU's layout of the weights -----------------------------------------------------------------------------------

SHARES = 32  # of a matrix, for at most so many threads to read


@torch.no_grad()
def lay_out(model: LanguageModel, rows: int) -> None:
    """Ready the matrices for decoding `rows` rows at once on a CPU in float32. The model is good for nothing else afterwards.

    Of one row torch's product with a vector leaves most to one thread: here each thread reads a share of the matrix. For more
    rows the weights are put into oneDNN's own order of blocks.
    """
    shared, reordered = rows == 1, rows > 1 and torch.backends.mkldnn.is_available()
    for layer in model.modules():
        if isinstance(layer, Linear) and (shared or reordered):
            weight = model.head_weight if layer is model.head else layer.weight
            bias = torch.zeros(len(weight)) if layer.bias is None else layer.bias
            if shared:
                layer.product = partial(_shared_product, *_shares(weight, bias))
            else:
                weight = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), rows)
                layer.product = partial(_blocked_product, weight, layer.bias)
                layer.weight = None


def _shares(weight: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
    even = len(weight) - len(weight) % SHARES
    w, b = weight[:even].view(SHARES, -1, weight.size(1)).mT, bias[:even].view(SHARES, 1, -1)
    return w, b, weight[even:], bias[even:]


def _shared_product(w: Tensor, bias: Tensor, rest: Tensor, rest_bias: Tensor, x: Tensor) -> Tensor:
    """x (…, n_in) -> (…, n_out); of one row the threads share the work."""
    n_in = x.size(-1)
    if x.numel() == n_in:
        y = torch.baddbmm(bias, x.expand(SHARES, 1, n_in), w).view(*x.shape[:-1], bias.numel())
    else:  # a prompt
        y = F.linear(x, w.mT.reshape(-1, n_in), bias.flatten())
    return y if not len(rest) else torch.cat([y, F.linear(x, rest, rest_bias)], -1)


def _blocked_product(weight: Tensor, bias: Tensor | None, x: Tensor) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


# --- sampling --------------------------------------------------------------------------------------------------------


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
