"""Files: written whole or not at all, checked before the work begins, read with one plain sentence for what is wrong."""

import errno
import fcntl
import json
import os
import uuid
from collections.abc import Iterable
from pathlib import Path
from typing import IO

from safetensors import SafetensorError, safe_open
from torch import Tensor

from base.errors import UserError


def write_whole(path: str | Path, content: str | bytes | Iterable[bytes]) -> None:
    """Write a file so that a reader sees the old content or all of the new one, also if the process or machine dies.

    The content (it may come in pieces) goes to a temporary file beside it, which is synced and renamed. Its name is unique: of
    two processes that write to one path, the last rename wins whole. Makes the folder where needed. Raises OSError, with
    nothing left behind.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        with open(temporary, "wb") as file:
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
    lock = open(path, "a")  # noqa: SIM115
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        lock.close()
        return None
    except OSError as error:
        if error.errno not in (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP):
            raise
    return lock


def check_file(key: str, path: str) -> None:
    """Raise UserError if `path`, the value of config key `key`, cannot become a file. An empty path passes."""
    if path and Path(path).is_dir():
        raise UserError(f"key {key}: {path} is a folder: name a file in it")
    parent = next((p for p in Path(path).absolute().parents if p.exists()), None)
    if path and not (parent and parent.is_dir() and os.access(parent, os.W_OK)):
        raise UserError(f"key {key}: {path} cannot be written: {parent} is no folder that you may write to")


def sync(path: Path) -> None:
    """Wait until a file, or a folder's list of names, is on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def read_json(path: Path) -> dict:
    """The object in a JSON file, {} if there is no such file; UserError if it does not hold one."""
    if not path.exists():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
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
