"""Statistics of a directory of shards."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from slmkit.data.shards.reader import TokenShards

TOKENS_AT_ONCE = 1 << 24


@dataclass(frozen=True)
class ShardFacts:
    """Lengths in tokens, each with its end-of-text token, which need not fit into a row for a conversation.

    Duplicates: documents equal to an earlier one.
    """

    longest: int
    median_length: int
    duplicates: int
    trained: int | None  # learned tokens; None for text
    truncated: int | None  # documents longer than `length`


def find_facts(shards: TokenShards, length: int | None = None) -> ShardFacts:
    """Statistics from one pass over all shards; uses 8 bytes per document. `length`: to count longer documents."""
    ends = shards.document_ends
    lengths = np.diff(ends, prepend=0)
    trained = None
    if shards.header.masked:
        starts = range(0, len(shards), TOKENS_AT_ONCE)
        parts = (shards.trained_in(start, min(start + TOKENS_AT_ONCE, len(shards))) for start in starts)
        trained = sum(int(np.count_nonzero(part)) for part in parts)
    return ShardFacts(
        longest=int(lengths.max(initial=0)),
        median_length=int(np.median(lengths)) if len(lengths) else 0,
        duplicates=len(ends) - len(np.unique(document_hashes(shards))),
        trained=trained,
        truncated=None if length is None else int((lengths - shards.header.masked > length).sum()),
    )


def document_hashes(shards: TokenShards) -> np.ndarray:
    """64-bit hash of each document's tokens: uint64 [documents]."""
    ends = np.concatenate([[0], shards.document_ends])
    hashes = np.empty(len(ends) - 1, dtype="<u8")
    # Read whole documents of about this many tokens at once.
    cuts = np.searchsorted(ends, np.arange(TOKENS_AT_ONCE, len(shards), TOKENS_AT_ONCE))
    for first, stop in pairwise(np.unique([0, *cuts.tolist(), len(hashes)]).tolist()):
        tokens = shards.tokens_in(int(ends[first]), int(ends[stop]))
        borders = (ends[first : stop + 1] - ends[first]).tolist()
        digests = [hashlib.blake2b(tokens[a:b].tobytes(), digest_size=8).digest() for a, b in pairwise(borders)]
        hashes[first:stop] = np.frombuffer(b"".join(digests), dtype="<u8")
    return hashes
