"""Files of text: which of them a path means, and their bytes, uncompressed, from any offset on."""

from __future__ import annotations

import gzip
import hashlib
import io
import sys
import zlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, TypeAlias, cast

from slmkit.config import UserError
from slmkit.data.sources.documents import PIECE

KINDS = (".txt", ".jsonl", ".json", ".csv", ".parquet")
CONVERSATION_KINDS = (".jsonl", ".json", ".parquet")
COMPRESSIONS = (".gz", ".zst")

Paths: TypeAlias = str | Path | Iterable[str | Path]


@dataclass(frozen=True)
class File:
    """A file somewhere: its name as messages show it, what is in it, and a way to open its bytes as stored."""

    name: str
    open: Callable[[], BinaryIO]
    describe: Callable[[], dict[str, Any]]

    @property
    def kind(self) -> str:
        return kind_of(self.name)

    def open_at(self, offset: int = 0) -> BinaryIO:
        """The uncompressed bytes from `offset` on: sought where the file is plain, read and dropped where it isn't."""
        compression = Path(self.name.lower()).suffix
        stream = self.open()
        if compression not in COMPRESSIONS:
            stream.seek(offset)
            return stream
        if compression == ".gz":
            stream = cast(BinaryIO, gzip.GzipFile(fileobj=stream))
        else:
            # Not zstandard's own reader: it ends without a word where a file was cut short.
            stream = cast(BinaryIO, io.BufferedReader(pyarrow().CompressedInputStream(stream, "zstd"), PIECE))
        while offset and (dropped := len(stream.read(min(offset, PIECE)))):
            offset -= dropped
        return stream


def local_file(path: str | Path) -> File:
    path = Path(path)
    return File(str(path), lambda: path.open("rb"), lambda: describe_sources(path)[0])


def find_files(paths: Paths, kinds: Sequence[str] = KINDS) -> list[Path]:
    """The files meant by paths of files and folders: folders are searched, sorted, for the kinds known here.

    Raises `UserError` for a missing or empty file, one of another kind, and a folder without any of these kinds.
    """
    files = []
    for path in [Path(paths)] if isinstance(paths, str | Path) else map(Path, paths):
        if path.is_dir():
            inside = [file for file in sorted(path.rglob("*")) if file.is_file() and kind_of(file.name) in kinds]
            if not inside:
                raise UserError(f"{path}: no {listed(kinds)} file in this folder")
            files += inside
        elif not path.exists():
            raise UserError(f"{path}: no such file or folder")
        elif kind_of(path.name) not in kinds:
            raise UserError(f"{path}: expected {listed(kinds)} (all but .parquet also as .gz or .zst)")
        else:
            files.append(path)
    if not files:
        raise UserError("no files to read: the list of paths is empty")
    for path in files:
        if path.stat().st_size == 0:
            raise UserError(f"{path}: the file is empty")
    return files


def describe_sources(paths: Paths) -> list[dict[str, Any]]:
    """Path, size in bytes and sha256 of every file, for whoever wants to know later what something was made of."""
    described = []
    for path in find_files(paths):
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        described.append({"path": str(path), "bytes": path.stat().st_size, "sha256": digest})
    return described


def kind_of(name: str) -> str:
    """The extension that says what is inside: `.jsonl` of `a.jsonl.gz`; empty for hidden files."""
    inner = Path(name.lower())
    if inner.name.startswith("."):
        return ""
    if inner.suffix in COMPRESSIONS:
        inner = inner.with_suffix("")
        return "" if inner.suffix == ".parquet" else inner.suffix
    return inner.suffix


def listed(kinds: Sequence[str]) -> str:
    return f"{', '.join(kinds[:-1])} or {kinds[-1]}"


def pyarrow() -> Any:
    """Raises `UserError` where it is not installed."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise UserError("reading .parquet and .zst files needs pyarrow: pip install slmkit[train]") from None
    return pyarrow


def damage() -> tuple[type[Exception], ...]:
    """What reading a damaged file raises."""
    arrow = () if "pyarrow" not in sys.modules else (pyarrow().ArrowException,)
    return (OSError, EOFError, zlib.error, *arrow)


def one_line(error: BaseException) -> str:
    return " ".join(str(error).split())
