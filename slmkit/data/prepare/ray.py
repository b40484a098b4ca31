"""`prepare_text` on the machines of a Ray cluster: the shards are the same, byte for byte.

This process reads the text, cleans it and cuts it into shards; workers encode the shards and write them, so the output
must be at a path that all machines share. Shards finished by an earlier call are reused.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import logging
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from slmkit.config import UserError, importing
from slmkit.data.ordered_map import ordered_map
from slmkit.data.prepare.text_to_shards import Progress, TextShards, prepare_text
from slmkit.data.shards.folder import Finished, ShardFolder, ShardWork, encode, write_shard
from slmkit.data.shards.reader import TokenShards
from slmkit.data.sources import Document, open_together
from slmkit.data.sources.settings import SourceSettings
from slmkit.tokenizer import SLMTokenizer


def prepare_text_on_ray(
    sources: Sequence[SourceSettings],
    tokenizer_directory: str | Path,
    directory: str | Path,
    *,
    address: str = "auto",
    **options: Any,
) -> TokenShards:
    """`prepare_text`, with its options, on the Ray cluster at `address`, or on one started here if that is `local`.

    A Ray that this process has already started is used. Raises `UserError` if Ray is missing or cannot be reached.
    """
    tokenizer_directory = str(Path(tokenizer_directory).absolute())
    tokenizer, source = SLMTokenizer.from_pretrained(tokenizer_directory), open_together(sources)
    with _connected(address) as ray:
        make, ahead = ray.remote(_make), 2 * int(ray.cluster_resources().get("CPU", 1))

        def make_shards(
            work: Iterable[ShardWork], making: TextShards, pool: ThreadPoolExecutor, workers: int, progress: Progress
        ) -> Iterator[Finished]:
            folder = making.ordered.folder

            def made(shard: list[ShardWork]) -> Finished:
                batches = [one.documents for one in shard]
                found: Finished = shard[0].finished or ray.get(
                    make.remote(tokenizer_directory, folder, shard[0].shard, batches, making.shuffle_seed)
                )
                if not (folder / f"{found.shard.name}.tokens").is_file():
                    raise UserError(
                        f"{folder}: the workers' shards are not there; use a folder that all machines share"
                    )
                return found

            whole = ([*group] for _, group in itertools.groupby(work, lambda one: one.shard))
            done = np.zeros(3, dtype=np.int64)
            for _, part in ordered_map(pool, made, whole, ahead):
                done += (part.shard.documents, part.shard.tokens, part.text_bytes)
                progress(*done.tolist())
                yield part

        return prepare_text(
            (document for document, _ in source.read()), tokenizer, directory,
            sources=source.describe(), workers=ahead + 2, make_shards=make_shards, **options,
        )  # fmt: skip


def _make(
    tokenizer_directory: str, folder: Path, number: int, batches: list[list[Document]], shuffle_seed: int | None
) -> Finished:
    """The worker's task: encode the documents of a shard and write it."""
    tokenizer = _tokenizer(tokenizer_directory)
    parts = [encode(tokenizer, documents) for documents in batches]
    return write_shard(ShardFolder(folder, tokenizer), number, parts, shuffle_seed)


@functools.lru_cache(maxsize=1)
def _tokenizer(directory: str) -> SLMTokenizer:
    return SLMTokenizer.from_pretrained(directory)


@contextlib.contextmanager
def _connected(address: str) -> Iterator[Any]:
    """Context with the connected `ray` module; shuts down what it started. Raises `UserError` if it cannot connect."""
    with importing("preparing on a cluster needs Ray: pip install slmkit[cluster]"):
        import ray
    is_ours = not ray.is_initialized()
    if is_ours:
        try:
            ray.init(
                address=None if address == "local" else address, logging_level=logging.ERROR, log_to_driver=False,
                include_dashboard=False if address == "local" else None,
            )  # fmt: skip
        except (ConnectionError, ValueError, RuntimeError) as error:
            raise UserError(f"no Ray cluster at {address!r}: {' '.join(str(error).split())[:200]}") from None
    try:
        yield ray
    finally:
        if is_ours:
            ray.shutdown()
