"""From the `data` and `tokenizer` sections of a recipe to a tokenizer and token shards, in a folder of the run."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from pydantic import Field

from slmkit.config import Settings, UserError
from slmkit.data import stories
from slmkit.data.prepare import Progress, prepare_chat, prepare_text, split_conversations, split_validation
from slmkit.data.shards import TokenShards
from slmkit.data.sources import Document, Message, describe_sources, read_conversations, read_documents
from slmkit.tokenizer import SLMTokenizer

STORIES, PRIMER = "stories", "primer"  # the sources that name the built-in corpus
VALIDATION_STREAM = 1_000_003  # added to the seed: stories that no training stream of a nearby seed holds
REVISION_STREAM = 500_009  # added to the seed: the primer's texts that go among the stories
# The stories are made to be talked about: what the chat template says at each turn should be few tokens.
CHAT_WORDS = ("user\n", "assistant\n", "Tell me a story about")
TOKENIZER_CHARACTERS = 100_000_000  # merges are learned from so much text at most; more changes little and takes memory


class TokenizerSettings(Settings):
    """A tokenizer that exists, or the size of one to train on the run's own text."""

    path: str | None = None
    vocab_size: int = Field(16_384, ge=260)


class DataSettings(Settings):
    """Where text comes from: files and folders, or the built-in corpus: `stories`, and the `primer` to read first."""

    source: str | list[str] | None = None
    text_column: str = "text"
    messages_column: str = "messages"
    validation_fraction: float = Field(0.05, gt=0, lt=1)  # of files; held out of training
    separate_documents: bool = False  # attention and positions are kept inside each
    documents: int = Field(20_000, gt=0)  # of the built-in corpus, like the next two
    primer_documents: int = Field(0, ge=0)  # spread among the stories, so that they do not make the primer forgotten
    validation_documents: int = Field(300, gt=0)

    @property
    def is_built_in(self) -> bool:
        return self.source in (STORIES, PRIMER)

    def files(self) -> str | list[str]:
        """Raises `UserError` where no source is set."""
        if not self.source:
            raise UserError("data.source says where text comes from: name your file or folder, `stories` or `primer`")
        return self.source


class Reporter(Protocol):
    """Where progress goes."""

    def say(self, line: str) -> None: ...

    def counter(self, label: str) -> Progress: ...


@dataclass(frozen=True)
class Corpus:
    """What a run trains on and is measured by."""

    tokenizer: SLMTokenizer
    train: TokenShards
    validation: TokenShards

    def describe(self) -> dict[str, Any]:
        """What was read, so that a repeated run can tell whether it reads the same."""
        return {
            "tokenizer": self.tokenizer.fingerprint,
            "sources": self.train.header.sources,
            "train": _counts(self.train),
            "validation": _counts(self.validation),
        }


def build_corpus(
    objective: str,
    data: DataSettings,
    wanted: TokenizerSettings,
    seed: int,
    folder: Path,
    tokenizer: SLMTokenizer | None,
    reporter: Reporter,
) -> Corpus:
    """Prepare everything in `folder`; a tokenizer is loaded or trained unless one is given (with a model to train on).

    Raises `UserError` for whatever is wrong with the sources.
    """
    if tokenizer is None and wanted.path is not None:
        tokenizer = SLMTokenizer.from_pretrained(wanted.path)
    if tokenizer is None:
        tokenizer = SLMTokenizer(wanted.vocab_size)
        tokenizer.train(_sample(texts_of(objective, data, seed)))
        reporter.say(f"tokenizer: {len(tokenizer):,} tokens")
    tokenizer.save_pretrained(folder / "tokenizer")
    prepare = _prepare_conversations if objective == "sft" else _prepare_documents
    train, validation = prepare(data, seed, folder, tokenizer, reporter)
    return Corpus(tokenizer, train, validation)


