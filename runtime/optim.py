"""Optimizers, learning-rate schedules, clipping."""

import math

import torch
from torch import Tensor, nn

from weights import whole

STATES = {"adamw": 2, "rmsprop": 1, "sgd": 0}  # float32 numbers that an optimizer keeps a parameter


def make(model: nn.Module, cfg) -> torch.optim.Optimizer:
    """The optimizer that `cfg` names. Matrices and embeddings decay by `weight_decay`, biases and layer-norm scales do not.

    adamw: decoupled decay (Loshchilov & Hutter, arXiv 1711.05101), fused into one kernel. rmsprop: torch's defaults
    (alpha 0.99), the choice of the DPO paper. sgd: without momentum.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.dim() >= 2], "weight_decay": cfg.weight_decay},
        {"params": [p for p in trained if p.dim() < 2], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]  # adapters are matrices only
    if cfg.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=cfg.lr, betas=(cfg.adam_beta1, cfg.adam_beta2), fused=True)
    if cfg.optimizer == "rmsprop":
        return torch.optim.RMSprop(groups, lr=cfg.lr)
    return torch.optim.SGD(groups, lr=cfg.lr)


def warmup_steps(cfg, steps: int) -> int:
    """`warmup` as steps: a value below 1 is a share of the whole run."""
    return math.ceil(cfg.warmup * steps) if cfg.warmup < 1 else int(cfg.warmup)


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
