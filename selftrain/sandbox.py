"""Run a program that nobody has looked at, in a process of its own that can do next to nothing. Linux only.

`run_program` starts this file again under `python -I -S`. That process gives up everything before the program begins:

    time       processor seconds by rlimit, seconds on the clock by the parent, which kills the whole session; leaving it, or
               undoing the signal that comes when the parent dies, is refused
    memory     address space by rlimit; shared memory that would outlive its mapping is refused
    processes  fork, clone and exec are refused by a seccomp filter; a namespace of its own hides all others
    network    a namespace without one; socket calls are refused
    files      the whole tree is mounted read-only and without devices; the working folder is an empty tmpfs of 1 MB and 256
               files that ends with the process
    output     the parent reads so many bytes, then kills
    the rest   no environment, no inherited file, no new privileges

It needs user namespaces and seccomp. Where the kernel or the container refuses them nothing is run: `Refused` is raised.
The program can still read what its user can read: run nothing here that must not see your files.
"""

import contextlib
import ctypes
import os
import platform
import resource
import select
import signal
import struct
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass

REFUSED = 97  # exit status: a wall could not be put up
WRITABLE, FILES = 1 << 20, 256  # bytes of files, and how many of them


class Refused(Exception):
    """This machine does not let a process shut itself in."""


@dataclass(frozen=True)
class Ran:
    """What a program printed, and how it ended: "ok", "failed" (error or killed), "time", or "output" (too much of it)."""

    output: str
    end: str


def run_program(code: str, seconds: float = 5.0, memory_mb: int = 512, output_bytes: int = 65_536) -> Ran:
    """Run Python source text. Raises Refused where it cannot be shut in; nothing that the program does raises."""
    with tempfile.TemporaryDirectory(prefix="program_") as folder:
        command = [sys.executable, "-I", "-S", os.path.abspath(__file__), str(seconds), str(memory_mb), str(os.getpid())]
        process = subprocess.Popen(
            command,
            cwd=folder,
            env={},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        output, end = b"", ""
        until = time.monotonic() + seconds + 1  # to start Python takes a while
        try:
            with contextlib.suppress(BrokenPipeError):  # it ended before it read: its status says why
                process.stdin.write(code.encode(errors="replace"))
                process.stdin.close()
            while not end:
                left = until - time.monotonic()
                ready = left > 0 and select.select([process.stdout], [], [], left)[0]
                part = os.read(process.stdout.fileno(), 65_536) if ready else b""
                output += part
                if not ready:
                    end = "time"
                elif len(output) > output_bytes:
                    end = "output"
                elif not part:  # closed: it has ended, or is about to
                    try:
                        end = "failed" if process.wait(max(0.1, left)) else "ok"
                    except subprocess.TimeoutExpired:
                        end = "time"
        finally:
            process.terminate()  # it ends the program and collects it: an orphan's remains would be there until init looks
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(5)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            status = process.wait()
            process.stdout.close()
    if status == REFUSED and end == "failed":  # not one that was stopped while its walls went up
        raise Refused(output.decode(errors="replace").strip())
    return Ran(output[:output_bytes].decode(errors="replace"), end)


# --- the other side: what the new process does before the program begins ---------------------------------------------------

NEWNS, NEWIPC, NEWUSER, NEWPID, NEWNET = 0x20000, 0x8000000, 0x10000000, 0x20000000, 0x40000000
PDEATHSIG, NO_NEW_PRIVS, SECCOMP = 1, 38, 22  # prctl
MOUNT_SETATTR, RECURSIVE, READ_ONLY_NODEV = 442, 0x8000, 1 | 4  # the system call has one number everywhere
NOSUID_NODEV_NOEXEC = 2 | 4 | 8
# AUDIT_ARCH, then the numbers of: clone fork vfork execve execveat clone3, socket socketpair connect bind, ptrace mount umount2
# pivot_root chroot unshare setns mount_setattr move_mount open_tree fsopen, bpf keyctl add_key perf_event_open io_uring_setup
# userfaultfd process_vm_writev, prctl setsid setpgid, shmget msgget semget
COMMON = [435, MOUNT_SETATTR, 429, 428, 430, 425]
CALLS = {
    "x86_64": (
        0xC000003E,
        "56 57 58 59 322 41 53 42 49 101 165 166 155 161 272 308 321 250 248 298 323 311 157 112 109 29 68 64",
    ),
    "aarch64": (
        0xC00000B7,
        "220 221 281 198 199 203 200 117 40 39 41 51 97 268 280 219 217 241 282 271 167 157 154 194 186 190",
    ),
}


def shut_in(seconds: float, memory_mb: int, parent: int) -> None:
    """Give everything up; after this the process is the first of its own little machine. Raises OSError, KeyError or
    AttributeError where it cannot."""
    libc = ctypes.CDLL(None, use_errno=True)

    def must(result: int) -> None:
        if result != 0:
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number))

    user, group = os.geteuid(), os.getegid()
    must(libc.unshare(NEWUSER | NEWNS | NEWPID | NEWNET | NEWIPC))
    for name, text in (("setgroups", "deny"), ("uid_map", f"1000 {user} 1"), ("gid_map", f"1000 {group} 1")):
        with open(f"/proc/self/{name}", "w") as file:
            file.write(text)
    must(libc.prctl(PDEATHSIG, signal.SIGKILL, 0, 0, 0))  # whoever started this may be killed at any time
    if os.getppid() != parent:
        os._exit(1)
    ready, tell = os.pipe()
    child = os.fork()  # only a child is in the new process namespace
    if child:
        signal.signal(signal.SIGTERM, lambda *_: os.kill(child, signal.SIGKILL))
        os.close(1), os.close(tell)
        stands = os.read(ready, 1)  # so that no program can pretend by its exit status that a wall is missing
        _, status = os.waitpid(child, 0)
        os._exit((1 if status else 0) if stands else REFUSED)
    must(libc.prctl(PDEATHSIG, signal.SIGKILL, 0, 0, 0))
    os.close(ready)  # so that `tell` breaks if the process above has ended by now
    must(libc.mount(b"none", b"/", None, 0x4000 | 0x40000, None))  # MS_REC | MS_PRIVATE: nothing travels outwards
    attributes = struct.pack("QQQQ", READ_ONLY_NODEV, 0, 0, 0)
    must(libc.syscall(MOUNT_SETATTR, -100, b"/", RECURSIVE, attributes, len(attributes)))
    folder = os.getcwd()
    must(libc.mount(b"tmpfs", folder.encode(), b"tmpfs", NOSUID_NODEV_NOEXEC, f"size={WRITABLE},nr_inodes={FILES}".encode()))
    os.chdir(folder)
    for name, most in {
        "CPU": int(seconds) + 2,  # above what the parent waits, or a loop would sometimes end as "failed"
        "AS": memory_mb << 20,
        "FSIZE": WRITABLE,
        "NOFILE": 64,
        "CORE": 0,
    }.items():
        resource.setrlimit(getattr(resource, f"RLIMIT_{name}"), (most, most))
    must(libc.capset(struct.pack("II", 0x20080522, 0), bytes(24)))  # what it could do in its own namespaces
    must(libc.prctl(NO_NEW_PRIVS, 1, 0, 0, 0))
    arch, calls = CALLS[platform.machine()]
    program = _filter(arch, [*map(int, calls.split()), *COMMON])
    must(libc.prctl(SECCOMP, 2, ctypes.byref(program), 0, 0))
    os.write(tell, b"1")
    os.close(tell)


