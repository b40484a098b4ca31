"""Reads a `.txt` file: one long text, or documents separated by `<|endoftext|>` lines, as in TinyStories."""

from __future__ import annotations

import re
from collections.abc import Iterator

from slmkit.data.sources.documents import PIECE, Document, Item, Position, cut_point
from slmkit.data.sources.files import File
from slmkit.data.sources.lines import Line, not_text, parts_of_lines

SEPARATOR = "<|endoftext|>"
NO_TEXT = re.compile("[\0\udc80-\udcff]")  # bytes that are not text, as decoded by `parts_of_lines`
LEFT_OUT = re.compile("\r(?=\n)|[\0\udc80-\udcff]")  # these, and the carriage return of Windows line ends


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
    for line in lines if separator is None else _taken_apart(lines, offset, separator):
        is_separator = line.text.strip() == (separator or SEPARATOR) and (at_line_start or separator is not None)
        at_line_start = line.text.endswith("\n")
        if is_separator:
            text = "".join(raw)
            document = Document(
                _cleaned(text).removesuffix("\n"), begins=not position["inside"]
            )  # the line end belongs to the separator
            yield from _reported(file, text, offset, position)
            offset = line.end
            position, is_blank = {"offset": offset, "inside": 0}, not (position["inside"] or document.text.strip())
            if not is_blank:
                yield document, position
            raw, size = [], 0
            continue
        offset = line.end
        raw.append(line.text)
        size += len(line.text)
        if size <= PIECE:
            continue
        joined = "".join(raw)
        text = _cleaned(joined)
        size = len(text)
        if size > PIECE:
            cut = cut_point(text, PIECE)
            raw_cut = _raw_cut(joined, cut)
            piece, left = joined[:raw_cut], joined[raw_cut:]
            begins = offset - _bytes(left)
            yield from _reported(file, piece, begins, position)
            was_inside, position = position["inside"], {"offset": begins, "inside": 1}
            yield Document(text[:cut], ends=False, begins=not was_inside), position
            raw, size = [left], len(left)
    text = "".join(raw)
    yield from _reported(file, text, offset, position)
    if position["inside"] or _cleaned(text).strip():
        yield Document(_cleaned(text), begins=not position["inside"]), {"offset": offset, "inside": 0}


def _taken_apart(lines: Iterator[Line], offset: int, separator: str) -> Iterator[Line]:
    """The lines, split so that each separator is a line of its own with the line end after it."""
    found, held = re.compile(rf"({re.escape(separator)}[ \t]*\r?\n?)"), ""
    for line in lines:
        *parts, last = found.split(held + line.text)
        # The end of a part of a long line may be the beginning of a separator.
        kept = 0 if last.endswith("\n") else len(separator) - 1
        held = last[max(0, len(last) - kept) :] if kept else ""
        for text in (*parts, last[: len(last) - len(held)]):
            offset += _bytes(text)
            if text:
                yield Line(text, offset)
    if held:
        yield Line(held, offset + _bytes(held))


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
    if len(_cleaned(raw)) == len(raw):
        return cut
    for match in LEFT_OUT.finditer(raw):  # `cut` becomes an index in `raw`
        if match.start() >= cut:
            break
        cut += 1
    return cut


def _reported(file: File, raw: str, end: int, position: Position) -> Iterator[Item[Document]]:
    """A `BadRow` for the bytes in `raw` that are not text; `raw` ends at the offset `end`."""
    first = None if _is_text(raw) else NO_TEXT.search(raw)
    if first:
        place = end - _bytes(raw[first.start() :])
        yield not_text(file, place, rows=len(NO_TEXT.findall(raw))), position


def _bytes(raw: str) -> int:
    return len(raw.encode(errors="surrogateescape"))


def _byte_before(file: File, offset: int) -> bytes:
    with file.open_at(offset - 1) as stream:
        return stream.read(1)
