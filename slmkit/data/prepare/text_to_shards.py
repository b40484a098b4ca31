"""Writes text as token shards.

Tokenizing is parallel in threads: tiktoken's core, which takes nearly all the time, releases the GIL, so that threads
are as fast as processes, and a user's script needs no `if __name__ == "__main__"`.
"""

from __future__ import annotations

import contextlib
import itertools
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from slmkit.config import UserError
from slmkit.data.cleaning.cleaner import Cleaner
from slmkit.data.ordered_map import ordered_map
from slmkit.data.settings import CleaningSettings
from slmkit.data.shards.folder import (
    BATCH_CHARACTERS,
    SHARD_CHARACTERS,
    Encoded,
    Finished,
    ShardFolder,
    ShardWork,
    cut,
    encode,
    shuffle,
    without_finished,
    write_shard,
)
from slmkit.data.shards.reader import Header, TokenShards
from slmkit.data.shards.writer import complete, disk_errors_named, partial_folder
from slmkit.data.sources import Document
from slmkit.tokenizer import SLMTokenizer

Progress = Callable[[int, int, int], None]  # documents, tokens and UTF-8 bytes done


def no_progress(documents: int, tokens: int, text_bytes: int) -> None:
    """A `Progress` that does nothing."""


def prepare_text(
    documents: Iterable[Document | str],
    tokenizer: SLMTokenizer,
    directory: str | Path,
    *,
    sources: Sequence[dict[str, Any]] = (),
    perfect_loss: float | None = None,
    progress: Progress = no_progress,
    shuffle_seed: int | None = None,
    cleaning: CleaningSettings | None = None,
    shard_characters: int = SHARD_CHARACTERS,
    workers: int | None = None,
    make_shards: MakeShards | None = None,
) -> TokenShards:
    """Tokenize documents into a directory of shards, an end-of-text token after each. A `str` is a whole document.

    `shuffle_seed` shuffles all documents. The number of `workers` (threads; default: one per core) does not change the
    result; nor does `make_shards`, which makes them elsewhere. Shards that a killed call finished are reused if the
    same documents come again. `sources` (see `Source.describe`) and `perfect_loss` (nats per token) are for the header.
    Raises `UserError` if there is no text or the disk is full; existing contents of `directory` then stay unchanged.
    """
    workers = workers or os.cpu_count() or 1
    making = TextShards(directory, tokenizer, shuffle_seed)
    with _threads(workers, making) as pool:
        cleaner = Cleaner(cleaning or CleaningSettings())
        kept = cleaner.clean(_all_ended(documents), pool, workers)
        work = without_finished(cut(kept, shard_characters, BATCH_CHARACTERS), making.ordered)
        parts = list((make_shards or _make_shards)(work, making, pool, workers, progress))
        return making.complete(parts, cleaner, sources, pool, perfect_loss)


class TextShards:
    """The folders in which the shards of a text are made."""

    def __init__(self, directory: str | Path, tokenizer: SLMTokenizer, shuffle_seed: int | None) -> None:
        self.directory, self.tokenizer, self.shuffle_seed = Path(directory).absolute(), tokenizer, shuffle_seed
        self.partial = ShardFolder(partial_folder(self.directory), tokenizer)
        is_shuffled = shuffle_seed is not None
        self.ordered = ShardFolder(self.partial.folder / "ordered", tokenizer) if is_shuffled else self.partial

    def complete(
        self,
        parts: Sequence[Finished],
        cleaner: Cleaner,
        sources: Sequence[dict[str, Any]],
        pool: ThreadPoolExecutor,
        perfect_loss: float | None = None,
    ) -> TokenShards:
        """Shuffle the finished `parts` if asked for, and move all into place.

        Raises `UserError` if there is no text or the disk is full.
        """
        if not parts:
            raise UserError(f"{self.directory}: there is no text to prepare" + cleaner.why_nothing())
        shards = parts
        if self.shuffle_seed is not None:
            shard = shuffle(self.ordered, parts, self.partial, self.shuffle_seed)
            shards = list(pool.map(shard, range(len(parts))))
        header = Header.of(
            self.tokenizer,
            [one.shard for one in shards],
            text_bytes=sum(part.text_bytes for part in parts),
            sources=list(sources),
            perfect_loss=perfect_loss,
            shuffle_seed=self.shuffle_seed,
            cleaning=cleaner.report(),
        )
        with disk_errors_named(self.directory):
            complete(self.partial.folder, self.directory, header)
        return TokenShards.open(self.directory)


# The work, its folders, threads, their number and the callback for progress → the shards, in order.
MakeShards = Callable[[Iterable[ShardWork], TextShards, ThreadPoolExecutor, int, Progress], Iterator[Finished]]


def _make_shards(
    work: Iterable[ShardWork], making: TextShards, pool: ThreadPoolExecutor, workers: int, progress: Progress
) -> Iterator[Finished]:
    """Encode and write all shards, in order. A few batches and shards are in memory at any time."""

    def encoded(one: ShardWork) -> Encoded | None:
        return encode(making.tokenizer, one.documents) if one.documents else None

    def whole_shards() -> Iterator[tuple[ShardWork, list[Encoded]]]:
        done = np.zeros(3, dtype=np.int64)
        encoding = ordered_map(pool, encoded, work, ahead=2 * workers)
        for _, shard in itertools.groupby(encoding, lambda pair: pair[0].shard):
            parts: list[Encoded] = []
            for one, part in shard:
                if part:
                    parts.append(part)
                    done += (len(part.ends), len(part.ids), part.text_bytes)
                if one.finished:
                    done += (one.finished.shard.documents, one.finished.shard.tokens, one.finished.text_bytes)
                progress(*done.tolist())
            yield one, parts

    def write(shard: tuple[ShardWork, list[Encoded]]) -> Finished:
        one, parts = shard
        return one.finished or write_shard(making.ordered, one.shard, parts, making.shuffle_seed)

    return (finished for _, finished in ordered_map(pool, write, whole_shards(), ahead=2))


@contextlib.contextmanager
def _threads(workers: int, making: TextShards) -> Iterator[ThreadPoolExecutor]:
    """Context of a thread pool; after an error its work is cancelled, and the next call finds finished shards."""
    pool = ThreadPoolExecutor(workers)
    try:
        yield pool
    except BaseException as error:
        pool.shutdown(cancel_futures=True)
        left = making.ordered.drop_unfinished()
        if making.partial is not making.ordered:
            left = making.partial.drop_unfinished()
        if left and isinstance(error, UserError):
            raise UserError(
                f"{error} (finished shards are in {making.partial.folder}: the same call continues)"
            ) from None
        raise
    pool.shutdown()


def _all_ended(documents: Iterable[Document | str]) -> Iterator[Document]:
    """The documents; the last one always ends, even if its text was cut for validation."""
    ends = True
    for item in documents:
        document = Document(item) if isinstance(item, str) else item
        ends = document.ends
        yield document
    if not ends:
        yield Document("")
