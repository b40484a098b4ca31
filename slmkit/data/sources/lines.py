"""Lines of text files with their byte offsets, in bounded memory however long a line is."""

from __future__ import annotations

import codecs
from collections.abc import Iterator
from typing import NamedTuple

from slmkit.data.sources.documents import PIECE, BadRow
from slmkit.data.sources.files import File

LONGEST_ROW = 1 << 25  # bytes; a row is held whole, and several times over while it is taken apart


class Line(NamedTuple):
    """A line (or a part of one) with its line end, and the offset behind it in the uncompressed file."""

    text: str
    end: int
    problem: BadRow | None = None


def whole_lines(file: File, offset: int = 0) -> Iterator[Line]:
    """Every line from `offset` on, from UTF-8 with or without a byte-order mark.

    One that is longer than `LONGEST_ROW` or that is no text comes empty, with its problem.
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
    """As `whole_lines`, but a line of more than `PIECE` bytes comes in several parts, of which the last has a line end.

    Bytes that are no UTF-8 come as Python's surrogate escapes, so that the text encodes back to what was read.
    """
    decoder = codecs.getincrementaldecoder("utf-8")("surrogateescape")
    with file.open_at(offset) as stream:
        while True:
            raw = stream.readline(PIECE)
            is_first, offset = offset == 0, offset + len(raw)
            text = decoder.decode(raw, final=not raw)
            if text:
                held = len(decoder.getstate()[0])  # bytes of a character whose rest is in the next part
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
