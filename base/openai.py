"""A model behind a server that speaks OpenAI's protocol: its address, the API key, and requests that are sent until answered.

The API key comes from the environment. It goes into a request header and nowhere else.
"""

import json
import os
import random
import re
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import Any
from urllib.parse import SplitResult, urlsplit

import requests

from base.errors import UserError
from base.http import explain, is_local, reached, retry_after, send, within

DELAY = 1.0  # seconds before the second try, about; doubled for each further one
LONGEST = 60.0  # seconds between two tries, beside those that the server asks for
PATIENCE = 600.0  # longest wait, in seconds, that a server may ask for; above it the work ends
GIVE_UP = 3  # questions in a row without any answer that end the work
CONNECT = 15  # seconds
MOST = 10_000_000  # bytes of an answer
SHORT = {"openai": "https://api.openai.com/v1", "gemini": "https://generativelanguage.googleapis.com/v1beta/openai"}
KEYS = {"api.openai.com": "OPENAI_API_KEY", "generativelanguage.googleapis.com": "GEMINI_API_KEY"}  # hosts that need a key
LATER = (408, 409, 425, 429)  # statuses, beside 500 and above, after which another try may succeed
SECRETS = r"\b(?:sk-|AIza|Bearer\s+)[\w*.…-]{5,}[\w*…-]"  # what a key looks like when a server quotes a part of it


class NoAnswer(Exception):
    """A request got no answer, but another one may. wait: seconds that the server asks us to wait. paid: it may cost."""

    def __init__(self, problem: str, wait: float = 0.0, paid: bool = False):
        super().__init__(problem)
        self.wait, self.paid = wait, paid


