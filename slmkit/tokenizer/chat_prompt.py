"""The prompt of a conversation that a model goes on with, and how its template writes the calls of tools."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from slmkit.tokenizer import chat


def prompt_of(
    template: str,
    messages: Sequence[chat.Message],
    tools: chat.Tools | None,
    names: Mapping[str, Any],
    *,
    begins: bool = True,
    continues: bool = False,
    switches: Mapping[str, Any] | None = None,
) -> str:
    """The conversation as text. `begins` appends the generation prompt; with `continues` the last message's text is the
    end. `names` and `switches` are further variables of the template.

    Other than `render` it leaves the order of roles to the template. Raises `UserError` for a user's or system message
    that the template would leave out, and else as `render` does.
    """
    names = {**names, **(switches or {})}
    for number, message in enumerate(messages, start=1):
        if message.get("tool_calls"):
            chat.check_calls(number, message["role"], message["tool_calls"])
    chat.check_nothing_is_dropped(template, messages, tools, names)
    plain = chat.plain(messages)
    said = plain[-1]["content"]
    if continues:  # a template may trim the text, or rewrite it
        plain[-1] = {**plain[-1], "content": chat.REPLY}
    text = chat.rendered(template, plain, begins, {**names, "tools": tools or None})
    for number, message in enumerate(plain, start=1):
        if message["role"] in ("system", "user") and message["content"].strip() not in text:
            what = f"the chat template does not render message {number}, of the role {message['role']}"
            raise chat.ConversationError(f"{what}: leave it out, or move it", chat.DROPPED)
    if not continues:
        return text
    before, found, _ = text.rpartition(chat.REPLY)
    if not found:
        raise chat.ConversationError(
            "the chat template does not render the last message, so it cannot be continued", chat.DROPPED
        )
    return before + said


@dataclass(frozen=True)
class CallFormat:
    """How a template writes an assistant's calls of tools: as JSON with two keys, between two texts."""

    before: str
    after: str
    name: str  # the keys
    arguments: str


@lru_cache(maxsize=64)
def call_format(template: str, names: tuple[tuple[str, str], ...]) -> CallFormat | None:
    """How the template writes calls, found with a sample; None if not as JSON after the generation prompt."""
    question, call, _ = chat.plain(chat.CHAT_FORMATS["probes"]["messages of the role tool"]["messages"])
    variables = {**dict(names), "tools": chat.CHAT_FORMATS["tools"]}
    try:
        prompt = chat.rendered(template, [question], True, variables)
        whole = chat.rendered(template, [question, call], False, variables)
    except chat.ConversationError:
        return None
    said = whole.removeprefix(prompt) if whole.startswith(prompt) else ""
    function = call["tool_calls"][0]["function"]
    start = said.rfind("{", 0, max(0, said.find(function["name"])))
    try:
        written, end = json.JSONDecoder().raw_decode(said, max(0, start))
        keys = {json.dumps(value): key for key, value in written.items()}
        return CallFormat(said[:start], said[end:], *(keys[json.dumps(function[key])] for key in ("name", "arguments")))
    except (ValueError, AttributeError, KeyError):
        return None
