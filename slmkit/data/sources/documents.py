"""The items of sources: documents, conversations, pairs and judged answers, each with a position to continue from."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias, TypeVar

from slmkit.config import read_table

# Longer texts are read and tokenized in pieces of this many characters, for bounded memory and parallel work.
PIECE = 1 << 16

WORDS = read_table(Path(__file__).with_name("words.yaml"))  # how public data sets name things
SPELLINGS: tuple[str, ...] = (*WORDS["special_tokens"],)

Message: TypeAlias = dict[str, Any]
# The position after a document, as a few integers for JSON: which file, then the byte or row in it.
Position: TypeAlias = dict[str, int]


class Document(NamedTuple):
    """A text, or a piece of a long one: `ends` is False in all but its last piece, `begins` in all but its first.

    `left_out`: bytes that it has in its file besides, such as those of Windows line ends and a byte-order mark.
    """

    text: str
    ends: bool = True
    begins: bool = True
    left_out: int = 0


class Conversation(list[Message]):
    """Messages, with the `tools` that they may call (JSON schemas) or None.

    `place` is where they were read, such as `chats.jsonl:17`; `unused` the unused keys of messages.
    """

    def __init__(self, messages: Iterable[Message], place: str = "", tools: list[dict[str, Any]] | None = None) -> None:
        super().__init__(messages)
        self.place, self.tools = place, tools
        self.unused: list[str] = []


def tools_of(messages: list[Message]) -> list[dict[str, Any]] | None:
    """The tools of a conversation that was read; None for a plain list."""
    return messages.tools if isinstance(messages, Conversation) else None


class Pair(NamedTuple):
    """Two conversations, the better one first, whose first `shared` messages are the same. `place`: where it was read.

    `prompt_removed`: both answers began with the prompt, which was removed.
    """

    chosen: list[Message]
    rejected: list[Message]
    shared: int
    place: str = ""
    prompt_removed: bool = False

    @property
    def sides(self) -> tuple[list[Message], list[Message]]:
        return self.chosen, self.rejected


class Judged(NamedTuple):
    """A conversation whose last answer was judged good (`label` True) or bad. `place`: where it was read."""

    messages: list[Message]
    label: bool
    place: str = ""


class BadRow(NamedTuple):
    """A row that could not be read: the reason for counting, a message with its place, and how many rows it stands for.

    A `harmless` one (blank text) is counted and never refused. `has_columns`: whether it has the columns of what was to
    be read.
    """

    reason: str
    message: str
    rows: int = 1
    harmless: bool = False
    has_columns: bool = False


class RowError(ValueError):
    """A row that is left out, or refused unless it is `harmless`. `reason` is one of few, for counting."""

    def __init__(self, message: str, reason: str = "not as expected", harmless: bool = False, rows: int = 1) -> None:
        super().__init__(message)
        self.reason, self.harmless, self.rows = reason, harmless, rows


T = TypeVar("T")
Item: TypeAlias = tuple[T | BadRow, Position]  # with the position after it


def pieces(text: str) -> Iterator[Document]:
    """A text as pieces of at most `PIECE` characters; the last one ends."""
    start = 0
    while len(text) - start > PIECE:
        length = cut_point(text[start : start + PIECE + 1], PIECE)
        yield Document(text[start : start + length], ends=False, begins=start == 0)
        start += length
    yield Document(text[start:], begins=start == 0)


def cut_point(text: str, limit: int) -> int:
    """The best index at or before `limit` to cut `text`, which is longer than `limit`.

    After a line end with text on both sides, since a byte-level tokenizer then gives the same tokens as without the
    cut; else after any line end, else before a space, else at `limit`.
    """
    last_end = text.rfind("\n", 0, limit)
    line_end = last_end
    while line_end > limit // 2:
        if not (text[line_end - 1].isspace() or text[line_end + 1].isspace()):
            return line_end + 1
        line_end = text.rfind("\n", 0, line_end)
    if last_end >= 0:
        return last_end + 1
    space = text.rfind(" ", 1, limit)
    return space if space > 0 else limit
