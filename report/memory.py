"""What memory a training run needs: `python -m report.memory` prints the table of docs/scaling.md.

Parameters are counted on a model without memory (torch's meta device). What a forward keeps for the backward pass is a
formula, a line a model family in `KEPT`. Tests compare both with what a run holds.
"""

from logprobs import LOGITS_BUDGET, LOGITS_CHUNK
from lora import LoRAConfig, add_lora
from model import SIZES, GPTConfig
from report.formats import markdown
from runtime.optim import OPTIMIZERS
from weights import empty

# Bytes that a block keeps for the backward pass, a token and unit of width, by the bytes of the compute dtype: the inputs of
# its matrix products, norms and activation function.
KEPT = {GPTConfig: {2: 36, 4: 64}}


def parameters(c: GPTConfig) -> int:
    return sum(p.numel() for p in empty(c).parameters())


def adapter_parameters(c: GPTConfig, rank: int) -> int:
    """Parameters of LoRA of this rank on every linear layer, head included, q, k and v apart."""
    model = empty(c)
    add_lora(model, LoRAConfig(rank, rank, model.LINEAR))
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def needed(
    c: GPTConfig, tokens: int, predicted: int, *, processes=1, optimizer="adamw", rank=0, bfloat16=True, checkpointing=False
) -> dict[str, int]:
    """Bytes on each process, by what they hold, without dropout.

    tokens: positions of the largest micro-batch (micro_tokens at most). predicted: completion tokens among them. rank: of
    LoRA, 0 = all weights are trained. Weights, gradients and optimizer are float32 and shared by the processes; of LoRA's
    frozen weights the blocks' matrices are in the compute dtype, the rest in float32. `working` is weights in the form that
    the products read. In one process: casts to bfloat16 (with LoRA of the head only). In several: the gathered weights, which
    stay from micro-batch to micro-batch, and the whole gradient, added up over them.
    """
    model = empty(c)
    total, matrices = parameters(c), sum(p.numel() for p in model.blocks.parameters() if p.dim() == 2)
    outside = total - sum(p.numel() for p in model.blocks.parameters())
    head = sum(p.numel() for p in model.head_parameters())
    adapters = adapter_parameters(c, rank) if rank else 0
    trained, width = adapters or total, 2 if bfloat16 else 4
    a_block = tokens * (KEPT[type(c)][width] * c.n_embd + 4 * c.n_head + 16)
    blocks = 4 * c.n_layer * c.n_embd * tokens + a_block if checkpointing else c.n_layer * a_block
    if processes > 1:
        working = 4 * outside + width * matrices + 4 * trained
    else:
        working = 2 * ((0 if rank else matrices) + head) if bfloat16 else 0
    logits = 4 * c.vocab_size * predicted
    return {
        "weights": (width * matrices + 4 * (total - matrices + adapters) if rank else 4 * total) // processes,
        "gradients": 4 * trained // processes,
        "optimizer": 4 * OPTIMIZERS[optimizer].states * trained // processes,
        "working": working,
        "activations": blocks + 12 * predicted * c.n_embd,
        "logits": logits if logits <= LOGITS_BUDGET else 2 * LOGITS_CHUNK,
    }


def main() -> None:
    cases = {
        "full, 1 GPU": {},
        "full, 1 GPU, activation checkpointing": {"checkpointing": True},
        "full, 2 GPUs": {"processes": 2},
        "full, 8 GPUs, activation checkpointing": {"processes": 8, "checkpointing": True},
        "LoRA of rank 16, 1 GPU": {"rank": 16},
        "LoRA of rank 16, 1 GPU, activation checkpointing": {"rank": 16, "checkpointing": True},
        "full, CPU (float32, 1,024 tokens)": {"bfloat16": False, "tokens": 1024, "predicted": 512},
    }
    table = [["GB a rank (1e9 bytes); 4,096 positions a forward, bfloat16", *SIZES]]
    for name, case in cases.items():
        case = {"tokens": 4096, "predicted": 2048} | case
        found = [needed(GPTConfig(*size), **case) for size in SIZES.values()]
        table.append([name, *(f"{sum(held.values()) / 1e9:.1f}" for held in found)])
    print(markdown(table), end="")


if __name__ == "__main__":
    main()
