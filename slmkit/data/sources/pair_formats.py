"""What the rows of public preference sets mean: a question, the better answer and the worse one."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

from slmkit.data.source_settings import SourceSettings
from slmkit.data.sources.documents import Message
from slmkit.data.sources.row_formats import (
    Row,
    RowError,
    RowFormat,
    RowFormats,
    chat_formats,
    checked,
    messages_in,
    text_in,
    those_named,
)


class Pair(NamedTuple):
    """Two conversations that begin alike, for `shared` messages; the better one first. `place` is where it was read."""

    chosen: list[Message]
    rejected: list[Message]
    shared: int
    place: str = ""

    @property
    def sides(self) -> tuple[list[Message], list[Message]]:
        return self.chosen, self.rejected


class Judged(NamedTuple):
    """A conversation whose last answer was judged good (`label` True) or bad. `place` is where it was read."""

    messages: list[Message]
    label: bool
    place: str = ""


def pair_of(chosen: list[Message], rejected: list[Message]) -> Pair:
    """Raises `RowError` where the two do not answer one question, or say the same."""
    shared = 0
    for better, worse in zip(chosen, rejected):
        if (better["role"], better["content"]) != (worse["role"], worse["content"]):
            break
        shared += 1
    if shared == len(chosen) == len(rejected):
        raise RowError("chosen and rejected are the same")
    if not any(message["role"] == "user" for message in chosen[:shared]):
        raise RowError("chosen and rejected do not answer the same question")
    for name, conversation in (("chosen", chosen), ("rejected", rejected)):
        if len(conversation) == shared or conversation[-1]["role"] != "assistant":
            raise RowError(f"{name} does not end with an answer of the assistant's")
    return Pair(chosen, rejected, shared)


def pair_formats(settings: SourceSettings) -> RowFormats:
    """From rows to pairs.

    `chosen` and `rejected` are texts or messages, behind a `prompt` that is a text or messages; or whole conversations
    (HuggingFaceH4/ultrafeedback_binarized, mlabonne/orpo-dpo-mix-40k, trl's explicit and implicit prompts).
    """
    return those_named(
        settings.row_format,
        {
            "preference": RowFormat(("prompt", "chosen", "rejected"), _pair, ("system",)),
            # Intel/orca_dpo_pairs
            "question": RowFormat(("question", "chosen", "rejected"), _pair, ("system",)),
            "conversations": RowFormat(("chosen", "rejected"), _pair),
        },
    )


def _pair(row: Row) -> Pair:
    before = _before(row)
    return pair_of(_conversation(row, "chosen", before), _conversation(row, "rejected", before))


def _before(row: Row) -> list[Message]:
    """What both answers follow; nothing where they are whole conversations."""
    name = "question" if "question" in row else "prompt"
    if row.get(name) is None:
        return []
    if isinstance(row[name], list):
        return messages_in(row, name)
    system = [{"role": "system", "content": text_in(row, "system")}] if row.get("system") else []
    return [*system, {"role": "user", "content": text_in(row, name)}]


def _conversation(row: Row, column: str, before: list[Message]) -> list[Message]:
    value: Any = row[column]
    if isinstance(value, str):
        messages = [*before, {"role": "assistant", "content": value}]
    else:
        messages = messages_in(row, column)
        if messages[0].get("role") == "assistant":
            messages = [*before, *messages]
    try:
        return checked(messages)
    except RowError as error:
        raise RowError(f"{column}: {error}", error.reason) from None


def kto_formats(settings: SourceSettings) -> RowFormats:
    """From rows to judged answers: a conversation in any format of `chat_formats`, or `prompt` and `completion`.

    Its label is a bool in a column `label` (trl) or `kto_tag` (LLaMA-Factory).
    """
    spoken = {
        **chat_formats(settings),
        "prompt-completion": RowFormat(("prompt", "completion"), _prompted, ("system",)),
    }
    return those_named(
        settings.row_format,
        {
            name if label == "label" else f"{name}-{label}": RowFormat(
                (*found.required, label),
                functools.partial(_judged, convert=found.convert, column=label),
                found.optional,
            )
            for label in ("label", "kto_tag")
            for name, found in spoken.items()
        },
    )


def _judged(row: Row, convert: Callable[[Row], list[Message]], column: str) -> Judged:
    if not isinstance(row[column], bool):
        raise RowError(f"expected true or false in column {column!r}, found {type(row[column]).__name__}")
    messages = convert(row)
    if messages[-1]["role"] != "assistant":
        raise RowError("the conversation does not end with an answer of the assistant's")
    return Judged(messages, row[column])


def _prompted(row: Row) -> list[Message]:
    return _conversation(row, "completion", _before(row))
