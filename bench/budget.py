"""The budget of a DPO step: which part of it an operation belongs to, and what arithmetic says of each part on an H100.

    python -m bench.budget        prints the estimates for 124M and xl; `--suite gpu` measures them

Estimated are seconds from floating-point operations and bytes. The datasheet of an H100 SXM gives 989 TFLOP/s in bfloat16
(dense) and 3.35 TB/s; real kernels come to a part of that, and the shares below are assumptions, not measurements.
"""

import numpy as np
import torch

from bench.common import LENGTHS, SHAPES, flops, matrices
from data.batch import collate
from data.encode import Encoded
from data.plan import plan_once
from model import GPTConfig
from runtime.distributed import Compute

PARTS = ("GEMM", "element-wise", "attention", "head", "optimizer", "gaps")
H100, H100_BYTES = 989e12, 3.35e12  # a second
LARGE, FLASH, STREAM = 0.7, 0.4, 0.8  # assumed shares: of a large product, of flash attention, of reading and writing
LAUNCH, WAIT = (
    1e-5,
    5e-5,
)  # assumed seconds: of the host for each kernel, autograd included; for a wait, until work is there again
# Counted on the pretended GPU with 2 and 4 layers, 1 and 4 forwards, uncompiled: kernels of a layer in a forward with its
# backward, of the rest of a forward, and of a step; waits of a forward and of a step.
KERNELS, WAITS = (52, 158, 30), (9, 14)
# Bytes that element-wise kernels move for each token, layer and unit of width, as the blocks stand (uncompiled). Forward: two
# norms and their casts 28, two residual sums 20, GELU 16, attention's output in order 4. Backward about twice that.
BLOCK_BYTES = 68 + 130
LOGIT_PASSES = 11  # over float32 logits: forward and backward, see logprobs._TargetLogps
PRODUCTS = ("mm", "addmm", "bmm", "baddbmm", "linear", "matmul")


def part_of(event) -> str:
    """The part that a profiler's event belongs to, by its own name and those of the operations around it."""
    names = []
    while event is not None:
        names.append(event.name)
        event = event.cpu_parent
    whole = " ".join(names)
    if "TargetLogps" in whole:
        return "head"
    if "Optimizer." in whole or "_foreach_" in whole:  # clipping too
        return "optimizer"
    if any(word in whole for word in ("attention", "attn", "flex")):
        return "attention"
    if any(name.removeprefix("aten::") in PRODUCTS for name in names):
        return "GEMM"
    return "element-wise"


def step(items: list[Encoded], model: GPTConfig, micro_tokens: int = 4096) -> dict[str, float]:
    """Seconds of a DPO step on these examples, by part. Weights are cast and gradients added up once a forward."""
    forwards, positions = layout(items, micro_tokens)
    predicted = sum(i.completion_tokens for i in items)
    blocks, head = matrices(model)
    weights, rate, bandwidth = blocks + head, LARGE * H100, STREAM * H100_BYTES
    of_head = 6 * head * predicted
    attended = flops(items, model, train=True) - of_head - 6 * blocks * sum(i.row_tokens for i in items)
    found = {
        "GEMM": 6 * blocks * positions / rate,
        "element-wise": (BLOCK_BYTES * model.n_embd * model.n_layer * positions + 24 * forwards * weights) / bandwidth,
        "attention": attended * 3.5 / 3 / (FLASH * H100),  # the backward pass computes the scores again
        "head": of_head / rate + 4 * LOGIT_PASSES * model.vocab_size * predicted / bandwidth,
        "optimizer": 40 * weights / bandwidth,  # AdamW 28 bytes a weight, norm and scaling of the gradient 12
    }
    a_layer, a_forward, a_step = KERNELS
    host = LAUNCH * (forwards * (a_layer * model.n_layer + a_forward) + a_step)
    waits = WAIT * (forwards * WAITS[0] + WAITS[1])
    return found | {"gaps": max(0.0, host - sum(found.values())) + waits}


def layout(items: list[Encoded], micro_tokens: int) -> tuple[int, int]:
    """How many forwards a step on CUDA takes, and how many positions, padding included."""
    compute = Compute(torch.device("cuda:0"), torch.bfloat16)
    multiple = compute.row_multiple(micro_tokens)
    micros = plan_once(items, micro_tokens, multiple)[0]
    shapes = [collate([[items[i] for i in row] for row in rows], multiple).tokens.shape for rows in micros]
    return len(shapes), sum(shape.numel() for shape in shapes)


def main() -> None:
    rng = np.random.default_rng(0)
    p_mean, p_sd, c_mean, c_sd = LENGTHS["hh"]

    def length(mean: float, sd: float, most: int) -> int:
        return min(most, max(2, round(rng.lognormal(mean, sd))))

    def example() -> Encoded:
        completions = [np.zeros(length(c_mean, c_sd, 200), np.int32) for _ in range(2)]
        return Encoded(np.zeros(length(p_mean, p_sd, 800), np.int32), completions, 0, 0)

    items = [example() for _ in range(64)]
    forwards, positions = layout(items, 4096)
    print(
        f"a DPO step of 64 HH pairs on an H100, all estimated: {sum(i.row_tokens for i in items):,} tokens in {positions:,} "
        f"positions, {forwards} forwards"
    )
    for name in ("gpt2", "gpt2-xl"):
        sizes = dict(zip(("n_layer", "n_head", "n_embd"), SHAPES[name], strict=True))
        model = GPTConfig(**sizes)
        found = step(items, model)
        total = sum(found.values())
        mfu = flops(items, model, train=True) / total / H100
        print(f"{name}: {1e3 * total:.1f} ms, {len(items) / total:,.0f} pairs/s, MFU {mfu:.0%} of the datasheet")
        for part, seconds in found.items():
            print(f"    {part:14}{1e3 * seconds:8.1f} ms {seconds / total:6.1%}")


if __name__ == "__main__":
    main()
