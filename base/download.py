"""Files from the web and from the Hugging Face hub: resumed after a cut, checked, and whole or absent.

A download grows in `NAME.partial` beside its place. `NAME.partial.etag` holds the server's ETag: what identifies the
content that the part belongs to. Only when size and checksum fit is the partial file renamed to `NAME`. No request is
made for a file that is already there, or that the hub's own client has downloaded before.
"""

import contextlib
import hashlib
import os
import re
import time
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import quote, urlsplit

import requests

from base.errors import UserError
from base.files import claim
from base.http import explain, reached, retry_after, send, within
from base.progress import Progress

TRIES = 5  # requests in a row that bring nothing new
DELAY = 1.0  # seconds before the second try, doubled for each further one
LONGEST = 60.0  # seconds: the most that is waited because a server asks for it
TIMEOUT = (15, 60)  # seconds to connect, seconds to wait for an answer or a chunk
CHUNK = 64 * 1024  # bytes; small, because a cut connection loses the chunk that was being filled


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
    """The file `name` of a hub repository ("gpt2", "org/name", "datasets/org/name"), from its main branch.

    Looks into our cache first, then into that of the hub's own client, then downloads. Raises NotFound where the hub has no
    such file, UserError for all that can go wrong on the way (see `fetch`).
    """
    url = f"{hub_endpoint()}/{repo}/resolve/main/{quote(name)}"
    return _cached(repo, name) or fetch(url, cache_dir() / "hub" / repo / name)


def hub_find(repo: str, names: Sequence[str]) -> Path | None:
    """The first of `names` that the repository has, as a local file; None where it has none of them.

    The caches are looked through first, for all of the names: what was downloaded once is found without a network.
    """
    for find in (_cached, hub_file):
        for name in names:
            with contextlib.suppress(NotFound):
                if path := find(repo, name):
                    return path
    return None


def hub_files(repo: str, names: Sequence[str]) -> dict[str, Path]:
    """Those of `names` that a repository has, as local files. Where the last one is in a cache, all were asked for then, and no
    request is made. Errors as for `hub_file`."""
    complete, found = _cached(repo, names[-1]) is not None, {}
    for name in names:
        with contextlib.suppress(NotFound):
            if path := _cached(repo, name) if complete else hub_file(repo, name):
                found[name] = path
    return found


def fetch(url: str, dest: Path | str, *, sha256: str | None = None) -> Path:
    """Download `url` to `dest`, checked and whole, or raise and leave `dest` absent; returns `dest`.

    A `dest` that is already there (and has the `sha256` asked for, where one is) is returned without a request. Several
    processes may ask for the same `dest`: one downloads, the others wait for it.

    sha256: hex digest the content must have. The server's own statement of the size is always checked, and a hub's
    statement of the checksum. HF_TOKEN is sent to the hub's own host only.

    Raises NotFound (404) and UserError: no connection, refused, cut (the partial file stays, the next call goes on from
    there), wrong size or checksum (the partial file is deleted), a disk that is full or cannot be written.
    """
    dest = Path(dest)
    if _is_there(dest, sha256):
        return dest
    partial = dest.with_name(dest.name + ".partial")
    try:
        dest.parent.mkdir(parents=True, exist_ok=True)
        lock = claim(dest.parent / ".lock", wait=True)
        try:
            if not _is_there(dest, sha256):  # another process may have been faster
                size, digest = _download(url, dest, partial)
                _check(url, partial, size, [d for d in (sha256, digest) if d])
                os.replace(partial, dest)
                _etag_file(partial).unlink()
        finally:
            lock.close()
    except OSError as error:
        what = f"cannot write {error.filename or partial}: {error.strerror}"
        raise UserError(f"{what}; make room there, or name another folder for downloads with NANOPREF_CACHE") from error
    return dest


def _cached(repo: str, name: str) -> Path | None:
    """Where an earlier download of ours, or of the hub's own client, put a file."""
    if any(part in ("", ".", "..") for part in f"{repo}/{name}".split("/")):
        raise UserError(f"{repo}/{name}: not the name of a file on the hub")
    ours = cache_dir() / "hub" / repo / name
    if ours.is_file():
        return ours
    home = Path(os.environ.get("HF_HOME") or "~/.cache/huggingface")
    root = Path(os.environ.get("HF_HUB_CACHE") or home / "hub").expanduser()
    known = repo if repo.startswith("datasets/") else f"models/{repo}"
    for kind, *owner in (known.split("/"), ["models", "openai-community", repo]):  # "gpt2" is openai-community's
        folder = root / "--".join([kind, *owner])
        with contextlib.suppress(OSError):
            theirs = folder / "snapshots" / (folder / "refs" / "main").read_text().strip() / name
            if theirs.is_file():
                return theirs
    return None


def _is_there(dest: Path, sha256: str | None) -> bool:
    return dest.is_file() and (sha256 is None or _digest(dest, 64) == sha256.lower())


def _etag_file(partial: Path) -> Path:
    return partial.with_name(partial.name + ".etag")


def _restart(partial: Path, etag: str = "") -> None:
    """Empty the partial file. What comes next belongs to `etag`; without one it cannot be resumed."""
    partial.write_bytes(b"")  # first: bytes of one ETag must never stand beside another
    _etag_file(partial).write_text(etag)


