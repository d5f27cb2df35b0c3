"""Stage 3, Direct Preference Optimization: raise the chosen completion over the rejected one, measured from a reference.

    python dpo.py --config configs/toy_dpo.toml
    python dpo.py --init_from runs/hellaswag_sft/model --data hellaswag --ref runs/hellaswag_ref.safetensors \\
        --out_dir runs/hellaswag_dpo --beta 0.1 --lr 1e-5

The reference file comes from precompute_ref.py, made from the very weights that this run starts from: dpo.py checks that.
The losses are in losses.py. The loss is the mean over the global batch's pairs, however it is split up.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

import losses
import weights
from base.errors import UserError, run, warn
from data import RECIPES
from data.batch import collate
from data.encode import Encoded, data_hash, load_encoded
from data.plan import BatchPlan, describe, epoch_order, plan_once
from data.tokenizer import choose
from losses import LOSSES, REFERENCE_FREE, WHOLE_BATCH, Pairs
from model import as_started
from runtime import config, distributed, optim
from runtime.config import key
from runtime.keys import TrainKeys
from runtime.reference import Reference
from runtime.run import Run, Timer, build_model, check_finite, context, print_samples, seed_dropout, summary


@dataclass
class Config(TrainKeys):
    """Direct Preference Optimization of GPT-2 on pairs of chosen and rejected completions."""

    loss: str = key("sigmoid", "preference loss, see losses.py", LOSSES)
    beta: float = key(0.1, "strength of the pull to the reference (for ipo its tau)", above=0)
    ref: str = key("", "reference file of precompute_ref.py; with lora_rank empty = this model as it starts")
    allow_ref_mismatch: bool = key(False, "use a reference of other weights all the same")
    label_smoothing: float = key(0.0, "sigmoid, robust, exo_pair, aot: chance that a label is flipped", least=0, below=1)
    simpo_gamma: float = key(0.5, "simpo: target margin")
    dpop_lambda: float = key(50.0, "dpop: weight of the penalty on a chosen completion below its reference", least=0)
    discopop_tau: float = key(0.05, "discopop: temperature of the blend", above=0)
    sft_weight: float = key(0.0, "weight of the chosen completions' mean negative log-likelihood a token, added", least=0)
    pairs_per_example: int = key(1, "pairs drawn a problem and epoch where it has several wrong answers, 0 = all", least=0)

    def check(self) -> None:
        super().check()
        if self.loss == "robust" and self.label_smoothing >= 0.5:
            raise UserError(f"key label_smoothing: {self.label_smoothing} must be below 0.5 for loss robust")
        if self.loss == "exo_pair" and self.label_smoothing == 0:
            raise UserError("key label_smoothing: 0.0 must be above 0 for loss exo_pair")
        if not self.ref and self.loss not in REFERENCE_FREE and not self.lora_rank:
            raise UserError(
                f"key ref: loss {self.loss} needs the reference's log-probs: make them with `python precompute_ref.py "
                f"--init_from {self.init_from} --data {self.data} --out ref.safetensors` and give --ref ref.safetensors"
            )


def pair_sums(logps: Tensor, batch) -> Tensor:
    """Token log-probs (tokens,) -> log pi(y|x) of chosen and rejected, (pairs, 2)."""
    return losses.completion_sums(logps, batch.completion, batch.n_completions).view(-1, 2)


def as_pairs(sums: Tensor, ref: Tensor, lengths: Tensor) -> Pairs:
    """(pairs, 2) each of policy sums, reference sums and completion lengths -> what a loss takes."""
    return Pairs(*sums.unbind(1), *ref.to(sums).unbind(1), *lengths.to(sums).view(-1, 2).unbind(1))


def objective(p: Pairs, cfg: Config, n_pairs: int, chosen_tokens: int) -> Tensor:
    """These pairs' share of the batch's loss: mean over its `n_pairs` pairs, plus `sft_weight` times the mean negative
    log-likelihood of its `chosen_tokens` chosen tokens (the RPO of Pang et al. 2024, arXiv 2404.19733, eq. 1)."""
    loss = LOSSES[cfg.loss](p, cfg).sum() / n_pairs
    return loss + cfg.sft_weight * losses.sft(p.chosen, chosen_tokens) if cfg.sft_weight else loss


def reward_metrics(p: Pairs, beta: float) -> dict[str, float]:
    """Means over pairs of what is reported, under TRL's names. Rewards are beta * log-ratio, in nats."""
    chosen, rejected = beta * p.ratio_chosen.detach(), beta * p.ratio_rejected.detach()
    values = {
        "rewards/chosen": chosen,
        "rewards/rejected": rejected,
        "rewards/accuracies": (chosen > rejected).float(),
        "rewards/margins": chosen - rejected,
        "logps/chosen": p.chosen.detach(),
        "logps/rejected": p.rejected.detach(),
    }
    means = torch.stack([value.double().mean() for value in values.values()]).tolist()
    return dict(zip(values, means, strict=True))


