"""Writes text and conversations as token shards, and splits off validation data.

Tokenizing is parallel in threads: tiktoken's core, which takes nearly all the time, releases the GIL, so that threads
are as fast as processes, and a user's script needs no `if __name__ == "__main__"`.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from slmkit.config import UserError
from slmkit.data.cleaning.cleaner import Cleaner, CleaningReport
from slmkit.data.cleaning.settings import CleaningSettings
from slmkit.data.prepare.conversations import ConversationEncoder, EncodedConversation
from slmkit.data.prepare.ordered_map import batches, ordered_map
from slmkit.data.shards.folder import Finished, ShardFolder, complete, partial_folder
from slmkit.data.shards.reader import Header, TokenShards
from slmkit.data.shards.shuffle import GlobalShuffle
from slmkit.data.shards.work import (
    BATCH_CHARACTERS,
    SHARD_CHARACTERS,
    Encoded,
    ShardWork,
    cut,
    encode,
    without_finished,
    write_shard,
)
from slmkit.data.shards.writer import ShardWriter
from slmkit.data.sources import Document, Message, cut_point

if TYPE_CHECKING:
    from slmkit.tokenizer import SLMTokenizer
    from slmkit.tokenizer.encoder import ChatRow

BATCH_CONVERSATIONS = 1024
HELD_OUT = 10  # documents; a corpus with too few for that is cut in two instead

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
) -> TokenShards:
    """Tokenize documents into a directory of shards, an end-of-text token after each. A `str` is a whole document.

    `shuffle_seed` shuffles all documents. The number of `workers` (threads; default: one per core) does not change the
    result. Shards that a killed call finished are reused if the same documents come again. `sources` (see
    `Source.describe`) and `perfect_loss` (nats per token) are for the header. Raises `UserError` if there is no text
    or the disk is full; existing contents of `directory` then stay unchanged.
    """
    directory = Path(directory).absolute()
    workers = workers or os.cpu_count() or 1
    partial = ShardFolder(partial_folder(directory), tokenizer)
    ordered = partial if shuffle_seed is None else ShardFolder(partial.folder / "ordered", tokenizer)
    with _keeping_what_is_finished(partial, ordered), _stopping_at_once(ThreadPoolExecutor(workers)) as pool:
        cleaner = Cleaner(cleaning or CleaningSettings())
        kept = cleaner.clean(_all_ended(documents), pool, workers)
        work = without_finished(cut(kept, shard_characters, BATCH_CHARACTERS), ordered)
        parts = list(_make_shards(work, ordered, tokenizer, shuffle_seed, pool, workers, progress))
        if not parts:
            raise UserError(f"{directory}: there is no text to prepare" + cleaner.report.why_nothing())
        shards = parts
        if shuffle_seed is not None:
            shards = list(pool.map(GlobalShuffle(ordered, parts, partial, shuffle_seed).shard, range(len(parts))))
    header = header_of(partial, tokenizer, parts, shards, sources, perfect_loss, shuffle_seed, cleaner.report)
    complete(partial.folder, directory, header)
    return TokenShards.open(directory)


def header_of(
    folder: ShardFolder,
    tokenizer: SLMTokenizer,
    parts: Sequence[Finished],
    shards: Sequence[Finished],
    sources: Sequence[dict[str, Any]],
    perfect_loss: float | None,
    shuffle_seed: int | None,
    cleaning: CleaningReport,
) -> Header:
    """The header for all `shards` in `folder`, which hold the documents of `parts`."""
    return Header(
        dtype=folder.dtype.name,
        tokenizer=folder.fingerprint,
        vocab_size=len(tokenizer),
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        tokens=sum(part.shard.tokens for part in shards),
        documents=sum(part.shard.documents for part in shards),
        text_bytes=sum(part.text_bytes for part in parts),
        sources=list(sources),
        masked=False,
        perfect_loss=perfect_loss,
        shards=[part.shard for part in shards],
        shuffle_seed=shuffle_seed,
        cleaning=cleaning.to_dict(),
    )


def prepare_chat(
    conversations: Iterable[list[Message]],
    tokenizer: SLMTokenizer,
    directory: str | Path,
    *,
    sources: Sequence[dict[str, Any]] = (),
    progress: Progress = no_progress,
) -> TokenShards:
    """Tokenize conversations with their loss masks, an end-of-text token that is not learned after each.

    Arguments and `UserError`s as for `prepare_text`.
    """
    encoded = ConversationEncoder(tokenizer).encode_all(conversations)
    return write_conversations(encoded, tokenizer, directory, sources=sources, progress=progress)


def write_conversations(
    encoded: Iterable[EncodedConversation],
    tokenizer: SLMTokenizer,
    directory: str | Path,
    *,
    sources: Sequence[dict[str, Any]] = (),
    progress: Progress = no_progress,
) -> TokenShards:
    """`prepare_chat` for encoded conversations; each row of one is a document of the shards. Raises as it does."""
    with ShardWriter(directory, tokenizer, masked=True, sources=sources) as writer:
        for batch in batches(encoded, lambda conversation: 1, BATCH_CONVERSATIONS):
            ids, ends, trained = end_to_end([row for one in batch for row in one.rows], tokenizer.eos_token_id)
            writer.add(ids, ends, trained, text_bytes=sum(one.text_bytes for one in batch))
            progress(writer.documents, writer.tokens, writer.text_bytes)
    return TokenShards.open(directory)


def end_to_end(rows: Sequence[ChatRow], eos_id: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Ids [n], one past the end of each row [rows], and loss mask, bool [n], False for the end-of-text tokens."""
    stops = np.cumsum([len(row.ids) for row in rows], dtype=np.int64)
    return (
        np.insert(np.concatenate([row.ids for row in rows]), stops, eos_id),
        stops + np.arange(1, len(rows) + 1),
        np.insert(np.concatenate([row.trained for row in rows]), stops, False),
    )


