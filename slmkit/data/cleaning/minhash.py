"""Near-copies found without comparing every two documents: MinHash signatures in bands.

Two documents agree at one place of their signatures with a probability that is the share of word runs they have in
common (Broder, "On the resemblance and containment of documents", 1997). A band is several places; documents that agree
in all places of any band are taken for near-copies (Leskovec, Rajaraman and Ullman, "Mining of Massive Datasets",
chapter 3). Signatures of a whole batch are computed at once; see LOG.md for the speed beside `datasketch`.
"""

from __future__ import annotations

import functools

import numpy as np

from slmkit.data.cleaning.words import HashedWords, hash_runs
from slmkit.data.order import random_keys

PLACES = 128
RUN = 5  # words
BLOCK = 1 << 14  # runs at once: what fits a core's cache


def bands_and_rows(threshold: float) -> tuple[int, int]:
    """Bands, and places in each, of at most `PLACES`, that come nearest to "alike above the threshold and only there".

    Documents with a share s of runs in common are taken for near-copies with the probability 1 - (1 - s^rows)^bands.
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
    """What stands in each band of each text's signature, hashed: uint64 [texts, bands]; 0 where a text has no words."""
    signature = signatures(words, bands * rows).astype(np.uint64).reshape(len(words.starts), bands, rows)
    keys = (signature * (random_keys(rows, 3) | np.uint64(1))).sum(axis=2, dtype=np.uint64)
    keys = keys * (random_keys(bands, 4) | np.uint64(1)) ^ random_keys(bands, 5)  # the bands are kept apart
    keys ^= keys >> np.uint64(29)
    return np.where(words.counts[:, None] > 0, keys, 0)


def signatures(words: HashedWords, places: int) -> np.ndarray:
    """The least of a text's runs in each of `places` orders: uint32 [texts, places]."""
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
    """Odd factors and offsets: each pair is an order of all 32-bit numbers. uint32 [places] each."""
    keys = random_keys(places, 6)
    return (keys >> np.uint64(32)).astype(np.uint32) | np.uint32(1), keys.astype(np.uint32)
