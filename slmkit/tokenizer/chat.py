"""Renders conversations as text, with the loss mask: the assistant's answers and their end-of-turn tokens are learned.

The mask is made during rendering, turn by turn: what the template adds between the generation prompt and the
assistant's whole turn is learned. So the template needs no `{% generation %}`, which few have. Templates are Jinja as
in `transformers` (chat_template_utils.py), run in a sandbox, since they come with models from anywhere.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import jinja2.ext
import jinja2.nodes
import jinja2.parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from slmkit.config import UserError, kind_of_value, read_table

# {"role": one of ROLES, "content": text}, and OpenAI's "tool_calls", "tool_call_id", "name", "reasoning_content". The
# template gets all keys but "weight". An assistant's message of weight 0 is input only, not learned.
Message = Mapping[str, Any]
Tools = Sequence[Mapping[str, Any]]  # {"type": "function", "function": {"name", "description", "parameters"}}

ROLES = ("system", "user", "assistant", "tool")
# Reasons why messages are not a valid conversation.
DISORDER, EMPTY, REFUSED = "roles out of order", "an empty turn", "refused by the chat template"
DROPPED = "more than the chat template renders"
REASONING = ("reasoning_content", "thinking", "reasoning")  # different names of the same field
CHAT_FORMATS = read_table(Path(__file__).with_name("chat_formats.yaml"))
REPLY = "Xyzzy"  # a sample answer, to find out what a template writes after it
NONCHARACTERS = [chr(code) for code in range(0xFDD0, 0xFDF0)]  # code points that Unicode reserves for internal use


@dataclass(frozen=True)
class ChatTokens:
    """The token ids of a conversation [tokens], and whether each is learned [tokens]."""

    ids: list[int]
    trained: list[bool]


class ConversationError(UserError):
    """Messages that are not a valid conversation. `reason` is one of few, for counting."""

    def __init__(self, message: str, reason: str = "not as expected") -> None:
        super().__init__(message)
        self.reason = reason


class Segment(NamedTuple):
    """Rendered text that is learned as a whole or not at all."""

    text: str
    trained: bool


def render(
    template: str,
    messages: Sequence[Message],
    add_generation_prompt: bool = False,
    tools: Tools | None = None,
    **names: Any,
) -> str:
    """The conversation as text. `names`: further variables for the template, such as `bos_token`.

    Raises `UserError` for malformed messages, for content that the template would drop, and with the template's own
    message if it refuses or fails.
    """
    check_messages(messages, add_generation_prompt)
    check_nothing_is_dropped(template, messages, tools, names)
    return rendered(template, plain(messages), add_generation_prompt, {**names, "tools": tools or None})


def plain(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """The messages as the template gets them: without weights, reasoning under each of transformers' names for it."""
    found = []
    for message in messages:
        rest = {key: value for key, value in message.items() if key != "weight"}
        reasoning = next((rest[key] for key in REASONING if rest.get(key) is not None), None)
        if reasoning is not None:
            rest = {"thinking": reasoning, **rest, "reasoning_content": reasoning}
        found.append(rest)
    return found


def rendered(
    template: str, messages: list[dict[str, Any]], add_generation_prompt: bool, names: Mapping[str, Any]
) -> str:
    """`render` for messages that were checked before."""
    names = {"tools": None, "documents": None, **names}  # transformers defines these for every template
    jinja = compiled(template)
    try:
        return jinja.render(messages=messages, add_generation_prompt=add_generation_prompt, **names)
    except Exception as error:  # a template is foreign code and can fail in any way
        message = f"the chat template failed on this conversation: {' '.join(str(error).split())}"
        raise ConversationError(message, REFUSED) from None


def check_nothing_is_dropped(
    template: str, messages: Sequence[Message], tools: Tools | None, names: Mapping[str, Any]
) -> None:
    """Raise `ConversationError` if the template leaves out the conversation's tools, calls or reasoning."""
    wanted = {
        "tools": bool(tools),
        "tool_calls": any(message.get("tool_calls") for message in messages),
        "messages of the role tool": any(message["role"] == "tool" for message in messages),
        "reasoning_content": any(message.get(key) for message in messages for key in REASONING),
    }
    if any(wanted.values()):
        dropped = _dropped(template, tuple(sorted((key, str(value)) for key, value in names.items())))
        for what, is_wanted in wanted.items():
            if is_wanted and what in dropped:
                raise ConversationError(
                    f"the chat template does not render {what}: use one that does, such as chatml "
                    "(tokenizer.chat_template)",
                    DROPPED,
                )


