"""From the `data` and `tokenizer` sections of a recipe to a tokenizer and token shards, in a folder of the run."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from slmkit.config import UserError
from slmkit.data import stories
from slmkit.data.conversations import ConversationEncoder
from slmkit.data.data_settings import DataSettings, Reads, TokenizerSettings
from slmkit.data.pairs import prepare_pairs
from slmkit.data.prepare import (
    Progress,
    prepare_chat,
    prepare_text,
    split_conversations,
    split_validation,
    write_conversations,
)
from slmkit.data.reading import (
    VALIDATION_STREAM,
    EncoderOf,
    answers_of,
    conversations_of,
    documents_of,
    encoded_of,
    held_out_of_streams,
    is_endless,
    is_shards,
    open_sources,
    tokenizer_sample,
    validation_source,
)
from slmkit.data.shards import TokenShards
from slmkit.data.source_settings import SourceSettings
from slmkit.data.sources import BUILT_IN, STORIES, SUMS, Document, Source
from slmkit.tokenizer import SLMTokenizer

REVISION_STREAM = 500_009  # added to the seed: the primer's texts that go among the stories
# The stories are made to be talked about: what the chat template says at each turn should be few tokens.
CHAT_WORDS = ("user\n", "assistant\n", "Tell me a story about")


WRITERS: dict[Reads, Callable[..., TokenShards]] = {
    "questions": prepare_chat,
    "pairs": prepare_pairs,
}


class Reporter(Protocol):
    """Where progress goes."""

    def say(self, line: str) -> None: ...

    def counter(self, label: str) -> Progress: ...


@dataclass(frozen=True)
class Corpus:
    """What a run trains on and is measured by. `train` has the shards of each source; none where they are streamed."""

    tokenizer: SLMTokenizer
    train: list[TokenShards]
    validation: TokenShards

    def describe(self) -> dict[str, Any]:
        """What was read, so that a repeated run can tell whether it reads the same."""
        return {
            "tokenizer": self.tokenizer.fingerprint,
            "sources": [source for shards in self.train or [self.validation] for source in shards.header.sources],
            "train": _counts(self.train),
            "validation": _counts([self.validation]),
        }

    @property
    def training_tokens(self) -> int | None:
        """None where they are streamed."""
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
    """Prepare everything in `folder`; a tokenizer is loaded or trained unless one is given (with a model to train on).

    `length`: tokens of a row, so that conversations which are longer are counted, and left out where that is asked for.
    Raises `UserError` for whatever is wrong with the sources.
    """
    _check_shards(data)
    if tokenizer is None and wanted.path is not None:
        tokenizer = SLMTokenizer.from_pretrained(wanted.path)
    if tokenizer is None:
        tokenizer = SLMTokenizer(wanted.vocab_size)
        tokenizer.train(texts_of(reads, data, wanted, seed))
        reporter.say(f"tokenizer: {len(tokenizer):,} tokens")
    if wanted.extensions:
        before, tokenizer = len(tokenizer), tokenizer.extended(**wanted.extensions)
        reporter.say(f"tokenizer: {len(tokenizer) - before:,} tokens added to {before:,}")
    tokenizer.save_pretrained(folder / "tokenizer")
    encoder_of = functools.partial(ConversationEncoder, tokenizer, length=length, on_long=data.on_long_conversation)
    if data.streaming:
        encoders = encoder_of if reads == "conversations" else None
        return Corpus(tokenizer, [], _prepare_validation(data, seed, folder, tokenizer, reporter, encoders))
    if data.is_built_in and reads == "text":
        return Corpus(tokenizer, *_prepare_built_in(data, seed, folder, tokenizer, reporter))
    if reads == "conversations":
        return Corpus(tokenizer, *_prepare_conversations(data, seed, folder, tokenizer, reporter, encoder_of))
    if reads in WRITERS:
        return Corpus(tokenizer, *_prepare_answers(reads, data, seed, folder, tokenizer, reporter))
    return Corpus(tokenizer, *_prepare_documents(data, seed, folder, tokenizer, reporter))


def open_corpus(folder: Path) -> Corpus:
    """What `build_corpus` left there. Raises `UserError` where it is incomplete, damaged or mixed up."""
    tokenizer = SLMTokenizer.from_pretrained(folder / "tokenizer")
    places = sorted((folder / "train").glob("[0-9][0-9]")) or [folder / "train"]
    train = [TokenShards.open(place) for place in places if place.exists()]
    validation = TokenShards.open(folder / "validation")
    for shards in (*train, validation):
        shards.check_tokenizer(tokenizer)
    return Corpus(tokenizer, train, validation)


def texts_of(reads: Reads, data: DataSettings, wanted: TokenizerSettings, seed: int = 0) -> Iterator[str]:
    """Training text for a tokenizer to learn from, of every source as much."""
    if data.source == SUMS:
        yield from (BUILT_IN[SUMS].text(seed, index, False) for index in range(data.documents))
    elif data.is_built_in and reads == "text":
        # A model goes from the one to the other, and to conversations: one tokenizer for all.
        yield from (story.text for story in stories.tell_many(seed, data.documents))
        yield from stories.primer_texts(seed, data.documents)
        yield from CHAT_WORDS * (data.documents // 10)
    else:
        yield from tokenizer_sample(reads != "text", data, wanted, seed)


def _check_shards(data: DataSettings) -> None:
    """Raises `UserError` where sources that are token shards already are asked for what only text can give."""
    for settings in filter(is_shards, data.all_sources()):
        if data.streaming:
            raise UserError(f"{settings.path}: token shards are read as memory anyway: drop data.streaming")
        if data.validation is None:
            raise UserError(
                f"{settings.path}: nothing is held out of token shards: name text or other shards as data.validation"
            )


def _linked(settings: SourceSettings, place: Path, tokenizer: SLMTokenizer) -> TokenShards:
    """Shards that exist, under the name that they have in this run. Raises `UserError` where another tokenizer's."""
    TokenShards.open(settings.path).check_tokenizer(tokenizer)
    place.parent.mkdir(parents=True, exist_ok=True)
    place.symlink_to(Path(settings.path).absolute())
    return TokenShards.open(place)


