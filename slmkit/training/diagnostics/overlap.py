"""Share of the validation text that is also in the training text: whole documents, and windows of tokens.

Every window has a hash: a polynomial in an odd base modulo 2^64 over scrambled tokens (Karp and Rabin, 1987), from
prefix sums, so that all windows of millions of tokens are hashed in 0.1 s.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from slmkit.data.shards.reader import TokenShards

STRETCH = 32  # tokens of a window: about two sentences, which rarely occur twice by chance
READ = 2_000_000  # tokens at most of either text; larger ones are sampled evenly
ASKED = 4_000  # windows that are looked up
SPANS = 64
BASE = 0x9E3779B97F4A7C15


@dataclass(frozen=True)
class Text:
    """Tokens int64 [n], and one past the last of each document int64 [documents]."""

    ids: np.ndarray
    ends: np.ndarray


@dataclass(frozen=True)
class Overlap:
    """Shares of the validation text found in the training text, and of the training text that is repeated in itself.

    A repetitive corpus, such as one of templates, has repetitions in its validation text too; only the `excess` is
    contamination.
    """

    documents: float
    stretches: float
    documents_repeated: float  # share of the training documents that occur twice
    stretches_repeated: float

    @property
    def excess(self) -> float:
        return max(0.0, self.documents - self.documents_repeated, self.stretches - self.stretches_repeated)


def overlap(train: Text, validation: Text) -> Overlap:
    """Compare two texts. A share is 0 if there is nothing to compare, such as no document as long as a window."""
    ours, theirs = _Hashes(train.ids), _Hashes(validation.ids)
    train_documents, validation_documents = ours.of_documents(train.ends), theirs.of_documents(validation.ends)
    train_stretches = ours.of_stretches(np.arange(max(0, len(train.ids) - STRETCH + 1)))
    asked = theirs.of_stretches(_evenly(len(validation.ids)))
    own = train_stretches[_evenly(len(train.ids))] if len(train_stretches) else train_stretches
    return Overlap(
        documents=_share_found(validation_documents, train_documents, at_least=1),
        stretches=_share_found(asked, train_stretches, at_least=1),
        documents_repeated=_share_found(train_documents, train_documents, at_least=2),
        stretches_repeated=_share_found(own, train_stretches, at_least=2),
    )


def text_of(shards: Sequence[TokenShards], limit: int = READ) -> Text:
    """The documents of shards, up to about `limit` tokens; larger shards are sampled evenly."""
    share = limit // max(1, len(shards))
    pieces = [piece for one in shards for piece in _spans(one, share)]
    ids = [one.tokens_in(start, stop).astype(np.int64) for one, start, stop in pieces]
    ends, before = [], 0
    for one, start, stop in pieces:
        inside = one.document_ends[(one.document_ends > start) & (one.document_ends <= stop)]
        ends.append(inside - start + before)
        before += stop - start
    return Text(_joined(ids), _joined(ends))


def _spans(shards: TokenShards, limit: int) -> list[tuple[TokenShards, int, int]]:
    """Evenly spread ranges of tokens. The few documents cut at a range's border are not found."""
    total, size = len(shards), max(1, limit // SPANS)
    if total <= limit:
        return [(shards, 0, total)]
    return [(shards, start, start + size) for start in np.linspace(0, total - size, SPANS).astype(np.int64).tolist()]


def _joined(parts: list[np.ndarray]) -> np.ndarray:
    return np.concatenate(parts).astype(np.int64) if parts else np.zeros(0, dtype=np.int64)


def _evenly(tokens: int) -> np.ndarray:
    """Starts int64 [windows] of the windows that are looked up: at most `ASKED`, not overlapping."""
    count = min(ASKED, tokens // STRETCH)
    return np.linspace(0, max(0, tokens - STRETCH), count).astype(np.int64)


class _Hashes:
    """Hashes of windows of one text."""

    def __init__(self, ids: np.ndarray) -> None:
        n = len(ids)
        scrambled = (ids.astype(np.uint64) + np.uint64(1)) * np.uint64(0xBF58476D1CE4E5B9)
        scrambled ^= scrambled >> np.uint64(29)
        self.prefix = np.zeros(n + 1, dtype=np.uint64)
        np.cumsum(scrambled * _powers(BASE, n), out=self.prefix[1:])
        self.unshift = _powers(pow(BASE, -1, 2**64), n + 1)

    def of_stretches(self, starts: np.ndarray) -> np.ndarray:
        return self._between(starts, starts + STRETCH)

    def of_documents(self, ends: np.ndarray) -> np.ndarray:
        starts = np.concatenate([np.zeros(1, dtype=np.int64), ends[:-1]])[: len(ends)]
        return self._between(starts, ends)

    def _between(self, starts: np.ndarray, stops: np.ndarray) -> np.ndarray:
        """uint64 [ranges]: the hash of each range. Ranges of different lengths hash differently, up to collisions."""
        return (self.prefix[stops] - self.prefix[starts]) * self.unshift[starts] + (stops - starts).astype(np.uint64)


def _powers(base: int, count: int) -> np.ndarray:
    """base^0 … base^(count - 1), modulo 2^64."""
    powers = np.full(count, base, dtype=np.uint64)
    powers[:1] = 1
    return np.cumprod(powers, dtype=np.uint64)


def _share_found(asked: np.ndarray, among: np.ndarray, at_least: int) -> float:
    """The share of `asked` hashes that occur `at_least` so many times in `among`."""
    if not len(asked) or not len(among):
        return 0.0
    known = np.unique(asked)
    places = np.minimum(np.searchsorted(known, among), len(known) - 1)
    counts = np.bincount(places[known[places] == among], minlength=len(known))
    return float((counts[np.searchsorted(known, asked)] >= at_least).mean())
