"""Stage 2, the reference pass: the log-probability of every chosen and rejected completion under the frozen reference.

    python precompute_ref.py --init_from runs/hellaswag_sft/model --data hellaswag --out runs/hellaswag_ref.safetensors

The file carries what it was made from (weights, tokenized data, tokenizer, lengths), so that dpo.py can refuse a wrong one.
"""

from base.script import run

import itertools
from dataclasses import dataclass

import torch

import weights
from base.errors import UserError
from base.files import write_whole
from data.encode import Encoded, data_hash
from runtime import config, distributed
from runtime.build import build_model, build_tokenizer, load_data
from runtime.config import REQUIRED, key
from runtime.keys import DataKeys, DeviceKeys, ModelKeys
from runtime.score import score


@dataclass
class Config(ModelKeys, DataKeys, DeviceKeys):
    """Store the reference model's log-probabilities of all preference pairs in one file."""

    out: str = key(REQUIRED, "the .safetensors file to write", writes=".safetensors")
    micro_tokens: int = key(8192, "most tokens in one forward, padding included", least=1)


def share_prompts(items: list[Encoded]) -> tuple[list[Encoded], list[list[tuple[int, int]]]]:
    """Neighbouring pairs of one group and prompt -> one item with each of their completions once.

    Returns the items and, for every pair, where its completions went: [(item, completion), (item, completion)].
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
    """Log-probability of each pair's completions, (pairs, 2) float32, in nats, on the CPU of every rank."""
    shared, where = share_prompts(items)
    found = score(model, shared, compute, micro_tokens, "reference")
    logps = torch.stack([torch.stack([found[i][j] for i, j in pair]) for pair in where])
    for item, finite in zip(items, logps.isfinite().all(1).tolist(), strict=True):
        if not finite:
            raise UserError(f"the reference's log-probs are not finite (pair {item.number}): no file was written")
    return logps


def main() -> None:
    cfg = config.load(Config, prog="precompute_ref.py")
    compute = distributed.setup(cfg.device, cfg.dtype)
    print(compute)
    tokenizer = build_tokenizer(cfg, cfg.init_from, compute)
    model = build_model(cfg, tokenizer, compute)
    train, val, max_len = load_data(cfg, "preference", tokenizer, model, compute)

    tensors, hashes = {}, {}
    for prefix, items in (("", train), ("val_", val)):
        if items:
            tensors[prefix + "logps"] = reference_logps(model, items, compute, cfg.micro_tokens)
            hashes[prefix + "data_sha256"] = data_hash(items)
    metadata = {
        "weights_sha256": weights.fingerprint(model),
        **hashes,
        "init_from": cfg.init_from,
        "data": cfg.data,
        "tokenizer": tokenizer.name,
        "tokenizer_sha256": tokenizer.fingerprint(),
        "max_len": str(max_len),
        "truncation": cfg.truncation,
        "date": cfg.date,
        "dtype": str(compute.dtype).removeprefix("torch."),
    }
    compute.once(lambda: write_whole(cfg.out, weights.safetensors_bytes(tensors, metadata)))
    shapes = ", ".join(f"{name} {tuple(t.shape)}" for name, t in tensors.items())
    print(f"wrote {cfg.out}: {shapes}; mean log-prob chosen, rejected {tensors['logps'].mean(0).tolist()}")


if __name__ == "__main__":
    run(main)
