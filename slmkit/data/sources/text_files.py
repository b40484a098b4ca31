"""Lines of text files with byte offsets, and the documents of a `.txt` file; in memory bounded for any line length.

A `.txt` file is one long text, or documents separated by `<|endoftext|>` lines, as in TinyStories.
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Iterator
from typing import NamedTuple

from slmkit.data.sources.documents import PIECE, BadRow, Document, Item, Position, cut_point
from slmkit.data.sources.files import File, damage

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
            start, offset = offset, offset + len(raw)
            text, problem = "", None
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
    raw, is_all = "", False  # the text from `offset` on; it encodes back to the bytes read
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
                    offset, raw = len(codecs.BOM_UTF8), raw[1:]
                continue
            position, begins = {"offset": offset, "inside": inside}, not inside
            used, inside = match.end() if match else len(raw), int(len(text) > PIECE)
            if inside:
                cut = cut_point(text, PIECE)
                used = cut if len(text) == len(document) else _raw_cut(document, cut)
                document, text = raw[:used], text[:cut]
            elif match:
                text = text.removesuffix("\n")  # it belongs to the separator
            if bad := [] if _is_text(document) else [*NO_TEXT.finditer(document)]:
                yield _not_text(file, offset + byte_length(document[: bad[0].start()]), rows=len(bad)), position
            at_line_start, offset = raw[:used].endswith("\n"), offset + byte_length(raw[:used])
            raw = raw[used:]
            if inside or not begins or text.strip():
                yield Document(text, ends=not inside, begins=begins), {"offset": offset, "inside": inside}


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
