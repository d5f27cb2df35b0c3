"""What did tuning gain, and how far did it go for it? Without a judge.

    python eval_reward.py --model runs/hh_dpo/model --ref_model runs/hh_sft/model --data hh --out runs/hh_reward.json
    python eval_reward.py --model runs/hh_dpo/model --ref runs/hh_ref.safetensors --data hh --out runs/hh_reward.json
    python eval_reward.py --model runs/dpo/model --ref_model runs/sft/model --prompts prompts.jsonl --reward sentiment \\
        --n 4 --optimum 64 --out reward.json

With `data` (preference pairs) it measures the implicit reward of the DPO paper (Rafailov et al. 2023, section 4),
beta * (log pi(completion | prompt) - log ref(completion | prompt)). Accuracy is the share of pairs whose chosen completion has
the larger one.

With `prompts` the model writes n completions of each prompt, and a rule gives each its reward: data/rewards.py. The KL
divergence from the reference is the mean of log pi - log ref over these completions. `optimum` adds the limit that no method
can pass, from so many completions of the reference: at every KL the best policy is pi_ref(y | x) exp(r(x, y) / b), normalised
(equation 4 of the paper).

docs/judging.md says what the figures mean. Runs under torchrun too.
"""

from base.script import run

import json
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from base.errors import UserError, warn
from base.files import check_there, write_whole
from base.progress import count
from data import check_data, jsonl, messages, rewards
from data.encode import Encoded, data_hash, load_encoded, pair_places
from data.tokenizer import choose
from runtime import config, distributed, reference
from runtime.build import build_model, build_tokenizer, share
from runtime.config import REQUIRED, key
from runtime.keys import ChatKeys, DeviceKeys, FileKeys, ModelKeys
from runtime.score import score, texts_of, written
from sample import encode
from weights import check_model


@dataclass
class Config(ChatKeys, FileKeys, DeviceKeys):
    """The implicit reward of preference pairs, or reward and KL of what the model writes."""

    model: str = key(
        REQUIRED, "the trained model: a folder of a model, adapter or run; or gpt2 (-medium, …)", model=True, reads=check_model
    )
    ref: str = key("", "reference file of precompute_ref.py that holds these pairs; or give ref_model", reads=reference.check)
    ref_model: str = key("", "the reference model; or give ref", model=True, reads=check_model)
    data: str = key(
        "", "pairs: a recipe (hh, hellaswag, …), a file, or hub:owner/name[:config]; or give prompts", reads=check_data
    )
    split: str = key("val", "the split of a recipe (train, val, test) or of the hub's data set")
    val_share: float = key(0.0, "of a file only the share that training with this key kept back", least=0, below=1)
    limit: int = key(0, "use only the first so many problems, 0 = all", least=0)
    tokenizer: str = key("auto", "gpt2, toy, a folder, or auto = the model's own")
    max_len: int = key(0, "most tokens of prompt + completion, 0 = the model's context", least=0)
    truncation: str = key("drop", "what to do with longer ones: drop them, or cut the prompt's start", ["drop", "left"])
    beta: float = key(0.1, "strength of the pull to the reference, as in training", above=0)
    prompts: str = key("", 'a .jsonl / .jsonl.gz file with a "prompt" per line', reads=check_there)
    reward: str = key(
        "", "prompts: reviews, sentiment, or FILE.py:NAME, your function of prompt and completion", reads=rewards.check
    )
    n: int = key(4, "prompts: completions per prompt", least=1)
    max_new_tokens: int = key(128, "prompts: most tokens of a completion", least=1)
    batch_size: int = key(64, "prompts: completions written at once", least=1)
    optimum: int = key(0, "prompts: add the limit, from so many completions of the reference per prompt; 0 = do not", least=0)
    out: str = key(REQUIRED, "JSON file for the result", writes="")
    details: str = key("", "JSONL file for a line a pair, or a line a prompt", writes="")
    label: str = key("", "name of the run in tables and pictures (SFT, DPO, …)")
    parameters: int = key(0, "the model's number of parameters to note, 0 = counted", least=0)
    micro_tokens: int = key(8192, "most tokens in one forward, padding included", least=1)

    def check(self) -> None:
        if bool(self.data) == bool(self.prompts):
            raise UserError("key data: give either --data, preference pairs, or --prompts")
        if bool(self.prompts) != bool(self.reward):
            raise UserError("key reward: --prompts and --reward belong together: the rule that grades what the model writes")
        if self.prompts and not self.ref_model:
            raise UserError("key ref_model: with --prompts it is needed: what the model will write has no stored log-probs")
        if bool(self.ref) == bool(self.ref_model):
            raise UserError("key ref: the reward needs a reference: give either --ref FILE.safetensors or --ref_model DIR")


