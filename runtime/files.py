"""Files that are there whole or not at all."""

import os
from pathlib import Path

from runtime.errors import UserError


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


def check_file(key: str, path: str) -> None:
    """Raise UserError, before the work is done, if `path` (of config key `key`, may be empty) cannot become a file."""
    if path and Path(path).is_dir():
        raise UserError(f"key {key}: {path} is a folder: name a file in it")
    parent = next((p for p in Path(path).absolute().parents if p.exists()), None)
    if path and not (parent and parent.is_dir() and os.access(parent, os.W_OK)):
        raise UserError(f"key {key}: {path} cannot be written: {parent} is no folder that you may write to")
