"""What every request to a web server needs: a token that stays with it, limits, plain words for a failure, Retry-After."""

import email.utils
import re
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any
from urllib.parse import urlsplit

import requests
from urllib3.exceptions import MaxRetryError

REASONS = {  # the name of the exception -> what it means for the user; by name, because older versions lack some
    "NameResolutionError": "no such host",
    "NewConnectionError": "it refuses the connection",
    "ConnectTimeoutError": "no connection in time",
    "ReadTimeout": "no answer in time",
    "SSLError": "no trusted TLS connection",
    "ProxyError": "no way through the proxy (HTTPS_PROXY)",
    "ContentDecodingError": "an answer in an encoding that was not asked for",
}


def is_local(url: str) -> bool:
    """Whether an address is this machine's own: what is sent there meets no network."""
    return re.fullmatch(r"localhost|127(\.\d+){3}|::1", urlsplit(url).hostname or "") is not None


def send(method: str, url: str, token: str, headers: dict | None = None, **how) -> requests.Response:
    """Send a request; returns when the head of the answer is there. how: more arguments of requests.request.

    Sends `Authorization: Bearer TOKEN`, or nothing if the token is empty; never to another host that it is redirected to.
    Nothing for this machine goes through a proxy. An answer may not be compressed: a small one could fill the memory. Raises
    requests.RequestException.
    """
    headers = {"Accept-Encoding": "identity", "User-Agent": "nanopref", **(headers or {})}
    headers |= {"Authorization": f"Bearer {token}"} if token else {}
    how |= {"proxies": {urlsplit(url).scheme: ""}} if is_local(url) else {}
    how["auth"] = lambda request: request  # without any, requests would let an entry of ~/.netrc replace the token
    response = requests.request(method, url, headers=headers, stream=True, **how)
    if response.headers.get("Content-Encoding", "identity").lower() != "identity":
        raise requests.exceptions.ContentDecodingError
    return response


def within(seconds: float, call: Callable[[], Any]) -> Any:
    """What `call` returns or raises. Raises requests.ReadTimeout where that takes longer.

    The time limit of requests is one between two bytes. A server that sends a byte now and then would hold us for ever. `call`
    is then left to a thread that ends with its connection, or with the process.
    """
    future: Future = Future()

    def work() -> None:
        try:
            future.set_result(call())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=work, daemon=True).start()
    try:
        return future.result(seconds)
    except TimeoutError:
        raise requests.ReadTimeout from None


def reached(error: requests.RequestException) -> bool:
    """Whether the request that failed had reached a server. If not, the address or the network is wrong."""
    return not isinstance(error, ValueError) and not isinstance(_cause(error), MaxRetryError)


def explain(error: requests.RequestException) -> str:
    """Why a request failed, in a few words. Never the exception's own text: it may quote a signed address or a header."""
    if error.response is not None:
        return f"the server answers with status {error.response.status_code}"
    if isinstance(error, ValueError):  # what requests raises for an address or header that it cannot use
        return f"no usable address ({type(error).__name__})"
    name = type(getattr(_cause(error), "reason", None) or error).__name__
    return REASONS.get(name, "the connection was cut")


def retry_after(response: requests.Response | None) -> float:
    """Seconds that the server asks to wait, 0 if it does not say. The header holds seconds or a date (RFC 9110, 10.2.3)."""
    text = "" if response is None else response.headers.get("Retry-After", "").strip()
    try:
        if text.replace(".", "", 1).isdigit():
            return float(text)
        return max(0.0, email.utils.parsedate_to_datetime(text).timestamp() - time.time())
    except (ValueError, TypeError, OverflowError):
        return 0.0


def _cause(error: requests.RequestException) -> object:
    return error.args[0] if error.args else None
