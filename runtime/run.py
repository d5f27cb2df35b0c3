"""The folder of a training run: config.toml, metrics.jsonl, checkpoints/, and at the end model/ (and adapter/)."""

import dataclasses
import math
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

import adapters
import generate
import weights
from base.errors import UserError, warn
from base.files import claim, read_plain, write_whole
from base.progress import count
from runtime import checkpoint, config, distributed, optim
from runtime.build import source_options
from runtime.keys import OURS, TrainKeys
from runtime.log import Console, Metrics, Timer, cuda_numbers, peak_flops, step_flops
from runtime.step import Outcome

# Keys that may differ when a run goes on from a checkpoint, which is bound to what they name, or says how long the run is
BOUND = ("data", "val_data", "data_dir", "init_from", "tokenizer", "ref", "max_steps", "epochs")
LATER = ("base", "tokenizer")  # what checkpoints of earlier versions are not bound to
LAYOUT = ("micro_tokens", "row_len", "activation_checkpointing")  # free keys that change the last bits


class Run:
    """A run's folder and its life: begin or resume, log, validate, save, stop cleanly, finish.

    `binding` is what must be the same when the run is resumed (the data's hash, …); `unit` names what a batch holds. Every
    rank makes one and calls the same methods. Only rank 0 touches the folder, apart from the shards of a checkpoint.
    """

    def __init__(self, cfg: TrainKeys, steps: int, compute, tokenizer, binding: dict, unit: str):
        self.cfg, self.steps, self.compute, self.tokenizer = cfg, steps, compute, tokenizer
        self.binding = {**binding, "device": compute.device.type, "dtype": str(compute.dtype).removeprefix("torch.")}
        self.binding["tokenizer"] = tokenizer.fingerprint()
        self.folder = Path(cfg.out_dir)
        self.checkpoints = self.folder / "checkpoints"
        self.best: dict | None = None  # {"step", "loss"} of the best validation so far
        self.saved_at = -1
        self.console = Console(steps, unit)
        self.metrics: Metrics | None = None  # on rank 0
        self.stop_signal = 0  # that this rank got
        self.heard = 0  # that any rank got, by the last step that was read
        self.unread: list[tuple] = []  # what `step_done` was given of steps that are under way: of one at most
        self.lock = None  # on rank 0
        compute.once(self._lock_folder)

    # --- begin or resume ---

    def _lock_folder(self) -> None:
        config.written(self.cfg, OURS)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.lock = claim(self.folder / ".lock")
        if self.lock is None:
            raise UserError(f"out_dir {self.folder}: another run is writing there: wait, or name another folder")

    def begin(self, model, optimizer) -> int:
        """Resume from the newest whole checkpoint, if there is one; returns the number of steps done."""
        self.binding["base"] = model.origin.start_sha256
        again = any(self.compute.gather(restarted()))  # --overwrite was for the first start
        if self.cfg.overwrite and not again:
            self.compute.once(self._delete)
        found = self.compute.once(self._find)
        done, seen = 0, 0
        if found:
            folder, state = found
            checkpoint.load(folder, model, optimizer, self.compute)
            done, seen, self.best = state["step"], state["metrics_bytes"], state["best"]
            self.compute.once(self._prune)  # a kill may have come between its save and this
            self.saved_at = done
            print(f"resuming {self.folder} at step {done} of {self.steps}, from {folder}")
            if (was := state.get("steps", self.steps)) < self.steps:
                before, now = optim.learning_rate(self.cfg, done - 1, was), optim.learning_rate(self.cfg, done, self.steps)
                print(
                    f"extended from {was} to {self.steps} steps: the {self.cfg.schedule} schedule covers all {self.steps} now, "
                    f"so the learning rate goes on at {now:.3g}, after {before:.3g}"
                )
        self.compute.once(lambda: self._open(seen, done))
        for doubt in optim.doubts(self.cfg, model, self.steps):
            warn(doubt)
        self.handlers = {name: signal.signal(name, self._on_signal) for name in (signal.SIGINT, signal.SIGTERM)}
        self.timer = Timer(torch.device("cpu"))  # that does not wait for the device: reading a step does
        self.peak = peak_flops(self.compute.device, self.compute.dtype) if self.compute.device.type == "cuda" else 0.0
        return done

    def _delete(self) -> None:
        """Delete what the run that is there has written, but for config.toml, which is replaced."""
        paths = [self.folder / name for name in OURS]
        for path in paths:
            if path.is_symlink():
                raise UserError(f"key overwrite: {path} is a link, and what lies behind it is not deleted: remove it yourself")
            if strange := path.name in checkpoint.MARKS and weights.strangers(path, checkpoint.MARKS[path.name]):
                raise UserError(f"key overwrite: {path} holds {strange}, which no run wrote: move it away")
        checkpoint.drop_after(self.checkpoints, -1)
        for path in paths[1:]:
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)

    def _find(self) -> tuple[Path, dict] | None:
        """The checkpoint to go on from, or None; refuses a folder that holds another run."""
        found = checkpoint.newest(self.checkpoints)
        if not found and checkpoint.steps(self.checkpoints):
            raise UserError(f"{self.checkpoints}: every checkpoint is damaged: start anew with --overwrite or another out_dir")
        if found or self._did_a_step():  # what is there is not wiped for another run
            before = config.written(self.cfg)
            config.check_same(self.cfg, before, "a run", BOUND if found else ())
            for name in LAYOUT:
                if (was := before.get(name)) not in (None, now := getattr(self.cfg, name)):
                    more = ", and dropout draws other random numbers" if self.cfg.dropout or self.cfg.lora_dropout else ""
                    print(f"{name} is {now} now, not {was}: the last bits will differ from an unbroken run's{more}")
        if not found and self._did_a_step() and (self.folder / "model").exists():
            why = "the run there is done, and no checkpoint of it is left (keep 0)"
            raise UserError(f"out_dir {self.folder}: {why}: name another one, or start anew with --overwrite")
        if not found:
            return None
        folder, state = found
        for name, now in self.binding.items():
            if state.get(name, now if name in LATER else None) != now:
                raise UserError(f"out_dir {self.folder}: the {name} differs from when its run was begun: name another out_dir")
        if self.steps < (was := max(state["step"], state.get("steps", 0))):
            raise UserError(
                f"out_dir {self.folder} holds a run of {was} steps, not {self.steps}: give max_steps or epochs for as many or "
                "more, name another out_dir, or start anew with --overwrite"
            )
        metrics = self.folder / "metrics.jsonl"
        if not metrics.exists() or metrics.stat().st_size < state["metrics_bytes"]:
            raise UserError(f"{metrics} is shorter than when {folder} was saved: restore it, or start anew with --overwrite")
        checkpoint.drop_after(self.checkpoints, state["step"])  # damaged ones: they must not count as the newest
        return found

    def _did_a_step(self) -> bool:
        """A run that was refused before its first step may be started with other settings."""
        metrics = self.folder / "metrics.jsonl"
        return metrics.exists() and b'"split": "train"' in read_plain(metrics)

    def _open(self, seen: int, done: int) -> None:
        write_whole(self.folder / "config.toml", config.to_toml(dataclasses.replace(self.cfg, overwrite=False)))
        self.metrics = Metrics(self.folder / "metrics.jsonl", seen, dataclasses.asdict(self.cfg), done)

    # --- along the way ---

    def step_done(self, step: int, outcome: Outcome, lr: float, items: list, model, figures: Callable | None = None) -> None:
        """Called after every step, with its examples over all ranks. figures: (sums) -> what the stage adds to the record, of
        the sums that the ranks found (see `Outcome`).

        On CUDA the step before is recorded, if nothing waits for this one: it is read while this one is under way. UserError if
        it was not finite.
        """
        self.unread.append((step, outcome, lr, items, model, figures))
        waited_for = self.due(self.cfg.eval_every, step) or self.due(self.cfg.save_every, step)
        self._read(keep=1 if self.compute.late and not waited_for else 0)

    def _read(self, keep: int = 0) -> None:
        while len(self.unread) > keep:
            step, outcome, lr, items, model, figures = self.unread.pop(0)
            loss, grad_norm, self.heard, sums = outcome.read()
            tokens, predicted = (sum(getattr(item, name) for item in items) for name in ("row_tokens", "completion_tokens"))
            record = {"loss": loss, "lr": lr, "grad_norm": grad_norm, "tokens": tokens, **(figures(sums) if figures else {})}
            self.log_step(step, record, self.timer.lap(), sum(item.n_pairs for item in items), model, predicted)

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
        """Record a validation; True if its loss is the best so far (of a trained model: step 0 does not count). Where there is
        a reward, that decides instead, and what has gone too far (`max_kl`) does not count."""
        if self.metrics:
            self.metrics.write({"step": step, "split": "val", **record})
        too_far = "kl" in record and record["kl"] > self.cfg.max_kl
        if too_far:
            warn(f"step {step}: KL {record['kl']:.1f} nats from the start: too far (a higher beta, a lower lr, fewer steps?)")
        score = record.get("reward", -record["loss"])
        counts = step > 0 and math.isfinite(score) and not ("reward" in record and too_far)
        better = counts and (self.best is None or score > self.best.get("score", -self.best["loss"]))
        if better:
            self.best = {"step": step, "loss": record["loss"], "score": score}
        shown = "  ".join(f"{name} {value:.4f}" for name, value in record.items())
        print(f"validation at step {step}: {shown}{'  (best)' if better else ''}", flush=True)
        return better

    def due(self, every: int, step: int) -> bool:
        return step == self.steps or (every > 0 and step % every == 0)

    def save(self, step: int, model, optimizer) -> None:
        """Write a checkpoint of `step`, then delete those that `keep` does not cover."""
        seen = self.compute.once(lambda: self.metrics.synced())  # a checkpoint must not know of lines that a power cut can take
        state = {"metrics_bytes": seen, "best": self.best, "steps": self.steps, "base_sha256": model.origin.base_sha256}
        described = (adapters.describe, model) if model.lora else (weights.describe, model.config)
        describe = partial(*described, self.tokenizer)
        checkpoint.save(self.checkpoints, step, state | self.binding, model, optimizer, describe, self.compute)
        self.saved_at = step
        self.compute.once(self._prune)

    def _prune(self) -> None:
        checkpoint.prune(self.checkpoints, max(1, self.cfg.keep), self.best["step"] if self.best else None)

    def _on_signal(self, number: int, _frame) -> None:
        if self.stop_signal:
            if time.monotonic() - self.signalled_at > 2:  # Ctrl-C in a terminal comes twice: from it and from torchrun
                raise KeyboardInterrupt
            return
        self.stop_signal, self.signalled_at = number, time.monotonic()
        if self.compute.rank == 0:
            name = signal.Signals(number).name
            print(f"\n{name}: finishing this step, then saving (again to stop at once)", file=sys.stderr)

    def stopped(self, step: int, model, optimizer) -> bool:
        """Called after every step. True after Ctrl-C or SIGTERM on any rank; then the step is saved, and the user told so."""
        if not self.unread:
            self.timer.lap()  # validation and saving are not the next step's time
        heard = self.stop_signal if self.compute.world == 1 else self.heard
        if not heard or step == self.steps:
            return False
        self.stop_signal = heard
        self._read()
        if self.saved_at != step:
            self.save(step, model, optimizer)
        self._end()
        how = "the same command without --overwrite" if self.cfg.overwrite else "the same command"
        print(f"stopped at step {step} of {self.steps}, saved in {self.checkpoints}: {how} goes on from there")
        return True

    # --- the end ---

    def finish(self, model) -> None:
        """Write out_dir/model: the weights with the best validation loss, or the last ones where nothing was validated. With
        LoRA first out_dir/adapter, for peft; model/ has it merged into the base as that was read, in float32."""
        which = f"step {self.steps}"
        if getattr(self.cfg, "reward", "") and not self.best:
            warn(f"every validation was beyond max_kl {self.cfg.max_kl}: the last weights are written, and they went too far")
        if self.best and self.best["step"] != self.steps:
            best = self.checkpoints / f"step_{self.best['step']}"
            _, damage = self.compute.once(lambda: checkpoint.inspect(best))
            if damage:
                warn(f"{best}, the best checkpoint, is damaged ({damage}): the last weights are used")
            else:
                checkpoint.load(best, model, None, self.compute)
                found = f"reward {self.best['score']:.4f}" if getattr(self.cfg, "reward", "") else f"{self.best['loss']:.4f}"
                which = f"step {self.best['step']}, which validated best ({found})"
        if model.lora:
            adapters.save(model, self.tokenizer, self.folder / "adapter", self.compute.rank)
            self.compute.once(self._save_merged)
        else:
            weights.save(model, self.tokenizer, self.folder / "model", self.compute.rank)
        self.compute.gather(None)  # nobody leaves while rank 0 still gathers
        if self.cfg.keep == 0:
            self.compute.once(lambda: checkpoint.prune(self.checkpoints, 0, None))
        self._end()
        print(f"wrote {self.folder / 'model'}{' and adapter' if model.lora else ''}: {which}")
        print(f"to look at it: python -m report.page {self.folder} --out {self.folder / 'report.html'}", flush=True)

    def _save_merged(self) -> None:
        found = adapters.source(str(self.folder / "adapter"), **source_options(self.cfg, self.tokenizer))
        weights.save_tensors(found.config, found.tensors, self.tokenizer, self.folder / "model")

    def _end(self) -> None:
        if self.metrics:
            self.metrics.close()
            self.lock.close()
        for name, handler in self.handlers.items():
            signal.signal(name, handler)


