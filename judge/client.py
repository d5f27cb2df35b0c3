"""A judge behind HTTP: questions in, verdicts out, and no answer is paid for twice.

The judge is any server that speaks OpenAI's chat completions (POST …/chat/completions). The API key comes from the
environment. It goes into a request header and nowhere else.
"""

import hashlib
import json
import os
import random
import re
import sys
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from typing import Any, NamedTuple
from urllib.parse import SplitResult, urlsplit

import requests

from base.errors import UserError
from base.http import explain, is_local, reached, retry_after, send, within
from base.progress import Progress
from judge.cache import Cache, Reply, is_count
from runtime.config import REQUIRED, key

DELAY = 1.0  # seconds before the second try, about; doubled for each further one
LONGEST = 60.0  # seconds between two tries, beside those that the server asks for
PATIENCE = 600.0  # longest wait, in seconds, that a server may ask for; above it the evaluation ends
GIVE_UP = 3  # questions in a row without any answer that end the evaluation
CONNECT = 15  # seconds
MOST = 10_000_000  # bytes of an answer
SHORT = {"openai": "https://api.openai.com/v1", "gemini": "https://generativelanguage.googleapis.com/v1beta/openai"}
KEYS = {"api.openai.com": "OPENAI_API_KEY", "generativelanguage.googleapis.com": "GEMINI_API_KEY"}  # hosts that need a key
LATER = (408, 409, 425, 429)  # statuses, beside 500 and above, after which another try may succeed
REMINDER = "That reply holds no clear verdict. Reply again with nothing but the verdict, in the form asked for above."
SECRETS = r"\b(?:sk-|AIza|Bearer\s+)[\w*.…-]{5,}[\w*…-]"  # what a key looks like when a server quotes a part of it


@dataclass
class JudgeKeys:
    """The judge and its price"""

    judge: str = key(REQUIRED, "address of a server with OpenAI's protocol; openai, gemini = the companies' own; local = none")
    judge_model: str = key(REQUIRED, "name of the judge at that server; local: a model's folder or name on the hub")
    api_key_env: str = key("", "environment variable with the API key; empty = OPENAI_API_KEY (for gemini GEMINI_API_KEY)")
    temperature: float = key(0.0, "of the judge; negative = leave it to the server")
    max_tokens: int = key(1024, "most tokens of a judge's reply; 0 = leave it to the server", least=0)
    asks: int = key(3, "times that a question is asked until the reply has a clear verdict", least=1)
    tries: int = key(6, "times that a request is sent until it is answered", least=1)
    timeout: float = key(60.0, "seconds to wait for a whole answer", above=0)
    workers: int = key(8, "requests at a time", least=1)
    max_calls: int = key(0, "most answers to pay for, 0 = no limit", least=0)
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


class NoAnswer(Exception):
    """A request got no answer, but another one may. wait: seconds that the server asks us to wait. paid: it may cost."""

    def __init__(self, problem: str, wait: float = 0.0, paid: bool = False):
        super().__init__(problem)
        self.wait, self.paid = wait, paid


