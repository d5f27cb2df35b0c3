"""What a run says: metrics.jsonl, lines on the console, wandb, TensorBoard; tokens per second, time left, MFU, memory."""

import json
import math
import os
import time
from pathlib import Path

import torch

from base.errors import UserError
from base.files import write_whole
from base.progress import duration


class Metrics:
    """metrics.jsonl, a line a record, and the same to wandb and TensorBoard where the settings ask for them.

    `start`: the number of bytes to keep of a file that is there already (what the checkpoint being resumed had seen). `done`:
    the steps done by then.
    """

    def __init__(self, path: Path, start: int, settings: dict, done: int = 0):
        self.file = open(path, "ab")  # noqa: SIM115
        self.file.truncate(start)
        self.file.seek(start)
        makers = {"wandb": _wandb, "tensorboard": TensorBoard}
        self.others = [make(path.parent, settings, done) for name, make in makers.items() if settings.get(name)]

    def write(self, record: dict) -> None:
        self.file.write((json.dumps(record) + "\n").encode())
        self.file.flush()
        numbers = {f"{record['split']}/{k}": v for k, v in record.items() if k not in ("step", "split")}
        for other in self.others:
            other.log(numbers, step=record["step"])

    def synced(self) -> int:
        """The bytes written so far, once they are on the disk."""
        os.fsync(self.file.fileno())
        return self.file.tell()

    def close(self) -> None:
        self.file.close()
        for other in self.others:
            other.finish()


class TensorBoard:
    """Event files in folder/tensorboard. Where a run is resumed, what they say of steps after `done` no longer counts."""

    def __init__(self, folder: Path, settings: dict, done: int):
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise UserError(
                "key tensorboard: the package is not installed: pip install tensorboard, or leave the key out"
            ) from None
        self.writer = SummaryWriter(folder / "tensorboard", purge_step=done + 1)

    def log(self, numbers: dict[str, float], step: int) -> None:
        for name, value in numbers.items():
            self.writer.add_scalar(name, value, step)

    def finish(self) -> None:
        self.writer.close()


def _wandb(folder: Path, settings: dict, _done: int):
    try:
        import wandb
    except ImportError:
        raise UserError("key wandb: the package is not installed: pip install wandb, or leave the key empty") from None
    note = folder / "wandb_id"  # the same run goes on after a resume
    known = note.read_text().strip() if note.exists() else None
    try:
        run = wandb.init(project=settings["wandb"], dir=folder, config=settings, name=folder.name, id=known, resume="allow")
    except wandb.Error as error:
        said = str(error).strip().splitlines() or [type(error).__name__]
        raise UserError(f"key wandb: {said[0]}: mend that, set WANDB_MODE=offline, or leave the key empty") from None
    write_whole(note, run.id)
    return run


class Console:
    """A line a step at most every `every` seconds, with speed and time left."""

    def __init__(self, steps: int, unit: str, every: float = 1.0):
        self.steps, self.unit, self.every = steps, unit, every
        self.last = -math.inf
        self.first: tuple[float, int] | None = None

    def step(self, record: dict, seconds: float, examples: int) -> None:
        step, now = record["step"], time.monotonic()
        self.first = self.first or (now - seconds, step - 1)
        if now - self.last < self.every and step != self.steps:
            return
        self.last = now
        pace = (now - self.first[0]) / (step - self.first[1])  # validation and saving are part of it
        parts = [
            f"step {step:>{len(str(self.steps))}}/{self.steps}",
            f"loss {record['loss']:.4f}",
            *(f"{name} {record[f'rewards/{name}']:.3f}" for name in ("margins", "accuracies") if f"rewards/{name}" in record),
            f"lr {record['lr']:.2e}",
            f"grad {record['grad_norm']:.2f}",
            f"{record['tokens_per_s']:,.0f} tok/s",
            f"{examples / seconds:.1f} {self.unit}/s",
            f"{duration(pace * (self.steps - step))} left",
        ]
        print("  ".join(parts), flush=True)


def peak_flops(device: torch.device, dtype: torch.dtype) -> float:
    """The rate of a large matrix product on this device, FLOP/s: the best that a model could do."""
    n = 8192 if device.type == "cuda" else 1024
    a = torch.randn(n, n, device=device, dtype=dtype)
    seconds = []
    for _ in range(6):
        _synchronize(device)
        start = time.perf_counter()
        a @ a
        _synchronize(device)
        seconds.append(time.perf_counter() - start)
    return 2 * n**3 / min(seconds)


def step_flops(model: torch.nn.Module, tokens: int, completion_tokens: int) -> float:
    """Operations of forward and backward: 6 a weight and token, 4 if it is frozen, the vocabulary projection at predicted
    positions only.

    Attention's own products (about 6% more at 300 tokens for GPT-2 124M) are left out, so MFU comes out a little low.
    """
    blocks, head = (sum(p.numel() * (6 if p.requires_grad else 4) for p in part)
                    for part in (model.blocks.parameters(), model.head_parameters()))  # fmt: skip
    return float(blocks * tokens + head * completion_tokens)


def cuda_numbers(device: torch.device, flops: float, seconds: float, peak: float) -> dict:
    """`mfu` (share of `peak`) and `memory_gb` (most ever allocated, 1e9 bytes) for a step on CUDA; nothing elsewhere."""
    if device.type != "cuda":
        return {}
    return {"mfu": flops / seconds / peak, "memory_gb": torch.cuda.max_memory_allocated(device) / 1e9}


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class Timer:
    """Seconds since it was made or last read, with the device's work done."""

    def __init__(self, device: torch.device):
        self.device, self.start = device, time.perf_counter()

    def lap(self) -> float:
        _synchronize(self.device)
        now = time.perf_counter()
        seconds, self.start = now - self.start, now
        return seconds
