"""What a user did wrong, and how every script says so: one line on stderr, exit status 2, no traceback."""

import errno
import os
import sys
from collections.abc import Callable

import torch.distributed as dist

PATHS = {errno.EACCES, errno.EPERM, errno.EROFS, errno.EISDIR, errno.ENOTDIR, errno.EEXIST, errno.ENAMETOOLONG, errno.ENOENT}


class UserError(Exception):
    """A mistake the user can mend. The message is one line: what, where (file:line or key), what to do."""


def run(main: Callable[[], int | None]) -> None:
    """Run a script's `main` and leave with its exit status; 2 after a one-line message for a user's mistake or a full disk.

    Everything that is not the user's doing raises with its traceback. Of several processes rank 0 speaks for all.
    """
    try:
        status = main() or 0
    except UserError as error:
        status = fail(error)
    except BrokenPipeError:
        status = 0  # `… | head` closed our stdout: not an error
    except OSError as error:
        where = f" while writing {error.filename}" if error.filename else ""
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            status = fail(f"no space left on the disk{where}: free some and start the same command again")
        elif error.errno in PATHS and error.filename:
            status = fail(f"{error.filename}: {error.strerror}: name another path or change its permissions")
        else:
            raise
    except RuntimeError as error:
        if not lost_another(error):
            raise
        print(f"rank {os.environ['RANK']}: another process of this job has ended ({str(error)[:80]!r})", file=sys.stderr)
        status = 1
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        status = 130
    if dist.is_initialized():  # a tidy end would wait for processes that may be gone
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)


def fail(message: object) -> int:
    """Print `error: message` on one line of stderr, of several processes only on rank 0; returns exit status 2."""
    if os.environ.get("RANK", "0") == "0":
        print("error: " + " ".join(str(message).split()), file=sys.stderr)
    return 2


def warn(message: str) -> None:
    """Print `warning: message` on stderr, of several processes only on rank 0."""
    if os.environ.get("RANK", "0") == "0":
        print(f"warning: {message}", file=sys.stderr)


def lost_another(error: RuntimeError) -> bool:
    """Whether a collective failed because its other end has gone."""
    words = (
        "Connection closed by peer",
        "Connection reset by peer",
        "Connection refused",
        "Broken pipe",
        "remote process exited",
        "Socket Timeout",
    )
    return dist.is_initialized() and any(word in str(error) for word in words)
