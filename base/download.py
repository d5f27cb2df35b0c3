"""Files from the web and from the Hugging Face hub: resumed after a cut, checked, and whole or absent.

A download grows in `NAME.partial` beside its place, next to `NAME.partial.etag`, the ETag of what it is a part of. Only
when size and checksum fit is it renamed. Where a file is already in its place the network is not asked.
"""

import contextlib
import fcntl
import hashlib
import os
import re
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO
from urllib.parse import quote, urlsplit

import requests
from urllib3.exceptions import ProtocolError, ReadTimeoutError

from base.errors import UserError
from base.files import lock

TRIES = 5  # requests in a row that bring next to nothing
DELAY = 1.0  # seconds before the second try, doubled for each further one
TIMEOUT = (15, 60)  # seconds to connect, seconds without a byte
CHUNK = 64 * 1024  # small: a reset connection loses the chunk that was being filled
PROGRESS = 1_000_000  # a try that brings fewer bytes than this counts as a failed one
TINY = 1_000_000  # no progress is shown for files up to this many bytes


class NotFound(UserError):
    """The server has no such file (404)."""


def cache_dir() -> Path:
    """Where downloads go: NANOPREF_CACHE, or ~/.cache/nanopref."""
    return Path(os.environ.get("NANOPREF_CACHE") or "~/.cache/nanopref").expanduser()


def hub_endpoint() -> str:
    """The hub's address: HF_ENDPOINT as the hub's own clients read it, or https://huggingface.co."""
    return (os.environ.get("HF_ENDPOINT") or "https://huggingface.co").rstrip("/")


def openai_endpoint() -> str:
    """Where OpenAI keeps its released weights and labels: OPENAIPUBLIC_ENDPOINT, or the published address."""
    return (os.environ.get("OPENAIPUBLIC_ENDPOINT") or "https://openaipublic.blob.core.windows.net").rstrip("/")


def hub_file(repo: str, name: str) -> Path:
    """The file `name` of a hub repository ("gpt2", "org/name"), from the cache or else from the hub's main branch.

    Raises NotFound where the hub has no such file, UserError for all that can go wrong on the way (see `fetch`).
    """
    path = _hub_path(repo, name)
    return path if path.exists() else fetch(f"{hub_endpoint()}/{repo}/resolve/main/{quote(name)}", path, hub=True)


def hub_find(repo: str, names: Sequence[str]) -> Path | None:
    """The first of `names` that the repository has, as a local file; None where it has none of them.

    The cache is looked through first, for all of the names: what was downloaded once is found without a network.
    """
    for name in names:
        if (path := _hub_path(repo, name)).exists():
            return path
    for name in names:
        with contextlib.suppress(NotFound):
            return hub_file(repo, name)
    return None


def fetch(url: str, dest: Path | str, *, sha256: str | None = None, size: int | None = None, hub: bool = False) -> Path:
    """Download `url` to `dest`, checked and whole, or raise and leave `dest` absent; returns `dest`.

    A `dest` that is already there (and has the `sha256` asked for, where one is) is returned without a request. Several
    processes may ask for the same `dest`: one downloads, the others wait for it.

    sha256: hex digest the content must have. size: bytes it must have; the server's own statement is checked always.
    hub: the server is a Hugging Face hub: its X-Linked-Etag or ETag is the content's checksum (64 hex digits: SHA-256;
    40: SHA-1 as a git blob), and HF_TOKEN is sent, to the hub's own host only.

    Raises NotFound (404) and UserError: no connection, refused, cut (the partial file stays, the next call goes on from
    there), wrong size, wrong checksum (the partial file is deleted). A full disk is an OSError.
    """
    dest = Path(dest)
    if _is_there(dest, sha256):
        return dest
    with _locked_partial(dest, sha256) as file:
        if file is None:  # another process was faster
            return dest
        try:
            size, digest = _download(url, dest, file, size, hub)
            _check(url, file, size, {sha256.lower() if sha256 else None, digest} - {None})
            os.fsync(file.fileno())
        except OSError as error:  # the disk's: a write does not tell which file it was
            error.filename = error.filename or file.name
            raise
        os.replace(file.name, dest)
        _etag_file(file).unlink(missing_ok=True)
    return dest


def _hub_path(repo: str, name: str) -> Path:
    if any(part in ("", ".", "..") for part in f"{repo}/{name}".split("/")):
        raise UserError(f"{repo}/{name}: not the name of a file on the hub")
    return cache_dir() / "hub" / repo / name


