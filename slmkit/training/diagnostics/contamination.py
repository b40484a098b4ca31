"""Share of the validation text that is also in the training text: whole documents, and windows of tokens."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from slmkit.data.shards.reader import TokenShards

WINDOW = 32  # tokens of a window: about two sentences, which rarely occur twice by chance
READ = 2_000_000  # tokens at most of either text; larger ones are sampled evenly
MOST_WINDOWS = 4_000  # windows that are looked up
SPANS = 64


@dataclass(frozen=True)
class Text:
    """Tokens int64 [n], and one past the last of each document int64 [documents]."""

    ids: np.ndarray
    ends: np.ndarray


@dataclass(frozen=True)
class Contamination:
    """Shares of the validation text found in the training text, and of the training text that is repeated in itself.

    A repetitive corpus, such as one of templates, has repetitions in its validation text too; only the `excess` is
    contamination.
    """

    documents: float
    windows: float
    documents_repeated: float  # share of the training documents that occur twice
    windows_repeated: float

    @property
    def excess(self) -> float:
        return max(0.0, self.documents - self.documents_repeated, self.windows - self.windows_repeated)


def contamination(train: Text, validation: Text) -> Contamination:
    """Compare two texts. A share is 0 if there is nothing to compare, such as no document as long as a window."""
    train_documents, train_windows = _document_hashes(train), _window_hashes(train)
    return Contamination(
        documents=_share_found(_document_hashes(validation), train_documents, at_least=1),
        windows=_share_found(_evenly(_window_hashes(validation)), train_windows, at_least=1),
        documents_repeated=_share_found(train_documents, train_documents, at_least=2),
        windows_repeated=_share_found(_evenly(train_windows), train_windows, at_least=2),
    )


def text_of(shards: Sequence[TokenShards], limit: int = READ) -> Text:
    """The documents of shards, up to about `limit` tokens; larger shards are sampled evenly in ranges of tokens.

    The few documents cut at a range's border are not found.
    """
    share = limit // max(1, len(shards))
    ids, ends, before = [np.zeros(0, dtype=np.int64)], [np.zeros(0, dtype=np.int64)], 0
    for one in shards:
        total, size = len(one), max(1, share // SPANS)
        starts = np.linspace(0, total - size, SPANS).astype(np.int64).tolist()
        for start, stop in [(0, total)] if total <= share else [(start, start + size) for start in starts]:
            inside = one.document_ends[(one.document_ends > start) & (one.document_ends <= stop)]
            ids.append(one.tokens_in(start, stop).astype(np.int64))
            ends.append(inside.astype(np.int64) - start + before)
            before += stop - start
    return Text(np.concatenate(ids), np.concatenate(ends))


def _document_hashes(text: Text) -> np.ndarray:
    """int64 [documents]."""
    borders = itertools.pairwise([0, *text.ends.tolist()])
    return np.array([hash(text.ids[start:end].tobytes()) for start, end in borders], dtype=np.int64)


def _window_hashes(text: Text) -> np.ndarray:
    """uint64 [windows]: the hash of every window of `WINDOW` tokens, a polynomial of scrambled tokens modulo 2^64."""
    scrambled = (text.ids.astype(np.uint64) + np.uint64(1)) * np.uint64(0xBF58476D1CE4E5B9)
    scrambled ^= scrambled >> np.uint64(29)
    count = max(0, len(scrambled) - WINDOW + 1)
    hashes = np.zeros(count, dtype=np.uint64)
    for offset in range(WINDOW):
        hashes *= np.uint64(0x9E3779B97F4A7C15)
        hashes += scrambled[offset : offset + count]
    return hashes


def _evenly(hashes: np.ndarray) -> np.ndarray:
    """At most `MOST_WINDOWS` of the hashes, of windows that do not overlap."""
    count = min(MOST_WINDOWS, (len(hashes) + WINDOW - 1) // WINDOW)
    return hashes[np.linspace(0, max(0, len(hashes) - 1), count).astype(np.int64)]


def _share_found(asked: np.ndarray, among: np.ndarray, at_least: int) -> float:
    """The share of `asked` hashes that occur at least `at_least` times in `among`."""
    if not len(asked) or not len(among):
        return 0.0
    known = np.unique(asked)
    places = np.minimum(np.searchsorted(known, among), len(known) - 1)
    counts = np.bincount(places[known[places] == among], minlength=len(known))
    return float((counts[np.searchsorted(known, asked)] >= at_least).mean())
