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

ROW_KINDS = (".jsonl", ".json", ".csv", ".tsv", ".parquet", ".arrow")
# One text each: source code and what is written beside it.
WRITTEN = (
    ".md", ".rst", ".tex", ".html", ".css", ".py", ".js", ".ts", ".jsx", ".tsx", ".c", ".h", ".cpp", ".hpp", ".cc",
    ".cs", ".rs", ".go", ".java", ".kt", ".swift", ".scala", ".rb", ".php", ".lua", ".jl", ".r", ".hs", ".ml", ".sh",
    ".sql",
)  # fmt: skip
TEXT_KINDS = (".txt", *WRITTEN)
KINDS = (*TEXT_KINDS, *ROW_KINDS)
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
    return File(str(path), lambda: path.open("rb"), lambda: described(path))


def described(path: Path) -> dict[str, Any]:
    """Path, size in bytes and sha256 of a file."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {"path": str(path), "bytes": path.stat().st_size, "sha256": digest}


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
    """The kinds as messages name them: those of source code are many."""
    names = [kind for kind in kinds if kind not in WRITTEN]
    if len(names) < len(kinds):
        names[names.index(".txt")] = "text (.txt, .md, source code)"
    return f"{', '.join(names[:-1])} or {names[-1]}"


def pyarrow() -> Any:
    """Raises `UserError` where it is not installed."""
    try:
        import pyarrow
        import pyarrow.ipc
        import pyarrow.parquet
    except ImportError:
        raise UserError("reading .parquet and .zst files needs pyarrow: pip install slmkit[train]") from None
    return pyarrow


def damage() -> tuple[type[Exception], ...]:
    """What reading a damaged file raises."""
    arrow = () if "pyarrow" not in sys.modules else (pyarrow().ArrowException,)
    return (OSError, EOFError, zlib.error, *arrow)
