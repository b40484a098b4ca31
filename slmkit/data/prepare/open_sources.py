"""Opens a recipe's sources: training data, validation data, and text for a tokenizer; reads several in order."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from slmkit.config import UserError
from slmkit.data.prepare.held_out import Survey, is_held_out
from slmkit.data.settings import DataSettings, Reads, TokenizerSettings
from slmkit.data.shards.reader import HEADER
from slmkit.data.sources import BUILT_IN, Source, open_source, open_together
from slmkit.data.sources.files import TEXT_KINDS
from slmkit.data.sources.settings import SourceSettings

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
        paths = data.source if isinstance(data.source, list) else [settings.path]
        each = [settings.model_copy(update={**changes, "path": path}) for path in paths]
        opened[settings.label] = open_together(each, seed)
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


def share_read(source: Source, described: Sequence[dict[str, Any]]) -> float | None:
    """The share of all bytes read so far, 0 to 1; None if sizes are unknown: compressed, remote or endless.

    `described`: its `describe()`.
    """
    plain = (*TEXT_KINDS, ".jsonl", ".json", ".csv", ".tsv")  # their offsets are those of the text
    sizes = [one.get("bytes") if str(one["path"]).lower().endswith(plain) else None for one in described]
    known = [size for size in sizes if size is not None]
    if len(known) < len(sizes):
        return None
    done = sum(known[: source.position["file"]]) + source.position.get("offset", 0)
    return done / max(1, sum(known))
