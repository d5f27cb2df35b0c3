"""Stage 3, Direct Preference Optimization: raise the chosen completion over the rejected one, measured from a reference.

    python dpo.py --config configs/reviews_dpo.toml
    python dpo.py --init_from runs/hellaswag_sft/model --data hellaswag --ref runs/hellaswag_ref.safetensors \\
        --out_dir runs/hellaswag_dpo --beta 0.1 --lr 1e-5

The reference file comes from precompute_ref.py (with `--ref auto` by itself), made from the very weights that this run starts
from: dpo.py checks that.
The losses are in losses.py. The loss is the mean over the global batch's pairs, however it is split up.
"""

from base.script import run

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor

import losses
import weights
from base.errors import UserError, warn
from data import rewards
from data.batch import Batch, moved, pair_tensors
from data.encode import Encoded, column, data_hash, places
from data.plan import describe, epoch_order
from lora import as_started
from losses import LOSSES, NEEDS, REFERENCE_FREE, WHOLE_BATCH, Pairs
from precompute_ref import find_or_make
from runtime import config, distributed, optim
from runtime.build import batch_plan, build_model, build_tokenizer, check_labels, load_data
from runtime.config import key
from runtime.drift import Drift
from runtime.keys import TrainKeys
from runtime.reference import AUTO, Reference, check, command
from runtime.run import Run, print_samples, summary
from runtime.score import completion_logps, measured
from runtime.step import Outcome, Part, forwards, seed_dropout, step_batches, to_host


@dataclass
class Config(TrainKeys):
    """Direct Preference Optimization on pairs of chosen and rejected completions, or, with loss kto, on unpaired ones."""

    loss: str = key("sigmoid", "preference loss, see losses.py", LOSSES)
    beta: float = key(0.1, "strength of the pull to the reference (for ipo and sppo_hard it sets the target)", above=0)
    ref: str = key(
        "", "file of precompute_ref.py; auto = find or make it beside out_dir; empty with lora_rank = the model as it starts"
    )
    allow_ref_mismatch: bool = key(False, "use a reference of other weights all the same")
    label_smoothing: float = key(
        0.0, "sigmoid, cpo, robust, exo_pair, both aot: chance that labels are flipped", least=0, below=1
    )
    simpo_gamma: float = key(0.5, "simpo: target margin")
    dpop_lambda: float = key(50.0, "dpop: weight of the penalty on a chosen completion below its reference", least=0)
    discopop_tau: float = key(0.05, "discopop: temperature of the blend", above=0)
    desirable_weight: float = key(1.0, "kto: weight of the completions whose label is true", least=0)
    undesirable_weight: float = key(1.0, "kto: weight of the completions whose label is false", least=0)
    sft_weight: float = key(0.0, "weight of the chosen completions' mean negative log-likelihood per token", least=0)
    kl_prompts: int = key(0, "estimate the KL from the start at each validation, on so many of its prompts", least=0)
    reward: str = key(
        "", "kl_prompts: reviews, sentiment, or FILE.py:NAME: keep the weights of the best such reward", reads=rewards.check
    )
    max_kl: float = key(10.0, "kl_prompts: warn above it (nats a completion), and keep no weights by reward there", above=0)
    pairs_per_example: int = key(1, "pairs drawn per problem and epoch where it has several wrong answers, 0 = all", least=0)

    def check(self) -> None:
        super().check()
        if self.reward and not self.kl_prompts:
            raise UserError("key reward: it is measured on what the model writes: give --kl_prompts 16, or so")
        for loss, name, words, right in NEEDS:
            if loss == self.loss and not right(value := getattr(self, name)):
                raise UserError(f"key {name}: {value} must be {words} for loss {loss}")
        if not self.ref and self.loss not in REFERENCE_FREE and not self.lora_rank:
            raise UserError(f"key ref: loss {self.loss} needs the reference's log-probs: make them with {command(self)}")


def as_pairs(sums: Tensor, ref: Tensor, pairs: Tensor, lengths: Tensor, desirable: Tensor) -> Pairs:
    """log pi and log pi_ref of some completions, (completions,) each, with their pairs, lengths and labels as in
    data.batch.Batch -> what a loss takes. A completion may be in several pairs. There may be none."""
    numbers = sums, ref.to(sums), lengths.to(sums)
    return Pairs(*(part for each in numbers for part in each[pairs].unbind(1)), desirable)


