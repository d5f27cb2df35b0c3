"""The reference file on its way into a DPO run: opened, bound to what it was made from, or refused.

This is the check that the project exists for. Training with another model's log-probs raises no error and gives a useless
model: every DPO run but the last of the HellaSwag experiment in docs/recipes.md was lost to it.
"""

import contextlib
import shlex
from dataclasses import dataclass, fields
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from base.errors import UserError, warn
from base.files import read_safetensors, sha256_of
from data.encode import Encoded, column, data_hash
from losses import REFERENCE_FREE
from runtime.keys import DataKeys, DeviceKeys, ModelKeys

AUTO = "auto"  # as key ref: find the file that fits, or make it


def command(cfg) -> str:
    """How to make the reference file that a run with these settings needs: all that is bound to it, and fits a shell."""
    out = cfg.ref if cfg.ref.endswith(".safetensors") else f"{cfg.ref or 'ref'}.safetensors"
    keys = {f.name: f.default for group in (ModelKeys, DataKeys, DeviceKeys) for f in fields(group)}
    given = {n: getattr(cfg, n) for n, default in keys.items() if n == "init_from" or getattr(cfg, n) != default}
    words = [f"--{name} {shlex.quote(str(value))}" for name, value in {**given, "out": out}.items()]
    return f"`python precompute_ref.py {' '.join(words)}` and give --ref {out}, or give --ref {AUTO}"


def bound_to(cfg, tokenizer, max_len: int, train: list[Encoded], val: list[Encoded]) -> dict[str, str]:
    """What a reference file is bound to beside the weights, as its metadata say it."""
    hashes = {f"{prefix}data_sha256": data_hash(items) for prefix, items in (("", train), ("val_", val)) if items}
    return {"tokenizer_sha256": tokenizer.fingerprint(), "max_len": str(max_len), "truncation": cfg.truncation, **hashes}


def find(folder: Path, wanted: dict[str, str], before: str) -> str:
    """The file `before`, or else the first one in a folder, that is bound to what is wanted; "" if none is."""
    for path in (Path(before), *sorted(folder.glob("*.safetensors"))):
        with contextlib.suppress(SafetensorError, OSError), safe_open(path, "pt") as file:
            if wanted.items() <= (file.metadata() or {}).items():
                return str(path)
    return ""


def check(path: str | Path, make: str = "precompute_ref.py") -> None:
    """UserError if there is no file `path`."""
    if not Path(path).is_file():
        raise UserError(f"key ref: {path}: no such file: make it with {make}")


def read(path: str | Path, make: str = "precompute_ref.py") -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of a reference file, `logps` among them, and its metadata. UserError for any other file (of key ref)."""
    check(path, make)
    path = Path(path)
    tensors, metadata = read_safetensors(path, "make it anew with precompute_ref.py")
    if "logps" not in tensors or "weights_sha256" not in metadata:
        raise UserError(f"key ref: {path} is not a file of precompute_ref.py (no logps or no weights_sha256)")
    return tensors, metadata


@dataclass
class Reference:
    """`logps` and `val_logps`: (completions,) float32, log pi_ref of the examples' completions, one behind the other, in nats.
    `hash`: SHA-256 of the file."""

    logps: Tensor
    val_logps: Tensor
    metadata: dict
    hash: str

    @classmethod
    def open(cls, cfg, fingerprint: str, tokenizer, max_len: int, train: list[Encoded], val: list[Encoded]) -> "Reference":
        """Read `cfg.ref` and refuse it (UserError) if it does not fit the data, or the weights that the run starts from
        (`fingerprint`: their SHA-256)."""
        if cfg.loss in REFERENCE_FREE or not cfg.ref:  # the loss has none, or it is the model as the run began
            return cls(*(torch.zeros(sum(column(items, "n_completions"))) for items in (train, val)), {}, "")
        path = Path(cfg.ref)
        tensors, metadata = read(path, command(cfg))
        logps, val_logps = tensors["logps"], tensors.get("val_logps") if val else torch.zeros(0)
        if val_logps is None:
            raise UserError(f"key ref: {path} has no validation pairs: make it anew with {command(cfg)}")
        for name, value in bound_to(cfg, tokenizer, max_len, train, val).items():
            if metadata.get(name) != value:
                what = name.removesuffix("_sha256").replace("val_data", "validation data")
                of_pairs = name == "data_sha256" and logps.shape[1:] == (2,)
                n = sum(column(train, "n_pairs"))
                pairs = f"; it holds {len(logps):,} pairs, the training data {n:,}" if of_pairs else ""
                raise UserError(
                    f"key ref: {path} was made with another {what} ({metadata.get(name)!s:.12}, here {value:.12}{pairs}): "
                    f"make it anew with {command(cfg)}"
                )
        for items, table in ((train, logps), (val, val_logps)):
            if table.numel() != (n := sum(column(items, "n_completions"))):
                raise UserError(f"key ref: {path} is damaged: {tuple(table.shape)} numbers for {n} completions: make it anew")
        if metadata["weights_sha256"] != fingerprint:
            message = (
                f"key ref: {path} holds the log-probs of other weights ({metadata.get('init_from')}, SHA-256 "
                f"{metadata['weights_sha256'][:12]}…) than this run starts from ({cfg.init_from}, {fingerprint[:12]}…)"
            )
            if not cfg.allow_ref_mismatch:
                raise UserError(f"{message}: make it anew from {cfg.init_from}, or insist with --allow_ref_mismatch true")
            warn(message)
        return cls(logps.flatten(), val_logps.flatten(), metadata, sha256_of(path))
