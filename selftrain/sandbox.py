"""Run a program that nobody has looked at in a sandbox: a process of its own that can do almost nothing. Linux only.

`run_program` starts this file under `python -I -S`. The new process gives up its rights one by one, and then runs the program:

    time       a limit on processor seconds in the process. The parent watches the clock and kills. The program has a session of
               its own, so it can stop nobody else; it cannot undo the signal that ends it when its parent dies
    memory     a limit on address space. Shared memory, which would outlive the process, is refused
    processes  a seccomp filter refuses fork, clone and exec. A process namespace hides all other processes
    network    a network namespace without any interface. Calls that open sockets are refused
    files      a root folder of its own, in memory: 1 MB and 256 files, which end with the process. There are the system's
               programs and Python's library, read-only; no other file, no /proc, no device
    output     the parent reads a limited number of bytes, then kills
    the rest   no environment, no inherited files, no new privileges

It needs user namespaces and seccomp. Where the kernel or the container does not grant them, `Refused` is raised and nothing
runs.
"""

import builtins
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
import types
from dataclasses import dataclass

REFUSED = 97  # exit status where a part of the sandbox could not be set up
WRITABLE, FILES = 1 << 20, 256  # bytes of files, and how many of them


class Refused(Exception):
    """This machine does not let a process sandbox itself."""


@dataclass(frozen=True)
class Ran:
    """What a program printed, and how it ended: "ok", "failed" (an error, or killed), or over a limit: "time" or "output"."""

    output: str
    end: str


def run_program(code: str, seconds: float = 5.0, memory_mb: int = 512, output_bytes: int = 65_536) -> Ran:
    """Run Python source text. Raises Refused where it cannot be sandboxed; nothing that the program does raises."""
    with tempfile.TemporaryDirectory(prefix="program_") as folder:
        command = [sys.executable, "-I", "-S", os.path.abspath(__file__), str(seconds), str(memory_mb), str(os.getpid())]
        streams = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
        process = subprocess.Popen(command, cwd=folder, env={}, start_new_session=True, **streams)
        output, end = b"", ""
        until = time.monotonic() + seconds + 1  # Python takes a while to start
        try:
            with contextlib.suppress(BrokenPipeError):  # it ended before it read: its exit status says why
                process.stdin.write(code.encode(errors="replace"))
                process.stdin.close()
            while not end:
                left = max(0.0, until - time.monotonic())
                ready = select.select([process.stdout], [], [], left)[0]
                part = os.read(process.stdout.fileno(), 65_536) if ready else b""
                output += part
                if len(output) > output_bytes:
                    end = "output"
                elif not part:  # it has closed its output, or its time is up
                    try:
                        end = "failed" if process.wait(max(0.1, until - time.monotonic())) else "ok"
                    except subprocess.TimeoutExpired:
                        end = "time"
        finally:
            process.terminate()  # so that it kills the program and waits for it; nobody else may be there to do that
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(5)
            process.kill()
            status = process.wait()
            process.stdout.close()
    if status == REFUSED and end == "failed":  # it was not stopped while it set the sandbox up
        raise Refused(output.decode(errors="replace").strip())
    return Ran(output[:output_bytes].decode(errors="replace"), end)


# --- in the new process, before the program begins -------------------------------------------------------------------------

NEWNS, NEWIPC, NEWUSER, NEWPID, NEWNET = 0x20000, 0x8000000, 0x10000000, 0x20000000, 0x40000000
PDEATHSIG, NO_NEW_PRIVS, SECCOMP = 1, 38, 22  # prctl
MOUNT_SETATTR, RECURSIVE, READ_ONLY_NODEV = 442, 0x8000, 1 | 4  # the system call has one number everywhere
NOSUID_NODEV_NOEXEC, RECURSE = 2 | 4 | 8, 0x4000  # mount
SYSTEM = ("/usr", "/lib", "/lib64", "/nix/store")  # what Python's library needs beside its own folder
ARCH = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}  # AUDIT_ARCH
# the numbers of these system calls: clone fork vfork execve execveat clone3, socket socketpair connect bind, ptrace mount
# umount2 pivot_root chroot unshare setns mount_setattr move_mount open_tree fsopen, bpf keyctl add_key perf_event_open
# io_uring_setup userfaultfd process_vm_writev, prctl setsid setpgid, shmget msgget semget, flock request_key
COMMON = [435, MOUNT_SETATTR, 429, 428, 430, 425]
CALLS = {
    "x86_64": "56 57 58 59 322 41 53 42 49 101 165 166 155 161 272 308 321 250 248 298 323 311 157 112 109 29 68 64 73 249",
    "aarch64": "220 221 281 198 199 203 200 117 40 39 41 51 97 268 280 219 217 241 282 271 167 157 154 194 186 190 32 218",
}


