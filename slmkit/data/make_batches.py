"""Makes the batches of a run from a prepared corpus and the recipe's `data` section."""

from __future__ import annotations

import functools
from collections.abc import Mapping

from slmkit.data.mixture import plan_phases
from slmkit.data.order import mixed_seed
from slmkit.data.prepare.conversations import ConversationEncoder
from slmkit.data.prepare.corpus import Corpus
from slmkit.data.prepare.held_out import written
from slmkit.data.prepare.open_sources import is_kept_in, open_sources
from slmkit.data.settings import DataSettings, Reads
from slmkit.data.sources import Source
from slmkit.data.stream import ChatRows, MixtureStream, PretrainRows, Rows, Stream
from slmkit.data.streaming import Blocks, ConversationRows, StreamedBatches, StreamedRows, TextRows
from slmkit.tokenizer import SLMTokenizer

TOGETHER = 64  # documents tokenized at once without shuffling
LOOK_AHEAD = 512  # conversations that are packed together


def make_batches(
    reads: Reads, data: DataSettings, corpus: Corpus, length: int, rows_per_step: int, seed: int
) -> Stream | StreamedBatches:
    """Batches of rows [rows, length], from shards or streamed, of one source or of several mixed by weight.

    Raises `UserError` for sources that cannot be found or are too short for a row.
    """
    if data.streaming:
        phases, opened = plan_phases(data.phases, data.weights, length), open_sources(data, seed)
        sources = {
            name: _streamed(reads, data, source, corpus.tokenizer, length, mixed_seed(seed, name))
            for name, source in opened.items()
        }
        return StreamedBatches(
            sources, phases, data.when_exhausted, rows_per_step, data.separate_documents, origins=[*opened.values()]
        )
    return stream_of(stored_rows(reads, data, corpus, length), data, length, rows_per_step, seed)


def stored_rows(reads: Reads, data: DataSettings, corpus: Corpus, length: int) -> dict[str, Rows]:
    """The rows of each source in shards, by name."""
    rows: list[Rows]
    if reads == "conversations":
        rows = [ChatRows(shards, length, data.on_long_conversation) for shards in corpus.train]
    else:
        rows = [PretrainRows(shards, length) for shards in corpus.train]
    return dict(zip(data.weights, rows, strict=True))


def stream_of(rows: Mapping[str, Rows], data: DataSettings, length: int, rows_per_step: int, seed: int) -> Stream:
    """Batches of these rows in the order of (seed, step)."""
    if len(rows) == 1 and data.when_exhausted == "repeat":
        return Stream(next(iter(rows.values())), rows_per_step, seed, data.separate_documents)
    phases = plan_phases(data.phases, data.weights, length)
    return MixtureStream(rows, phases, data.when_exhausted, rows_per_step, seed, data.separate_documents)


def _streamed(
    reads: Reads, data: DataSettings, source: Source, tokenizer: SLMTokenizer, length: int, seed: int
) -> StreamedRows:
    is_kept, repeat, name = is_kept_in(data, source), data.when_exhausted == "repeat", source.settings.label
    if reads == "conversations":
        at_once = max(LOOK_AHEAD, data.shuffle_buffer)
        # The shuffle is harmless: packing reorders them anyway.
        read = functools.partial(source.read, kind="conversations")
        talks = Blocks(read, name, at_once, lambda talk: is_kept(written(talk)), seed, repeat)
        encoder = ConversationEncoder(tokenizer, source, length, data.on_long_conversation)
        return ConversationRows(talks, encoder, length, seed)
    at_once, shuffle_seed = data.shuffle_buffer or TOGETHER, seed if data.shuffle_buffer else None
    texts = Blocks(source.read, name, at_once, lambda document: is_kept(document.text), shuffle_seed, repeat)
    return TextRows(texts, tokenizer, length)
