"""What memory a training run needs: `python -m report.memory` prints the table of docs/scaling.md.

Parameters are counted on a model without memory (torch's meta device). What a forward keeps for the backward pass is the
formula of `runtime.optim.forward_memory`. Tests compare both with what a run holds.
"""

import torch

from lora import LoRAConfig, add_lora
from model import SIZES, GPTConfig
from report.formats import markdown
from runtime.optim import forward_memory, memory
from weights import empty

CARD = 80 * 10**9  # bytes of the GPU of the table


def needed(
    c: GPTConfig,
    tokens: int,
    predicted: int,
    *,
    processes=1,
    optimizer="adamw",
    rank=0,
    bfloat16=True,
    checkpointing=False,
    card=0,
) -> dict[str, int]:
    """Bytes on each process, by what they hold, without dropout.

    tokens: positions of the largest micro-batch (micro_tokens at most). predicted: completion tokens among them. rank: of
    LoRA on every linear layer, 0 = all weights are trained. Weights, gradients and optimizer are float32 and shared by the
    processes; of LoRA's frozen weights the blocks' matrices are in the compute dtype, the rest in float32. The rest: see
    `forward_memory`.
    """
    model = empty(c)
    if rank:
        add_lora(model, LoRAConfig(rank, rank, model.LINEAR), torch.bfloat16 if bfloat16 else torch.float32)
    model.recompute = checkpointing
    return {
        "weights": memory(model) // processes,
        "gradients": (memory(model, "sgd") - memory(model)) // processes,
        "optimizer": (memory(model, optimizer) - memory(model, "sgd")) // processes,
        **forward_memory(model, tokens, predicted, bfloat16, processes, card),
    }


def main() -> None:
    cases = {
        "full, 1 GPU": {},
        "full, 1 GPU, activation checkpointing": {"checkpointing": True},
        "full, 2 GPUs": {"processes": 2},
        "full, 8 GPUs, activation checkpointing": {"processes": 8, "checkpointing": True},
        "LoRA of rank 16, 1 GPU": {"rank": 16},
        "LoRA of rank 16, 1 GPU, activation checkpointing": {"rank": 16, "checkpointing": True},
        "full, CPU (float32, 1,024 tokens)": {"bfloat16": False, "tokens": 1024, "predicted": 512, "card": 0},
    }
    table = [["GB a rank (1e9 bytes); 4,096 positions a forward, bfloat16", *SIZES]]
    for name, case in cases.items():
        case = {"tokens": 4096, "predicted": 2048, "card": CARD} | case
        found = [needed(GPTConfig(*size), **case) for size in SIZES.values()]
        table.append([name, *(f"{sum(held.values()) / 1e9:.1f}" for held in found)])
    print(markdown(table), end="")


if __name__ == "__main__":
    main()
