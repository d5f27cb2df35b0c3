"""A run: the keys that all training has, and its folder with config, metrics, checkpoints and the final model."""

import dataclasses
import functools
import itertools
import math
import os
import shutil
import signal
import sys
import time
import tomllib
from pathlib import Path

import numpy as np
import torch

import adapters
import weights
from base.errors import UserError, warn
from base.files import lock, write_whole
from runtime import checkpoint, config, distributed, optim
from runtime.config import REQUIRED
from runtime.keys import SCRATCH, ModelKeys, TrainKeys
from runtime.log import Console, Metrics, cuda_numbers, peak_flops, step_flops
from runtime.optim import STATES


class Run:
    """The folder of a run and its life: begin or resume, log, validate, save, stop cleanly, finish.

    `binding` is what must be the same when the run is resumed (the data's hash, …); `unit` names what a batch holds. Every
    rank makes one and calls the same methods; only rank 0 touches the folder, apart from the shards of a checkpoint.
    """

    def __init__(self, cfg: TrainKeys, steps: int, compute, binding: dict, unit: str):
        self.cfg, self.steps, self.compute = cfg, steps, compute
        self.binding = {**binding, "device": compute.device.type, "dtype": str(compute.dtype).removeprefix("torch.")}
        self.folder = Path(cfg.out_dir)
        self.checkpoints = self.folder / "checkpoints"
        self.best: dict | None = None  # {"step", "loss"} of the best validation so far
        self.saved_at = -1
        self.saving: checkpoint.Save | None = None  # not yet complete
        self.console = Console(steps, unit)
        self.metrics: Metrics | None = None  # on rank 0
        self.stop_signal = 0
        self._lock = None
        compute.once(self._take)

    def _take(self) -> None:
        if self.folder.exists() and not self.folder.is_dir():
            raise UserError(f"out_dir {self.folder} is a file: name a folder")
        self.folder.mkdir(parents=True, exist_ok=True)
        self._lock = open(self.folder / ".lock", "w")  # noqa: SIM115
        if not lock(self._lock):
            raise UserError(f"out_dir {self.folder}: another run is writing there: wait, or name another folder")

    def begin(self, model, optimizer) -> int:
        """Resume from the newest whole checkpoint, if there is one; returns the number of steps done."""
        if model.lora:
            self.binding["base"] = model.origin.start_sha256  # the checkpoints hold the adapters only
            if Path(model.origin.base).is_relative_to(self.folder.resolve()):
                raise UserError(
                    f"out_dir {self.folder}: the base of the adapters, {model.origin.base}, lies in it, and the run would "
                    "write over it: name another out_dir"
                )
        again = any(self.compute.gather(restarted()))
        found = self.compute.once(lambda: self._find(again))
        done, seen = 0, 0
        if found:
            folder, state = found
            checkpoint.load(folder, model, optimizer, self.compute)
            done, seen, self.best = state["step"], state["metrics_bytes"], state["best"]
            self.compute.once(lambda: self._prune(state))  # a kill may have come between its save and this
            self.saved_at = done
            print(f"resuming {self.folder} at step {done} of {self.steps}, from {folder}")
        self.compute.once(lambda: self._open(seen))
        self.handlers = {name: signal.signal(name, self._on_signal) for name in (signal.SIGINT, signal.SIGTERM)}
        self.peak = peak_flops(self.compute.device, self.compute.dtype) if self.compute.device.type == "cuda" else 0.0
        return done

    def _find(self, again: bool) -> tuple[Path, dict] | None:
        """The checkpoint to go on from, or None; refuses a folder that holds another run."""
        if self.cfg.overwrite and not again:
            for name in ("checkpoints", "model", "adapter"):
                shutil.rmtree(self.folder / name, ignore_errors=True)
            for name in ("metrics.jsonl", "config.toml", "wandb_id"):
                (self.folder / name).unlink(missing_ok=True)
        found = checkpoint.newest(self.checkpoints)
        if not found and checkpoint.steps(self.checkpoints):
            raise UserError(f"{self.checkpoints}: every checkpoint is damaged: start anew with --overwrite or another out_dir")
        if found or (self.folder / "config.toml").exists():
            self._same_settings()  # what an earlier run left is not wiped for another one
        if found:
            folder, state = found
            self._same_data(state)
            metrics = self.folder / "metrics.jsonl"
            if not metrics.exists() or metrics.stat().st_size < state["metrics_bytes"]:
                raise UserError(
                    f"{metrics} is shorter than when {folder} was saved: restore it, or start anew with --overwrite"
                )
            checkpoint.drop_after(self.checkpoints, state["step"])  # damaged ones: they must not count as the newest
        return found

    def _open(self, seen: int) -> None:
        write_whole(self.folder / "config.toml", config.to_toml(dataclasses.replace(self.cfg, overwrite=False)))
        self.metrics = Metrics(self.folder / "metrics.jsonl", seen, self.cfg.wandb, dataclasses.asdict(self.cfg))

    def _same_settings(self) -> None:
        """Refuse to go on with other settings than the run was begun with."""
        path = self.folder / "config.toml"
        try:
            before = tomllib.loads(path.read_text())
        except (OSError, ValueError):
            raise UserError(f"{path}: cannot be read, so this run cannot be resumed: start anew with --overwrite") from None
        for field in dataclasses.fields(self.cfg):
            name, now = field.name, getattr(self.cfg, field.name)
            was = before.get(name, now if field.default is REQUIRED else field.default)  # a key may be younger than the run
            if not config.rules(field).free and was != now:
                raise UserError(
                    f"out_dir {self.folder} holds a run with {name} = {was!r}, not {now!r}: resume it with the same "
                    "settings, name another out_dir, or start anew with --overwrite"
                )

    def _same_data(self, state: dict) -> None:
        """Refuse to go on with other data, another reference, or where the numbers would be others."""
        for name, now in self.binding.items():
            if state.get(name) != now:
                raise UserError(f"out_dir {self.folder}: the {name} differs from when its run was begun: name another out_dir")

    def _on_signal(self, number: int, _frame) -> None:
        if self.stop_signal:
            if time.monotonic() - self.signalled_at > 2:  # Ctrl-C in a terminal comes twice: from it and from torchrun
                raise KeyboardInterrupt
            return
        self.stop_signal, self.signalled_at = number, time.monotonic()
        if self.compute.rank == 0:
            name = signal.Signals(number).name
            print(f"\n{name}: finishing this step, then saving (again to stop at once)", file=sys.stderr)

    def log_step(self, step: int, record: dict, seconds: float, examples: int, model, completion_tokens: int) -> None:
        """Record a finished training step: `record` with loss, lr, grad_norm, tokens, and whatever the stage adds."""
        if not self.metrics:
            return
        flops = step_flops(model, record["tokens"], completion_tokens) / self.compute.world
        record = {
            "step": step,
            "split": "train",
            **record,
            "tokens_per_s": record["tokens"] / seconds,
            "step_s": seconds,
            **cuda_numbers(self.compute.device, flops, seconds, self.peak),
        }
        self.metrics.write(record)
        self.console.step(record, seconds, examples)

    def log_val(self, step: int, record: dict) -> bool:
        """Record a validation; True if its loss is the best so far (of a trained model: step 0 does not count)."""
        if self.metrics:
            self.metrics.write({"step": step, "split": "val", **record})
        finite = math.isfinite(record["loss"])
        better = step > 0 and finite and (self.best is None or record["loss"] < self.best["loss"])
        if better:
            self.best = {"step": step, "loss": record["loss"]}
        shown = "  ".join(f"{name} {value:.4f}" for name, value in record.items())
        print(f"validation at step {step}: {shown}{'  (best)' if better else ''}", flush=True)
        return better

    def due(self, every: int, step: int) -> bool:
        return step == self.steps or (every > 0 and step % every == 0)

    def save(self, step: int, model, optimizer) -> None:
        """Write a checkpoint of `step`, then delete those that `keep` does not cover; with async_save, begin to."""
        self._complete_save()
        state = {"metrics_bytes": self.compute.once(self._synced), "best": self.best, **self.binding}
        self.saving = checkpoint.Save(self.checkpoints, step, state, model, optimizer, self.compute)
        self.saved_at = step
        self._complete_save()

    def _complete_save(self) -> None:
        if self.saving:
            self.saving.complete()
            state, self.saving = self.saving.state, None
            self.compute.once(lambda: self._prune(state))

    def _prune(self, state: dict) -> None:
        best = state["best"]  # not self.best: that may not be saved yet
        checkpoint.prune(self.checkpoints, self.cfg.keep, best["step"] if best else None)

    def _synced(self) -> int:
        self.metrics.sync()  # the checkpoint must not know of lines that a power cut could still take
        return self.metrics.size

    def stopped(self, step: int, model, optimizer) -> bool:
        """True after Ctrl-C or SIGTERM on any rank: the step is saved, and the user told how to go on. Every step asks."""
        said = self.compute.gather((self.stop_signal, self.saving is None or self.saving.written()))
        self.stop_signal = max(signal for signal, _ in said)
        if all(written for _, written in said):
            self._complete_save()
        if not self.stop_signal or step == self.steps:
            return False
        if self.saved_at != step:
            self.save(step, model, optimizer)
        self._complete_save()
        self._end()
        how = "the same command without --overwrite" if self.cfg.overwrite else "the same command"
        print(f"stopped at step {step} of {self.steps}, saved in {self.checkpoints}: {how} goes on from there")
        return True

    def _end(self) -> None:
        if self.metrics:
            self.metrics.close()
            self._lock.close()
        for name, handler in self.handlers.items():
            signal.signal(name, handler)

    def finish(self, model, tokenizer) -> None:
        """Write out_dir/model: the weights with the best validation loss, or the last ones where nothing was validated. With
        LoRA first out_dir/adapter, for peft; model/ has it merged into the base as that was read, in float32."""
        self._complete_save()
        which = f"step {self.steps}"
        if self.best and self.best["step"] != self.steps:
            best = self.checkpoints / f"step_{self.best['step']}"
            _, damage = self.compute.once(lambda: checkpoint.inspect(best))
            if damage:
                warn(f"{best}, the best checkpoint, is damaged ({damage}): the last weights are used")
            else:
                checkpoint.load(best, model, None, self.compute)
                which = f"step {self.best['step']}, which validated best ({self.best['loss']:.4f})"
        if model.lora:
            adapters.save(model, tokenizer, self.folder / "adapter", self.compute.rank)
            options = source_options(self.cfg, tokenizer, self.cfg.dropout, self.cfg.seed)
            read = functools.partial(adapters.source, str(self.folder / "adapter"), **options)
            self.compute.once(lambda: weights.save_tensors(*read(), tokenizer, self.folder / "model"))
        else:
            weights.save(model, tokenizer, self.folder / "model", self.compute.rank)
        self.compute.gather(None)  # nobody leaves while rank 0 still gathers
        self._end()
        print(f"wrote {self.folder / 'model'}{' and adapter' if model.lora else ''}: {which}", flush=True)