def open_corpus(folder: Path) -> Corpus:
    """What `build_corpus` left there. Raises `UserError` where it is incomplete, damaged or mixed up."""
    tokenizer = SLMTokenizer.from_pretrained(folder / "tokenizer")
    train, validation = TokenShards.open(folder / "train"), TokenShards.open(folder / "validation")
    for shards in (train, validation):
        shards.check_tokenizer(tokenizer)
    return Corpus(tokenizer, train, validation)


def texts_of(objective: str, data: DataSettings, seed: int = 0) -> Iterator[str]:
    """All the training text of a source, for a tokenizer to learn from."""
    if objective == "sft":
        for conversation in _all_conversations(data, seed):
            yield from (message["content"] for message in conversation if isinstance(message.get("content"), str))
    elif data.is_built_in:  # a model goes from the one to the other, and to conversations: one tokenizer for all
        yield from (story.text for story in stories.tell_many(seed, data.documents))
        yield from stories.primer_texts(seed, data.documents)
        yield from CHAT_WORDS * (data.documents // 10)
    else:
        yield from (document.text for document in read_documents(data.files(), data.text_column))


def _sample(texts: Iterable[str]) -> Iterator[str]:
    left = TOKENIZER_CHARACTERS
    for text in texts:
        yield text
        left -= len(text)
        if left <= 0:
            return


def _prepare_documents(
    data: DataSettings, seed: int, folder: Path, tokenizer: SLMTokenizer, reporter: Reporter
) -> tuple[TokenShards, TokenShards]:
    train: Iterable[Document | str]
    validation: Iterable[Document | str]
    perfect_loss = None
    if data.source == PRIMER:
        train = stories.primer_texts(seed, data.documents)
        validation = stories.primer_texts(seed + VALIDATION_STREAM, data.validation_documents)
        sources = [_built_in(PRIMER, seed)]
    elif data.source == STORIES:
        train = _stories_and_primer(data, seed)
        held_out = list(stories.tell_many(seed + VALIDATION_STREAM, data.validation_documents))
        validation = [story.text for story in held_out]
        # Every document is its tokens and one end-of-text token, and the generator knows the probability of it all.
        tokens = sum(len(ids) + 1 for ids in tokenizer.encode_batch([story.text for story in held_out]))
        perfect_loss = -sum(story.log_probability for story in held_out) / tokens
        sources = [_built_in(STORIES, seed)]
    else:
        files = data.files()
        train, validation = split_validation(lambda: read_documents(files, data.text_column), data.validation_fraction)
        sources = describe_sources(files)
    return (
        prepare_text(train, tokenizer, folder / "train", sources=sources, progress=reporter.counter("tokenizing")),
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
    data: DataSettings, seed: int, folder: Path, tokenizer: SLMTokenizer, reporter: Reporter
) -> tuple[TokenShards, TokenShards]:
    train: Iterable[list[Message]]
    validation: Iterable[list[Message]]
    if data.is_built_in:
        train = _all_conversations(data, seed)
        validation = (stories.conversation(seed + VALIDATION_STREAM, i) for i in range(data.validation_documents))
        sources = [_built_in(STORIES, seed)]
    else:
        train, validation = split_conversations(list(_all_conversations(data, seed)), data.validation_fraction)
        sources = describe_sources(data.files())
    return (
        prepare_chat(train, tokenizer, folder / "train", sources=sources, progress=reporter.counter("tokenizing")),
        prepare_chat(validation, tokenizer, folder / "validation", sources=sources),
    )


def _all_conversations(data: DataSettings, seed: int) -> Iterator[list[Message]]:
    if data.is_built_in:
        return (stories.conversation(seed, index) for index in range(data.documents))
    return read_conversations(data.files(), data.messages_column)


def _built_in(name: str, seed: int) -> dict[str, Any]:
    return {"path": name, "seed": seed}


def _counts(shards: TokenShards) -> dict[str, Any]:
    header = shards.header
    return {"documents": header.documents, "tokens": header.tokens, "text_bytes": header.text_bytes}
