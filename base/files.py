"""Files that are written whole or not at all, and a check of where they go."""

import os
import uuid
from pathlib import Path

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


def check_file(key: str, path: str) -> None:
    """Raise UserError if `path`, the value of config key `key`, cannot become a file. An empty path passes."""
    if path and Path(path).is_dir():
        raise UserError(f"key {key}: {path} is a folder: name a file in it")
    parent = next((p for p in Path(path).absolute().parents if p.exists()), None)
    if path and not (parent and parent.is_dir() and os.access(parent, os.W_OK)):
        raise UserError(f"key {key}: {path} cannot be written: {parent} is no folder that you may write to")
