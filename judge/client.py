"""A judge behind HTTP: questions in, verdicts out, and nothing asked twice.

Two kinds of server: OpenAI's chat completions, which most others speak too (POST …/chat/completions), and Gemini's
(POST …/models/NAME:generateContent). The API key comes from the environment and goes into a header, nowhere else.
"""

import email.utils
import errno
import hashlib
import json
import os
import random
import re
import sys
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import parse_qsl, urlsplit

import requests
from urllib3.exceptions import NewConnectionError

from base.errors import UserError, warn
from base.files import lock
from runtime.log import Progress

DELAY = 1.0  # seconds before the second try, about; doubled for each further one
LONGEST = 60.0  # seconds between two tries, unless the server asks for more
PATIENCE = 600.0  # seconds that a server may ask us to wait; past it the user is told
GIVE_UP = 3  # questions in a row that got no answer at all
CONNECT = 15  # seconds
SHORT = {"openai": "https://api.openai.com/v1", "gemini": "https://generativelanguage.googleapis.com/v1beta"}
REMINDER = "That reply holds no clear verdict. Reply again with nothing but the verdict, in the form asked for above."
SECRETS = re.compile(r"\b(sk-|AIza|Bearer\s+)[\w*.…-]{5,}[\w*…-]")  # what a key looks like when a server quotes it in part


class Question(NamedTuple):
    """What a judge is asked. `tag` keeps apart questions of one text that are to be asked anew (the trial)."""

    text: str
    tag: str = ""


@dataclass(frozen=True)
class Reply:
    """A judge's answer. `end`: why it ended, where that was not of its own accord."""

    text: str
    tokens_in: int = 0
    tokens_out: int = 0
    end: str = ""


@dataclass(frozen=True)
class Decision:
    """What came of a question: `verdict` is None if `failed` says why there is none."""

    verdict: Any
    replies: list[Reply] = field(default_factory=list)
    failed: str = ""


class NoAnswer(Exception):
    """A question used up its tries."""


class Stopped(Exception):
    """Another thread has met something that ends the evaluation."""


