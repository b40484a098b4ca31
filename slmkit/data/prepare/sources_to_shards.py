"""Writes token shards from a recipe's sources, whatever kind of items they have.

Text, conversations, questions and pairs differ in how a source is read, how a part is held out, and how it is written:
see `Preparation`.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from slmkit.config import UserError
from slmkit.data.prepare.conversations import EncodedConversation
from slmkit.data.prepare.open_sources import (
    EncoderOf,
    conversations_of,
    documents_of,
    encoded_of,
    held_out_of_streams,
    is_endless,
    is_shards,
    judgements_of,
    open_sources,
    pairs_of,
    questions_of,
    validation_source,
)
from slmkit.data.prepare.text_to_shards import (
    Progress,
    prepare_chat,
    prepare_text,
    split_conversations,
    split_validation,
    write_conversations,
)
from slmkit.data.rows.judged import prepare_judgements
from slmkit.data.rows.pairs import prepare_pairs
from slmkit.data.settings import DataSettings, Reads
from slmkit.data.shards.reader import TokenShards
from slmkit.data.sources import Document, Source
from slmkit.data.sources.settings import SourceSettings
from slmkit.tokenizer import SLMTokenizer

Items = Iterable[Any]  # documents, encoded conversations, questions or pairs


class Reporter(Protocol):
    """The interface for progress output."""

    def say(self, line: str) -> None: ...

    def counter(self, label: str, total: int | None = None) -> Progress: ...


class Preparation(NamedTuple):
    """How to turn a source's items into shards."""

    read: Callable[[Source], Items]  # all of them
    split: Callable[[Source, float], tuple[Items, Items]]  # training items, and held-out ones of about this share
    write: Callable[..., TokenShards]
    in_training: Mapping[str, Any] = {}  # arguments of `write` for training items only


def preparation_of(reads: Reads, data: DataSettings, tokenizer: SLMTokenizer, encoder_of: EncoderOf) -> Preparation:
    """The preparation for `reads`; `encoder_of` is for conversations."""
    if reads == "text":
        return Preparation(documents_of, _split_documents, prepare_text, {"cleaning": data.cleaning})
    if reads == "conversations":
        encoded = functools.partial(encoded_of, encoder_of=encoder_of)
        return Preparation(encoded, functools.partial(_split_encoded, encoder_of), write_conversations)
    ways: dict[str, tuple[Callable[..., Items], Callable[..., TokenShards]]] = {
        "pairs": (pairs_of, prepare_pairs),
        "judgements": (judgements_of, prepare_judgements),
        "questions": (questions_of, prepare_chat),
    }
    read_all, write = ways[reads]
    read = functools.partial(read_all, tokenizer=tokenizer)
    return Preparation(read, lambda source, share: split_conversations([*read(source)], share), write)


def _split_documents(source: Source, fraction: float) -> tuple[Iterator[Document], Iterator[Document]]:
    training, held_out = split_validation(lambda: documents_of(source), fraction)
    return training, _read_again(source, held_out)


def _read_again(source: Source, documents: Iterable[Document]) -> Iterator[Document]:
    """The documents, with counts reset, so that skipped rows are counted once; the last one always ends."""
    source.count_anew()
    ends = True
    for document in documents:
        ends = document.ends
        yield document
    if not ends:
        yield Document("")


def _split_encoded(
    encoder_of: EncoderOf, source: Source, fraction: float
) -> tuple[Iterator[EncodedConversation], Iterator[EncodedConversation]]:
    encoder = encoder_of(source)
    training, held_out = split_conversations([*conversations_of(source)], fraction)
    return encoder.encode_all(training), encoder.encode_all(held_out)


def prepare_sources(
    way: Preparation, data: DataSettings, seed: int, folder: Path, tokenizer: SLMTokenizer, reporter: Reporter
) -> tuple[list[TokenShards], TokenShards]:
    """Training shards of every source, and one directory of validation shards: named, or held out of all sources."""
    train, held_out = list[TokenShards](), list[Items]()
    described, opened = list[dict[str, Any]](), list[Source]()
    try:
        for place, settings, source in _places(data, seed, folder):
            if source is None:
                train.append(_linked(settings, place, tokenizer))
                continue
            opened.append(source)
            items = way.read(source)
            if data.validation is None and is_endless(source):
                held_out.append(way.read(validation_source(data, source.settings, seed)))
            elif data.validation is None:
                items, rest = way.split(source, data.validation_fraction)
                held_out.append(rest)
            described += (sources := source.describe())
            progress = reporter.counter(f"tokenizing {source.settings.label}")
            train.append(way.write(items, tokenizer, place, sources=sources, progress=progress, **way.in_training))
        if data.validation is None:
            held = itertools.chain.from_iterable(held_out)
            return train, way.write(held, tokenizer, folder / "validation", sources=described)
    finally:  # what was left out may explain why nothing is left
        _say_all(reporter, opened)
    return train, _prepare_validation(way, data, data.validation, seed, folder, tokenizer, reporter)


def prepare_validation_of_streams(
    way: Preparation,
    data: DataSettings,
    seed: int,
    folder: Path,
    tokenizer: SLMTokenizer,
    reporter: Reporter,
    encoder_of: EncoderOf | None,
) -> TokenShards:
    """Validation shards, all that is stored of streamed sources; `encoder_of` for conversations."""
    if data.validation is not None:
        return _prepare_validation(way, data, data.validation, seed, folder, tokenizer, reporter)
    sources = [settings.model_dump(exclude_defaults=True) for settings in data.all_sources()]
    return way.write(held_out_of_streams(data, seed, encoder_of), tokenizer, folder / "validation", sources=sources)


def _prepare_validation(
    way: Preparation,
    data: DataSettings,
    settings: SourceSettings,
    seed: int,
    folder: Path,
    tokenizer: SLMTokenizer,
    reporter: Reporter,
) -> TokenShards:
    """Validation shards of the source named as validation."""
    if is_shards(settings):
        return _linked(settings, folder / "validation", tokenizer)
    source = validation_source(data, settings, seed)
    try:
        return way.write(way.read(source), tokenizer, folder / "validation", sources=source.describe())
    finally:
        _say_all(reporter, [source])


def _places(data: DataSettings, seed: int, folder: Path) -> Iterator[tuple[Path, SourceSettings, Source | None]]:
    """Each source's directory of shards (below `train` if there are several), and the source; None if it is shards."""
    sources, all_settings = open_sources(data, seed), data.all_sources()
    for number, settings in enumerate(all_settings):
        place = folder / "train" if len(all_settings) == 1 else folder / "train" / f"{number:02}"
        yield place, settings, sources.get(settings.label)


def _linked(settings: SourceSettings, place: Path, tokenizer: SLMTokenizer) -> TokenShards:
    """Existing shards, linked into this run. Raises `UserError` if they are another tokenizer's."""
    TokenShards.open(settings.path).check_tokenizer(tokenizer)
    place.parent.mkdir(parents=True, exist_ok=True)
    place.symlink_to(Path(settings.path).absolute())
    return TokenShards.open(place)


def check_shards(data: DataSettings) -> None:
    """Raises `UserError` if settings that need text are used with sources that are token shards."""
    for settings in filter(is_shards, data.all_sources()):
        if data.streaming:
            raise UserError(f"{settings.path}: token shards need no streaming: remove data.streaming")
        if data.validation is None:
            raise UserError(
                f"{settings.path}: token shards are not split: name text or other shards as data.validation"
            )


def _say_all(reporter: Reporter, sources: Iterable[Source]) -> None:
    for line in (line for source in sources for line in source.report()):
        reporter.say(line)