def restarted() -> bool:
    """Whether torchrun --max-restarts has started this process again after a failure."""
    return os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0"


class Timer:
    """Seconds since it was made or last read, with the device's work done."""

    def __init__(self, device: torch.device):
        self.device, self.start = device, time.perf_counter()

    def lap(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        now = time.perf_counter()
        seconds, self.start = now - self.start, now
        return seconds


def source_options(cfg: ModelKeys, tokenizer, dropout: float, seed: int) -> dict:
    """What `weights.source` wants to know beside `init_from`."""
    return {name: getattr(cfg, name) for name in SCRATCH} | {"dropout": dropout, "vocab_size": tokenizer.size, "seed": seed}


def build_model(cfg: ModelKeys, tokenizer, compute, dropout: float = 0.0, seed: int = 0, keep_start: bool = False):
    """The model that `init_from` names, in float32 on this process's device: for training sharded over all processes, else
    (a `cfg` that is no TrainKeys) whole on each. Rank 0 reads the weights. UserError if the tokenizer has more ids than it.

    With `lora_rank` its weights are frozen, in the compute dtype, with adapters beside them: new ones, or, where `init_from`
    is an adapter, that one; `keep_start`: with a copy of it as it starts, for `model.as_started`. Everywhere else an adapter is
    merged into its base.
    """
    options = source_options(cfg, tokenizer, dropout, seed)
    with_lora = isinstance(cfg, TrainKeys) and cfg.lora_rank > 0
    tensors = iter(())
    start = old = None  # on rank 0; old: the adapter that init_from is

    def find():
        nonlocal tensors, start, old
        if adapters.is_folder(cfg.init_from):
            old = adapters.read(cfg.init_from)
        shape, tensors = adapters.base(old, **options) if old else weights.source(cfg.init_from, **options)
        if tokenizer.size > shape.vocab_size:
            raise UserError(
                f"tokenizer {tokenizer.name} has {tokenizer.size} ids, the model of {cfg.init_from} only "
                f"{shape.vocab_size}: give the --tokenizer that it was trained with"
            )
        lora = adapters.chosen(cfg, old, shape.n_embd) if with_lora else None
        if lora or old:
            start = adapters.Start(cfg.init_from, shape.tied, old)
            tensors = start.watched(tensors)
        if old and not lora:
            shape, tensors = old.merged(tensors, shape)
        return shape, lora, old is not None

    shape, lora, from_adapter = compute.once(find)
    model = weights.empty(shape)
    if lora:
        model.add_lora(lora, compute.dtype, keep_start=keep_start and from_adapter)
        tensors = itertools.chain(tensors, old.initial(keep_start) if old else model.initial_lora(seed))
    if isinstance(cfg, TrainKeys):
        for block in model.blocks:
            block.recompute = cfg.activation_checkpointing
            if cfg.compile:
                block.forward = torch.compile(block.forward, dynamic=True)
        distributed.shard(model, compute, cfg.replicate)
    distributed.fill(model, tensors, compute)
    if lora or from_adapter:
        model.origin = compute.once(lambda: start.origin())
    return model


def context(max_len: int, model) -> int:
    """`max_len` as tokens: 0 is the model's context, more than that is a UserError."""
    if max_len > model.config.block_size:
        raise UserError(f"key max_len: {max_len} is more than the model's context of {model.config.block_size} tokens")
    return max_len or model.config.block_size


def seed_dropout(seed: int, step: int, compute) -> None:
    """Make dropout's random numbers follow from seed, step and rank: a resumed run draws those of one never killed."""
    torch.manual_seed(int(np.random.SeedSequence([seed, step, compute.rank]).generate_state(1, np.uint64)[0] >> 1))


def check_finite(losses: list[tuple[torch.Tensor, list]], grad_norm: torch.Tensor, step: int, compute) -> tuple[float, float]:
    """The losses of this rank's micro-batches (with their examples) and the global gradient norm -> global loss and norm.

    UserError, on every rank, naming the step and the examples if one is not finite: before the weights are touched.
    """
    parts = torch.stack([loss.detach().double() for loss, _ in losses]).cpu()
    loss, norm = compute.total(parts.sum()).item(), grad_norm.item()
    if math.isfinite(loss) and math.isfinite(norm):
        return loss, norm
    guilty = [items for part, (_, items) in zip(parts.tolist(), losses, strict=True) if not math.isfinite(part)]
    guilty = guilty or [items for _, items in losses]  # the norm alone: it may be any of them
    found = sorted({item.number for rank in compute.gather(guilty) for items in rank for item in items})
    numbers = ", ".join(map(str, found[:20])) + (", …" if len(found) > 20 else "")
    what = f"gradient norm is {norm}" if math.isfinite(loss) else f"loss is {loss}"
    raise UserError(
        f"the {what} at step {step + 1}, in the micro-batch with examples {numbers} (numbered from 0 in the "
        "data): the weights were not touched; look at those examples, lower lr, or set grad_clip"
    )


def print_samples(model, tokenizer, items: list, compute, new_tokens: int = 48) -> None:
    """Complete a few prompts greedily and print them beside the completion that was wanted."""
    items = [item for item in items if len(item.prompt) < model.config.block_size]
    if not items:
        return
    try:
        with compute.autocast():
            written = model.generate([item.prompt.tolist() for item in items], new_tokens, tokenizer.eot, tokenizer.size)
    except FloatingPointError as error:
        print(f"  no samples: {error}", flush=True)
        return
    for item, ids in zip(items, written, strict=True):
        tail = tokenizer.decode(item.prompt.tolist())[-100:]
        wanted = tokenizer.decode(item.completions[0].tolist()[:-1])
        print(f"  prompt …{tail!r}\n    wanted  {wanted[:200]!r}\n    written {tokenizer.decode(ids)[:200]!r}", flush=True)


def summary(model, cfg: TrainKeys, steps: int, plan) -> str:
    """Every derived number, before the first step."""
    parameters = list(model.parameters())
    trained = sum(p.numel() for p in parameters if p.requires_grad)
    total = sum(p.numel() for p in parameters)
    mflop, mflop_predicted = (step_flops(model, *one) / 1e6 for one in ((1, 0), (0, 1)))
    state = STATES[cfg.optimizer]
    here = [distributed.own(p) for p in parameters]
    memory = sum(p.nbytes * (2 + state if p.requires_grad else 1) for p in here) / 1e9
    part = f"; {sum(p.numel() for p in here):,} of them on this rank" if plan.world > 1 else ""
    return (
        f"{model.config}: {total:,} parameters, {trained:,} trained{part}; weights, gradients and optimizer take "
        f"{memory:.2f} GB a rank; {mflop:,.1f} MFLOP a token and {mflop_predicted:,.1f} more a predicted one\n"
        f"{steps:,} steps of {cfg.batch_size}, {plan.steps_per_epoch:,} an epoch of {plan.examples_per_epoch:,}; "
        f"{optim.warmup_steps(cfg, steps)} of warmup"
        + (f"\n{model.lora}: scale {model.lora.scale:.4g}; base {model.origin.base}" if model.lora else "")
    )