@torch.no_grad()
def all_sums(model, items: list[Encoded], micros, compute) -> Tensor:
    """log pi(y|x) of every pair of `items`, (pairs, 2), in their order, on every rank. No gradients.

    micros: this rank's micro-batches, [micro-batch][row][number into items].
    """
    sums = torch.zeros(len(items), 2)
    for rows in micros:
        batch = collate([[items[i] for i in row] for row in rows], compute.row_multiple).to(compute.device)
        with compute.autocast():
            sums[[i for row in rows for i in row]] = pair_sums(model(batch), batch).cpu()
    return compute.total(sums).to(compute.device)


def lengths_of(items: list[Encoded], device: torch.device) -> Tensor:
    return torch.tensor([[len(c) for c in item.completions] for item in items], device=device)


def measure(model, items: list[Encoded], cfg: Config, compute) -> Tensor:
    """`all_sums` without dropout, the work split over all ranks."""
    model.eval()
    micros = plan_once(items, cfg.micro_tokens, compute.spare_padding, compute.world)[compute.rank]
    sums = all_sums(model, items, micros, compute)
    model.train()
    return sums


def started_sums(model, items: list[Encoded], micros, compute) -> Tensor:
    """`all_sums` of the model that training started from, without dropout: the reference of a LoRA run without a file."""
    model.eval()
    with as_started(model):
        sums = all_sums(model, items, micros, compute)
    model.train()
    return sums


def validate(model, items: list[Encoded], ref: Tensor, cfg: Config, compute) -> dict:
    """The loss and the rewards over all validation pairs."""
    p = as_pairs(measure(model, items, cfg, compute), ref, lengths_of(items, compute.device))
    chosen_tokens = sum(len(item.completions[0]) for item in items)
    loss = objective(p, cfg, len(items), chosen_tokens).item()
    return {"loss": loss, **reward_metrics(p, cfg.beta)}


def check_first_batch(model, items: list[Encoded], ref: Tensor, reference: Reference, cfg: Config, compute) -> None:
    """Before the first update policy and reference are the same model, so they must agree on every completion.

    Raises UserError if they differ by more than rounding can explain: 1e-3 nats a token if both ran in float32, else 0.05.
    """
    sums = measure(model, items, cfg, compute)
    exact = compute.dtype == torch.float32 and reference.metadata.get("dtype") == "float32"
    lengths = lengths_of(items, compute.device)
    gap = ((sums - ref).abs() / lengths).max().item()
    loss = LOSSES[cfg.loss](as_pairs(sums, ref, lengths), cfg).mean().item()
    expected = ", ln 2 = 0.6931 if they were the same" if cfg.loss == "sigmoid" else ""
    said = f"policy and reference differ by at most {gap:.2e} nats a token on the first batch; loss {loss:.4f}"
    if gap <= (1e-3 if exact else 0.05):
        print(said)
    elif cfg.allow_ref_mismatch:
        warn(f"{said}{expected}")
    else:
        raise UserError(
            f"{cfg.ref}: {said}{expected}: the reference is not the model that this run starts from; make it anew with "
            "precompute_ref.py from the same weights, or insist with --allow_ref_mismatch true"
        )


