"""What memory a training run needs, by formula: `python -m runtime.memory` prints the table of docs/scaling.md.

tests/test_distributed.py and tests/test_memory.py compare the formula with what a run holds.
"""

from model import LOGITS_BUDGET, LOGITS_CHUNK, SIZES, GPTConfig
from runtime.optim import STATES


def parameters(c: GPTConfig) -> int:
    """Parameters of a GPT-2: 12 n_embd^2 + 13 n_embd a block, the embeddings, the last layer norm."""
    return c.n_layer * (12 * c.n_embd**2 + 13 * c.n_embd) + (c.vocab_size + c.block_size + 2) * c.n_embd


def adapter_parameters(c: GPTConfig, rank: int) -> int:
    """Parameters of LoRA on every linear layer, head included, q, k and v apart: rank * (n_in + n_out) each."""
    return rank * (18 * c.n_layer * c.n_embd + c.n_embd + c.vocab_size)


def needed(
    c: GPTConfig,
    tokens: int,
    predicted: int,
    *,
    processes: int = 1,
    optimizer: str = "adamw",
    adapters: int = 0,
    bfloat16: bool = True,
    checkpointing: bool = False,
) -> dict[str, int]:
    """Bytes on each rank, by what they hold, without dropout.

    tokens: positions of the largest micro-batch (micro_tokens at most), predicted: completion tokens among them. adapters:
    LoRA parameters, 0 = all weights are trained. Weights, gradients and optimizer are float32 and shared by the processes;
    of LoRA's frozen weights the blocks' matrices are in the compute dtype, the rest in float32. `working`: weights as the
    products read them: casts to bfloat16 in one process (LoRA's of the tied head only); in several the gathered embeddings and
    two blocks, and the whole gradient, added up over micro-batches.
    """
    total, width = parameters(c), 2 if bfloat16 else 4
    trained = adapters or total
    linear = 12 * c.n_layer * c.n_embd**2
    kept = 36 if bfloat16 else 64  # bytes a layer, token and n_embd: inputs of products, norms and gelu
    a_block = tokens * (kept * c.n_embd + 4 * c.n_head + 16)
    if processes > 1:
        working = 4 * (c.vocab_size + c.block_size) * c.n_embd + width * 2 * linear // c.n_layer + 4 * trained
    else:
        working = 2 * ((0 if adapters else linear) + c.vocab_size * c.n_embd) if bfloat16 else 0
    logits = 4 * c.vocab_size * predicted
    return {
        "weights": (4 * trained if not adapters else width * linear + 4 * (total - linear + adapters)) // processes,
        "gradients": 4 * trained // processes,
        "optimizer": 4 * STATES[optimizer] * trained // processes,
        "working": working,
        "activations": (c.n_layer * tokens * 4 * c.n_embd + a_block if checkpointing else c.n_layer * a_block)
        + 12 * predicted * c.n_embd,
        "logits": logits if logits <= LOGITS_BUDGET else 2 * LOGITS_CHUNK,
    }


def main() -> None:
    tokens, predicted = 4096, 2048
    cases = {
        "full, 1 GPU": {},
        "full, 1 GPU, activation checkpointing": {"checkpointing": True},
        "full, 2 GPUs": {"processes": 2},
        "full, 8 GPUs, activation checkpointing": {"processes": 8, "checkpointing": True},
        "LoRA of rank 16, 1 GPU": {"rank": 16},
        "LoRA of rank 16, 1 GPU, activation checkpointing": {"rank": 16, "checkpointing": True},
        "full, CPU (float32, 1,024 tokens)": {"bfloat16": False, "tokens": 1024, "predicted": 512},
    }
    print(f"| GB a rank (1e9 bytes); {tokens:,} positions a forward, bfloat16 | {' | '.join(SIZES)} |")
    print("|---" * (1 + len(SIZES)) + "|")
    for name, case in cases.items():
        cells = []
        for layers, heads, width in SIZES.values():
            c = GPTConfig(layers, heads, width)
            more = {"tokens": tokens, "predicted": predicted, "adapters": adapter_parameters(c, case.get("rank", 0))} | case
            more.pop("rank", None)
            cells.append(f"{sum(needed(c, **more).values()) / 1e9:.1f}")
        print(f"| {name} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
