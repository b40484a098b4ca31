"""Encodes conversations as token rows, and counts those that are left out or only partly learned.

Rows that are no conversation were left out by their source (see `row_formats.py`). What only tokens show is counted
here, with the same source: conversations that the chat template refuses, that are longer than a row, or of which
nothing is learned.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, NamedTuple, Protocol

from slmkit.config import UserError
from slmkit.data.prepare.ordered_map import batches
from slmkit.data.sources import BadRow, Message
from slmkit.data.sources.settings import OnLong
from slmkit.tokenizer.chat import ConversationError
from slmkit.tokenizer.encoder import ChatRow, RenderedChat, rows_to_learn

if TYPE_CHECKING:
    from slmkit.tokenizer import SLMTokenizer

UNLEARNED = "with nothing to learn"
BATCH_BYTES = 1 << 20  # of text, encoded at once
IN_ROWS = "in several rows each, since the chat template rewrites earlier turns"


class SkippedRows(Protocol):
    """The interface that counts rows: a `Source` has it."""

    def note(self, what: str, message: str) -> None: ...

    def leave_out(self, row: BadRow) -> None: ...


class Strict:
    """For conversations without a source: raises `UserError` for rows to be left out, counts nothing."""

    def note(self, what: str, message: str) -> None: ...

    def leave_out(self, row: BadRow) -> None:
        raise UserError(row.message)


class EncodedConversation(NamedTuple):
    """The token rows of a conversation, nearly always one, and its UTF-8 size in bytes."""

    rows: list[ChatRow]
    text_bytes: int


class _Rendered(NamedTuple):
    """A rendered conversation to be encoded, or the row that was left out in its place."""

    place: str
    text_bytes: int
    chat: RenderedChat
    left_out: BadRow | None = None


class ConversationEncoder:
    """Encodes conversations with loss masks. With `length`, longer ones are counted, skipped or refused."""

    def __init__(
        self,
        tokenizer: SLMTokenizer,
        ledger: SkippedRows | None = None,
        length: int | None = None,
        on_long: OnLong = "cut",
    ) -> None:
        self.tokenizer, self.ledger = tokenizer, ledger or Strict()
        self.length, self.on_long, self._number = length, on_long, 0

    def encode_all(self, conversations: Iterable[list[Message] | BadRow]) -> Iterator[EncodedConversation]:
        """The conversations that are kept, in order; rows longer than `length` are not cut here: see `ChatRows`.

        A megabyte of text is read ahead and encoded in one call, on all cores; a `BadRow` is a row to be left out.
        Raises `UserError` with the place of the first row that must not be left out.
        """
        for batch in batches(map(self._render, conversations), lambda one: one.text_bytes, BATCH_BYTES):
            encoded = self.tokenizer.encode_rendered([one.chat for one in batch])
            if hasattr(self.tokenizer, "check_losses"):
                self.tokenizer.check_losses()
            for one, rows in zip(batch, map(rows_to_learn, encoded)):
                if self._is_kept(one, rows):
                    yield EncodedConversation(rows, one.text_bytes)

    def _render(self, conversation: list[Message] | BadRow) -> _Rendered:
        if isinstance(conversation, BadRow):
            return _Rendered("", 0, [], conversation)
        self._number += 1
        place = getattr(conversation, "place", f"conversation {self._number:,}")
        try:
            tools = getattr(conversation, "tools", None)
            chat = self.tokenizer.render_chat(conversation, tools=tools)  # first, since it checks the messages
        except ConversationError as error:
            return _Rendered(place, 0, [], BadRow(error.reason, f"{place}: {error}"))
        return _Rendered(place, text_bytes(conversation), chat)

    def _is_kept(self, one: _Rendered, rows: list[ChatRow]) -> bool:
        """Whether a conversation is kept; counts its problems. Raises `UserError` for a refused one."""
        if one.left_out:
            self.ledger.leave_out(one.left_out)
            return False
        place = one.place
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
                return False
            self.ledger.note(f"cut at {self.length:,} tokens", message)
        if not any(row.trained[1 : self.length].any() for row in rows):
            self.ledger.note(UNLEARNED, f"{place}: {longest:,} tokens, none of them learned")
        elif len(rows) > 1:
            self.ledger.note(IN_ROWS, f"{place}: {len(rows)} rows")
        return True


def text_bytes(conversation: Iterable[Message]) -> int:
    """UTF-8 size of all content, reasoning and calls, in bytes."""
    said = []
    for message in conversation:
        said += [message["content"] or "", message.get("reasoning_content") or ""]
        said += [json.dumps(call, ensure_ascii=False) for call in message.get("tool_calls") or ()]
    return sum(len(text.encode("utf-8", "surrogatepass")) for text in said)
