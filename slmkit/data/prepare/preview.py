"""What sources and shards hold: their first rows with tokens and loss mask, and statistics of shards."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np

from slmkit.data.prepare.conversations import conversations_in, learned_rows
from slmkit.data.prepare.open_sources import items_of
from slmkit.data.shards.reader import TokenShards
from slmkit.data.sources import Document, Judged, Pair, Source, open_source, tools_of
from slmkit.data.sources.settings import SourceSettings
from slmkit.tokenizer import SLMTokenizer
from slmkit.tokenizer.encoder import ChatRow


class PreviewRow(NamedTuple):
    """A row: its title, ids [tokens], and whether each is learned [tokens]."""

    title: str
    ids: list[int]
    trained: list[bool]


def samples_of_shards(shards: TokenShards, count: int) -> Iterator[PreviewRow]:
    """The first `count` documents."""
    starts = [0, *shards.document_ends[:count].tolist()]
    for number, (start, end) in enumerate(itertools.pairwise(starts), start=1):
        trained = shards.trained_in(start, end) if shards.header.masked else np.ones(end - start, dtype=bool)
        title = f"document {number}, {end - start:,} tokens"
        yield PreviewRow(title, shards.tokens_in(start, end).tolist(), trained.tolist())


def samples_of_source(settings: SourceSettings, tokenizer: SLMTokenizer, count: int) -> tuple[Source, list[PreviewRow]]:
    """The first `count` rows, by their columns: pairs, judged answers, conversations or text.

    Raises `UserError` if the columns fit none of these, and for a row that cannot be read.
    """
    source = open_source(settings)
    kind: Any = source.reads()
    items = items_of(source, kind)
    samples = [
        PreviewRow(f"{title} {number}", row.ids.tolist(), row.trained.tolist())
        for number, item in enumerate(itertools.islice(items, count), start=1)
        for title, row in _rows(item, tokenizer)
    ]
    return source, samples


def _rows(item: Any, tokenizer: SLMTokenizer) -> Iterator[tuple[str, ChatRow]]:
    """Title and tokens of each part of a row."""
    if isinstance(item, Document):
        ids = np.array(tokenizer.encode(item.text), dtype=np.uint32)
        yield "text", ChatRow(ids, np.ones(len(ids), dtype=bool))
        return
    titles = ["conversation"]
    if isinstance(item, Pair):
        titles = ["chosen", "rejected"]
    elif isinstance(item, Judged):
        titles = ["good" if item.label else "bad"]
    for title, (messages, answers) in zip(titles, conversations_in(item)):
        rendered = tokenizer.render_chat(messages, tools=tools_of(messages))
        (rows,) = tokenizer.encode_rendered([rendered], threads=1)
        yield from ((title, row) for row in learned_rows(rows, answers))


# -- statistics of shards ----------------------------------------------------------------------------------------------

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
