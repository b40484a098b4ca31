"""Conversations to text, and which of that text is learned: what the assistant says, and that it then stops.

The loss mask is made while rendering, turn by turn, never by looking for tokens afterwards: what a template adds
between "now the assistant speaks" and the assistant's whole turn is what the assistant said. Templates are Jinja as
`transformers` runs it (chat_template_utils.py), in a sandbox, since they come with models from anywhere.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import lru_cache
from typing import Any, NamedTuple, NoReturn

import jinja2.ext
import jinja2.nodes
import jinja2.parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from slmkit.config import UserError

Message = Mapping[str, Any]  # {"role": "system", "user" or "assistant", "content": text}; other keys are not rendered

ROLES = ("system", "user", "assistant")
NONCHARACTERS = [chr(code) for code in range(0xFDD0, 0xFDF0)]  # Unicode keeps them out of all text, for uses like this


@dataclass(frozen=True)
class ChatTokens:
    """A conversation as a model sees it: `ids` and, for each, whether it is learned."""

    ids: list[int]
    trained: list[bool]


class Segment(NamedTuple):
    """Rendered text that is learned as a whole or not at all."""

    text: str
    trained: bool


def render(template: str, messages: Sequence[Message], add_generation_prompt: bool = False, **names: Any) -> str:
    """The conversation as text. `names` are what the template may use beside it, such as `bos_token`.

    Raises `UserError` for malformed messages, and with the template's own words where it refuses or fails.
    """
    check_messages(messages, add_generation_prompt)
    plain = [{"role": message["role"], "content": message["content"]} for message in messages]
    names = {"tools": None, "documents": None} | names  # defined for every template in transformers too
    compiled = _compiled(template)
    try:
        return compiled.render(messages=plain, add_generation_prompt=add_generation_prompt, **names)
    except Exception as error:  # a template is a program of somebody else's and fails in any way it likes
        raise UserError(f"the chat template failed on this conversation: {' '.join(str(error).split())}") from None


def segments(
    template: str,
    messages: Sequence[Message],
    ends_of_turn: Sequence[str],
    add_generation_prompt: bool = False,
    **names: Any,
) -> list[Segment]:
    """The text of `render`, cut where learning begins and ends.

    An assistant's turn is learned from the end of its generation prompt through the first of `ends_of_turn`, where
    generation would stop; no message may spell one (see `shield`). Raises `UserError` as `render` does, for a template
    that renders a turn differently once others follow, and for one that does not end the assistant's turns.
    """
    check_messages(messages, add_generation_prompt)
    end = re.compile("|".join(map(re.escape, ends_of_turn)))
    done, found = "", []

    def grow(count: int, prompt: bool) -> str:
        """What rendering the first `count` messages adds to what is done."""
        nonlocal done
        text = render(template, messages[:count], prompt, **names)
        if not text.startswith(done):
            raise UserError(
                f"the chat template writes what stands before message {count} differently once that message follows, "
                "so what the model learns would not be what it later sees: use a template that only appends"
            )
        added, done = text[len(done) :], text
        return added

    for index, message in enumerate(messages):
        if message["role"] == "assistant":
            found.append(Segment(grow(index, True), False))
            said = grow(index + 1, False)
            stop = end.search(said)
            if not stop:
                raise UserError(
                    f"the chat template ends the assistant's turn with none of {', '.join(ends_of_turn)}, so the model "
                    "would never learn to stop: end it with one of them"
                )
            found += [Segment(said[: stop.end()], True), Segment(said[stop.end() :], False)]
    found.append(Segment(grow(len(messages), add_generation_prompt), False))
    return [segment for segment in found if segment.text]


def shield(messages: Sequence[Message], special: re.Pattern[str]) -> tuple[list[Message], str]:
    """The messages with no special token spelled in them, and the marker to remove from the rendered text again.

    The marker, a character that no message holds, follows every character of such a spelling, so that nothing in it,
    nor a token that overlaps it, is taken for the template's own. It is '' where no message spells any.
    """
    check_messages(messages)
    if not any(special.search(message["content"]) for message in messages):
        return list(messages), ""
    marker = next((mark for mark in NONCHARACTERS if not any(mark in message["content"] for message in messages)), "")
    if not marker:
        raise UserError("this conversation uses all noncharacters U+FDD0 to U+FDEF, which are no text: remove one")
    shielded = [
        {**message, "content": special.sub(lambda match: "".join(c + marker for c in match[0]), message["content"])}
        for message in messages
    ]
    return list(shielded), marker


def check_messages(messages: Sequence[Message], add_generation_prompt: bool = False) -> None:
    """Raise `UserError` unless this is a system message or none, then user and assistant in turn, all with text."""
    if not messages:
        raise UserError("a conversation without messages: expected at least one of the user's")
    turn = "user"
    for number, message in enumerate(messages, start=1):
        _check_message(number, message)
        role = message["role"]
        if role == "system" and number == 1:
            continue
        if role != turn:
            raise UserError(f"message {number}: {role} where it is the {turn}'s turn")
        turn = "assistant" if role == "user" else "user"
    if messages[-1]["role"] == "system":
        raise UserError("a conversation of a system message alone: expected one of the user's behind it")
    if add_generation_prompt and turn == "user":
        raise UserError("the last message is the assistant's: add one of the user's for it to answer")


def _check_message(number: int, message: Any) -> None:
    if not isinstance(message, Mapping):
        raise UserError(f"message {number}: expected an object with role and content, found {_shown(message)}")
    role, content = message.get("role"), message.get("content")
    if role not in ROLES:
        raise UserError(f"message {number}: role {_shown(role)}; expected one of {', '.join(ROLES)}")
    if not isinstance(content, str):
        raise UserError(f"message {number}: content is {type(content).__name__}; expected text")
    if role == "assistant" and not content.strip():
        raise UserError(f"message {number}: the assistant says nothing; leave the exchange out or fill it")


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "…"


@lru_cache(maxsize=16)
def _compiled(template: str) -> jinja2.Template:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals.update(raise_exception=_raise_exception, strftime_now=_strftime_now)
    try:
        return environment.from_string(template)
    except jinja2.TemplateSyntaxError as error:
        raise UserError(f"the chat template is not valid Jinja, line {error.lineno}: {error.message}") from None


class _Generation(jinja2.ext.Extension):
    """Lets `{% generation %} … {% endgeneration %}` pass: transformers' own loss mask, which few templates have."""

    tags = {"generation"}  # noqa: RUF012, as the base class declares it

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _to_json(value: Any, **options: Any) -> str:
    """Jinja's own filter escapes HTML characters; a model reads plain JSON."""
    return json.dumps(value, **{"ensure_ascii": False, **options})


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _strftime_now(pattern: str) -> str:
    return datetime.now().strftime(pattern)