def objective(p: Pairs, cfg: Config, batch: list[Encoded]) -> Tensor:
    """What these pairs, some or all of `batch`, add to its loss: the mean over the batch's pairs, plus `sft_weight` times the
    mean negative log-likelihood of the batch's chosen tokens, once for each pair that they are chosen in (like the RPO of Pang
    et al. 2024, arXiv 2404.19733, which takes that mean within each completion)."""
    loss = LOSSES[cfg.loss](p, cfg).sum() / sum(item.n_pairs for item in batch)
    chosen_tokens = sum(len(item.completions[chosen]) for item in batch for chosen, _ in item.pairs)
    return loss + cfg.sft_weight * losses.sft(p.chosen, chosen_tokens) if cfg.sft_weight else loss


def measure(model, items: list[Encoded], cfg: Config, compute) -> Tensor:
    """log pi of every example's completions on the device, (completions,), without gradients or dropout."""
    return measured(model, items, compute, cfg.micro_tokens)


def validate(model, items: list[Encoded], ref: Tensor, cfg: Config, compute) -> dict:
    """The loss and the rewards over all validation pairs."""
    return figures(ref.cpu, items, cfg, measure(model, items, cfg, compute).cpu())


def figures(ref: Callable[[], Tensor], items: list[Encoded], cfg: Config, sums: Tensor) -> dict:
    """The loss and the rewards, of log pi and log pi_ref (a function that gives them) on the host, (completions,) each."""
    p = as_pairs(sums, ref(), *pair_tensors(items))
    return {"loss": objective(p, cfg, items).item(), **losses.metrics(p, cfg)}


def check_first_batch(model, items: list[Encoded], ref: Tensor, reference: Reference, cfg: Config, compute) -> None:
    """Before the first update policy and reference are the same model, so they must agree on every completion.

    Raises UserError if they differ by more than rounding can explain: 1e-3 nats per token if both ran in float32, else 0.05.
    """
    p = as_pairs(measure(model, items, cfg, compute).cpu(), ref, *pair_tensors(items))
    exact = compute.dtype == torch.float32 and reference.metadata.get("dtype") == "float32"
    gap = torch.stack([p.ratio_chosen / p.chosen_len, p.ratio_rejected / p.rejected_len]).abs().max().item()  # nan stays nan
    said = f"policy and reference differ by at most {gap:.2e} nats per token on the first batch"
    if gap <= (1e-3 if exact else 0.05):
        print(f"{said}; loss {LOSSES[cfg.loss](p, cfg).mean().item():.4f}")
    elif cfg.allow_ref_mismatch:
        warn(said)
    else:
        raise UserError(
            f"{cfg.ref}: {said}: the reference is not the model that this run starts from; make it anew with "
            "precompute_ref.py from the same weights, or insist with --allow_ref_mismatch true"
        )


def batch_gradient(model, given: list[Batch], items: list[Encoded], ref: Tensor, cfg: Config, compute) -> Tensor:
    """d loss / d log pi, (completions,), for a loss that couples the pairs of a batch: one pass ahead over all of them, without
    gradients."""
    devices = [compute.device] if compute.device.type == "cuda" else []
    with torch.random.fork_rng(devices):  # so that the pass with gradients, which follows, draws the same dropout
        sums = completion_logps(model, given, items, compute).requires_grad_()
    loss = objective(as_pairs(sums, ref, *moved([*pair_tensors(items)], compute.device)), cfg, items)
    return torch.autograd.grad(loss, sums)[0]


def backward(model, given: list[Batch], items: list[Encoded], ref: Tensor, cfg: Config, compute) -> tuple[list[Part], Tensor]:
    """The gradients of a step, added up over this rank's micro-batches, `given`. items, ref: the global batch's. Returns the
    parts, and log pi of this rank's completions among the batch's, (completions,).

    For losses that couple a batch's pairs the parts' own losses are not the batch's: what is logged comes from all log-probs.
    """
    gradient = None
    if cfg.loss in WHOLE_BATCH and (len(given) > 1 or compute.world > 1):
        gradient = batch_gradient(model, given, items, ref, cfg, compute)
    parts, sums = [], torch.zeros_like(ref)
    for batch, logps in forwards(model, given, compute):
        micro_sums = losses.completion_sums(logps, batch.completion, batch.n_completions)
        if gradient is None:
            loss = objective(as_pairs(micro_sums, ref[batch.at], batch.pairs, batch.lengths, batch.desirable), cfg, items)
        else:
            loss = (micro_sums * gradient[batch.at]).sum()  # the chain rule: not the loss, but its gradient is
        loss.backward()
        parts.append((loss.detach(), batch.items))
        sums[batch.at] = micro_sums.detach()
    return parts, sums


