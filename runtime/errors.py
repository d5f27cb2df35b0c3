"""What a user did wrong, and how every script says so: one line on stderr, exit status 2, no traceback."""

import errno
import sys
from collections.abc import Callable

PATHS = {errno.EACCES, errno.EPERM, errno.EROFS, errno.EISDIR, errno.ENOTDIR, errno.EEXIST, errno.ENAMETOOLONG, errno.ENOENT}


class UserError(Exception):
    """A mistake the user can mend. The message is one line: what, where (file:line or key), what to do."""


def run(main: Callable[[], int | None]) -> None:
    """Run a script's `main` and leave with its exit status; 2 after a one-line message for a user's mistake or a full disk.

    Everything that is not the user's doing raises with its traceback.
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
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        status = 130
    sys.exit(status)


def fail(message: object) -> int:
    """Print `error: message` on one line of stderr; returns exit status 2."""
    print("error: " + " ".join(str(message).split()), file=sys.stderr)
    return 2