class Server:
    """A model behind an address, asked by several threads at once.

    cfg: runtime.keys.ServerKeys, and the keys `name` (the address) and `name`_model. again: what a user does after a stop.
    Raises UserError for an address or an API key that cannot be used.
    """

    hint = ""  # what else may mend a refusal

    def __init__(self, cfg: Any, name: str, again: str):
        self.cfg, self.name, self.again = cfg, name, again
        self.url = address(getattr(cfg, name), name)
        server = urlsplit(self.url)
        self.key_name = cfg.api_key_env or KEYS.get(server.hostname, "OPENAI_API_KEY")
        self.key = api_key(self.key_name, server, named=bool(cfg.api_key_env))
        self.secret = len(self.key) > 5  # local servers are given a word like EMPTY, which may be quoted
        self.lock = threading.Lock()  # for the counts below
        self.answered = False  # whether the server has said anything at all
        self.calls = 0  # answers paid for, and requests under way
        self.lost = 0  # requests in a row without an answer
        self.stop = threading.Event()

    def each(self, work: Callable[[Any], Any], items: list) -> Iterator[tuple[Any, Any]]:
        """(item, work(item)) of every item as it is done, `workers` at a time. Close it where you leave it early.

        After an exception no new request is sent, what is under way is still given out, and the exception is raised then.
        """
        with ThreadPoolExecutor(self.cfg.workers) as pool:
            try:
                for some in (items[:1], items[1:]):  # the first goes alone: a wrong key shows at the price of one call
                    asked, problem = {pool.submit(work, item): item for item in some}, None
                    for future in as_completed(asked):
                        if error := future.exception():
                            self.stop.set()
                            problem = problem or error
                        else:
                            yield asked[future], future.result()
                    if problem:
                        raise problem
            except BaseException as error:
                self.stop.set()
                if isinstance(error, KeyboardInterrupt):
                    print("\nstopping: waiting for the answers that are under way", file=sys.stderr)
                raise

    def ask(self, path: str, body: dict, read: Callable[[Any], Any]) -> Any:
        """Send a request until it is answered, `tries` times at most, with growing, scattered waits between.

        Returns what `read` makes of the answer's JSON; it may raise ValueError, KeyError … for one of another form. Raises
        NoAnswer if all tries are used up or another thread met an error, UserError if no try can help.
        """
        wait, problem = 0.0, None
        for tried in range(self.cfg.tries):
            if self.stop.wait(wait):
                raise NoAnswer("stopped")
            self._count_call()
            try:
                reply = self._send(f"{self.url}/{path}", body, read)
                self.lost = 0
                return reply
            except NoAnswer as error:
                problem = error
            with self.lock:
                self.calls -= not problem.paid
            if problem.wait > PATIENCE:
                raise UserError(f"{self.url}: {problem}; it asks to wait {problem.wait:.0f} s: {self.again} then")
            if problem.wait > 10:
                print(f"the {self.name} asks to wait {problem.wait:.0f} s ({problem})", file=sys.stderr)
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

    def _send(self, url: str, body: dict, read: Callable[[Any], Any]) -> Any:
        """Send a request once. Raises NoAnswer if another try may succeed, UserError if none can."""
        seconds = self.cfg.timeout
        limits = (min(CONNECT, seconds), seconds)

        def exchange() -> tuple[requests.Response, bytes]:
            with send("POST", url, self.key, json=body, timeout=limits, allow_redirects=False) as response:
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
                raise UserError(f"{self.url}: {problem}: check --{self.name} and the network") from None
            raise NoAnswer(problem, paid=reached(error)) from None
        self.answered = True
        status, said = response.status_code, self.quote(content)
        if status == 200:
            try:
                return read(json.loads(content))
            except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
                raise NoAnswer(f"no answer of the expected form: {said!r}", paid=True) from None
        if (status in LATER or status >= 500) and b"insufficient_quota" not in content:
            raise NoAnswer(f"status {status}: {said}", wait=retry_after(response))
        raise UserError(
            f"{self.url}: the {self.name} refuses (status {status}: {said}): check --{self.name}, --{self.name}_model and "
            f"the API key in {self.key_name}{self.hint}"
        )

    def text_of(self, choice: dict) -> str:
        """The text of one of an answer's choices, without the API key. Raises TypeError, KeyError … for one of another form."""
        said = choice["message"] if "message" in choice else {"content": choice["text"]}
        text = said.get("content") or said.get("refusal") or ""
        if isinstance(text, list):  # some servers send parts
            text = "".join(part.get("text", "") for part in text)
        if not isinstance(text, str):
            raise TypeError("not a text")
        return self.clean(text)

    def tokens_of(self, said: dict) -> list[int]:
        """Tokens sent and received, as an answer says. A count that is none is 0: the answer is there and paid for."""
        used = said.get("usage")
        counts = [used.get(name) if isinstance(used, dict) else 0 for name in ("prompt_tokens", "completion_tokens")]
        return [n if is_count(n) else 0 for n in counts]

    def quote(self, content: bytes) -> str:
        """The start of what the server sent, without the API key or parts of it, and without what would steer a terminal."""
        part = re.escape(self.key[:6]) + r"[\w*.…-]*" if self.secret else "(?!)"
        text = "".join(c if c.isprintable() else " " for c in content[:9999].decode(errors="replace"))
        return " ".join(re.sub(f"{part}|{SECRETS}", "***", self.clean(text)).split())[:300]

    def clean(self, text: str) -> str:
        """`text` without the API key, should the server quote it."""
        return text.replace(self.key, "***") if self.secret else text


def address(server: str, name: str) -> str:
    """Where a server's paths begin, …/v1. server, the value of key `name`: "openai", "gemini", or an address with or without
    /v1 and /chat/completions or /completions.

    Raises UserError for anything else, such as an address with a key or password in it: addresses are written to files.
    """
    url = SHORT.get(server, server).rstrip("/")
    form = re.fullmatch(r"https?://(?:[\w.-]+|\[::1\])(?::\d+)?(/[\w./~%:-]*)?", url)
    if not form:
        raise UserError(
            f"key {name}: not openai, gemini or an address like https://HOST/v1 (a key or password stands in no address, but "
            "in an environment variable, see api_key_env)"
        )
    path = (form[1] or "/v1").removesuffix("/completions").removesuffix("/chat")
    return f"{url.removesuffix(form[1] or '')}{path}"


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


def is_count(value: object) -> bool:
    return type(value) is int and 0 <= value < 2**53
