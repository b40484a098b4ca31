"""What is done to files, counted; and one of those operations made to fail, or to be the last that ever happens."""

from __future__ import annotations

import builtins
import contextlib
import errno
import io
import os
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import safetensors.torch

# With os.open and os.fsync, all by which Python makes, moves and deletes files; pathlib and shutil go through them.
NAMES = ("mkdir", "rename", "replace", "rmdir", "symlink", "unlink")

Act = Callable[[Callable[[], None]], None]  # is handed what does one half of the operation (of a write), and may raise


class PowerCut(BaseException):
    """Nothing happens after it: no handler and no `finally` reaches the disk."""


def power_cut(half: Callable[[], None]) -> None:
    half()
    raise PowerCut


def disk_full(half: Callable[[], None]) -> None:
    half()
    raise OSError(errno.ENOSPC, "No space left on device")


def kill(half: Callable[[], None]) -> None:
    """As it is from outside: the process has no say in it."""
    half()
    os.kill(os.getpid(), signal.SIGKILL)


class Operations:
    """Counts operations on files from 1, and acts when one is reached."""

    def __init__(self, at: int | None, act: Act) -> None:
        self.at, self.act = at, act
        self.count, self.is_dead = 0, False
        self.unsynced: set[str] = set()  # files with content that may not be on the disk
        self.opened: dict[int, str] = {}
        self.lock = threading.RLock()

    def reach(self, half: Callable[[], Any] = lambda: None) -> None:
        if self.is_dead:
            raise PowerCut
        with self.lock:
            self.count += 1
            is_due = self.count == self.at
        if is_due:
            self.is_dead = self.act is power_cut
            self.act(half)

    def lose_what_was_not_synced(self) -> None:
        """What the disk may hold after the power has gone: files that nobody synced are empty."""
        for path in self.unsynced:
            if os.path.isfile(path):
                os.truncate(path, 0)

    def moved(self, source: Any, target: Any) -> None:
        source, target = os.fspath(source), os.fspath(target)
        self.unsynced = {
            target + path[len(source) :] if path == source or path.startswith(source + os.sep) else path
            for path in self.unsynced
        }


class _File:
    """A file whose writes are operations."""

    def __init__(self, file: Any, path: str, operations: Operations) -> None:
        self._file, self._path, self._operations = file, path, operations

    def write(self, content: Any) -> int:
        def half() -> None:
            self._file.write(content[: len(content) // 2])
            self._file.flush()

        self._operations.reach(half)
        self._operations.unsynced.add(self._path)
        return self._file.write(content)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def __enter__(self) -> _File:
        return self

    def __exit__(self, *details: object) -> None:
        self._file.close()


@contextlib.contextmanager
def operations_on_files(at: int | None = None, act: Act = power_cut) -> Iterator[Operations]:
    """Within, operations on files are counted, and the `at`-th is acted on."""
    operations = Operations(at, act)
    real = {name: getattr(os, name) for name in NAMES}
    real_os_open, real_fsync, real_open, real_serialize = os.open, os.fsync, io.open, safetensors.torch.serialize_file

    def wrapped(name: str) -> Callable[..., Any]:
        def operation(*arguments: Any, **options: Any) -> Any:
            operations.reach()
            result = real[name](*arguments, **options)
            if name in ("rename", "replace"):
                operations.moved(*arguments[:2])
            return result

        return operation

    def os_open(path: Any, *arguments: Any, **options: Any) -> int:
        operations.reach()
        descriptor = real_os_open(path, *arguments, **options)
        operations.opened[descriptor] = os.fspath(path)
        return descriptor

    def fsync(descriptor: int) -> None:
        operations.reach()
        real_fsync(descriptor)
        operations.unsynced.discard(operations.opened.get(descriptor, ""))

    def open_file(file: Any, mode: str = "r", *arguments: Any, **options: Any) -> Any:
        if not set(mode) & set("wax+"):
            return real_open(file, mode, *arguments, **options)
        operations.reach()
        return _File(real_open(file, mode, *arguments, **options), os.fspath(file), operations)

    def serialize(tensors: Any, filename: Any, *arguments: Any, **options: Any) -> None:
        def half() -> None:
            real_serialize(tensors, filename, *arguments, **options)
            os.truncate(filename, Path(filename).stat().st_size // 2)

        operations.reach(half)
        real_serialize(tensors, filename, *arguments, **options)
        operations.unsynced.add(os.fspath(filename))

    try:
        for name in NAMES:
            setattr(os, name, wrapped(name))
        os.open, os.fsync, io.open, builtins.open = os_open, fsync, open_file, open_file
        safetensors.torch.serialize_file = serialize
        yield operations
    finally:
        for name, function in real.items():
            setattr(os, name, function)
        os.open, os.fsync, io.open, builtins.open = real_os_open, real_fsync, real_open, real_open
        safetensors.torch.serialize_file = real_serialize