class Cache:
    """Answers on disk, a JSON line each, by the hash of what was asked. Lines are appended whole, so a kill loses none.

    A line that a full disk or a power cut has torn is skipped (its question is asked again). One process at a time:
    UserError if another holds the file.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.file = open(self.path, "a+b", buffering=0)  # noqa: SIM115
        if not lock(self.file):
            raise UserError(f"{self.path}: another evaluation is using it: wait, or name another file with --cache")
        self.lock = threading.Lock()
        self.found: dict[str, Reply] = {}
        self.file.seek(0)
        content, damaged = self.file.read(), 0
        for line in content.splitlines():
            try:
                record = json.loads(line)
                key = record.pop("key")
                self.found[key] = Reply(**record)
            except (ValueError, TypeError, KeyError, AttributeError):
                damaged += bool(line.strip())
        if damaged and not self.found and not content.startswith(b'{"key": '):
            raise UserError(f"key cache: {self.path} is no file of answers: name another one")
        if damaged:
            warn(f"{self.path}: {damaged} damaged lines are skipped, what they answered is asked again")
        if content and not content.endswith(b"\n"):
            self._append(b"\n")

    def put(self, key: str, reply: Reply) -> None:
        line = json.dumps({"key": key, **asdict(reply)}) + "\n"
        with self.lock:
            self._append(line.encode())
            self.found[key] = reply

    def _append(self, data: bytes) -> None:
        size = os.fstat(self.file.fileno()).st_size
        try:
            if self.file.write(data) != len(data):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.path))
        except OSError as error:
            self.file.truncate(size)
            error.filename = error.filename or str(self.path)
            raise

    def close(self) -> None:
        if not self.found and os.fstat(self.file.fileno()).st_size == 0:
            self.path.unlink(missing_ok=True)  # nothing came: leave nothing behind
        self.file.close()


class _Auth(requests.auth.AuthBase):
    """An auth object and no plain header: a ~/.netrc entry for the host would replace a header, or be sent without one."""

    def __init__(self, name: str, value: str):
        self.name, self.value = name, value

    def __call__(self, request: requests.PreparedRequest) -> requests.PreparedRequest:
        if self.value:
            request.headers[self.name] = self.value
        return request


class Judge:
    """A model behind an address, asked by several threads at once.

    cfg has the keys of eval_winrate.py: judge, judge_model, api, api_key_env, temperature, max_tokens, asks, tries, timeout,
    workers, max_calls, price_in, price_out. Raises UserError for an address or a key that cannot be used.
    """

    def __init__(self, cfg, cache: Cache):
        self.cfg, self.cache = cfg, cache
        self.url, self.gemini = address(cfg.judge, cfg.judge_model, cfg.api)
        parts = urlsplit(self.url)
        self.shown = f"{parts.scheme}://{parts.netloc}{parts.path}"
        self.key_name = cfg.api_key_env or ("GEMINI_API_KEY" if self.gemini else "OPENAI_API_KEY")
        self.key = api_key(self.key_name, parts, named=bool(cfg.api_key_env))
        self.auth = (
            _Auth("x-goog-api-key", self.key) if self.gemini else _Auth("Authorization", self.key and f"Bearer {self.key}")
        )
        self.local = threading.local()  # a session a thread
        self.lock = threading.Lock()
        self.stop = threading.Event()
        self.answered = False  # whether the server has said anything at all
        self.calls = 0  # answers paid for, those under way included
        self.lost = 0  # questions in a row without an answer
        self.not_before = 0.0  # time.monotonic() until which the server asked everybody to wait

    # --- many questions -------------------------------------------------------------------------------------------------

    def decide(self, questions: Iterable[Question], parse: Callable[[str], Any], dry_run: bool = False) -> list[Decision]:
        """A decision a question, in their order. What the cache knows is not asked; equal questions are asked once.

        parse: a reply's text -> verdict, or None where there is none. The judge is then told so, `asks` times in all. Says
        what the calls will take before the first of them; `dry_run` returns [] there. Raises UserError where going on makes
        no sense: a refused key, no server, more calls than `max_calls`; what was answered stays in the cache.
        """
        questions = list(questions)
        found = {q: self._decide(q, parse, self._known) for q in dict.fromkeys(questions)}
        todo = [q for q, decision in found.items() if decision is None]
        print(self.estimate(todo, len(found)), flush=True)
        if dry_run or not todo:
            return [] if dry_run else [found[q] for q in questions]
        if self.cfg.max_calls and len(todo) > self.cfg.max_calls:
            raise UserError(
                f"key max_calls: {len(todo):,} calls are needed and {self.cfg.max_calls:,} allowed: raise it, or take fewer "
                "prompts with --limit; nothing was asked"
            )
        progress = Progress("judging", len(todo), "questions")
        # the first goes alone: a wrong key or address shows at the price of one call
        found[todo[0]] = self._decide(todo[0], parse, self._ask)
        progress.add(1)
        pool = ThreadPoolExecutor(self.cfg.workers, "judge")
        try:
            futures = {pool.submit(self._decide_or_stop, q, parse): q for q in todo[1:]}
            for future in as_completed(futures):
                found[futures[future]] = future.result()
                progress.add(1)
        except BaseException as error:
            self.stop.set()
            if isinstance(error, KeyboardInterrupt):
                print("\nstopping: waiting for the answers that are under way", file=sys.stderr)
            pool.shutdown(cancel_futures=True)
            if isinstance(error, Stopped):  # the thread that met the cause tells it
                causes = (f.exception() for f in futures if not f.cancelled())
                raise next(cause for cause in causes if cause and not isinstance(cause, Stopped)) from None
            raise
        pool.shutdown()
        progress.close()
        return [found[q] for q in questions]

    def estimate(self, todo: list[Question], total: int) -> str:
        """What asking `todo` takes if nothing has to be asked again: calls, tokens (four characters each), money."""
        tokens_in = sum(len(q.text) for q in todo) // 4
        tokens_out = len(todo) * self.cfg.max_tokens
        most = f"at most {tokens_out:,}" if self.cfg.max_tokens else "an unknown number of"
        text = f"{len(todo):,} calls to {self.shown} ({total - len(todo):,} of {total:,} answers are in {self.cache.path})"
        if not todo:
            return text
        text += f": about {tokens_in:,} tokens in, {most} out"
        if (cost := self.cost(tokens_in, tokens_out)) is not None:
            text += f", {'about' if self.cfg.max_tokens else 'at least'} {cost:.4f} at the prices given"
        return text

    def cost(self, tokens_in: int, tokens_out: int) -> float | None:
        """In the unit of price_in and price_out, which are per million tokens; None where neither is given."""
        cfg = self.cfg
        return (tokens_in * cfg.price_in + tokens_out * cfg.price_out) / 1e6 if cfg.price_in or cfg.price_out else None

    def usage(self, decisions: Iterable[Decision]) -> dict:
        """Calls, tokens and cost of all that the decisions rest on, asked now or in an earlier run, as the server counts."""
        replies = list({id(r): r for d in decisions for r in d.replies}.values())
        tokens_in, tokens_out = sum(r.tokens_in for r in replies), sum(r.tokens_out for r in replies)
        used = {"calls": len(replies), "tokens_in": tokens_in, "tokens_out": tokens_out}
        cost = self.cost(tokens_in, tokens_out)
        return used if cost is None else {**used, "cost": cost}

    # --- one question ---------------------------------------------------------------------------------------------------

    def _decide(self, question: Question, parse, ask) -> Decision | None:
        """Ask until `parse` finds a verdict, `asks` times at most. None if `ask` does not know a reply (see `_known`)."""
        turns, replies = [question.text], []
        for attempt in range(self.cfg.asks):
            try:
                reply = ask(turns, f"{question.tag} {attempt}")
            except NoAnswer as error:
                return Decision(None, replies, str(error))
            if reply is None:
                return None
            replies.append(reply)
            verdict = parse(reply.text)
            if verdict is not None:
                return Decision(verdict, replies)
            if reply.text.strip():
                turns = [question.text, reply.text, REMINDER]
        end = f" ({replies[-1].end})" if replies[-1].end else ""
        return Decision(None, replies, f"no verdict in {len(replies)} replies{end}")

    def _decide_or_stop(self, question: Question, parse) -> Decision:
        """`_decide` in a thread of its own: what it raises ends the work of the others."""
        try:
            return self._decide(question, parse, self._ask)
        except BaseException:
            self.stop.set()
            raise

    def _known(self, turns: list[str], tag: str) -> Reply | None:
        return self.cache.found.get(self._hash(turns, tag))

    def _ask(self, turns: list[str], tag: str) -> Reply:
        reply = self._known(turns, tag)
        if reply is None:
            reply = self._call(self._body(turns))
            self.cache.put(self._hash(turns, tag), reply)
        return reply

    def _hash(self, turns: list[str], tag: str) -> str:
        asked = json.dumps([self.url, self.cfg.judge_model, self._body(turns), tag], sort_keys=True)
        return hashlib.sha256(asked.encode()).hexdigest()

    def _body(self, turns: list[str]) -> dict:
        """The request: `turns` are ours and the judge's in turn. What is 0 (max_tokens) or negative (temperature) is left
        to the server."""
        limits = {"maxOutputTokens" if self.gemini else "max_tokens": self.cfg.max_tokens} if self.cfg.max_tokens else {}
        if self.cfg.temperature >= 0:
            limits["temperature"] = self.cfg.temperature
        if self.gemini:
            contents = [{"role": ("user", "model")[n % 2], "parts": [{"text": t}]} for n, t in enumerate(turns)]
            return {"contents": contents, "generationConfig": limits}
        messages = [{"role": ("user", "assistant")[n % 2], "content": t} for n, t in enumerate(turns)]
        return {"model": self.cfg.judge_model, "messages": messages, **limits}

    # --- one call -------------------------------------------------------------------------------------------------------

    def _call(self, body: dict) -> Reply:
        """Send a request until it is answered, `tries` times at most, with growing, scattered waits between.

        Raises UserError for what no second try can mend, NoAnswer when the tries are used up, Stopped when others ended it.
        """
        for tried in range(1, self.cfg.tries + 1):
            while (wait := self.not_before - time.monotonic()) > 0 and not self.stop.wait(wait):
                pass
            self._reserve()
            reply, problem, asked_to_wait, unreachable = None, "", 0.0, False
            try:
                response = self._session().post(
                    self.url, json=body, auth=self.auth, timeout=(CONNECT, self.cfg.timeout), allow_redirects=False
                )
                self.answered = True
                if response.status_code == 200:
                    reply = self._read(response.content)
                    problem = "" if reply else f"no answer of the expected form: {self._quote(response)!r}"
                else:
                    self._release()
                    problem = f"status {response.status_code}: {self._quote(response)}"
                    self._refuse(response, problem)
                    asked_to_wait = retry_after(response.headers.get("Retry-After", ""))
            except requests.RequestException as error:
                unreachable = no_connection(error)
                problem = explain(error, self.cfg.timeout)
                if unreachable:
                    self._release()
                if isinstance(error, ValueError) or (unreachable and not self.answered):  # ValueError: no usable address
                    raise UserError(f"{self.shown}: {problem}: check --judge and the network") from None
            if reply:
                with self.lock:
                    self.lost = 0
                return reply
            if asked_to_wait > PATIENCE:
                raise UserError(f"{self.shown}: {problem}; it asks to wait {asked_to_wait:.0f} s: {self._again()} then")
            if tried < self.cfg.tries:
                wait = min(DELAY * 2 ** (tried - 1) * random.uniform(0.5, 1.5), LONGEST)
                if asked_to_wait:  # of all of us, and not all at the same moment again
                    with self.lock:
                        self.not_before = max(self.not_before, time.monotonic() + asked_to_wait)
                    if asked_to_wait > 10:
                        print(f"the judge asks to wait {asked_to_wait:.0f} s ({problem})", file=sys.stderr)
                    wait = asked_to_wait + 0.1 * wait
                if self.stop.wait(wait):
                    raise Stopped
        with self.lock:
            self.lost += 1
            hopeless = unreachable or self.lost >= GIVE_UP
        if hopeless:
            raise UserError(f"{self.shown}: no answer in {self.cfg.tries} tries, the last: {problem}: {self._again()}")
        raise NoAnswer(f"no answer in {self.cfg.tries} tries, the last: {problem}")

    def _again(self) -> str:
        return f"start the same command again, what was answered is kept in {self.cache.path}"

    def _session(self) -> requests.Session:
        if not hasattr(self.local, "session"):
            self.local.session = requests.Session()
        return self.local.session

    def _reserve(self) -> None:
        with self.lock:
            if self.stop.is_set():
                raise Stopped
            if self.cfg.max_calls and self.calls >= self.cfg.max_calls:
                raise UserError(
                    f"key max_calls: {self.calls:,} calls were made, and some replies have to be asked for again: raise it and "
                    f"{self._again()}"
                )
            self.calls += 1

    def _release(self) -> None:
        """The call just reserved was not answered, so it costs nothing. (One that was cut off may: it stays counted.)"""
        with self.lock:
            self.calls -= 1

    def _refuse(self, response: requests.Response, problem: str) -> None:
        """UserError for a status that stays the same however often we ask."""
        status = response.status_code
        if (status == 429 and "insufficient_quota" not in problem) or status in (408, 409, 425) or status >= 500:
            return
        missing = "" if self.key else f"set {self.key_name} to an API key; "
        if 300 <= status < 400:
            hint = f"the server sends us elsewhere ({urlsplit(response.headers.get('Location', '')).netloc}): name that address"
        elif status in (401, 403):
            hint = missing or f"check the key in {self.key_name}"
        elif status == 404:
            hint = "check --judge and --judge_model"
        elif status == 400:
            hint = f"{missing}check --judge_model; --max_tokens 0 and --temperature -1 leave these two out of the request"
        else:
            hint = missing or "see what the server says"
        raise UserError(f"{self.shown}: the judge refuses ({problem}): {hint.rstrip('; ')}")

    def _quote(self, response: requests.Response) -> str:
        """The server's own message, or the start of whatever it sent, without the key, whole or in part."""
        text = response.content.decode(errors="replace")
        try:
            said = json.loads(text)
            said = said[0] if isinstance(said, list) else said
            error = said["error"]
            text = error["message"] if isinstance(error, dict) else str(error)
            if isinstance(error, dict) and error.get("code") == "insufficient_quota":
                text = f"insufficient_quota: {text}"
        except (ValueError, KeyError, TypeError, IndexError, RecursionError):
            pass
        text = SECRETS.sub("***", self._clean(str(text)))
        if self._secret():
            text = re.sub(re.escape(self.key[:6]) + r"[\w*.…-]*", "***", text)
        return " ".join(text.split())[:300]

    def _clean(self, text: str) -> str:
        """`text` without the API key, should the server quote it."""
        return text.replace(self.key, "***") if self._secret() else text

    def _secret(self) -> bool:
        return len(self.key) > 5  # local servers are given a word like EMPTY

    def _read(self, content: bytes) -> Reply | None:
        """A 200's body as a Reply; None if it is not of the form that the API promises."""
        try:
            said = json.loads(content)
            text, tokens_in, tokens_out, end = (read_gemini if self.gemini else read_openai)(said)
            end = "" if end.lower() in ("", "stop") else self._clean(f"ended by {end}")
            return Reply(self._clean(text), int(tokens_in or 0), int(tokens_out or 0), end)
        except (ValueError, KeyError, TypeError, IndexError, AttributeError, RecursionError):
            return None


