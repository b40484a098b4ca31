"""Batches from streamed sources, tokenized and packed on the fly, with nothing on disk.

Documents are read in blocks: bounded memory, a seeded shuffle, and a position of a few integers. A block's order
follows from (seed, epoch, number of the block), so that a position is the block's beginning and how many of its tokens,
or rows, have been used. Every process reads the whole stream and takes its share of each batch, which makes the order
independent of the number of processes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Generic, NamedTuple, TypeVar

import numpy as np

from slmkit.config import UserError
from slmkit.data.batch import Batch
from slmkit.data.mixture import Phase, Schedule, WhenExhausted
from slmkit.data.order import mixed_seed, permuted
from slmkit.data.packing import IGNORED, numbered, pack_whole, padded, row_of_labels
from slmkit.data.prepare.conversations import ConversationEncoder
from slmkit.data.shards.folder import document_ids
from slmkit.data.sources import Document, Message, Source
from slmkit.data.stream import Batches, share_of_rank, shares_of
from slmkit.tokenizer import SLMTokenizer

AHEAD = 2  # batches to prefetch
BLOCK_CHARACTERS = 1 << 24  # characters that fill a block, however few documents they are

T = TypeVar("T")  # a document or a conversation
Position = dict[str, Any]
Read = Callable[[Position | None], Iterator[tuple[T, Position]]]  # each item with the position after it


class PackedRow(NamedTuple):
    """int64 [length] each, as in `stream.Rows`."""

    ids: np.ndarray
    labels: np.ndarray
    documents: np.ndarray


class DocumentBlock(NamedTuple, Generic[T]):
    """`position`: the block's beginning, for `Blocks.read`."""

    items: list[T]
    position: Position


class Blocks(Generic[T]):
    """Items of a source in blocks of `documents` documents, for one epoch or, with `repeat`, endlessly.

    `is_kept` tells from the first (or only) piece of a document whether the document is used.
    """

    def __init__(
        self,
        read: Read[T],
        name: str,
        documents: int,
        is_kept: Callable[[T], bool],
        shuffle_seed: int | None,
        repeat: bool,
    ) -> None:
        self._read, self.name, self.documents, self.repeat = read, name, documents, repeat
        self._is_kept, self.shuffle_seed = is_kept, shuffle_seed

    def read(self, position: Position) -> Iterator[DocumentBlock[T]]:
        """Blocks from `position` on; from the beginning if it is empty.

        Raises `UserError` for an epoch without documents.
        """
        epoch, number = position.get("epoch", 0), position.get("block", 0)
        place, inside = position.get("source"), position.get("inside", False)
        while True:
            for items, begins in self._of_one_epoch(place, inside):
                start = {"epoch": epoch, "block": number, "source": begins, "inside": inside}
                inside = not _ends(items[-1])
                yield DocumentBlock(self._shuffled(items, epoch, number, start["inside"]), start)
                number += 1
            if number == 0:
                raise UserError(f"{self.name}: nothing to train on: all of its documents are held out for validation")
            if not self.repeat:
                return
            epoch, number, place, inside = epoch + 1, 0, None, False

    def _of_one_epoch(self, place: Position | None, inside: bool) -> Iterator[tuple[list[T], Position | None]]:
        """Items of each block in order, and its beginning; a document may continue in the next block."""
        items: list[T] = []
        documents = size = 0
        begins, kept = place, inside
        for item, behind in self._read(place):
            kept = kept if inside else self._is_kept(item)
            inside = not _ends(item)
            if not kept:
                continue  # a block only ends inside a kept document: a position in another could not tell that
            items.append(item)
            size += _size(item)
            documents += not inside
            if documents >= self.documents or size >= BLOCK_CHARACTERS:
                yield items, begins
                items, documents, size, begins = [], 0, 0, behind
        if items:
            yield items, begins

    def _shuffled(self, items: list[T], epoch: int, number: int, inside: bool) -> list[T]:
        """Shuffle whole documents; the end of one that began earlier stays first, an unfinished one last."""
        if self.shuffle_seed is None:
            return items
        documents: list[list[T]] = [[]]
        for item in items:
            documents[-1].append(item)
            if _ends(item):
                documents.append([])
        first, last = (documents.pop(0) if inside else []), (documents.pop() if documents else [])
        seed = mixed_seed(self.shuffle_seed, epoch, number)
        order = permuted(np.arange(len(documents)), len(documents), seed, epoch) if documents else ()
        return [*first, *(item for index in order for item in documents[index]), *last]