def main() -> int | None:
    cfg = config.load(Config, prog="dpo.py")
    compute = distributed.setup(cfg.device, cfg.dtype)
    print(compute)
    if cfg.ref not in ("", AUTO) and cfg.loss not in REFERENCE_FREE:
        compute.once(lambda: check(cfg.ref, command(cfg)))  # before anything is loaded

    # model, text -> tokens
    tokenizer = build_tokenizer(cfg, cfg.init_from, compute)
    reference_is_start = cfg.loss not in REFERENCE_FREE and not cfg.ref  # with LoRA only: see Config.check
    model = build_model(cfg, tokenizer, compute, keep_start=reference_is_start or cfg.kl_prompts > 0)
    train, val, max_len = load_data(cfg, "preference", tokenizer, model, compute)
    check_labels(cfg, train, val)

    plan = batch_plan(cfg, train, compute, cfg.pairs_per_example)
    print(describe(plan, train))
    drift = Drift(cfg, val, model, tokenizer, compute) if cfg.kl_prompts else None

    # the reference: one log-prob a completion, bound to weights, data, tokenizer and lengths
    if cfg.ref == AUTO and cfg.loss not in REFERENCE_FREE:
        cfg.ref = find_or_make(cfg, model, tokenizer, max_len, train, val, compute)
    fingerprint = weights.fingerprint(model)
    reference = compute.once(lambda: Reference.open(cfg, fingerprint, tokenizer, max_len, train, val))
    ref, val_ref = reference.logps, reference.val_logps
    binding = {"data": data_hash(train), "val_data": data_hash(val), "reference": reference.hash}
    if cfg.pairs_per_example:  # validation draws once, the same pairs every time
        drawn = sorted(epoch_order([item.group for item in val], cfg.seed, 0, cfg.pairs_per_example))
        val_ref = val_ref[places(column(val, "n_completions"), drawn)]
        val = [val[i] for i in drawn]
    counts = np.array(column(train, "n_completions"))

    # optimizer, run folder
    steps = cfg.max_steps or optim.rounded_up(cfg.epochs, plan.steps_per_epoch)
    optimizer = optim.make(model, cfg)
    this_run = Run(cfg, steps, compute, tokenizer, binding, "pairs")
    start = this_run.begin(model, optimizer)
    print(summary(model, cfg, steps, plan))
    model.train()
    if reference_is_start:
        print("reference: the model as this run began")
        with as_started(model):
            val_ref = measure(model, val, cfg, compute) if val else val_ref
    if start == 0:
        first = plan.examples(0)
        if cfg.loss not in REFERENCE_FREE and not reference_is_start:
            check_first_batch(model, [train[i] for i in first], ref[places(counts, first)], reference, cfg, compute)
        if val and cfg.eval_every:
            this_run.log_val(0, validate(model, val, val_ref, cfg, compute))

    this_run.timer.lap()  # from here on a step is timed
    for step, (numbers, items, given) in enumerate(step_batches(plan, train, compute, start, steps), start):
        lr = optim.learning_rate(cfg, step, steps)
        optim.set_lr(optimizer, lr)
        seed_dropout(cfg.seed, step, compute)
        if reference_is_start:
            with as_started(model):
                step_ref = measure(model, items, cfg, compute)
        else:
            (step_ref,) = moved([ref[places(counts, numbers)]], compute.device)
        parts, sums = backward(model, given, items, step_ref, cfg, compute)
        outcome = Outcome(parts, optim.clip(model, cfg.grad_clip), step, compute, this_run.stop_signal, sums)
        outcome.guard(optimizer)
        optimizer.step()
        optimizer.zero_grad()

        done = step + 1
        this_run.step_done(done, outcome, lr, items, model, partial(figures, to_host(step_ref), items, cfg))
        best = False
        if val and this_run.due(cfg.eval_every, done):
            record = validate(model, val, val_ref, cfg, compute)
            best = this_run.log_val(done, record | (drift.measure(model) if drift else {}))
            print_samples(model, tokenizer, val[: cfg.samples], compute)
        if best or this_run.due(cfg.save_every, done):
            this_run.save(done, model, optimizer)
        if this_run.stopped(done, model, optimizer):
            return 128 + this_run.stop_signal

    this_run.finish(model)
    return None


if __name__ == "__main__":
    run(main)
