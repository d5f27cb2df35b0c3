"""Two passes over a chunk of logits in Triton, for CUDA: logprobs.py has the same in torch, where each is four passes.

Each program reads its logits once. Tests run the kernels on a CPU with Triton's interpreter (TRITON_INTERPRET=1).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 2048  # logits that a program has in registers at once


@triton.jit
def _normaliser(logits, target, lse, at, vocab, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    logits += row * vocab
    columns = tl.arange(0, BLOCK)
    # each place of the block has a maximum and a sum of its own until the end; from -inf the first difference would be nan
    largest = tl.full([BLOCK], -1e30, tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, vocab, BLOCK):
        x = tl.load(logits + start + columns, mask=start + columns < vocab, other=-float("inf"))
        larger = tl.maximum(largest, x)
        total = total * tl.exp(largest - larger) + tl.exp(x - larger)
        largest = larger
    most = tl.max(largest, 0)
    tl.store(lse + row, most + tl.log(tl.sum(total * tl.exp(largest - most), 0)))
    tl.store(at + row, tl.load(logits + tl.load(target + row)))


@triton.jit
def _derivative(logits, lse, target, grad, out, vocab, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < vocab
    p = tl.exp(tl.load(logits + row * vocab + columns, mask=inside, other=0.0) - tl.load(lse + row))
    d = tl.where(columns == tl.load(target + row), 1.0 - p, -p) * tl.load(grad + row)
    tl.store(out + row * vocab + columns, d.to(out.dtype.element_ty), mask=inside)


def normaliser(logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """As logprobs.normaliser. logits (n, vocab) float32, target (n,) int64, both contiguous."""
    lse, at = (torch.empty(len(logits), device=logits.device) for _ in range(2))
    with torch.cuda.device_of(logits):  # where the kernel runs
        _normaliser[(len(logits),)](logits, target, lse, at, logits.size(1), BLOCK, num_warps=8)
    return lse, at


def derivative(logits: Tensor, lse: Tensor, target: Tensor, grad: Tensor, dtype: torch.dtype) -> Tensor:
    """As logprobs.derivative, but `logits` stays as it is. grad (n,) may be one number, expanded."""
    out = torch.empty_like(logits, dtype=dtype)
    grid = len(logits), triton.cdiv(logits.size(1), BLOCK)
    with torch.cuda.device_of(logits):
        _derivative[grid](logits, lse, target, grad.contiguous(), out, logits.size(1), BLOCK, num_warps=8)
    return out