def _ends(item: Any) -> bool:
    """Whether a document ends with an item."""
    return not isinstance(item, Document) or item.ends


def _size(item: Any) -> int:
    """The characters of an item; of a document with the object's own memory."""
    if isinstance(item, Document):
        return 64 + len(item.text)
    return sum(len(str(message.get("content"))) for message in item)


class TextRows:
    """Documents concatenated, with an end-of-text token after each, across rows, blocks and epochs.

    At the end of the source, tokens that do not fill a row are left out.
    """

    def __init__(self, blocks: Blocks[Document], tokenizer: SLMTokenizer, length: int) -> None:
        self.blocks, self.tokenizer, self.length = blocks, tokenizer, length
        self.seek({})

    def seek(self, position: Position) -> None:
        self._coming: Iterator[DocumentBlock[Document]] = self.blocks.read(position.get("block", {}))
        self._tokens, self._ends = np.zeros(0, dtype=np.int64), np.zeros(0, dtype=bool)  # of the blocks in memory
        self._begun: list[tuple[int, Position]] = [(0, position.get("block", {}))]  # where each block begins in them
        self._used = position.get("token", 0)

    def position(self) -> Position:
        """The position of the next row, as JSON."""
        start, block = [begun for begun in self._begun if begun[0] <= self._used][-1]
        return {"block": block, "token": self._used - start}

    def next_row(self) -> PackedRow | None:
        """The next row; None at the end of the source."""
        while len(self._tokens) - self._used < self.length + 1:
            block = next(self._coming, None)
            if block is None:
                return None
            self._add(block)
        row = slice(self._used, self._used + self.length)
        tokens = self._tokens[self._used : self._used + self.length + 1]
        begins = np.concatenate([[False], self._ends[row][:-1]])
        self._used += self.length
        return PackedRow(tokens[:-1], tokens[1:], begins.cumsum())

    def _add(self, block: DocumentBlock[Document]) -> None:
        """Append the block's tokens; the blocks before that of the next row are forgotten."""
        first = self._used - self.position()["token"]
        begun = [*self._begun, (len(self._tokens), block.position)]
        self._begun = [(start - first, position) for start, position in begun if start >= first]
        tokens, ends = tokenized(block.items, self.tokenizer)
        self._tokens = np.concatenate([self._tokens[first:], tokens])
        self._ends = np.concatenate([self._ends[first:], ends])
        self._used -= first


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
        self._coming: Iterator[DocumentBlock[list[Message]]] = self.blocks.read(position.get("block", {}))
        self._block: Position = position.get("block", {})
        self._rows: list[PackedRow] = []
        self._used = position.get("row", 0)
        if self._used:
            self._take(next(self._coming))

    def position(self) -> Position:
        """The position of the next row, as JSON."""
        return {"block": self._block, "row": self._used}

    def next_row(self) -> PackedRow | None:
        """The next row; None at the end of the source. Raises `UserError` if nothing can be learned."""
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

    def _take(self, block: DocumentBlock[list[Message]]) -> None:
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

    def _row(self, conversations: list[tuple[np.ndarray, np.ndarray]]) -> PackedRow:
        ids, labels = zip(*conversations)
        lengths = np.array([len(part) for part in ids])
        return PackedRow(
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


StreamedRows = TextRows | ConversationRows  # rows one after another, from any position on


class StreamedBatches(Batches):
    """Batches of `StreamedRows` by source name; not thread-safe."""

    def __init__(
        self,
        sources: Mapping[str, StreamedRows],
        phases: Sequence[Phase],
        when_exhausted: WhenExhausted,
        rows_per_step: int,
        separate: bool = False,
        origins: Sequence[Source] = (),
    ) -> None:
        """`origins`: sources whose counts of skipped and cut rows are reported."""
        self.origins = origins
        self.sources, self.phases, self.when_exhausted = dict(sources), phases, when_exhausted
        self.rows_per_step, self.separate = rows_per_step, separate
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="batches")
        # From the last returned step on: rows, None after the end of the data, and the position after them.
        self._coming: dict[int, Future[tuple[list[PackedRow] | None, Position]]] = {}
        self.seek(0, {})

    def batch(self, step: int, rank: int = 0, world: int = 1) -> Batch:
        """Rows [rows, length] as in `Batches`. The next steps are prefetched; any other needs reading up to it.

        Raises `UserError` for unreadable data, and `IndexError` for a step after the end of the data.
        """
        mine = share_of_rank(self.rows_per_step, rank, world)
        rows, position = self._made(step)
        if rows is None:
            raise IndexError(f"the data ends before step {step}")
        self._position = position
        self._coming = {known: future for known, future in self._coming.items() if known >= step}
        ids, labels, documents = (np.stack(column) for column in zip(*rows[mine]))  # int64 [rows, length] each
        return Batch.of(ids, labels, documents if self.separate else None)

    def has(self, step: int) -> bool:
        return self._made(step)[0] is not None

    def shares(self, step: int) -> dict[str, float]:
        """Share of each source in all rows before `step`, which is at most the next one."""
        names = list(self.sources)
        return shares_of(names, self._schedule.counts(step * self.rows_per_step)) if len(names) > 1 else {}

    def report(self) -> list[str]:
        """One line for each kind of documents left out or cut since the last `seek`, counted once per reading."""
        return [line for source in self.origins for line in source.report()]

    def position(self) -> Position:
        return self._position

    def seek(self, step: int, position: Position) -> None:
        """Continue with `step` at its saved position; if that is empty, read up to it from the beginning."""
        for future in self._coming.values():
            future.cancel()
        self._worker.submit(self._seek, position).result()  # runs after the worker's current task
        self._coming, self._position = {}, position
        self._next = step if position else 0  # the worker's next step

    def _made(self, step: int) -> tuple[list[PackedRow] | None, Position]:
        if step not in self._coming and step < self._next:
            self.seek(0, {})
        while self._next <= step + AHEAD:
            self._coming[self._next] = self._worker.submit(self._make, self._next)
            if self._next < step - AHEAD:  # skipped
                self._coming.pop(self._next).result()
            self._next += 1
        return self._coming[step].result()

    # -- in the worker's thread ---------------------------------------------------------------------------------------

    def _seek(self, position: Position) -> None:
        self._sizes: dict[str, int] = dict(position.get("sizes", {}))  # rows of the sources that have ended
        self._plan()
        for origin in self.origins:
            origin.count_anew()
        for name, source in self.sources.items():
            source.seek(position.get("sources", {}).get(name, {}))

    def _plan(self) -> None:
        sizes = [self._sizes.get(name) for name in self.sources]
        self._schedule = Schedule(self.phases, sizes, self.when_exhausted)

    def _make(self, step: int) -> tuple[list[PackedRow] | None, Position]:
        rows: list[PackedRow] = []
        names = list(self.sources)
        while len(rows) < self.rows_per_step:
            row = step * self.rows_per_step + len(rows)
            if self._schedule.total is not None and row >= self._schedule.total:
                return None, {}
            which, number = self._schedule.locate(np.array([row]))
            name = names[int(which[0])]
            made = self.sources[name].next_row()
            if made is None:  # now its size is known: the schedule applies from this row on
                self._sizes[name] = int(number[0])
                self._plan()
            else:
                rows.append(made)
        positions = {name: source.position() for name, source in self.sources.items()}
        return rows, {"sources": positions, "sizes": dict(self._sizes)}