def load_model(name: str, max_len: int, tokenizer, compute):
    """A model or adapter. UserError if its context is shorter than `max_len` tokens."""
    model = build_model(ModelKeys(init_from=name), tokenizer, compute)
    if max_len > model.config.block_size:
        raise UserError(f"key max_len: {max_len} tokens are more than the context of {name}, {model.config.block_size} tokens")
    return model


def log_probs(name: str, model, items: list[Encoded], cfg: Config, compute) -> Tensor:
    """log p(completion | prompt) of all completions, one behind the other, float32, in nats. UserError if one is not finite."""
    found = torch.cat(score(model, items, compute, cfg.micro_tokens, "log-probs"))
    if not found.isfinite().all():
        raise UserError(f"{name}: its log-probs are not finite: its weights are damaged")
    return found


def stored_reference(path: str, items: list[Encoded]) -> Tensor:
    """Log-probs of these very completions from a reference file, where they may be the training or validation data."""
    tensors, metadata = reference.read(path)
    here = data_hash(items)
    for name in ("", "val_"):
        if metadata.get(f"{name}data_sha256") == here:
            found = tensors.get(f"{name}logps")
            if found is None or found.numel() != sum(item.n_completions for item in items):
                raise UserError(f"key ref: {path} is damaged: it has not one number for each completion: make it anew")
            return found.flatten()
    made = ", ".join(f"{name} {metadata.get(name)}" for name in ("data", "tokenizer", "max_len", "truncation"))
    raise UserError(
        f"key ref: {path} does not hold these pairs (it was made from {made}): evaluate with the same, and the same "
        "limit and val_share; or give --ref_model"
    )


def means(measured: dict[str, Tensor], groups: list) -> dict:
    """The mean of each measure and its standard error, from values (groups, …). Values of equal groups (the pairs of a problem,
    the completions of a prompt) count as one draw: they are not independent. With a group a value the error is the usual one,
    for a share p sqrt(p (1 - p) / (n - 1))."""
    number = {name: i for i, name in enumerate(dict.fromkeys(groups))}
    group, n, found = torch.tensor([number[name] for name in groups]), len(number), {}
    for name, values in measured.items():
        values = values.double().reshape(len(groups), -1)
        middle = values.mean().item()
        sums = torch.zeros(n, dtype=torch.float64).index_add(0, group, (values - middle).sum(1))
        error = sums.square().sum().sqrt() / values.numel() * math.sqrt(n / max(n - 1, 1))
        found |= {name: middle, f"{name}_stderr": error.item()}
    return found


# --- preference pairs ------------------------------------------------------------------------------------------------