def split_validation(
    read: Callable[[], Iterable[Document]], fraction: float
) -> tuple[Iterator[Document], Iterator[Document]]:
    """Documents to train on, and about `fraction` of them held out. `read` starts reading the corpus again at each
    call.

    Many documents are split by a hash of their text, so that copies of a document are on one side. Few documents (one
    long text, say) are cut in two at a line end, and the last part is held out. Raises `UserError` for a fraction
    outside (0, 1), for a text too short to cut, and if all documents are copies on one side.
    """
    _check_fraction(fraction)
    documents = characters = 0
    many, sides = math.ceil(HELD_OUT / fraction), set[bool]()
    for document, is_held_out in _picked_by_hash(read(), fraction):
        documents += document.ends
        characters += len(document.text)
        sides.add(is_held_out)
        if documents >= many and len(sides) == 2:
            return (
                (document for document, is_held_out in _picked_by_hash(read(), fraction) if not is_held_out),
                (document for document, is_held_out in _picked_by_hash(read(), fraction) if is_held_out),
            )
    if documents >= many:
        raise UserError(_copies(f"{documents:,} documents"))
    place = characters - math.ceil(characters * fraction)
    if place <= 0:
        raise UserError(
            f"too little text to hold any out: {characters} characters; add text or drop the validation split"
        )
    return (
        (document for document, is_held_out in _cut_in_two(read(), place) if not is_held_out),
        (document for document, is_held_out in _cut_in_two(read(), place) if is_held_out),
    )


def split_conversations(
    conversations: Sequence[list[Message]], fraction: float
) -> tuple[list[list[Message]], list[list[Message]]]:
    """Conversations to train on, and about `fraction` of them (at least one) held out by a hash; copies stay together.

    Raises `UserError` for a fraction outside (0, 1), and if one side would be empty.
    """
    _check_fraction(fraction)
    hashes = [_hash(json.dumps(conversation, sort_keys=True)) for conversation in conversations]
    limit = max(fraction, min(hashes, default=0.0))
    train = [one for one, hashed in zip(conversations, hashes) if hashed > limit]
    held_out = [one for one, hashed in zip(conversations, hashes) if hashed <= limit]
    if not train:
        what, are_copies = f"{len(conversations):,} conversations", len({*hashes}) < len(hashes)
        raise UserError(_copies(what) if are_copies else f"{what} are too few to hold any out; add some")
    return train, held_out