class Judge:
    """A model behind an address, asked by several threads at once.

    Raises UserError for an address or an API key that cannot be used.
    """

    def __init__(self, cfg: JudgeKeys, cache: Cache):
        self.cfg, self.cache = cfg, cache
        self.url = address(cfg.judge)
        server = urlsplit(self.url)
        self.key_name = cfg.api_key_env or KEYS.get(server.hostname, "OPENAI_API_KEY")
        self.key = api_key(self.key_name, server, named=bool(cfg.api_key_env))
        self.secret = len(self.key) > 5  # local servers are given a word like EMPTY, which may be quoted
        self.again = f"start the same command again, what was answered is kept in {cache.path}"
        self.lock = threading.Lock()  # for the counts below
        self.answered = False  # whether the server has said anything at all
        self.calls = 0  # answers paid for, and requests under way
        self.lost = 0  # questions in a row without an answer
        self.stop = threading.Event()

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
        with ThreadPoolExecutor(self.cfg.workers, "judge") as pool:
            try:
                for some in (todo[:1], todo[1:]):  # the first goes alone: a wrong key shows at the price of one call
                    asked = {pool.submit(self._decide, q, parse, ask=True): q for q in some}
                    for future in as_completed(asked):
                        found[asked[future]] = future.result()
                        progress.add(1)
            except BaseException as error:
                self.stop.set()
                if isinstance(error, KeyboardInterrupt):
                    print("\nstopping: waiting for the answers that are under way", file=sys.stderr)
                raise
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
        asked = json.dumps([self.url, self.cfg.judge_model, body, tag], sort_keys=True)
        known_as = hashlib.sha256(asked.encode()).hexdigest()
        if ask and known_as not in self.cache.found:
            self.cache.put(known_as, self._call(body))
        return self.cache.found.get(known_as)

    # --- one call -------------------------------------------------------------------------------------------------------

    def _call(self, body: dict) -> Reply:
        """Send a request until it is answered, `tries` times at most, with growing, scattered waits between.

        Raises NoAnswer if all tries are used up or another thread ended the evaluation, UserError if no try can help.
        """
        wait, problem = 0.0, None
        for tried in range(self.cfg.tries):
            if self.stop.wait(wait):
                raise NoAnswer("the evaluation was stopped")
            self._count_call()
            try:
                reply = self._send(body)
                self.lost = 0
                return reply
            except NoAnswer as error:
                problem = error
            with self.lock:
                self.calls -= not problem.paid
            if problem.wait > PATIENCE:
                raise UserError(f"{self.url}: {problem}; it asks to wait {problem.wait:.0f} s: {self.again} then")
            if problem.wait > 10:
                print(f"the judge asks to wait {problem.wait:.0f} s ({problem})", file=sys.stderr)
            wait = problem.wait + min(DELAY * 2**tried * random.uniform(0.5, 1.5), LONGEST)
        with self.lock:
            self.lost += 1
        failed = f"no answer in {self.cfg.tries} tries, the last: {problem}"
        if self.lost >= GIVE_UP:
            raise UserError(f"{self.url}: {failed}: {self.again}")
        raise NoAnswer(failed)

    def _count_call(self) -> None:
        """Count a call before it is sent. Raises UserError if `max_calls` forbids it."""
        with self.lock:
            if self.cfg.max_calls and self.calls >= self.cfg.max_calls:
                raise UserError(f"key max_calls: {self.calls:,} calls were made, and there are more to make: {self.again}")
            self.calls += 1

    def _send(self, body: dict) -> Reply:
        """Send a request once. Raises NoAnswer if another try may succeed, UserError if none can."""
        seconds = self.cfg.timeout
        limits = (min(CONNECT, seconds), seconds)

        def exchange() -> tuple[requests.Response, bytes]:
            with send("POST", self.url, self.key, json=body, timeout=limits, allow_redirects=False) as response:
                content = b""
                for part in response.iter_content(65_536):
                    content += part
                    if len(content) > MOST:
                        raise NoAnswer(f"an answer of more than {MOST:,} bytes", paid=True)
                return response, content

        try:
            response, content = within(seconds + 0.5, exchange)  # a little later: requests knows more of what failed
        except requests.RequestException as error:
            problem = explain(error)
            if not reached(error) and not self.answered:
                raise UserError(f"{self.url}: {problem}: check --judge and the network") from None
            raise NoAnswer(problem, paid=reached(error)) from None
        self.answered = True
        status, said = response.status_code, self._quote(content)
        if status == 200:
            try:
                return self._read(content)
            except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
                raise NoAnswer(f"no answer of the expected form: {said!r}", paid=True) from None
        if (status in LATER or status >= 500) and b"insufficient_quota" not in content:
            raise NoAnswer(f"status {status}: {said}", wait=retry_after(response))
        raise UserError(
            f"{self.url}: the judge refuses (status {status}: {said}): check --judge, --judge_model and the API key in "
            f"{self.key_name}; --max_tokens 0 and --temperature -1 leave these two out of the request"
        )

    def _read(self, content: bytes) -> Reply:
        """The body of a chat completion as a Reply, without the API key. Raises ValueError, KeyError … for another body.

        A count of tokens that is none counts as 0: the answer is there and paid for.
        """
        said = json.loads(content)
        used, best = said.get("usage"), said["choices"][0]
        text = best["message"].get("content") or best["message"].get("refusal") or ""
        if isinstance(text, list):  # some servers send parts
            text = "".join(part.get("text", "") for part in text)
        end = best.get("finish_reason") or "stop"
        end = "" if end.lower() == "stop" else self._clean(f"ended by {end}")
        counts = [used.get(name) if isinstance(used, dict) else 0 for name in ("prompt_tokens", "completion_tokens")]
        return Reply(self._clean(text), *(n if is_count(n) else 0 for n in counts), end)

    def _quote(self, content: bytes) -> str:
        """The start of what the server sent, without the API key or parts of it, and without what would steer a terminal."""
        part = re.escape(self.key[:6]) + r"[\w*.…-]*" if self.secret else "(?!)"
        text = "".join(c if c.isprintable() else " " for c in content[:9999].decode(errors="replace"))
        return " ".join(re.sub(f"{part}|{SECRETS}", "***", self._clean(text)).split())[:300]

    def _clean(self, text: str) -> str:
        """`text` without the API key, should the server quote it."""
        return text.replace(self.key, "***") if self.secret else text


def address(judge: str) -> str:
    """Where to send a question. judge: "openai", "gemini", or an address with or without /v1 and /chat/completions.

    Raises UserError for anything else, such as an address with a key or password in it: addresses are written to files.
    """
    url = SHORT.get(judge, judge).rstrip("/")
    form = re.fullmatch(r"https?://(?:[\w.-]+|\[::1\])(?::\d+)?(/[\w./~%:-]*)?", url)
    if not form:
        raise UserError(
            "key judge: not openai, gemini or an address like https://HOST/v1 (a key or password stands in no address, but "
            "in an environment variable, see api_key_env)"
        )
    path = (form[1] or "/v1").removesuffix("/chat/completions")
    return f"{url.removesuffix(form[1] or '')}{path}/chat/completions"


def api_key(name: str, server: SplitResult, named: bool) -> str:
    """The API key in environment variable `name`; "" if it is not set and the server may do without.

    A key that the user did not name (`named`) is sent over plain http to this machine only.
    """
    value = os.environ.get(name, "").strip()
    if named and not value:  # the name is not quoted: it may be the key itself
        raise UserError("key api_key_env: no environment variable of that name is set: name the one that holds the API key")
    if not value and server.hostname in KEYS:
        raise UserError(f"environment variable {name}: not set: put the API key of {server.hostname} there")
    if not (value.isascii() and value.isprintable()) or " " in value:
        raise UserError(f"environment variable {name}: holds a character that no API key has: set it anew")
    if value and not named and server.scheme == "http" and not is_local(server.geturl()):
        print(f"{name} is not sent to {server.hostname}: http is not encrypted; insist with --api_key_env {name}")
        return ""
    return value
