"""Atomic, durable file writes, bounded reads, and names that are free."""

from __future__ import annotations

import contextlib
import errno
import glob
import hashlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

LARGEST_TEXT = 64 * 2**20


def write_whole(path: Path, content: str | bytes) -> None:
    """Write `content` to `path` atomically: a reader sees the old content or the new, never a part.

    Of a symbolic link the file that it names is written. Raises `OSError`, with `path` as its file name, if it cannot
    be written, and for a folder, a device or another thing that is no regular file.
    """
    place = Path(os.path.realpath(path)) if path.is_symlink() else path
    if os.path.lexists(place) and not place.is_file():
        raise OSError(errno.EINVAL, "is a folder" if place.is_dir() else "is no regular file", str(path))
    fresh = place.with_name(f".{place.name}-{os.getpid()}")
    try:
        fresh.write_bytes(content.encode() if isinstance(content, str) else content)
        sync(fresh)
        os.replace(fresh, place)
    except OSError as error:
        if error.errno is None:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from None
    finally:
        with contextlib.suppress(OSError):
            fresh.unlink(missing_ok=True)
    sync(place.parent)


def read_text(path: str | Path) -> str:
    """The text of a file in UTF-8, without a byte order mark. Raises `OSError` for more than `LARGEST_TEXT` bytes, so
    that a device without an end is no trap, and `UnicodeDecodeError` for other text.
    """
    with open(path, "rb") as file:
        content = file.read(LARGEST_TEXT + 1)
    if len(content) > LARGEST_TEXT:
        raise OSError(errno.EFBIG, f"larger than {LARGEST_TEXT:,} bytes", str(path))
    return content.decode("utf-8-sig")


def cache_folder() -> Path:
    """Where slmkit keeps what it can make again: `slmkit` in $XDG_CACHE_HOME, by default ~/.cache.

    Raises `OSError` for a user without one.
    """
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "slmkit"
    except RuntimeError:  # neither HOME nor an entry in the list of users
        raise OSError("no folder to keep them in: set HOME or XDG_CACHE_HOME") from None


def file_sha256(path: Path) -> str:
    """sha256 (hex) of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sync(path: Path) -> None:
    """fsync a file or folder."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def free_path(wanted: str | Path) -> Path:
    """`wanted`, or `wanted-2`, `-3`… if that name is taken."""
    path, number = Path(wanted), 1
    while path.exists():
        number += 1
        path = Path(f"{wanted}-{number}")
    return path


@contextlib.contextmanager
def staged(beside: Path, name: str) -> Iterator[Path]:
    """A folder in `beside`, deleted at the end: what was put into its `done` is moved to `beside` before, durably, if
    nothing failed. It replaces what has the same names there.

    Folders that killed processes left are deleted too. Raises `OSError` if something cannot be written or moved.
    """
    beside.mkdir(parents=True, exist_ok=True)
    prefix = f".{name}.{os.uname().nodename}."  # another machine may have the same disk and other processes
    for left in beside.glob(f"{glob.escape(prefix)}*"):
        try:
            os.kill(int(left.suffix[1:]), 0)  # asks only whether it runs
        except ProcessLookupError:
            shutil.rmtree(left, ignore_errors=True)
        except (ValueError, OSError):
            continue
    folder = beside / f"{prefix}{os.getpid()}"
    done, old = folder / "done", folder / "old"
    try:
        done.mkdir(parents=True)
        yield folder
        for path in done.rglob("*"):
            sync(path)
        for made in sorted(done.iterdir()):
            final = beside / made.name
            if final.is_dir():
                os.rename(final, old)
            try:
                os.rename(made, final)
            except BaseException:
                if old.exists():
                    os.rename(old, final)
                raise
        sync(beside)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
