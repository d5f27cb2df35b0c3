"""Programs in the sandbox: what they may do, and that nothing else happens, is left behind, or goes unnoticed."""

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

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
try:
    run_program("", 5)
    HERE = ""
except (Refused, OSError) as error:
    HERE = str(error)
needs_sandbox = pytest.mark.skipif(bool(HERE), reason=f"no program can be sandboxed here: {HERE}")


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


def all_gone(of: int) -> bool:
    """Whether those processes end within a few seconds: the kernel ends a namespace's processes a moment after its first."""
    until = time.monotonic() + 20
    while processes(of) and time.monotonic() < until:
        time.sleep(0.05)
    return not processes(of)


@needs_sandbox
def test_a_program_runs():
    ran = run_program("import math\nfrom fractions import Fraction\nprint(math.comb(5, 2) + Fraction(1, 2))", 20)
    assert (ran.output, ran.end) == ("21/2\n", "ok")
    code = "import os\nprint(os.listdir('.'))\nopen('x', 'w').write('hi')\nprint(open('x').read())\nexit()"
    ran = run_program(code, 20)
    assert (ran.output, ran.end) == ("[]\nhi\n", "ok"), "its own folder is empty and writable, and exit() is there"
    assert {run_program(code, 20).end for code in ("print(1", "1 / 0", "raise SystemExit(97)", "exit(1)")} == {"failed"}


@needs_sandbox
@pytest.mark.parametrize(
    "end",
    ["exit()", "quit()", "exit(0)", "import sys\nsys.exit()", "raise SystemExit", "import builtins\nbuiltins.quit(None)",
     "def f(): exit()\nf()", "import __main__\n__main__.x == 42 and quit()"],
)  # fmt: skip
def test_ways_to_end(end):
    assert grading.program_answer(f"x = 42\nprint(x)\n{end}\nprint(1)", 20, 256) == "42"


ATTACKS = {
    "time": {
        "loops for ever": "while True: pass",
        "sleeps for ever": "import time\ntime.sleep(1000)",
        "ignores signals": "import signal\nfor n in (1, 2, 14, 15, 24): signal.signal(n, signal.SIG_IGN)\nwhile True: pass",
        "leaves its session": "import ctypes, time\nl = ctypes.CDLL(None)\nl.setsid(), l.prctl(1, 0, 0, 0, 0)\ntime.sleep(30)",
        "stops its group": "import os, signal\nos.kill(0, 19), os.killpg(0, 19)\nwhile True: pass",
        "stops all": "import os\ntry: os.kill(-1, 19)\nexcept OSError: pass\nwhile True: pass",
        "closes its output": "import os\nos.close(1)\nwhile True: pass",
    },
    "failed": {
        "eats memory": "a = []\nwhile True: a.append(bytearray(10**7))",
        "eats shared memory": "import ctypes\nassert ctypes.CDLL(None).shmget(0, 1 << 20, 0o1600) >= 0",
        "forks": "import os\nwhile True: os.fork()",
        "starts a program": "import os\nos.execv('/bin/sh', ['sh', '-c', 'echo 1'])",
        "starts a thread": "import threading\nthreading.Thread(target=print).start()",
        "writes outside": "open({outside!r}, 'w').write('x')",
        "deletes outside": "import os\nos.unlink({victim!r})",
        "reads outside": "print(open({victim!r}).read())",
        "reads of other processes": "print(open('/proc/{pid}/cmdline').read())",
        "reads of its parents": "import os\nprint(open('/proc/self/cmdline').read() + os.listdir('/proc')[0])",
        "writes to a pipe": "import os\nos.write(os.open({pipe!r}, os.O_WRONLY | os.O_NONBLOCK), b'x')",
        "locks a file": "import fcntl\nfcntl.flock(open({victim!r}), fcntl.LOCK_EX | fcntl.LOCK_NB)",
        "locks a file of the system": "import fcntl, os\nfcntl.flock(open(os.__file__), fcntl.LOCK_EX | fcntl.LOCK_NB)",
        "writes to the system": "import os\nopen(os.__file__, 'a').write('#')",
        "makes a file beside the system": "import os\nopen(os.path.dirname(os.__file__) + '/nanopref_evil.py', 'w')",
        "writes shared memory": "open('/dev/shm/nanopref_evil', 'w')",
        "fills its folder": "f = open('x', 'wb')\nwhile True: f.write(bytes(10**6)); f.flush()",
        "makes countless files": "import os\nfor n in range(1000): os.mkdir(str(n))",
        "writes to a device": "open('/dev/null', 'w')",
        "opens a socket": "import socket\nsocket.create_connection(('127.0.0.1', {port}))",
        "opens a unix socket": "import socket\nsocket.socket(socket.AF_UNIX)",
        "kills its parent": "import os\nos.kill({pid}, 9)",
        "raises its limits": "import resource\nresource.setrlimit(resource.RLIMIT_AS, (-1, -1))",
        "mounts": "import ctypes\nl = ctypes.CDLL(None)\nassert l.mount(b'n', b'/', None, 0x1020, None) == 0",
    },
    "output": {"prints a gigabyte": "for _ in range(1000): print('x' * 10**6)"},
}


