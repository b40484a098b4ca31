"""Files of sources: their kinds, and reading uncompressed bytes from any offset."""

from __future__ import annotations

import gzip
import hashlib
import io
import sys
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from slmkit.config import UserError
from slmkit.data.sources.documents import PIECE, WORDS

ROW_KINDS = (".jsonl", ".json", ".csv", ".tsv", ".parquet", ".arrow")
WRITTEN: tuple[str, ...] = (*WORDS["written"],)  # kinds of files with one text each
TEXT_KINDS = (".txt", *WRITTEN)
KINDS = (*TEXT_KINDS, *ROW_KINDS)
COMPRESSIONS = (".gz", ".zst")
# First bytes of files that are not UTF-8 text: what they are, and what to do.
NOT_TEXT: dict[bytes, str] = {first.encode("latin-1"): what for first, what in WORDS["not_text"].items()}


@dataclass(frozen=True)
class File:
    """A local or remote file: its name for messages, how to open its stored bytes, and its description."""

    name: str
    open: Callable[[], io.BufferedReader]
    describe: Callable[[], dict[str, Any]]

    @property
    def kind(self) -> str:
        return kind_of(self.name)

    def open_at(self, offset: int = 0) -> io.BufferedReader:
        """The uncompressed bytes from `offset` on; seeks in a plain file, reads and drops in a compressed one.

        Raises `OSError` at the beginning of a file that is clearly not UTF-8 text.
        """
        compression = Path(self.name.lower()).suffix
        stream = self.open()
        if compression not in COMPRESSIONS:
            stream.seek(offset)
            return stream if offset else self._expect_text(stream)
        if compression == ".gz":
            unpacked: Any = gzip.GzipFile(fileobj=stream)
        else:
            # zstandard's own reader gives no error for a truncated file.
            unpacked = io.BufferedReader(pyarrow().CompressedInputStream(stream, "zstd"), PIECE)
        reader = io.BufferedReader(_Unpacked(unpacked), PIECE)
        while offset and (dropped := len(reader.read1(min(offset, PIECE)))):
            offset -= dropped
        return reader

    def _expect_text(self, stream: io.BufferedReader) -> io.BufferedReader:
        head = stream.read(max(map(len, NOT_TEXT)))
        stream.seek(0)
        if what := next((what for first, what in NOT_TEXT.items() if head.startswith(first)), None):
            stream.close()
            raise OSError(f"it is {what}")
        return stream


class _Unpacked(io.RawIOBase):
    """The bytes of a compressed stream, unpacked in blocks of one size: so those in front of a damage are the same
    wherever reading begins. A buffered reader's `read1` and `readline` give all of them, then raise its error.
    """

    def __init__(self, stream: Any) -> None:
        self._stream, self._block = stream, memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        if not self._block:
            self._block = memoryview(self._stream.read1(PIECE))
        taken, self._block = self._block[: len(buffer)], self._block[len(buffer) :]
        buffer[: len(taken)] = taken
        return len(taken)

    def close(self) -> None:
        self._stream.close()
        super().close()


def local_file(path: str | Path) -> File:
    path = Path(path)
    return File(str(path), lambda: path.open("rb"), lambda: described(path))


def described(path: Path) -> dict[str, Any]:
    """Path, size in bytes and sha256 of a file."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {"path": str(path), "bytes": path.stat().st_size, "sha256": digest}


def kind_of(name: str) -> str:
    """The extension without compression: `.jsonl` for `a.jsonl.gz`; empty for hidden files."""
    inner = Path(name.lower())
    if inner.name.startswith("."):
        return ""
    if inner.suffix in COMPRESSIONS:
        inner = inner.with_suffix("")
        return "" if inner.suffix in (".parquet", ".arrow") else inner.suffix
    return inner.suffix


def listed(kinds: Sequence[str]) -> str:
    """The kinds as messages name them; those of source code are summarized."""
    names = [kind for kind in kinds if kind not in WRITTEN]
    if len(names) < len(kinds):
        names[names.index(".txt")] = "text (.txt, .md, source code)"
    return f"{', '.join(names[:-1])} or {names[-1]}"


def pyarrow() -> Any:
    """The module `pyarrow`. Raises `UserError` if it is not installed."""
    try:
        import pyarrow
        import pyarrow.ipc
        import pyarrow.parquet
    except ImportError:
        raise UserError("reading .parquet and .zst files needs pyarrow: pip install slmkit[train]") from None
    return pyarrow


def damage() -> tuple[type[Exception], ...]:
    """The exceptions that reading a damaged file raises."""
    arrow = () if "pyarrow" not in sys.modules else (pyarrow().ArrowException, SystemError)
    return (OSError, EOFError, zlib.error, *arrow)
