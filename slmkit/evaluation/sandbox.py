"""Whether a program that is not trusted passes tests, without danger for this machine.

A verdict takes two processes (code_worker.py): one executes the program, the other the tests. They share a socket and
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

from slmkit.config import UserError

WORKER, NAMESPACES = (Path(__file__).with_name(name) for name in ("code_worker.py", "namespaces.py"))
SYSTEM = ("/usr", "/lib", "/lib32", "/lib64", "/bin", "/nix/store", "/etc/ld.so.cache")
REFUSAL = (
    "code tasks need a sandbox, and neither bubblewrap nor Linux namespaces work here: install bubblewrap "
    "(apt-get install bubblewrap), or accept limits of time and memory alone with --unsafe-code"
)


@dataclass(frozen=True)
class Limits:
    """What a program may use."""

    seconds: int = 10  # of processor time, each process
    wall_seconds: float = 60.0  # a busy machine needs more than the processor time
    memory: int = 1 << 30  # bytes, each process
    processes: int = 16  # threads too
    disk: int = 64 << 20  # bytes in /tmp
    file: int = 4 << 20  # bytes of a file


@dataclass(frozen=True)
class Verdict:
    """`reason`: why it has not passed, empty if it has; `seconds`: how long it took."""

    passed: bool
    reason: str
    seconds: float


def run(program: str, tests: str, limits: Limits | None = None, *, unsafe: bool = False) -> Verdict:
    """Whether `tests` run to their end on the functions of `program`. Both are Python.

    Names that the tests do not define are the program's; a builtin or a standard module is the program's only after
    `from program import NAME`. `unsafe`: without a sandbox if there is none.

    Raises `UserError` where there is no sandbox.
    """
    kind = sandbox_kind(unsafe)
    return _run(kind, program, tests, limits or Limits())


@functools.cache
def sandbox_kind(unsafe: bool = False) -> str:
    """ "bubblewrap", "namespaces" or, if `unsafe` allows it, "none": the first that works. Raises `UserError`."""
    for kind in ("bubblewrap", "namespaces"):
        if (kind == "namespaces" or shutil.which("bwrap")) and _run(kind, "", "", Limits()).passed:
            return kind
    if not unsafe:
        raise UserError(REFUSAL)
    return "none"


def _run(kind: str, program: str, tests: str, limits: Limits) -> Verdict:
    began = time.monotonic()
    asks, answers = socket.socketpair()
    with asks, answers, _started(kind, "program", answers, limits), _started(kind, "tests", asks, limits) as two:
        answers.close()
        asks.close()
        request = json.dumps({"program": program, "tests": tests}).encode()
        try:
            output, _ = two.communicate(request, timeout=limits.wall_seconds)
            reason = json.loads(output)
        except subprocess.TimeoutExpired:
            reason = f"not finished after {limits.wall_seconds:g} s"
        except ValueError:
            reason = "the tests took more time or memory than allowed"
    return Verdict(not reason, reason, time.monotonic() - began)


@contextlib.contextmanager
def _started(kind: str, part: str, link: socket.socket, limits: Limits) -> Iterator[subprocess.Popen[bytes]]:
    """A process of a verdict. It and all it has started end with the block."""
    settings = {
        "part": part,
        "link": link.fileno(),
        "packages": [sysconfig.get_path("purelib"), sysconfig.get_path("platlib")],
        "user": random.SystemRandom().randrange(1 << 30, 1 << 31) if os.geteuid() == 0 and kind != "none" else 0,
        "limits": {
            "RLIMIT_CPU": limits.seconds + 1, "RLIMIT_AS": limits.memory, "RLIMIT_FSIZE": limits.file, "RLIMIT_CORE": 0,
            "RLIMIT_NOFILE": 64, "RLIMIT_STACK": 8 << 20,
        } | ({"RLIMIT_NPROC": limits.processes} if kind != "none" else {}),
    }  # fmt: skip
    words = [sys.executable, "-I", "-S", "-c", WORKER.read_text(), json.dumps(settings)]
    if kind == "bubblewrap":
        words = [*_bubblewrap(limits), *words]
    elif kind == "namespaces":
        visible = json.dumps({"visible": [*_visible(), "/dev/null"], "disk": limits.disk})
        words = [sys.executable, "-I", "-S", "-c", NAMESPACES.read_text(), visible, *words]
    process = subprocess.Popen(
        words,
        env={"PATH": "/usr/bin:/bin", "HOME": "/tmp", "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
        pass_fds=[link.fileno()],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE if part == "tests" else subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
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
    words += (
        ["--cap-drop", "ALL", "--cap-add", "CAP_SETUID", "--cap-add", "CAP_SETGID"]
        if os.geteuid() == 0
        else ["--unshare-user"]
    )
    parents = dict.fromkeys(str(parent) for path in _visible() for parent in [*reversed(Path(path).parents)][1:])
    for parent in parents:
        words += ["--perms", "0755", "--dir", parent]
    for path in _visible():
        words += ["--ro-bind", path, path]
    words += ["--perms", "0755", "--dir", "/dev", "--dev-bind", "/dev/null", "/dev/null"]
    return [
        *words,
        "--perms",
        "1777",
        "--size",
        str(limits.disk),
        "--tmpfs",
        "/tmp",
        "--chdir",
        "/tmp",
        "--remount-ro",
        "/",
    ]
