"""All documents of a corpus in random order, in the memory of a few shards however large it is.

Every document has a random key that the seed and its place alone decide. Each shard is first written with its documents
sorted by key, so that those whose keys lie in one interval are neighbours in every shard; there are as many intervals
as shards, and the documents of one, put in random order, are a shard of the result. That order of all documents is as
likely as any other.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from slmkit.data.order import random_keys
from slmkit.data.shards.folder import Finished, ShardFolder, content_of
from slmkit.data.shards.work import joined, reordered


class GlobalShuffle:
    """Turns shards sorted by key into as many shards in random order. `shard(number)` may be called from any thread."""

    def __init__(self, ordered: ShardFolder, parts: Sequence[Finished], target: ShardFolder, seed: int) -> None:
        self.ordered, self.parts, self.target, self.seed = ordered, parts, target, seed
        digests = [digest for part in parts for digest in part.shard.sha256.values()]
        self.content = f"shuffled {seed} {content_of(digests)}"
        count = len(parts)
        limits = np.array([(number << 64) // count for number in range(count)], dtype=np.uint64)
        self.bounds = []  # of each part: where each interval begins among its documents, int64 [intervals + 1]
        for number, part in enumerate(parts):
            keys = np.sort(random_keys(part.shard.documents, seed, number))
            self.bounds.append(np.append(np.searchsorted(keys, limits), len(keys)))

    def shard(self, number: int) -> Finished:
        """Gather the documents of an interval, unless that was done before."""
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
