"""Prompts from a file, one a line, and those that exceed a model's context."""

from __future__ import annotations

import json
import re
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from slmkit.config import UserError, one_line

if TYPE_CHECKING:
    from slmkit.generation.engine import Engine, Event, Request
    from slmkit.tokenizer import SLMTokenizer

# The beginning of a list of objects or texts, or the first line of one of several lines.
JSON_LIST = re.compile(r'\s*\[\s*(\{|$|\]\s*$|"(?:[^"\\]|\\.)*"\s*(,|\]|$))')
Messages = list[dict[str, str]]
Row = dict[str, Any]  # {"prompt": text} or {"messages": […]}, with any further keys


def read_prompts(lines: Iterable[str], name: str) -> Iterator[tuple[str, Row]]:
    """The prompts of a file, with their places (`FILE:LINE`). Empty lines are skipped.

    If the first begins with `{`, each line is a JSON object with a `prompt` or `messages`; else each is a prompt.
    Raises `UserError` for another line, for a list in JSON, and for a file without prompts.
    """
    is_json = None
    for number, line in enumerate(lines, 1):
        text, place = line.rstrip("\r\n"), f"{name}:{number}"
        if not text.strip():
            continue
        if is_json is None:
            is_json = text.lstrip().startswith("{")
            if JSON_LIST.match(text):
                raise UserError(f'{place}: a JSON list: expected one object a line, as {{"prompt": "…"}}')
        yield place, _checked(text, place) if is_json else {"prompt": text}
    if is_json is None:
        raise UserError(f"{name}: there is no prompt in it")


def _checked(line: str, place: str) -> Row:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{place}: not a JSON object, as the first line is: {one_line(error)}") from None
    if not isinstance(row, dict) or isinstance(row.get("prompt"), str) == isinstance(row.get("messages"), list):
        raise UserError(f'{place}: expected {{"prompt": "…"}} or {{"messages": […]}}')
    try:
        json.dumps(row, ensure_ascii=False).encode()
    except (UnicodeEncodeError, RecursionError) as error:
        raise UserError(f"{place}: not text: {one_line(error)}") from None
    return row


def encode_row(tokenizer: SLMTokenizer, row: Row) -> list[int]:
    """The ids [prompt] of a row. Raises `UserError` for messages that are no conversation."""
    if "prompt" in row:
        return tokenizer.encode_prompt(row["prompt"])
    return tokenizer.encode_chat(row["messages"], add_generation_prompt=True).ids


def crop_row(tokenizer: SLMTokenizer, row: Row, context: int, new: int) -> list[int]:
    """The ids [prompt] of a row without its first tokens or oldest messages, as few as leave room for `new` tokens.

    At least half of the context stays for the prompt. The tokenizer's own beginning and a system message stay too.
    Raises `UserError` for a last message that is too long by itself.
    """
    room = min(new, context // 2)
    if "messages" in row:
        return messages_that_fit(tokenizer, row["messages"], context, room)[1]
    beginning, ids = tokenizer.beginning, tokenizer.encode(row["prompt"])
    return [*beginning, *ids[-(context - room - len(beginning)) :]]


def messages_that_fit(
    tokenizer: SLMTokenizer, messages: Messages, context: int, room: int
) -> tuple[Messages, list[int]]:
    """The messages without the oldest exchanges, as few as leave `room` tokens in the context, and their ids [prompt].

    Raises `UserError` if the last message alone leaves less.
    """
    beginning = beginning_of(messages)
    ids: list[int] = []
    for oldest in range(len(beginning), len(messages), 2):
        kept = beginning + messages[oldest:]
        ids = tokenizer.encode_chat(kept, add_generation_prompt=True).ids
        if len(ids) + room <= context:
            return kept, ids
    what = "a shorter message or system message" if beginning else "a shorter message"
    raise UserError(f"{len(ids)} tokens leave no room for an answer in a context of {context}: write {what}")


def beginning_of(messages: Messages) -> Messages:
    """The system message, if there is one."""
    return [message for message in messages[:1] if message["role"] == "system"]


def in_order(engine: Engine, requests: Sequence[Request]) -> Iterator[tuple[int, Event]]:
    """Generates all texts together, and yields one after the other: the number of a request, and an event of a row.

    Raises `UserError` at the call, before any text, for a request that the engine refuses.
    """
    return _in_order(engine, requests, {engine.insert(request): number for number, request in enumerate(requests)})


def _in_order(engine: Engine, requests: Sequence[Request], numbers: dict[int, int]) -> Iterator[tuple[int, Event]]:
    waiting: dict[tuple[int, int], deque[Event]] = {
        (handle, index): deque() for handle, number in numbers.items() for index in range(requests[number].n)
    }
    for (handle, _), events in waiting.items():
        is_ended = False
        while not is_ended:
            while not events:
                for event in engine.step():
                    waiting[event.handle, event.index].append(event)
            event = events.popleft()
            is_ended = event.finish_reason is not None
            yield numbers[handle], event
