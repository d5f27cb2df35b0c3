"""Optimizers, learning-rate schedules, clipping."""

import math
from decimal import Decimal
from typing import NamedTuple

import torch
from torch import Tensor, nn

from base.progress import count
from logprobs import logits_rows
from runtime.distributed import gradient_norm, own


class Optimizer(NamedTuple):
    """`kind`: torch's class. `states`: float32 numbers that it keeps a parameter. `lr`: the least and the largest rate that SFT
    of all weights usually takes."""

    kind: type[torch.optim.Optimizer]
    states: int
    lr: tuple[float, float]


OPTIMIZERS = {
    "adamw": Optimizer(torch.optim.AdamW, 2, (1e-6, 2e-4)),
    "rmsprop": Optimizer(torch.optim.RMSprop, 1, (1e-6, 2e-4)),
    "sgd": Optimizer(torch.optim.SGD, 0, (1e-3, 10)),
}
TINY, SMALL = 20_000_000, 200_000_000  # parameters


def memory(model: nn.Module, optimizer: str = "") -> int:
    """Bytes on this process of its part of the weights, and, where an optimizer trains them, of gradients and what it keeps."""
    more = 1 + OPTIMIZERS[optimizer].states if optimizer else 0
    return sum(own(p).nbytes * (1 + more * p.requires_grad) for p in model.parameters())


def forward_memory(
    model: nn.Module, tokens: int, predicted: int, bfloat16: bool, processes: int = 1, card: int = 0
) -> dict[str, int]:
    """Bytes on this process, by what they hold, of one forward and backward pass beside `memory`, without dropout.

    tokens: positions of the micro-batch. predicted: completion tokens among them. card: see `logprobs.logits_rows`.
    `working` is weights in the form that the products read. In one process: casts to bfloat16. In several: the gathered
    weights, which stay from micro-batch to micro-batch, and the whole gradient, added up over them.
    """
    c, width = model.config, 2 if bfloat16 else 4
    parameters, blocks = list(model.parameters()), list(model.blocks.parameters())
    a_block = tokens * (8 * c.n_embd + width * c.kept + 4 * c.n_head + 16)  # the norms' inputs are float32
    kept = 4 * c.n_layer * c.n_embd * tokens + a_block if model.recompute else c.n_layer * a_block
    if processes > 1:
        outside = sum(p.numel() for p in parameters) - sum(p.numel() for p in blocks)
        matrices = sum(p.numel() for p in blocks if p.dim() == 2)
        trained = sum(p.numel() for p in parameters if p.requires_grad)
        working = 4 * outside + width * matrices + 4 * trained
    else:
        cast = [p for p in blocks if p.dim() == 2 and p.dtype == torch.float32] + model.head_parameters()
        working = 2 * sum(p.numel() for p in cast) if bfloat16 else 0
    kept_rows, chunk = logits_rows(c.vocab_size, card)
    return {
        "working": working,
        "activations": kept + 12 * predicted * c.n_embd,
        "logits": 4 * c.vocab_size * (predicted if predicted <= kept_rows else 2 * min(chunk, predicted)),
    }


def make(model: nn.Module, cfg) -> torch.optim.Optimizer:
    """The optimizer that `cfg` names. Matrices and embeddings decay by `weight_decay`, biases and layer-norm scales do not.

    adamw: fused into one kernel. rmsprop: torch's defaults (alpha 0.99), the choice of the DPO paper. sgd: without momentum.
    The decay is decoupled (Loshchilov & Hutter, arXiv 1711.05101): a step first scales the weights by 1 - lr * weight_decay.
    torch's RMSprop adds weight_decay times the weight to the gradient, which it then divides by the gradient's own size.

    Where the optimizer's `found_inf` (a scalar on the device) is 1, a step leaves the weights as they are: torch's fused AdamW
    reads it by itself, for the others the gradients and the decay become 0.
    """
    model.state_dict()  # a forward may have come before: FSDP puts back the shards, which are what is trained
    trained = [p for p in model.parameters() if p.requires_grad]
    matrices, rest = [p for p in trained if p.dim() >= 2], [p for p in trained if p.dim() < 2]
    if cfg.optimizer == "adamw":
        groups = [{"params": matrices, "weight_decay": cfg.weight_decay}]
        groups += [{"params": rest, "weight_decay": 0.0}] if rest else []  # adapters are matrices only
        return OPTIMIZERS["adamw"].kind(groups, lr=cfg.lr, betas=(cfg.adam_beta1, cfg.adam_beta2), fused=True)
    optimizer = OPTIMIZERS[cfg.optimizer].kind(trained, lr=cfg.lr)

    @torch.no_grad()
    def decay(*_) -> None:
        found_inf = optimizer.__dict__.pop("found_inf", None)  # SGD itself refuses it
        if found_inf is not None:
            for p in trained:
                p.grad.masked_fill_(found_inf.bool(), 0)
        for p in matrices if cfg.weight_decay else ():
            left = 1 - optimizer.param_groups[0]["lr"] * cfg.weight_decay
            p.mul_(left if found_inf is None else torch.where(found_inf.bool(), 1.0, left))

    optimizer.register_step_pre_hook(decay)
    return optimizer


