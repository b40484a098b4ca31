"""Opens a recipe's sources: training data, held-out data, and text for a tokenizer."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slmkit.config import UserError
from slmkit.data.prepare.conversations import ConversationEncoder, EncodedConversation
from slmkit.data.settings import DataSettings, TokenizerSettings
from slmkit.data.shards.reader import HEADER
from slmkit.data.sources import BUILT_IN, BadRow, Document, Message, Source, open_source, tools_of
from slmkit.data.sources.documents import Judged, Pair
from slmkit.data.sources.settings import SourceSettings
from slmkit.data.streaming.blocks import is_held_out
from slmkit.tokenizer.chat import ConversationError

if TYPE_CHECKING:
    from slmkit.tokenizer import SLMTokenizer

EncoderOf = Callable[[Source], ConversationEncoder]

TOKENIZER_CHARACTERS = 100_000_000  # limit of training text: more changes the merges little and takes memory
VALIDATION_STREAM = 1_000_003  # added to the seed: stories that no training stream of a nearby seed has


def is_shards(settings: SourceSettings) -> bool:
    """Whether its path is a directory of token shards, as written by `slm data prepare`."""
    return (Path(settings.path) / HEADER).is_file()


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
        opened[name] = Source(first.settings, parts, first.patience, found)
    return opened


def documents_of(source: Source) -> Iterator[Document]:
    """All documents, from the beginning; resets the counts of skipped rows."""
    source.count_anew()
    return (document for document, _ in source.read())


def conversations_of(source: Source) -> Iterator[list[Message]]:
    """All conversations, from the beginning; resets the counts of skipped rows."""
    source.count_anew()
    return (conversation for conversation, _ in source.read_conversations())


def encoded_of(source: Source, encoder_of: EncoderOf) -> Iterator[EncodedConversation]:
    """All conversations of a source, encoded; those left out are counted with it."""
    source.count_anew()
    return encoder_of(source).encode_all(row for row, _ in source.read_conversation_rows())


def pairs_of(source: Source, tokenizer: SLMTokenizer) -> Iterator[Pair]:
    """All pairs, as `documents_of`; those that the chat template refuses are left out and counted."""
    source.count_anew()
    for pair, _ in source.read_pairs():
        if _can_be_rendered(pair.sides, pair.place, source, tokenizer):
            yield pair


def judgements_of(source: Source, tokenizer: SLMTokenizer) -> Iterator[Judged]:
    """All judged answers, as `pairs_of`."""
    source.count_anew()
    for judged, _ in source.read_judgements():
        if _can_be_rendered([judged.messages], judged.place, source, tokenizer):
            yield judged


def questions_of(source: Source, tokenizer: SLMTokenizer) -> Iterator[list[Message]]:
    """All questions, as `pairs_of`."""
    source.count_anew()
    for question, _ in source.read_questions():
        if _can_be_rendered([question], getattr(question, "place", ""), source, tokenizer):
            yield question


def _can_be_rendered(
    conversations: Iterable[list[Message]], place: str, source: Source, tokenizer: SLMTokenizer
) -> bool:
    try:
        for conversation in conversations:
            tokenizer.render_chat(conversation, tools=tools_of(conversation))
    except ConversationError as error:
        source.leave_out(BadRow(error.reason, f"{place}: {error}"))
        return False
    return True


def validation_source(data: DataSettings, settings: SourceSettings, seed: int) -> Source:
    """The source of validation text alone, limited to `validation_documents` documents."""
    limit = min(settings.documents or data.validation_documents, data.validation_documents)
    changes = {"streaming": settings.streaming or data.streaming, "documents": limit}
    return open_source(settings.model_copy(update=changes), seed + VALIDATION_STREAM, held_out=True)


def held_out_of_streams(data: DataSettings, seed: int, encoder_of: EncoderOf | None = None) -> Iterator[Any]:
    """Validation items that streamed training leaves out: `validation_documents` in all, as many from every source.

    They are documents, or with `encoder_of` encoded conversations.

    Raises `UserError` for a source of which nothing is held out.
    """
    sources = open_sources(data, seed)
    count = -(-data.validation_documents // len(sources))
    for name, source in sources.items():
        if is_endless(source):
            source = validation_source(data.model_copy(update={"validation_documents": count}), source.settings, seed)
            yield from documents_of(source) if encoder_of is None else encoded_of(source, encoder_of)
            continue
        found = 0
        picked: Iterable[Any]
        if encoder_of is None:
            picked = _held_out_documents(documents_of(source), data.validation_fraction)
        else:
            chosen = (one for one in conversations_of(source) if is_held_out(written(one), data.validation_fraction))
            encoder = encoder_of(source)  # one at a time, since few of a long stream are needed
            picked = (encoded for one in chosen for encoded in encoder.encode_all([one]))
        for item in picked:
            yield item
            found += item.ends if isinstance(item, Document) else 1
            if found == count:
                break
        if not found:
            raise UserError(
                f"{name}: no document was held out for validation; raise data.validation_fraction, or name "
                "a source of its own as data.validation"
            )


def is_kept_in(data: DataSettings, source: Source) -> Callable[[str], bool]:
    """A function that tells, from a document's text or first piece, whether streamed training uses it."""
    if data.validation is not None or is_endless(source):
        return lambda text: True
    return lambda text: not is_held_out(text, data.validation_fraction)


def is_endless(source: Source) -> bool:
    """Whether it is the built-in corpus, which generates other text for validation."""
    return source.settings.path in BUILT_IN


def written(conversation: list[Message]) -> str:
    """The conversation as a string, to be hashed."""
    return json.dumps(conversation, sort_keys=True)


def tokenizer_sample(conversations: bool, data: DataSettings, wanted: TokenizerSettings, seed: int) -> Iterator[str]:
    """Text for a tokenizer, an equal number of documents or characters from every source, read lazily.

    Raises `UserError` if all sources are shards.
    """
    sources = open_sources(data, seed)
    if not sources:
        raise UserError("tokenizer.path is needed, since the sources are token shards: name the tokenizer they are of")
    for source in sources.values():
        texts = _texts_of_conversations(source) if conversations else documents_of(source)
        left, characters = wanted.documents_per_source, TOKENIZER_CHARACTERS // len(sources)
        for text, ends, *_ in texts:
            yield text
            characters -= len(text)
            left = None if left is None else left - ends
            if characters <= 0 or left == 0:
                break


def _texts_of_conversations(source: Source) -> Iterator[tuple[str, bool]]:
    """The content of each message, and whether it is the conversation's last."""
    for conversation in conversations_of(source):
        said = [message["content"] for message in conversation if isinstance(message.get("content"), str)]
        yield from zip(said, itertools.chain(itertools.repeat(False, len(said) - 1), [True]))


def _held_out_documents(documents: Iterable[Document], fraction: float) -> Iterator[Document]:
    begins, is_chosen = True, False
    for document in documents:
        is_chosen = is_held_out(document.text, fraction) if begins else is_chosen
        begins = document.ends
        if is_chosen:
            yield document
