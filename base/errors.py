"""What a user did wrong, and how every script says so: one line on stderr, exit status 2, no traceback."""

import errno
import os
import sys
import traceback
from collections.abc import Callable

import torch
import torch.distributed as dist


class UserError(Exception):
    """A mistake the user can mend. The message is one line: what, where (file:line or key), what to do.

    Usually every process of a job meets the same mistake, and only rank 0 prints it. here=True: only this process met it,
    so it prints the message whatever its rank.
    """

    def __init__(self, message: str, here: bool = False):
        super().__init__(message)
        self.here = here


def run(main: Callable[[], int | None], alone: bool = False) -> None:
    """Run a script's `main` and exit with the status that it returns (None = 0).

    A user's mistake, a full disk or a path that cannot be used ends in one line on stderr and exit status 2. Any other
    exception is a bug and shows its traceback. alone: the script cannot share its work between processes, so under torchrun
    only rank 0 runs it and the others exit at once.
    """
    if alone and os.environ.get("RANK", "0") != "0":
        sys.exit(0)
    try:
        status = _status_of(main)
    except Exception:
        if not dist.is_initialized():
            raise
        traceback.print_exc()
        status = 1
    if dist.is_initialized():  # a normal exit would wait for the other processes, and they may be gone
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)


def _status_of(main: Callable[[], int | None]) -> int:
    try:
        return main() or 0
    except UserError as error:
        return fail(error)
    except BrokenPipeError:
        return 0  # a reader such as `head` has closed our stdout
    except OSError as error:
        where = f" while writing {error.filename}" if error.filename else ""
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            return fail(f"no space left on the disk{where}: free some and start the same command again")
        if error.filename:
            return fail(f"{error.filename}: {error.strerror}: name another path or change its permissions")
        raise
    except (MemoryError, RuntimeError) as error:
        said = (str(error).splitlines() or [""])[0]
        if isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in said:
            return fail(
                UserError(f"out of memory ({said}): lower micro_tokens or batch_size, or take a smaller model", here=True)
            )
        if not lost_another(error):
            raise
        print(f"rank {os.environ['RANK']}: another process of this job has ended ({said!r})", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        return 130


def fail(message: object) -> int:
    """Print `error: message` as one line on stderr; returns exit status 2.

    Only rank 0 prints, unless `message` is a UserError with here=True.
    """
    if os.environ.get("RANK", "0") == "0" or getattr(message, "here", False):
        print("error: " + " ".join(str(message).split()), file=sys.stderr)
    return 2


def warn(message: str) -> None:
    """Print `warning: message` on stderr. Only rank 0 prints."""
    note(f"warning: {message}")


def note(message: str) -> None:
    """Print a line on stderr, also before a script has set its processes up. Only rank 0 prints."""
    if os.environ.get("RANK", "0") == "0":
        print(message, file=sys.stderr)


def lost_another(error: RuntimeError) -> bool:
    """Whether a collective operation failed because another process of the job has ended. gloo, which raises plain
    RuntimeErrors, names its source file in them."""
    return dist.is_initialized() and (isinstance(error, dist.DistError) or "gloo/transport" in str(error))