def rounded_up(share: float, steps: int) -> int:
    """`share` of `steps`, as the share is written: as floats 0.55 * 100 is 55.00000000000001, and would come to 56."""
    return math.ceil(Decimal(str(share)) * steps)


def warmup_steps(cfg, steps: int) -> int:
    """`warmup` as steps: a value below 1 is a share of the whole run."""
    return rounded_up(cfg.warmup, steps) if cfg.warmup < 1 else int(cfg.warmup)


def learning_rate(cfg, step: int, steps: int) -> float:
    """The rate of optimizer step `step` (from 0) of `steps`: a linear climb to `lr`, then `schedule` down to `min_lr`.

    cosine: Loshchilov & Hutter 2016 (arXiv 1608.03983), one half period without restarts.
    """
    warmup = warmup_steps(cfg, steps)
    if step < warmup:
        return cfg.lr * (step + 1) / warmup
    if cfg.schedule == "constant":
        return cfg.lr
    done = (step - warmup) / max(1, steps - warmup)  # 0 at the end of warmup, just under 1 at the last step
    left = (1 + math.cos(math.pi * done)) / 2 if cfg.schedule == "cosine" else 1 - done
    return cfg.min_lr + left * (cfg.lr - cfg.min_lr)


def doubts(cfg, model: nn.Module, steps: int) -> list[str]:
    """A warning for each setting of the rate that looks like a mistake: (`cfg`: runtime.keys.TrainKeys).

    What a rate usually is: DPO takes a tenth of SFT's (the DPO paper 1e-6, Zephyr, arXiv 2310.16944, 5e-7 after SFT at 2e-5).
    LoRA takes ten times that of all weights (LoRA's paper, arXiv 2106.09685, 2e-4 for GPT-2), and small models take more than
    large ones. Models from scratch and tiny ones are not judged.
    """
    found, warmup, size = [], warmup_steps(cfg, steps), sum(p.numel() for p in model.parameters())
    if warmup >= steps:
        found.append(
            f"key warmup: {warmup:,} of {count(steps, 'steps')}: the learning rate climbs to the end: give less, say 0.1"
        )
    if cfg.init_from == "scratch" or size < TINY:
        return found
    preference, lora = hasattr(cfg, "beta"), cfg.lora_rank > 0
    least, most = (rate * 10**lora / 10**preference for rate in OPTIMIZERS[cfg.optimizer].lr)
    most *= 5 if size < SMALL else 1
    if not least <= cfg.lr <= most:
        what = f"{'DPO' if preference else 'SFT'} {'with LoRA' if lora else 'of all weights'} by {cfg.optimizer}"
        scale = ", but SFT does" if preference and cfg.lr > most else ""
        found.append(
            f"key lr: {what} rarely takes {cfg.lr:g}{scale}: usual for a model of this size is {least:.0e} to {most:.0e}"
        )
    return found


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr


@torch.no_grad()
def clip(model: nn.Module, grad_clip: float) -> Tensor:
    """Scale the gradients down to a global norm of `grad_clip` (0 = leave them); returns the norm before that, a scalar."""
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    norm = gradient_norm(gradients)
    if grad_clip:
        torch._foreach_mul_([own(g) for g in gradients], (grad_clip / (norm + 1e-6)).clamp(max=1))
    return norm
