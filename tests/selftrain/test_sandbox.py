"""Programs shut in: what they may do, and that nothing else happens, is left behind, or goes unnoticed."""

import json
import os
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import pytest

from base.errors import UserError
from selftrain import grading, sandbox
from selftrain.sandbox import Refused, run_program

try:
    run_program("", 5)
    HERE = ""
except (Refused, OSError) as error:
    HERE = str(error)
needs_walls = pytest.mark.skipif(bool(HERE), reason=f"no program can be shut in here: {HERE}")


def processes(of: int) -> set[str]:
    """The numbers of all processes alive that the sandbox has started for the process `of`: other tests run beside this one."""
    found = set()
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = path.read_bytes().decode(errors="replace").split("\0")
        except OSError:
            continue
        if len(words) == 8 and words[3].endswith("sandbox.py") and words[6] == str(of):
            found.add(path.parent.name)
    return found


@needs_walls
def test_a_program_runs():
    ran = run_program("import math\nfrom fractions import Fraction\nprint(math.comb(5, 2) + Fraction(1, 2))", 20)
    assert (ran.output, ran.end) == ("21/2\n", "ok")
    assert run_program("open('x', 'w').write('hi')\nprint(open('x').read())", 20).output == "hi\n", "its own folder is writable"
    assert run_program("import os\nprint(os.listdir('.'))", 20).output == "[]\n", "and empty at first"
    assert (
        run_program("print(1", 20).end
        == run_program("1 / 0", 20).end
        == run_program("raise SystemExit(97)", 20).end
        == "failed"
    )


ATTACKS = {
    "loops for ever": ("while True: pass", "time"),
    "sleeps for ever": ("import time\ntime.sleep(1000)", "time"),
    "ignores signals": (
        "import signal\nfor n in (1, 2, 14, 15, 24): signal.signal(n, signal.SIG_IGN)\nwhile True: pass",
        "time",
    ),
    "leaves its session": ("import os\ntry: os.setsid()\nexcept OSError: pass\nwhile True: pass", "time"),
    "leaves its session for good": (
        "import ctypes, time\nl = ctypes.CDLL(None)\nl.setsid(), l.prctl(1, 0, 0, 0, 0)\ntime.sleep(30)",
        "time",
    ),
    "closes its output": ("import os\nos.close(1)\nwhile True: pass", "time"),
    "eats memory": ("a = []\nwhile True: a.append(bytearray(10**7))", "failed"),
    "eats shared memory": ("import ctypes\nassert ctypes.CDLL(None).shmget(0, 1 << 20, 0o1600) >= 0", "failed"),
    "forks": ("import os\nwhile True: os.fork()", "failed"),
    "starts a program": ("import os\nos.execv('/bin/sh', ['sh', '-c', 'echo 1'])", "failed"),
    "starts a thread": ("import threading\nthreading.Thread(target=print).start()", "failed"),
    "writes outside": ("open({outside!r}, 'w').write('x')", "failed"),
    "deletes outside": ("import os\nos.unlink({victim!r})", "failed"),
    "writes shared memory": ("open('/dev/shm/nanopref_evil', 'w')", "failed"),
    "fills its folder": ("f = open('x', 'wb')\nwhile True: f.write(bytes(10**6)); f.flush()", "failed"),
    "makes countless files": ("import os\nfor n in range(1000): os.mkdir(str(n))", "failed"),
    "writes to a device": ("open('/dev/null', 'w')", "failed"),
    "opens a socket": ("import socket\nsocket.create_connection(('127.0.0.1', {port}))", "failed"),
    "opens a unix socket": ("import socket\nsocket.socket(socket.AF_UNIX)", "failed"),
    "prints a gigabyte": ("for _ in range(1000): print('x' * 10**6)", "output"),
    "kills its parent": ("import os\nos.kill({pid}, 9)", "failed"),
    "raises its limits": ("import resource\nresource.setrlimit(resource.RLIMIT_AS, (-1, -1))", "failed"),
    "mounts": ("import ctypes\nl = ctypes.CDLL(None)\nassert l.mount(b'n', b'/', None, 0x1020, None) == 0", "failed"),
}


@needs_walls
@pytest.mark.parametrize("name", ATTACKS)
def test_attacks(tmp_path, name):
    """Stopped, without a trace: no process, no file, no connection; and as an answer it counts as none."""
    code, end = ATTACKS[name]
    victim, outside = tmp_path / "victim", tmp_path / "evil"
    victim.write_text("whole")
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.setblocking(False)
        code = code.format(outside=str(outside), victim=str(victim), port=server.getsockname()[1], pid=os.getpid())
        start = time.monotonic()
        ran = run_program(code, 1.5 if end == "time" else 20, 256)
        assert ran.end == end and time.monotonic() - start < 15
        with pytest.raises(BlockingIOError):
            server.accept()
    assert len(ran.output) <= 65_536
    for _ in range(50):  # the kernel ends a namespace's processes a moment after its first
        if not processes(os.getpid()):
            break
        time.sleep(0.1)
    assert not processes(os.getpid())
    assert victim.read_text() == "whole" and [p.name for p in tmp_path.iterdir()] == ["victim"]
    assert not Path("/dev/shm/nanopref_evil").exists()
    assert not list(Path(tempfile.gettempdir()).glob("program_*/*")), "nothing stays in a working folder"
    assert end != "failed" or grading.program_answer(code, 20, 256) is None