class _Filter(ctypes.Structure):
    _fields_ = [("length", ctypes.c_ushort), ("code", ctypes.c_char_p)]


def _filter(arch: int, refused: list[int]) -> _Filter:
    """A classic BPF program: another architecture's calls kill, the `refused` ones fail with EPERM, all others pass."""

    def step(code: int, value: int, yes: int = 0, no: int = 0) -> bytes:
        return struct.pack("HBBI", code, yes, no, value)

    load, equal, at_least, give = 0x20, 0x15, 0x35, 0x06
    kill, deny, allow = step(give, 0x80000000), step(give, 0x00050000 | 1), step(give, 0x7FFF0000)
    n = len(refused)
    steps = [step(load, 4), step(equal, arch, 1, 0), kill, step(load, 0), step(at_least, 0x40000000, n + 1, 0)]
    steps += [step(equal, number, n - i, 0) for i, number in enumerate(refused)]
    code = b"".join([*steps, allow, deny])
    return _Filter(len(code) // 8, code)


def main() -> None:
    code = sys.stdin.buffer.read().decode()
    sys.stdin = open(os.devnull)  # noqa: SIM115
    try:
        shut_in(float(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
    except (OSError, KeyError, AttributeError) as error:  # refused, an unknown machine, no Linux
        print(f"{type(error).__name__}: {error}", flush=True)
        os._exit(REFUSED)
    sys.argv = ["program.py"]
    exec(compile(code, "program.py", "exec"), {"__name__": "__main__", "__builtins__": __builtins__})


if __name__ == "__main__":
    main()