@lru_cache(maxsize=64)
def _dropped(template: str, names: tuple[tuple[str, str], ...]) -> frozenset[str]:
    """Which of tools, calls and reasoning the template leaves out, found with sample conversations."""
    dropped = set()
    for what, probe in CHAT_FORMATS["probes"].items():
        try:
            text = rendered(template, plain(probe["messages"]), False, {**dict(names), "tools": CHAT_FORMATS["tools"]})
        except ConversationError:  # the real conversation will give the template's own message
            continue
        if probe["expected"] not in text:
            dropped.add(what)
    return frozenset(dropped)


def rows_of_segments(
    template: str,
    messages: Sequence[Message],
    ends_of_turn: Sequence[str],
    add_generation_prompt: bool = False,
    tools: Tools | None = None,
    **names: Any,
) -> list[list[Segment]]:
    """The text of `render`, split where learning begins and ends: one row, or several if the template rewrites turns.

    An assistant's turn is learned from the end of its generation prompt through the first of `ends_of_turn`, where
    generation would stop; no message may contain one (see `shield`). A turn of weight 0 is not learned.

    Some templates write a turn differently once others follow it: Qwen 3's leaves out the reasoning of all turns before
    the last question. In the whole conversation such a turn then follows another text than in generation, so it is
    learned in a row of its own that ends with it, after exactly the text that generation would put before it. Each row
    has the turns that no earlier row has; the last one is the whole conversation as in `render`.

    Raises `UserError` as `render` does, for a template that does not end the assistant's turns, and for one whose
    generation prompt differs from what it writes before an answer, except with `add_generation_prompt`.
    """
    check_messages(messages, add_generation_prompt)
    check_nothing_is_dropped(template, messages, tools, names)
    names = {**names, "tools": tools or None}
    rows: list[list[Segment]] = [[]]
    turns, done = plain(messages), ""

    def grow(count: int, prompt: bool) -> str:
        """What rendering the first `count` messages adds to the current row; all of the text if that was rewritten."""
        nonlocal done
        text = rendered(template, turns[:count], prompt, names)
        if not text.startswith(done):
            rows.append([])
            done = ""
        added, done = text[len(done) :], text
        return added

    for index, message in enumerate(messages):
        if message["role"] == "assistant":
            asked = Segment(grow(index, True), False)
            rows[-1].append(asked)
            before = len(rows)
            said = grow(index + 1, False)
            appends = len(rows) == before
            if not appends and not add_generation_prompt:
                raise UserError(
                    "the chat template's generation prompt is not what it writes before an answer, so what the model "
                    f"learns would not be what it later sees (message {index + 1}): use a template that only appends"
                )
            rows[-1] += _answer(said, ends_of_turn, is_learned=appends and message.get("weight") != 0)
    if add_generation_prompt or messages[-1]["role"] != "assistant":
        rest = Segment(grow(len(messages), add_generation_prompt), False)
        rows[-1].append(rest)
    return [[segment for segment in row if segment.text] for row in rows]


def _answer(said: str, ends_of_turn: Sequence[str], is_learned: bool) -> list[Segment]:
    """Segments of the answer with its end of turn, and of what the template writes after it. Raises `UserError`."""
    stop = re.search("|".join(map(re.escape, ends_of_turn)), said)
    if not stop:
        raise UserError(
            f"the chat template ends the assistant's turn with none of {', '.join(ends_of_turn)}, so the model would "
            "never learn to stop: end it with one of them, or name the token that it ends with in "
            "tokenizer.additional_special_tokens"
        )
    return [Segment(said[: stop.end()], is_learned), Segment(said[stop.end() :], False)]


@lru_cache(maxsize=64)
def end_of_turn(template: str, spellings: tuple[str, ...], names: tuple[tuple[str, str], ...]) -> str | None:
    """The first of `spellings` that the template writes after an answer; None if there is none."""
    messages = [{"role": "user", "content": "?"}, {"role": "assistant", "content": REPLY}]
    try:
        said = render(template, messages, False, None, **dict(names))
    except UserError:  # rendering a real conversation will raise it again
        return None
    _, found, behind = said.rpartition(REPLY)
    longest_first = "|".join(map(re.escape, sorted(spellings, key=len, reverse=True)))
    match = re.search(longest_first, behind) if found and spellings else None
    return match[0] if match else None


