"""What every request to a web server needs: a token that stays with it, plain words for a failure, Retry-After."""

import email.utils
import time

import requests
from urllib3.exceptions import MaxRetryError

REASONS = {  # the name of the exception -> what it means for the user; by name, because older versions lack some
    "NameResolutionError": "no such host",
    "NewConnectionError": "it refuses the connection",
    "ConnectTimeoutError": "no connection in time",
    "ReadTimeout": "no answer in time",
    "SSLError": "no trusted TLS connection",
    "ProxyError": "no way through the proxy (HTTPS_PROXY)",
}


class Bearer(requests.auth.AuthBase):
    """Sends `Authorization: Bearer TOKEN`, or nothing if the token is empty.

    requests lets an entry of ~/.netrc replace a plain Authorization header. It does not replace an auth object.
    """

    def __init__(self, token: str):
        self.token = token

    def __call__(self, request: requests.PreparedRequest) -> requests.PreparedRequest:
        if self.token:
            request.headers["Authorization"] = f"Bearer {self.token}"
        return request


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
