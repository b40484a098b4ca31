"""`prepare_text` on the machines of a Ray cluster: the shards are the same, byte for byte.

This process reads the text once, cleans it and finds where each shard begins. Workers read their own share from there,
encode it and write it, so sources and output must be at paths that all machines share. Shards finished by an earlier
call are reused.
"""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import sys
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from slmkit.config import UserError
from slmkit.data.cleaning.cleaner import Cleaner
from slmkit.data.cleaning.settings import CleaningSettings
from slmkit.data.prepare.open_sources import BEGINNING, Place, Reading
from slmkit.data.prepare.text_to_shards import Progress, TextShards, no_progress
from slmkit.data.shards.folder import ShardFolder, content_of
from slmkit.data.shards.reader import TokenShards
from slmkit.data.shards.work import BATCH_CHARACTERS, SHARD_CHARACTERS, cut, digest, encode, write_shard
from slmkit.data.sources import Document
from slmkit.data.sources.settings import SourceSettings
from slmkit.tokenizer import SLMTokenizer


@dataclass(frozen=True)
class Share:
    """A shard to make: where its text begins, which of the documents after that are in it, and a hash of the text."""

    number: int
    start: Place
    kept: str  # one character per document: 1 if it is kept
    content: str


def prepare_text_on_ray(
    sources: Sequence[SourceSettings],
    tokenizer_directory: str | Path,
    directory: str | Path,
    *,
    address: str = "auto",
    progress: Progress = no_progress,
    shuffle_seed: int | None = None,
    cleaning: CleaningSettings | None = None,
    shard_characters: int = SHARD_CHARACTERS,
) -> TokenShards:
    """`prepare_text` on the Ray cluster at `address`, or on one started here if that is `local`.

    A Ray that this process has already started is used. Raises `UserError` if Ray is missing or cannot be reached.
    """
    tokenizer_directory = str(Path(tokenizer_directory).absolute())
    sources = [_with_absolute_path(one) for one in sources]
    making = TextShards(directory, SLMTokenizer.from_pretrained(tokenizer_directory), shuffle_seed)
    ordered = making.ordered
    cleaner, reading = Cleaner(cleaning or CleaningSettings()), Reading(sources)
    with ThreadPoolExecutor() as pool:
        shares = list(_shares(reading, cleaner, pool, shard_characters))
        finished = {share.number: ordered.find(share.number, share.content) for share in shares}
        work = [share for share in shares if finished[share.number] is None]
        arguments = ([one.model_dump() for one in sources], tokenizer_directory, str(ordered.folder), shuffle_seed)
        with _connected(address) as ray:
            for number in _on_the_cluster(ray, work, arguments):
                finished[number] = ordered.find(number, shares[number].content)
                done = [one for one in finished.values() if one]
                tokens = sum(one.shard.tokens for one in done)
                progress(sum(one.shard.documents for one in done), tokens, sum(one.text_bytes for one in done))
        parts = [one for one in finished.values() if one]
        if len(parts) < len(shares):
            raise UserError(
                f"{ordered.folder}: the workers' shards are not there; use a folder that all machines share"
            )
        shards = making.shuffled(parts, cleaner.report, pool)
    return making.complete(parts, shards, cleaner.report, reading.descriptions)


def _shares(reading: Reading, cleaner: Cleaner, pool: ThreadPoolExecutor, shard_characters: int) -> Iterator[Share]:
    """The shards of `prepare_text`, as positions to read from."""
    places: deque[Place] = deque()  # after each document that was read and not decided yet
    decided: deque[tuple[Place, bool]] = deque()  # documents not in a share yet

    def read() -> Iterator[Document]:
        for document, place in reading.read():
            if document.ends:
                places.append(place)
            yield document

    def kept() -> Iterator[Document]:
        for pieces, reason in cleaner.decide(read(), pool, workers=2):
            decided.append((places.popleft(), reason is None))
            if reason is None:
                yield from pieces

    start, digests, documents = BEGINNING, list[str](), 0
    for work in cut(kept(), shard_characters, BATCH_CHARACTERS):
        digests.append(digest(work.documents))
        documents += sum(document.ends for document in work.documents)
        if work.last:
            flags, behind = "", start
            while documents:
                behind, is_kept = decided.popleft()
                flags += str(int(is_kept))
                documents -= is_kept
            yield Share(work.shard, start, flags, content_of(digests))
            start, digests = behind, []


def _on_the_cluster(ray: Any, shares: Sequence[Share], arguments: tuple[Any, ...]) -> Iterator[int]:
    """Make the shares on the cluster; yields their numbers as they are finished."""
    if not shares:
        return
    # As JSON: Arrow would give every position the fields of all.
    items = [{"share": json.dumps(asdict(share))} for share in shares]
    rows = ray.data.from_items(items, override_num_blocks=len(items)).map(_make, fn_args=arguments)
    for row in rows.iter_rows():
        yield int(row["number"])


def _make(
    row: dict[str, Any], sources: list[dict[str, Any]], tokenizer_directory: str, folder: str, shuffle_seed: int | None
) -> dict[str, int]:
    """The worker's task: read the documents of a share, encode them, and write the shard."""
    share = json.loads(row["share"])
    tokenizer = _tokenizer(tokenizer_directory)
    reading = Reading([SourceSettings(**one) for one in sources])
    documents = _kept(reading.read(Place(*share["start"])), share["kept"])
    parts = [encode(tokenizer, work.documents) for work in cut(documents, sys.maxsize, BATCH_CHARACTERS)]
    write_shard(ShardFolder(Path(folder), tokenizer), share["number"], parts, shuffle_seed)
    return {"number": share["number"]}


def _kept(documents: Iterator[tuple[Document, Place]], flags: str) -> Iterator[Document]:
    number = 0
    for document, _ in documents:
        if flags[number] == "1":
            yield document
        number += document.ends
        if number == len(flags):
            return


@functools.lru_cache(maxsize=1)
def _tokenizer(directory: str) -> SLMTokenizer:
    return SLMTokenizer.from_pretrained(directory)


def _with_absolute_path(settings: SourceSettings) -> SourceSettings:
    """An absolute path, since workers have other working directories."""
    path = Path(settings.path)
    return settings.model_copy(update={"path": str(path.absolute())}) if path.exists() else settings


@contextlib.contextmanager
def _connected(address: str) -> Iterator[Any]:
    """Context with the connected `ray` module; shuts down what it started. Raises `UserError` if it cannot connect."""
    try:
        import ray
        import ray.data
    except ImportError:
        raise UserError("preparing on a cluster needs Ray: pip install slmkit[cluster]") from None
    is_ours = not ray.is_initialized()
    if is_ours:
        try:
            ray.init(
                address=None if address == "local" else address, logging_level=logging.ERROR, log_to_driver=False,
                include_dashboard=False if address == "local" else None,
            )  # fmt: skip
        except (ConnectionError, ValueError, RuntimeError) as error:
            raise UserError(f"no Ray cluster at {address!r}: {' '.join(str(error).split())[:200]}") from None
    ray.data.DataContext.get_current().enable_progress_bars = False
    try:
        yield ray
    finally:
        if is_ours:
            ray.shutdown()
