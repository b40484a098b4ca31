"""The order of an epoch: a seeded permutation computed on the fly, so that a position is an integer.

A Feistel network is a bijection of b-bit numbers for any round function. Results beyond the size are permuted again
until they are within ("cycle walking"), which makes it a bijection of range(size).
Black and Rogaway, "Ciphers with Arbitrary Finite Domains", 2002.
"""

from __future__ import annotations

import hashlib

import numpy as np

ROUNDS = 6


def permuted(positions: np.ndarray, size: int, seed: int, epoch: int) -> np.ndarray:
    """The images, int64 [...], of `positions` [...] in range(size) under the permutation of (seed, epoch).

    A bijection of range(size), in time and memory independent of `size`.
    """
    positions = np.asarray(positions, dtype=np.int64)
    if positions.size and not 0 <= positions.min() <= positions.max() < size:
        raise ValueError(f"expected positions in range({size}), found {positions.min()} to {positions.max()}")
    half_bits = max(1, ((size - 1).bit_length() + 1) // 2)
    keys = _round_keys(seed, epoch)
    values = _feistel(positions.astype(np.uint64).ravel(), half_bits, keys)
    while (outside := values >= size).any():  # fewer than three in four, each time
        values[outside] = _feistel(values[outside], half_bits, keys)
    return values.astype(np.int64).reshape(positions.shape)


def mixed_seed(*parts: int | str) -> int:
    """A 63-bit seed derived from all parts, unrelated to the seeds of similar parts."""
    digest = hashlib.blake2b(":".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def random_keys(size: int, *seeds: int) -> np.ndarray:
    """Pseudorandom keys, uint64 [size], determined by `seeds` alone.

    Sorting by them is a shuffle.
    """
    first, second = _round_keys(":".join(map(str, seeds)), 0)[:2]
    return _mixed(_mixed(np.arange(size, dtype=np.uint64) ^ first) ^ second)


def _round_keys(seed: int | str, epoch: int) -> np.ndarray:
    digest = hashlib.blake2b(f"{seed}:{epoch}".encode(), digest_size=8 * ROUNDS).digest()
    return np.frombuffer(digest, dtype="<u8")


def _feistel(values: np.ndarray, half_bits: int, keys: np.ndarray) -> np.ndarray:
    """Permute numbers of 2 × half_bits bits: uint64 [n] → uint64 [n]."""
    bits, mask = np.uint64(half_bits), np.uint64((1 << half_bits) - 1)
    left, right = values >> bits, values & mask
    for key in keys:
        left, right = right, left ^ (_mixed(right ^ key) & mask)
    return (left << bits) | right


def _mixed(values: np.ndarray) -> np.ndarray:
    """SplitMix64's finalizer (Steele, Lea and Flood, 2014): each bit of the result depends on each bit of `values`."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))
