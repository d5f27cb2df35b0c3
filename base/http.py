"""What the project's HTTP clients share: the key in the header, how long a server asks us to wait, why no answer came."""

import email.utils
import re
import time

import requests
from urllib3.exceptions import NewConnectionError


class Bearer(requests.auth.AuthBase):
    """Sends `Authorization: Bearer TOKEN`, or no such header if the token is empty.

    An auth object, not a plain header: requests replaces a header by a ~/.netrc entry for the host, if there is one.
    """

    def __init__(self, token: str):
        self.token = token

    def __call__(self, request: requests.PreparedRequest) -> requests.PreparedRequest:
        if self.token:
            request.headers["Authorization"] = f"Bearer {self.token}"
        return request


def retry_after(text: str) -> float:
    """Seconds from now that a Retry-After header asks for (RFC 9110, 10.2.3): a number or a date; 0 for anything else."""
    if re.fullmatch(r"\s*\d+(\.\d+)?\s*", text):
        return float(text)
    try:
        return max(0.0, email.utils.parsedate_to_datetime(text).timestamp() - time.time())
    except (ValueError, TypeError, OverflowError):
        return 0.0


def no_answer(error: requests.RequestException) -> tuple[str, bool]:
    """(why a request got no answer, whether it reached the server). Not the exception's own text, which may hold a key."""
    cause = getattr(error.args[0] if error.args else None, "reason", None)  # urllib3's exception behind that of requests
    if isinstance(error, requests.exceptions.ProxyError):
        return "no way through the proxy (HTTPS_PROXY)", False
    if isinstance(error, requests.exceptions.SSLError):
        return "no trusted TLS connection", False
    if isinstance(error, requests.exceptions.ConnectTimeout):
        return "no connection in time", False
    if isinstance(error, requests.Timeout) or "Read timed out" in str(error):
        return "no answer in time", True
    if type(cause).__name__ == "NameResolutionError":  # by name: urllib3 1.x does not have it
        return "no such host", False
    if isinstance(cause, NewConnectionError):
        return "it refuses the connection", False
    if isinstance(error, ValueError):
        return f"not an address to ask ({type(error).__name__})", False
    return "the connection was cut", True
