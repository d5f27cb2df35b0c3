"""Did DPO learn the preferences? The implicit reward of held-out pairs, without a judge.

    python eval_reward.py --model runs/hh_dpo/model --ref_model runs/hh_sft/model --data hh --out runs/hh_reward.json
    python eval_reward.py --model runs/hh_dpo/model --ref runs/hh_ref.safetensors --data hh --out runs/hh_reward.json

The reward of a completion is beta * (log pi(completion | prompt) - log ref(completion | prompt)), as in the DPO paper
(Rafailov et al. 2023, section 4). Accuracy is the share of pairs whose chosen completion has the larger reward.
docs/judging.md says what the figures mean. Runs under torchrun too.
"""

import json
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from base.errors import UserError, run, warn
from base.files import write_whole
from data.encode import Encoded, data_hash, load_encoded
from runtime import config, distributed, reference
from runtime.build import build_model, build_tokenizer, share
from runtime.config import REQUIRED, key
from runtime.keys import DTYPES, ChatKeys, ModelKeys
from runtime.score import score


@dataclass
class Config(ChatKeys):
    """Accuracy and margin of the implicit reward on preference pairs."""

    model: str = key(REQUIRED, "the trained model or adapter: a folder, or gpt2, gpt2-medium, gpt2-large, gpt2-xl")
    ref: str = key("", "reference file of precompute_ref.py that holds these pairs; or give ref_model")
    ref_model: str = key("", "the reference model; or give ref")
    data: str = key(REQUIRED, "pairs: a recipe (hh, hellaswag, …), a file, or hub:owner/name[:config]")
    columns: str = key("", "columns of a file by your names for them: prompt=question,chosen=a,rejected=b; empty = as they are")
    data_dir: str = key("", "folder that holds a recipe's files, instead of downloading them")
    split: str = key("val", "the split of a recipe (train, val, test) or of the hub's data set")
    limit: int = key(0, "use only the first so many problems, 0 = all", least=0)
    tokenizer: str = key("auto", "gpt2, toy, a folder, or auto = the model's own")
    max_len: int = key(0, "most tokens of prompt + completion, 0 = the model's context", least=0)
    truncation: str = key("drop", "what to do with longer ones: drop them, or cut the prompt's start", ["drop", "left"])
    beta: float = key(0.1, "strength of the pull to the reference, as in training", above=0)
    out: str = key(REQUIRED, "JSON file for the result", writes="")
    details: str = key("", "JSONL file for a line a pair", writes="")
    label: str = key("", "name of the run in tables and pictures (SFT, DPO, …)")
    parameters: int = key(0, "the model's number of parameters to note, 0 = counted", least=0)
    micro_tokens: int = key(8192, "most tokens in one forward, padding included", least=1)
    device: str = key("auto", "auto, cpu, cuda, cuda:1, …")
    dtype: str = key("auto", "dtype of matrix products; auto = bfloat16 on CUDA that has it, else float32", DTYPES)

    def check(self) -> None:
        if bool(self.ref) == bool(self.ref_model):
            raise UserError("key ref: the reward needs a reference: give either --ref FILE.safetensors or --ref_model DIR")


def load_model(name: str, max_len: int, tokenizer, compute):
    """A model or adapter. UserError if its context is shorter than `max_len` tokens."""
    model = build_model(ModelKeys(init_from=name), tokenizer, compute)
    if max_len > model.config.block_size:
        raise UserError(f"key max_len: {max_len} tokens are more than the context of {name}, {model.config.block_size} tokens")
    return model


def log_probs(name: str, model, items: list[Encoded], cfg: Config, compute) -> Tensor:
    """log p(completion | prompt) of chosen and rejected, (pairs, 2) float32, in nats. UserError if one is not finite."""
    found = torch.stack(score(model, items, compute, cfg.micro_tokens, "log-probs"))
    if not found.isfinite().all():
        raise UserError(f"{name}: its log-probs are not finite: its weights are damaged")
    return found


