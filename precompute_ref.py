"""Stage 2, the reference pass: the log-probability of every chosen and rejected completion under the frozen reference.

    python precompute_ref.py --init_from runs/hellaswag_sft/model --data hellaswag --out runs/hellaswag_ref.safetensors

The file carries what it was made from (weights, tokenized data, tokenizer, lengths), so that dpo.py can refuse a wrong one.
"""

import functools
import itertools
from dataclasses import dataclass

import torch

import losses
import weights
from base.errors import UserError, run
from base.files import safetensors_bytes, write_whole
from data import RECIPES
from data.batch import collate
from data.encode import Encoded, data_hash, load_encoded
from data.plan import plan_once
from data.tokenizer import choose
from runtime import config, distributed
from runtime.config import REQUIRED, key
from runtime.keys import DataKeys, DeviceKeys, ModelKeys
from runtime.log import Progress
from runtime.run import build_model, context


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
    seen: dict[bytes, int] = {}
    for item in items:
        joins = shared and shared[-1].group == item.group and shared[-1].prompt.tobytes() == item.prompt.tobytes()
        if not joins:
            shared.append(Encoded(item.prompt, [], item.number, item.group))
            seen = {}
        for completion in item.completions:
            if seen.setdefault(completion.tobytes(), len(seen)) == len(shared[-1].completions):
                shared[-1].completions.append(completion)
        where.append([(len(shared) - 1, seen[c.tobytes()]) for c in item.completions])
    return shared, where


@torch.no_grad()
def reference_logps(model, items: list[Encoded], compute, micro_tokens: int) -> torch.Tensor:
    """Log-probability of each item's completions, (n_items, 2) float32, in nats, on the CPU of every rank."""
    model.eval()
    shared, where = share_prompts(items)
    counts = [len(item.completions) for item in shared]
    first = [0, *itertools.accumulate(counts)]  # shared item -> the number of its first completion
    sums = torch.zeros(first[-1])
    micros = plan_once(shared, micro_tokens, compute.spare_padding, compute.world)[compute.rank]
    total = sum(shared[i].row_tokens for rows in micros for row in rows for i in row)
    progress = Progress("reference", total, "tok", compute.rank)
    for rows in filter(None, micros):
        batch = collate([[shared[i] for i in row] for row in rows], compute.row_multiple).to(compute.device)
        with compute.autocast():
            logps = model(batch)
        at = [n for row in rows for i in row for n in range(first[i], first[i + 1])]
        sums[at] = losses.completion_sums(logps, batch.completion, batch.n_completions).cpu()
        progress.add(sum(item.row_tokens for item in batch.items))
    progress.close()
    sums = compute.total(sums)[torch.tensor([[first[i] + j for i, j in pair] for pair in where])]
    for item, found in zip(items, sums.isfinite().all(1).tolist(), strict=True):
        if not found:
            raise UserError(f"the reference's log-probs are not finite (pair {item.number}): no file was written")
    return sums


def main() -> None:
    cfg = config.load(Config, prog="precompute_ref.py")
    compute = distributed.setup(cfg.device, cfg.dtype)
    print(compute)
    tokenizer = choose(cfg.tokenizer, cfg.init_from)
    model = build_model(cfg, tokenizer, compute, seed=cfg.seed)
    max_len = context(cfg.max_len, model)

    tensors, hashes = {}, {}
    val_source = cfg.val_data or (cfg.data if cfg.data in RECIPES else "")
    for split, source, limit, prefix in (("train", cfg.data, cfg.limit, ""), ("val", val_source, cfg.val_limit, "val_")):
        if not source:
            continue
        policy = {"data_dir": cfg.data_dir, "limit": limit}
        read = functools.partial(load_encoded, source, split, "preference", tokenizer, max_len, cfg.truncation, **policy)
        items = compute.once(read)
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
        "dtype": str(compute.dtype).removeprefix("torch."),
    }
    compute.once(lambda: write_whole(cfg.out, safetensors_bytes(tensors, metadata)))
    shapes = ", ".join(f"{name} {tuple(t.shape)}" for name, t in tensors.items())
    print(f"wrote {cfg.out}: {shapes}; mean log-prob chosen, rejected {tensors['logps'].mean(0).tolist()}")


if __name__ == "__main__":
    run(main)