def read_openai(said: dict) -> tuple[str, int | None, int | None, str]:
    """A chat completion -> text, tokens in, tokens out, why it ended."""
    used, best = said.get("usage") or {}, said["choices"][0]
    text = best["message"].get("content") or best["message"].get("refusal") or ""
    if isinstance(text, list):  # some servers send parts
        text = "".join(part.get("text", "") for part in text)
    return text, used.get("prompt_tokens"), used.get("completion_tokens"), best.get("finish_reason") or ""


def read_gemini(said: dict) -> tuple[str, int | None, int | None, str]:
    """The same of a GenerateContentResponse; a blocked prompt has no candidate, and an empty text here."""
    used, blocked = said.get("usageMetadata") or {}, (said.get("promptFeedback") or {}).get("blockReason")
    best = {"finishReason": f"block, {blocked}"} if blocked and not said.get("candidates") else said["candidates"][0]
    parts = (best.get("content") or {}).get("parts") or []
    text = "".join(part.get("text", "") for part in parts if not part.get("thought"))
    written = (used.get("candidatesTokenCount") or 0) + (used.get("thoughtsTokenCount") or 0)
    return text, used.get("promptTokenCount"), written, best.get("finishReason") or ""


def address(judge: str, model: str, api: str) -> tuple[str, bool]:
    """(what to POST to, whether it is Gemini's API). judge: "openai", "gemini", or an address with or without its path.

    Raises UserError for what is no http address and for one that carries a key: those end up in files and logs.
    """
    base = SHORT.get(judge, judge)
    try:
        parts = urlsplit(base)
        host, _ = parts.hostname, parts.port
    except ValueError:
        host = None
    if not host or parts.scheme not in ("http", "https"):
        raise UserError("key judge: not an http:// or https:// address, nor openai or gemini: name the server of the judge")
    secret = [name for name, _ in parse_qsl(parts.query) if re.search("key|token|secret|sig|pass", name, re.I)]
    if parts.username or parts.password or secret:
        raise UserError(
            "key judge: the address carries a key or password: put it into an environment variable, see api_key_env"
        )
    path = parts.path.rstrip("/")
    looks = re.search(r"generativelanguage|generateContent|/v1beta", base) and "/openai" not in path
    gemini = api == "gemini" or (api == "auto" and bool(looks))
    if gemini:
        if not path.endswith(":generateContent"):
            path = path.partition("/models")[0] or "/v1beta"
            path += f"/models/{model.removeprefix('models/')}:generateContent"
    elif not path.endswith("/chat/completions"):
        path = (path or "/v1") + "/chat/completions"
    return parts._replace(path=path, fragment="").geturl(), gemini