def grade(policy: Tensor, ref: Tensor, items: list[Encoded], beta: float) -> tuple[dict, list[dict]]:
    """(result, a detail a pair) from the log-probs of chosen and rejected under policy and reference, (pairs, 2), in nats.
    items: each pair's example."""
    chosen, rejected = (policy.double() - ref.double()).unbind(1)  # gains: log pi - log ref, (pairs,) each
    margins = beta * (chosen - rejected)
    measured = {"accuracy": (margins > 0).double(), "margin": margins, "gain_chosen": chosen, "gain_rejected": rejected}
    result = {"n": len(items), **means(measured, [item.group for item in items]), "equal": int((margins == 0).sum())}
    numbers = zip(items, policy.tolist(), ref.tolist(), margins.tolist(), strict=True)
    return result, [{"id": i.number, "logps": a, "ref_logps": b, "margin": m} for i, a, b, m in numbers]


# --- prompts ---------------------------------------------------------------------------------------------------------


def weighted(rewards: Tensor, weights: Tensor) -> dict[str, Tensor]:
    """Reward and KL of the policy that gives the reference's own completions these weights, (prompts, n), each row's sum 1; and
    `ess`, how many of the n the weights amount to (Kish's effective sample size). All (prompts,)."""
    kl = (weights * (weights * rewards.size(1)).clamp_min(1e-300).log()).sum(1)
    return {"kl": kl, "reward": (weights * rewards).sum(1), "ess": 1 / weights.square().sum(1)}


def limit(rewards: Tensor) -> list[dict]:
    """The best policy's mean reward and KL at several strengths b, from the rewards of the reference's own completions,
    (prompts, n). They get weights exp(r / b), normalised for each prompt. A point of a small `ess` rests on few of them."""
    strengths = [rewards.std().item() * 2 ** (k / 2) for k in range(8, -13, -1)]
    found = [(b, weighted(rewards, (rewards / b).softmax(1))) for b in strengths]
    return [{"b": b, **{name: value.mean().item() for name, value in point.items()}} for b, point in found]


def best_of(rewards: Tensor, k: int) -> dict[str, Tensor]:
    """Reward and KL of the best of k completions that are drawn from the reference's n, with rewards (prompts, n).

    The KL is at most log k - (k - 1) / k (Beirami et al. 2024, arXiv 2401.01879)."""
    ordered, n = rewards.sort(1).values, rewards.size(1)
    at_most, below = (torch.searchsorted(ordered, rewards, right=right).double() for right in (True, False))
    # the chance that the largest of k rewards is this one, shared by the completions that have it
    return weighted(rewards, ((at_most / n) ** k - (below / n) ** k) / (at_most - below))


def on_prompts(cfg: Config, model, tokenizer, compute) -> tuple[dict, list[dict]]:
    """(result, a detail a prompt): reward, KL from the reference and length of what the model writes."""
    reward = rewards.get(cfg.reward)
    ref_model = load_model(cfg.ref_model, 0, tokenizer, compute)
    if choose("auto", cfg.ref_model).fingerprint() != tokenizer.fingerprint():
        raise UserError(f"key ref_model: {cfg.ref_model} has another tokenizer than {cfg.model}: their KL has no meaning")
    records = compute.once(lambda: list(jsonl.read(cfg.prompts, cfg.limit)))
    found = {where: messages.prompt_of(record, where) for where, record in records}
    prompts = [messages.as_text(prompt) for prompt in found.values()]
    tokens = [ids or [tokenizer.eot] for ids in encode(list(found.values()), tokenizer, list(found))]
    room = model.config.block_size + 1 - cfg.max_new_tokens
    for (where, _), ids in zip(records, tokens, strict=True):
        if len(ids) > room:
            raise UserError(f"{where}: a prompt of {len(ids)} tokens leaves no room for max_new_tokens {cfg.max_new_tokens}")

    def graded(items: list[Encoded]) -> Tensor:  # (prompts, n)
        of_each = zip(prompts, (texts_of(item, tokenizer, end) for item in items), strict=True)
        return torch.tensor([[reward(prompt, text) for text in texts] for prompt, texts in of_each]).double()

    end = tokenizer.eot if isinstance(next(iter(found.values())), str) else tokenizer.turn_end()
    how = {"max_new_tokens": cfg.max_new_tokens, "end": end, "batch_size": cfg.batch_size, "seed": cfg.seed}
    items = written(model, tokens, tokenizer, compute, n=cfg.n, **how)
    logps = log_probs(cfg.model, model, items, cfg, compute)
    kl = (logps.double() - log_probs(cfg.ref_model, ref_model, items, cfg, compute).double()).view(-1, cfg.n)
    measured = {
        "reward": graded(items),
        "kl": kl,
        "tokens": torch.tensor([[len(ids) for ids in item.completions] for item in items]),
        "ended": torch.tensor([[bool(ids[-1] == end) for ids in item.completions] for item in items]),
    }
    result = {"n": len(items), **means(measured, prompts)}
    if cfg.optimum:
        drawn = graded(written(ref_model, tokens, tokenizer, compute, n=cfg.optimum, **how))
        result["limit"] = limit(drawn)
        result["best_of"] = [{"k": k, **means(best_of(drawn, k), prompts)} for k in (2, 4, 8, 16) if 4 * k <= cfg.optimum]
    numbers = zip(prompts, items, measured["reward"].tolist(), kl.tolist(), strict=True)
    return result, [
        {"prompt": p, "completions": [tokenizer.decode(c.tolist()) for c in item.completions], "rewards": r, "kl": k}
        for p, item, r, k in numbers
    ]


