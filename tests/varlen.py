"""torch's varlen_attn on a CPU, where torch has no kernel for it: one sequence after the other, in plain operations.

`on_cpu()` gives the two operators behind `torch.nn.attention.varlen.varlen_attn` a kernel for the CPU. So all that stands
around them is torch's own: the function's arguments, its backward pass, what torch.compile is told of them.
"""

from functools import cache

import torch
from torch import Tensor


def weights(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    """One sequence. q (queries, heads, head_dim), k (keys, kv_heads, head_dim): the last query sees the last key.
    -> softmax of the scores (heads, queries, keys), and the logarithm of its normaliser (heads, queries)."""
    scores = torch.einsum("qhd,khd->hqk", q, spread(k, q)) / q.size(-1) ** 0.5
    seen = torch.ones(len(q), len(k), dtype=torch.bool).tril(len(k) - len(q))
    scores = scores.masked_fill(~seen, -float("inf"))
    return scores.softmax(-1), scores.logsumexp(-1)


def spread(k: Tensor, q: Tensor) -> Tensor:
    """A key/value head for every head of queries."""
    return k.repeat_interleave(q.size(1) // k.size(1), 1)


def slices(ends: Tensor) -> list[slice]:
    return [slice(a, b) for a, b in zip(ends.tolist(), ends.tolist()[1:], strict=False)]


def forward(q, k, v, query_ends, key_ends, max_q, max_k, is_causal, scale, window_size, *rest):
    assert query_ends.dtype == key_ends.dtype == torch.int32 and is_causal and window_size == [-1, 0]
    assert scale is None and rest[0] == (q.size(1) != k.size(1) or rest[0]) and not any(m is not None for m in rest[1:])
    assert query_ends[-1] == len(q) and key_ends[-1] == len(k) == len(v)
    assert max_q >= query_ends.diff().max() and max_k >= key_ends.diff().max()
    y, lse = torch.empty_like(q), torch.empty(q.size(1), len(q))
    for here, there in zip(slices(query_ends), slices(key_ends), strict=True):
        p, lse[:, here] = weights(q[here], k[there])
        y[here] = torch.einsum("hqk,khd->qhd", p, spread(v[there], q))
    return y, lse, torch.zeros(2, dtype=torch.uint64)


def backward(grad, q, k, v, y, lse, query_ends, key_ends, *rest):
    dq, dk, dv = map(torch.zeros_like, (q, k, v))
    for here, there in zip(slices(query_ends), slices(key_ends), strict=True):
        p, _ = weights(q[here], k[there])
        dp = torch.einsum("qhd,khd->hqk", grad[here], spread(v[there], q))
        ds = p * (dp - (p * dp).sum(-1, keepdim=True)) / q.size(-1) ** 0.5
        dq[here] = torch.einsum("hqk,khd->qhd", ds, spread(k[there], q))
        for total, part in ((dk, torch.einsum("hqk,qhd->khd", ds, q[here])), (dv, torch.einsum("hqk,qhd->khd", p, grad[here]))):
            total[there] = part.unflatten(1, (k.size(1), -1)).sum(2)
    return dq, dk, dv


@cache
def on_cpu() -> None:
    from torch.nn.attention import varlen

    varlen._varlen_attn.register_kernel("cpu")(forward)
    varlen._varlen_attn_backward.register_kernel("cpu")(backward)
