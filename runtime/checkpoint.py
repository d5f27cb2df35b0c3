"""Checkpoints: safetensors files + state.json in out_dir/checkpoints/step_N, whole or absent. Nothing in them is unpickled.

Beside them lies what a model's folder (with LoRA an adapter's) has, its config and tokenizer: so a checkpoint is a model.

Each process writes the rows that it holds into a file of its own, with the number of each tensor's first row in the header.
So any number of processes can read what any other number wrote.

A checkpoint is written under another name, synced, and renamed. state.json holds every file's size and SHA-256, so that one
that was damaged later is noticed and passed over for the one before.
"""

import contextlib
import json
import os
import shutil
import sys
from collections.abc import Callable
from operator import itemgetter
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor

import adapters
import weights
from base.errors import UserError
from base.files import expand, read_json, sha256_of, sync, write_whole
from runtime.distributed import own

UNFINISHED = ".tmp"  # the ending of folders that are being written or deleted
MARKS = {"model": weights.CONFIG, "adapter": adapters.CONFIG}  # what a run writes at its end, and a file in it


def save(root: Path, step: int, state: dict, model, optimizer, describe: Callable[[Path], None], compute) -> None:
    """Write a checkpoint to root/step_N: the model, the optimizer and `state` (JSON). Every rank writes its rows, rank 0 what
    `describe` writes into a folder.

    Frozen parameters are left out: whoever builds the model reads them anew. Nothing else is needed to go on: the data's
    order and dropout's random numbers follow from seed and step.

    Raises OSError, on all ranks, when it cannot be written. Then nothing of it is left, and earlier checkpoints are untouched.
    """
    final, folder = root / f"step_{step}", root / f"step_{step}{UNFINISHED}"
    state = {"step": step, **state}

    def write() -> dict[str, list] | OSError:
        file = folder / f"rank_{compute.rank}.safetensors"
        mine, starts = {}, {}
        for name, tensor in _tensors(model, optimizer).items():
            rows, start, first = _part(tensor, compute)
            if first and len(rows):
                mine[name], starts[name] = rows, str(start)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with open(file, "wb") as out:
                weights.write_safetensors(out, {n: tuple(rows.shape) for n, rows in mine.items()}, mine.items(), starts)
            sync(file)
            return {file.name: [file.stat().st_size, sha256_of(file)]}
        except OSError as error:
            return OSError(error.errno, error.strerror, str(final))

    def publish() -> None:
        for name, (size, _) in state["files"].items():
            if not (folder / name).is_file() or (folder / name).stat().st_size != size:
                raise UserError(f"{folder / name} is not there: out_dir must be a folder that all nodes see")
        describe(folder)
        for path in {*folder.iterdir()} - {folder / name for name in state["files"]}:
            sync(path)
            state["files"][path.name] = [path.stat().st_size, sha256_of(path)]
        write_whole(folder / weights.STATE, json.dumps(state, indent=1))
        sync(folder)
        shutil.rmtree(final, ignore_errors=True)
        os.rename(folder, final)
        sync(root)

    compute.once(lambda: shutil.rmtree(folder, ignore_errors=True))
    try:
        written = compute.gather(write())
        if failed := [part for part in written if isinstance(part, OSError)]:
            raise failed[0]
        state["files"] = {name: entry for part in written for name, entry in part.items()}
        compute.once(publish)
    except BaseException:
        if compute.rank == 0:
            shutil.rmtree(folder, ignore_errors=True)
        raise


def load(folder: Path, model: torch.nn.Module, optimizer: torch.optim.Optimizer | None, compute) -> None:
    """Read model (and, if given, optimizer) from a checkpoint folder that `newest` has found whole, saved by any number of
    processes. Every rank reads its rows. UserError if they are not those of this model and optimizer."""
    if optimizer is not None and not optimizer.state:  # a step makes the state that is then read
        for p in (p for group in optimizer.param_groups for p in group["params"]):
            p.grad = torch.zeros_like(p)
        optimizer.step()
        optimizer.zero_grad()
    try:
        with contextlib.ExitStack() as opened, torch.no_grad():
            pieces = weights.pieces(folder, opened)
            for name, tensor in _tensors(model, optimizer).items():
                _read(name, tensor, pieces.get(name, []), compute)
    except (SafetensorError, OSError, ValueError) as error:
        raise UserError(f"{folder} is no checkpoint of this run ({error}): start anew with --overwrite") from None