def _is_there(dest: Path, sha256: str | None) -> bool:
    if not dest.is_file():
        return False
    if sha256 is None:
        return True
    with open(dest, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() == sha256.lower()


def _etag_file(file: BinaryIO) -> Path:
    return Path(file.name + ".etag")


@contextlib.contextmanager
def _locked_partial(dest: Path, sha256: str | None) -> Iterator[BinaryIO | None]:
    """The partial file of `dest`, open for appending, ours alone until the block ends; None if `dest` came meanwhile.

    The lock is on the partial file itself and dies with its process, so there is no stale lock to clean up.
    """
    partial = dest.with_name(dest.name + ".partial")
    while True:
        try:
            dest.parent.mkdir(parents=True, exist_ok=True)
            file = open(partial, "a+b")  # noqa: SIM115 (closed below)
        except (PermissionError, FileExistsError, NotADirectoryError, IsADirectoryError) as error:
            raise UserError(
                f"cannot write {error.filename}: {error.strerror}; NANOPREF_CACHE can name another folder for downloads"
            ) from error
        with file:
            if not lock(file):  # should two write at once where there are no locks, size and checksum tell
                print(f"waiting for another process that downloads {dest.name}", file=sys.stderr)
                fcntl.flock(file, fcntl.LOCK_EX)
            # The one we waited for has renamed or removed what we hold open: then look again.
            try:
                if not os.path.samestat(os.fstat(file.fileno()), os.stat(partial)):
                    continue
            except FileNotFoundError:
                continue
            if _is_there(dest, sha256):
                partial.unlink(missing_ok=True)
                yield None
            else:
                try:
                    yield file
                finally:
                    if file.seek(0, os.SEEK_END) == 0:  # nothing came: leave nothing behind
                        partial.unlink(missing_ok=True)
                        _etag_file(file).unlink(missing_ok=True)
            return


def _download(url: str, dest: Path, file: BinaryIO, size: int | None, hub: bool) -> tuple[int | None, str | None]:
    """Bring `file` to the whole content of `url`; returns its size and checksum as the server states them (or None)."""
    failed, best, answered = 0, 0, False
    expected, digest = size, None
    bar = Progress(dest.name)
    try:
        while True:
            response = None
            try:
                response = _request(url, file, hub)
                if response.status_code == 416:  # the file has changed and is shorter now
                    _restart(file, None)
                    raise requests.exceptions.ChunkedEncodingError("range not satisfiable")
                _refuse(url, response)
                expected, digest = _statement(response, size, hub)
                if size is not None and expected is not None and expected != size:
                    _restart(file, None)
                    raise UserError(f"{url}: the server has {expected:,} bytes, not {size:,}: the file has changed")
                answered = True
                have = file.seek(0, os.SEEK_END)
                bar.start(have, expected)
                for chunk in response.iter_content(CHUNK):
                    have += file.write(chunk)
                    bar.update(have)
                file.flush()
                bar.finish(have)
                return expected, digest
            except (requests.RequestException, _Retry) as error:
                file.flush()
                have = file.seek(0, os.SEEK_END)
                failed = failed + 1 if have < best + PROGRESS else 1
                best = max(best, have)
                # No connection at all is told at once. If there was one before, the network went away: wait for it.
                if failed >= TRIES or not (answered or _is_passing(error)):
                    if answered and not isinstance(error, _Retry):
                        raise _cut(url, have, expected, _etag_file(file).exists()) from None
                    raise _explain(url, error, dest) from None
                time.sleep(max(DELAY * 2 ** (failed - 1), getattr(error, "wait", 0)))
            finally:
                if response is not None:
                    response.close()
    finally:
        bar.close()


class _Retry(Exception):
    """The server says: not now (5xx, 429). `wait` is what it asks for, in seconds."""

    def __init__(self, status: int, wait: float):
        super().__init__(status)
        self.status, self.wait = status, wait


def _request(url: str, file: BinaryIO, hub: bool) -> requests.Response:
    """Ask for what `file` lacks of `url`; on return `file` ends where the response's body begins."""
    headers = {"Accept-Encoding": "identity", "User-Agent": "nanopref"}  # identity: bytes are counted as stored
    have = file.seek(0, os.SEEK_END)
    etag_file = _etag_file(file)
    etag = etag_file.read_text() if etag_file.exists() else ""
    if have and etag:
        # One byte less, so that a partial file that happens to be whole asks for a range that exists.
        have = file.truncate(have - 1)
        headers |= {"Range": f"bytes={have}-", "If-Range": etag}
    token = os.environ.get("HF_TOKEN", "").strip()
    ours = hub and token and urlsplit(url).netloc == urlsplit(hub_endpoint()).netloc
    auth = _Bearer(token) if ours else None
    response = _Session().get(url, headers=headers, stream=True, timeout=TIMEOUT, auth=auth)
    if response.status_code == 206:
        start = re.match(rf"bytes {have}-\d+/", response.headers.get("Content-Range", ""))
        if not start or response.headers.get("ETag", etag) != etag:
            response.close()
            _restart(file, None)
            raise requests.exceptions.ChunkedEncodingError("another range than the one asked for")
    elif response.status_code == 200:
        etag = response.headers.get("ETag", "")
        # A weak ETag (W/"…") does not vouch for bytes, and encoded ranges are not ranges of what we store.
        _restart(file, etag if etag.startswith('"') and "Content-Encoding" not in response.headers else None)
    return response


class _Session(requests.Session):
    def rebuild_auth(self, prepared_request: requests.PreparedRequest, response: requests.Response) -> None:
        """After a redirect: our token stays on its host, and no ~/.netrc entry takes its place."""
        if self.should_strip_auth(response.request.url, prepared_request.url):
            prepared_request.headers.pop("Authorization", None)


class _Bearer(requests.auth.AuthBase):
    """An auth object and no plain header: a ~/.netrc entry for the host would replace a header."""

    def __init__(self, token: str):
        self.token = token

    def __call__(self, request: requests.PreparedRequest) -> requests.PreparedRequest:
        request.headers["Authorization"] = f"Bearer {self.token}"
        return request


def _restart(file: BinaryIO, etag: str | None) -> None:
    file.truncate(0)  # first: bytes of one ETag must never stand beside another
    if etag:
        _etag_file(file).write_text(etag)
    else:
        _etag_file(file).unlink(missing_ok=True)


def _refuse(url: str, response: requests.Response) -> None:
    """Raise for every status but success: _Retry, NotFound or UserError."""
    status = response.status_code
    if status in (200, 206):
        return
    if status == 429 or status >= 500:
        wait = response.headers.get("Retry-After", "")
        raise _Retry(status, min(int(wait), 60) if wait.isdigit() else 0)
    if status == 404:
        raise NotFound(f"{url}: no such file there (404); check the name")
    if status in (401, 403):
        said = "" if os.environ.get("HF_TOKEN") else ", or set HF_TOKEN to a token that may read it"
        raise UserError(f"{url}: access refused ({status}): gated, private, or not there at all; check the name{said}")
    raise UserError(f"{url}: the server answers with status {status}")


def _statement(response: requests.Response, size: int | None, hub: bool) -> tuple[int | None, str | None]:
    """Size and checksum of the whole content, as the server states them.

    The hub keeps large files elsewhere and redirects there. What it knows of the file itself stands in the redirect
    (X-Linked-Etag, X-Linked-Size); the ETag of the store behind it means nothing to us.
    """
    total = response.headers.get("Content-Range", "").rpartition("/")[2] or response.headers.get("Content-Length", "")
    expected = int(total) if total.isdigit() and "Content-Encoding" not in response.headers else size
    if not hub:
        return expected, None
    chain = [*response.history, response]
    linked = [answer.headers for answer in chain if "X-Linked-Etag" in answer.headers]
    if linked:
        tag, linked_size = linked[-1]["X-Linked-Etag"], linked[-1].get("X-Linked-Size", "")
        expected = int(linked_size) if linked_size.isdigit() else expected
    elif urlsplit(response.url).netloc == urlsplit(hub_endpoint()).netloc:
        tag = response.headers.get("ETag", "")
    else:
        tag = ""
    tag = tag.removeprefix("W/").strip('"').lower()
    return expected, tag if re.fullmatch("[0-9a-f]{40}|[0-9a-f]{64}", tag) else None


def _check(url: str, file: BinaryIO, size: int | None, digests: set[str]) -> None:
    """Compare the partial file with its size and checksums; what does not fit is deleted: the next try starts anew."""
    have = file.seek(0, os.SEEK_END)
    wrong = None
    if size is not None and have != size:
        wrong = f"{have:,} bytes came where {size:,} are expected"
    for expected in digests:
        file.seek(0)
        if len(expected) == 64:
            name, found = "SHA-256", hashlib.file_digest(file, "sha256").hexdigest()
        else:  # git's blob id
            name, found = "git SHA-1", _git_blob(file, have)
        if found != expected and not wrong:
            wrong = f"the content's {name} is {found}, not {expected}"
    if wrong:
        _restart(file, None)
        raise UserError(f"{url}: {wrong}; the download was deleted, try again (or the file there has changed)")


def _git_blob(file: BinaryIO, size: int) -> str:
    def start():
        return hashlib.sha1(b"blob %d\0" % size, usedforsecurity=False)

    return hashlib.file_digest(file, start).hexdigest()


def _is_passing(error: Exception) -> bool:
    """Whether waiting a second may mend it: a connection that stood and was cut or fell silent, or a busy server."""
    if isinstance(error, requests.exceptions.ReadTimeout | requests.exceptions.ChunkedEncodingError | _Retry):
        return True
    return bool(error.args) and isinstance(error.args[0], ProtocolError | ReadTimeoutError)


def _cut(url: str, have: int, expected: int | None, resumable: bool) -> UserError:
    of = f" of {expected:,}" if expected is not None else ""
    again = "the same command goes on from there" if resumable and have else "start the same command again"
    return UserError(f"{url}: connection cut after {have:,}{of} bytes; {again}")


def _explain(url: str, error: Exception, dest: Path) -> UserError:
    """One line for a request without an answer. Never the exception's own text: it may hold a signed address."""
    request = getattr(error, "request", None)  # after a redirect, not the host we asked first
    host = urlsplit(request.url).netloc if request is not None and request.url else urlsplit(url).netloc
    reason = getattr(error.args[0], "reason", None) if error.args else None  # a MaxRetryError's
    help = f"check the network and the address, or put the file at {dest} yourself"
    if isinstance(error, _Retry):
        return UserError(f"{url}: the server answers with status {error.status}; try again later")
    if isinstance(error, requests.Timeout):
        return UserError(f"{url}: no answer from {host} in time; {help}")
    if _is_passing(error):
        return UserError(f"{url}: {host} cuts the connection before its answer; {help}")
    if isinstance(error, requests.exceptions.ProxyError):
        return UserError(f"{url}: no way through the proxy to {host} (HTTPS_PROXY); {help}")
    if isinstance(error, requests.exceptions.SSLError):
        return UserError(f"{url}: no trusted TLS connection to {host}; {help}")
    if type(reason).__name__ == "NameResolutionError":  # by name: urllib3 1.x does not have it
        return UserError(f"{url}: no such host as {host}; {help}")
    if isinstance(error, requests.ConnectionError):
        return UserError(f"{url}: {host} refuses the connection; {help}")
    return UserError(f"{url}: not an address to download from ({type(error).__name__}); {help}")


class Progress:
    """How far a download is, on stderr: a live line on a terminal, else a line at each quarter. Tiny files: nothing."""

    def __init__(self, name: str):
        self.name, self.total, self.live = name, None, sys.stderr.isatty()
        self.begun = self.shown = 0.0
        self.quarter = self.have = self.first = 0
        self.open = False

    def start(self, have: int, total: int | None) -> None:
        """A request was answered: `have` bytes are here already, `total` (or None) is the whole."""
        self.first, self.total, self.begun = have, total, time.monotonic()
        if total:
            self.quarter = 4 * have // total

    def update(self, have: int) -> None:
        now = time.monotonic()
        if max(have, self.total or 0) <= TINY:
            return
        if self.live and now - self.shown > 0.2:
            self._write(have, "\r", "\x1b[K")
        elif not self.live and (not self.shown or (self.total and self.quarter < 4 * have // self.total < 4)):
            self._write(have, "", "\n")
            self.quarter = 4 * have // self.total if self.total else 0

    def finish(self, have: int) -> None:
        """The last byte is here."""
        if have > TINY:
            self._write(have, "\r" if self.live else "", "\x1b[K" if self.live else "\n")

    def close(self) -> None:
        if self.open:
            print(file=sys.stderr)

    def _write(self, have: int, before: str, after: str) -> None:
        self.shown = now = time.monotonic()
        speed = (have - self.first) / max(now - self.begun, 1e-3)
        text = f"{self.name}: {have / 1e6:.1f} MB"
        if self.total:
            text = f"{self.name}: {100 * have // self.total}% of {self.total / 1e6:.1f} MB"
        if speed > 0:
            text += f", {speed / 1e6:.1f} MB/s"
            if self.total and have < self.total:
                text += f", {(self.total - have) / speed:.0f} s left"
        print(before + text, end=after, file=sys.stderr, flush=True)
        self.open = self.live
