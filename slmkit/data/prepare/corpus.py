"""Makes the tokenizer and token shards of a run from its `data` and `tokenizer` settings."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from slmkit.config import UserError
from slmkit.data import stories
from slmkit.data.prepare.conversations import ConversationEncoder
from slmkit.data.prepare.open_sources import VALIDATION_STREAM, tokenizer_sample
from slmkit.data.prepare.sources_to_shards import (
    Reporter,
    check_shards,
    preparation_of,
    prepare_sources,
    prepare_validation_of_streams,
)
from slmkit.data.prepare.text_to_shards import prepare_text
from slmkit.data.settings import DataSettings, Reads, TokenizerSettings
from slmkit.data.shards.reader import TokenShards
from slmkit.data.sources import BUILT_IN, STORIES, SUMS, Document
from slmkit.tokenizer import SLMTokenizer

REVISION_STREAM = 500_009  # added to the seed for the primer's texts among the stories
# Added to the tokenizer's training text, so that the chat template's words are few tokens.
CHAT_WORDS = ("user\n", "assistant\n", "Tell me a story about")


@dataclass(frozen=True)
class Corpus:
    """Tokenizer, training shards (one directory per source; none if streamed) and validation shards of a run."""

    tokenizer: SLMTokenizer
    train: list[TokenShards]
    validation: TokenShards

    def describe(self) -> dict[str, Any]:
        """Counts and fingerprints, to tell whether a repeated run reads the same data."""
        return {
            "tokenizer": self.tokenizer.fingerprint,
            "sources": [source for shards in self.train or [self.validation] for source in shards.header.sources],
            "train": _counts(self.train),
            "validation": _counts([self.validation]),
        }

    @property
    def training_tokens(self) -> int | None:
        """The number of training tokens; None if streamed."""
        return sum(map(len, self.train)) if self.train else None


def build_corpus(
    reads: Reads,
    data: DataSettings,
    wanted: TokenizerSettings,
    seed: int,
    folder: Path,
    tokenizer: SLMTokenizer | None,
    reporter: Reporter,
    length: int | None = None,
) -> Corpus:
    """Prepare tokenizer and shards in `folder`; the tokenizer is loaded or trained unless it is given (with a model).

    `length`: tokens in a row, to count longer conversations and, if configured, leave them out. Raises `UserError` for
    unusable sources.
    """
    check_shards(data)
    if tokenizer is None and wanted.path is not None:
        tokenizer = SLMTokenizer.from_pretrained(wanted.path)
    if tokenizer is None:
        tokenizer = SLMTokenizer(wanted.vocab_size)
        tokenizer.train(texts_of(reads, data, wanted, seed), show_progress=True)
        reporter.say(f"tokenizer: {len(tokenizer):,} tokens")
    if wanted.extensions:
        before, tokenizer = len(tokenizer), tokenizer.extended(**wanted.extensions)
        reporter.say(f"tokenizer: {len(tokenizer) - before:,} tokens added to {before:,}")
    tokenizer.save_pretrained(folder / "tokenizer")
    if data.is_built_in and reads == "text" and not data.streaming:
        return Corpus(tokenizer, *_prepare_built_in(data, seed, folder, tokenizer, reporter))
    encoder_of = functools.partial(ConversationEncoder, tokenizer, length=length, on_long=data.on_long_conversation)
    way = preparation_of(reads, data, tokenizer, encoder_of)
    if data.streaming:
        encoders = encoder_of if reads == "conversations" else None
        validation = prepare_validation_of_streams(way, data, seed, folder, tokenizer, reporter, encoders)
        return Corpus(tokenizer, [], validation)
    return Corpus(tokenizer, *prepare_sources(way, data, seed, folder, tokenizer, reporter))


def open_corpus(folder: Path) -> Corpus:
    """The corpus that `build_corpus` left in `folder`. Raises `UserError` if incomplete, damaged or inconsistent."""
    if not folder.is_dir():
        raise UserError(
            f"{folder.parent}: its data is not on disk, since it was given in a script: go on there, with "
            f"SLMTrainer(…).train(resume_from_checkpoint={str(folder.parent)!r})"
        )
    tokenizer = SLMTokenizer.from_pretrained(folder / "tokenizer")
    places = sorted((folder / "train").glob("[0-9][0-9]")) or [folder / "train"]
    train = [TokenShards.open(place) for place in places if place.exists()]
    validation = TokenShards.open(folder / "validation")
    for shards in (*train, validation):
        shards.check_tokenizer(tokenizer)
    return Corpus(tokenizer, train, validation)


def texts_of(reads: Reads, data: DataSettings, wanted: TokenizerSettings, seed: int = 0) -> Iterator[str]:
    """Training text for a tokenizer, an equal amount from every source."""
    if data.source == SUMS:
        yield from (BUILT_IN[SUMS].text(seed, index, False) for index in range(data.documents))
    elif data.is_built_in and reads == "text":
        # One tokenizer for stories, primer and conversations, since a model is trained on one after the other.
        yield from (story.text for story in stories.tell_many(seed, data.documents))
        yield from stories.primer_texts(seed, data.documents)
        yield from CHAT_WORDS * (data.documents // 10)
    else:
        yield from tokenizer_sample(reads != "text", data, wanted, seed)


def _prepare_built_in(
    data: DataSettings, seed: int, folder: Path, tokenizer: SLMTokenizer, reporter: Reporter
) -> tuple[list[TokenShards], TokenShards]:
    train: Iterable[Document | str]
    validation: Iterable[Document | str]
    perfect_loss = None
    if data.source != STORIES:
        text = BUILT_IN[str(data.source)].text
        train = (text(seed, index, False) for index in range(data.documents))
        validation = (text(seed + VALIDATION_STREAM, index, True) for index in range(data.validation_documents))
    else:
        train = _stories_and_primer(data, seed)
        held_out = list(stories.tell_many(seed + VALIDATION_STREAM, data.validation_documents))
        validation = [story.text for story in held_out]
        # Each document is its tokens and one end-of-text token, and the generator knows its probability.
        tokens = sum(len(ids) + 1 for ids in tokenizer.encode_batch([story.text for story in held_out]))
        perfect_loss = -sum(story.log_probability for story in held_out) / tokens
    sources = [{"path": data.source, "seed": seed}]
    return (
        [prepare_text(train, tokenizer, folder / "train", sources=sources, progress=reporter.counter("tokenizing"))],
        prepare_text(validation, tokenizer, folder / "validation", sources=sources, perfect_loss=perfect_loss),
    )


def _stories_and_primer(data: DataSettings, seed: int) -> Iterator[str]:
    """The stories, evenly mixed with primer texts that no run on the primer alone has read."""
    primer = iter(stories.primer_texts(seed + REVISION_STREAM, data.primer_documents))
    for index, story in enumerate(stories.tell_many(seed, data.documents)):
        yield story.text
        due = (index + 1) * data.primer_documents // data.documents - index * data.primer_documents // data.documents
        yield from itertools.islice(primer, due)


def _counts(all_shards: Iterable[TokenShards]) -> dict[str, Any]:
    headers = [shards.header for shards in all_shards]
    return {name: sum(getattr(header, name) for header in headers) for name in ("documents", "tokens", "text_bytes")}
