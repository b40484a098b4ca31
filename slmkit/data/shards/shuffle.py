"""Shuffles all documents of a corpus in the memory of a few shards.

Every document has a random key, determined by the seed and its position. Each shard is first written with its documents
sorted by key, so that documents with keys of one interval are contiguous in every shard. There are as many intervals as
shards; the documents of one interval, shuffled, are a shard of the result. All orders are equally likely.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from slmkit.data.order import random_keys
from slmkit.data.shards.folder import Finished, ShardFolder, content_of
from slmkit.data.shards.work import joined, reordered


class GlobalShuffle:
    """Turns shards sorted by key into as many shards in random order. `shard(number)` is thread-safe."""

    def __init__(self, ordered: ShardFolder, parts: Sequence[Finished], target: ShardFolder, seed: int) -> None:
        self.ordered, self.parts, self.target, self.seed = ordered, parts, target, seed
        digests = [digest for part in parts for digest in part.shard.sha256.values()]
        self.content = f"shuffled {seed} {content_of(digests)}"
        count = len(parts)
        limits = np.array([(number << 64) // count for number in range(count)], dtype=np.uint64)
        self.bounds = []  # for each part: index of its first document in each interval, int64 [intervals + 1]
        for number, part in enumerate(parts):
            keys = np.sort(random_keys(part.shard.documents, seed, number))
            self.bounds.append(np.append(np.searchsorted(keys, limits), len(keys)))

    def shard(self, number: int) -> Finished:
        """Write the shard of an interval's documents, unless it is there already."""
        content = f"{self.content} {number}"
        finished = self.target.find(number, content)
        if finished is None:
            found = [
                self.ordered.read(part, int(bounds[number]), int(bounds[number + 1]))
                for part, bounds in zip(self.parts, self.bounds)
            ]
            ids, ends = joined(found)
            order = np.argsort(random_keys(len(ends), self.seed, number, len(self.parts)))
            finished = self.target.write(number, content, *reordered(ids, ends, order), text_bytes=0)
        return finished