def api_key(name: str, parts, named: bool) -> str:
    """The key in environment variable `name`, or "" where there is none and the server is not one that needs it.

    A key that the user did not name goes over plain http to this machine only.
    """
    key = os.environ.get(name, "").strip()
    if named and not key:  # not quoted: it may be the key itself
        raise UserError("key api_key_env: no environment variable of that name is set: name the one that holds the API key")
    if not key and parts.hostname in {urlsplit(url).hostname for url in SHORT.values()}:
        raise UserError(f"environment variable {name}: not set: put the API key of {parts.hostname} there")
    if not (key.isascii() and key.isprintable()) or " " in key:
        raise UserError(f"environment variable {name}: holds a character that no API key has: set it anew")
    if key and not named and parts.scheme == "http" and parts.hostname not in ("localhost", "127.0.0.1", "::1"):
        print(f"{name} is not sent to {parts.hostname}: http is in clear; insist with --api_key_env {name}")
        return ""
    return key


def no_connection(error: requests.RequestException) -> bool:
    """Whether the request never reached a server."""
    refused = isinstance(getattr(error.args[0] if error.args else None, "reason", None), NewConnectionError)
    kinds = (requests.exceptions.SSLError, requests.exceptions.ProxyError, requests.exceptions.ConnectTimeout)
    return refused or isinstance(error, kinds)


