"""Settings of one source of text."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator, Field, ValidationInfo

from slmkit.config import Settings

OnLong = Literal["cut", "skip", "refuse"]  # what to do with a conversation longer than a row


def _named_once(columns: dict[str, str], info: ValidationInfo) -> dict[str, str]:
    """The columns. Raises `ValueError` if one is named twice, also by `text_column` or `messages_column`."""
    given = {ours: info.data.get(f"{ours}_column") for ours in ("text", "messages")}
    for ours, column in given.items():
        if column is not None and ours in columns:
            raise ValueError(f"{ours}_column and columns both name the column of {ours}: keep one")
    named = [*columns.values(), *filter(None, given.values())]
    if twice := next((column for column in named if named.count(column) > 1), None):
        raise ValueError(f"column {twice!r} is named twice: keep one")
    return columns


Columns = Annotated[dict[str, str], AfterValidator(_named_once)]


class SourceSettings(Settings):
    """Where text comes from, which part of it is read, and what happens to rows that cannot be read.

    `path` is a file or folder, a URL (`s3://`, `gs://`, `hf://`, `http://`, `https://`, any that `fsspec` knows), a
    data set of the Hugging Face hub as `owner/name`, or built in: `stories`, `primer`, `sums`, and the
    first two of smaller worlds, as `small-stories`.
    """

    path: str = Field(min_length=1)  # as above
    name: str | None = None  # its name in logs; None: made from the path
    weight: float = Field(1.0, gt=0)  # its share of a mixture, relative to the others'
    config: str | None = None  # configuration of a hub data set that has several, such as `sample-10BT`
    revision: str | None = None  # commit of a hub data set, so that a resumed run reads the same data
    split: str = "train"  # split of a hub data set, or of a folder laid out like one
    text_column: str | None = None  # the same as columns: {text: …}
    messages_column: str | None = None  # the same as columns: {messages: …}
    columns: Columns = Field(
        default_factory=dict, validate_default=True
    )  # renames columns, such as {prompt: question, completion: answer}
    # text between the documents of a file; None: lines of <|endoftext|>
    separator: str | None = Field(None, min_length=1)
    row_format: str | None = None  # how rows become text or messages; None: decided by their columns
    streaming: bool = False  # hub data sets: read over the network and store nothing; else files are downloaded once
    documents: int | None = Field(None, gt=0)  # read at most this many documents
    on_bad_row: Literal["refuse", "skip"] = "refuse"  # stop at a row that cannot be read, or leave it out and count it
    retry_for: float = Field(3600.0, ge=0)  # seconds without any document after which reading over the network fails

    @property
    def mapping(self) -> dict[str, str]:
        """Columns that the user named, each of them required: our name → theirs."""
        named = {"text": self.text_column, "messages": self.messages_column}
        return self.columns | {ours: theirs for ours, theirs in named.items() if theirs is not None}

    @property
    def label(self) -> str:
        return self.name or self.path.rstrip("/").rsplit("://", 1)[-1]
