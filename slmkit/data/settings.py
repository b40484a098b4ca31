"""The `data` and `tokenizer` sections of a recipe."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from slmkit.config import Settings, UserError, load_settings
from slmkit.data.mixture import PhaseSettings, WhenExhausted, plan_phases
from slmkit.data.sources.settings import Columns, OnLong, SourceSettings

# What a run makes of its sources. A question is a conversation that ends with the right answer; a pair has a better one
# and a worse one; a judgement has one that is labelled good or bad.
Reads = Literal["text", "conversations", "questions", "pairs", "judgements"]


class TokenizerSettings(Settings):
    """An existing tokenizer, or the size of one to train on the run's own text, equal amounts from every source.

    Tokens and templates named here are added to it, also to that of `model.path`, whose embeddings then grow.
    """

    path: str | None = None  # a tokenizer, model or run directory
    vocab_size: int = Field(16_384, ge=260)  # size of a tokenizer that is trained; 260: only bytes
    # documents to train it on; None: an equal share of 100 million characters
    documents_per_source: int | None = Field(None, gt=0)
    chat_template: str | None = None  # chatml, llama3, gemma or a Jinja file; None: the tokenizer's own
    added_tokens: list[str] = Field(default_factory=list)  # words that get a token of their own in any text
    additional_special_tokens: list[str] = Field(default_factory=list)  # tokens that only a chat template can write

    @property
    def extensions(self) -> dict[str, Any]:
        """The settings for `SLMTokenizer.extended`; empty if nothing is to be added."""
        names = ("chat_template", "added_tokens", "additional_special_tokens")
        return {name: value for name in names if (value := getattr(self, name))}


class CleaningSettings(Settings):
    """Which documents are left out. The first of several copies is kept."""

    exact_duplicates: bool = False  # leave out copies
    # leave out near copies: this share of 5-word sequences in common; 0.8 is usual
    near_duplicates: float | None = Field(None, ge=0.5, le=0.95)
    min_characters: int | None = Field(None, gt=0)  # leave out shorter documents
    max_characters: int | None = Field(None, gt=0)  # leave out longer documents
    min_words: int | None = Field(None, gt=0)  # leave out documents of fewer words
    max_words: int | None = Field(None, gt=0)  # leave out documents of more words
    scripts: list[str] = Field([])  # scripts that documents may use, by Unicode name, such as Latin or Cyrillic
    min_script_share: float = Field(0.9, gt=0, le=1)  # the smallest share of letters of these scripts
    # the smallest share of letters among characters that are not white space
    min_letter_share: float | None = Field(None, gt=0, le=1)
    evaluation: list[str] = Field([])  # files of text that a model will be tested on
    evaluation_words: int = Field(13, gt=0)  # leave out documents with this many consecutive words from `evaluation`

    @property
    def is_active(self) -> bool:
        asked = self.model_dump(exclude={"min_script_share", "evaluation_words"})
        return any(asked.values())


class DataSettings(Settings):
    """Where text comes from, with which weights, and how it is read.

    `source` is files and folders, or a built-in corpus: `stories`, `primer` (read before the stories) or `sums`;
    `medium-stories`, `medium-primer`, `small-stories` and `small-primer` are of smaller worlds, with a third and a
    tenth of the words and plots.
    `sources` are several, with weights; `phases` changes the weights by tokens seen: a curriculum. `streaming` reads
    while training and does not store the training data.
    """

    source: str | list[str] | None = None  # a file, folder, URL or hub data set, or several; or stories, primer, sums
    sources: list[SourceSettings] = Field(default_factory=list)  # several sources, each with its own settings
    phases: list[PhaseSettings] = Field(default_factory=list)  # weights of the sources that change during the run
    # at a source's end: read it again, stop the run, or give its weight to the others
    when_exhausted: WhenExhausted = "repeat"
    streaming: bool = False  # read while training and store nothing
    shuffle_buffer: int = Field(0, ge=0)  # documents of a stream that are shuffled together; 0: no shuffling
    # which documents are left out when shards are written
    cleaning: CleaningSettings = Field(default_factory=CleaningSettings)
    text_column: str | None = None  # column of `source` with the text; each of `sources` has its own key
    messages_column: str | None = None  # column of `source` with the conversation
    # renames columns, such as {prompt: question, completion: answer}
    columns: Columns = Field(default_factory=dict, validate_default=True)
    # text between the documents of a file; None: lines of <|endoftext|>
    separator: str | None = Field(None, min_length=1)
    on_bad_row: Literal["refuse", "skip"] = "refuse"  # stop at a row that cannot be read, or leave it out and count it
    on_long_conversation: OnLong = "cut"  # what happens to conversations longer than a row; they are also counted
    # a source of validation text, such as a split; None: a part of the sources is held out
    validation: SourceSettings | None = None
    # the share of files and streams that is held out for validation
    validation_fraction: float = Field(0.05, gt=0, lt=1)
    separate_documents: bool = False  # attention and positions do not cross the borders of documents
    documents: int = Field(20_000, gt=0)  # documents of the built-in corpus
    # scenes and further stories, with questions, that are mixed into the stories: they teach to look back in the text
    primer_documents: int = Field(0, ge=0)
    # validation documents of the built-in corpus, of streams and of `validation`
    validation_documents: int = Field(300, gt=0)

    @model_validator(mode="after")
    def _sources_and_phases_agree(self) -> DataSettings:
        if self.source and self.sources:
            raise ValueError("source and sources both say where text comes from: keep one")
        labels = [source.label for source in self.sources]
        twice = next((label for label in labels if labels.count(label) > 1), None)
        if twice is not None:
            raise ValueError(f"two sources are called {twice!r}: give each a name of its own")
        if self.streaming and isinstance(self.source, list):
            raise ValueError("streaming needs one source, or a list of data.sources, each with its path")
        if self.streaming and self.cleaning.is_active:
            raise ValueError("cleaning needs to read everything first: drop it, or drop streaming")
        if self.phases:
            try:
                plan_phases(self.phases, self.weights, length=1)
            except UserError as error:
                raise ValueError(str(error)) from None
        return self

    @classmethod
    def of_paths(cls, paths: list[str], text_column: str | None = None) -> DataSettings:
        """Settings for streaming one source, or several of equal weight. Raises `UserError` if one occurs twice."""
        if len(paths) == 1:
            return cls(source=paths[0], text_column=text_column, streaming=True)
        sources = [{"path": path, "text_column": text_column} for path in paths]
        return load_settings(cls, {"sources": sources, "streaming": True})

    @property
    def is_built_in(self) -> bool:
        """Whether all text is from the built-in corpus."""
        from slmkit.data.sources import BUILT_IN  # a late import: it loads the stories' words

        return self.source in [*BUILT_IN]

    @property
    def weights(self) -> dict[str, float]:
        """The weight of each source by name, in order."""
        return {settings.label: settings.weight for settings in self.all_sources()}

    def all_sources(self) -> list[SourceSettings]:
        """All sources; a `source` of several paths is one, named by its first. Raises `UserError` if none is set."""
        if self.sources:
            return self.sources
        if not self.source:
            raise UserError(
                "data.source says where text comes from: name your file or folder, a data set of the hub, `stories` or "
                "`primer`; several with weights go into data.sources"
            )
        path = self.source if isinstance(self.source, str) else self.source[0]
        names = ("text_column", "messages_column", "columns", "separator", "on_bad_row")
        return [SourceSettings(path=path, **{name: getattr(self, name) for name in names})]
