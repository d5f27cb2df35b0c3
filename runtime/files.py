"""Files that are there whole or not at all."""

import os
from pathlib import Path


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