def _copies(what: str) -> str:
    return (
        f"the {what} are copies of one text, or of very few, so that none can be held out for validation: add other "
        "text, or name text of its own as data.validation"
    )


def _make_shards(
    work: Iterable[ShardWork],
    folder: ShardFolder,
    tokenizer: SLMTokenizer,
    shuffle_seed: int | None,
    pool: ThreadPoolExecutor,
    workers: int,
    progress: Progress,
) -> Iterator[Finished]:
    """Encode and write all shards, in order. A few batches and shards are in memory at any time."""

    def encoded(one: ShardWork) -> Encoded | None:
        return encode(tokenizer, one.documents) if one.documents else None

    parts: list[Encoded] = []
    writing: deque[Future[Finished]] = deque()
    done = np.zeros(3, dtype=np.int64)
    for one, part in ordered_map(pool, encoded, work, ahead=2 * workers):
        if part:
            parts.append(part)
            done += (len(part.ends), len(part.ids), part.text_bytes)
        if one.last:
            writing.append(
                finished_already(one.finished) if one.finished
                else pool.submit(write_shard, folder, one.shard, parts, shuffle_seed)
            )  # fmt: skip
            parts = []
        if one.finished:
            done += (one.finished.shard.documents, one.finished.shard.tokens, one.finished.text_bytes)
        progress(*done.tolist())
        while len(writing) > 2:
            yield writing.popleft().result()
    for future in writing:
        yield future.result()


def finished_already(finished: Finished) -> Future[Finished]:
    """A completed future for a shard of an earlier call."""
    future: Future[Finished] = Future()
    future.set_result(finished)
    return future


@contextlib.contextmanager
def _stopping_at_once(pool: ThreadPoolExecutor) -> Iterator[ThreadPoolExecutor]:
    """Context of a pool that cancels pending work on errors and Ctrl-C."""
    try:
        yield pool
    except BaseException:
        pool.shutdown(cancel_futures=True)
        raise
    pool.shutdown()


@contextlib.contextmanager
def _keeping_what_is_finished(partial: ShardFolder, ordered: ShardFolder) -> Iterator[None]:
    """Context that after an error keeps finished shards for the next call and deletes all else."""
    try:
        yield
    except BaseException as error:
        left = ordered.drop_unfinished()
        left = partial.drop_unfinished() if partial is not ordered else left
        if left and isinstance(error, UserError):
            raise UserError(f"{error} (finished shards are in {partial.folder}: the same call continues)") from None
        raise


def _all_ended(documents: Iterable[Document | str]) -> Iterator[Document]:
    """The documents; the last one always ends, even if its text was cut for validation."""
    ends = True
    for item in documents:
        document = Document(item) if isinstance(item, str) else item
        ends = document.ends
        yield document
    if not ends:
        yield Document("")


def _check_fraction(fraction: float) -> None:
    if not 0 < fraction < 1:
        raise UserError(f"expected a validation fraction between 0 and 1, found {fraction}")


def _hash(text: str) -> float:
    """A pseudorandom number in [0, 1) determined by the text."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=6).digest(), "little") / 2**48


def _picked_by_hash(documents: Iterable[Document], fraction: float) -> Iterator[tuple[Document, bool]]:
    begins, is_held_out = True, False
    for document in documents:
        if begins:  # the first piece decides for the whole document
            is_held_out = _hash(document.text) < fraction
        begins = document.ends
        yield document, is_held_out


def _cut_in_two(documents: Iterable[Document], place: int) -> Iterator[tuple[Document, bool]]:
    """Documents before and after the `place`-th character, cut at the last line end before it if its piece has one."""
    for document in documents:
        length = len(document.text)
        if place <= 0 or place >= length:
            yield document, place <= 0
        else:
            cut = cut_point(document.text, place)
            yield Document(document.text[:cut], ends=False), False
            yield Document(document.text[cut:], document.ends), True
        place -= length
