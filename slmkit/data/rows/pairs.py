"""Pairs of answers as token shards, and their rows, for preference tuning.

In a directory of shards, documents 2i and 2i + 1 are the conversations with the better and the worse answer of pair i.
In both, only the part after their common beginning is learned.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from slmkit.config import UserError
from slmkit.data.packing import IGNORED, padded, row_of_labels
from slmkit.data.prepare.conversations import text_bytes
from slmkit.data.prepare.text_to_shards import Progress, end_to_end, no_progress
from slmkit.data.shards.reader import TokenShards
from slmkit.data.shards.writer import ShardWriter
from slmkit.data.sources import Message, tools_of
from slmkit.data.sources.documents import Pair
from slmkit.data.stream import Rows
from slmkit.tokenizer.encoder import ChatRow

if TYPE_CHECKING:
    from slmkit.tokenizer import SLMTokenizer

AT_ONCE = 512  # pairs written at once


def prepare_pairs(
    pairs: Iterable[Pair],
    tokenizer: SLMTokenizer,
    directory: str | Path,
    *,
    sources: Sequence[dict[str, Any]] = (),
    progress: Progress = no_progress,
) -> TokenShards:
    """Tokenize both conversations of each pair, with an end-of-text token after each, and write them to shards.

    Arguments and `UserError`s as for `prepare_chat`.
    """
    with ShardWriter(directory, tokenizer, masked=True, sources=sources) as writer:
        waiting = iter(pairs)
        while batch := list(itertools.islice(waiting, AT_ONCE)):
            sides = [side for pair in batch for side in pair.sides]
            encoded = tokenizer.encode_rendered([tokenizer.render_chat(side, tools=tools_of(side)) for side in sides])
            tokenizer.check_losses()
            own = [side[pair.shared :] for pair in batch for side in pair.sides]
            rows = [answers_alone(chat[-1], messages) for chat, messages in zip(encoded, own)]
            ids, ends, trained = end_to_end(rows, tokenizer.eos_token_id)
            writer.add(ids, ends, trained, text_bytes=sum(map(text_bytes, sides)))
            progress(writer.documents // 2, writer.tokens, writer.text_bytes)
    return TokenShards.open(directory)


def answers_alone(row: ChatRow, messages: Sequence[Message]) -> ChatRow:
    """The row with only the answers in `messages`, its last ones, learned."""
    answers = sum(message["role"] == "assistant" and message.get("weight") != 0 for message in messages)
    starts, stops = stretches(row.trained)
    own = np.zeros_like(row.trained)
    for start, stop in list(zip(starts, stops))[len(starts) - answers :]:
        own[start:stop] = True
    return ChatRow(row.ids, own)


def stretches(trained: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """First token of each learned range, and one past its last.  bool [n] → int64 [ranges] each"""
    edges = np.diff(np.concatenate([[0], trained.astype(np.int8), [0]]))
    return np.flatnonzero(edges == 1), np.flatnonzero(edges == -1)


class PairRows(Rows):
    """Pairs, one per row: ids and labels [2, length], the better answer first; right-padded.

    `truncated` pairs have an answer that is cut at the end of the row. `untrained` pairs, with an answer that begins
    after it, and `equal` pairs, whose answers have the same tokens (because of the chat template or the cut), are left
    out. `reference` [pairs, 2], if set, is an extra tensor of each row.
    """

    def __init__(self, shards: TokenShards, length: int) -> None:
        """Raises `UserError` if the shards have no pairs, or no pair has anything to learn."""
        if not shards.header.masked or shards.header.judged or shards.header.documents % 2:
            raise UserError(f"{shards.directory}: token shards without pairs of answers; prepare the data with --pairs")
        self.shards, self.length, self.pad_id = shards, length, shards.header.pad_token_id or 0
        ends = shards.document_ends
        starts = np.concatenate([np.zeros(1, dtype=np.int64), ends[:-1]])
        stops = np.minimum(ends, starts + length)
        learned = np.flatnonzero(shards.trained_in(0, len(shards)))
        firsts, lasts = np.searchsorted(learned, starts + 1), np.searchsorted(learned, ends)
        kept = np.searchsorted(learned, stops) - firsts  # learned tokens within a row: [documents]
        whole = (kept > 0).reshape(-1, 2).all(axis=1)  # [pairs]
        self.starts, self.stops = starts.reshape(-1, 2), stops.reshape(-1, 2)  # [pairs, 2]
        equal = np.array([self._is_equal(index) for index in range(len(whole))])
        self.truncated = int(((kept < lasts - firsts).reshape(-1, 2).any(axis=1) & whole & ~equal).sum())
        self.untrained, self.equal = int((~whole).sum()), int((whole & equal).sum())
        whole &= ~equal
        if not whole.any():
            raise UserError(
                f"{shards.directory}: no pair to learn from: {'; '.join(self.report())}; check the pairs, "
                "or raise train.sequence_length"
            )
        self.starts, self.stops = self.starts[whole], self.stops[whole]
        self.reference: np.ndarray | None = None

    @property
    def rows_in_epoch(self) -> int:
        return len(self.starts)

    @property
    def longest(self) -> int:
        """Tokens of the longest answer with its prompt."""
        return int((self.stops - self.starts).max())

    def _is_equal(self, index: int) -> bool:
        """Whether both answers of a pair have the same tokens."""
        better, worse = zip(self.starts[index].tolist(), self.stops[index].tolist())
        same_length = better[1] - better[0] == worse[1] - worse[0]
        return same_length and bool((self.shards.tokens_in(*better) == self.shards.tokens_in(*worse)).all())

    def row(self, index: int) -> tuple[np.ndarray, np.ndarray]:  # int64 [2, length] each
        ids, labels = [], []
        for start, stop in zip(self.starts[index].tolist(), self.stops[index].tolist()):
            tokens = self.shards.tokens_in(start, stop).astype(np.int64)
            ids.append(padded([tokens], self.length, self.pad_id))
            labels.append(padded([row_of_labels(tokens, self.shards.trained_in(start, stop))], self.length, IGNORED))
        return np.stack(ids), np.stack(labels)

    def documents(self, index: int) -> np.ndarray:
        """int64 [2, length], all zero: each answer's row is one conversation."""
        return np.zeros((2, self.length), dtype=np.int64)

    def extra(self, index: int) -> dict[str, np.ndarray]:  # reference [2]
        return {} if self.reference is None else {"reference": self.reference[index]}

    def longest_first(self) -> list[int]:  # [pairs]
        return np.argsort(-(self.stops - self.starts).max(axis=1), kind="stable").tolist()

    def report(self) -> list[str]:
        """One line for each kind of pairs that are left out or cut."""
        lines = []
        if self.untrained:
            lines.append(f"{self.untrained:,} pairs left out: nothing of an answer lies within {self.length:,} tokens")
        if self.equal:
            lines.append(f"{self.equal:,} pairs left out: their answers have the same tokens within {self.length:,}")
        if self.truncated:
            lines.append(f"{self.truncated:,} pairs have an answer that is cut at {self.length:,} tokens")
        return lines
