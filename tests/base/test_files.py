"""Whole files and the progress line."""

import errno
import fcntl
import os
import threading

import pytest

from base import progress
from base.errors import UserError
from base.files import claim, expand, held, parse_json, parse_toml, private, read_json, read_plain, write_whole
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


def test_what_a_killed_writer_left_is_deleted(tmp_path):
    """Not what another process is still writing, nor a file of a user that has a similar name."""
    path = tmp_path / "file[1]"
    stale, live = (private(path, letter * 16) for letter in "ab")
    users = {"file[1].0123456789abcdef.tmp", "file[1].tmp", "file[1].old", private(path, "b" * 15).name, "file1.lock"}
    for name in (stale.name, live.name, *users):
        (tmp_path / name).write_text("half")
    with claim(live):
        write_whole(path, "whole")
        assert {p.name for p in tmp_path.iterdir()} == {path.name, live.name, *users}
    write_whole(path, "whole")
    assert {p.name for p in tmp_path.iterdir()} == {path.name, *users} and path.read_text() == "whole"


def test_where_there_are_no_locks_files_are_written_as_well(tmp_path, monkeypatch):
    def no_locks(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    stale = private(tmp_path / "file", "a" * 16)  # or another process writes it: nobody can know
    stale.touch()
    write_whole(tmp_path / "file", "new")
    assert {p.name for p in tmp_path.iterdir()} == {"file", stale.name}


def test_a_lock_file_that_its_holder_deletes_is_no_lock_any_more(tmp_path):
    """Who waited for it takes a new one, as others do. Of four at a time there is never more than one."""
    inside, most = [], []

    def work():
        for _ in range(50):
            with held(tmp_path / "file"):
                inside.append(1)
                most.append(len(inside))
                inside.pop()

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(most) == 200 and set(most) == {1} and not list(tmp_path.iterdir())


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


@pytest.mark.parametrize("text", ["[" * 10**5, '{"a":' * 10**5, "1" * 301, "-" + "1" * 5000, "{", ""])
def test_json_that_is_none(text):
    with pytest.raises(ValueError):
        parse_json(text)
    assert parse_json('{"a": [1, 1e999, NaN]}')["a"][0] == 1


@pytest.mark.parametrize("text", ["a = " + "[" * 5000 + "]" * 5000, "a." * 30_000 + "a = 1", "[a" + ".a" * 30_000 + "]", "a"])
def test_toml_that_is_none(text):
    """tomllib would take 3.5 GB for the dotted key of 60 kB."""
    with pytest.raises(ValueError):
        parse_toml(text)
    assert parse_toml("a.b = 1.5") == {"a": {"b": 1.5}}


def test_a_pipe_is_not_read(tmp_path):
    os.mkfifo(tmp_path / "pipe.json")
    for read in (read_plain, read_json):
        with pytest.raises(UserError, match=r"pipe\.json is no file"):
            read(tmp_path / "pipe.json")
    with pytest.raises(FileNotFoundError):
        read_plain(tmp_path / "none")
    assert read_json(tmp_path / "none") == {} and str(expand("~no_such_user/x")) == "~no_such_user/x"
