"""A chat template as fixed text around the messages, for programs that have no Jinja: the HTML page, Ollama."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from types import MappingProxyType
from typing import Any

from slmkit.config import UserError
from slmkit.tokenizer.chat import ConversationError, Message
from slmkit.tokenizer.tokenizer import SLMTokenizer

# Texts of messages: of several scripts and lines, with white space at the ends, and with what other formats mean
# something by. The templates' own tags are left out.
TEXTS = (
    "Xyzzy", "Where is the cat?", " two\n\nparagraphs, and a space ", "\n\tindented\n", "Où sont les élèves? 猫は海 🐈",
    '{"name": "x", "arguments": {}}', "{{ user }} {% if %} {# no #}", "```python\nprint('1')\n```", "a <b>c</b> & 'd'",
    "user: hello\nassistant: no", "12", "word " * 300,
)  # fmt: skip
THOUGHT = "<think>\nxyzzy_thought\n</think>\n\n"
DATE = "xyzzy_date"
ROLES = ("system", "user", "assistant", "user")
MARKS = ("xyzzy0", "xyzzy1", "xyzzy2", "xyzzy3")


@dataclass(frozen=True)
class ChatPieces:
    """The text that a template writes before, between and after the messages of a prompt that a model answers.

    `between` is by the roles of the message before and the one after: ">user" before a first message of the user,
    "user>assistant" between two, "user>" after the last one, with the generation prompt. The keys are ">user", "user>",
    "user>assistant", "assistant>user", and ">system", "system>user" unless the template takes no system message.
    """

    between: Mapping[str, str]
    trimmed: frozenset[str]  # roles whose messages lose the white space at their ends
    drops_thinking: bool  # the reasoning (<think>…</think>) at the beginning of the assistant's messages is left out
    dated: bool  # the template writes the date; it is that of today

    def render(self, messages: Sequence[Message]) -> str:
        """The prompt of messages without tools: system (if any), then user and assistant in turn, the user's last."""
        text, before = "", ""
        for message in messages:
            role, content = message["role"], message["content"]
            if self.drops_thinking and role == "assistant":
                content = content.rpartition("</think>")[2].lstrip("\n") if "</think>" in content else content
            text += self.between[f"{before}>{role}"] + (content.strip() if role in self.trimmed else content)
            before = role
        return text + self.between[f"{before}>"]


def chat_pieces(tokenizer: SLMTokenizer) -> ChatPieces:
    """The pieces of the tokenizer's template, found with samples and checked on conversations of all `TEXTS`.

    Raises `UserError` for a tokenizer without template, and for a template that is not fixed text around messages.
    """

    def prompt(messages: Sequence[Message], **switches: Any) -> str:
        return str(tokenizer.apply_chat_template(messages, True, tokenize=False, **switches))

    between = _between(prompt)
    said = prompt(_conversation(ROLES[1:], TEXTS), strftime_now=lambda pattern: DATE)
    spaced = "\n xyzzy \n"
    trimmed = {
        role
        for role in ROLES[">system" not in between : 3]
        if spaced not in prompt(_conversation(ROLES[">system" not in between :], TEXTS, {role: spaced}))
    }
    thinking = prompt(_conversation(ROLES[1:], TEXTS, {"assistant": f"{THOUGHT}!"}))
    pieces = ChatPieces(between, frozenset(trimmed), THOUGHT.strip() not in thinking, DATE in said)
    for number, text in enumerate(TEXTS):
        for turns in (1, 3, 7):
            roles = ["user", *["assistant", "user"] * (turns // 2)]
            for whole in (roles, ["system", *roles])[: 1 + (">system" in between)]:
                messages = _conversation(whole, TEXTS[number:] + TEXTS)
                thought = _conversation(whole, TEXTS[number:] + TEXTS, {"assistant": THOUGHT + text})
                if any(pieces.render(one) != prompt(one) for one in (messages, thought)):
                    raise _not_fixed(f"a conversation of {len(whole)} messages")
    return pieces


def _between(prompt: Callable[[Sequence[Message]], str]) -> dict[str, str]:
    """`ChatPieces.between`, found with one conversation that has a system message and one that has none."""
    between: dict[str, str] = {}
    for roles in (ROLES[1:], ROLES):
        try:
            text = prompt(_conversation(roles, MARKS))
        except ConversationError:
            if roles == ROLES:  # this template takes no system message
                return between
            raise
        if roles == ROLES and MARKS[0] not in text:  # or leaves it out
            return between
        for key, mark in zip(map(">".join, pairwise(["", *roles, ""])), [*MARKS[: len(roles)], ""]):
            before, found, text = text.partition(mark) if mark else (text, "found", "")
            if not found or between.setdefault(key, before) != before:
                raise _not_fixed(f"{key.replace('>', ' before ')}")
    return between


def _conversation(
    roles: Sequence[str], texts: Sequence[str], instead: Mapping[str, str] = MappingProxyType({})
) -> list[Message]:
    """Messages of these roles with the first texts; those of a role in `instead` have its text."""
    return [{"role": role, "content": instead.get(role, text)} for role, text in zip(roles, texts)]


def _not_fixed(where: str) -> UserError:
    return UserError(
        f"the chat template does not write the same text around every message ({where}), and this target has no Jinja: "
        "use a simpler one, such as chatml, or export to gguf, which keeps the template"
    )
