"""Conversations, and answers to compare or judge, as token rows and as shards.

Rows that are no conversation were left out by their source (see `row_formats.py`). What only tokens show is counted
here, with the same source: conversations that the chat template refuses, that are longer than a row, or of which
nothing is learned.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from slmkit.config import UserError
from slmkit.data.ordered_map import batches
from slmkit.data.packing import learned_ranges
from slmkit.data.prepare.text_to_shards import Progress, no_progress
from slmkit.data.settings import Reads
from slmkit.data.shards.reader import TokenShards
from slmkit.data.shards.writer import write_shards
from slmkit.data.sources import BadRow, Judged, Message, Pair, RetryPolicy, Source, tools_of
from slmkit.data.sources.settings import OnLong, SourceSettings
from slmkit.tokenizer import SLMTokenizer
from slmkit.tokenizer.chat import ConversationError
from slmkit.tokenizer.encoder import ChatRow, RenderedChat, rows_to_learn

UNLEARNED = "with nothing to learn"
BATCH_BYTES = 1 << 20  # of text, encoded at once
CONVERSATIONS_BETWEEN_CALLS = 1024  # of `progress`
SHARD_TOKENS = 1 << 24
IN_ROWS = "in several rows each, since the chat template rewrites earlier turns"

Item = list[Message] | Pair | Judged


class EncodedConversation(NamedTuple):
    """The token rows of an item, its UTF-8 size in bytes, and a judged answer's label.

    A conversation is nearly always one row, a pair two: the better answer and the worse one.
    """

    rows: list[ChatRow]
    text_bytes: int
    label: bool | None


class _Rendered(NamedTuple):
    """A rendered item to be encoded, or the row that was left out in its place."""

    item: Any
    place: str = ""
    text_bytes: int = 0
    chats: tuple[RenderedChat, ...] = ()
    left_out: BadRow | None = None


class ConversationEncoder:
    """Encodes conversations with loss masks. With `length`, longer ones are counted, skipped or refused.

    Of a pair and of a judged answer only the answers that differ, or are judged, are learned.
    """

    def __init__(
        self,
        tokenizer: SLMTokenizer,
        source: Source | None = None,
        length: int | None = None,
        on_long: OnLong = "cut",
    ) -> None:
        """`source` counts what is left out; without one, nothing may be."""
        self.tokenizer = tokenizer
        self.source = source or Source(SourceSettings(path="conversations"), (), RetryPolicy(0))
        self.length, self.on_long, self._number = length, on_long, 0

    def encode_all(self, items: Iterable[Item | BadRow]) -> Iterator[EncodedConversation]:
        """The items that are kept, in order; rows longer than `length` are not cut here: see `ChatRows`.

        A megabyte of text is read ahead and encoded in one call, on all cores; a `BadRow` is a row to be left out.
        Raises `UserError` with the place of the first row that must not be left out.
        """
        for batch in batches(map(self._render, items), lambda one: one.text_bytes, BATCH_BYTES):
            encoded = iter(self.tokenizer.encode_rendered([chat for one in batch for chat in one.chats]))
            self.tokenizer.check_losses()
            for one in batch:
                if one.left_out:
                    self.source.leave_out(one.left_out)
                    continue
                parts = zip(conversations_in(one.item), encoded)
                rows = [row for (_, answers), found in parts for row in learned_rows(found, answers)]
                if isinstance(one.item, Pair | Judged) or self._is_kept(one.place, rows):
                    label = one.item.label if isinstance(one.item, Judged) else None
                    yield EncodedConversation(rows, one.text_bytes, label)

    def _render(self, item: Item | BadRow) -> _Rendered:
        if isinstance(item, BadRow):
            return _Rendered(item, left_out=item)
        self._number += 1
        place = getattr(item, "place", f"conversation {self._number:,}")
        conversations = [messages for messages, _ in conversations_in(item)]
        try:  # first, since it checks the messages
            chats = [self.tokenizer.render_chat(messages, tools=tools_of(messages)) for messages in conversations]
        except ConversationError as error:
            return _Rendered(item, place, left_out=BadRow(error.reason, f"{place}: {error}"))
        return _Rendered(item, place, sum(map(text_bytes, conversations)), tuple(chats))

    def _is_kept(self, place: str, rows: list[ChatRow]) -> bool:
        """Whether a conversation is kept; counts its problems. Raises `UserError` for a refused one."""
        longest = max(len(row.ids) for row in rows)
        if self.length is not None and longest > self.length:
            message = f"{place}: {longest:,} tokens"
            if self.on_long == "refuse":
                raise UserError(
                    f"{message}, and a row has {self.length:,}: raise train.sequence_length, or set "
                    "data.on_long_conversation to cut or skip"
                )
            if self.on_long == "skip":
                self.source.leave_out(BadRow(f"longer than {self.length:,} tokens", message, harmless=True))
                return False
            self.source.note(f"cut at {self.length:,} tokens", message)
        if not any(row.trained[1 : self.length].any() for row in rows):
            self.source.note(UNLEARNED, f"{place}: {longest:,} tokens, none of them learned")
        elif len(rows) > 1:
            self.source.note(IN_ROWS, f"{place}: {len(rows)} rows")
        return True


def conversations_in(item: Item) -> list[tuple[list[Message], list[Message] | None]]:
    """The conversations of an item, each with its last messages if only answers among these are learned, else None."""
    if isinstance(item, Pair):
        return [(side, side[item.shared :]) for side in item.sides]
    return [(item.messages, item.messages[-1:])] if isinstance(item, Judged) else [(item, None)]


def learned_rows(rows: list[ChatRow], answers: list[Message] | None) -> list[ChatRow]:
    """The rows to learn of an encoded conversation; with `answers`, its last row, with only these learned."""
    if answers is None:
        return rows_to_learn(rows)
    count = sum(message["role"] == "assistant" and message.get("weight") != 0 for message in answers)
    starts, stops = learned_ranges(rows[-1].trained)
    learned = np.zeros_like(rows[-1].trained)
    for start, stop in list(zip(starts, stops))[len(starts) - count :]:
        learned[start:stop] = True
    return [ChatRow(rows[-1].ids, learned)]


def text_bytes(conversation: Iterable[Message]) -> int:
    """UTF-8 size of all content, reasoning and calls, in bytes."""
    said = []
    for message in conversation:
        said += [message["content"] or "", message.get("reasoning_content") or ""]
        said += [json.dumps(call, ensure_ascii=False) for call in message.get("tool_calls") or ()]
    return sum(len(text.encode("utf-8", "surrogatepass")) for text in said)


def encoded_rows(
    source: Source, reads: Reads, tokenizer: SLMTokenizer, length: int | None = None, on_long: OnLong = "cut"
) -> Iterator[EncodedConversation]:
    """All conversations, pairs or judged answers of a source, encoded; with `length`, longer ones are counted."""
    return ConversationEncoder(tokenizer, source, length, on_long).encode_all(row for row, _ in source.read_rows(reads))


def prepare_chat(items: Iterable[Item], tokenizer: SLMTokenizer, directory: str | Path, **options: Any) -> TokenShards:
    """Tokenize conversations, pairs or judged answers into shards. Options are those of `write_conversations`."""
    return write_conversations(ConversationEncoder(tokenizer).encode_all(items), tokenizer, directory, **options)


def write_conversations(
    encoded: Iterable[EncodedConversation],
    tokenizer: SLMTokenizer,
    directory: str | Path,
    *,
    sources: Sequence[dict[str, Any]] = (),
    progress: Progress = no_progress,
) -> TokenShards:
    """Shards of encoded items with their loss masks; each row is a document, an end-of-text token after it.

    Judged answers have labels. `sources` is for the header. Raises `UserError` as `prepare_text` does.
    """

    def counted() -> Iterator[EncodedConversation]:
        done = tokens = size = 0
        for done, one in enumerate(encoded, start=1):
            tokens, size = tokens + _tokens_of(one), size + one.text_bytes
            if done % CONVERSATIONS_BETWEEN_CALLS == 0:
                progress(done, tokens, size)
            yield one
        progress(done, tokens, size)

    shards = batches(counted(), _tokens_of, SHARD_TOKENS)
    return write_shards(directory, tokenizer, (_arrays_of(shard, tokenizer.eos_token_id) for shard in shards), sources)


def _tokens_of(encoded: EncodedConversation) -> int:
    return sum(len(row.ids) + 1 for row in encoded.rows)


def _arrays_of(conversations: list[EncodedConversation], eos_id: int) -> tuple[dict[str, np.ndarray], int]:
    """The arrays of a shard (see `write_files`), and the size of its text."""
    rows = [row for one in conversations for row in one.rows]
    stops = np.cumsum([len(row.ids) for row in rows], dtype=np.int64)
    arrays = {
        "tokens": np.insert(np.concatenate([row.ids for row in rows]), stops, eos_id),
        "ends": stops + np.arange(1, len(rows) + 1),
        "trained": np.insert(np.concatenate([row.trained for row in rows]), stops, False),  # no end of text is learned
    }
    if conversations[0].label is not None:
        arrays["labels"] = np.array([one.label for one in conversations])
    return arrays, sum(one.text_bytes for one in conversations)
