"""Stage 2, the reference pass: the log-probability of every completion under the frozen reference.

    python precompute_ref.py --init_from runs/hellaswag_sft/model --data hellaswag --out runs/hellaswag_ref.safetensors

The file carries what it was made from (weights, tokenized data, tokenizer, lengths), so that dpo.py can refuse a wrong one.
"""

from base.script import run

import hashlib
import itertools
from dataclasses import dataclass
from pathlib import Path

import torch

import weights
from base.errors import UserError
from base.files import write_whole
from data.encode import Encoded, pair_places
from runtime import config, distributed, reference
from runtime.build import build_model, build_tokenizer, load_data
from runtime.config import REQUIRED, key
from runtime.keys import DataKeys, DeviceKeys, ModelKeys
from runtime.score import score


@dataclass
class Config(ModelKeys, DataKeys, DeviceKeys):
    """Store the reference model's log-probabilities of all completions in one file."""

    out: str = key(REQUIRED, "the .safetensors file to write", writes=".safetensors")
    micro_tokens: int = key(8192, "most tokens in one forward, padding included", least=1)


def share_prompts(items: list[Encoded]) -> tuple[list[Encoded], list[list[tuple[int, int]]]]:
    """Neighbours of one group and prompt (a problem's pairs) -> one item with each of their completions once.

    Returns the items and, for every example, where its completions went: [(item, completion), …].
    """
    shared: list[Encoded] = []
    where: list[list[tuple[int, int]]] = []
    for _, group in itertools.groupby(items, lambda item: (item.group, item.prompt.tobytes())):
        pairs = list(group)
        completions = {c.tobytes(): c for item in pairs for c in item.completions}  # each once
        place = {text: (len(shared), j) for j, text in enumerate(completions)}
        where += [[place[c.tobytes()] for c in item.completions] for item in pairs]
        shared.append(Encoded(pairs[0].prompt, list(completions.values()), pairs[0].number, pairs[0].group))
    return shared, where


def reference_logps(model, items: list[Encoded], compute, micro_tokens: int) -> torch.Tensor:
    """Log-probability of each example's completions in nats, float32, on the CPU of every rank: (examples, completions) where
    all have equally many, else one behind the other, (completions,)."""
    shared, where = share_prompts(items)
    found = score(model, shared, compute, micro_tokens, "reference")
    logps = [torch.stack([found[i][j] for i, j in places]) for places in where]
    for item, part in zip(items, logps, strict=True):
        if not part.isfinite().all():
            raise UserError(f"the reference's log-probs are not finite (example {item.number}): no file was written")
    return torch.stack(logps) if len(set(map(len, logps))) == 1 else torch.cat(logps)


def make(out: str, bound: dict[str, str], cfg, model, tokenizer, train: list[Encoded], val: list[Encoded], compute) -> None:
    """Write the reference file of these pairs. bound: see `reference.bound_to`."""
    parts = {name: items for name, items in (("logps", train), ("val_logps", val)) if items}
    tensors = {name: reference_logps(model, items, compute, cfg.micro_tokens) for name, items in parts.items()}
    metadata = {
        "weights_sha256": weights.fingerprint(model),
        **bound,
        "init_from": cfg.init_from,
        "data": cfg.data,
        "tokenizer": tokenizer.name,
        "date": cfg.date,
        "dtype": str(compute.dtype).removeprefix("torch."),
    }
    compute.once(lambda: write_whole(out, weights.safetensors_bytes(tensors, metadata)))
    shapes = ", ".join(f"{name} {tuple(t.shape)}" for name, t in tensors.items())
    means = tensors["logps"].flatten()[pair_places(train)].mean(0).tolist()
    what = "chosen, rejected" if train[0].label is None else "of the completion, of the borrowed one"
    print(f"wrote {out}: {shapes}; mean log-prob {what} {means}")


def find_or_make(cfg, model, tokenizer, max_len: int, train: list[Encoded], val: list[Encoded], compute) -> str:
    """The reference file of a run that begins with `model`, in the folder of its out_dir: one that fits, or a new one."""
    folder, bound = Path(cfg.out_dir).parent, reference.bound_to(cfg, tokenizer, max_len, train, val)
    wanted = bound | {"weights_sha256": weights.fingerprint(model), "dtype": str(compute.dtype).removeprefix("torch.")}
    out = compute.once(lambda: reference.find(folder, wanted, config.written(cfg).get("ref", "")))
    print(f"ref auto: {out} fits" if out else f"ref auto: no file in {folder} fits these weights and data: making one")
    if not out:
        out = str(folder / f"ref_{hashlib.sha256(repr(sorted(wanted.items())).encode()).hexdigest()[:12]}.safetensors")
        make(out, bound, cfg, model, tokenizer, train, val, compute)
    return out


def main() -> None:
    cfg = config.load(Config, prog="precompute_ref.py")
    compute = distributed.setup(cfg.device, cfg.dtype)
    print(compute)
    tokenizer = build_tokenizer(cfg, cfg.init_from, compute)
    model = build_model(cfg, tokenizer, compute)
    train, val, max_len = load_data(cfg, "preference", tokenizer, model, compute)
    make(cfg.out, reference.bound_to(cfg, tokenizer, max_len, train, val), cfg, model, tokenizer, train, val, compute)


if __name__ == "__main__":
    run(main)
