"""Optimizers, learning-rate schedules, clipping."""

import math
from decimal import Decimal

import torch
from torch import Tensor, nn

from weights import whole

STATES = {"adamw": 2, "rmsprop": 1, "sgd": 0}  # float32 numbers that an optimizer keeps a parameter


def make(model: nn.Module, cfg) -> torch.optim.Optimizer:
    """The optimizer that `cfg` names. Matrices and embeddings decay by `weight_decay`, biases and layer-norm scales do not.

    adamw: fused into one kernel. rmsprop: torch's defaults (alpha 0.99), the choice of the DPO paper. sgd: without momentum.
    The decay is decoupled (Loshchilov & Hutter, arXiv 1711.05101): a step first scales the weights by 1 - lr * weight_decay.
    torch's RMSprop adds weight_decay times the weight to the gradient, which it then divides by the gradient's own size.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    matrices, rest = [p for p in trained if p.dim() >= 2], [p for p in trained if p.dim() < 2]
    if cfg.optimizer == "adamw":
        groups = [{"params": matrices, "weight_decay": cfg.weight_decay}]
        groups += [{"params": rest, "weight_decay": 0.0}] if rest else []  # adapters are matrices only
        return torch.optim.AdamW(groups, lr=cfg.lr, betas=(cfg.adam_beta1, cfg.adam_beta2), fused=True)
    optimizer = (torch.optim.RMSprop if cfg.optimizer == "rmsprop" else torch.optim.SGD)(trained, lr=cfg.lr)

    @torch.no_grad()
    def decay(*_) -> None:
        for p in matrices if cfg.weight_decay else ():
            p.mul_(1 - optimizer.param_groups[0]["lr"] * cfg.weight_decay)

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


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr


def clip(model: nn.Module, grad_clip: float) -> Tensor:
    """Scale the gradients down to a global norm of `grad_clip` (0 = leave them); returns the norm before that, a scalar."""
    return whole(torch.nn.utils.clip_grad_norm_(model.parameters(), grad_clip or math.inf))
