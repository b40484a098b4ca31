"""A source: everything that one entry of a recipe's `data.sources` yields, from any position on."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from slmkit.config import UserError, one_line
from slmkit.data.sources.built_in import BUILT_IN, BuiltInPart
from slmkit.data.sources.documents import SPELLINGS, BadRow, Document, Item, Pair, Position, RowError, pieces
from slmkit.data.sources.files import ROW_KINDS, TEXT_KINDS, File, damage, kind_of, listed, text_documents
from slmkit.data.sources.folders import Chosen
from slmkit.data.sources.remote import RetryPolicy, find_files, is_remote
from slmkit.data.sources.row_formats import RowFormats
from slmkit.data.sources.rows import ROWS
from slmkit.data.sources.settings import SourceSettings
from slmkit.files.hub import NetworkError

ROWS_LOOKED_AT = 50  # to tell their kind
MOST_NAMED = 8  # columns or tokens, in a line of the report
READ_WHOLE = 1 << 32  # largest source in bytes that is read to tell whether it has changed


@dataclass(frozen=True)
class FilePart:
    """The part of a source that is one file. A position is that of its kind, plus `piece`: how many pieces of the next
    row were read.
    """

    file: File
    settings: SourceSettings

    def items(self, kind: str, start: Position, unused: Counter[str]) -> Iterator[Item[Any]]:
        """Its items of a kind, such as `pairs`, then a `BadRow` if the rest cannot be read."""
        position, items = start, self._items(kind, start, unused)
        try:
            for item, position in items:
                yield item, position
        except RowError as error:
            yield BadRow(error.reason, str(error), error.rows), position
        except damage() as error:
            as_what = " as parquet" if self.file.kind == ".parquet" else ""
            place = ", ".join(f"{unit} {number}" for unit, number in position.items() if number and unit != "file")
            behind = f" (behind {place})" if place else ""
            message = f"{self.file.name}: cannot be read{as_what}{behind}: {one_line(error)}"
            yield BadRow("unreadable file", message), position

    def _items(self, kind: str, start: Position, unused: Counter[str]) -> Iterator[Item[Any]]:
        if kind == "text" and self.file.kind in TEXT_KINDS:
            yield from text_documents(self.file, start, self.settings.separator)
            return
        formats = RowFormats(kind, self.settings, unused)
        if self.file.kind in ROW_KINDS:
            before, given = start, start.get("piece", 0)
            for place, row, position in ROWS[self.file.kind](self.file, start, formats):
                item = row if isinstance(row, BadRow) else formats.convert(place, row)
                if not isinstance(item, str):
                    yield item, position
                elif not item.strip():
                    yield BadRow("blank", f"{place}: a row without text", harmless=True), position
                else:  # a long text in pieces, of which those of the first row before `start` are skipped
                    for number, document in enumerate(pieces(item), start=1):
                        if number > given:
                            yield document, position if document.ends else {**before, "piece": number}
                before, given = position, 0
        elif kind_of(self.settings.path) in TEXT_KINDS:
            raise UserError(f"{self.file.name}: expected {listed(ROW_KINDS)} (also as .gz or .zst)")
        else:  # a file of a folder of several kinds
            reason = f"{self.file.kind} files, which hold no rows"
            yield BadRow(reason, f"{self.file.name}: expected {listed(ROW_KINDS)}", harmless=True), start

    def describe(self) -> dict[str, Any]:
        return self.file.describe()

    def stat(self) -> tuple[str, int | None, int | None]:
        """Name, bytes and modification time, as far as known."""
        path = Path(self.file.name)
        if not path.is_file():
            return self.file.name, None, None
        return str(path.absolute()), path.stat().st_size, path.stat().st_mtime_ns


class Source:
    """Documents or conversations of one source, in a fixed order.

    A position is a few integers: `file` is the index in `parts`, `documents` the number of whole documents before it,
    and the rest is the position in the file. `skipped` counts rows that were left out, by reason; `noted` rows that
    were kept with a problem, by problem; `unused` those with a column that is not used, by column; `spelled` texts that
    spell a special token.
    """

    def __init__(
        self,
        settings: SourceSettings,
        parts: Sequence[FilePart | BuiltInPart],
        retries: RetryPolicy,
        found: Sequence[Chosen] = (),
    ) -> None:
        self.settings, self.parts, self.retries = settings, parts, retries
        self.found = [one for one in found if one.folder]
        self.position: Position = {"file": 0}  # after the last item that was read
        self.count_anew()

    def count_anew(self) -> None:
        """Reset the counts, before it is read from the beginning again."""
        self.skipped, self.noted, self.unused, self.spelled = (Counter[str]() for _ in range(4))
        self.first_seen: dict[str, str] = {}  # by reason: a message about the first row with its place

    def read(self, start: Position | None = None, kind: str = "text") -> Iterator[tuple[Any, Position]]:
        """Every document, each with the position after it, from which another `read` continues.

        `kind` is `text`, `conversations`, `questions` (conversations that end with the right answer), `pairs` or
        `judgements`. Texts are `Document`s; those longer than `PIECE` characters come in pieces. Conversations are
        lists of messages, `{"role": …, "content": …}`; if a data set weights its turns, messages also have a `weight`,
        of which 0 means not learned. Blank texts are left out. Raises `UserError` for unreadable data unless
        `on_bad_row` is `skip`, and if there is no document.
        """
        for item, behind in self.read_rows(kind, start):
            if isinstance(item, BadRow):
                self.leave_out(item)
            else:
                yield item, behind

    def reads(self) -> str:
        """The kind of its first rows by their columns: `pairs`, `judgements`, `conversations`, or else `text`.

        If no row has the columns of any, the first kind with the columns of rows left out, or that fits the settings.
        """
        return self.retries.until_done(self._kind_of_first_rows)

    def _kind_of_first_rows(self) -> str:
        left_out: list[str] = []
        possible: list[str] = []
        for kind in ("pairs", "judgements", "conversations", "text"):
            try:
                items = [item for item, _ in itertools.islice(self.parts[0].items(kind, {}, Counter()), ROWS_LOOKED_AT)]
            except UserError:  # a file without rows, or settings for other rows
                continue
            possible.append(kind)
            rows = [item for item in items if isinstance(item, BadRow)]
            refused = any(row.has_columns and not row.harmless for row in rows)
            if len(rows) < len(items) or (refused and not left_out):
                return kind
            left_out += [kind for row in rows if row.has_columns]
        return next(iter([*left_out, *reversed(possible)]), "text")

    def describe(self) -> list[dict[str, Any]]:
        """Descriptions of its files, for the header of shards."""
        return [self.retries.until_done(part.describe) for part in self.parts]

    def fingerprint(self, known: Mapping[str, str | None] | None = None) -> dict[str, str | None]:
        """Tells whether it has changed: `looks` is from names, sizes and times of its files, `content` from their
        contents.

        A `known` one is returned unchanged if `looks` is the same; more than `READ_WHOLE` bytes are not read.
        """
        stats = [part.stat() for part in self.parts]
        found = hashlib.sha256(json.dumps(stats).encode()).hexdigest()
        if known is not None and known["looks"] == found:
            return dict(known)
        if sum(size or 0 for _, size, _ in stats) > READ_WHOLE:
            return {"looks": found, "content": None}
        described = [{name: value for name, value in one.items() if name != "path"} for one in self.describe()]
        content = hashlib.sha256(json.dumps(described).encode()).hexdigest()
        same = known is not None and content == known["content"]
        return dict(known) if known is not None and same else {"looks": found, "content": content}

    def report(self) -> list[str]:
        """One line for each reason for which rows were left out or noted, for unused columns, and for each folder."""
        counted = [(f"skipped ({reason})", rows, reason) for reason, rows in self.skipped.most_common()]
        counted += [(what, rows, what) for what, rows in self.noted.most_common()]
        lines = [f"{rows:,} {what}, such as {self.first_seen[reason]}" for what, rows, reason in counted]
        unused = [(name if "'" in name else repr(name), _rows(rows)) for name, rows in self.unused.most_common()]
        if len(unused) == 1:
            lines.append(f"column {unused[0][0]} is not used ({unused[0][1]})")
        elif unused:
            lines.append(f"columns that are not used: {_first_ones(unused)}")
        if self.spelled:
            spelled = [(name, f"{count:,}") for name, count in self.spelled.most_common()]
            lines.append(f"special tokens that are spelled in texts and read as text: {_first_ones(spelled)}")
        return [f"{self.settings.label}: {line}" for line in lines] + [one.line() for one in self.found]

    def note(self, what: str, message: str) -> None:
        """Count a row that is kept with a problem; `message` names the row's place."""
        self.noted[what] += 1
        self.first_seen.setdefault(what, message)

    def leave_out(self, row: BadRow) -> None:
        """Count a row that is left out. Raises `UserError` if `on_bad_row` is `refuse`."""
        if self.settings.on_bad_row == "refuse" and not row.harmless:
            raise UserError(row.message)
        self.skipped[row.reason] += row.rows
        self.first_seen.setdefault(row.reason, row.message)

    def read_rows(self, kind: str, start: Position | None = None) -> Iterator[Item[Any]]:
        """`read`, with a `BadRow` in place of each bad row, for callers that read ahead and `leave_out` it later.

        After a network error it goes on at the last position.
        """
        position = start or {"file": 0, "documents": 0}
        found, left_out, number = start is not None, "", position["file"]
        while number < len(self.parts) and position["documents"] != self.settings.documents:
            part = self.parts[number]
            try:
                for item, inner in part.items(kind, position if position["file"] == number else {}, self.unused):
                    ends = item.ends if isinstance(item, Document) else not isinstance(item, BadRow)
                    position = {**inner, "file": number, "documents": position["documents"] + ends}
                    if isinstance(item, BadRow):
                        left_out = left_out or item.message
                    else:
                        found = True
                        self.retries.succeeded()
                    if isinstance(item, Pair) and item.prompt_removed:
                        self.note("pairs whose answers began with the prompt, which was removed from them", item.place)
                    if isinstance(item, Document) and isinstance(part, FilePart):
                        self.spelled.update(spelling for spelling in SPELLINGS if spelling in item.text)
                    self.position = position
                    yield item, position
                    if position["documents"] == self.settings.documents:
                        return
                number += 1
            except NetworkError as error:
                self.retries.wait(error)
        if not found:
            why = f"every row was left out, such as {left_out}" if left_out else "only blank lines or no rows"
            raise UserError(f"{self.settings.path}: no documents found: {why}")


