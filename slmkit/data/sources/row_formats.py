"""What the rows of well-known data sets mean: which columns hold the text, or the conversation."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from slmkit.config import UserError, did_you_mean
from slmkit.data.source_settings import SourceSettings
from slmkit.data.sources.documents import Message
from slmkit.tokenizer.chat import EMPTY, ConversationError, check_messages

Row = dict[str, Any]
ROLES = {"human": "user", "gpt": "assistant"}  # of ShareGPT's `from`, where they are not ours
EXAMPLE = '{"role": …, "content": …}'


class RowError(ValueError):
    """A row that does not mean anything. `reason` is one of few, to count them by."""

    def __init__(self, message: str, reason: str = "not as expected") -> None:
        super().__init__(message)
        self.reason = reason


@dataclass(frozen=True)
class RowFormat:
    """The columns that a row must have, those that it may have, and what it means. `convert` raises `RowError`."""

    required: tuple[str, ...]
    convert: Callable[[Row], Any]
    optional: tuple[str, ...] = ()


RowFormats = dict[str, RowFormat]  # by name; the first one whose columns are there is meant


def text_formats(settings: SourceSettings) -> RowFormats:
    """From rows to text."""
    column = settings.text_column
    return those_named(
        settings.row_format,
        {
            "text": RowFormat((column,), lambda row: text_in(row, column)),
            # nampdn-ai/tiny-codes
            "prompt-response": RowFormat(
                ("prompt", "response"), lambda row: f"{text_in(row, 'prompt')}\n\n{text_in(row, 'response')}"
            ),
        },
    )


def chat_formats(settings: SourceSettings) -> RowFormats:
    """From rows to lists of messages, `{"role", "content"}`."""
    column = settings.messages_column
    return those_named(
        settings.row_format,
        {
            # HuggingFaceTB/smoltalk, allenai/tulu-3-sft-personas-code
            "messages": RowFormat((column,), lambda row: checked(messages_in(row, column))),
            # Open-Orca/SlimOrca, and whatever else is in the manner of ShareGPT
            "conversations": RowFormat(("conversations",), lambda row: checked(_conversations(row))),
            # tatsu-lab/alpaca
            "instruction": RowFormat(("instruction", "output"), lambda row: checked(_instruction(row)), ("input",)),
        },
    )


def find_format(formats: RowFormats, columns: Iterable[str]) -> RowFormat | None:
    """The first format whose columns are all there."""
    present = columns if isinstance(columns, dict) else set(columns)
    return next((found for found in formats.values() if all(column in present for column in found.required)), None)


def those_named(name: str | None, formats: RowFormats) -> RowFormats:
    if name is None:
        return formats
    if name not in formats:
        raise UserError(f"row_format {name!r}: {did_you_mean(name, formats)}")
    return {name: formats[name]}


def text_in(row: Row, column: str) -> str:
    value = row[column]
    if not isinstance(value, str):
        raise RowError(f"expected text in column {column!r}, found {type(value).__name__}")
    return value


def messages_in(row: Row, column: str) -> list[Message]:
    value = row[column]
    if not (isinstance(value, list) and value and all(isinstance(message, dict) for message in value)):
        found = f"a list of {len(value)}" if isinstance(value, list) else type(value).__name__
        raise RowError(f"expected in column {column!r} a list of messages such as {EXAMPLE}, found {found}")
    return value


def checked(messages: list[Message]) -> list[Message]:
    """The conversation, if it is one: public sets hold turns out of order and turns without a word.

    A system message without a word, of which they hold many, is none at all.
    """
    if len(messages) > 1 and messages[0].get("role") == "system" and not str(messages[0].get("content", "x")).strip():
        messages = messages[1:]
    try:
        check_messages(messages)
    except ConversationError as error:
        raise RowError(str(error), error.reason) from None
    for number, message in enumerate(messages, start=1):
        if not message["content"].strip():
            raise RowError(f"message {number}: the {message['role']} says nothing", EMPTY)
    return messages


def _conversations(row: Row) -> list[Message]:
    """A turn of weight 0 is not to be learned: its weight stays in its message."""
    messages = []
    for turn in messages_in(row, "conversations"):
        if not ("from" in turn and "value" in turn):
            raise RowError(f"expected turns with 'from' and 'value' in column 'conversations', found {list(turn)}")
        message = {"role": ROLES.get(turn["from"], turn["from"]), "content": turn["value"]}
        if turn.get("weight") is not None:
            message["weight"] = turn["weight"]
        messages.append(message)
    return messages


def _instruction(row: Row) -> list[Message]:
    asked = text_in(row, "instruction")
    if row.get("input"):
        asked = f"{asked}\n\n{text_in(row, 'input')}"
    return [{"role": "user", "content": asked}, {"role": "assistant", "content": text_in(row, "output")}]
