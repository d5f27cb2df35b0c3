"""Stage 1, supervised fine-tuning: raise the log-probability of the right completion.

    python sft.py --config configs/reviews_sft.toml
    python sft.py --init_from gpt2 --data hellaswag --out_dir runs/hellaswag_sft --lr 1.41e-5

The loss is the mean negative log-likelihood over all completion tokens of the global batch, however it is split up.
"""

from base.script import run

import math
from dataclasses import dataclass

import losses
from data.batch import Batch
from data.encode import Encoded, data_hash
from data.plan import describe
from runtime import config, distributed, optim
from runtime.build import batch_plan, build_model, build_tokenizer, load_data
from runtime.keys import TrainKeys
from runtime.run import Run, print_samples, summary
from runtime.score import score
from runtime.step import Outcome, Part, forwards, seed_dropout, step_batches


@dataclass
class Config(TrainKeys):
    """Supervised fine-tuning on prompts and completions."""


def validate(model, items: list[Encoded], compute, micro_tokens: int) -> dict:
    """Mean negative log-likelihood a completion token, in nats, over all items; and its perplexity."""
    logps = sum(sums.double().sum().item() for sums in score(model, items, compute, micro_tokens))
    loss = -logps / sum(item.completion_tokens for item in items)
    return {"loss": loss, "perplexity": math.exp(min(loss, 700))}


def backward(model, given: list[Batch], predicted: int, compute) -> list[Part]:
    """The gradients of a step, added up over this rank's micro-batches. predicted: tokens of the global batch."""
    parts = []
    for batch, logps in forwards(model, given, compute):
        loss = losses.sft(logps, predicted)
        loss.backward()
        parts.append((loss.detach(), batch.items))
    return parts


def main() -> int | None:
    cfg = config.load(Config, prog="sft.py")
    compute = distributed.setup(cfg.device, cfg.dtype)
    print(compute)

    # model, text -> tokens, which examples each step takes
    tokenizer = build_tokenizer(cfg, cfg.init_from, compute)
    model = build_model(cfg, tokenizer, compute)
    train, val, _ = load_data(cfg, "sft", tokenizer, model, compute)
    plan = batch_plan(cfg, train, compute)
    print(describe(plan, train))

    # optimizer, run folder
    steps = cfg.max_steps or optim.rounded_up(cfg.epochs, plan.steps_per_epoch)
    optimizer = optim.make(model, cfg)
    this_run = Run(cfg, steps, compute, tokenizer, {"data": data_hash(train), "val_data": data_hash(val)}, "examples")
    start = this_run.begin(model, optimizer)
    print(summary(model, cfg, steps, plan))
    model.train()
    if val and start == 0 and cfg.eval_every:
        this_run.log_val(0, validate(model, val, compute, cfg.micro_tokens))

    this_run.timer.lap()  # from here on a step is timed
    for step, (_, items, given) in enumerate(step_batches(plan, train, compute, start, steps), start):
        lr = optim.learning_rate(cfg, step, steps)
        optim.set_lr(optimizer, lr)
        seed_dropout(cfg.seed, step, compute)
        parts = backward(model, given, sum(item.completion_tokens for item in items), compute)
        outcome = Outcome(parts, optim.clip(model, cfg.grad_clip), step, compute, this_run.stop_signal)
        outcome.guard(optimizer)
        optimizer.step()
        optimizer.zero_grad()

        done = step + 1
        this_run.step_done(done, outcome, lr, items, model)
        best = False
        if val and this_run.due(cfg.eval_every, done):
            best = this_run.log_val(done, validate(model, val, compute, cfg.micro_tokens))
            print_samples(model, tokenizer, val[: cfg.samples], compute)
        if best or this_run.due(cfg.save_every, done):
            this_run.save(done, model, optimizer)
        if this_run.stopped(done, model, optimizer):
            return 128 + this_run.stop_signal

    this_run.finish(model)
    return None


if __name__ == "__main__":
    run(main)