def _rows(count: int) -> str:
    return f"{count:,} row{'' if count == 1 else 's'}"


def _first_ones(counted: Sequence[tuple[str, str]]) -> str:
    """Names with their counts, and how many more there are."""
    more = f" and {len(counted) - MOST_NAMED} more" if len(counted) > MOST_NAMED else ""
    return ", ".join(f"{name} ({count})" for name, count in counted[:MOST_NAMED]) + more


def open_source(
    settings: SourceSettings, seed: int = 0, retries: RetryPolicy | None = None, held_out: bool = False
) -> Source:
    """The source for `settings`; `seed` and `held_out` select the stream of a built-in source.

    Raises `UserError` if there is nothing to read, with what was looked for.
    """
    retries = retries or RetryPolicy(settings.retry_for)
    if settings.path in BUILT_IN:
        if settings.mapping or settings.row_format or settings.separator:
            raise UserError(f"{settings.path} is built in and has no columns: remove columns, row_format and separator")
        return Source(settings, [BuiltInPart(settings.path, seed, held_out)], retries)
    files, found = retries.until_done(lambda: find_files(settings))
    return Source(settings, [FilePart(file, settings) for file in files], retries, found)


def open_together(several: Sequence[SourceSettings], seed: int = 0) -> Source:
    """One source of several paths, read one after the other; all other settings are the first one's."""
    opened = [open_source(settings, seed) for settings in several]
    parts, found = [part for one in opened for part in one.parts], [chosen for one in opened for chosen in one.found]
    return Source(opened[0].settings, parts, opened[0].retries, found)


def expect_source(settings: SourceSettings) -> None:
    """Raises `UserError` if a local file or folder does not exist. Reads nothing and uses no network."""
    path = settings.path
    if path not in BUILT_IN and not is_remote(path) and not Path(path).exists():
        raise UserError(f"{path}: no such file or folder")
