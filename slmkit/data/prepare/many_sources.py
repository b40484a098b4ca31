"""Reads several sources one after the other, from any position, with progress."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from slmkit.config import Settings
from slmkit.data.prepare.conversations import ConversationEncoder, EncodedConversation
from slmkit.data.prepare.open_sources import judgements_of, pairs_of
from slmkit.data.prepare.text_to_shards import Progress, write_conversations
from slmkit.data.rows.judged import prepare_judgements
from slmkit.data.rows.pairs import prepare_pairs
from slmkit.data.settings import Reads
from slmkit.data.shards.folder import claim
from slmkit.data.shards.reader import TokenShards
from slmkit.data.sources import BadRow, Document, Message, Position, open_source
from slmkit.data.sources.files import TEXT_KINDS
from slmkit.data.sources.settings import SourceSettings

if TYPE_CHECKING:
    from slmkit.tokenizer import SLMTokenizer


class Place(NamedTuple):
    """The position after a document: which source, and the position in it."""

    source: int
    position: Position | None


BEGINNING = Place(0, None)


class Reading:
    """All documents of `settings`, in order. Raises `UserError` as `open_source` and `Source.read` do."""

    def __init__(self, settings: Sequence[SourceSettings]) -> None:
        self.sources = [open_source(one) for one in settings]
        self._behind: tuple[int, Position] = (0, {})

    @functools.cached_property
    def descriptions(self) -> list[dict[str, Any]]:
        """A description of each file, for the header of shards."""
        return [part for source in self.sources for part in source.describe()]

    @functools.cached_property
    def _sizes(self) -> list[int | None]:
        return [part.get("bytes") if _is_plain(part) else None for part in self.descriptions]

    def claim(self, directory: str | Path, tokenizer: SLMTokenizer, cleaning: Settings, **options: Any) -> None:
        """Record that shards of these sources are made there. Raises `UserError` if others are: see `folder.claim`."""
        sources = [source.settings.model_dump(mode="json") for source in self.sources]
        made = {"tokenizer": tokenizer.fingerprint, "cleaning": cleaning.model_dump(mode="json")}
        claim(directory, {"sources": sources} | made | options)

    def read(self, start: Place = BEGINNING) -> Iterator[tuple[Document, Place]]:
        """Every document after `start`, each with the position after it."""
        for number in range(start.source, len(self.sources)):
            position = start.position if number == start.source else None
            for document, behind in self.sources[number].read(position):
                self._behind = number, behind
                yield document, Place(number, behind)

    def documents(self) -> Iterator[Document]:
        return (document for document, _ in self.read())

    def conversations(self, tokenizer: SLMTokenizer, length: int | None = None) -> Iterator[EncodedConversation]:
        """All conversations, encoded; with `length`, longer ones are counted."""
        for number, source in enumerate(self.sources):
            yield from ConversationEncoder(tokenizer, source, length).encode_all(self._conversations(number))

    def _conversations(self, number: int) -> Iterator[list[Message] | BadRow]:
        for row, behind in self.sources[number].read_conversation_rows():
            self._behind = number, behind
            yield row

    def prepare_conversations(
        self, reads: Reads, tokenizer: SLMTokenizer, directory: str | Path, progress: Progress, length: int | None
    ) -> TokenShards:
        """Write shards of conversations, pairs or judged answers. Raises `UserError` as `prepare_chat` does."""
        options: dict[str, Any] = {"sources": self.descriptions, "progress": progress}
        if reads == "conversations":
            return write_conversations(self.conversations(tokenizer, length), tokenizer, directory, **options)
        read, write = (pairs_of, prepare_pairs) if reads == "pairs" else (judgements_of, prepare_judgements)
        items: Iterator[Any] = itertools.chain.from_iterable(read(source, tokenizer) for source in self.sources)
        return write(items, tokenizer, directory, **options)

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


def _is_plain(description: dict[str, Any]) -> bool:
    """Whether offsets in the text are offsets in the file."""
    return str(description["path"]).lower().endswith((*TEXT_KINDS, ".jsonl", ".json", ".csv", ".tsv"))
