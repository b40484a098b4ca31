"""Whether a program that is not trusted passes tests, without danger for this machine.

A verdict takes two processes (worker.py): one executes the program, the other the tests. They share a socket and
nothing else: each has a sandbox of its own, so that the program cannot read, signal or imitate the one that judges it.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from threading import Event

from slmkit.config import UserError

WORKER, NAMESPACES = (Path(__file__).with_name(name) for name in ("worker.py", "namespaces.py"))
SYSTEM = ("/usr", "/lib", "/lib32", "/lib64", "/bin", "/nix/store", "/etc/ld.so.cache")
ENDED = "the program has ended"  # as the worker says it
START = 1  # seconds of processor time for the start of Python, at most
REFUSAL = (
    "code tasks need a sandbox, and neither bubblewrap nor Linux namespaces work here: install bubblewrap "
    "(apt-get install bubblewrap), or accept limits of time and memory alone with --unsafe-code"
)


@dataclass(frozen=True)
class Limits:
    """What a program may use."""

    seconds: int = 10  # of processor time, with all processes that it starts
    wall_seconds: float = 60.0  # a busy machine needs more than the processor time
    memory: int = 1 << 30  # bytes, with all processes that it starts
    processes: int = 16  # or threads
    disk: int = 64 << 20  # bytes in /tmp
    file: int = 4 << 20  # bytes of a file


@dataclass(frozen=True)
class Verdict:
    """`reason`: why it has not passed, empty if it has; `seconds`: how long it took."""

    passed: bool
    reason: str
    seconds: float


def run(
    program: str, tests: str, limits: Limits | None = None, *, unsafe: bool = False, stop: Event | None = None
) -> Verdict:
    """Whether `tests` run to their end on the functions of `program`. Both are Python.

    Names that the tests do not define are the program's; a builtin or a standard module is the program's only after
    `from program import NAME`. `unsafe`: without a sandbox if there is none. After `stop` is set it
    ends at once.

    Raises `UserError` where there is no sandbox.
    """
    return _run(sandbox_kind(unsafe), program, tests, limits or Limits(), stop)


def sandbox_kind(unsafe: bool = False) -> str:
    """`bubblewrap`, `namespaces` or, if `unsafe` allows it, `none`: the first that works. Raises `UserError`."""
    found = next((kind for kind in ("bubblewrap", "namespaces") if works(kind)), "none" if unsafe else None)
    if found is None:
        raise UserError(REFUSAL)
    return found


@functools.cache
def works(kind: str) -> bool:
    """Whether a program can be run in this kind of sandbox on this machine."""
    if kind == "bubblewrap" and not shutil.which("bwrap"):
        return False
    return _run(kind, "x = 1", "assert x == 1", Limits()).passed


def _run(kind: str, program: str, tests: str, limits: Limits, stop: Event | None = None) -> Verdict:
    began = time.monotonic()
    asks, answers = socket.socketpair()
    with asks, answers, _started(kind, "program", answers, limits) as one, _started(kind, "tests", asks, limits) as two:
        answers.close()
        asks.close()
        request: bytes | None = json.dumps({"program": program, "tests": tests}).encode()
        reason = None
        while reason is None:
            try:
                output, errors = two.communicate(request, timeout=0.2)
                message = " ".join(errors.decode(errors="replace").split())[-300:]
                reason = json.loads(output) if output else f"the tests stopped: {message}"
            except subprocess.TimeoutExpired:
                request = None  # `communicate` keeps what it has not yet sent
                reason = "stopped" if stop and stop.is_set() else _excess(one, two, limits, time.monotonic() - began)
        if reason == ENDED:
            with contextlib.suppress(subprocess.TimeoutExpired):
                reason += f" (exit code {one.wait(1)})"
    return Verdict(not reason, reason, time.monotonic() - began)


def _excess(one: subprocess.Popen[bytes], two: subprocess.Popen[bytes], limits: Limits, seconds: float) -> str | None:
    """What the processes of a verdict use too much of, each with all that it has started."""
    parents, used = dict[int, int](), dict[int, tuple[float, int]]()
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            fields = path.read_bytes().rpartition(b")")[2].split()  # proc(5); the name before may be anything
            ticks, pages = sum(map(int, fields[11:15])), int(fields[21])
            parents[int(path.parent.name)] = int(fields[1])
            used[int(path.parent.name)] = ticks / os.sysconf("SC_CLK_TCK"), pages * os.sysconf("SC_PAGE_SIZE")
    for top in (one.pid, two.pid):
        family = [top]
        for member in family:
            family += [child for child, parent in parents.items() if parent == member]
        if sum(used.get(member, (0, 0))[0] for member in family) > limits.seconds + START:
            return f"more than {limits.seconds} s of processor time"
        if sum(used.get(member, (0, 0))[1] for member in family) > limits.memory:
            return f"more than {limits.memory >> 20} MiB of memory"
    return f"not finished after {limits.wall_seconds:g} s" if seconds > limits.wall_seconds else None


@contextlib.contextmanager
def _started(kind: str, part: str, link: socket.socket, limits: Limits) -> Iterator[subprocess.Popen[bytes]]:
    """A process of a verdict. It and all it has started end with the block."""
    settings = {
        "part": part,
        "forbid": kind != "none",
        "link": link.fileno(),
        "packages": [sysconfig.get_path("purelib"), sysconfig.get_path("platlib")],
        "user": random.SystemRandom().randrange(1 << 30, 1 << 31) if os.geteuid() == 0 and kind != "none" else 0,
        "limits": {
            "RLIMIT_CPU": limits.seconds + 2 * START, "RLIMIT_AS": limits.memory,
            "RLIMIT_FSIZE": limits.file, "RLIMIT_CORE": 0, "RLIMIT_NOFILE": 64, "RLIMIT_STACK": 8 << 20,
        } | ({"RLIMIT_NPROC": limits.processes} if kind != "none" else {}),
    }  # fmt: skip
    words = [sys.executable, "-I", "-S", "-c", WORKER.read_text(), json.dumps(settings)]
    if kind == "bubblewrap":
        words = [*_bubblewrap(limits), *words]
    elif kind == "namespaces":
        visible = json.dumps({"visible": [*_visible(), "/dev/null"], "disk": limits.disk})
        words = [sys.executable, "-I", "-S", "-c", NAMESPACES.read_text(), visible, *words]
    pipe = subprocess.PIPE if part == "tests" else subprocess.DEVNULL  # what the program reads and writes is nothing
    process = subprocess.Popen(
        words,
        env={"PATH": "/usr/bin:/bin", "HOME": "/tmp", "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
        pass_fds=[link.fileno()],
        stdin=pipe,
        stdout=pipe,
        stderr=pipe,
        start_new_session=True,
        cwd="/",
    )
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def _visible() -> list[str]:
    """The files a program may read: the system's libraries and the Python installation."""
    parts = ("bin", "lib", "lib64", "pyvenv.cfg")
    python = [str(Path(prefix) / part) for prefix in (sys.prefix, sys.base_prefix) for part in parts]
    return [path for path in dict.fromkeys([*SYSTEM, *python]) if Path(path).exists()]


def _bubblewrap(limits: Limits) -> list[str]:
    words = ["bwrap", "--die-with-parent", "--unshare-ipc", "--unshare-pid", "--unshare-net", "--unshare-uts"]
    # Root becomes another user in the worker; everybody else needs a user namespace for the rest.
    rights = "--cap-drop ALL --cap-add CAP_SETUID --cap-add CAP_SETGID" if os.geteuid() == 0 else "--unshare-user"
    words += rights.split()
    words += ["--perms", "1777", "--size", str(limits.disk), "--tmpfs", "/tmp"]
    parents = [str(parent) for path in [*_visible(), "/dev/null"] for parent in reversed(Path(path).parents)]
    for parent in sorted({*parents} - {"/", "/tmp"}):
        words += ["--perms", "0755", "--dir", parent]
    for path in _visible():
        words += ["--ro-bind", path, path]
    return [*words, "--dev-bind", "/dev/null", "/dev/null", "--remount-ro", "/", "--chdir", "/tmp"]