def _prepare_validation(
    data: DataSettings,
    seed: int,
    folder: Path,
    tokenizer: SLMTokenizer,
    reporter: Reporter,
    encoder_of: EncoderOf | None = None,
) -> TokenShards:
    """The validation text of streams, or of a source of its own; conversations where `encoder_of` is given."""
    sources = [settings.model_dump(exclude_defaults=True) for settings in data.all_sources()]
    items: Any
    if data.validation is not None and is_shards(data.validation):
        return _linked(data.validation, folder / "validation", tokenizer)
    if data.validation is not None:
        source = validation_source(data, data.validation, seed)
        items = documents_of(source) if encoder_of is None else encoded_of(source, encoder_of)
        sources = source.describe()
    else:
        source, items = None, held_out_of_streams(data, seed, encoder_of)
    prepare: Any = prepare_text if encoder_of is None else write_conversations
    shards = prepare(items, tokenizer, folder / "validation", sources=sources)
    _say_all(reporter, source.report() if source else [])
    return shards


def _prepare_documents(
    data: DataSettings, seed: int, folder: Path, tokenizer: SLMTokenizer, reporter: Reporter
) -> tuple[list[TokenShards], TokenShards]:
    """Shards of every source, and one directory of all that is held out of them."""
    train, held_out, described = [], [], []
    for place, settings, source in _places(data, seed, folder):
        if source is None:
            train.append(_linked(settings, place, tokenizer))
            continue
        documents: Iterable[Document] = documents_of(source)
        if data.validation is None:
            documents, validation = _split(source, data, seed)
            held_out.append(validation)
        described += (sources := source.describe())
        progress = reporter.counter(f"tokenizing {source.settings.label}")
        train.append(
            prepare_text(documents, tokenizer, place, sources=sources, progress=progress, cleaning=data.cleaning)
        )
        _say_all(reporter, source.report())
    if data.validation is not None:
        return train, _prepare_validation(data, seed, folder, tokenizer, reporter)
    held = itertools.chain.from_iterable(map(_ended, held_out))
    return train, prepare_text(held, tokenizer, folder / "validation", sources=described)


def _split(source: Source, data: DataSettings, seed: int) -> tuple[Iterator[Document], Iterator[Document]]:
    if is_endless(source):
        other = validation_source(data, source.settings, seed)
        return documents_of(source), documents_of(other)
    return split_validation(lambda: documents_of(source), data.validation_fraction)


def _places(data: DataSettings, seed: int, folder: Path) -> Iterator[tuple[Path, SourceSettings, Source | None]]:
    """Where the shards of each source go (below `train` if there are several), and the source unless it is shards."""
    sources, all_settings = open_sources(data, seed), data.all_sources()
    for number, settings in enumerate(all_settings):
        place = folder / "train" if len(all_settings) == 1 else folder / "train" / f"{number:02}"
        yield place, settings, sources.get(settings.label)


