"""Converts messages in public data sets' spellings to OpenAI's names.

`role` (system, user, assistant, tool) and `content`; if present, also `tool_calls`, `reasoning_content`, `name`,
`tool_call_id`, and `weight` (0: not learned). A key whose meaning would be lost is refused; any other key that is not
empty is counted.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable
from typing import Any

from slmkit.config import kind_of_value, spelled
from slmkit.data.sources.documents import WORDS, Conversation, Message, RowError
from slmkit.tokenizer.chat import EMPTY, ConversationError, check_messages

EXAMPLE = '{"role": …, "content": …}'
ROLES: dict[str, str] = {name: role for role, names in WORDS["roles"].items() for name in names}
CALLS = ("function_call", "tool_call")  # roles whose text is a call, as JSON
ROLE, CONTENT = ("role", "from"), ("content", "value", "text")
# 0 or false: not learned
WEIGHTS = ("weight", "loss_weight", "train", "training", "loss", "trainable", "learn", "do_train")
# Other names that say what is learned, some with inverse meaning: refused, unless they say that it is learned.
ON_LEARNING = re.compile(
    r"(?:(?<![a-z])(?:is|do)?|(?<=[a-z])(?=[A-Z]))"
    r"(?:([Mm]ask|(?:un|not?)_?(?:train|learn|loss))|([Ii]gnor|[Ss]kip|[Dd]elet|[Ee]xclu[ds])|[Tt]rain|[Ll]earn|[Ll]oss|[Ww]eight)"
)
JUDGEMENTS = dict.fromkeys(WORDS["good"], True) | dict.fromkeys(WORDS["bad"], False)
REASONING = ("reasoning_content", "reasoning", "thinking")
TOOLS = ("tools", "functions")
USED = {*ROLE, *CONTENT, *WEIGHTS, *REASONING, *TOOLS, "tool_calls", "function_call", "name", "tool_call_id"}
# Keys that would change what is read or learned, and cannot be kept.
MEDIA = ("images", "image", "videos", "video", "audios", "audio", "documents", "files")
REFUSED = (*MEDIA, "train_detail", "training_detail", "refusal")


def is_empty(value: Any) -> bool:
    """Whether it is None, NaN, blank text, or a list or object of only such: a missing value in tables."""
    if isinstance(value, str):
        return value.strip() in ("", "[]", "{}", "null")
    if isinstance(value, dict):
        return all(inner is False or is_empty(inner) for inner in value.values())
    if isinstance(value, list | tuple):
        return all(map(is_empty, value))
    return value is None or (isinstance(value, float) and value != value)


def _stripped(value: Any) -> Any:
    return value.strip() if isinstance(value, str) else value


def the_one(row: dict[str, Any], keys: Iterable[str], meaning: Callable[[Any], Any] = _stripped) -> Any:
    """The value of the first of the keys that is not empty. Raises `RowError` if another's `meaning` is not the same.

    If all are empty: the value of the first that is there; None if none is.
    """
    there = [key for key in keys if key in row]
    first, *others = [key for key in there if not is_empty(row[key])] or there[:1] or [""]
    for other in others:
        if meaning(row[other]) != meaning(row[first]):
            raise RowError(f"column {first!r} and column {other!r} contradict each other: drop one", "contradictions")
    return row.get(first)


def judgement(value: Any) -> bool | None:
    """Whether a value means true or good, or false or bad; None for neither."""
    if isinstance(value, int | float) and value in (0, 1):
        return bool(value)
    return JUDGEMENTS.get(re.sub(r"[\s_-]+", " ", value.strip().lower())) if isinstance(value, str) else None


def is_on_learning(name: str, value: Any) -> bool:
    """Whether a key that is not in `WEIGHTS` may say that something is not learned."""
    kinds = set() if is_empty(value) else {match.lastindex for match in ON_LEARNING.finditer(name)}
    if not kinds or len(kinds) > 1 or 1 in kinds:
        return bool(kinds)
    return judgement(value) is not (None in kinds)  # 2: names of inverse meaning


def conversation(turns: list[Any], tools: Any = None, column: str = "messages") -> Conversation:
    """The conversation in `turns`. Raises `RowError` if it is none, or cannot be kept unchanged."""
    found = Conversation([], tools=tools_in(tools))
    for number, turn in enumerate(turns, start=1):
        try:
            message = _message(turn, found, column)
        except RowError as error:
            raise RowError(f"message {number}: {error}", error.reason) from None
        last = found[-1] if found else {}
        if message.pop("is call", False) and last.get("role") == "assistant":
            if last.get("weight") != message.get("weight"):
                raise RowError(f"message {number}: a call and the text before it have different weights")
            last.setdefault("tool_calls", []).extend(message["tool_calls"])  # calls of one turn
        else:
            found.append(message)
    return found


def checked(messages: Conversation) -> Conversation:
    """The conversation. Raises `RowError` if turns are out of order or empty, as in some public data sets.

    An empty system message, which many have, is removed.
    """
    if len(messages) > 1 and messages[0]["role"] == "system" and not str(messages[0]["content"]).strip():
        del messages[0]
    try:
        check_messages(messages)
    except ConversationError as error:
        raise RowError(str(error), error.reason) from None
    for number, message in enumerate(messages, start=1):
        if message["role"] in ("system", "user") and not message["content"].strip():
            raise RowError(f"message {number}: the text of the {message['role']} is empty", EMPTY)
    return messages


def tools_in(value: Any) -> list[dict[str, Any]] | None:
    """Tools as a list of `{"type": "function", "function": {…}}`, from a list or its JSON. Raises `RowError`."""
    if is_empty(value):
        return None
    found = _functions(value, "tools", "tools with a name, such as {'name': …, 'parameters': …}")
    tools = [{"type": "function", "function": function} if tool is function else tool for tool, function in found]
    return as_json(tools, "tools")


def _functions(value: Any, what: str, expected: str) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """Tools or calls, from a list or its JSON, each with the `function` in it, or else itself as the function."""
    value = from_json(value, what)
    found = []
    for entry in value if isinstance(value, list) else [value]:
        entry = from_json(entry, what)
        function = entry.get("function") if isinstance(entry, dict) else None
        function = function if isinstance(function, dict) else entry
        if not (isinstance(function, dict) and isinstance(function.get("name"), str)):
            raise RowError(f"expected {expected}, found {shown(entry)}")
        found.append((entry, function))
    return found


def _message(turn: Any, found: Conversation, column: str) -> Message:
    """One message; the tools that it names go to the conversation."""
    if not isinstance(turn, dict):
        raise RowError(f"expected in column {column!r} a list of messages such as {EXAMPLE}, found {shown(turn)}")
    _account_for_keys(turn, found)
    named = the_one(turn, ROLE, lambda name: ROLES.get(str(name).lower(), name))
    role = ROLES.get(named.lower()) if isinstance(named, str) else None
    if role is None:
        raise RowError(f"role {shown(named)}; expected one of {', '.join(ROLES)}")
    message: Message = {
        "role": role,
        "content": _text(the_one(turn, CONTENT, lambda text: _stripped(_text(text, role))), role),
    }
    calls = the_one(turn, ("tool_calls", "function_call"), lambda its: [call["function"] for call in _calls(its)])
    if isinstance(named, str) and named.lower() in CALLS:
        calls, message["content"], message["is call"] = message["content"], "", True
    if not is_empty(calls):
        message["tool_calls"] = _calls(calls)
    elif message["content"] is None:
        raise RowError("content is nothing; expected text")
    message["content"] = message["content"] or ""
    for key, names in {"reasoning_content": REASONING, "name": ("name",), "tool_call_id": ("tool_call_id",)}.items():
        if not is_empty(value := the_one(turn, names)):
            if not isinstance(value, str):
                raise RowError(f"{key} is {kind_of_value(value)}; expected text")
            message[key] = value
    if role != "assistant" and message.keys() & {"tool_calls", "reasoning_content"}:
        raise RowError(f"a tool call or reasoning in a message of role {role}; only the assistant may have one")
    if (weight := _weight(turn)) is not None and (weight == 0 or role == "assistant"):
        message["weight"] = weight
    elif weight is not None:
        found.unused.append("weight")  # messages of other roles are never learned
    return message


def _account_for_keys(turn: dict[str, Any], found: Conversation) -> None:
    for key, value in turn.items():
        if key in USED or is_empty(value):
            continue
        if key in REFUSED or is_on_learning(key, value) or (key == "channel" and value != "final"):
            raise RowError(f"has {key!r}, which is not read", f"messages with {key!r}")
        found.unused.append(key)
    if not is_empty(tools := the_one(turn, TOOLS, tools_in)):
        if found.tools is not None:
            raise RowError("names tools, which the row or a message before names too")
        found.tools = tools_in(tools)


def _text(content: Any, role: str) -> str | None:
    """Text, or the text in a list of parts; None if there is none."""
    if isinstance(content, list) and all(isinstance(part, dict) for part in content):
        kinds = {shown(part.get("type", "text")) for part in content} - {"'text'", "'input_text'", "'output_text'"}
        if kinds:
            raise RowError(f"content has parts of type {', '.join(sorted(kinds))}, and only text is read", "not text")
        content = "".join(_text(part.get("text"), role) or "" for part in content)
    elif isinstance(content, dict) and role == "tool":
        content = json.dumps(as_json(content, "content"), ensure_ascii=False)
    if isinstance(content, float) and content != content:
        return None
    if not isinstance(content, str | None):
        raise RowError(f"content is {kind_of_value(content)}; expected text")
    return content


def _calls(value: Any) -> list[dict[str, Any]]:
    """Calls as `{"type": "function", "function": {"name": …, "arguments": {…}}}`, from objects or their JSON."""
    calls = []
    for call, function in _functions(value, "a call", "a call such as {'name': …, 'arguments': …}"):
        given = function.get("arguments", function.get("parameters"))
        arguments = {} if given is None or given == "" else from_json(given, "arguments")
        if not isinstance(arguments, dict):
            raise RowError(f"the arguments of a call are {kind_of_value(arguments)}; expected an object")
        known = {"id": call["id"]} if isinstance(call.get("id"), str) and call["id"] else {}
        calls.append({**known, "type": "function", "function": {"name": function["name"], "arguments": arguments}})
    return as_json(calls, "a call")


def _weight(turn: dict[str, Any]) -> float | None:
    """The smallest of the turn's weights: 0, 1, or None."""
    said = []
    for key in WEIGHTS:
        value = turn.get(key)
        if is_empty(value):
            continue
        if not (isinstance(value, int | float) and value in (0, 1)):
            raise RowError(f"{key} {shown(value)}; expected 1 (learned) or 0 (only read)")
        said.append(value)
    return min(said, default=None)


def from_json(value: Any, what: str) -> Any:
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        raise RowError(f"{what}: expected JSON, found {shown(value)}") from None


def as_json(value: Any, what: str) -> Any:
    """The value. Raises `RowError` if JSON cannot hold it: tables may have dates and bytes."""
    try:
        json.dumps(value)
    except (TypeError, ValueError, RecursionError):
        raise RowError(f"{what}: expected what JSON can hold") from None
    return value


def shown(value: Any) -> str:
    try:
        text = spelled(value)
    except (RecursionError, ValueError):  # too deeply nested, or too long a number to print
        return kind_of_value(value)
    return text if len(text) <= 60 else text[:57] + "…"
