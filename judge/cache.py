"""The judge's answers on disk, so that no answer is paid for twice."""

import contextlib
import json
import threading
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from base.errors import UserError, warn
from base.files import held, read_plain

START = '{"key": "'  # of each line


def is_count(value: object) -> bool:
    return type(value) is int and 0 <= value < 2**53


@dataclass(frozen=True)
class Reply:
    """A judge's answer. `end`: why it ended, if not because the judge was done ("ended by length").

    Raises TypeError for a value of another type, which a server may send or a file may hold.
    """

    text: str
    tokens_in: int = 0
    tokens_out: int = 0
    end: str = ""

    def __post_init__(self) -> None:
        texts, counts = (self.text, self.end), (self.tokens_in, self.tokens_out)
        if not (all(isinstance(t, str) for t in texts) and all(map(is_count, counts))):
            raise TypeError("a reply is a text, two counts of tokens and a text")


class Cache:
    """A JSONL file of replies, a line each, found by the hash of what was asked.

    A line has left this process when `put` returns, so a killed evaluation keeps all its answers. A line cut by a full
    disk is skipped at the next start, and its question is asked again. UserError if the file holds something else.
    """

    def __init__(self, path: Path):
        self.path, self.found, self.lock = path, {}, threading.Lock()
        content, damaged = read_plain(path).decode(errors="replace") if path.exists() else "", 0
        if content.strip() and not any(START.startswith(line[: len(START)]) for line in content.split("\n") if line):
            raise UserError(f"key cache: {path} holds no answers of a judge: name another file")
        for line in content.splitlines():
            try:
                record = json.loads(line)
                asked = record.pop("key")
                self.found[asked] = Reply(**record)
            except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
                damaged += 1
        if damaged:
            warn(f"{path}: {damaged} damaged lines are skipped, what they answered is asked again")
        if content and not content.endswith("\n"):
            self._append("\n")

    def put(self, key: str, reply: Reply) -> None:
        with self.lock:
            self._append(json.dumps({"key": key, **asdict(reply)}) + "\n")
            self.found[key] = reply

    def _append(self, text: str) -> None:
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(text)


@contextlib.contextmanager
def open_cache(path: str | Path) -> Iterator[Cache]:
    """The cache in a file, for this process alone until the block ends. UserError if another process uses it."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with held(path, f"{path}: another evaluation is using it: wait, or name another file with --cache"):
        yield Cache(Path(path))