def _ended(documents: Iterable[Document]) -> Iterator[Document]:
    """The documents of one source, the last one ended even where its text was cut in two."""
    ends = True
    for document in documents:
        ends = document.ends
        yield document
    if not ends:
        yield Document("")


def _say_all(reporter: Reporter, lines: Iterable[str]) -> None:
    for line in lines:
        reporter.say(line)


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
        # Every document is its tokens and one end-of-text token, and the generator knows the probability of it all.
        tokens = sum(len(ids) + 1 for ids in tokenizer.encode_batch([story.text for story in held_out]))
        perfect_loss = -sum(story.log_probability for story in held_out) / tokens
    sources = [{"path": data.source, "seed": seed}]
    return (
        [prepare_text(train, tokenizer, folder / "train", sources=sources, progress=reporter.counter("tokenizing"))],
        prepare_text(validation, tokenizer, folder / "validation", sources=sources, perfect_loss=perfect_loss),
    )


def _stories_and_primer(data: DataSettings, seed: int) -> Iterator[str]:
    """The stories, and evenly among them texts of a primer that no run on the primer alone has read."""
    primer = iter(stories.primer_texts(seed + REVISION_STREAM, data.primer_documents))
    for index, story in enumerate(stories.tell_many(seed, data.documents)):
        yield story.text
        due = (index + 1) * data.primer_documents // data.documents - index * data.primer_documents // data.documents
        yield from itertools.islice(primer, due)


def _prepare_conversations(
    data: DataSettings,
    seed: int,
    folder: Path,
    tokenizer: SLMTokenizer,
    reporter: Reporter,
    encoder_of: EncoderOf,
) -> tuple[list[TokenShards], TokenShards]:
    train, held_out, described, read = [], [], list[Any](), list[Source]()
    try:
        for place, settings, source in _places(data, seed, folder):
            if source is None:
                train.append(_linked(settings, place, tokenizer))
                continue
            read.append(source)
            encoded = encoded_of(source, encoder_of)
            if is_endless(source):
                held_out.append(encoded_of(validation_source(data, source.settings, seed), encoder_of))
            elif data.validation is None:
                encoder = encoder_of(source)
                training, validation = split_conversations(list(conversations_of(source)), data.validation_fraction)
                encoded = encoder.encode_all(training)
                held_out.append(encoder.encode_all(validation))
            described += (sources := source.describe())
            progress = reporter.counter(f"tokenizing {source.settings.label}")
            train.append(write_conversations(encoded, tokenizer, place, sources=sources, progress=progress))
        if data.validation is not None:
            return train, _prepare_validation(data, seed, folder, tokenizer, reporter, encoder_of)
        held = itertools.chain.from_iterable(held_out)
        return train, write_conversations(held, tokenizer, folder / "validation", sources=described)
    finally:  # what was left out may be the reason why there is nothing
        _say_all(reporter, [line for source in read for line in source.report()])


def _prepare_answers(
    reads: Reads, data: DataSettings, seed: int, folder: Path, tokenizer: SLMTokenizer, reporter: Reporter
) -> tuple[list[TokenShards], TokenShards]:
    """Shards of questions or of pairs of every source, and one directory of those that are held out."""
    write, read = WRITERS[reads], list[Source]()
    train, held_out = list[TokenShards](), list[Iterator[Any]]()
    described: list[Any] = []
    try:
        for place, settings, source in _places(data, seed, folder):
            if source is None:
                train.append(_linked(settings, place, tokenizer))
                continue
            read.append(source)
            items: Iterable[Any] = answers_of(reads, source)
            if data.validation is None and is_endless(source):
                held_out.append(answers_of(reads, validation_source(data, source.settings, seed)))
            elif data.validation is None:
                items, validation = split_conversations(list(items), data.validation_fraction)
                held_out.append(iter(validation))
            described += (sources := source.describe())
            progress = reporter.counter(f"tokenizing {source.settings.label}")
            train.append(write(items, tokenizer, place, sources=sources, progress=progress))
        if data.validation is not None and is_shards(data.validation):
            return train, _linked(data.validation, folder / "validation", tokenizer)
        if data.validation is not None:
            read.append(validation_source(data, data.validation, seed))
            held_out.append(answers_of(reads, read[-1]))
        held = itertools.chain.from_iterable(held_out)
        return train, write(held, tokenizer, folder / "validation", sources=described)
    finally:
        _say_all(reporter, [line for source in read for line in source.report()])


def _counts(all_shards: Iterable[TokenShards]) -> dict[str, Any]:
    headers = [shards.header for shards in all_shards]
    return {name: sum(getattr(header, name) for header in headers) for name in ("documents", "tokens", "text_bytes")}
