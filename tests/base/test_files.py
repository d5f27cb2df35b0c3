"""Whole files and the progress line."""

import errno
import threading

import pytest

from base import progress
from base.files import write_whole
from base.progress import Progress, duration


def test_two_writers_to_one_path_leave_one_content_whole(tmp_path):
    path = tmp_path / "new" / "file"
    contents = [bytes([i]) * 300_000 for i in range(4)]
    threads = [threading.Thread(target=lambda c=c: [write_whole(path, c) for _ in range(10)]) for c in contents]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        assert not path.exists() or path.read_bytes() in contents
    assert [p.name for p in path.parent.iterdir()] == ["file"]


def test_a_write_that_fails_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "file"
    write_whole(path, "old")

    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_whole(path, "new")
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("live", [False, True])
def test_progress(monkeypatch, capsys, live):
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    monkeypatch.setattr("sys.stderr.isatty", lambda: live)
    bar = Progress("big.bin", 100, "MB", done=20)
    for now[0], n in ((100.1, 2), (120.0, 38)):
        bar.add(n)
    now[0] = 140.0
    assert bar.close() == 40
    shown = capsys.readouterr().err
    assert "big.bin  60%  2.0 MB/s  20s left" in shown, "the speed counts what came since the start"
    assert shown.count("\n") == 1 and shown.count("\r") == (2 if live else 0)
    for silent in (Progress("x", 0, "rows"), Progress("x", 9, "rows", rank=1)):
        now[0] += 60
        silent.add(1)
        silent.close()
    Progress("x", 9, "rows").close()
    assert capsys.readouterr().err == ""
    bar = Progress("x", None, "rows")
    now[0] += 60
    bar.add(120)
    assert "x 120 rows  2.0 rows/s" in capsys.readouterr().err


def test_duration():
    assert [duration(s) for s in (0.6, 59.4, 62, 3600)] == ["1s", "59s", "1m02s", "1h00m"]
