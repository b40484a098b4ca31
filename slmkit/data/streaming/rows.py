"""Training rows from streamed documents, tokenized and packed on the fly, with nothing on disk.

A position is that of a block (see `blocks.py`) and how many of its tokens, or rows, have been used.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np

from slmkit.config import UserError
from slmkit.data.order import mixed_seed, permuted
from slmkit.data.packing import IGNORED, numbered, pack_whole, padded, row_of_labels
from slmkit.data.prepare.conversations import ConversationEncoder
from slmkit.data.shards.work import document_ids
from slmkit.data.sources import Document, Message
from slmkit.data.streaming.blocks import Block, Blocks, Position

if TYPE_CHECKING:
    from slmkit.tokenizer import SLMTokenizer


class Row(NamedTuple):
    """int64 [length] each, as in `stream.Rows`."""

    ids: np.ndarray
    labels: np.ndarray
    documents: np.ndarray


class StreamedRows(Protocol):
    """Rows one after another, from any position on."""

    def next_row(self) -> Row | None:
        """The next row; None at the end of the source. Raises `UserError` if nothing can be learned."""

    def position(self) -> Position:
        """The position of the next row, as JSON."""

    def seek(self, position: Position) -> None: ...


class TextRows:
    """Documents concatenated, with an end-of-text token after each, across rows, blocks and epochs.

    At the end of the source, tokens that do not fill a row are left out.
    """

    def __init__(self, blocks: Blocks[Document], tokenizer: SLMTokenizer, length: int) -> None:
        self.blocks, self.tokenizer, self.length = blocks, tokenizer, length
        self.seek({})

    def seek(self, position: Position) -> None:
        self._coming: Iterator[Block[Document]] = self.blocks.read(position.get("block", {}))
        self._tokens, self._ends = np.zeros(0, dtype=np.int64), np.zeros(0, dtype=bool)  # of the blocks in memory
        self._begun: list[tuple[int, Position]] = [(0, position.get("block", {}))]  # where each block begins in them
        self._used = position.get("token", 0)

    def position(self) -> Position:
        start, block = max(((s, b) for s, b in self._begun if s <= self._used), key=lambda begun: begun[0])
        return {"block": block, "token": self._used - start}

    def next_row(self) -> Row | None:
        while len(self._tokens) - self._used < self.length + 1:
            block = next(self._coming, None)
            if block is None:
                return None
            self._add(block)
        row = slice(self._used, self._used + self.length)
        tokens = self._tokens[self._used : self._used + self.length + 1]
        begins = np.concatenate([[False], self._ends[row][:-1]])
        self._used += self.length
        return Row(tokens[:-1], tokens[1:], begins.cumsum())

    def _add(self, block: Block[Document]) -> None:
        """Append the block's tokens to the unused ones."""
        if len(self._tokens):
            position = self.position()
            rest = self._used - position["token"]  # the next row's block and those after it are kept
            self._tokens, self._ends, self._used = self._tokens[rest:], self._ends[rest:], position["token"]
            self._begun = [(start - rest, begun) for start, begun in self._begun if start >= rest]
        else:
            self._begun = []
        self._begun.append((len(self._tokens), block.position))
        tokens, ends = tokenized(block.items, self.tokenizer)
        self._tokens, self._ends = np.concatenate([self._tokens, tokens]), np.concatenate([self._ends, ends])


class ConversationRows:
    """Whole conversations, packed by best fit within a block and right-padded; only tokens of the loss masks count.

    As in shards, a conversation longer than a row is cut at its end, and one with nothing to learn is left out; the
    encoder counts them. Raises `UserError` if no conversation has anything to learn.
    """

    def __init__(self, blocks: Blocks[list[Message]], encoder: ConversationEncoder, length: int, seed: int) -> None:
        self.blocks, self.encoder, self.length, self.seed = blocks, encoder, length, seed
        self.eos_id, self.pad_id = encoder.tokenizer.eos_token_id, encoder.tokenizer.pad_token_id or 0
        self.seek({})

    def seek(self, position: Position) -> None:
        self._coming: Iterator[Block[list[Message]]] = self.blocks.read(position.get("block", {}))
        self._block: Position = position.get("block", {})
        self._rows: list[Row] = []
        self._used = position.get("row", 0)
        if self._used:
            self._take(next(self._coming))

    def position(self) -> Position:
        return {"block": self._block, "row": self._used}

    def next_row(self) -> Row | None:
        epochs = set()
        while self._used >= len(self._rows):
            block = next(self._coming, None)
            if block is None:
                return None
            epochs.add(block.position["epoch"])
            if len(epochs) > 2:  # includes a complete one
                raise UserError(
                    f"{self.blocks.name}: nothing to learn within {self.length:,} tokens in any of its conversations; "
                    "raise sequence_length, or check that they have assistant turns"
                )
            self._take(block)
            self._used = 0
        self._used += 1
        return self._rows[self._used - 1]

    def _take(self, block: Block[list[Message]]) -> None:
        self._block = block.position
        encoded = []
        for chat in (row for one in self.encoder.encode_all(block.items) for row in one.rows):
            ids = np.append(chat.ids, self.eos_id)[: self.length].astype(np.int64)
            labels = row_of_labels(ids, np.append(chat.trained, False)[: self.length])
            if (labels != IGNORED).any():
                encoded.append((ids, labels))
        packed = pack_whole([len(ids) for ids, _ in encoded], self.length).rows
        seed = mixed_seed(self.seed, *(block.position[key] for key in ("epoch", "block")))
        order = permuted(np.arange(len(packed)), len(packed), seed, 0).tolist() if packed else []
        self._rows = [self._row([encoded[index] for index in packed[place]]) for place in order]

    def _row(self, conversations: list[tuple[np.ndarray, np.ndarray]]) -> Row:
        ids, labels = zip(*conversations)
        lengths = np.array([len(part) for part in ids])
        return Row(
            padded(ids, self.length, self.pad_id), padded(labels, self.length, IGNORED), numbered(lengths, self.length)
        )


def tokenized(documents: list[Document], tokenizer: Any) -> tuple[np.ndarray, np.ndarray]:
    """Tokens of all documents, an end-of-text token after each, and which end a document: int64, bool [n]."""
    tokens, ends = [], []
    for document, ids in zip(documents, document_ids(tokenizer, documents)):
        tokens.append(np.append(ids, tokenizer.eos_token_id) if document.ends else ids)
        ends.append(np.zeros(len(tokens[-1]), dtype=bool))
        ends[-1][-1:] = document.ends
    return np.concatenate(tokens).astype(np.int64), np.concatenate(ends)
