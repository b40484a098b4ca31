"""Streams of documents in blocks: bounded memory, a seeded shuffle, and a position of a few integers.

A block is read, shuffled and returned. Its order follows from (seed, epoch, number of the block), so that a position
only needs the block's beginning.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Generic, NamedTuple, TypeVar

import numpy as np

from slmkit.config import UserError
from slmkit.data.order import mixed_seed, permuted
from slmkit.data.sources import Document

BLOCK_CHARACTERS = 1 << 24  # characters that fill a block, however few documents they are

T = TypeVar("T")
Position = dict[str, Any]
Read = Callable[[Position | None], Iterator[tuple[T, Position]]]  # each item with the position after it


class Block(NamedTuple, Generic[T]):
    """`position`: the block's beginning, for `Blocks.read`."""

    items: list[T]
    position: Position


class Blocks(Generic[T]):
    """Items of a source in blocks of `documents` documents, for one epoch or, with `repeat`, endlessly.

    `is_kept` tells from the first (or only) piece of a document whether the document is used; `size` is an item's
    number of characters; `ends` is whether a document ends with it.
    """

    def __init__(
        self,
        read: Read[T],
        *,
        name: str,
        documents: int,
        size: Callable[[T], int],
        ends: Callable[[T], bool],
        is_kept: Callable[[T], bool],
        shuffle_seed: int | None,
        repeat: bool,
    ) -> None:
        self._read, self.name, self.documents, self.repeat = read, name, documents, repeat
        self._size, self._ends, self._is_kept, self.shuffle_seed = size, ends, is_kept, shuffle_seed

    def read(self, position: Position) -> Iterator[Block[T]]:
        """Blocks from `position` on; from the beginning if it is empty.

        Raises `UserError` for an epoch without documents.
        """
        epoch, number = position.get("epoch", 0), position.get("block", 0)
        place, inside = position.get("source"), position.get("inside", False)
        while True:
            for items, begins in self._of_one_epoch(place, inside):
                start = {"epoch": epoch, "block": number, "source": begins, "inside": inside}
                inside = not self._ends(items[-1])
                yield Block(self._shuffled(items, epoch, number, start["inside"]), start)
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
            inside = not self._ends(item)
            if kept:
                items.append(item)
                size += self._size(item)
                documents += not inside
            # A block only ends inside a kept document: a position in another could not tell that it is left out.
            if items and kept and (documents >= self.documents or size >= BLOCK_CHARACTERS):
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
            if self._ends(item):
                documents.append([])
        first, last = (documents.pop(0) if inside else []), (documents.pop() if documents else [])
        seed = mixed_seed(self.shuffle_seed, epoch, number)
        order = permuted(np.arange(len(documents)), len(documents), seed, epoch) if documents else ()
        return [*first, *(item for index in order for item in documents[index]), *last]


def document_size(document: Document) -> int:
    return 64 + len(document.text)  # characters, and the object's own memory
