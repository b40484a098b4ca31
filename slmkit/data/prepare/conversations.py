"""Conversations to rows of tokens, and what becomes of those of which not everything can be learned: each is counted.

A row that is no conversation never comes here: sources leave it out (see `row_formats.py`). What only the tokens tell
is told here, and counted with the same source: a conversation that the chat template refuses, one that is longer than
a row, one of which nothing is learned.
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
from slmkit.tokenizer.chat_rows import ChatRow, RenderedChat, rows_to_learn

if TYPE_CHECKING:
    from slmkit.tokenizer import SLMTokenizer

UNLEARNED = "with nothing to learn"
BATCH_BYTES = 1 << 20  # of text, encoded in one go
IN_ROWS = "in several rows each, since the chat template rewrites earlier turns"


class SkippedRows(Protocol):
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

    rows: list[ChatRow]
    text_bytes: int


class _Rendered(NamedTuple):
    """A conversation whose turn to be counted comes later, or what was left out in its place."""

    place: str
    text_bytes: int
    chat: RenderedChat
    left_out: BadRow | None = None


class ConversationEncoder:
    """From conversations to tokens and masks. With a `length` those that are longer are counted, skipped or refused."""

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
        """Those that are kept, in order; a row that is too long is given whole: see `ChatRows`.

        A megabyte of text is read ahead and encoded in one call, on every core; a `BadRow` stands for a row that is to
        be left out when its turn comes. Raises `UserError` with the place of the first that may not be left out.
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
            chat = self.tokenizer.render_chat(conversation, tools=tools)  # first: it refuses what is no text
        except ConversationError as error:
            return _Rendered(place, 0, [], BadRow(error.reason, f"{place}: {error}"))
        return _Rendered(place, text_bytes(conversation), chat)

    def _is_kept(self, one: _Rendered, rows: list[ChatRow]) -> bool:
        """Whether a conversation is learned from; whatever is the matter with it is counted."""
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
    """Of all that is said, thought and called, in UTF-8."""
    said = []
    for message in conversation:
        said += [message["content"] or "", message.get("reasoning_content") or ""]
        said += [json.dumps(call, ensure_ascii=False) for call in message.get("tool_calls") or ()]
    return sum(len(text.encode("utf-8", "surrogatepass")) for text in said)
