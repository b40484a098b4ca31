"""Near-duplicates without pairwise comparison: MinHash signatures with LSH bands, and the set of keys seen so far.

Two documents agree at one place of their signatures with a probability equal to the Jaccard similarity of their word
n-grams (Broder, "On the resemblance and containment of documents", 1997). Documents that agree in all places of any
band count as near-duplicates (Leskovec, Rajaraman and Ullman, "Mining of Massive Datasets", chapter 3). Signatures of
a batch are computed at once; LOG.md has the speed next to `datasketch`.
"""

from __future__ import annotations

import functools

import numpy as np

from slmkit.data.cleaning.words import HashedWords, hash_runs
from slmkit.data.order import random_keys

PLACES = 128
RUN = 5  # words in an n-gram
BLOCK = 1 << 14  # n-grams at once: fits the cache of a core


def bands_and_rows(threshold: float) -> tuple[int, int]:
    """Numbers of bands and of places per band, together at most `PLACES`, that fit the threshold best.

    Documents of similarity s count as near-duplicates with probability 1 - (1 - s^rows)^bands.
    """
    shares = np.linspace(0, 1, 201)
    wanted = shares >= threshold
    best = (np.inf, 0, 0)
    for rows in range(1, PLACES + 1):
        for bands in range(1, PLACES // rows + 1):
            wrong = float(np.abs(wanted - (1 - (1 - shares**rows) ** bands)).mean())
            best = min(best, (wrong, bands, rows))
    return best[1], best[2]


def band_keys(words: HashedWords, bands: int, rows: int) -> np.ndarray:
    """Hash of each band of each text's signature: uint64 [texts, bands]; 0 for texts without words."""
    signature = signatures(words, bands * rows).astype(np.uint64).reshape(len(words.starts), bands, rows)
    keys = (signature * (random_keys(rows, 3) | np.uint64(1))).sum(axis=2, dtype=np.uint64)
    keys = keys * (random_keys(bands, 4) | np.uint64(1)) ^ random_keys(bands, 5)  # keys differ between bands
    keys ^= keys >> np.uint64(29)
    return np.where(words.counts[:, None] > 0, keys, 0)


def signatures(words: HashedWords, places: int) -> np.ndarray:
    """MinHash signatures: the smallest n-gram hash in each of `places` orders, uint32 [texts, places]."""
    runs = hash_runs(words, RUN)
    factors, offsets = _orders(places)
    signature = np.full((len(words.starts), places), np.uint32(0xFFFFFFFF))
    for text in np.flatnonzero(runs.counts).tolist():
        hashes = (runs.hashes[runs.starts[text] : runs.stops[text]] >> np.uint64(32)).astype(np.uint32)
        for start in range(0, len(hashes), BLOCK // places):
            block = factors[:, None] * hashes[start : start + BLOCK // places] + offsets[:, None]  # [places, runs]
            np.minimum(signature[text], block.min(axis=1), out=signature[text])
    return signature


@functools.cache
def _orders(places: int) -> tuple[np.ndarray, np.ndarray]:
    """Odd factors and offsets, uint32 [places] each; each pair permutes the 32-bit numbers."""
    keys = random_keys(places, 6)
    return (keys >> np.uint64(32)).astype(np.uint32) | np.uint32(1), keys.astype(np.uint32)


class SeenKeys:
    """Sorted arrays, each at least twice as long as the next, so that a lookup searches few."""

    def __init__(self) -> None:
        self._arrays: list[np.ndarray] = []

    def __len__(self) -> int:
        return sum(map(len, self._arrays))

    def has(self, keys: np.ndarray) -> np.ndarray:
        """Whether each key, uint64 [...], was added: bool [...]."""
        found = np.zeros(keys.shape, dtype=bool)
        for array in self._arrays:
            found |= array[np.minimum(np.searchsorted(array, keys), len(array) - 1)] == keys
        return found

    def add(self, keys: np.ndarray) -> None:  # uint64 [...]
        added = np.unique(keys)
        added = added[~self.has(added)]
        if not len(added):
            return
        while self._arrays and len(self._arrays[-1]) < 2 * len(added):
            added = np.union1d(self._arrays.pop(), added)
        self._arrays.append(added)

    def new_ones(self, keys: np.ndarray) -> np.ndarray:
        """Add items of several keys, uint64 [items, keys], one after the other; returns which were new, bool [items].

        An item is not new if it shares any key with an earlier one.
        """
        is_new: np.ndarray = np.logical_not(self.has(keys).any(axis=1))
        values, counts = np.unique(keys[is_new], return_counts=True)
        shared = values[counts > 1]  # keys of more than one item
        meets = np.isin(keys, shared).any(axis=1) & is_new
        taken: set[int] = set()
        for thing in np.flatnonzero(meets).tolist():
            own = keys[thing].tolist()
            if taken.isdisjoint(own):
                taken.update(own)
            else:
                is_new[thing] = False
        self.add(keys[is_new])
        return is_new