def _download(url: str, dest: Path, partial: Path) -> tuple[int | None, str | None]:
    """Bring `partial` to the whole content of `url`. Returns its size and checksum as the server states them (or None)."""
    failed, best, answered = 0, 0, False
    while True:
        try:
            response = _request(url, partial)
            answered = True
            size, digest = _statement(response)
            _receive(response, partial, dest.name, size)
            return size, digest
        except requests.RequestException as error:
            have = partial.stat().st_size if partial.exists() else 0
            failed = failed + 1 if have <= best else 1
            best = max(best, have)
            # No connection at all is told at once. If there was one before, the network went away: wait for it.
            if failed >= TRIES or not (answered or reached(error)):
                host = urlsplit(error.request.url if error.request is not None else url).netloc  # a redirect leads elsewhere
                todo = f"check the address and the network and try again, or put the file at {dest} yourself"
                if have:
                    todo = f"start the same command again, it goes on after {have:,} bytes if the server can"
                raise UserError(f"{url}: {explain(error)} (host {host}): {todo}") from None
            time.sleep(max(DELAY * 2 ** (failed - 1), min(retry_after(error.response), LONGEST)))


def _request(url: str, partial: Path) -> requests.Response:
    """Ask for what `partial` lacks of `url`. On return it ends where the response's body begins.

    Raises NotFound, UserError, and requests' exceptions for what may be mended by another try.
    """
    headers = {}
    etag = _etag_file(partial).read_text() if _etag_file(partial).exists() else ""
    have = partial.stat().st_size - 1 if etag and partial.exists() else 0
    if have > 0:
        os.truncate(partial, have)  # one byte less, so that a partial file that is whole asks for a range that exists
        headers = {"Range": f"bytes={have}-", "If-Range": etag}
    token = os.environ.get("HF_TOKEN", "").strip() if _on_hub(url) else ""
    response = within(sum(TIMEOUT), lambda: send("GET", url, token, headers, timeout=TIMEOUT))
    status = response.status_code
    if status == 200:
        etag = response.headers.get("ETag", "")
        _restart(partial, etag if etag.startswith('"') else "")  # a weak ETag (W/"…") does not identify bytes
        return response
    ours = re.match(rf"bytes {have}-\d+/", response.headers.get("Content-Range", ""))
    if status == 206 and ours and response.headers.get("ETag", etag) == etag:
        return response
    if status in (206, 416):  # another range than ours, or one of another content: start over
        _restart(partial)
    if status in (206, 416, 429) or status >= 500:
        raise requests.HTTPError(response=response)
    if status == 404:
        raise NotFound(f"{url}: no such file there (404); check the name")
    help = "check the name, or, if the file is gated or private, set HF_TOKEN to a token that may read it"
    raise UserError(f"{url}: the server answers with status {status}; {help}")


def _on_hub(url: str) -> bool:
    return urlsplit(url).netloc == urlsplit(hub_endpoint()).netloc


def _statement(response: requests.Response) -> tuple[int | None, str | None]:
    """Size and checksum of the whole content, as the server states them. Only a hub states a checksum, in its ETag.

    The hub keeps large files elsewhere and redirects there. Their checksum stands in the redirect (X-Linked-Etag); the
    ETag of the store behind it means nothing to us.
    """
    total = response.headers.get("Content-Range", "").rpartition("/")[2] or response.headers.get("Content-Length", "")
    size = int(total) if total.isdigit() else None
    answers = [answer for answer in (*response.history, response) if _on_hub(answer.url)]
    tags = [answer.headers.get("X-Linked-Etag") or answer.headers.get("ETag", "") for answer in answers]
    tag = tags[-1].removeprefix("W/").strip('"').lower() if tags else ""
    return size, tag if re.fullmatch("[0-9a-f]{40}|[0-9a-f]{64}", tag) else None


def _receive(response: requests.Response, partial: Path, name: str, size: int | None) -> None:
    """Append the response's body to the partial file."""
    progress = Progress(name, size and size / 1e6, "MB", done=partial.stat().st_size / 1e6)
    chunks = response.iter_content(CHUNK)
    with open(partial, "ab") as file, contextlib.closing(progress):
        while chunk := within(TIMEOUT[1], lambda: next(chunks, b"")):
            progress.add(file.write(chunk) / 1e6)
        file.flush()
        os.fsync(file.fileno())


def _check(url: str, partial: Path, size: int | None, digests: list[str]) -> None:
    """Compare the partial file with its size and checksums. One that does not fit is deleted: the next try starts anew."""
    have = partial.stat().st_size
    wrong = [] if size in (None, have) else [f"{have:,} bytes came where {size:,} are expected"]
    wrong += [f"the content's checksum is not {d}" for d in digests if _digest(partial, len(d)) != d.lower()]
    if wrong:
        partial.unlink()
        _etag_file(partial).unlink()
        raise UserError(f"{url}: {wrong[0]}; the download was deleted, try again (or the file there has changed)")


def _digest(path: Path, length: int) -> str:
    """The file's SHA-256 (64 hex digits), or its SHA-1 as a git blob (40 hex digits): the hub's two kinds of checksum."""
    with open(path, "rb") as file:
        if length == 64:
            return hashlib.file_digest(file, "sha256").hexdigest()
        start = hashlib.sha1(b"blob %d\0" % path.stat().st_size, usedforsecurity=False)
        return hashlib.file_digest(file, lambda: start).hexdigest()
