"""A growing set of 64-bit keys in 8 bytes per key, for duplicates in a corpus."""

from __future__ import annotations

import numpy as np


class SeenKeys:
    """Sorted arrays, each at least twice as long as the next, so that a lookup searches few."""

    def __init__(self) -> None:
        self._arrays: list[np.ndarray] = []

    def __len__(self) -> int:
        return sum(map(len, self._arrays))

    def has(self, keys: np.ndarray) -> np.ndarray:
        """Whether each key (uint64, any shape) was added: bool of the same shape."""
        found = np.zeros(keys.shape, dtype=bool)
        for array in self._arrays:
            found |= array[np.minimum(np.searchsorted(array, keys), len(array) - 1)] == keys
        return found

    def add(self, keys: np.ndarray) -> None:  # uint64, any shape
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
