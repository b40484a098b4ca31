"""Lines of text files with byte offsets, and the documents of a `.txt` file; in memory bounded for any line length.

A `.txt` file is one long text, or documents separated by `<|endoftext|>` lines, as in TinyStories.
"""

from __future__ import annotations

import codecs
import itertools
import re
from collections.abc import Iterator
from typing import NamedTuple

from slmkit.data.sources.documents import PIECE, BadRow, Document, Item, Position, cut_point
from slmkit.data.sources.files import File

LONGEST_ROW = 1 << 25  # bytes; a row is held in memory several times while it is parsed
SEPARATOR = "<|endoftext|>"
NO_TEXT = re.compile("[\0\udc80-\udcff]")  # bytes that are not text, as decoded by `parts_of_lines`
LEFT_OUT = re.compile("\r(?=\n)|[\0\udc80-\udcff]")  # these, and the carriage return of Windows line ends


class Line(NamedTuple):
    """A line (or a part of one) with its line end, and the offset after it in the uncompressed file."""

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


def parts_of_lines(file: File, offset: int = 0) -> Iterator[Line]:
    """`whole_lines`, with lines of more than `PIECE` bytes split into parts, of which the last has a line end.

    Invalid UTF-8 becomes Python's surrogate escapes, so that the text encodes back to the bytes read.
    """
    decoder = codecs.getincrementaldecoder("utf-8")("surrogateescape")
    with file.open_at(offset) as stream:
        while True:
            raw = stream.readline(PIECE)
            is_first, offset = offset == 0, offset + len(raw)
            text = decoder.decode(raw, final=not raw)
            if text:
                held = len(decoder.getstate()[0])  # bytes of an incomplete character
                yield Line(text.removeprefix("\ufeff") if is_first else text, offset - held)
            if not raw:
                return


def text_documents(file: File, start: Position, separator: str | None = None) -> Iterator[Item[Document]]:
    """Documents between separator lines, or between any `separator`s; without them the whole file is one.

    Windows line ends become `\\n`.

    A position is the `offset` in the uncompressed file, and whether that is `inside` a document begun before. Bytes
    that are not text are removed, and reported before the document they are removed from.
    """
    offset, inside = start.get("offset", 0), start.get("inside", 0)
    position = {"offset": offset, "inside": inside}
    at_line_start = offset == 0 or _byte_before(file, offset) == b"\n"
    raw: list[str] = []  # of the document or piece that is being read; it ends at `offset`
    size = 0
    lines = parts_of_lines(file, offset)
    for line in itertools.chain(lines if separator is None else _split_lines(lines, offset, separator), [None]):
        is_separator = line is not None and line.text.strip() == (separator or SEPARATOR)
        if line is not None and not (is_separator and (at_line_start or separator)):
            at_line_start, offset = line.text.endswith("\n"), line.end
            raw.append(line.text)
            size += len(line.text)
            if size <= PIECE:
                continue
            joined = "".join(raw)
            text = _cleaned(joined)
            size = len(text)
            if size <= PIECE:
                continue
            cut = cut_point(text, PIECE)
            raw_cut = cut if len(text) == len(joined) else _raw_cut(joined, cut)
            piece, left = joined[:raw_cut], joined[raw_cut:]
            begins = offset - byte_length(left)
            yield from _reported(file, piece, begins, position)
            was_inside, position = position["inside"], {"offset": begins, "inside": 1}
            yield Document(text[:cut], ends=False, begins=not was_inside), position
            raw, size = [left], len(left)
            continue
        joined = "".join(raw)
        text = _cleaned(joined)
        yield from _reported(file, joined, offset, position)
        if line is not None:
            text = text.removesuffix("\n")  # it belongs to the separator
            at_line_start, offset = line.text.endswith("\n"), line.end
        was_inside, position = position["inside"], {"offset": offset, "inside": 0}
        if was_inside or text.strip():
            yield Document(text, begins=not was_inside), position
        raw, size = [], 0


def _split_lines(lines: Iterator[Line], offset: int, separator: str) -> Iterator[Line]:
    """The lines, split so that each separator is a line of its own with the line end after it."""
    found, held = re.compile(rf"({re.escape(separator)}[ \t]*\r?\n?)"), ""
    for line in lines:
        *parts, last = found.split(held + line.text)
        # The end of a part of a long line may be the beginning of a separator.
        kept = 0 if last.endswith("\n") else len(separator) - 1
        held = last[max(0, len(last) - kept) :] if kept else ""
        for text in (*parts, last[: len(last) - len(held)]):
            offset += byte_length(text)
            if text:
                yield Line(text, offset)
    if held:
        yield Line(held, offset + byte_length(held))


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


def _reported(file: File, raw: str, end: int, position: Position) -> Iterator[Item[Document]]:
    """A `BadRow` for the bytes in `raw` that are not text; `raw` ends at the offset `end`."""
    first = None if _is_text(raw) else NO_TEXT.search(raw)
    if first:
        place = end - byte_length(raw[first.start() :])
        yield _not_text(file, place, rows=len(NO_TEXT.findall(raw))), position


def _not_text(file: File, offset: int, rows: int = 1) -> BadRow:
    found = f"{file.name}: expected UTF-8 text, found a byte that is not UTF-8 at offset {offset}"
    return BadRow("not UTF-8", f"{found}; convert the file or leave it out", rows)


def byte_length(raw: str) -> int:
    """UTF-8 bytes of a text decoded by `parts_of_lines`."""
    return len(raw.encode(errors="surrogateescape"))


def _byte_before(file: File, offset: int) -> bytes:
    with file.open_at(offset - 1) as stream:
        return stream.read(1)
