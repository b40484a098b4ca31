"""Streams of documents in blocks: bounded memory, a seeded shuffle, and a position that is a few integers.

A block is read, shuffled inside itself and given out. Its order follows from (seed, epoch, number of the block), so
that whoever goes on later needs to know where the block began, and nothing of what was in it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from typing import Any, Generic, NamedTuple, TypeVar

import numpy as np

from slmkit.config import UserError
from slmkit.data.order import mixed_seed, permuted
from slmkit.data.sources import Document

BLOCK_CHARACTERS = 1 << 24  # a block is full with so much text, however few documents it is

T = TypeVar("T")
Position = dict[str, Any]
Read = Callable[[Position | None], Iterator[tuple[T, Position]]]  # from a position on, each item with the one behind it


class Block(NamedTuple, Generic[T]):
    """`position`: where the block begins, for `Blocks.read` to begin there again."""

    items: list[T]
    position: Position


class Blocks(Generic[T]):
    """Items of a source in blocks of `documents` documents, for one epoch or, with `repeat`, for ever.

    `is_kept` says of the first (or only) piece of a document whether the document is to be given at all; `size` and
    `ends` say of an item how many characters it has and whether a document ends with it.
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
        """Blocks from `position` on, from the very beginning where it is empty.

        Raises `UserError` for an epoch in which there is nothing.
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
        """Items of each block as they are read, and where it begins; a document may go on in the next."""
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
            # Only what is kept may be cut by the end of a block: of the rest nobody would know where it goes on.
            if items and kept and (documents >= self.documents or size >= BLOCK_CHARACTERS):
                yield items, begins
                items, documents, size, begins = [], 0, 0, behind
        if items:
            yield items, begins

    def _shuffled(self, items: list[T], epoch: int, number: int, inside: bool) -> list[T]:
        """Whole documents change places; the end of one that began earlier stays in front, an open one at the end."""
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


def is_held_out(text: str, fraction: float) -> bool:
    """Whether a hash of the text picks it: copies of one document are on one side, wherever they stand."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=6).digest(), "little") / 2**48 < fraction


def document_size(document: Document) -> int:
    return 64 + len(document.text)  # an object takes memory too
