"""Parts of a source: files, and built-in streams; each yields documents or conversations with positions."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from slmkit.config import UserError
from slmkit.data.sources.built_in import BUILT_IN
from slmkit.data.sources.documents import SPELLINGS, BadRow, Document, Item, Message, Position, pieces
from slmkit.data.sources.files import ROW_KINDS, TEXT_KINDS, File, damage, kind_of, listed
from slmkit.data.sources.pair_formats import Judged, Pair, kto_formats, pair_formats
from slmkit.data.sources.row_formats import RowFormats, chat_formats, text_formats
from slmkit.data.sources.rows import ROWS
from slmkit.data.sources.settings import SourceSettings
from slmkit.data.sources.text_files import text_documents
from slmkit.hub import one_line


@dataclass(frozen=True)
class FilePart:
    """The rows of one file. A position is that of its kind, plus `piece`: how many pieces of the next row were read."""

    file: File
    settings: SourceSettings
    unused: Counter[str] = field(default_factory=Counter)  # rows with an unused column, by column
    spelled: Counter[str] = field(default_factory=Counter)  # documents, or pieces, that spell a special token

    def documents(self, start: Position) -> Iterator[Item[Document]]:
        if self.file.kind in TEXT_KINDS:
            items = self._until_damage(text_documents(self.file, start, self.settings.separator), start)
        else:
            items = self._cut(self._rows(start, text_formats(self.settings, self.unused)), start)
        for item, position in items:
            if isinstance(item, Document):
                self.spelled.update(spelling for spelling in SPELLINGS if spelling in item.text)
            yield item, position

    def conversations(self, start: Position) -> Iterator[Item[list[Message]]]:
        return self._rows_of_objects(start, chat_formats(self.settings, self.unused))

    def questions(self, start: Position) -> Iterator[Item[list[Message]]]:
        return self.conversations(start)

    def pairs(self, start: Position) -> Iterator[Item[Pair]]:
        return self._rows_of_objects(start, pair_formats(self.settings, self.unused))

    def judgements(self, start: Position) -> Iterator[Item[Judged]]:
        return self._rows_of_objects(start, kto_formats(self.settings, self.unused))

    def describe(self) -> dict[str, Any]:
        return self.file.describe()

    def looks(self) -> tuple[str, int | None, int | None]:
        path = Path(self.file.name)
        if not path.is_file():
            return self.file.name, None, None
        return str(path.absolute()), path.stat().st_size, path.stat().st_mtime_ns

    def _rows_of_objects(self, start: Position, formats: RowFormats) -> Iterator[tuple[Any, Position]]:
        if self.file.kind not in ROW_KINDS:
            if kind_of(self.settings.path) not in TEXT_KINDS:  # a folder of several kinds
                reason = f"{self.file.kind} files, which hold no rows"
                return iter([(BadRow(reason, f"{self.file.name}", harmless=True), start)])
            raise UserError(f"{self.file.name}: expected {listed(ROW_KINDS)} (also as .gz or .zst)")
        return self._rows(start, formats)

    def _rows(self, start: Position, formats: RowFormats) -> Iterator[tuple[Any, Position]]:
        return self._until_damage(ROWS[self.file.kind](self.file, start, formats), start)

    def _cut(self, rows: Iterator[tuple[Any, Position]], start: Position) -> Iterator[Item[Document]]:
        """Long texts in pieces; pieces of the first row before `start` are skipped."""
        before, given = start, start.get("piece", 0)
        for value, position in rows:
            if isinstance(value, BadRow):
                yield value, position
            elif not value.strip():
                yield BadRow("blank", f"{self.file.name}: a row without text at {position}", harmless=True), position
            else:
                for number, document in enumerate(pieces(value), start=1):
                    if number > given:
                        yield document, position if document.ends else {**before, "piece": number}
            before, given = position, 0

    def _until_damage(self, items: Iterator[Any], start: Position) -> Iterator[Any]:
        """All items before the damaged place of a file, then a `BadRow` for it."""
        position = start
        try:
            for item in items:
                position = item[1]
                yield item
        except damage() as error:
            as_what = " as parquet" if self.file.kind == ".parquet" else ""
            place = ", ".join(f"{unit} {number}" for unit, number in position.items() if number and unit != "file")
            behind = f" (behind {place})" if place else ""
            message = f"{self.file.name}: cannot be read{as_what}{behind}: {one_line(error)}"
            yield BadRow("unreadable file", message), position


@dataclass(frozen=True)
class StoryPart:
    """A built-in, endless stream; the position is a `row`."""

    kind: str
    seed: int
    held_out: bool = False

    def documents(self, start: Position) -> Iterator[tuple[Document, Position]]:
        for row in itertools.count(start.get("row", 0)):
            yield Document(BUILT_IN[self.kind].text(self.seed, row, self.held_out)), {"row": row + 1}

    def conversations(self, start: Position) -> Iterator[tuple[list[Message], Position]]:
        for row in itertools.count(start.get("row", 0)):
            yield BUILT_IN[self.kind].conversation(self.seed, row, self.held_out), {"row": row + 1}

    def questions(self, start: Position) -> Iterator[tuple[list[Message], Position]]:
        for row in itertools.count(start.get("row", 0)):
            yield BUILT_IN[self.kind].question(self.seed, row, self.held_out), {"row": row + 1}

    def pairs(self, start: Position) -> Iterator[tuple[Pair, Position]]:
        for row in itertools.count(start.get("row", 0)):
            yield BUILT_IN[self.kind].pair(self.seed, row, self.held_out), {"row": row + 1}

    def judgements(self, start: Position) -> Iterator[tuple[Judged, Position]]:
        """Right and wrong answers alternately, each to its own question."""
        for row in itertools.count(start.get("row", 0)):
            pair = BUILT_IN[self.kind].pair(self.seed, row, self.held_out)
            yield Judged(pair.sides[row % 2], label=row % 2 == 0), {"row": row + 1}

    def describe(self) -> dict[str, Any]:
        return {"path": self.kind, "seed": self.seed}

    def looks(self) -> tuple[str, int | None, int | None]:
        return f"{self.kind} {self.seed}", None, None
