"""The first rows of a source or of shards, with tokens and loss mask, for inspection."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from slmkit.data.rows.pairs import answers_alone
from slmkit.data.shards.reader import TokenShards
from slmkit.data.sources import Document, Judged, Message, Pair, Source, open_source, tools_of
from slmkit.data.sources.settings import SourceSettings

if TYPE_CHECKING:
    from slmkit.tokenizer import SLMTokenizer
    from slmkit.tokenizer.encoder import ChatRow


class Sample(NamedTuple):
    """A row: its title, ids [tokens], and whether each is learned [tokens]."""

    title: str
    ids: list[int]
    trained: list[bool]


def samples_of_shards(shards: TokenShards, count: int) -> Iterator[Sample]:
    """The first `count` documents."""
    starts = [0, *shards.document_ends[:count].tolist()]
    for number, (start, end) in enumerate(itertools.pairwise(starts), start=1):
        trained = shards.trained_in(start, end) if shards.header.masked else np.ones(end - start, dtype=bool)
        title = f"document {number}, {end - start:,} tokens"
        yield Sample(title, shards.tokens_in(start, end).tolist(), trained.tolist())


def samples_of_source(settings: SourceSettings, tokenizer: SLMTokenizer, count: int) -> tuple[Source, list[Sample]]:
    """The first `count` rows, by their columns: pairs, judged answers, conversations or text.

    Raises `UserError` if the columns fit none of these, and for a row that cannot be read.
    """
    source = open_source(settings)
    readers: dict[str, Callable[[], Iterator[Any]]] = {
        "pairs": source.read_pairs,
        "judgements": source.read_judgements,
        "conversations": source.read_conversations,
        "documents": source.read,
    }
    rows = readers[source.reads()]()
    samples = [
        Sample(f"{title} {number}", row.ids.tolist(), row.trained.tolist())
        for number, (item, _) in enumerate(itertools.islice(rows, count), start=1)
        for title, row in _rows(item, tokenizer)
    ]
    return source, samples


def _rows(item: Any, tokenizer: SLMTokenizer) -> Iterator[tuple[str, ChatRow]]:
    """Title and tokens of each part of a row."""
    from slmkit.tokenizer.encoder import ChatRow, rows_to_learn

    def spoken(
        title: str, messages: list[Message], answers: list[Message] | None = None
    ) -> Iterator[tuple[str, ChatRow]]:
        rendered = tokenizer.render_chat(messages, tools=tools_of(messages))
        (rows,) = tokenizer.encode_rendered([rendered], threads=1)
        for row in rows_to_learn(rows) if answers is None else rows[-1:]:
            yield title, row if answers is None else answers_alone(row, answers)

    if isinstance(item, Pair):
        yield from spoken("chosen", item.chosen, item.chosen[item.shared :])
        yield from spoken("rejected", item.rejected, item.rejected[item.shared :])
    elif isinstance(item, Judged):
        yield from spoken("good" if item.label else "bad", item.messages, item.messages[-1:])
    elif isinstance(item, Document):
        ids = np.array(tokenizer.encode(item.text), dtype=np.uint32)
        yield "text", ChatRow(ids, np.ones(len(ids), dtype=bool))
    else:
        yield from spoken("conversation", item)
