"""Near-duplicates without pairwise comparison: MinHash signatures with LSH bands.

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
