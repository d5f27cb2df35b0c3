"""The reference file on its way into a DPO run: opened, bound to what it was made from, or refused.

This is the check that the project exists for. Training with another model's log-probs raises no error and gives a useless
model: every DPO run but the last of the HellaSwag experiment in docs/recipes.md was lost to it.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from base.errors import UserError, warn
from base.files import read_safetensors, sha256_of
from base.progress import count
from data.encode import Encoded, data_hash
from losses import REFERENCE_FREE


def check(path: str | Path) -> None:
    """UserError if there is no file `path`."""
    if not Path(path).is_file():
        raise UserError(f"key ref: {path}: no such file: make it with precompute_ref.py")


def read(path: str | Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of a reference file, `logps` among them, and its metadata. UserError for any other file (of key ref)."""
    check(path)
    tensors, metadata = read_safetensors(path, "make it anew with precompute_ref.py")
    if "logps" not in tensors or "weights_sha256" not in metadata:
        raise UserError(f"key ref: {path} is not a file of precompute_ref.py (no logps or no weights_sha256)")
    return tensors, metadata


@dataclass
class Reference:
    """`logps` and `val_logps`: (pairs, 2) float32, log pi_ref of chosen and rejected in nats. `hash`: SHA-256 of the file."""

    logps: Tensor
    val_logps: Tensor
    metadata: dict
    hash: str

    @classmethod
    def open(cls, cfg, fingerprint: str, tokenizer, max_len: int, train: list[Encoded], val: list[Encoded]) -> "Reference":
        """Read `cfg.ref` and refuse it (UserError) if it does not fit the data, or the weights that the run starts from
        (`fingerprint`: their SHA-256)."""
        if cfg.loss in REFERENCE_FREE or not cfg.ref:  # the loss has none, or it is the model as the run began
            return cls(torch.zeros(len(train), 2), torch.zeros(len(val), 2), {}, "")
        path = Path(cfg.ref)
        tensors, metadata = read(path)
        logps, val_logps = tensors["logps"], tensors.get("val_logps") if val else torch.zeros(0, 2)
        if val_logps is None:
            raise UserError(f"key ref: {path} has no validation pairs: make it with --val_data {cfg.val_data}")
        here = {"tokenizer_sha256": tokenizer.fingerprint(), "max_len": str(max_len), "truncation": cfg.truncation}
        here |= {"data_sha256": data_hash(train)} | ({"val_data_sha256": data_hash(val)} if val else {})
        for name, value in here.items():
            if metadata.get(name) != value:
                what = name.removesuffix("_sha256").replace("val_data", "validation data")
                pairs = (
                    f"; it holds {count(len(logps), 'pairs')}, the training data {len(train):,}"
                    if name == "data_sha256"
                    else ""
                )
                raise UserError(
                    f"key ref: {path} was made with another {what} ({metadata.get(name)!s:.12}, here {value:.12}{pairs}): "
                    "make it anew with precompute_ref.py from this run's init_from, data, tokenizer, max_len and truncation"
                )
        for pairs, table in ((train, logps), (val, val_logps)):
            if tuple(table.shape) != (len(pairs), 2):
                raise UserError(
                    f"key ref: {path} is damaged: {tuple(table.shape)} numbers for {count(len(pairs), 'pairs')}: make it anew"
                )
        if metadata["weights_sha256"] != fingerprint:
            message = (
                f"key ref: {path} holds the log-probs of other weights ({metadata.get('init_from')}, SHA-256 "
                f"{metadata['weights_sha256'][:12]}…) than this run starts from ({cfg.init_from}, {fingerprint[:12]}…)"
            )
            if not cfg.allow_ref_mismatch:
                raise UserError(f"{message}: make it anew from {cfg.init_from}, or insist with --allow_ref_mismatch true")
            warn(message)
        return cls(logps, val_logps, metadata, sha256_of(path))