def shut_in(seconds: float, memory_mb: int, parent: int) -> None:
    """Sandbox this process. It returns in a child, which is the first process of its own namespace; `parent` is the pid of the
    process that started this one. Raises OSError, KeyError or AttributeError where a part of the sandbox cannot be set up."""
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
    must(libc.prctl(PDEATHSIG, signal.SIGKILL, 0, 0, 0))  # die with the parent, which may be killed at any time
    if os.getppid() != parent:
        os._exit(1)
    ready, tell = os.pipe()
    child = os.fork()  # only a child is in the new process namespace
    if child:
        signal.signal(signal.SIGTERM, lambda *_: os.kill(child, signal.SIGKILL))
        os.close(1), os.close(tell)
        stands = os.read(ready, 1)  # so that a program that exits with REFUSED is not taken for a refusal
        _, status = os.waitpid(child, 0)
        os._exit((1 if status else 0) if stands else REFUSED)
    os.setsid()
    must(libc.prctl(PDEATHSIG, signal.SIGKILL, 0, 0, 0))
    os.close(ready)  # so that writing to `tell` fails if the process above has ended by now
    must(libc.mount(b"none", b"/", None, RECURSE | 0x40000, None))  # MS_PRIVATE: no mount shows outside
    attributes = struct.pack("QQQQ", READ_ONLY_NODEV, 0, 0, 0)
    must(libc.syscall(MOUNT_SETATTR, -100, b"/", RECURSIVE, attributes, len(attributes)))
    root = os.getcwd()
    must(libc.mount(b"tmpfs", root.encode(), b"tmpfs", NOSUID_NODEV_NOEXEC, f"size={WRITABLE},nr_inodes={FILES}".encode()))
    for path in filter(os.path.isdir, (*SYSTEM, sys.base_prefix)):
        os.makedirs(root + path, exist_ok=True)
        must(libc.mount(path.encode(), (root + path).encode(), None, RECURSE | 0x1000, None))  # MS_BIND, read-only as above
    os.mkdir(root + "/tmp")
    os.chroot(root)
    os.chdir("/tmp")
    # processor seconds: more than the parent waits, or a loop would sometimes end as "failed" and not as "time"
    limits = {"CPU": int(seconds) + 2, "AS": memory_mb << 20, "FSIZE": WRITABLE, "NOFILE": 64, "CORE": 0}
    for name, most in limits.items():
        resource.setrlimit(getattr(resource, f"RLIMIT_{name}"), (most, most))
    must(libc.capset(struct.pack("II", 0x20080522, 0), bytes(24)))  # drop its rights in its own namespaces
    must(libc.prctl(NO_NEW_PRIVS, 1, 0, 0, 0))
    machine = platform.machine()
    program = _filter(ARCH[machine], [*map(int, CALLS[machine].split()), *COMMON])
    must(libc.prctl(SECCOMP, 2, ctypes.byref(program), 0, 0))
    os.write(tell, b"1")
    os.close(tell)


class _Filter(ctypes.Structure):
    _fields_ = [("length", ctypes.c_ushort), ("code", ctypes.c_char_p)]


def _filter(arch: int, refused: list[int]) -> _Filter:
    """A classic BPF program. Calls of another architecture kill, the `refused` ones fail with EPERM, all others pass."""

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
    except (OSError, KeyError, AttributeError) as error:  # refused, another processor, another system
        print(f"{type(error).__name__}: {error}", flush=True)
        os._exit(REFUSED)
    sys.argv = ["program.py"]
    builtins.exit = builtins.quit = sys.exit  # -S leaves these out
    sys.modules["__main__"] = program = types.ModuleType("__main__")
    exec(compile(code, "program.py", "exec"), vars(program))


if __name__ == "__main__":
    main()
