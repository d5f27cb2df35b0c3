"""Samples of a run that was stopped: finished prompts beside the output file, for the same command to go on from."""

import contextlib
import json
import re
from pathlib import Path

from base.errors import UserError
from base.files import held, read_plain, write_whole
from runtime.run import restarted

FIRST = b'{"weights_sha256": "'  # how a part file begins


class Unfinished:
    """Finished prompts, kept in OUT.part0, OUT.part1, … (one a process) until all are: a killed run goes on from them.

    A part file's first line holds the settings that its completions follow from; then comes [prompt number, completions] a
    line. `done` has what an earlier run finished, on every rank.
    """

    def __init__(self, out: str, settings: dict, overwrite: bool, compute):
        self.out, self.settings, self.compute = Path(out), settings, compute
        self.overwrite = overwrite and not any(compute.gather(restarted()))
        self.stack = contextlib.ExitStack()  # of what is held until the end: on rank 0 the lock, too
        with self.stack:
            self.done: dict[int, list[str]] = compute.once(self._take_over)
            self.file = self.stack.enter_context(open(f"{out}.part{compute.rank}", "ab"))  # noqa: SIM115
            if compute.rank:
                self._write(settings)
            self.stack = self.stack.pop_all()

    def __enter__(self) -> "Unfinished":
        return self

    def __exit__(self, *_) -> None:
        self.stack.close()

    def _paths(self) -> list[Path]:
        name = re.compile(re.escape(self.out.name) + r"\.part[0-9]+")
        return sorted(p for p in self.out.parent.iterdir() if name.fullmatch(p.name))

    def _take_over(self) -> dict[int, list[str]]:
        """On rank 0: gather what earlier part files hold into the first one. Refuses files of other settings, or not ours."""
        self.out.parent.mkdir(parents=True, exist_ok=True)
        busy = f"key out: another process is writing {self.out}: wait, or name another file"
        self.stack.enter_context(held(self.out, busy))
        done = {}
        for path in self._paths():
            content = read_plain(path)
            if not FIRST.startswith(content[: len(FIRST)]):  # not with --overwrite either
                raise UserError(f"{path} was not written by sample.py: rename it, or name another --out")
            if self.overwrite:
                continue
            theirs, found = _parse(content)
            if found and theirs != self.settings:
                name = next((k for k in self.settings if theirs.get(k) != self.settings[k]), "key")
                was, now = theirs.get(name), self.settings.get(name)
                raise UserError(
                    f"{path} holds unfinished samples with another {name} ({was!r:.40}, here {now!r:.40}): "
                    "finish those, name another --out, or throw them away with --overwrite"
                )
            done |= found
        lines = [self.settings, *done.items()]
        write_whole(f"{self.out}.part0", "".join(json.dumps(line) + "\n" for line in lines))
        for path in self._paths()[1:]:
            path.unlink()
        return done

    def add(self, number: int, completions: list[str]) -> None:
        self._write([number, completions])

    def _write(self, line) -> None:
        self.file.write(json.dumps(line).encode() + b"\n")
        self.file.flush()  # a full disk is an OSError here

    def remove(self) -> None:
        Path(self.file.name).unlink(missing_ok=True)


def _parse(content: bytes) -> tuple[dict, dict[int, list[str]]]:
    """A part file's settings and its completions by prompt number, up to the first line that is not whole: there a kill, a
    power cut, a full disk or an editor came between."""
    settings, done = {}, {}
    for line in content.splitlines():
        try:
            value = json.loads(line)
        except (ValueError, RecursionError):
            break
        match value:
            case dict() if not settings:
                settings = value
            case [number, [*texts]] if type(number) is int and all(isinstance(t, str) for t in texts):
                if len(texts) != settings.get("n"):
                    break
                done[number] = texts
            case _:
                break
    return settings, done
