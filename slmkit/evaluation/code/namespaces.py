"""Runs a command in Linux namespaces of its own, where bubblewrap is not installed.

    python -I -S -c TEXT '{"visible": [PATH…], "disk": BYTES}' COMMAND…

The command sees the paths, read-only, and an empty /tmp of `disk` bytes; no network, no other processes, nothing else
of the machine. It has no privileges, unless root starts it: then it can still become another user. It ends, with
everything that it has started, when this process or the one that has started it ends.

The file imports nothing but the standard library. See user_namespaces(7), pid_namespaces(7), pivot_root(2),
mount_setattr(2) (Linux 5.12).
"""

from __future__ import annotations

import ctypes
import json
import os
import platform
import select
import signal
import sys

NEW_NAMESPACES = 0x20000 | 0x04000000 | 0x08000000 | 0x20000000 | 0x40000000  # mounts, names, IPC, processes, network
NEW_USERS = 0x10000000
BIND_ALL, NO_SET_USER_ID, PRIVATE_ALL = 4096 | 16384, 2, (1 << 18) | 16384  # mount(2)
PIVOT_ROOT = {"x86_64": 155, "aarch64": 41, "riscv64": 41}
MOUNT_SETATTR, HERE, RECURSIVE, READ_ONLY = 442, -100, 0x8000, 1
DETACH = 2
END_WITH_PARENT, NOT_TRACEABLE, NO_NEW_PRIVILEGES = (1, signal.SIGKILL, 0, 0, 0), (4, 0, 0, 0, 0), (38, 1, 0, 0, 0)
LIBC = ctypes.CDLL(None, use_errno=True)


def call(name: str, *arguments: object) -> None:
    """A function of the C library. Raises `OSError`."""
    values = [value.encode() if isinstance(value, str) else value for value in arguments]
    values = [ctypes.c_long(value) if isinstance(value, int) else value for value in values]
    if getattr(LIBC, name)(*values) < 0:
        raise OSError(ctypes.get_errno(), f"{name}: {os.strerror(ctypes.get_errno())}")


def enter_namespaces() -> None:
    """Root needs no user namespace where it has its full rights; everybody else does."""
    user, group = os.geteuid() or 1000, os.getegid() or 1000
    if os.geteuid() == 0 and LIBC.unshare(NEW_NAMESPACES) == 0:
        return
    maps = {"setgroups": "deny", "uid_map": f"{user} {os.geteuid()} 1", "gid_map": f"{group} {os.getegid()} 1"}
    call("unshare", NEW_NAMESPACES | NEW_USERS)
    for name, text in maps.items():
        with open(f"/proc/self/{name}", "w") as file:
            file.write(text)


def read_only(path: str, flags: int = 0) -> None:
    attributes = (ctypes.c_uint64 * 4)(READ_ONLY | NO_SET_USER_ID)
    call("syscall", MOUNT_SETATTR, HERE, path, flags, ctypes.byref(attributes), ctypes.sizeof(attributes))


def change_root(visible: list[str], disk: int) -> None:
    root = "/proc"  # exists everywhere, and nothing visible is below it
    call("mount", None, "/", None, PRIVATE_ALL, None)
    call("mount", "tmpfs", root, "tmpfs", NO_SET_USER_ID, "size=1m,mode=755")
    os.mkdir(f"{root}/tmp")
    call("mount", "tmpfs", f"{root}/tmp", "tmpfs", NO_SET_USER_ID, f"size={disk},mode=1777,nr_inodes=16k")
    for path in visible:
        if os.path.isdir(path):
            os.makedirs(root + path, exist_ok=True)
        else:
            os.makedirs(os.path.dirname(root + path), exist_ok=True)
            open(root + path, "x").close()
        call("mount", path, root + path, None, BIND_ALL, None)
        read_only(root + path, RECURSIVE)
    read_only(root)
    os.chdir(root)
    call("syscall", PIVOT_ROOT[platform.machine()], ".", ".")  # the old root is now mounted over the new one
    call("umount2", ".", DETACH)
    os.chdir("/tmp")


def exit_code(status: int) -> int:
    code = os.waitstatus_to_exitcode(status)
    return code if code >= 0 else 128 - code


def main(settings: dict[str, object], command: list[str]) -> int:
    parent = os.getppid()
    enter_namespaces()
    call("prctl", *END_WITH_PARENT)  # prctl(2)
    if os.getppid() != parent:
        return 1
    change_root(**settings)  # type: ignore[arg-type]
    call("prctl", *NO_NEW_PRIVILEGES)
    reader, writer = os.pipe()
    if first := os.fork():
        return exit_code(os.waitpid(first, 0)[1])

    # Process 1 of the namespace: when it ends, the kernel ends all others. The command cannot trace it or signal it.
    os.close(writer)
    call("prctl", *END_WITH_PARENT)
    call("prctl", *NOT_TRACEABLE)
    if select.select([reader], [], [], 0)[0]:  # the parent has ended before the call above
        return 1
    second = os.fork()
    if not second:
        os.execv(command[0], command)
    while True:
        process, status = os.wait()
        if process == second:
            return exit_code(status)


sys.exit(main(json.loads(sys.argv[1]), sys.argv[2:]))
