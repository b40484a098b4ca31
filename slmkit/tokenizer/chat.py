"""Conversations as tokens: a chat template is rendered turn by turn, and the loss mask is made while it is.

What a turn adds to the rendered text is the difference between rendering the conversation up to it and one turn less.
Of an assistant's turn, what follows the generation prompt up to its end-of-turn token is learned, since that is what
the model will have to write; nothing is searched for afterwards.
"""

from __future__ import annotations

import datetime
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib.resources import files
from typing import Any, NoReturn

import jinja2
from jinja2.sandbox import ImmutableSandboxedEnvironment

from slmkit.config import UserError

ROLES = ("system", "user", "assistant")
CHATML = files("slmkit.tokenizer").joinpath("templates/chatml.jinja").read_text(encoding="utf-8")
NONCHARACTERS = [chr(code) for code in range(0xFDD0, 0xFDF0)]  # never text, by Unicode's own rule

Messages = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class ChatTokens:
    """A rendered conversation: `trained[i]` says whether `ids[i]` is one of the assistant's."""

    ids: list[int]
    trained: list[bool]


@dataclass(frozen=True)
class Segment:
    """A piece of the rendered text, all of it learned or none."""

    text: str
    trained: bool


def check_messages(messages: Messages) -> None:
    """Raises `UserError` unless an optional system message is followed by user and assistant in turn, all with text."""
    if not messages:
        raise UserError("a conversation without messages; expected at least one of the user's")
    for number, message in enumerate(messages, start=1):
        role, content = message.get("role"), message.get("content")
        if role not in ROLES:
            raise UserError(f"message {number}: role {role!r}; expected one of {', '.join(ROLES)}")
        if not isinstance(content, str):
            raise UserError(f"message {number}: content is {type(content).__name__}; expected text")
        if role == "assistant" and not content.strip():
            raise UserError(f"message {number}: the assistant says nothing; leave the turn out or fill it")
    speakers = [message["role"] for message in messages]
    first = 1 if speakers[0] == "system" else 0
    for number, role in enumerate(speakers[first:], start=first):
        expected = "user" if (number - first) % 2 == 0 else "assistant"
        if role != expected:
            raise UserError(f"message {number + 1}: {role} where it is the {expected}'s turn")
    if len(speakers) == first:
        raise UserError("a conversation of a system message alone; expected one of the user's behind it")


def render(template: str, messages: Messages, add_generation_prompt: bool = False, **names: Any) -> str:
    """The template's text for these messages. `names` are what else it may mention, such as `bos_token`.

    Templates run in Jinja's immutable sandbox: they come from whoever made the model. Raises `UserError` when one
    cannot be compiled or refuses the messages.
    """
    try:
        return _compiled(template).render(messages=messages, add_generation_prompt=add_generation_prompt, **names)
    except jinja2.TemplateError as error:
        raise UserError(f"the chat template cannot render this conversation: {' '.join(str(error).split())}") from None


def segments(template: str, messages: Messages, end_of_turn: str, **names: Any) -> list[Segment]:
    """The rendered conversation, cut where learning begins and ends.

    Raises `UserError` when the template writes earlier turns differently once later ones follow: what it adds for a
    turn is then not defined.
    """
    pieces: list[Segment] = []
    done = ""
    for count, message in enumerate(messages, start=1):
        if message["role"] == "system":
            continue  # some templates refuse a system message alone; it is part of what the first user turn adds
        text = render(template, messages[:count], **names)
        if message["role"] == "assistant":
            prompt = render(template, messages[: count - 1], add_generation_prompt=True, **names)
            answer = _added(text, prompt, count)
            end = answer.rfind(end_of_turn)
            learned = answer if end < 0 else answer[: end + len(end_of_turn)]
            pieces.append(Segment(_added(prompt, done, count), trained=False))
            pieces.append(Segment(learned, trained=True))
            pieces.append(Segment(answer[len(learned) :], trained=False))
        else:
            pieces.append(Segment(_added(text, done, count), trained=False))
        done = text
    return [piece for piece in pieces if piece.text]


def generation_prompt(template: str, messages: Messages, **names: Any) -> str:
    """What the template puts behind the conversation for the assistant to go on from."""
    text = render(template, messages, **names)
    return _added(render(template, messages, add_generation_prompt=True, **names), text, len(messages))


def guard(messages: Messages, specials: Sequence[str]) -> tuple[list[dict[str, Any]], str]:
    """Messages in which no special token is spelled any more, and the character that was put into each spelling.

    A user who writes `<|im_end|>` means these letters. The character is taken out again when what the template
    rendered has been cut at its own special tokens.
    """
    said = "".join(str(message.get("content")) for message in messages)
    mark = next(character for character in NONCHARACTERS if character not in said)
    spelled = re.compile("|".join(map(re.escape, specials)) or r"(?!)")
    guarded = [
        {**message, "content": spelled.sub(lambda found: found[0][0] + mark + found[0][1:], message["content"])}
        for message in messages
    ]
    return guarded, mark


def _added(longer: str, shorter: str, number: int) -> str:
    if not longer.startswith(shorter):
        raise UserError(
            f"the chat template writes what stands before message {number} differently once that message follows, so "
            "which tokens are its own cannot be told; use another template"
        )
    return longer[len(shorter) :]


@lru_cache(maxsize=16)
def _compiled(template: str) -> jinja2.Template:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = lambda value, **options: json.dumps(value, ensure_ascii=False, **options)
    environment.globals["raise_exception"] = _refuse
    environment.globals["strftime_now"] = lambda pattern: datetime.datetime.now().strftime(pattern)
    try:
        return environment.from_string(template)
    except jinja2.TemplateSyntaxError as error:
        raise UserError(f"the chat template is not valid Jinja, line {error.lineno}: {error.message}") from None


def _refuse(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)
