"""Text to token shards, once; and which part of it is held out for validation.

Tokenizing is parallel inside `encode_batch`: the tokenizer's own threads take one document each, whatever their number
the result is the same, and a user's script needs no `if __name__ == "__main__"` as a pool of processes would.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from slmkit.config import UserError
from slmkit.data.shard_writer import ShardWriter
from slmkit.data.shards import TokenShards
from slmkit.data.sources import Document, Message, cut_point

if TYPE_CHECKING:
    from slmkit.tokenizer import SLMTokenizer

BATCH_CHARACTERS = 1 << 22  # tokenized at once: enough for every core, some 150 MB while it lasts
BATCH_CONVERSATIONS = 1024
HELD_OUT = 10  # documents; a corpus too small to hold out so many is cut in two instead

Progress = Callable[[int, int], None]  # documents done, tokens done
T = TypeVar("T")


def prepare_text(
    documents: Iterable[Document | str],
    tokenizer: SLMTokenizer,
    directory: str | Path,
    *,
    sources: Sequence[dict[str, Any]] = (),
    perfect_loss: float | None = None,
    progress: Progress = lambda documents, tokens: None,
) -> TokenShards:
    """Tokenize documents into a directory of shards, an end-of-text token after each. A `str` is a whole document.

    `sources` (see `describe_sources`) and `perfect_loss` (nats a token) are for the header. Raises `UserError` when
    there is no text or the disk is full; what was in `directory` before is then untouched.
    """
    with ShardWriter(directory, tokenizer, sources=sources, perfect_loss=perfect_loss) as writer:
        for batch in _batches(_all_ended(documents), lambda document: 64 + len(document.text), BATCH_CHARACTERS):
            texts = [document.text for document in batch]
            end = np.array([tokenizer.eos_token_id])
            encoded = tokenizer.encode_batch(texts)
            pieces = [np.append(ids, end) if document.ends else ids for ids, document in zip(encoded, batch)]
            ids, stops = np.concatenate(pieces).astype(np.int64), np.cumsum([len(piece) for piece in pieces])
            ends = stops[np.array([document.ends for document in batch])]
            writer.add(ids, ends, text_bytes=sum(len(text.encode()) for text in texts))
            progress(writer.documents, writer.tokens)
    return TokenShards.open(directory)


def prepare_chat(
    conversations: Iterable[list[Message]],
    tokenizer: SLMTokenizer,
    directory: str | Path,
    *,
    sources: Sequence[dict[str, Any]] = (),
    progress: Progress = lambda documents, tokens: None,
) -> TokenShards:
    """Render and tokenize conversations with their loss masks, an end-of-text token that is not learned after each.

    Arguments and errors as for `prepare_text`.
    """
    with ShardWriter(directory, tokenizer, masked=True, sources=sources) as writer:
        for batch in _batches(conversations, lambda conversation: 1, BATCH_CONVERSATIONS):
            encoded = [tokenizer.encode_chat(conversation) for conversation in batch]
            ids, ends = _joined([[*chat.ids, tokenizer.eos_token_id] for chat in encoded])
            trained, _ = _joined([[*chat.trained, False] for chat in encoded])
            writer.add(ids, ends, trained, text_bytes=sum(map(_text_bytes, batch)))
            progress(writer.documents, writer.tokens)
    return TokenShards.open(directory)


def split_validation(
    read: Callable[[], Iterable[Document]], fraction: float
) -> tuple[Iterator[Document], Iterator[Document]]:
    """Documents to train on, and about `fraction` of them held out. `read` begins the corpus anew at each call.

    Of many documents those are held out that a hash of their text picks, wherever they stand: copies of one document
    are on one side. Few documents (one long text, say) are cut in two at a line end, and the last part is held out.
    Raises `UserError` for a fraction outside (0, 1) and for a text too short to cut.
    """
    _check_fraction(fraction)
    documents = characters = 0
    many = math.ceil(HELD_OUT / fraction)
    for document in read():
        documents += document.ends
        characters += len(document.text)
        if documents >= many:
            return (
                (document for document, is_held_out in _picked_by_hash(read(), fraction) if not is_held_out),
                (document for document, is_held_out in _picked_by_hash(read(), fraction) if is_held_out),
            )
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

    Raises `UserError` for a fraction outside (0, 1) and where one side would be left without any.
    """
    _check_fraction(fraction)
    hashes = [_hash(json.dumps(conversation, sort_keys=True)) for conversation in conversations]
    limit = max(fraction, min(hashes, default=0.0))
    train = [one for one, hashed in zip(conversations, hashes) if hashed > limit]
    held_out = [one for one, hashed in zip(conversations, hashes) if hashed <= limit]
    if not train:
        raise UserError(f"{len(conversations)} conversations are too few to hold any out; add some")
    return train, held_out


def _all_ended(documents: Iterable[Document | str]) -> Iterator[Document]:
    """The documents, the last one ended even where its text was cut in two for validation."""
    ends = True
    for item in documents:
        document = Document(item) if isinstance(item, str) else item
        ends = document.ends
        yield document
    if not ends:
        yield Document("")


def _batches(items: Iterable[T], size: Callable[[T], int], full: int) -> Iterator[list[T]]:
    """Items in lists of about `full` size together."""
    batch: list[T] = []
    total = 0
    for item in items:
        batch.append(item)
        total += size(item)
        if total >= full:
            yield batch
            batch, total = [], 0
    if batch:
        yield batch


def _joined(parts: list[list[int]]) -> tuple[np.ndarray, np.ndarray]:
    """All numbers in one row, int64 [n], and one past each part's last, int64 [parts]."""
    stops = np.cumsum([len(part) for part in parts], dtype=np.int64)
    flat = np.fromiter(itertools.chain.from_iterable(parts), dtype=np.int64, count=int(stops[-1]))
    return flat, stops


def _text_bytes(conversation: list[Message]) -> int:
    return sum(len(message["content"].encode()) for message in conversation if isinstance(message.get("content"), str))


def _check_fraction(fraction: float) -> None:
    if not 0 < fraction < 1:
        raise UserError(f"expected a validation fraction between 0 and 1, found {fraction}")


def _hash(text: str) -> float:
    """A number in [0, 1) that looks random and depends on the text alone."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=6).digest(), "little") / 2**48


def _picked_by_hash(documents: Iterable[Document], fraction: float) -> Iterator[tuple[Document, bool]]:
    begins, is_held_out = True, False
    for document in documents:
        if begins:  # the first piece decides for the whole document
            is_held_out = _hash(document.text) < fraction
        begins = document.ends
        yield document, is_held_out


def _cut_in_two(documents: Iterable[Document], place: int) -> Iterator[tuple[Document, bool]]:
    """Documents before and from the `place`-th character, moved back to a line end where its piece has one."""
    for document in documents:
        length = len(document.text)
        if place <= 0 or place >= length:
            yield document, place <= 0
        else:
            cut = cut_point(document.text, place)
            yield Document(document.text[:cut], ends=False), False
            yield Document(document.text[cut:], document.ends), True
        place -= length
