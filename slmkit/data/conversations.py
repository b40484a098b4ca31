"""Conversations to rows of tokens, and what becomes of those of which not everything can be learned: each is counted.

A row that is no conversation never comes here: sources leave it out (see `row_formats.py`). What only the tokens tell
is told here, and counted with the same source: a conversation that the chat template refuses, one that is longer than
a row, one of which nothing is learned.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Literal, NamedTuple, Protocol

from slmkit.config import UserError
from slmkit.data.sources import BadRow, Message
from slmkit.tokenizer.chat import ChatTokens, ConversationError

if TYPE_CHECKING:
    from slmkit.tokenizer import SLMTokenizer

OnLong = Literal["cut", "skip", "refuse"]  # what becomes of a conversation that is longer than a row

UNLEARNED = "with nothing to learn"
IN_ROWS = "in several rows each, since the chat template rewrites earlier turns"


class Ledger(Protocol):
    """Where rows are counted: a `Source`."""

    def note(self, what: str, message: str) -> None: ...

    def leave_out(self, row: BadRow) -> None: ...


class Strict:
    """The ledger of conversations that come from no source: nothing may be left out, nothing else is counted."""

    def note(self, what: str, message: str) -> None: ...

    def leave_out(self, row: BadRow) -> None:
        raise UserError(row.message)


class EncodedConversation(NamedTuple):
    """A conversation as the rows of tokens that are learned of it, nearly always one."""

    rows: list[ChatTokens]
    text_bytes: int


class ConversationEncoder:
    """From conversations to tokens and masks. With a `length` those that are longer are counted, skipped or refused."""

    def __init__(
        self,
        tokenizer: SLMTokenizer,
        ledger: Ledger | None = None,
        length: int | None = None,
        on_long: OnLong = "cut",
    ) -> None:
        self.tokenizer, self.ledger = tokenizer, ledger or Strict()
        self.length, self.on_long, self._number = length, on_long, 0

    def encode_all(self, conversations: Iterable[list[Message]]) -> Iterator[EncodedConversation]:
        """Those that are kept, in order. Raises `UserError` with the place of one that may not be left out."""
        for conversation in conversations:
            rows = self.encode(conversation)
            if rows:
                yield EncodedConversation(rows, _text_bytes(conversation))

    def encode(self, conversation: list[Message]) -> list[ChatTokens]:
        """The rows of one; none where it is left out. A row that is too long is given whole: see `ChatRows`."""
        self._number += 1
        place = getattr(conversation, "place", f"conversation {self._number:,}")
        try:
            rows = self.tokenizer.encode_chat_rows(conversation)
        except ConversationError as error:
            self.ledger.leave_out(BadRow(error.reason, f"{place}: {error}"))
            return []
        longest = max(len(row.ids) for row in rows)
        if self.length is not None and longest > self.length:
            message = f"{place}: {longest:,} tokens"
            if self.on_long == "refuse":
                raise UserError(
                    f"{message}, and a row has {self.length:,}: raise train.sequence_length, or set "
                    "data.on_long_conversation to cut or skip"
                )
            if self.on_long == "skip":
                self.ledger.leave_out(BadRow(f"longer than {self.length:,} tokens", message, harmless=True))
                return []
            self.ledger.note(f"cut at {self.length:,} tokens", message)
        if not any(any(row.trained[1 : self.length]) for row in rows):
            self.ledger.note(UNLEARNED, f"{place}: {longest:,} tokens, none of them learned")
        elif len(rows) > 1:
            self.ledger.note(IN_ROWS, f"{place}: {len(rows)} rows")
        return rows


def _text_bytes(conversation: list[Message]) -> int:
    return sum(len(message["content"].encode()) for message in conversation if isinstance(message.get("content"), str))