def stored_reference(path: str, items: list[Encoded]) -> Tensor:
    """Log-probs of these very pairs, (pairs, 2), from a reference file, where they may be the training or validation pairs."""
    tensors, metadata = reference.read(path)
    here = data_hash(items)
    for name in ("", "val_"):
        if metadata.get(f"{name}data_sha256") == here:
            found = tensors.get(f"{name}logps")
            if found is None or tuple(found.shape) != (len(items), 2):
                raise UserError(
                    f"key ref: {path} is damaged: it has not two numbers for each of {len(items)} pairs: make it anew"
                )
            return found
    made = ", ".join(f"{name} {metadata.get(name)}" for name in ("data", "tokenizer", "max_len", "truncation"))
    raise UserError(
        f"key ref: {path} does not hold these pairs (it was made from {made}): evaluate with the same, and the same "
        "limit; or give --ref_model"
    )


def grade(policy: Tensor, ref: Tensor, items: list[Encoded], beta: float) -> tuple[dict, list[dict]]:
    """(result, a detail a pair) from the log-probs of chosen and rejected under policy and reference, (pairs, 2), in nats.

    The standard errors count the pairs of one problem (`group`) as one draw: three pairs of one problem are not three
    independent ones. If every pair has its own problem they are the usual ones, sqrt(p (1 - p) / (n - 1)) for the accuracy.
    """
    chosen, rejected = (policy.double() - ref.double()).unbind(1)  # gains: log pi - log ref, (pairs,) each
    margins = beta * (chosen - rejected)
    _, group = torch.unique(torch.tensor([item.group for item in items]), return_inverse=True)
    groups = int(group.max()) + 1
    result: dict = {"n": len(items)}
    measured = {"accuracy": (margins > 0).double(), "margin": margins, "gain_chosen": chosen, "gain_rejected": rejected}
    for name, values in measured.items():
        sums = torch.zeros(groups, dtype=torch.float64).index_add(0, group, values - values.mean())
        error = sums.square().sum().sqrt() / len(values) * math.sqrt(groups / max(groups - 1, 1))
        result |= {name: values.mean().item(), f"{name}_stderr": error.item()}
    result["equal"] = int((margins == 0).sum())
    numbers = zip(items, policy.tolist(), ref.tolist(), margins.tolist(), strict=True)
    return result, [{"id": i.number, "logps": a, "ref_logps": b, "margin": m} for i, a, b, m in numbers]


def main() -> None:
    cfg = config.load(Config, prog="eval_reward.py")
    compute = distributed.setup(cfg.device, cfg.dtype)
    print(compute)
    tokenizer = build_tokenizer(cfg, cfg.model, compute)
    model = load_model(cfg.model, cfg.max_len, tokenizer, compute)
    max_len = cfg.max_len or model.config.block_size
    how = {"data_dir": cfg.data_dir, "columns": cfg.columns, "limit": cfg.limit}
    items = share(lambda: load_encoded(cfg.data, cfg.split, "preference", tokenizer, max_len, cfg.truncation, **how), compute)
    ref = compute.once(lambda: stored_reference(cfg.ref, items)) if cfg.ref else None
    logps = log_probs(cfg.model, model, items, cfg, compute)
    size = sum(p.numel() for p in model.parameters())
    if ref is None:
        del model  # the two models need not fit into memory together
        ref = log_probs(cfg.ref_model, load_model(cfg.ref_model, max_len, tokenizer, compute), items, cfg, compute)

    result, details = grade(logps, ref, items, cfg.beta)
    if result["equal"] == len(items):
        warn("policy and reference agree on every pair: they are the same model")
    settings = ("label", "model", "ref", "ref_model", "data", "split", "beta")
    result |= {"mode": "reward", **{name: getattr(cfg, name) for name in settings}, "parameters": cfg.parameters or size}
    if cfg.details:
        compute.once(lambda: write_whole(cfg.details, "".join(json.dumps(d) + "\n" for d in details)))
    compute.once(lambda: write_whole(cfg.out, json.dumps(result, indent=1) + "\n"))
    print(
        f"chosen over rejected in {100 * result['accuracy']:.1f}% (standard error {100 * result['accuracy_stderr']:.1f}) of "
        f"{result['n']:,} pairs; margin {result['margin']:.4f} (beta {cfg.beta}); log-prob gain over the reference "
        f"{result['gain_chosen']:+.3f} chosen, {result['gain_rejected']:+.3f} rejected, in nats"
    )
    print(json.dumps(result))


if __name__ == "__main__":
    run(main)
