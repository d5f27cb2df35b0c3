"""Files that are there whole or not at all."""

import fcntl
import json
import os
from pathlib import Path
from typing import IO

from safetensors.torch import save
from torch import Tensor

from base.errors import UserError


def write_whole(path: str | Path, content: str | bytes) -> None:
    """Write a file under another name, sync it, and rename it into place, making its folder where needed."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise


def lock(file: IO) -> bool:
    """Make an open file this process's own until it is closed; False if it is another's. A file system without locks has none
    to give: then it is taken on trust."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        pass
    return True


def safetensors_bytes(tensors: dict[str, Tensor], metadata: dict[str, str]) -> bytes:
    """A safetensors file's bytes, the same for the same content: the library puts metadata in an order drawn anew each time."""
    content = save(tensors, metadata)
    end = 8 + int.from_bytes(content[:8], "little")  # a length of 8 bytes, a header of JSON, the tensors
    header = json.dumps(json.loads(content[8:end]) | {"__metadata__": metadata}).encode()
    header += b" " * (-len(header) % 8)
    return len(header).to_bytes(8, "little") + header + content[end:]


def check_file(key: str, path: str) -> None:
    """Raise UserError, before the work is done, if `path` (of config key `key`, may be empty) cannot become a file."""
    if path and Path(path).is_dir():
        raise UserError(f"key {key}: {path} is a folder: name a file in it")
    parent = next((p for p in Path(path).absolute().parents if p.exists()), None)
    if path and not (parent and parent.is_dir() and os.access(parent, os.W_OK)):
        raise UserError(f"key {key}: {path} cannot be written: {parent} is no folder that you may write to")
