"""The first rows of a source or of shards, with tokens and loss mask, for inspection."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from slmkit.data.prepare.conversations import conversations_in, learned_rows
from slmkit.data.prepare.open_sources import items_of
from slmkit.data.shards.reader import TokenShards
from slmkit.data.sources import Document, Judged, Pair, Source, open_source, tools_of
from slmkit.data.sources.settings import SourceSettings
from slmkit.tokenizer.encoder import ChatRow

if TYPE_CHECKING:
    from slmkit.tokenizer import SLMTokenizer


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