def on_pairs(cfg: Config, model, tokenizer, compute) -> tuple[dict, list[dict]]:
    """(result, a detail a pair): the implicit reward of preference pairs."""
    max_len = cfg.max_len or model.config.block_size
    half = ("val", cfg.val_share) if cfg.val_share else None
    how = {"data_dir": cfg.data_dir, "columns": cfg.columns, "limit": cfg.limit, "min_gap": cfg.min_gap, "half": half}
    items = share(lambda: load_encoded(cfg.data, cfg.split, "preference", tokenizer, max_len, cfg.truncation, **how), compute)
    ref = compute.once(lambda: stored_reference(cfg.ref, items)) if cfg.ref else None
    logps = log_probs(cfg.model, model, items, cfg, compute)
    if ref is None:
        ref = log_probs(cfg.ref_model, load_model(cfg.ref_model, max_len, tokenizer, compute), items, cfg, compute)
    at = pair_places(items)
    result, details = grade(logps[at], ref[at], [item for item in items for _ in item.pairs], cfg.beta)
    if result["equal"] == len(at):
        warn("policy and reference agree on every pair: they are the same model")
    return result, details


def main() -> None:
    cfg = config.load(Config, prog="eval_reward.py")
    compute = distributed.setup(cfg.device, cfg.dtype)
    print(compute)
    tokenizer = build_tokenizer(cfg, cfg.model, compute)
    model = load_model(cfg.model, cfg.max_len, tokenizer, compute)
    size = sum(p.numel() for p in model.parameters())
    result, details = (on_prompts if cfg.prompts else on_pairs)(cfg, model, tokenizer, compute)
    said = [f"{name} {result[name]:.4f} ± {result[f'{name}_stderr']:.4f}" for name in result if f"{name}_stderr" in result]
    print(f"{count(result['n'], 'prompts' if cfg.prompts else 'pairs')}: {', '.join(said)} (± one standard error)")
    settings = ("label", "model", "ref", "ref_model", "data", "split", "beta", "prompts")
    result |= {
        "mode": "reward",
        "reward_rule": cfg.reward,
        **{name: getattr(cfg, name) for name in settings},
        "parameters": cfg.parameters or size,
    }
    if cfg.details:
        compute.once(lambda: write_whole(cfg.details, "".join(json.dumps(d) + "\n" for d in details)))
    compute.once(lambda: write_whole(cfg.out, json.dumps(result, indent=1) + "\n"))
    print(json.dumps(result))


if __name__ == "__main__":
    run(main)
