"""Lines of text files with byte offsets, in memory bounded for any line length."""

from __future__ import annotations

import codecs
from collections.abc import Iterator
from typing import NamedTuple

from slmkit.data.sources.documents import PIECE, BadRow
from slmkit.data.sources.files import File

LONGEST_ROW = 1 << 25  # bytes; a row is held in memory several times while it is parsed


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
            if len(raw) > LONGEST_ROW:
                while not raw.endswith(b"\n") and (raw := stream.readline(PIECE)):
                    offset += len(raw)
                yield Line("", offset, _too_long(file, start, offset - start))
                continue
            try:
                text = raw.decode()
            except UnicodeDecodeError as error:
                yield Line("", offset, not_text(file, start + error.start))
                continue
            if "\0" in text:
                yield Line("", offset, not_text(file, start + raw.index(b"\0")))
                continue
            yield Line(text.removeprefix("\ufeff") if start == 0 else text, offset)


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


def _too_long(file: File, start: int, length: int) -> BadRow:
    return BadRow(
        "row too long",
        f"{file.name}: the line at offset {start} has {length:,} bytes, and a row may have {LONGEST_ROW:,}; "
        "split it, or make it a .txt file",
    )


def not_text(file: File, offset: int, rows: int = 1) -> BadRow:
    return BadRow(
        "not UTF-8",
        f"{file.name}: expected UTF-8 text, found a byte that is not UTF-8 at offset {offset}; "
        "convert the file or leave it out",
        rows,
    )
