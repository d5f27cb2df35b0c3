"""How far DPO has gone from its start: KL, estimated from a few completions that the model writes at each validation.

The log-probs of the pairs do not show it: a model may write what no pair holds. See docs/preference-tuning.md.
"""

import collections
from dataclasses import dataclass, fields

import torch

from base.errors import UserError
from data import rewards
from data.encode import Encoded
from lora import as_started
from runtime.build import build_model
from runtime.keys import DeviceKeys, ModelKeys
from runtime.score import score, texts_of, written

NEW_TOKENS = 64  # most tokens of a completion


@dataclass
class Start(ModelKeys, DeviceKeys):
    """The settings that decide a run's first weights. Without those of training, `build_model` shards and freezes nothing."""


class Drift:
    """The start of a run, and the prompts of validation on which it is compared with the model of later steps."""

    def __init__(self, cfg, items: list[Encoded], model, tokenizer, compute):
        """With LoRA the start is in the model (`lora.as_started`), else it is a second copy of the weights, whole on each
        process. UserError where no validation prompt has room for a completion, or the reward cannot be had."""
        if not items:
            raise UserError("key kl_prompts: there are no validation prompts: give --val_data, or --val_share")
        room = model.config.block_size + 1 - NEW_TOKENS
        prompts = dict.fromkeys(tuple(item.prompt.tolist()) for item in items if len(item.prompt) <= room)
        self.prompts = [list(ids) for ids in prompts][: cfg.kl_prompts]
        if not self.prompts:
            raise UserError(f"key kl_prompts: no validation prompt leaves room for {NEW_TOKENS} tokens: name other val_data")
        self.cfg, self.tokenizer, self.compute, self.start = cfg, tokenizer, compute, None
        self.reward = rewards.get(cfg.reward) if cfg.reward else None
        # what ends most answers of the data: the end of a text or of a turn
        ((self.end, _),) = collections.Counter(int(c[-1]) for item in items for c in item.completions).most_common(1)
        self.end = self.end if self.end in tokenizer.special | tokenizer.stops else tokenizer.eot
        if not cfg.lora_rank:
            self.start = build_model(Start(**{f.name: getattr(cfg, f.name) for f in fields(Start)}), tokenizer, compute)

    def measure(self, model) -> dict[str, float]:
        """`kl`: the mean of log pi - log pi_start over 4 completions a prompt, in nats a completion. With a reward: `reward`,
        its mean over the same completions. Every process draws all of them, because a sharded model needs all processes."""
        how = {"n": 4, "max_new_tokens": NEW_TOKENS, "end": self.end, "seed": self.cfg.seed, "shared": False}
        items = written(model, self.prompts, self.tokenizer, self.compute, **how)

        def log_probs(of) -> torch.Tensor:
            return torch.stack(score(of, items, self.compute, self.cfg.micro_tokens)).double()

        now = log_probs(model)
        if self.start is None:
            with as_started(model):
                gains = now - log_probs(model)
        else:
            gains = now - log_probs(self.start)
        found = {"kl": gains.mean().item()}
        if self.reward:
            # on rank 0 alone: a function of the user's need not return the same everywhere
            found["reward"] = self.compute.once(lambda: sum(map(self.graded, items)) / now.numel())
        return found

    def graded(self, item: Encoded) -> float:
        """The sum of the rewards of an item's completions."""
        prompt = self.tokenizer.decode(item.prompt.tolist())
        return sum(self.reward(prompt, text) for text in texts_of(item, self.tokenizer, self.end))
