"""Files that are written whole or not at all, and checks and locks of files."""

import fcntl
import json
import os
import uuid
from pathlib import Path
from typing import IO

from safetensors.torch import save
from torch import Tensor

from base.errors import UserError


def write_whole(path: str | Path, content: str | bytes) -> None:
    """Write a file so that a reader sees the old content or all of the new one, also if the process or machine dies.

    The content goes to a temporary file beside it, which is synced and renamed. Its name is unique: of two processes that
    write to one path, the last rename wins whole. Makes the folder where needed. Raises OSError, with nothing left behind.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def lock(file: IO) -> bool:
    """Lock an open file for this process until it is closed; False if another process holds the lock.

    Where the file system has no locks the answer is True: there is no way to know.
    """
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        pass
    return True


def safetensors_bytes(tensors: dict[str, Tensor], metadata: dict[str, str]) -> bytes:
    """The bytes of a safetensors file, equal for equal content. The library alone writes metadata in a random order."""
    content = save(tensors, metadata)
    end = 8 + int.from_bytes(content[:8], "little")  # a length of 8 bytes, a header of JSON, the tensors
    header = json.dumps(json.loads(content[8:end]) | {"__metadata__": metadata}).encode()
    header += b" " * (-len(header) % 8)
    return len(header).to_bytes(8, "little") + header + content[end:]


def check_file(key: str, path: str) -> None:
    """Raise UserError if `path`, the value of config key `key`, cannot become a file. An empty path passes."""
    if path and Path(path).is_dir():
        raise UserError(f"key {key}: {path} is a folder: name a file in it")
    parent = next((p for p in Path(path).absolute().parents if p.exists()), None)
    if path and not (parent and parent.is_dir() and os.access(parent, os.W_OK)):
        raise UserError(f"key {key}: {path} cannot be written: {parent} is no folder that you may write to")
