"""A judge without a server: how likely does a model find each verdict, after the judge's prompt?

The verdicts share the prompt, so one row of the model answers a question. No reply can lack its form, nothing leaves this
machine, and the same question has the same answer every time. How good a judge the model is shows `--calibrate`.
"""

from collections.abc import Iterable

import numpy as np
import torch

from base.errors import UserError
from data.encode import Encoded
from judge.client import Decision, Question
from runtime.build import build_model, build_tokenizer
from runtime.keys import ModelKeys
from runtime.score import score

SIDES = ("A", "B")
SCORES = tuple(str(n) for n in range(101))


class LocalJudge:
    """A model of this project as a judge. Raises UserError for a model that cannot be loaded."""

    def __init__(self, cfg, compute):
        self.cfg, self.compute, self.url, self.calls = cfg, compute, cfg.judge_model, 0
        self.tokenizer = build_tokenizer(cfg, cfg.judge_model, compute)
        self.model = build_model(ModelKeys(init_from=cfg.judge_model), self.tokenizer, compute)
        chat = self.tokenizer.chat is not None
        ends = self.tokenizer.turn_stops() - self.tokenizer.stops if chat else ()
        self.end = next(iter(ends), self.tokenizer.eot)  # so that 8 is not the beginning of 85

    def decide(self, questions: Iterable[Question], _parse=None) -> list[Decision]:
        """A decision a question, in their order.

        In mode pairwise the likelier of A and B, with `share`, the probability of A among the two. In mode score the expected
        value over the numbers 0 to 100. Questions that are longer than the model's context have failed.
        """
        pairwise = self.cfg.mode == "pairwise"
        questions, names = list(questions), SIDES if pairwise else SCORES
        end = [] if pairwise else [self.end]
        verdicts = [np.array([*self.tokenizer.encode(f" {name}"), *end], np.int32) for name in names]
        longest, items, failed = max(map(len, verdicts)), [], {}
        for n, question in enumerate(questions):
            prompt = np.array(self.prompt(question.text, "Verdict:" if pairwise else "Score:"), np.int32)
            if len(prompt) + longest > self.model.config.block_size:
                failed[n] = Decision(None, failed=f"{len(prompt):,} tokens are more than the judge's context")
            else:
                items.append(Encoded(prompt, verdicts, n, n))
        found = iter(score(self.model, items, self.compute, self.cfg.micro_tokens, "judging"))
        self.calls += len(items)
        return [failed.get(n) or self.decision(next(found), pairwise) for n in range(len(questions))]

    def decision(self, logps: torch.Tensor, pairwise: bool) -> Decision:
        """A verdict from the log-probs of all verdicts, (verdicts,)."""
        if not logps.isfinite().all():
            raise UserError(f"key judge_model: {self.url}: its log-probs are not finite: its weights are damaged")
        p = logps.double().softmax(0)
        if pairwise:
            return Decision("tie" if p[0] == p[1] else SIDES[p.argmax()], share=p[0].item())
        return Decision((p @ torch.arange(101.0, dtype=torch.float64)).item())

    def usage(self, decisions: Iterable[Decision]) -> dict:
        return {"calls": self.calls}

    def prompt(self, question: str, asked: str) -> list[int]:
        """A question as the model's prompt: by its chat template, where it has one, up to the word that a verdict follows."""
        if self.tokenizer.chat is None:
            return [*self.tokenizer.start, *self.tokenizer.encode(f"{question}\n\n{asked}")]
        text, _ = self.tokenizer.chat.render(({"role": "user", "content": question},), "the judge's prompt", asks=True)
        return [*self.tokenizer.encode_rendered(text)[0], *self.tokenizer.encode(asked)]
