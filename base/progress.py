"""Progress of long work, on stderr."""

import re
import sys
import time


def duration(seconds: float) -> str:
    """42 -> "42s", 62 -> "1m02s", 3720 -> "1h02m"."""
    seconds = round(seconds)
    hours, minutes = seconds // 3600, seconds % 3600 // 60
    return f"{hours}h{minutes:02}m" if hours else f"{minutes}m{seconds % 60:02}s" if minutes else f"{seconds}s"


def count(n: int, what: str) -> str:
    """1, "pairs dropped" -> "1 pair dropped"; 1200, "pairs" -> "1,200 pairs"."""
    return "1 " + re.sub(r"^(\w+)s\b", r"\1", what) if n == 1 else f"{n:,} {what}"


class Progress:
    """Shows how far the work is, its speed and the time left: on a terminal a live line, elsewhere a line every ten seconds.

    name: what is being done. total: how much there is, counted in `unit`; None = not known. done: how much of it was done
    before. rank: of several processes each counts its own share, and only rank 0 shows it. Nothing is shown where there is
    nothing to do.
    """

    def __init__(self, name: str, total: float | None, unit: str, rank: int = 0, *, done: float = 0):
        self.name, self.total, self.unit = name, total, unit
        self.silent = rank > 0 or total == 0
        self.live = sys.stderr.isatty()
        self.first = self.done = done
        self.start = self.last = time.monotonic()

    def add(self, n: float) -> None:
        """`n` more are done."""
        self.done += n
        now = time.monotonic()
        if now - self.last >= (0.5 if self.live else 10):
            self.last = now
            self._show(end="" if self.live else "\n")

    def close(self) -> float:
        """End the live line, if one was shown. Returns the seconds since the start."""
        if self.live and self.last > self.start:
            self._show(end="\n")
        return time.monotonic() - self.start

    def _show(self, end: str) -> None:
        if self.silent:
            return
        rate = (self.done - self.first) / max(time.monotonic() - self.start, 1e-9)
        at, left = f"{self.done:,.0f} {self.unit}", ""
        if self.total is not None:
            at, left = f"{100 * self.done / self.total:3.0f}%", f"  {duration((self.total - self.done) / max(rate, 1e-9))} left"
        text = f"{self.name} {at}  {rate:,.1f} {self.unit}/s{left}"
        print(f"{chr(13) if self.live else ''}{text:<70}", end=end, file=sys.stderr, flush=True)
