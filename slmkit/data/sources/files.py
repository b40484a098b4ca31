"""Files of sources: their kinds, uncompressed bytes from any offset, lines with offsets, and the documents of texts.

A `.txt` file is one long text, or documents separated by `<|endoftext|>` lines, as in TinyStories. Memory is bounded
for any length of lines.
"""

from __future__ import annotations

import codecs
import gzip
import io
import re
import sys
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from slmkit.config import importing
from slmkit.data.sources.documents import PIECE, WORDS, BadRow, Document, Item, Position, cut_point
from slmkit.files import file_sha256

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
        reader: io.BufferedReader = io.BufferedReader(_Unpacked(unpacked), PIECE)
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
    return File(str(path), lambda: Path(path).open("rb"), lambda: described(Path(path)))


def described(path: Path) -> dict[str, Any]:
    """Path, size in bytes and sha256 of a file."""
    return {"path": str(path), "bytes": path.stat().st_size, "sha256": file_sha256(path)}


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
    with importing("reading .parquet and .zst files needs pyarrow: pip install slmkit[train]"):
        import pyarrow
        import pyarrow.ipc
        import pyarrow.parquet
    return pyarrow


def damage() -> tuple[type[Exception], ...]:
    """The exceptions that reading a damaged file raises."""
    arrow = () if "pyarrow" not in sys.modules else (pyarrow().ArrowException, SystemError)
    return (OSError, EOFError, zlib.error, *arrow)


# -- lines and texts ---------------------------------------------------------------------------------------------------

LONGEST_ROW = 1 << 25  # bytes; a row is held in memory several times while it is parsed
SEPARATOR = "<|endoftext|>"
SEPARATOR_LINE = re.compile(rf"^[^\S\n]*{re.escape(SEPARATOR)}[^\S\n]*(?:\n|\Z)", re.MULTILINE)
NO_TEXT = re.compile("[\0\udc80-\udcff]")  # bytes that are not text, as decoded with surrogate escapes
LEFT_OUT = re.compile("\r(?=\n)|[\0\udc80-\udcff]")  # these, and the carriage return of Windows line ends


class Line(NamedTuple):
    """A line with its line end, and the offset after it in the uncompressed file."""

    text: str
    end: int
    problem: BadRow | None = None


def whole_lines(file: File, offset: int = 0) -> Iterator[Line]:
    """All lines from `offset` on, decoded as UTF-8 with or without byte-order mark.

    A line that is longer than `LONGEST_ROW` or is not text is empty and has a `problem`.
    """
    with file.open_at(offset) as stream:
        while raw := stream.readline(LONGEST_ROW + 1):
            start, offset, text, problem = offset, offset + len(raw), "", None
            if len(raw) > LONGEST_ROW:
                while not raw.endswith(b"\n") and (raw := stream.readline(PIECE)):
                    offset += len(raw)
                found = f"{file.name}: the line at offset {start} has {offset - start:,} bytes"
                way_out = f"a row may have {LONGEST_ROW:,}; split it, or make it a .txt file"
                problem = BadRow("row too long", f"{found}, and {way_out}")
            elif b"\0" in raw:
                problem = _not_text(file, start + raw.index(b"\0"))
            else:
                try:
                    text = raw.removeprefix(codecs.BOM_UTF8 if start == 0 else b"").decode()
                except UnicodeDecodeError as error:
                    problem = _not_text(file, offset - len(error.object) + error.start)
            yield Line(text, offset, problem)


def text_documents(file: File, start: Position, separator: str | None = None) -> Iterator[Item[Document]]:
    """Documents between separator lines, or between any `separator`s; without them the whole file is one.

    Windows line ends become `\\n`.

    A position is the `offset` in the uncompressed file, and whether that is `inside` a document begun before. Bytes
    that are not text are removed, and reported before the document they are removed from.
    """
    pattern = SEPARATOR_LINE if separator is None else re.compile(rf"{re.escape(separator)}[ \t]*\r?\n?")
    longest = len(separator or SEPARATOR)
    offset, inside = start.get("offset", 0), start.get("inside", 0)
    decoder = codecs.getincrementaldecoder("utf-8")("surrogateescape")
    # `raw`: the text from `offset` on; it encodes back to the bytes read. `mark`: bytes of a byte-order mark before it
    raw, is_all, mark = "", False, 0
    damaged: Exception | None = None  # what comes behind `raw` cannot be read
    with file.open_at(max(offset - 1, 0)) as stream:
        at_line_start = offset == 0 or stream.read(1) == b"\n" or offset == len(codecs.BOM_UTF8)
        while raw or not is_all:
            match = pattern.search(raw, 0 if at_line_start or separator else 1)
            document = raw[: match.start()] if match else raw
            text = _cleaned(document)
            is_complete = match.end() < len(raw) or damaged if match else len(text) > PIECE + longest
            if damaged and not is_complete:
                raise damaged
            if not (is_complete or is_all):
                try:
                    data = stream.read1(PIECE)
                except damage() as error:
                    damaged = error
                    continue
                raw, is_all = raw + decoder.decode(data, final=not data), not data
                if offset == 0 and raw.startswith("\ufeff"):
                    offset, raw = (mark := len(codecs.BOM_UTF8)), raw[1:]
                continue
            position, begins = {"offset": offset, "inside": inside}, not inside
            used, inside = match.end() if match else len(raw), int(len(text) > PIECE)
            if inside:
                cut = cut_point(text, PIECE)
                used = cut if len(text) == len(document) else _raw_cut(document, cut)
                document, text = raw[:used], text[:cut]
            left_out, mark = mark + len(document) - len(text), 0  # each of these characters is a byte
            if match and not inside and text.endswith("\n"):  # the line end belongs to the separator
                text, left_out = text[:-1], left_out - document.endswith("\r\n")
            if bad := [] if _is_text(document) else [*NO_TEXT.finditer(document)]:
                yield _not_text(file, offset + byte_length(document[: bad[0].start()]), rows=len(bad)), position
            at_line_start, offset = raw[:used].endswith("\n"), offset + byte_length(raw[:used])
            raw = raw[used:]
            if inside or not begins or text.strip():
                yield Document(text, not inside, begins, left_out), {"offset": offset, "inside": inside}


def _cleaned(raw: str) -> str:
    """The text without what `LEFT_OUT` matches, in two fast steps."""
    text = raw.replace("\r\n", "\n")
    return text if _is_text(text) else NO_TEXT.sub("", text)


def _is_text(raw: str) -> bool:
    """Whether `NO_TEXT` matches nothing, tested faster than by the pattern."""
    try:
        raw.encode()
    except UnicodeEncodeError:
        return False
    return "\0" not in raw


def _raw_cut(raw: str, cut: int) -> int:
    """The index in `raw` that corresponds to `cut` in the cleaned text."""
    for match in LEFT_OUT.finditer(raw):  # `cut` becomes an index in `raw`
        if match.start() >= cut:
            break
        cut += 1
    return cut


def _not_text(file: File, offset: int, rows: int = 1) -> BadRow:
    found = f"{file.name}: expected UTF-8 text, found a byte that is not UTF-8 at offset {offset}"
    return BadRow("not UTF-8", f"{found}; convert the file or leave it out", rows)


def byte_length(raw: str) -> int:
    """UTF-8 bytes of a text that was decoded with surrogate escapes."""
    return len(raw.encode(errors="surrogateescape"))