def explain(error: requests.RequestException, timeout: float) -> str:
    """A failed request in a few words. Not the exception's own: it may quote headers."""
    if isinstance(error, requests.exceptions.ProxyError):
        return "no way through the proxy (HTTPS_PROXY)"
    if isinstance(error, requests.exceptions.SSLError):
        return "no trusted TLS connection"
    if isinstance(error, requests.exceptions.ConnectTimeout):
        return f"no connection in {CONNECT} s"
    if isinstance(error, requests.Timeout) or "Read timed out" in str(error):
        return f"no answer in {timeout:g} s"
    if type(getattr(error.args[0] if error.args else None, "reason", None)).__name__ == "NameResolutionError":
        return "no such host"
    if no_connection(error):
        return "it refuses the connection"
    return f"not an address to ask ({type(error).__name__})" if isinstance(error, ValueError) else "the connection was cut"


def retry_after(text: str) -> float:
    """Seconds from now that a Retry-After header asks for, given as seconds or as a date (RFC 9110, 10.2.3); 0 for neither."""
    if re.fullmatch(r"\s*\d+(\.\d+)?\s*", text):
        return float(text)
    try:
        return max(0.0, email.utils.parsedate_to_datetime(text).timestamp() - time.time())
    except (ValueError, TypeError, OverflowError):
        return 0.0