def main() -> int | None:
    cfg = config.load(Config, prog="dpo.py")
    compute = distributed.setup(cfg.device, cfg.dtype)
    print(compute)

    # text -> tokens -> which pairs each step takes
    tokenizer = choose(cfg.tokenizer, cfg.init_from)
    own_reference = cfg.loss not in REFERENCE_FREE and not cfg.ref
    model = build_model(cfg, tokenizer, compute, cfg.dropout, cfg.seed, keep_start=own_reference)
    max_len = context(cfg.max_len, model)
    policy = {"max_len": max_len, "truncation": cfg.truncation, "data_dir": cfg.data_dir}
    train = compute.once(lambda: load_encoded(cfg.data, "train", "preference", tokenizer, limit=cfg.limit, **policy))
    val_source = cfg.val_data or (cfg.data if cfg.data in RECIPES else "")
    val = []
    if val_source:
        val = compute.once(lambda: load_encoded(val_source, "val", "preference", tokenizer, limit=cfg.val_limit, **policy))

    # the reference: one log-prob a completion, bound to weights, data, tokenizer and lengths
    fingerprint = weights.fingerprint(model)
    reference = compute.once(lambda: Reference.open(cfg, fingerprint, tokenizer, max_len, train, val))
    ref, val_ref = reference.logps.to(compute.device), reference.val_logps.to(compute.device)
    binding = {"data": data_hash(train), "val_data": data_hash(val), "reference": reference.hash}
    if cfg.pairs_per_example:  # validation draws once, the same pairs every time
        drawn = sorted(epoch_order([item.group for item in val], cfg.seed, 0, cfg.pairs_per_example))
        val, val_ref = [val[i] for i in drawn], val_ref[drawn]
    plan = BatchPlan(
        train,
        cfg.batch_size,
        cfg.seed,
        row_len=cfg.row_len,
        micro_tokens=cfg.micro_tokens,
        spare_padding=compute.spare_padding,
        world=compute.world,
        shuffle=cfg.shuffle,
        per_group=cfg.pairs_per_example,
    )
    print(describe(plan, train))

    # model, optimizer, run folder
    steps = cfg.max_steps or math.ceil(cfg.epochs * plan.steps_per_epoch)
    optimizer = optim.make(model, cfg)
    this_run = Run(cfg, steps, compute, binding, "pairs")
    start = this_run.begin(model, optimizer)
    print(summary(model, cfg, steps, plan))
    model.train()
    if own_reference:
        print("reference: this model as it starts, without the run's adapters")
    if own_reference and val:
        with as_started(model):
            val_ref = measure(model, val, cfg, compute)
    if start == 0:
        first = plan.examples(0)
        if cfg.loss not in REFERENCE_FREE and not own_reference:
            check_first_batch(model, [train[i] for i in first], ref[first], reference, cfg, compute)
        if val and cfg.eval_every:
            this_run.log_val(0, validate(model, val, val_ref, cfg, compute))

    timer = Timer(compute.device)
    for step in range(start, steps):
        lr = optim.learning_rate(cfg, step, steps)
        optim.set_lr(optimizer, lr)
        numbers = plan.examples(step)
        micros = plan[step][compute.rank]
        seed_dropout(cfg.seed, step, compute)

        pairs = [train[i] for i in numbers]
        chosen_tokens = sum(len(item.completions[0]) for item in pairs)
        place = {i: n for n, i in enumerate(numbers)}
        local = [[[place[i] for i in row] for row in rows] for rows in micros]
        batch_ref = started_sums(model, pairs, local, compute) if own_reference else ref[numbers]
        batch_lengths = lengths_of(pairs, compute.device)

        gradient = None  # of the loss by each pair's sums, for losses that couple the pairs of a batch
        if cfg.loss in WHOLE_BATCH and (len(micros) > 1 or compute.world > 1):
            with torch.random.fork_rng():  # the same dropout in both passes
                sums = all_sums(model, pairs, local, compute).requires_grad_(True)
            loss = objective(as_pairs(sums, batch_ref, batch_lengths), cfg, len(pairs), chosen_tokens)
            (gradient,) = torch.autograd.grad(loss, sums)

        parts, found = [], torch.zeros(len(pairs), 2, device=compute.device)
        for n, rows in enumerate(micros, start=1):
            at = [place[i] for row in rows for i in row]
            batch = collate([[train[i] for i in row] for row in rows], compute.row_multiple).to(compute.device)
            distributed.sync_gradients(model, n == len(micros))
            with compute.autocast():
                logps = model(batch)
            sums = pair_sums(logps, batch)
            if gradient is None:
                loss = objective(as_pairs(sums, batch_ref[at], batch_lengths[at]), cfg, len(pairs), chosen_tokens)
            else:
                loss = (sums * gradient[at]).sum()
            loss.backward()
            parts.append((loss, batch.items))
            found[at] = sums.detach()
        _, grad_norm = check_finite(parts, optim.clip(model, cfg.grad_clip), step, compute)
        optimizer.step()
        optimizer.zero_grad()

        done = step + 1
        p = as_pairs(compute.total(found.cpu()).to(compute.device), batch_ref, batch_lengths)
        loss = objective(p, cfg, len(pairs), chosen_tokens).item()
        tokens, predicted = (sum(getattr(item, name) for item in pairs) for name in ("row_tokens", "completion_tokens"))
        record = {"loss": loss, "lr": lr, "grad_norm": grad_norm, "tokens": tokens, **reward_metrics(p, cfg.beta)}
        this_run.log_step(done, record, timer.lap(), len(pairs), model, predicted)
        best = False
        if val and this_run.due(cfg.eval_every, done):
            best = this_run.log_val(done, validate(model, val, val_ref, cfg, compute))
            print_samples(model, tokenizer, val[: cfg.samples], compute)
        if best or this_run.due(cfg.save_every, done):
            this_run.save(done, model, optimizer)
        if this_run.stopped(done, model, optimizer):
            return 128 + this_run.stop_signal
        timer.lap()  # validation and saving are not the next step's time

    this_run.finish(model, tokenizer)
    return None


if __name__ == "__main__":
    run(main)
