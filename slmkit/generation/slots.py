"""Slots of the KV cache for the rows of the engine, in pools of two or three lengths.

A long text would make the slots of all others as long, so texts of up to 512, up to 4,096 and more positions have pools
of their own. In a pool the running rows are in the first slots, in order, so that a forward pass takes a view of
them. A text that has ended stays in its slot until another needs it: one that begins alike copies its beginning.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch

from slmkit.config import UserError
from slmkit.generation.ensemble import Cache, LanguageModel
from slmkit.model.cache import AT_ONCE

LENGTHS = (512, 4096)  # of the pools but the last, which is as long as the context
LEAST = 64  # positions: caches grow from here by doubling


Row = Any  # `engine.Row`: the engine imports this module


class Text(NamedTuple):
    """What a slot holds the beginning of: the first `cache.length(slot)` ids."""

    ids: Sequence[int]
    group: str  # `Request.prefix_group`


class Pool:
    """A cache, the text that each of its slots holds, and the rows in the first of them: first those that run, then
    those whose prompt is read.
    """

    def __init__(self, decoder: LanguageModel, limit: int, at_once: int) -> None:
        self.decoder, self.limit, self.at_once = decoder, limit, at_once
        self.rows: list[Row] = []  # rows[i] is in slot i
        self.running = 0  # how many of them run
        self.cache: Cache = None
        self.clear()

    def clear(self) -> None:
        """Forget all texts, and give back their memory."""
        self.texts: list[Text] = []  # of each slot
        self.resize(0, min(LEAST, self.limit))

    def resize(self, slots: int, length: int) -> None:
        """Move to another cache, with as many texts as have a place there."""
        cache = self.decoder.new_cache(slots, length, self.at_once)
        texts = [Text((), "")] * slots
        for slot, text in enumerate(self.texts[:slots]):
            held = self.cache.length(slot)
            if held <= length and self.cache.holds(slot, held):
                cache.copy_slot(slot, self.cache, slot, held)
                texts[slot] = text
        self.cache, self.texts = cache, texts

    def bytes(self, slots: int, length: int) -> int:
        """What a cache of this size takes."""
        return self.decoder.cache_bytes(slots, length, self.at_once)

    def swap(self, a: int, b: int) -> None:
        """Exchange what two slots hold, and the rows in them."""
        if a != b:
            self.cache.swap(a, b)
            self.texts[a], self.texts[b] = self.texts[b], self.texts[a]
            for row in self.rows:
                row.slot = {a: b, b: a}.get(row.slot, row.slot)
            self.rows.sort(key=lambda row: row.slot)

    def leave(self, row: Row, keep: bool = True) -> None:
        """Take a row out. Its slot comes behind those of the others; it keeps its text, or is erased."""
        if row.slot < self.running:
            self.running -= 1
            self.swap(row.slot, self.running)
        for other in self.rows[row.slot + 1 :]:
            self.swap(other.slot, other.slot - 1)
        self.rows.remove(row)
        if not keep:
            self.cache.erase(row.slot)


class Prefix(NamedTuple):
    """A slot whose text begins as a prompt does, for `length` positions."""

    pool: Pool
    slot: int
    length: int


class Pools:
    """All slots of an engine. `memory`: bytes of the caches; None: no limit. A cache that grows exists twice then."""

    def __init__(self, decoder: LanguageModel, max_rows: int, memory: int | None, reuse: bool) -> None:
        self.decoder, self.max_rows, self.memory = decoder, max_rows, math.inf if memory is None else memory
        # Where a rotation depends on the length of the text, keys do too: prompts are read at once, and never reused.
        self.in_pieces = not any(rope.depends_on_length for rope in decoder.ropes)
        self.reuse = reuse and self.in_pieces
        self.at_once = AT_ONCE if self.in_pieces else decoder.max_positions
        limits = [*(length for length in LENGTHS if length < decoder.max_positions), decoder.max_positions]
        with torch.inference_mode():
            self.pools = [Pool(decoder, limit, self.at_once) for limit in limits]

    def __iter__(self) -> Iterator[Pool]:
        return iter(self.pools)

    def bytes(self, length: int) -> int:
        """What a text of `length` positions takes."""
        return self.pools[-1].bytes(1, self._rounded(length))

    def expect(self, length: int) -> None:
        """Raises `UserError` if a text of `length` positions needs more memory than there is."""
        if (needed := self.bytes(length)) > self.memory:
            raise UserError(
                f"{length} tokens need {needed / 2**20:,.1f} MiB of KV cache, more than the allowed "
                f"{self.memory / 2**20:,.1f} MiB: ask for fewer tokens, or allow more memory"
            )

    def admit(self, row: Row, length: int) -> bool:
        """Give a row a slot of `length` positions, with what is known of its prompt; False if none is free."""
        pool = next(pool for pool in self.pools if length <= pool.limit)
        if sum(len(each.rows) for each in self.pools) >= self.max_rows or not self._reserve(pool, length):
            return False
        slot, free = len(pool.rows), range(len(pool.rows), len(pool.texts))
        group = row.request.prefix_group
        prefix = self._longest_prefix(row.ids[:-1], group) if self.reuse and not row.reads_whole else None
        if prefix is not None and prefix.pool is pool and prefix.slot in free:
            pool.swap(slot, prefix.slot)
            pool.cache.truncate(slot, prefix.length)
        else:
            lost = min(free, key=pool.cache.length)  # the text that is cheapest to read again
            pool.swap(slot, lost)
            pool.cache.truncate(slot, 0)
            if prefix is not None:
                pool.cache.copy_slot(slot, prefix.pool.cache, prefix.slot, prefix.length)
        row.pool, row.slot, pool.texts[slot] = pool, slot, Text(row.ids, group)
        row.cached_tokens = prefix.length if prefix is not None else 0
        pool.rows.append(row)
        return True

    def _reserve(self, pool: Pool, length: int) -> bool:
        """Make sure of a free slot of `length` positions; False if that needs more memory than there is."""
        held, used = len(pool.texts), len(pool.rows)
        longest = max(self._rounded(length), pool.cache.max_length)
        more = max(1, min(2 * held, self.max_rows))
        if used < held and longest == pool.cache.max_length:
            is_lost = all(pool.cache.length(slot) for slot in range(used, held))  # a text that may be continued
            if is_lost and more > held and self._taken_beside(pool) + pool.bytes(more, longest) <= self.memory:
                pool.resize(more, longest)
            return True
        for slots, positions in (
            (held if used < held else more, longest),
            (used + 1, longest),
            (1, self._rounded(length)),
        ):
            if slots > used and self._fits(pool, slots, positions):
                pool.resize(slots, positions)
                return True
        return False

    def _fits(self, pool: Pool, slots: int, length: int) -> bool:
        """Whether a pool of that size fits into the memory, after clearing others in which nothing runs if need be."""
        for other in (*(other for other in self.pools if other is not pool and not other.rows), None):
            if pool.bytes(slots, length) + self._taken_beside(pool) <= self.memory:
                return True
            if other is not None:
                other.clear()
        return False

    def _taken_beside(self, pool: Pool) -> int:
        """Bytes of the other pools."""
        return sum(each.bytes(len(each.texts), each.cache.max_length) for each in self.pools if each is not pool)

    def _rounded(self, length: int) -> int:
        """The size of a cache for `length` positions: a power of two, or the whole context."""
        return min(max(LEAST, 1 << (length - 1).bit_length()), self.decoder.max_positions)

    def _longest_prefix(self, ids: Sequence[int], group: str) -> Prefix | None:
        """The slot of a text of this group that holds most of the beginning of `ids`."""
        best = None
        for pool in self.pools:
            for slot, text in enumerate(pool.texts):
                length = common(ids, text.ids, pool.cache.length(slot)) if text.group == group else 0
                if length > (best.length if best else 0) and pool.cache.holds(slot, length):
                    best = Prefix(pool, slot, length)
                    if length == len(ids):
                        return best
        return best


def common(a: Sequence[int], b: Sequence[int], limit: int) -> int:
    """How many ids both begin with, of the first `limit`."""
    limit = min(limit, len(a), len(b))
    return next((place for place in range(limit) if a[place] != b[place]), limit)
