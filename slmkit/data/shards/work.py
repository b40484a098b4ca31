"""The work of preparing a corpus: split into shards by the documents alone, then encoded and written.

So the shards are the same in any order of work, in threads of one process or on the machines of a cluster.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from slmkit.data.order import random_keys
from slmkit.data.shards.folder import Finished, ShardFolder, content_of
from slmkit.data.sources import Document

if TYPE_CHECKING:
    from slmkit.tokenizer import SLMTokenizer

SHARD_CHARACTERS = 1 << 26  # of text in a shard, unless a document is longer: about 30 MB of 16-bit tokens
BATCH_CHARACTERS = 1 << 20  # encoded by a thread at once


@dataclass(frozen=True)
class ShardWork:
    """Some of the documents of a shard; a shard that is finished already has none."""

    shard: int
    documents: list[Document]
    finished: Finished | None = None


@dataclass(frozen=True)
class Encoded:
    """Tokens [n], one past the last token of each document that ends here [documents], and a digest of the text."""

    ids: np.ndarray
    ends: np.ndarray
    text_bytes: int
    digest: str


def cut(documents: Iterable[Document], shard_characters: int, batch_characters: int) -> Iterator[ShardWork]:
    """Split documents into shards of at least `shard_characters` (the last may have fewer), and these into batches.

    A shard has whole documents.
    """
    shard, in_shard, batch, in_batch = 0, 0, list[Document](), 0
    for document in documents:
        batch.append(document)
        in_batch += len(document.text) + 1
        in_shard += len(document.text) + 1
        shard_is_full = document.ends and in_shard >= shard_characters
        if shard_is_full or in_batch >= batch_characters:
            yield ShardWork(shard, batch)
            batch, in_batch = [], 0
        if shard_is_full:
            shard, in_shard = shard + 1, 0
    if batch:
        yield ShardWork(shard, batch)


def without_finished(works: Iterable[ShardWork], folder: ShardFolder) -> Iterator[ShardWork]:
    """The works, with shards that `folder` already has, made of the same text, replaced by the finished ones."""
    for number, group in itertools.groupby(works, lambda work: work.shard):
        if not folder.has(number):
            yield from group
            continue
        batches = list(group)
        finished = folder.find(number, content_of([digest(work.documents) for work in batches]))
        yield from [ShardWork(number, [], finished)] if finished else batches


def digest(documents: Sequence[Document]) -> str:
    """Hash of the texts and of where documents end."""
    hashed = hashlib.sha256(np.array([2 * len(each.text) + each.ends for each in documents], dtype="<i8").tobytes())
    hashed.update(_bytes_of(documents))
    return hashed.hexdigest()


def _bytes_of(documents: Sequence[Document]) -> bytes:
    return "".join(document.text for document in documents).encode("utf-8", "surrogatepass")


def encode(tokenizer: SLMTokenizer, documents: Sequence[Document]) -> Encoded:
    """Tokens of documents, with an end-of-text token after each, encoded in the calling thread."""
    encoded = document_ids(tokenizer, documents, threads=1)
    stops = np.cumsum(np.fromiter(map(len, encoded), dtype=np.int64, count=len(encoded)))
    stops = stops[np.fromiter((document.ends for document in documents), dtype=bool, count=len(documents))]
    ids = np.insert(np.concatenate(encoded), stops, tokenizer.eos_token_id)
    return Encoded(ids, stops + np.arange(1, len(stops) + 1), len(_bytes_of(documents)), digest(documents))


def document_ids(tokenizer: Any, documents: Sequence[Document], threads: int | None = None) -> list[np.ndarray]:
    """Tokens, uint32 [tokens], of each document or piece, without end-of-text tokens.

    Raises `UserError` if the tokenizer loses more than 0.1 % of the text.
    """
    encoded = list(tokenizer.encode_batch([document.text for document in documents], threads=threads))
    if getattr(tokenizer, "depends_on_context", False):
        tokenizer.check_losses()
        for number, document in enumerate(documents):
            if not document.begins:
                encoded[number] = np.array(tokenizer.encode_continuation(document.text), dtype=np.uint32)
    if beginning := beginning_of(tokenizer):
        start = np.array(beginning, dtype=np.uint32)
        encoded = [np.concatenate([start, ids]) if doc.begins else ids for ids, doc in zip(encoded, documents)]
    return encoded


def beginning_of(tokenizer: Any) -> list[int]:
    """The tokenizer's own beginning of a text [tokens]; empty if it is the end-of-text token, already there."""
    beginning = getattr(tokenizer, "beginning", [])
    return [] if beginning == [getattr(tokenizer, "eos_token_id", None)] else beginning


def write_shard(folder: ShardFolder, number: int, parts: Sequence[Encoded], shuffle_seed: int | None) -> Finished:
    """Write the batches of a shard; with a seed, its documents sorted by key (see `shuffle`)."""
    ids, ends = joined([(part.ids, part.ends) for part in parts])
    if shuffle_seed is not None:
        ids, ends = reordered(ids, ends, np.argsort(random_keys(len(ends), shuffle_seed, number)))
    content = content_of([part.digest for part in parts])
    return folder.write(number, content, ids, ends, sum(part.text_bytes for part in parts))


def shuffle(
    ordered: ShardFolder, parts: Sequence[Finished], target: ShardFolder, seed: int
) -> Callable[[int], Finished]:
    """A function that writes the shard of a number to `target`, unless it is there already; it is thread-safe.

    It shuffles all documents of a corpus in the memory of a few shards. Every document has a random key, determined by
    the seed and its position. Each shard in `ordered` has its documents sorted by key, so that documents with keys of
    one interval are contiguous in every shard. There are as many intervals as shards; the documents of one interval,
    shuffled, are a shard of the result. All orders are equally likely.
    """
    count = len(parts)
    every_part = content_of([digest for part in parts for digest in part.shard.sha256.values()])
    limits = np.array([(number << 64) // count for number in range(count)], dtype=np.uint64)
    bounds = []  # for each part: index of its first document in each interval, int64 [intervals + 1]
    for number, part in enumerate(parts):
        keys = np.sort(random_keys(part.shard.documents, seed, number))
        bounds.append(np.append(np.searchsorted(keys, limits), len(keys)))

    def shard(number: int) -> Finished:
        content = f"shuffled {seed} {every_part} {number}"
        if finished := target.find(number, content):
            return finished
        ids, ends = joined(
            [ordered.read(part, int(own[number]), int(own[number + 1])) for part, own in zip(parts, bounds)]
        )
        order = np.argsort(random_keys(len(ends), seed, number, count))
        return target.write(number, content, *reordered(ids, ends, order), text_bytes=0)

    return shard


def joined(parts: Sequence[tuple[np.ndarray, np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
    """Concatenate parts of tokens [n] and document ends [documents]."""
    starts = np.cumsum([0] + [len(ids) for ids, _ in parts[:-1]])
    return (
        np.concatenate([ids for ids, _ in parts]),
        np.concatenate([ends + start for start, (_, ends) in zip(starts, parts)]),
    )


def reordered(ids: np.ndarray, ends: np.ndarray, order: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Tokens [n] and document ends [documents] with the documents in the given order [documents]."""
    starts = np.concatenate([[0], ends[:-1]])
    if not len(order):
        return ids, ends
    documents = [ids[start:end] for start, end in zip(starts[order].tolist(), ends[order].tolist())]
    return np.concatenate(documents), np.cumsum((ends - starts)[order])
