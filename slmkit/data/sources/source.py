"""A source: everything that one entry of a recipe's `data.sources` gives, read from any position on."""

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
Looks = tuple[str, int | None, int | None]  # name, bytes and time of the last change, as far as they are at hand
ROWS_LOOKED_AT = 50  # to tell what kind of rows they are
READ_WHOLE = 1 << 32  # bytes of a source that are read to tell whether it has changed


class Part(Protocol):
    """A piece of a source that positions count: a file, or an endless stream of the built-in corpus."""

    def documents(self, start: Position) -> Iterator[Item[Document]]: ...

    def conversations(self, start: Position) -> Iterator[Item[list[Message]]]: ...

    def questions(self, start: Position) -> Iterator[Item[list[Message]]]: ...

    def pairs(self, start: Position) -> Iterator[Item[Pair]]: ...

    def judgements(self, start: Position) -> Iterator[Item[Judged]]: ...

    def describe(self) -> dict[str, Any]: ...

    def looks(self) -> Looks: ...


class Source:
    """Documents or conversations of one source, in a fixed order.

    A position is a few integers: `file` numbers `parts`, `documents` counts the whole documents before it, and the rest
    says where in the file it is. `skipped` counts the rows that were left out, by reason; `noted` those that were kept
    and are not all that they could be, by what is the matter with them.
    """

    def __init__(
        self, settings: SourceSettings, parts: Sequence[Part], patience: RetryPolicy, found: Sequence[Chosen] = ()
    ) -> None:
        self.settings, self.parts, self.patience = settings, parts, patience
        self.found = [one for one in found if one.folder]
        self.skipped: Counter[str] = Counter()
        self.noted: Counter[str] = Counter()
        self.first_seen: dict[str, str] = {}  # of each reason: the line that names it and its place

    @property
    def endless(self) -> bool:
        """Whether it never runs out: the built-in corpus where `documents` sets no end."""
        return self.settings.documents is None and any(isinstance(part, StoryPart) for part in self.parts)

    def read(self, start: Position | None = None) -> Iterator[tuple[Document, Position]]:
        """Every document, each with the position just behind it, from which another `read` goes on with the next.

        Documents longer than `PIECE` characters come in pieces. Blank ones are left out. Raises `UserError` for what
        cannot be read unless `on_bad_row` is `skip`, and when there is not one document.
        """
        return self._read(lambda part, inner: part.documents(inner), lambda document: document.ends, start)

    def read_conversations(self, start: Position | None = None) -> Iterator[tuple[list[Message], Position]]:
        """As `read`, for rows that are conversations: lists of messages, `{"role": …, "content": …}`.

        Where a data set weighs its turns, a message also has a `weight`; 0 means that it is not to be learned.
        """
        return self._read(lambda part, inner: part.conversations(inner), lambda conversation: True, start)

    def read_conversation_rows(self) -> Iterator[Item[list[Message]]]:
        """As `read_conversations`, but rows that are none stand in their places: for those who read ahead, and call
        `leave_out` when their turn has come.
        """
        return self._read_rows(lambda part, inner: part.conversations(inner), lambda conversation: True, None)

    def read_questions(self) -> Iterator[tuple[list[Message], Position]]:
        """As `read_conversations`, of those that end with the right answer to a question."""
        return self._read(lambda part, inner: part.questions(inner), lambda question: True, None)

    def read_pairs(self) -> Iterator[tuple[Pair, Position]]:
        """As `read_conversations`, of rows with a better and a worse answer."""
        for pair, position in self._read(lambda part, inner: part.pairs(inner), lambda pair: True, None):
            if pair.prompt_removed:
                self.note("pairs whose answers began with the prompt, which was removed from them", pair.place)
            yield pair, position

    def read_judgements(self) -> Iterator[tuple[Judged, Position]]:
        """As `read_conversations`, of rows whose answer is labelled good or bad."""
        return self._read(lambda part, inner: part.judgements(inner), lambda judged: True, None)

    def reads(self) -> str:
        """What its first rows are by their columns: `pairs`, `judgements`, `conversations`, or else `documents`.

        Where no row has the columns of any, it is the first kind whose rows are all left out, or that the settings fit.
        """
        left_out: list[str] = []
        possible: list[str] = []
        for name in ("pairs", "judgements", "conversations", "documents"):
            try:
                items = [item for item, _ in itertools.islice(getattr(self.parts[0], name)({}), ROWS_LOOKED_AT)]
            except UserError:  # a file without rows, or settings that fit other rows
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
        """What was read, for the header of whatever is made of it."""
        return [self.patience.until_done(part.describe) for part in self.parts]

    def fingerprint(self, known: Mapping[str, str | None] | None = None) -> dict[str, str | None]:
        """Tells whether it is what it was: `looks` by names, sizes and times of its files, `content` by what they hold.

        A `known` one is returned as it is where nothing looks changed; more than `READ_WHOLE` bytes are not read.
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
        """A line for each reason for which rows were left out or noted, of unused columns, and of a folder."""
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
        """Before it is read from the beginning again."""
        for counted in (self.skipped, self.noted, self.first_seen):
            counted.clear()
        for part in self.parts:
            if isinstance(part, FilePart):
                part.unused.clear()
                part.spelled.clear()

    def note(self, what: str, message: str) -> None:
        """Count a row that is kept; `message` names it and its place."""
        self.noted[what] += 1
        self.first_seen.setdefault(what, message)

    def leave_out(self, row: BadRow) -> None:
        """Count a row that is not kept. Raises `UserError` where none may be left out."""
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
        """What there is from `start` on; after a failure of the network, again from the last position."""
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
