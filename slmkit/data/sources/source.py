"""A source: everything that one entry of a recipe's `data.sources` yields, from any position on."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol, TypeVar

from slmkit.config import UserError
from slmkit.data.sources.documents import BadRow, Document, Item, Message, Position
from slmkit.data.sources.folders import Chosen
from slmkit.data.sources.pair_formats import Judged, Pair
from slmkit.data.sources.parts import FilePart, StoryPart
from slmkit.data.sources.remote import RetryPolicy
from slmkit.data.sources.settings import SourceSettings
from slmkit.hub import NetworkError

T = TypeVar("T")
Looks = tuple[str, int | None, int | None]  # name, bytes and modification time, as far as known
ROWS_LOOKED_AT = 50  # to tell their kind
READ_WHOLE = 1 << 32  # largest source in bytes that is read to tell whether it has changed


class Part(Protocol):
    """A numbered part of a source: a file, or an endless built-in stream."""

    def documents(self, start: Position) -> Iterator[Item[Document]]: ...

    def conversations(self, start: Position) -> Iterator[Item[list[Message]]]: ...

    def questions(self, start: Position) -> Iterator[Item[list[Message]]]: ...

    def pairs(self, start: Position) -> Iterator[Item[Pair]]: ...

    def judgements(self, start: Position) -> Iterator[Item[Judged]]: ...

    def describe(self) -> dict[str, Any]: ...

    def looks(self) -> Looks: ...


class Source:
    """Documents or conversations of one source, in a fixed order.

    A position is a few integers: `file` is the index in `parts`, `documents` the number of whole documents before it,
    and the rest is the position in the file. `skipped` counts rows that were left out, by reason; `noted` counts rows
    that were kept with a problem, by problem.
    """

    def __init__(
        self, settings: SourceSettings, parts: Sequence[Part], patience: RetryPolicy, found: Sequence[Chosen] = ()
    ) -> None:
        self.settings, self.parts, self.patience = settings, parts, patience
        self.found = [one for one in found if one.folder]
        self.skipped: Counter[str] = Counter()
        self.noted: Counter[str] = Counter()
        self.first_seen: dict[str, str] = {}  # by reason: a message about the first row with its place

    @property
    def endless(self) -> bool:
        """Whether it never ends: the built-in corpus without a limit in `documents`."""
        return self.settings.documents is None and any(isinstance(part, StoryPart) for part in self.parts)

    def read(self, start: Position | None = None) -> Iterator[tuple[Document, Position]]:
        """Every document, each with the position after it, from which another `read` continues.

        Documents longer than `PIECE` characters come in pieces. Blank ones are left out. Raises `UserError` for
        unreadable data unless `on_bad_row` is `skip`, and if there is no document.
        """
        return self._read(lambda part, inner: part.documents(inner), lambda document: document.ends, start)

    def read_conversations(self, start: Position | None = None) -> Iterator[tuple[list[Message], Position]]:
        """`read` for rows that are conversations: lists of messages, `{"role": …, "content": …}`.

        If a data set weights its turns, messages also have a `weight`; 0 means not learned.
        """
        return self._read(lambda part, inner: part.conversations(inner), lambda conversation: True, start)

    def read_conversation_rows(self) -> Iterator[Item[list[Message]]]:
        """`read_conversations`, with a `BadRow` in place of each bad row, for callers that read ahead: they call
        `leave_out` when they get to it.
        """
        return self._read_rows(lambda part, inner: part.conversations(inner), lambda conversation: True, None)

    def read_questions(self) -> Iterator[tuple[list[Message], Position]]:
        """`read_conversations` for conversations that end with the right answer to a question."""
        return self._read(lambda part, inner: part.questions(inner), lambda question: True, None)

    def read_pairs(self) -> Iterator[tuple[Pair, Position]]:
        """`read_conversations` for rows with a better and a worse answer."""
        for pair, position in self._read(lambda part, inner: part.pairs(inner), lambda pair: True, None):
            if pair.prompt_removed:
                self.note("pairs whose answers began with the prompt, which was removed from them", pair.place)
            yield pair, position

    def read_judgements(self) -> Iterator[tuple[Judged, Position]]:
        """`read_conversations` for rows whose answer is labelled good or bad."""
        return self._read(lambda part, inner: part.judgements(inner), lambda judged: True, None)

    def reads(self) -> str:
        """The kind of its first rows by their columns: `pairs`, `judgements`, `conversations`, or else `documents`.

        If no row has the columns of any, the first kind with the columns of rows left out, or that fits the settings.
        """
        left_out: list[str] = []
        possible: list[str] = []
        for name in ("pairs", "judgements", "conversations", "documents"):
            try:
                items = [item for item, _ in itertools.islice(getattr(self.parts[0], name)({}), ROWS_LOOKED_AT)]
            except UserError:  # a file without rows, or settings for other rows
                continue
            self.count_anew()
            possible.append(name)
            rows = [item for item in items if isinstance(item, BadRow)]
            refused = any(row.has_columns and not row.harmless for row in rows)
            if len(rows) < len(items) or (refused and not left_out):
                return name
            left_out += [name for row in rows if row.has_columns]
        return next(iter([*left_out, *reversed(possible)]), "documents")

    def describe(self) -> list[dict[str, Any]]:
        """Descriptions of its files, for the header of shards."""
        return [self.patience.until_done(part.describe) for part in self.parts]

    def fingerprint(self, known: Mapping[str, str | None] | None = None) -> dict[str, str | None]:
        """Tells whether it has changed: `looks` is from names, sizes and times of its files, `content` from their
        contents.

        A `known` one is returned unchanged if `looks` is the same; more than `READ_WHOLE` bytes are not read.
        """
        looks = [part.looks() for part in self.parts]
        found = hashlib.sha256(json.dumps(looks).encode()).hexdigest()
        if known is not None and known["looks"] == found:
            return dict(known)
        if sum(size or 0 for _, size, _ in looks) > READ_WHOLE:
            return {"looks": found, "content": None}
        described = [{name: value for name, value in one.items() if name != "path"} for one in self.describe()]
        content = hashlib.sha256(json.dumps(described).encode()).hexdigest()
        same = known is not None and content == known["content"]
        return dict(known) if known is not None and same else {"looks": found, "content": content}

    def report(self) -> list[str]:
        """One line for each reason for which rows were left out or noted, for unused columns, and for each folder."""
        counted = [(f"skipped ({reason})", rows, reason) for reason, rows in self.skipped.most_common()]
        counted += [(what, rows, what) for what, rows in self.noted.most_common()]
        lines = [
            f"{self.settings.label}: {rows:,} {what}, such as {self.first_seen[reason]}"
            for what, rows, reason in counted
        ]
        files = [part for part in self.parts if isinstance(part, FilePart)]
        unused = sum((part.unused for part in files), Counter[str]())
        spelled = sum((part.spelled for part in files), Counter[str]())
        quoted = [(name if "'" in name else repr(name), _rows(rows)) for name, rows in unused.most_common()]
        if len(quoted) == 1:
            lines.append(f"{self.settings.label}: column {quoted[0][0]} is not used ({quoted[0][1]})")
        elif quoted:
            lines.append(f"{self.settings.label}: columns that are not used: {_first_ones(quoted)}")
        if spelled:
            named = [(name, f"{count:,}") for name, count in spelled.most_common()]
            said = "special tokens that are spelled in texts and read as text"
            lines.append(f"{self.settings.label}: {said}: {_first_ones(named)}")
        return lines + [one.line() for one in self.found]

    def count_anew(self) -> None:
        """Reset the counts, before it is read from the beginning again."""
        for counted in (self.skipped, self.noted, self.first_seen):
            counted.clear()
        for part in self.parts:
            if isinstance(part, FilePart):
                part.unused.clear()
                part.spelled.clear()

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

    def _read(
        self, items: Callable[[Part, Position], Iterator[Item[T]]], ends: Callable[[T], bool], start: Position | None
    ) -> Iterator[tuple[T, Position]]:
        for item, behind in self._read_rows(items, ends, start):
            if isinstance(item, BadRow):
                self.leave_out(item)
            else:
                yield item, behind

    def _read_rows(
        self, items: Callable[[Part, Position], Iterator[Item[T]]], ends: Callable[[T], bool], start: Position | None
    ) -> Iterator[Item[T]]:
        """Items from `start` on; after a network error, from the last position. Raises `UserError` if none."""
        position = start or {"file": 0, "documents": 0}
        found, left_out = start is not None, ""
        while True:
            try:
                for item, behind in self._read_once(items, ends, position):
                    position = behind
                    if isinstance(item, BadRow):
                        left_out = left_out or item.message
                    else:
                        found = True
                        self.patience.succeeded()
                    yield item, position
                break
            except NetworkError as error:
                self.patience.wait(error)
        if not found:
            why = f"every row was left out, such as {left_out}" if left_out else "only blank lines or no rows"
            raise UserError(f"{self.settings.path}: it holds no document: {why}")

    def _read_once(
        self, items: Callable[[Part, Position], Iterator[Item[T]]], ends: Callable[[T], bool], position: Position
    ) -> Iterator[Item[T]]:
        index, documents = position["file"], position["documents"]
        for number in range(index, len(self.parts)):
            if documents == self.settings.documents:
                return
            for item, inner in items(self.parts[number], position if number == index else {}):
                documents += not isinstance(item, BadRow) and ends(item)
                yield item, {**inner, "file": number, "documents": documents}
                if documents == self.settings.documents:
                    return


def _rows(count: int) -> str:
    return f"{count:,} row{'' if count == 1 else 's'}"


def _first_ones(counted: Sequence[tuple[str, str]], most: int = 8) -> str:
    """Names with their counts, and how many more there are."""
    more = f" and {len(counted) - most} more" if len(counted) > most else ""
    return ", ".join(f"{name} ({count})" for name, count in counted[:most]) + more
