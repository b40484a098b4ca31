"""Makes the tokenizer and token shards of a run from its `data` and `tokenizer` settings."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from slmkit.config import UserError
from slmkit.data import stories
from slmkit.data.prepare.conversations import ConversationEncoder, write_conversations
from slmkit.data.prepare.held_out import (
    Survey,
    is_held_out,
    picked_by_hash,
    split_conversations,
    split_validation,
    written,
)
from slmkit.data.prepare.open_sources import (
    VALIDATION_STREAM,
    is_endless,
    is_shards,
    items_of,
    open_sources,
    tokenizer_sample,
    validation_source,
)
from slmkit.data.prepare.text_to_shards import Progress, no_progress, prepare_text
from slmkit.data.settings import DataSettings, Reads, TokenizerSettings
from slmkit.data.shards.reader import TokenShards
from slmkit.data.sources import BUILT_IN, STORY_WORLDS, WORLDS, Document, Source
from slmkit.data.sources.settings import SourceSettings
from slmkit.tokenizer import SLMTokenizer

REVISION_STREAM = 500_009  # added to the seed for the texts with questions among the stories
# Added to the tokenizer's training text, so that the chat template's words are few tokens.
CHAT_WORDS = ("user\n", "assistant\n", "Tell me a story about")

Items = Iterable[Any]  # documents, or encoded conversations


class Reporter(Protocol):
    """The interface for progress output."""

    def say(self, line: str) -> None: ...

    def counter(self, label: str, total: int | None = None) -> Progress: ...


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
    _check_shards(data)
    if tokenizer is None and wanted.path is not None:
        tokenizer = SLMTokenizer.from_pretrained(wanted.path)
    surveys: dict[str, Survey] = {}
    if tokenizer is None:
        tokenizer = SLMTokenizer(wanted.vocab_size)
        tokenizer.train(texts_of(reads, data, wanted, seed, surveys), show_progress=True)
        reporter.say(f"tokenizer: {len(tokenizer):,} tokens")
    if wanted.extensions:
        before, tokenizer = len(tokenizer), tokenizer.extended(**wanted.extensions)
        reporter.say(f"tokenizer: {len(tokenizer) - before:,} tokens added to {before:,}")
    tokenizer.save_pretrained(folder / "tokenizer")
    preparation = _Preparation(reads, data, seed, folder, tokenizer, reporter, length, surveys)
    if data.streaming:
        return Corpus(tokenizer, [], preparation.streamed())
    return Corpus(tokenizer, *preparation.stored())


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


def texts_of(
    reads: Reads,
    data: DataSettings,
    wanted: TokenizerSettings,
    seed: int = 0,
    surveys: dict[str, Survey] | None = None,
) -> Iterator[str]:
    """Training text for a tokenizer, an equal amount from every source; files are counted in `surveys` meanwhile."""
    if data.is_built_in and data.source not in [*WORLDS]:
        yield from (BUILT_IN[str(data.source)].text(seed, index, False) for index in range(data.documents))
    elif data.is_built_in and reads == "text":
        # One tokenizer for stories, primer and conversations, since a model is trained on one after the other.
        world = WORLDS[str(data.source)]
        yield from (story.text for story in stories.tell_many(seed, data.documents, world=world))
        yield from stories.primer_texts(seed, data.documents, world)
        yield from CHAT_WORDS * (data.documents // 10)
    else:
        yield from tokenizer_sample(reads != "text", data, wanted, seed, {} if surveys is None else surveys)


@dataclass(frozen=True)
class _Preparation:
    """Makes the shards of a run from its sources, of the kind of items that `reads` names."""

    reads: Reads
    data: DataSettings
    seed: int
    folder: Path
    tokenizer: SLMTokenizer
    reporter: Reporter
    length: int | None
    surveys: Mapping[str, Survey]  # of sources that were read for the tokenizer

    @property
    def _is_stories(self) -> bool:
        return self.reads == "text" and self.data.source in [*STORY_WORLDS]

    @property
    def _world(self) -> float:
        return WORLDS[str(self.data.source)]

    def stored(self) -> tuple[list[TokenShards], TokenShards]:
        """Training shards of every source, and validation shards: of a source named, or held out of all."""
        data, train, held_out = self.data, list[TokenShards](), list[Items]()
        described, opened = list[dict[str, Any]](), open_sources(self.data, self.seed)
        all_settings = data.all_sources()
        try:
            for number, settings in enumerate(all_settings):
                place = Path("train") if len(all_settings) == 1 else Path("train", f"{number:02}")
                source = opened.get(settings.label)
                if source is None:
                    train.append(self._linked(settings, place))
                    continue
                items = self._items(source)
                if self._is_stories:
                    items = self._with_primer(items)
                if data.validation is None and is_endless(source):
                    # Built-in text has `validation_documents`, however few there are to train on.
                    limited = settings if data.is_built_in and self.reads == "text" else source.settings
                    held_out.append(self._items(validation_source(data, limited, self.seed)))
                elif data.validation is None:
                    items, rest = self._split(source)
                    held_out.append(rest)
                described += (sources := source.describe())
                train.append(self._write(items, place, sources, f"tokenizing {source.settings.label}"))
            if data.validation is None:
                rest = itertools.chain.from_iterable(held_out)
                return train, self._write(rest, Path("validation"), described, perfect_loss=self._perfect_loss())
        finally:  # what was left out may explain why nothing is left
            self._say_what_was_left_out(opened.values())
        return train, self._named_validation(data.validation)

    def streamed(self) -> TokenShards:
        """Validation shards, all that is stored of streamed sources."""
        if self.data.validation is not None:
            return self._named_validation(self.data.validation)
        sources = [settings.model_dump(exclude_defaults=True) for settings in self.data.all_sources()]
        return self._write(self._held_out_of_streams(), Path("validation"), sources)

    def _named_validation(self, settings: SourceSettings) -> TokenShards:
        """Validation shards of the source named as validation."""
        if is_shards(settings):
            return self._linked(settings, Path("validation"))
        source = validation_source(self.data, settings, self.seed)
        try:
            return self._write(self._items(source), Path("validation"), source.describe())
        finally:
            self._say_what_was_left_out([source])

    def _encoder(self, source: Source) -> ConversationEncoder:
        if self.reads != "conversations":
            return ConversationEncoder(self.tokenizer, source)
        return ConversationEncoder(self.tokenizer, source, self.length, self.data.on_long_conversation)

    def _items(self, source: Source) -> Items:
        """All items of a source; those left out are counted with it."""
        if self.reads == "text":
            return items_of(source, "text")
        return self._encoder(source).encode_all(row for row, _ in source.read_rows(self.reads))

    def _split(self, source: Source) -> tuple[Items, Items]:
        """Items to train on, and the share of them that is held out."""
        fraction = self.data.validation_fraction
        if self.reads == "text":
            survey = self.surveys.get(source.settings.label)
            return split_validation(lambda: items_of(source, "text"), fraction, self.folder, survey)
        encoder = self._encoder(source)
        training, held_out = split_conversations([*items_of(source, self.reads)], fraction)
        return encoder.encode_all(training), encoder.encode_all(held_out)

    def _held_out_of_streams(self) -> Iterator[Any]:
        """Items that streamed training leaves out: `validation_documents` in all, as many from every source.

        Raises `UserError` for a source of which nothing is held out.
        """
        sources = open_sources(self.data, self.seed)
        count = -(-self.data.validation_documents // len(sources))
        for name, source in sources.items():
            if is_endless(source):
                yield from self._items(validation_source(self.data, source.settings, self.seed, count))
                continue
            found = 0
            for item in self._held_out_of(source):
                yield item
                found += item.ends if isinstance(item, Document) else 1
                if found == count:
                    break
            if not found:
                raise UserError(
                    f"{name}: no document was held out for validation; raise data.validation_fraction, or name "
                    "a source of its own as data.validation"
                )

    def _held_out_of(self, source: Source) -> Items:
        fraction, items = self.data.validation_fraction, items_of(source, self.reads)
        if self.reads == "text":
            return (document for document, held_out in picked_by_hash(items, fraction) if held_out)
        chosen = (one for one in items if is_held_out(written(one), fraction))
        encoder = self._encoder(source)  # one at a time, since few of a long stream are needed
        return (encoded for one in chosen for encoded in encoder.encode_all([one]))

    def _write(
        self,
        items: Items,
        place: Path,
        sources: list[dict[str, Any]],
        label: str | None = None,
        perfect_loss: float | None = None,
    ) -> TokenShards:
        """Shards of items in `place` of the folder; training items have a `label` for progress, and text is cleaned."""
        progress = self.reporter.counter(label) if label else no_progress
        options: dict[str, Any] = {"sources": sources, "progress": progress}
        if self.reads == "text":
            options |= {"cleaning": self.data.cleaning if label else None, "perfect_loss": perfect_loss}
            return prepare_text(items, self.tokenizer, self.folder / place, **options)
        return write_conversations(items, self.tokenizer, self.folder / place, **options)

    def _linked(self, settings: SourceSettings, place: Path) -> TokenShards:
        """Existing shards, linked into this run. Raises `UserError` if they are another tokenizer's."""
        TokenShards.open(settings.path).check_tokenizer(self.tokenizer)
        link = self.folder / place
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(Path(settings.path).absolute())
        return TokenShards.open(link)

    def _with_primer(self, documents: Items) -> Iterator[Document]:
        """The stories, evenly mixed with texts with questions, which no other run reads."""
        wanted = self.data.primer_documents
        primer = map(Document, stories.revision_texts(self.seed + REVISION_STREAM, wanted, self._world))
        for index, story in enumerate(documents):
            yield story
            due = (index + 1) * wanted // self.data.documents - index * wanted // self.data.documents
            yield from itertools.islice(primer, due)

    def _perfect_loss(self) -> float | None:
        """Nats per token of the best possible model on the validation data; None where it is not known."""
        if not self._is_stories:
            return None
        seed, count = self.seed + VALIDATION_STREAM, self.data.validation_documents
        told = list(stories.tell_many(seed, count, world=self._world))
        # Each document is its tokens and one end-of-text token, and the generator knows its probability.
        tokens = sum(len(ids) + 1 for ids in self.tokenizer.encode_batch([story.text for story in told]))
        return -sum(story.log_probability for story in told) / tokens

    def _say_what_was_left_out(self, sources: Iterable[Source]) -> None:
        for line in (line for source in sources for line in source.report()):
            self.reporter.say(line)


def _check_shards(data: DataSettings) -> None:
    """Raises `UserError` if settings that need text are used with sources that are token shards."""
    for settings in filter(is_shards, data.all_sources()):
        if data.streaming:
            raise UserError(f"{settings.path}: token shards need no streaming: remove data.streaming")
        if data.validation is None:
            raise UserError(
                f"{settings.path}: token shards are not split: name text or other shards as data.validation"
            )


def _counts(all_shards: Iterable[TokenShards]) -> dict[str, Any]:
    headers = [shards.header for shards in all_shards]
    return {name: sum(getattr(header, name) for header in headers) for name in ("documents", "tokens", "text_bytes")}
