"""Files: written whole or not at all, checked before the work begins, read with one plain sentence for what is wrong."""

import contextlib
import errno
import fcntl
import glob
import hashlib
import json
import os
import tomllib
import uuid
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from base.errors import UserError


def private(path: str | Path, end: str) -> Path:
    """A name beside `path` for what is not finished: one that no user has given to a file."""
    path = Path(path)
    return path.with_name(f".{path.name}.nanopref-{end}")


def write_whole(path: str | Path, content: str | bytes | Iterable[bytes]) -> None:
    """Write a file so that a reader sees the old content or all of the new one, also if the process or machine dies.

    The content (it may come in pieces) goes to a temporary file beside it, which is synced and renamed. Its name is unique: of
    two processes that write to one path, the last rename wins whole. What killed processes left there is deleted. Makes the
    folder where needed. Raises OSError, with nothing left behind.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    for stale in path.parent.glob(glob.escape(str(private(path.name, ""))) + "?" * 16):
        with contextlib.suppress(OSError), open(stale, "rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # an OSError where a process is still writing it
            stale.unlink()
    temporary = private(path, uuid.uuid4().hex[:16])
    try:
        with claim(temporary, wait=True) as file:
            content = content.encode() if isinstance(content, str) else content
            file.writelines([content] if isinstance(content, bytes) else content)
            file.flush()
            os.fsync(file.fileno())
            os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def claim(path: str | Path, wait: bool = False) -> IO | None:
    """Hold the lock file `path` until what is returned is closed, or this process ends. None if another process holds it; with
    `wait` this one waits for that.

    A file system without locks cannot say who holds it: there the claim is taken on trust.
    """
    while True:
        lock = open(path, "ab")  # noqa: SIM115
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            lock.close()
            return None
        except OSError as error:
            if error.errno not in (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP):
                raise
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(lock.fileno()), os.stat(path)):
                return lock
        lock.close()  # its last holder has deleted it since it was opened


@contextlib.contextmanager
def held(path: str | Path, busy: str = "") -> Iterator[None]:
    """Be the only process that writes `path` until the block ends. Where another one does, wait, or raise UserError(busy)."""
    lock = claim(private(path, "lock"), wait=not busy)
    if lock is None:
        raise UserError(busy)
    with lock:
        try:
            yield
        finally:
            Path(lock.name).unlink(missing_ok=True)


def check_file(key: str, path: str) -> None:
    """Raise UserError if `path`, the value of config key `key`, cannot become a file. An empty path passes."""
    if path and Path(path).is_dir():
        raise UserError(f"key {key}: {path} is a folder: name a file in it")
    parent = next((p for p in Path(path).absolute().parents if p.exists()), None)
    if path and not (parent and parent.is_dir() and os.access(parent, os.W_OK)):
        raise UserError(f"key {key}: {path} cannot be written: {parent} is no folder that you may write to")


def check_there(path: str) -> None:
    """Raise UserError if there is no file or folder `path`."""
    if not os.path.exists(path):
        raise UserError(f"{path}: no such file or folder: check the path")


def lies_in(path: str | Path, place: str | Path) -> bool:
    """Whether `path` is `place`, or lies in it: by other spellings, links and hard links, too."""
    path, place = Path(os.path.realpath(path)), Path(os.path.realpath(place))
    there = os.path.exists(place)  # Path.exists raises OSError for a text that is too long for a path
    return any(p == place or (there and os.path.exists(p) and p.samefile(place)) for p in (path, *path.parents))


def expand(path: str | Path) -> Path:
    """A path that may begin with ~; one of a user who is not there stays as it is."""
    return Path(os.path.expanduser(path))


def sha256_of(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sync(path: Path) -> None:
    """Wait until a file, or a folder's list of names, is on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def parse_json(text: str | bytes) -> Any:
    """What a JSON text says. ValueError for what is none, is nested too deeply, or has a whole number that no float holds."""
    try:
        return json.loads(text, parse_int=_whole_number)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def _whole_number(digits: str) -> int:
    if len(digits) > 300:
        raise ValueError(f"a number of {len(digits):,} digits")
    return int(digits)


def parse_toml(text: str) -> dict:
    """What a TOML text says. ValueError for what is none, or is nested too deeply."""
    if any(line.count(".") > 1000 for line in text.splitlines()):  # tomllib takes the square of a dotted key's length
        raise ValueError("a key of more than 1,000 parts")
    try:
        return tomllib.loads(text)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def read_plain(path: Path) -> bytes:
    """A file's content. OSError if it cannot be read, UserError for what is no file: to read a pipe would never end."""
    if path.exists() and not path.is_file():
        raise UserError(f"{path} is no file: copy it again")
    return path.read_bytes()


def read_json(path: Path) -> dict:
    """The object in a JSON file, {} if there is no such file; UserError if it does not hold one."""
    if not path.exists():
        return {}
    try:
        value = parse_json(read_plain(path).decode())
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is not valid JSON ({error}): copy it again") from None
    if not isinstance(value, dict):
        raise UserError(f"{path} does not hold a JSON object: copy it again")
    return value


def write_json(path: Path, value: dict, indent: int | None = 2) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, ensure_ascii=False, indent=indent) + "\n", encoding="utf-8")


def read_safetensors(path: Path, help: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of a small safetensors file by name, and its metadata. For any other file a UserError that ends in `help`."""
    try:
        with safe_open(path, "pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} is damaged or no .safetensors file ({error}): {help}") from None
