"""Objects out of a JSON file that is one list, or one object with a list in it; one at a time, from any offset on."""

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
NEAR_THE_END = 16  # characters: more than any number or escape that the end of what is read may cut


class Value(NamedTuple):
    """An entry of a list, or what is wrong with it, and the offset of the byte behind it."""

    value: Any
    problem: str
    end: int


class BrokenJsonError(ValueError):
    """What stands in a file is no JSON, and nobody can say where it goes on."""


def whole_number(digits: str) -> float:
    """Python refuses to read whole numbers of more than 4,300 digits."""
    return int(digits) if len(digits) < 4300 else float(digits)


class RepeatedKeyError(ValueError):
    """An object has one key twice: Python's own reader would keep the last value and drop the others."""


def _object(members: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(members)
    if len(found) < len(members):
        keys = [key for key, _ in members]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise RepeatedKeyError(f"the key {twice!r} stands twice in one object; keep one of them")
    return found


DECODER = json.JSONDecoder(parse_int=whole_number, object_pairs_hook=_object)


def first_character(file: File) -> str:
    """The first one of a JSON file that is no space; '' where there is none."""
    text = _Characters(file, 0)
    with text.stream:
        return text.next_one()


def list_entries(file: File, offset: int = 0) -> Iterator[Value]:
    """The entries of the list that a file is, or of the first list in the object that it is.

    `offset` is 0 or that of a `Value` before. Raises `BrokenJsonError` where nobody can say where the next entry
    begins, and for an object with two lists of objects, or none.
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
    """Pass over the members of an object up to the next one that is a list of objects; False where there is none."""
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
    """The characters of a file, read as they are needed; `end` is the offset of the next one in the file."""

    def __init__(self, file: File, offset: int) -> None:
        self.stream, self.end = file.open_at(offset), offset
        self.decoder = codecs.getincrementaldecoder("utf-8")("surrogateescape")
        self.text, self.at, self.is_all = "", 0, False

    def next_one(self) -> str:
        """The next character that is no space, not taken yet; '' at the end."""
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
        """The next value. One that is no JSON is passed over where its brackets say where it ends."""
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
        """Where the object or list that begins here ends, by its brackets alone."""
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
        """Read on, as much again as is there and not taken; False at the end, or where a value is longer than a row."""
        rest = self.text[self.at :]
        if self.is_all or len(rest) > LONGEST_ROW:
            return False
        raw = self.stream.read(max(PIECE, len(rest)))
        self.is_all = not raw
        self.text, self.at = rest + self.decoder.decode(raw, final=self.is_all), 0
        return bool(raw)
