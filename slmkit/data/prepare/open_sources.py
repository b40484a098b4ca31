"""Opens a recipe's sources: training data, validation data, and text for a tokenizer; reads several in order."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slmkit.config import Settings, UserError
from slmkit.data.prepare.conversations import ConversationEncoder, EncodedConversation
from slmkit.data.prepare.held_out import Survey, is_held_out
from slmkit.data.settings import DataSettings, Reads, TokenizerSettings
from slmkit.data.shards.folder import claim
from slmkit.data.shards.reader import HEADER
from slmkit.data.sources import BUILT_IN, Document, Position, Source, open_source
from slmkit.data.sources.documents import Item
from slmkit.data.sources.files import TEXT_KINDS
from slmkit.data.sources.settings import SourceSettings

if TYPE_CHECKING:
    from slmkit.tokenizer import SLMTokenizer

TOKENIZER_CHARACTERS = 100_000_000  # limit of training text: more changes the merges little and takes memory
VALIDATION_STREAM = 1_000_003  # added to the seed: stories that no training stream of a nearby seed has


def is_shards(settings: SourceSettings) -> bool:
    """Whether its path is a directory of token shards, as written by `slm data prepare`."""
    return (Path(settings.path) / HEADER).is_file()


def is_endless(source: Source) -> bool:
    """Whether it is the built-in corpus, which generates other text for validation."""
    return source.settings.path in BUILT_IN


def open_sources(data: DataSettings, seed: int) -> dict[str, Source]:
    """Every source of text by its name, shards excluded. Raises `UserError` for one that cannot be found."""
    opened = {}
    for settings in data.all_sources():
        if is_shards(settings):
            continue
        changes: dict[str, object] = {"streaming": settings.streaming or data.streaming}
        if settings.path in BUILT_IN and not data.streaming:  # it is endless
            changes["documents"] = settings.documents or data.documents
        opened[settings.label] = open_source(settings.model_copy(update=changes), seed)
    if isinstance(data.source, list):  # several paths of one source
        (name, first), *_ = opened.items()
        rest = [open_source(first.settings.model_copy(update={"path": path}), seed) for path in data.source[1:]]
        whole = [first, *rest]
        parts, found = [part for one in whole for part in one.parts], [f for one in whole for f in one.found]
        opened[name] = Source(first.settings, parts, first.retries, found)
    return opened


def validation_source(data: DataSettings, settings: SourceSettings, seed: int, count: int | None = None) -> Source:
    """The source of validation text alone, limited to `count` documents, by default `validation_documents`."""
    limit = count or data.validation_documents
    changes = {"streaming": settings.streaming or data.streaming, "documents": min(settings.documents or limit, limit)}
    return open_source(settings.model_copy(update=changes), seed + VALIDATION_STREAM, held_out=True)


def is_kept_in(data: DataSettings, source: Source) -> Callable[[str], bool]:
    """A function that tells, from a document's text or first piece, whether streamed training uses it."""
    if data.validation is not None or is_endless(source):
        return lambda text: True
    return lambda text: not is_held_out(text, data.validation_fraction)


def items_of(source: Source, reads: Reads) -> Iterator[Any]:
    """All items that are read, from the beginning; resets the counts of skipped rows."""
    source.count_anew()
    return (item for item, _ in source.read(kind=reads))


def tokenizer_sample(
    conversations: bool, data: DataSettings, wanted: TokenizerSettings, seed: int, surveys: dict[str, Survey]
) -> Iterator[str]:
    """Text for a tokenizer, an equal number of documents or characters from every source, read lazily.

    Adds what is counted of each source of text to `surveys`. Raises `UserError` if all sources are shards.
    """
    sources = open_sources(data, seed)
    if not sources:
        raise UserError("tokenizer.path is needed, since the sources are token shards: name the tokenizer they are of")
    for name, source in sources.items():
        surveys[name] = Survey(data.validation_fraction)
        texts = _texts_of_conversations(source) if conversations else surveys[name].over(items_of(source, "text"))
        left, characters = wanted.documents_per_source, TOKENIZER_CHARACTERS // len(sources)
        for text, ends, *_ in texts:
            yield text
            characters -= len(text)
            left = None if left is None else left - ends
            if characters <= 0 or left == 0:
                break


def _texts_of_conversations(source: Source) -> Iterator[tuple[str, bool]]:
    """The content of each message, and whether it is the conversation's last."""
    for conversation in items_of(source, "conversations"):
        said = [message["content"] for message in conversation if isinstance(message.get("content"), str)]
        yield from ((text, number == len(said)) for number, text in enumerate(said, start=1))


class Reading:
    """Several sources one after the other. Raises `UserError` as `open_source` and `Source.read`."""

    def __init__(self, settings: Sequence[SourceSettings]) -> None:
        self.sources = [open_source(one) for one in settings]
        self._behind: tuple[int, Position] = (0, {})

    @functools.cached_property
    def descriptions(self) -> list[dict[str, Any]]:
        """A description of each file, for the header of shards."""
        return [part for source in self.sources for part in source.describe()]

    @functools.cached_property
    def _sizes(self) -> list[int | None]:
        """Bytes of each file in which offsets are those of the text; None of any other."""
        plain = (*TEXT_KINDS, ".jsonl", ".json", ".csv", ".tsv")
        return [part.get("bytes") if str(part["path"]).lower().endswith(plain) else None for part in self.descriptions]

    def claim(self, directory: str | Path, tokenizer: SLMTokenizer, cleaning: Settings, **options: Any) -> None:
        """Record that shards of these sources are made there. Raises `UserError` if others are: see `folder.claim`."""
        sources = [source.settings.model_dump(mode="json") for source in self.sources]
        made = {"tokenizer": tokenizer.fingerprint, "cleaning": cleaning.model_dump(mode="json")}
        claim(directory, {"sources": sources} | made | options)

    def documents(self) -> Iterator[Document]:
        for number, source in enumerate(self.sources):
            yield from self._followed(number, source.read())

    def encoded(
        self, reads: Reads, tokenizer: SLMTokenizer, length: int | None = None
    ) -> Iterator[EncodedConversation]:
        """All conversations, pairs or judged answers, encoded; with `length`, longer conversations are counted."""
        for number, source in enumerate(self.sources):
            rows = self._followed(number, source.read_rows(reads))
            yield from ConversationEncoder(tokenizer, source, length).encode_all(rows)

    def _followed(self, number: int, rows: Iterator[Item[Any]]) -> Iterator[Any]:
        """The items of a source; keeps the position after the last one."""
        for item, behind in rows:
            self._behind = number, behind
            yield item

    def fraction(self) -> float | None:
        """The share of all bytes read so far, 0 to 1; None if sizes are unknown: compressed, remote or endless."""
        if any(size is None for size in self._sizes):
            return None
        number, behind = self._behind
        files = sum(len(source.parts) for source in self.sources[:number]) + behind.get("file", 0)
        done = sum(size or 0 for size in self._sizes[:files]) + behind.get("offset", 0)
        return done / max(1, sum(size or 0 for size in self._sizes))

    def report(self) -> list[str]:
        """One line for each reason for which rows were left out."""
        return [line for source in self.sources for line in source.report()]