def shield(
    messages: Sequence[Message], tools: Tools | None, special: re.Pattern[str]
) -> tuple[list[Message], Tools | None, str]:
    """The messages and tools with special tokens in them made unrecognisable, and the marker to remove after rendering.

    The marker, a character in no message, is put after every character of such a spelling, so that neither it nor a
    token overlapping it is read as the template's own. It is '' if no message contains a special token.
    """
    said: list[str] = []

    def noted(text: str) -> str:
        said.append(text)
        return text

    _changed([list(messages), tools], noted)
    if not any(special.search(text) for text in said):
        return list(messages), tools, ""
    marker = next((mark for mark in NONCHARACTERS if not any(mark in text for text in said)), "")
    if not marker:
        raise ConversationError(
            "this conversation uses all noncharacters U+FDD0 to U+FDEF, which are no text: remove one"
        )

    def marked(text: str) -> str:
        return special.sub(lambda match: "".join(character + marker for character in match[0]), text)

    return *_changed([list(messages), tools], marked), marker


def _changed(value: Any, change: Callable[[str], str]) -> Any:
    """A JSON value with all its strings changed, except the keys `role` and `type`."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, Mapping):
        return {key if key in ("role", "type") else change(key): _changed(part, change) for key, part in value.items()}
    return [_changed(part, change) for part in value] if isinstance(value, list | tuple) else value


def check_messages(messages: Sequence[Message], add_generation_prompt: bool = False) -> None:
    """Raise `ConversationError` unless there is at most one system message, then user and assistant in turn.

    An assistant's message with tool calls is followed by the tools' results, then the assistant's next message.
    """
    if not messages:
        raise ConversationError("a conversation without messages: expected at least one from the user", EMPTY)
    expected = ["system", "user"]
    for number, message in enumerate(messages, start=1):
        _check_message(number, message)
        role = message["role"]
        if role not in expected:
            turn = expected[-1]
            raise ConversationError(f"message {number}: {role} where it is the {turn}'s turn", DISORDER)
        if role == "assistant":
            expected = ["tool"] if message.get("tool_calls") else ["user"]
        else:
            expected = {"system": ["user"], "user": ["assistant"], "tool": ["tool", "assistant"]}[role]
    if messages[-1]["role"] == "system":
        raise ConversationError("a conversation with only a system message: expected a user's message after it", EMPTY)
    if add_generation_prompt and messages[-1]["role"] == "assistant":
        raise ConversationError("the last message is the assistant's: expected a user's message to answer", DISORDER)


def _check_message(number: int, message: Any) -> None:
    if isinstance(message, list | tuple):
        raise ConversationError("expected one conversation at a time, found a list of several")
    if not isinstance(message, Mapping):
        raise ConversationError(f"message {number}: expected an object with role and content, found {_shown(message)}")
    role, content, weight = message.get("role"), message.get("content"), message.get("weight")
    calls = message.get("tool_calls")
    if role not in ROLES:
        raise ConversationError(f"message {number}: role {_shown(role)}; expected one of {', '.join(ROLES)}")
    if not isinstance(content, str) and not (content is None and calls):
        raise ConversationError(f"message {number}: content is {kind_of_value(content)}; expected text")
    if weight not in (None, 0, 1):
        raise ConversationError(f"message {number}: weight {_shown(weight)}; expected 1 (learned) or 0 (only read)")
    if calls:
        check_calls(number, role, calls)
    elif role == "assistant" and not (content or "").strip():
        raise ConversationError(
            f"message {number}: the assistant's text is empty; leave the exchange out, or fill it in", EMPTY
        )


def check_calls(number: int, role: str, calls: Any) -> None:
    if role != "assistant":
        raise ConversationError(f"message {number}: tool_calls in a message of the {role}; expected the assistant's")
    for call in calls if isinstance(calls, list) else [calls]:
        function = call.get("function") if isinstance(call, Mapping) else None
        if not (isinstance(function, Mapping) and isinstance(function.get("name"), str) and "arguments" in function):
            raise ConversationError(
                f'message {number}: tool_calls: expected a list of {{"type": "function", "function": {{"name": …, '
                f'"arguments": …}}}}, found {_shown(calls)}'
            )


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "…"


@lru_cache(maxsize=16)
def compiled(template: str) -> jinja2.Template:
    """Raises `UserError` for a template that is not valid Jinja."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
    )
    # JSON without Jinja's HTML escapes.
    environment.filters["tojson"] = lambda value, **options: json.dumps(value, **{"ensure_ascii": False, **options})
    environment.globals["strftime_now"] = lambda pattern: datetime.now().strftime(pattern)
    environment.globals["raise_exception"] = _raise_exception
    try:
        return environment.from_string(template)
    except jinja2.TemplateSyntaxError as error:
        raise UserError(f"the chat template is not valid Jinja, line {error.lineno}: {error.message}") from None


class _Generation(jinja2.ext.Extension):
    """Ignores the tags `{% generation %} … {% endgeneration %}`, transformers' own loss mask."""

    tags = {"generation"}  # noqa: RUF012, as the base class declares it

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)
