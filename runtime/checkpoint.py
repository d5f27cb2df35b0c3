"""Checkpoints: torch.distributed.checkpoint files + state.json in out_dir/checkpoints/step_N, whole or absent.

A checkpoint is written under another name, synced, and renamed. state.json holds every file's size and SHA-256, so that one
that was damaged later is noticed and passed over for the one before.
"""

import contextlib
import errno
import hashlib
import json
import os
import shutil
import sys
import warnings
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import state_dict as sd

from base.errors import UserError, lost_another
from base.files import sync, write_whole

UNFINISHED = ".tmp"  # the ending of folders that are being written or deleted


def save(root: Path, step: int, state: dict, model, optimizer, compute) -> None:
    """Write a checkpoint to root/step_N: the model, the optimizer and `state` (JSON). Every rank writes its shards.

    Frozen parameters are left out: whoever builds the model reads them anew. Nothing else is needed to go on: the data's
    order and dropout's random numbers follow from seed and step.

    Raises OSError, on all ranks, when it cannot be written. Then nothing of it is left, and earlier checkpoints are untouched.
    """
    final, folder = root / f"step_{step}", root / f"step_{step}{UNFINISHED}"
    state = {"step": step, **state}

    def make_room() -> None:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)

    def publish() -> None:
        for name, (size, _) in state["files"].items():
            if not (folder / name).is_file() or (folder / name).stat().st_size != size:
                raise UserError(f"{folder / name} is not there: out_dir must be a folder that all nodes see")
        write_whole(folder / "state.json", json.dumps(state, indent=1))
        sync(folder)
        shutil.rmtree(final, ignore_errors=True)
        os.rename(folder, final)
        sync(root)

    compute.once(make_room)
    try:
        writer = dcp.FileSystemWriter(folder, thread_count=1)
        with _quiet():
            tensors = _tensors(model, optimizer)
            dcp.save(tensors, storage_writer=writer, process_group=compute.control, no_dist=compute.world == 1)
        names = (f"__{compute.rank}_", *([".metadata"] if compute.rank == 0 else []))  # the shards are __RANK_N
        mine = [f for f in sorted(folder.iterdir()) if f.name.startswith(names)]
        hashes = compute.gather({f.name: [f.stat().st_size, _sha256(f)] for f in mine})
        state["files"] = {name: entry for part in hashes for name, entry in part.items()}
        compute.once(publish)
    except BaseException as error:
        if compute.rank == 0:
            shutil.rmtree(folder, ignore_errors=True)
        cause = _os_error(error)
        if cause is not None and cause is not error:
            raise OSError(cause.errno, cause.strerror, str(final)) from error
        raise


def load(folder: Path, model: torch.nn.Module, optimizer: torch.optim.Optimizer | None, compute) -> None:
    """Read model (and, if given, optimizer) from a checkpoint folder that `newest` has found whole, saved by any number of
    processes. Every rank reads its shards."""
    tensors = _tensors(model, optimizer)
    with _quiet():
        reader = dcp.FileSystemReader(folder)
        dcp.load(tensors, storage_reader=reader, process_group=compute.control, no_dist=compute.world == 1)
    sd.set_model_state_dict(model, tensors["model"], options=sd.StateDictOptions(strict=False))  # the frozen ones stay
    if optimizer is not None:
        sd.set_optimizer_state_dict(model, optimizer, tensors["optimizer"])


def newest(root: Path) -> tuple[Path, dict] | None:
    """The newest whole checkpoint and its state; says on stderr which ones it passes over and why."""
    for folder in reversed(steps(root)):
        state, damage = inspect(folder)
        if damage is None:
            return folder, state
        print(f"checkpoint {folder} is damaged ({damage}): falling back to the one before", file=sys.stderr)
    return None


def inspect(folder: Path) -> tuple[dict, str | None]:
    """(state, None) of a whole checkpoint, ({}, what is wrong) of a damaged one. Reads every file through."""
    try:
        state = json.loads((folder / "state.json").read_text())
        for name, (size, digest) in state["files"].items():
            file = folder / name
            if not file.is_file():
                return {}, f"{name} is missing"
            if file.stat().st_size != size:
                return {}, f"{name} has {file.stat().st_size:,} of {size:,} bytes"
            if _sha256(file) != digest:
                return {}, f"{name} does not have the bytes that were saved"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return {}, f"state.json cannot be read: {type(error).__name__}"
    return state, None


def steps(root: Path) -> list[Path]:
    """The step_N folders of root, oldest first."""
    named = (f for f in root.glob("step_*") if f.name.removeprefix("step_").isdigit())
    return sorted(named, key=lambda f: int(f.name.removeprefix("step_")))


def drop_after(root: Path, step: int) -> None:
    """Delete the checkpoints of later steps than `step`."""
    for folder in steps(root):
        if int(folder.name.removeprefix("step_")) > step:
            shutil.rmtree(folder)


def prune(root: Path, keep: int, best: int | None) -> None:
    """Delete all but the newest `keep` checkpoints and the one of step `best`; and what a kill left half-written."""
    for folder in steps(root)[: -max(1, keep)]:
        if folder.name != f"step_{best}":
            os.rename(folder, folder.with_name(folder.name + UNFINISHED))  # a half-deleted one must not look like one
    for leftover in root.glob("step_*" + UNFINISHED):
        shutil.rmtree(leftover, ignore_errors=True)


def _tensors(model: torch.nn.Module, optimizer: torch.optim.Optimizer | None) -> dict:
    tensors = {"model": sd.get_model_state_dict(model, options=sd.StateDictOptions(ignore_frozen_params=True))}
    if optimizer is not None:
        tensors["optimizer"] = sd.get_optimizer_state_dict(model, optimizer)
    return tensors


@contextlib.contextmanager
def _quiet():
    """Without torch's warning that one process saves alone: it is meant to."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*assuming the intent is to (save|load) in a single process")
        yield


def _sha256(file: Path) -> str:
    with open(file, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def _os_error(error: BaseException) -> OSError | None:
    """The operating system's complaint inside what torch raises: it wraps it, and of another rank's full disk it may say only
    that a write failed or that the file's end is at an unexpected position."""
    if isinstance(error, OSError):
        return error
    for inner in (error.__cause__, error.__context__, *(e for e, _ in getattr(error, "failures", {}).values())):
        if isinstance(inner, BaseException) and inner is not error and (found := _os_error(inner)):
            return found
    too_short = any(words in str(error).lower() for words in ("write", "unexpected pos"))
    if isinstance(error, RuntimeError) and too_short and not lost_another(error):
        return OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    return None
