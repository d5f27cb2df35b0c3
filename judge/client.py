"""A judge behind HTTP: questions in, verdicts out, and no answer is paid for twice.

The judge is any server that speaks OpenAI's chat completions (POST …/chat/completions).
"""

import contextlib
import hashlib
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from base.openai import NoAnswer, Server
from base.progress import Progress
from judge.cache import Cache, Reply
from runtime.config import REQUIRED, key
from runtime.keys import ServerKeys

REMINDER = "That reply holds no clear verdict. Reply again with nothing but the verdict, in the form asked for above."


@dataclass
class JudgeKeys(ServerKeys):
    """The judge and its price"""

    judge: str = key(REQUIRED, "address of a server with OpenAI's protocol; openai, gemini = theirs; local = on this machine")
    judge_model: str = key(REQUIRED, "name of the judge at that server; local: a model's folder or name on the hub")
    temperature: float = key(0.0, "of the judge; negative = leave it to the server")
    max_tokens: int = key(1024, "most tokens of a judge's reply; 0 = leave it to the server", least=0)
    asks: int = key(3, "times that a question is asked until the reply has a clear verdict", least=1)
    price_in: float = key(0.0, "price of a million tokens sent, for the estimate", least=0)
    price_out: float = key(0.0, "price of a million tokens received", least=0)
    dry_run: bool = key(False, "print what the evaluation would take and stop")


class Question(NamedTuple):
    """What a judge is asked. Two questions of the same text are asked apart if their tags (the trial) differ."""

    text: str
    tag: str = ""


@dataclass(frozen=True)
class Decision:
    """What came of a question. `verdict` is None if there is none; `failed` then says why. `share`: the probability of A, where
    the judge gives one (judge/local.py)."""

    verdict: Any
    replies: list[Reply] = field(default_factory=list)
    failed: str = ""
    share: float | None = None


class Judge(Server):
    """A model behind an address, asked by several threads at once.

    Raises UserError for an address or an API key that cannot be used.
    """

    hint = "; --max_tokens 0 and --temperature -1 leave these two out of the request"

    def __init__(self, cfg: JudgeKeys, cache: Cache):
        super().__init__(cfg, "judge", f"start the same command again, what was answered is kept in {cache.path}")
        self.cache = cache

    # --- many questions -------------------------------------------------------------------------------------------------

    def decide(self, questions: Iterable[Question], parse: Callable[[str], Any]) -> list[Decision]:
        """A decision a question, in their order. Equal questions, and those that the cache knows, are not asked again.

        parse: text of a reply -> verdict, or None if it holds none; the judge is then asked again, `asks` times in all.
        Before the first call it prints what all of them will take; a dry run returns [] there. Raises UserError if going
        on makes no sense (a refused key, no server, more calls than `max_calls`). The cache then keeps what was answered.
        """
        questions = list(questions)
        found = {q: self._decide(q, parse, ask=False) for q in dict.fromkeys(questions)}
        todo = [q for q, decision in found.items() if decision is None]
        print(self.estimate(todo, len(found)), flush=True)
        if self.cfg.dry_run:
            return []
        progress = Progress("judging", len(todo), "questions")
        with contextlib.closing(self.each(lambda question: self._decide(question, parse, ask=True), todo)) as answers:
            for question, decision in answers:
                found[question] = decision
                progress.add(1)
        progress.close()
        return [found[q] for q in questions]

    def estimate(self, todo: list[Question], total: int) -> str:
        """Calls, tokens (four characters each) and money that `todo` takes if nothing has to be asked a second time."""
        tokens_in, tokens_out = sum(len(q.text) for q in todo) // 4, len(todo) * self.cfg.max_tokens
        cost, known = self.cost(tokens_in, tokens_out), self.cfg.max_tokens > 0
        return (
            f"{len(todo):,} calls to {self.url} ({total - len(todo):,} of {total:,} answers are in {self.cache.path}): about "
            f"{tokens_in:,} tokens in, {f'at most {tokens_out:,}' if known else 'an unknown number'} out"
            + ("" if cost is None else f", {'about' if known else 'at least'} {cost:.4f} at the prices given")
        )

    def cost(self, tokens_in: int, tokens_out: int) -> float | None:
        """Cost in the currency of price_in and price_out; None if neither is given."""
        cfg = self.cfg
        return (tokens_in * cfg.price_in + tokens_out * cfg.price_out) / 1e6 if cfg.price_in or cfg.price_out else None

    def usage(self, decisions: Iterable[Decision]) -> dict:
        """Calls, tokens and cost of all replies behind the decisions, from this run or an earlier one, as the server counts."""
        replies = list({id(r): r for d in decisions for r in d.replies}.values())
        tokens_in, tokens_out = sum(r.tokens_in for r in replies), sum(r.tokens_out for r in replies)
        used = {"calls": len(replies), "tokens_in": tokens_in, "tokens_out": tokens_out}
        cost = self.cost(tokens_in, tokens_out)
        return used if cost is None else {**used, "cost": cost}

    # --- one question ---------------------------------------------------------------------------------------------------

    def _decide(self, question: Question, parse: Callable, ask: bool) -> Decision | None:
        """Ask until `parse` finds a verdict, `asks` times at most. Without `ask` only the cache answers; None if it cannot."""
        first, replies = {"role": "user", "content": question.text}, []
        messages = [first]
        for attempt in range(self.cfg.asks):
            try:
                reply = self._reply(messages, f"{question.tag} {attempt}", ask)
            except NoAnswer as error:
                return Decision(None, replies, str(error))
            if reply is None:
                return None
            replies.append(reply)
            verdict = parse(reply.text)
            if verdict is not None:
                return Decision(verdict, replies)
            if reply.text.strip():
                messages = [first, {"role": "assistant", "content": reply.text}, {"role": "user", "content": REMINDER}]
        end = f" ({replies[-1].end})" if replies[-1].end else ""
        return Decision(None, replies, f"no verdict in {len(replies)} replies{end}")

    def _reply(self, messages: list[dict], tag: str, ask: bool) -> Reply | None:
        """The reply to a conversation: from the cache, or else, with `ask`, from the judge."""
        body = {"model": self.cfg.judge_model, "messages": messages}
        if self.cfg.max_tokens:
            body["max_tokens"] = self.cfg.max_tokens
        if self.cfg.temperature >= 0:
            body["temperature"] = self.cfg.temperature
        asked = json.dumps([f"{self.url}/chat/completions", self.cfg.judge_model, body, tag], sort_keys=True)
        known_as = hashlib.sha256(asked.encode()).hexdigest()
        if ask and known_as not in self.cache.found:
            self.cache.put(known_as, self.ask("chat/completions", body, self._read))
        return self.cache.found.get(known_as)

    def _read(self, said: Any) -> Reply:
        """A chat completion as a Reply, without the API key. Raises ValueError, KeyError … for JSON of another form."""
        best = said["choices"][0]
        end = best.get("finish_reason") or "stop"
        end = "" if end.lower() == "stop" else self.clean(f"ended by {end}")
        return Reply(self.text_of(best), *self.tokens_of(said), end)