def weights_of(key: str, name: str) -> str:
    """The folder with the weights that `name`, the value of a key, means: of a run's folder its model/, or its adapter/, or,
    where the run has not come to its end, its newest whole checkpoint. Any other name stays. UserError for a checkpoint that is
    damaged."""
    folder = expand(name)
    if not name or weights.on_hub(name) or not folder.is_dir():
        return name
    if (folder / weights.STATE).is_file():
        if damage := inspect(folder)[1]:
            raise UserError(f"key {key}: {name} is a damaged checkpoint ({damage}): name another one")
        return name
    if any((folder / mark).is_file() for mark in MARKS.values()):
        return name
    ended = [path for path, mark in MARKS.items() if (folder / path / mark).is_file()]
    saved = steps(folder / "checkpoints")
    if ended and not (saved and _goes_on(saved[-1])):
        return str(Path(name, ended[0]))
    found = newest(folder / "checkpoints")
    return str(Path(name, "checkpoints", found[0].name)) if found else name


def _goes_on(folder: Path) -> bool:
    """Whether a checkpoint's run had steps to go."""
    with contextlib.suppress(UserError):
        state = read_json(folder / weights.STATE)
        return state.get("steps", state.get("step")) != state.get("step")
    return False


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
        state = read_json(folder / weights.STATE)
        best = {"step": 0, "loss": 0.0} if state["best"] is None else state["best"]
        numbers = state["step"], state["metrics_bytes"], state.get("steps", 0), best["step"]
        figures = best["loss"], best.get("score", 0.0)
        if {*map(type, numbers)} != {int} or {*map(type, figures)} != {float} or state["metrics_bytes"] < 0:
            return {}, "state.json does not hold what was saved"
        if folder.name != f"step_{state['step']}":
            return {}, f"it is step {state['step']}"
        for name, (_, digest) in state["files"].items():
            file = folder / name
            if not file.is_file() or sha256_of(file) != digest:
                return {}, f"{name} is missing, or does not have the bytes that were saved"
    except (UserError, OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return {}, f"state.json cannot be read: {type(error).__name__}"
    return state, None


def steps(root: Path) -> list[Path]:
    """The step_N folders of root, oldest first."""
    named = (f for f in root.glob("step_*") if f.name.removeprefix("step_").isdecimal())
    return sorted(named, key=lambda f: int(f.name.removeprefix("step_")))


def drop_after(root: Path, step: int) -> None:
    """Delete the checkpoints of later steps than `step`."""
    for folder in steps(root):
        if int(folder.name.removeprefix("step_")) > step:
            shutil.rmtree(folder)


def prune(root: Path, keep: int, best: int | None) -> None:
    """Delete all but the newest `keep` checkpoints and the one of step `best`; and what a kill left half-written. The newest go
    first: after a kill on the way the run goes on from one that has its best still beside it."""
    for folder in reversed(steps(root)[: -keep or None]):
        if folder.name != f"step_{best}":
            os.rename(folder, folder.with_name(folder.name + UNFINISHED))  # a half-deleted one must not look like one
    for leftover in root.glob("step_*" + UNFINISHED):
        shutil.rmtree(leftover, ignore_errors=True)


def _tensors(model: torch.nn.Module, optimizer: torch.optim.Optimizer | None) -> dict[str, Tensor]:
    """What training changes, by name: the parameters, and beside each what the optimizer keeps of it."""
    model.state_dict()  # where FSDP has gathered parameters, it puts back the shards, which the optimizer knows
    found = {}
    for name, p in model.named_parameters():
        if p.requires_grad:
            kept = optimizer.state.get(p, {}) if optimizer else {}
            found |= {name: p.detach()} | {f"{name} {key}": value for key, value in kept.items()}
    return found


def _part(tensor: Tensor, compute) -> tuple[Tensor, int, bool]:
    """This rank's rows of a tensor, the number of the first one, and whether this rank is the one to save them."""
    start, first = 0, compute.rank == 0
    if hasattr(tensor, "placements"):
        mesh, first = tensor.device_mesh, True
        for dim, placement in enumerate(tensor.placements):
            rank = mesh.get_local_rank(dim)
            if placement.is_shard(0):
                start = rank * -(-len(tensor) // mesh.size(dim))  # equal shards, but for the last ones
            else:
                first = first and rank == 0
    rows = own(tensor)
    return rows if rows.dim() else rows.view(1), start, first


def _read(name: str, tensor: Tensor, pieces: list, compute) -> None:
    """Fill this rank's rows of a tensor from pieces of it, (number of the first row, slice) each. ValueError if they do not
    make up the tensor."""
    rows, start, _ = _part(tensor, compute)
    at = 0
    for begin, piece in sorted(pieces, key=itemgetter(0)):
        n, *row = piece.get_shape()
        if begin != at or row != list(rows.shape[1:]):
            raise ValueError(f"{name}: rows of {row} from {begin}, not of {list(rows.shape[1:])} from {at}")
        low, high = max(start, at), min(start + len(rows), at + n)
        if low < high:
            rows[low - start : high - start] = piece[low - at : high - at]
        at += n
    if at != (len(tensor) if tensor.dim() else 1):
        raise ValueError(f"{name}: {at} rows of {tuple(tensor.shape)}")