def restarted() -> bool:
    """Whether torchrun --max-restarts has started this process again after a failure."""
    return os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0"


# --- a step's small duties -------------------------------------------------------------------------------------------


def print_samples(model, tokenizer, items: list, compute, new_tokens: int = 48) -> None:
    """Complete a few prompts greedily and print them beside the completion that was wanted. Leaves out undesirable ones."""
    items = [item for item in items if len(item.prompt) < model.config.block_size and item.label != 0]
    if not items:
        return
    try:
        with compute.autocast():
            prompts = [item.prompt.tolist() for item in items]
            written = generate.greedy(model, prompts, new_tokens, tokenizer.stops, tokenizer.size)
    except FloatingPointError as error:
        print(f"  no samples: {error}", flush=True)
        return
    for item, ids in zip(items, written, strict=True):
        tail = tokenizer.decode(item.prompt.tolist())[-100:]
        ids = item.completions[item.pairs[0][0]].tolist()
        wanted = tokenizer.decode(ids[:-1] if ids[-1] in tokenizer.stops else ids)
        print(f"  prompt …{tail!r}\n    wanted  {wanted[:200]!r}\n    written {tokenizer.decode(ids)[:200]!r}", flush=True)


def summary(model, cfg: TrainKeys, steps: int, plan) -> str:
    """Every derived number, before the first step."""
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    total = sum(p.numel() for p in model.parameters())
    mflop, mflop_predicted = (step_flops(model, *one) / 1e6 for one in ((1, 0), (0, 1)))
    part = f"; {sum(distributed.own(p).numel() for p in model.parameters()):,} of them on this rank" if plan.world > 1 else ""
    memory = optim.memory(model, cfg.optimizer) / 1e9
    saved = 4e-9 * trained * (1 + optim.OPTIMIZERS[cfg.optimizer].states)
    most = max(1, cfg.keep) + 2  # with the best one, and the one that is being written
    return (
        f"{model.config}: {total:,} parameters, {trained:,} trained{part}; weights, gradients and optimizer take "
        f"{memory:.2f} GB a rank; {mflop:,.1f} MFLOP a token and {mflop_predicted:,.1f} more a predicted one\n"
        f"on the disk: at most {most} checkpoints of {saved:.3g} GB, and {4e-9 * total:.3g} GB for the model\n"
        f"{count(steps, 'steps')} of {cfg.batch_size}, {plan.steps_per_epoch:,} an epoch of {plan.epoch_size:,}; "
        f"{optim.warmup_steps(cfg, steps)} of warmup"
        + (f"\n{model.lora}: scale {model.lora.scale:.4g}; base {model.origin.base}" if model.lora else "")
    )