@needs_sandbox
@pytest.mark.parametrize(("end", "name"), [(end, name) for end, attacks in ATTACKS.items() for name in attacks])
def test_attacks(tmp_path, end, name):
    """Stopped, without a trace: no process, no file, no connection; and as an answer it counts as none."""
    victim, outside, pipe = tmp_path / "victim", tmp_path / "evil", tmp_path / "pipe"
    victim.write_text("whole")
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.setblocking(False)
        names = {"outside": str(outside), "victim": str(victim), "pipe": str(pipe), "pid": os.getpid()}
        names["port"] = server.getsockname()[1]
        code = ATTACKS[end][name].format(**names)
        start = time.monotonic()
        ran = run_program(code, 1.5 if end == "time" else 20, 256)
        assert ran.end == end and time.monotonic() - start < (6 if end == "time" else 15)
        with pytest.raises(BlockingIOError):
            server.accept()
    assert not os.read(reader, 1)
    os.close(reader)
    assert len(ran.output) <= 65_536 and all_gone(os.getpid())
    assert victim.read_text() == "whole" and sorted(p.name for p in tmp_path.iterdir()) == ["pipe", "victim"]
    assert not Path("/dev/shm/nanopref_evil").exists()
    assert not list(Path(tempfile.gettempdir()).glob("program_*/*")), "nothing stays in a working folder"
    assert end != "failed" or grading.program_answer(code, 20, 256) is None


@needs_sandbox
def test_nothing_comes_along(monkeypatch):
    monkeypatch.setenv("SECRET_KEY", "hush")
    code = """
import os, sys
def is_open(n):
    try: return bool(os.fstat(n))
    except OSError: return False
print(dict(os.environ), [n for n in range(64) if is_open(n)], sys.path)
print(sorted(os.listdir('/')), os.getpid())
"""
    with tempfile.TemporaryFile() as file:
        os.set_inheritable(file.fileno(), True)
        said = run_program(code, 20).output
    assert "hush" not in said and "site-packages" not in said and said.split()[-1] == "1"
    assert len(json.loads(said[said.index("[") : said.index("]") + 1])) <= 5
    assert not {"proc", "dev", "etc", "home", "var", "sys", "run"} - {Path(sys.base_prefix).parts[1]} & set(said.split("'"))


@needs_sandbox
@pytest.mark.parametrize("wait", [0, 1.5])
def test_the_parent_killed_takes_the_program_along(wait):
    """At any time: before the program has begun, and while it runs."""
    code = "from selftrain.sandbox import run_program\nprint('go', flush=True)\nrun_program('while True: pass', 100)"
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, cwd=ROOT) as parent:
        parent.stdout.readline()
        until = time.monotonic() + 20
        while not processes(parent.pid) and time.monotonic() < until:
            time.sleep(0.05)
        assert processes(parent.pid), "it has begun"
        time.sleep(wait)
        parent.kill()
    assert all_gone(parent.pid)


@needs_sandbox
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
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout == "nothing left\n", done


# a text in the sandbox, what stands there instead, what is said; the second is as on a system that is not Linux
BROKEN = [("0x20000, 0x8000000", "0x1, 0x8000000", "Invalid argument"), ("libc.unshare(", "libc.not_there(", "not_there")]


@pytest.mark.parametrize(("text", "other", "says"), BROKEN)
def test_where_it_cannot_be_sandboxed_nothing_runs(tmp_path, monkeypatch, text, other, says):
    """A copy of the sandbox in which one part fails. That is an error; the program has not run, nor counts as wrong."""
    code = Path(sandbox.__file__).read_text()
    assert text in code
    (tmp_path / "sandbox.py").write_text(code.replace(text, other))
    monkeypatch.setattr(sandbox, "__file__", str(tmp_path / "sandbox.py"))
    with pytest.raises(Refused, match=says):
        run_program("print('it ran')", 10)
    with pytest.raises(UserError, match=r"key programs: this machine cannot sandbox a program"):
        grading.program_answer("print(1)", 10, 256)


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
    refused("selftrain.eval_math", "--samples", path, "--programs", "true", says="cannot sandbox a program (no namespaces)")
    assert len(tried) < 500


def test_blocks_of_code():
    assert grading.program("Q", "Let us see.\n```python\nprint(1)\n```\nand\n```\nprint(2)\n```\n") == "print(2)"
    assert grading.program("Q", "```python\nprint(3)") == "print(3)", "cut off"
    assert grading.program("Q\nAnswer: ```python\n", "x = 4\nprint(x)\n```\nSo it is 4.") == "x = 4\nprint(x)"
    assert grading.program("Q", "The answer is 5.") is None


@needs_sandbox
def test_programs_in_samples_are_off_unless_asked_for(tmp_path, call):
    before = threading.active_count()
    blocks = ["```python\nprint(6 * 7)\n```", "```python\nwhile True: pass\n```\nA: 42", "```python\nprint('x =', 42)\n```"]
    path, out = tmp_path / "s.jsonl", tmp_path / "d.jsonl"
    path.write_text(json.dumps({"prompt": "p", "answer": "42", "completions": [*blocks, "A: 42"]}) + "\n")
    args = ("selftrain.eval_math", "--samples", path, "--details", out, "--program_seconds", 6, "--grader", "plain")
    assert call(*args)[0] == 0
    assert json.loads(out.read_text())["grades"] == [False, True, True, True]
    assert call(*args, "--programs", "true")[0] == 0
    found = json.loads(out.read_text())
    assert found["grades"] == [True, False, True, True] and found["pred"] == ["42", None, "x = 42", "42"]
    assert threading.active_count() <= before
