"""Where a run computes and in which precision. One process for now: many come with the sharding layer."""

import ctypes
import os
from dataclasses import dataclass

import torch

from runtime.errors import UserError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Compute:
    """The device, the dtype of matrix products (weights and optimizer stay float32), and this process's place."""

    device: torch.device
    dtype: torch.dtype
    rank: int = 0
    world: int = 1

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, dtype=self.dtype, enabled=self.dtype != torch.float32)

    @property
    def row_multiple(self) -> int:
        """Row lengths are rounded up to this on CUDA: FlexAttention works in blocks of 128 and compiles once a shape."""
        return 128 if self.device.type == "cuda" else 1

    @property
    def spare_padding(self) -> int:
        """Padded positions that cost less than one more forward (and so one more pass over all gradients), about: measured
        for GPT-2 124M on 2 CPU cores; on a GPU it is what fits into the time of launching the kernels."""
        return 64 if self.device.type == "cpu" else 2048

    def __str__(self) -> str:
        name = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else f"{torch.get_num_threads()} threads"
        return f"{self.device} ({name}), {str(self.dtype).removeprefix('torch.')}, torch {torch.__version__}"


def setup(device: str = "auto", dtype: str = "auto") -> Compute:
    """Choose device and dtype. `auto`: CUDA where there is one, bfloat16 on CUDA that has it, else float32.

    Raises UserError for a device that is not there, for float16, and for more than one process.
    """
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise UserError("this version runs in one process: start it with plain python, or torchrun --nproc_per_node 1")
    name = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
    try:
        where = torch.device(name)
        torch.zeros(1, device=where).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise UserError(f"device {device!r} cannot be used here ({str(error).splitlines()[0]}): try --device cpu") from None
    if dtype == "float16":
        raise UserError("dtype float16 is refused: its range is too small for log-probs and gradients; use bfloat16 or float32")
    if dtype == "auto":
        dtype = "bfloat16" if where.type == "cuda" and torch.cuda.is_bf16_supported() else "float32"
    if dtype not in DTYPES:
        raise UserError(f"dtype {dtype!r}: use auto, float32 or bfloat16")
    if where.type == "cpu":
        keep_freed_memory()
    return Compute(where, DTYPES[dtype])


def keep_freed_memory() -> None:
    """Let glibc reuse large freed blocks instead of handing each back to the kernel and faulting its pages in again.

    With GPT-2 124M on 2 cores that cost 5 s of system time in 5 DPO steps, 1 s with this; the peak stayed where it was.
    """
    mmap_max, trim_threshold, top_pad = -4, -1, -2  # malloc.h
    try:
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(mmap_max, 0), libc.mallopt(trim_threshold, 2**31 - 1), libc.mallopt(top_pad, 64 << 20)
    except (OSError, AttributeError):
        pass  # another C library: only slower