@needs_walls
def test_nothing_comes_along(monkeypatch):
    monkeypatch.setenv("SECRET_KEY", "hush")
    with tempfile.TemporaryFile() as file:
        os.set_inheritable(file.fileno(), True)
        said = run_program(
            "import os, sys\nprint(dict(os.environ), os.listdir('/proc/self/fd'), sys.path, os.getpid())", 20
        ).output
    assert "hush" not in said and "site-packages" not in said and said.split()[-1] == "1"
    assert len(json.loads(said[said.index("[") : said.index("]") + 1].replace("'", '"'))) <= 5


@needs_walls
@pytest.mark.parametrize("wait", [0, 1.5])
def test_the_parent_killed_takes_the_program_along(wait):
    """At any time: before the program has begun, and while it runs."""
    code = "from selftrain.sandbox import run_program\nprint('go', flush=True)\nrun_program('while True: pass', 100)"
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, cwd=Path(__file__).parents[2])
    parent.stdout.readline()
    until = time.monotonic() + 20
    while not processes(parent.pid) and time.monotonic() < until:
        time.sleep(0.05)
    assert processes(parent.pid), "it has begun"
    time.sleep(wait)
    parent.kill()
    parent.wait()
    parent.stdout.close()
    while processes(parent.pid) and time.monotonic() < until:
        time.sleep(0.05)
    assert not processes(parent.pid)


@needs_walls
def test_a_stopped_program_leaves_no_dead_process():
    """Where nobody collects orphans (a container whose first process is no init) they would pile up."""
    code = """
import ctypes, os
from selftrain.sandbox import run_program
assert ctypes.CDLL(None).prctl(36, 1, 0, 0, 0) == 0  # PR_SET_CHILD_SUBREAPER: orphans come to us
assert run_program("while True: pass", 4).end == "time"
try:
    print("left:", os.waitpid(-1, 0))
except ChildProcessError:
    print("nothing left")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert done.stdout == "nothing left\n", done


@pytest.fixture
def spoil(tmp_path, monkeypatch):
    """Run programs by a copy of the sandbox in which one text is another."""

    def spoil(text: str, other: str) -> None:
        code = Path(sandbox.__file__).read_text()
        assert text in code
        (tmp_path / "sandbox.py").write_text(code.replace(text, other))
        monkeypatch.setattr(sandbox, "__file__", str(tmp_path / "sandbox.py"))

    return spoil


def test_where_it_cannot_be_shut_in_nothing_runs(spoil):
    """Fail closed: a wall that cannot be put up is an error, and the program has not run."""
    spoil("0x20000, 0x8000000", "0x1, 0x8000000")
    with pytest.raises(Refused, match="Invalid argument"):
        run_program("print('it ran')", 10)
    with pytest.raises(UserError, match=r"key programs: this machine cannot shut a program in"):
        grading.program_answer("print(1)", 10, 256)


def test_no_linux(spoil):
    """Where libc has no such calls no program counts as wrong: none is run."""
    spoil("libc.unshare(", "libc.not_there(")
    with pytest.raises(Refused, match="not_there"):
        run_program("print('it ran')", 20)


def test_refused_it_ends_at_once(tmp_path, refused, monkeypatch):
    """Not after every program has been tried."""
    tried = []

    def refuse(*_):
        tried.append(1)
        time.sleep(0.02)
        raise Refused("no namespaces")

    monkeypatch.setattr(grading, "run_program", refuse)
    path = tmp_path / "s.jsonl"
    path.write_text(json.dumps({"prompt": "p", "answer": "1", "completions": ["```python\nprint(1)\n```"] * 500}) + "\n")
    refused("eval_math", "--samples", path, "--programs", "true", says="cannot shut a program in (no namespaces)")
    assert len(tried) < 500


def test_blocks_of_code():
    assert grading.program("Q", "Let us see.\n```python\nprint(1)\n```\nand\n```\nprint(2)\n```\n") == "print(2)"
    assert grading.program("Q", "```python\nprint(3)") == "print(3)", "cut off"
    assert grading.program("Q\nAnswer: ```python\n", "x = 4\nprint(x)\n```\nSo it is 4.") == "x = 4\nprint(x)"
    assert grading.program("Q", "The answer is 5.") is None


@needs_walls
def test_programs_in_samples_are_off_unless_asked_for(tmp_path, call):
    before = threading.active_count()
    completions = [
        "```python\nprint(6 * 7)\n```",
        "```python\nwhile True: pass\n```\nA: 42",
        "A: 42",
        "```python\nprint('x =', 42)\n```",
    ]
    path = tmp_path / "s.jsonl"
    path.write_text(json.dumps({"prompt": "p", "answer": "42", "completions": completions}) + "\n")
    out = tmp_path / "d.jsonl"
    args = ("--samples", path, "--details", out, "--program_seconds", 6, "--grader", "plain")
    assert call("eval_math", *args)[0] == 0
    assert json.loads(out.read_text())["grades"] == [False, True, True, True]
    status, _, err = call("eval_math", *args, "--programs", "true")
    assert status == 0, err
    found = json.loads(out.read_text())
    assert found["grades"] == [True, False, True, True] and found["pred"] == ["42", None, "42", "x = 42"]
    assert threading.active_count() <= before
