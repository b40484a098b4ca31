"""What sources give: documents, whole or in pieces, and conversations, each with a position to go on from."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple, TypeAlias, TypeVar

# Longer texts are read, and tokenized, in pieces of this many characters: bounded memory, and work for every core.
PIECE = 1 << 16

# How texts spell the special tokens of well-known tokenizers. A spelling in a text is text, whatever the tokenizer.
SPELLINGS = (
    "<|endoftext|>", "<|end_of_text|>", "<|im_start|>", "<|im_end|>", "<|eot_id|>", "<|begin_of_text|>", "<s>", "</s>",
    "<bos>", "<eos>", "<pad>", "<start_of_turn>", "<end_of_turn>",
)  # fmt: skip

Message: TypeAlias = dict[str, Any]
# The place just behind a document, as a few integers that JSON can hold: which file, then the byte or the row in it.
Position: TypeAlias = dict[str, int]


class Document(NamedTuple):
    """A text, or a piece of a long one: then `ends` is False in all but its last, `begins` in all but its first."""

    text: str
    ends: bool = True
    begins: bool = True


class Conversation(list[Message]):
    """Messages, with the `tools` that they may call (JSON schemas) or None.

    `place` is where they were read, such as `chats.jsonl:17`; `unused` the keys of messages that were not used.
    """

    def __init__(self, messages: Iterable[Message], place: str = "", tools: list[dict[str, Any]] | None = None) -> None:
        super().__init__(messages)
        self.place, self.tools = place, tools
        self.unused: list[str] = []


def tools_of(messages: list[Message]) -> list[dict[str, Any]] | None:
    """The tools of a conversation that was read; of a plain list there are none."""
    return messages.tools if isinstance(messages, Conversation) else None


class BadRow(NamedTuple):
    """What could not be read: a reason to count it by, the line that names it and its place, and how many rows it is.

    A `harmless` one (blank text) is counted and never refused. `has_columns`: those of what was to be
    read.
    """

    reason: str
    message: str
    rows: int = 1
    harmless: bool = False
    has_columns: bool = False


T = TypeVar("T")
Item: TypeAlias = tuple[T | BadRow, Position]  # with the position behind it


def pieces(text: str) -> Iterator[Document]:
    """A text as documents of at most `PIECE` characters, of which the last one ends."""
    start = 0
    while len(text) - start > PIECE:
        length = cut_point(text[start : start + PIECE + 1], PIECE)
        yield Document(text[start : start + length], ends=False, begins=start == 0)
        start += length
    yield Document(text[start:], begins=start == 0)


def cut_point(text: str, limit: int) -> int:
    """The best place at or before `limit` to cut `text`, which is longer than `limit`.

    After a line end that has text on both sides, since a byte-level tokenizer then gives the same tokens as without the
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
