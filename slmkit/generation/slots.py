"""Slots of the KV cache for the rows of the engine, in pools of two or three lengths.

A long text would make the slots of all others as long, so texts of up to 512, up to 4,096 and more positions have pools
of their own. In a pool the running rows are in the first slots, in order, so that a forward pass takes a view of
them. A text that has ended stays in its slot until another needs it: one that begins alike copies its beginning.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from slmkit.config import UserError
from slmkit.generation.ensemble import Cache, LanguageModel
from slmkit.model.cache import AT_ONCE

if TYPE_CHECKING:
    from slmkit.generation.engine import Row

LENGTHS = (512, 4096)  # of the pools but the last, which is as long as the context
LEAST = 64  # positions: caches grow from here by doubling


class Pool:
    """A cache, the text that each of its slots holds, and the rows that run in the first of them."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.rows: list[Row] = []  # rows[i] runs in slot i
        self.clear()

    def clear(self) -> None:
        self.cache: Cache | None = None
        self.texts: list[list[int]] = []  # the cache holds the first `cache.length(slot)` ids of each

    def resize(self, cache: Cache, slots: int) -> None:
        """Move to another, empty cache, with as many texts as have a place there."""
        for slot in range(min(len(self.texts), slots)):
            cache.copy_slot(slot, self.cache, slot, self.cache.length(slot))
        self.cache, self.texts = cache, (self.texts + [[] for _ in range(slots)])[:slots]

    def swap(self, a: int, b: int) -> None:
        """Exchange what two slots hold, and the rows that run in them."""
        if a != b:
            self.cache.swap(a, b)
            self.texts[a], self.texts[b] = self.texts[b], self.texts[a]
            for row in self.rows:
                row.slot = {a: b, b: a}.get(row.slot, row.slot)
            self.rows.sort(key=lambda row: row.slot)

    def run(self, row: Row) -> None:
        """Let a row whose prompt is in its slot join the running ones."""
        self.swap(row.slot, len(self.rows))
        row.slot = len(self.rows)
        self.rows.append(row)

    def leave(self, row: Row) -> None:
        """Take a running row out; its slot, the last of the running ones now, is free and keeps its text."""
        self.swap(row.slot, len(self.rows) - 1)
        self.rows.remove(row)


class Pools:
    """All slots of an engine. `memory`: bytes of the caches; None: no limit."""

    def __init__(self, decoder: LanguageModel, max_rows: int, memory: int | None, reuse: bool) -> None:
        self.decoder, self.max_rows, self.memory = decoder, max_rows, math.inf if memory is None else memory
        # Where a rotation depends on the length of the text, keys do too: prompts are read at once, and never reused.
        self.in_pieces = not any(rope.depends_on_length for rope in decoder.ropes)
        self.reuse = reuse and self.in_pieces
        self.at_once = AT_ONCE if self.in_pieces else decoder.max_positions
        limits = [*(length for length in LENGTHS if length < decoder.max_positions), decoder.max_positions]
        self.pools = [Pool(limit) for limit in limits]

    def __iter__(self) -> Iterator[Pool]:
        return iter(self.pools)

    @property
    def running(self) -> list[Row]:
        return [row for pool in self.pools for row in pool.rows]

    def expect(self, length: int) -> None:
        """Raises `UserError` if a text of `length` positions needs more memory than there is."""
        needed = self.decoder.cache_bytes(1, self._rounded(length), self.at_once)
        if needed > self.memory:
            raise UserError(
                f"{length} tokens need {needed / 2**20:,.1f} MiB of KV cache, more than the allowed "
                f"{self.memory / 2**20:,.1f} MiB: ask for fewer tokens, or allow more memory"
            )

    def admit(self, row: Row, length: int) -> bool:
        """Give a row a slot of `length` positions, with as much of its prompt as is known; False if none is free."""
        pool = next(pool for pool in self.pools if length <= pool.limit)
        if len(self.running) >= self.max_rows or not self._reserve(pool, length):
            return False
        source = self._beginning_of(row.ids[:-1]) if self.reuse and not row.reads_whole else None
        free = range(len(pool.rows), len(pool.texts))
        row.pool = pool
        if source is not None and source[0] is pool and source[1] in free:
            row.slot = source[1]
            pool.cache.truncate(row.slot, source[2])
        else:
            row.slot = min(free, key=pool.cache.length)  # what is cheapest to read again
            pool.cache.truncate(row.slot, 0)
            if source is not None:
                pool.cache.copy_slot(row.slot, source[0].cache, *source[1:])
        pool.texts[row.slot] = row.ids
        return True

    def _reserve(self, pool: Pool, length: int) -> bool:
        """Make sure of a free slot of `length` positions; False if that needs more memory than there is."""
        held, used = len(pool.texts), len(pool.rows)
        longest = max(self._rounded(length), pool.cache.max_length if pool.cache else 0)
        if used < held and longest == pool.cache.max_length:
            return True
        usual = held if used < held else max(1, min(2 * held, self.max_rows))
        for slots, positions in ((usual, longest), (used + 1, longest), (1, self._rounded(length))):
            if slots > used and self._fits(pool, slots, positions):
                if used == 0 and slots == 1:
                    pool.clear()
                pool.resize(self.decoder.new_cache(slots, positions, self.at_once), slots)
                return True
        return False

    def _fits(self, pool: Pool, slots: int, length: int) -> bool:
        """Whether a pool of that size fits into the memory, after clearing others in which nothing runs if need be."""
        needed = self.decoder.cache_bytes(slots, length, self.at_once)
        others = [other for other in self.pools if other is not pool]
        for other in others:
            if not other.rows and needed + sum(map(self._bytes, others)) > self.memory:
                other.clear()
        return needed + sum(map(self._bytes, others)) <= self.memory

    def _bytes(self, pool: Pool) -> int:
        return self.decoder.cache_bytes(len(pool.texts), pool.cache.max_length, self.at_once) if pool.cache else 0

    def _rounded(self, length: int) -> int:
        """The size of a cache for `length` positions: a power of two, or the whole context."""
        return min(max(LEAST, 1 << (length - 1).bit_length()), self.decoder.max_positions)

    def _beginning_of(self, ids: Sequence[int]) -> tuple[Pool, int, int] | None:
        """The slot that holds most of the beginning of `ids`: its pool, its number, and how many positions."""
        found = [
            (pool, slot, common)
            for pool in self.pools
            for slot, text in enumerate(pool.texts)
            if (common := _common(ids, text, pool.cache.length(slot))) and pool.cache.holds(slot, common)
        ]
        return max(found, key=lambda each: each[2], default=None)


def _common(a: Sequence[int], b: Sequence[int], limit: int) -> int:
    """How many ids both begin with, of the first `limit`."""
    limit = min(limit, len(a), len(b))
    return next((place for place in range(limit) if a[place] != b[place]), limit)
