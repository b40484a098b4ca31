"""Streams objects of a JSON file that is a list, or an object with a list in it, from any offset."""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

from slmkit.data.sources.documents import PIECE
from slmkit.data.sources.files import File
from slmkit.data.sources.lines import LONGEST_ROW

SPACE = re.compile(r"[ \t\r\n]*")
BRACKETS = re.compile(r'"(?:[^"\\]|\\.)*"|[][{}]', re.DOTALL)
NEAR_THE_END = 16  # characters: longer than any number or escape that may be cut at the end of the buffer


class Value(NamedTuple):
    """An entry of a list, or its problem, and the byte offset after it."""

    value: Any
    problem: str
    end: int


class BrokenJsonError(ValueError):
    """Invalid JSON after which the next entry cannot be found."""


def whole_number(digits: str) -> float:
    """The number as an int, from 4,300 digits on as a float, since Python's `int` refuses more."""
    return int(digits) if len(digits) < 4300 else float(digits)


class RepeatedKeyError(ValueError):
    """An object has the same key twice; Python's reader would silently keep the last value."""


def _object(members: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(members)
    if len(found) < len(members):
        keys = [key for key, _ in members]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise RepeatedKeyError(f"the key {twice!r} stands twice in one object; keep one of them")
    return found


DECODER = json.JSONDecoder(parse_int=whole_number, object_pairs_hook=_object)


def first_character(file: File) -> str:
    """The first character of a JSON file that is not white space; '' if there is none."""
    text = _Characters(file, 0)
    with text.stream:
        return text.next_one()


def list_entries(file: File, offset: int = 0) -> Iterator[Value]:
    """The entries of the list in a file, or of the first list in its object.

    `offset` is 0 or that of an earlier `Value`. Raises `BrokenJsonError` if the next entry cannot be found, and for an
    object with no list of objects, or two.
    """
    text = _Characters(file, offset)
    in_object = False
    if offset == 0:
        in_object = text.next_one() == "{"
        if in_object and not _up_to_a_list(text):
            raise BrokenJsonError("an object without a list of rows in it")
        text.take("[")
    while (character := text.next_one()) != "]":
        if character == ",":
            text.take(",")
        else:
            yield text.value()
    text.take("]")
    if in_object and _up_to_a_list(text):
        raise BrokenJsonError("an object with two lists of rows in it: make each a file of its own")


def _up_to_a_list(text: _Characters) -> bool:
    """Skip members of an object up to the next list of objects; False if there is none."""
    while (character := text.next_one()) not in ("}", ""):
        if character in "{,":
            text.take(character)
            continue
        text.value()  # the name of the member
        text.take(":")
        if text.next_one() == "[" and text.opens_objects():
            return True
        text.value()
    return False


class _Characters:
    """Buffered characters of a file; `end` is the byte offset of the next one."""

    def __init__(self, file: File, offset: int) -> None:
        self.stream, self.end = file.open_at(offset), offset
        self.decoder = codecs.getincrementaldecoder("utf-8")("surrogateescape")
        self.text, self.at, self.is_all = "", 0, False

    def next_one(self) -> str:
        """The next character that is not white space, not consumed; '' at the end."""
        while True:
            space = SPACE.match(self.text, self.at)
            assert space is not None
            self._take(space.end())
            if self.at < len(self.text):
                if self.end == 0 and self.text[self.at] == "\ufeff":
                    self._take(self.at + 1)
                    continue
                return self.text[self.at]
            if not self._more():
                return ""

    def take(self, character: str) -> None:
        if self.next_one() != character:
            raise BrokenJsonError(
                f"expected {character!r} at offset {self.end:,}, found {self.next_one() or 'the end'!r}"
            )
        self._take(self.at + 1)

    def opens_objects(self) -> bool:
        """Whether the list that comes next begins with an object."""
        while not (begun := re.compile(r"\[\s*([^\s])").match(self.text, self.at)):
            if not self._more():
                return False
        return begun[1] == "{"

    def value(self) -> Value:
        """The next value. An invalid one is skipped if its brackets show where it ends, else `BrokenJsonError`."""
        self.next_one()
        while True:
            try:
                value, end = DECODER.raw_decode(self.text, self.at)
                self._take(end)
                return Value(value, "", self.end)
            except json.JSONDecodeError as error:
                cut_short = error.msg.startswith("Unterminated") or error.pos >= len(self.text) - NEAR_THE_END
                problem = f"{error.msg} at offset {self.end + error.pos - self.at:,}"
                if cut_short and self._more():
                    continue
            except RepeatedKeyError as error:
                problem = str(error)
            except RecursionError:
                problem = f"objects within objects, too deep to be read, at offset {self.end:,}"
            self._take(self._end_of_brackets(problem))
            return Value(None, problem, self.end)

    def _end_of_brackets(self, problem: str) -> int:
        """The end of the object or list that begins here, by its brackets alone."""
        while True:
            depth = 0
            for match in BRACKETS.finditer(self.text, self.at):
                depth += (match[0] in "[{") - (match[0] in "]}")
                if depth == 0 and match[0] in "]}":
                    return match.end()
                if depth < 0 or (depth == 0 and match.start() == self.at):
                    break
            if depth <= 0 or not self._more():
                raise BrokenJsonError(problem)

    def _take(self, at: int) -> None:
        self.end += len(self.text[self.at : at].encode(errors="surrogateescape"))
        self.at = at

    def _more(self) -> bool:
        """Read more, doubling the unread buffer; False at the end, or if a value is longer than `LONGEST_ROW`."""
        rest = self.text[self.at :]
        if self.is_all or len(rest) > LONGEST_ROW:
            return False
        raw = self.stream.read(max(PIECE, len(rest)))
        self.is_all = not raw
        self.text, self.at = rest + self.decoder.decode(raw, final=self.is_all), 0
        return bool(raw)
