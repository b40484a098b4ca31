"""Answers in OpenAI's form, whole and as a stream of events: both are made of the same pieces, so they say the same."""

from __future__ import annotations

import asyncio
import codecs
import json
import re
import time
import uuid
from collections.abc import AsyncIterator, Sequence, Set
from dataclasses import dataclass, field
from typing import Any, Protocol

from slmkit.config import UserError
from slmkit.generation.engine import Event, Logprobs, Request
from slmkit.generation.sampling import FAULTS
from slmkit.generation.text import StopStrings
from slmkit.serving.models import ServedModel, rule_of
from slmkit.serving.protocol import JSON, ApiError, ChatRequest, CompletionRequest, several
from slmkit.tokenizer import SLMTokenizer
from slmkit.tokenizer.chat_prompt import CallFormat

FINISH = {"context": "length"}  # the engine's name and OpenAI's


class Events(Protocol):
    """`Job` of the worker: the events of one engine request."""

    def __aiter__(self) -> AsyncIterator[Event]: ...


# -- tool calls in text -----------------------------------------------------------------------------------------------


class CallReader:
    """Splits the text of an answer into content and tool calls; what may begin a call is held back to the end."""

    def __init__(self, written: CallFormat, special: Sequence[str], most: int | None) -> None:
        pattern = "|".join(map(re.escape, special)) or "(?!)"  # special tokens are not in the text
        self.written, self.most = written, most
        before, self.after = (re.sub(pattern, "", text).strip() for text in (written.before, written.after))
        self.begin = before or "{"  # of a template that writes nothing before
        self._marks, self._held, self._has_begun = StopStrings([self.begin]), "", False

    def add(self, text: str) -> str:
        """The content that is certain to be none of a call."""
        self._held += text
        if self._has_begun:
            return ""
        start = self._marks.find(self._held)
        self._has_begun = start is not None
        ready = len(self._held) - self._marks.may_begin(self._held) if start is None else start
        content, self._held = self._held[:ready], self._held[ready:]
        return content

    def end(self) -> tuple[str, list[JSON]]:
        """The rest of the content, which is what stands around calls too, and the calls in OpenAI's form."""
        calls, content, held, decoder = list[JSON](), "", self._held, json.JSONDecoder()
        while (start := held.find("{")) >= 0:
            try:
                call, end = decoder.raw_decode(held, start)
                name, arguments = call[self.written.name], call.get(self.written.arguments, {})
            except (ValueError, KeyError, RecursionError):
                break
            content += held[:start].strip().removesuffix(self.begin).strip(" \n,")
            held = held[end:].lstrip().removeprefix(self.after)
            function = {"name": str(name), "arguments": json.dumps(arguments, ensure_ascii=False)}
            calls.append({"id": f"call_{uuid.uuid4().hex[:24]}", "type": "function", "function": function})
        return content + (held.strip() if calls else held), calls[: self.most]


# -- from the engine's events to choices ------------------------------------------------------------------------------


class ChatRow:
    """One choice of a chat."""

    def __init__(self, index: int, body: ChatRequest, model: ServedModel) -> None:
        self.index, self.tokenizer = index, model.tokenizer
        self.has_logprobs, self.finish = bool(body.logprobs), ""
        self.message: JSON = {"role": "assistant", "content": "", "refusal": None}
        self.entries: list[JSON] = []
        self.reader = self._reader(body, model) if body.tools and body.tool_choice != "none" else None
        self._is_first = True

    def _reader(self, body: ChatRequest, model: ServedModel) -> CallReader | None:
        written = model.tokenizer.call_format
        if written is None:
            return None
        one = 1 if body.parallel_tool_calls is False else None
        reader = CallReader(written, [*model.tokenizer.special_tokens], one)
        if body.tool_choice not in (None, "auto"):
            reader.add(written.before)
        return reader

    def read(self, event: Event, _: Any) -> JSON | None:
        """The choice of the next chunk; None if there is nothing to say yet."""
        text, calls = event.text, list[JSON]()
        if self.reader is not None:
            text = self.reader.add(text)
            if event.finish_reason:
                rest, calls = self.reader.end()
                text = (text + rest).rstrip() if calls else text + rest
        delta: JSON = {"role": "assistant", "content": text} if self._is_first else {"content": text}
        self._is_first = False
        if calls:
            delta["tool_calls"] = [{"index": number, **call} for number, call in enumerate(calls)]
            self.message["tool_calls"] = calls
        self.message["content"] += text
        if event.finish_reason:
            self.finish = "tool_calls" if calls else FINISH.get(event.finish_reason, event.finish_reason)
        entries = [_chat_entry(self.tokenizer, event.logprobs)] if event.logprobs else []
        self.entries += entries
        if not (text or calls or entries or self.finish or "role" in delta):
            return None
        if self.finish and not text and not calls and "role" not in delta:
            delta = {}
        logprobs = {"content": entries, "refusal": None} if self.has_logprobs else None
        return {"index": self.index, "delta": delta, "logprobs": logprobs, "finish_reason": self.finish or None}

    def whole(self) -> JSON:
        logprobs = {"content": self.entries, "refusal": None} if self.has_logprobs else None
        message = self.message
        if message.get("tool_calls"):
            message = {**message, "content": message["content"].rstrip() or None}
        return {"index": self.index, "message": message, "logprobs": logprobs, "finish_reason": self.finish}


def _spelled(tokenizer: SLMTokenizer, token: int) -> tuple[str, bytes]:
    """A token's name and bytes. Parts of characters are named by their bytes, as OpenAI does, and ids of a model that
    is wider than its vocabulary by their numbers: as text, several would be the same.
    """
    try:
        spelled = tokenizer.token_bytes(token)
    except UserError:
        return f"token_id:{token}", b""
    try:
        return spelled.decode(), spelled
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in spelled), spelled


def _chat_entry(tokenizer: SLMTokenizer, found: Logprobs) -> JSON:
    """One token of `logprobs.content`."""
    each = []
    for token, logprob in found:
        name, spelled = _spelled(tokenizer, token)
        each.append({"token": name, "logprob": logprob, "bytes": [*spelled]})
    return {**each[0], "top_logprobs": each[1:]}


class CompletionRow:
    """One choice of a completion, in OpenAI's older form: parallel lists of tokens and log-probabilities."""

    def __init__(self, index: int, body: CompletionRequest, model: ServedModel, request: Request) -> None:
        self.index, self.request, self.tokenizer, self.unseen = index, request, model.tokenizer, model.unseen
        self.has_logprobs = request.logprobs is not None
        self.echo = several(body.prompt)[index // request.n] if body.echo else ""  # a text or ids
        self.text, self.finish, self.lists, self._characters, self._is_first = "", "", _lists(), 0, True
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")  # knows where a character is complete

    def read(self, event: Event, prompt_logprobs: Sequence[Logprobs]) -> JSON | None:
        """The choice of the next chunk; None if there is nothing to say yet."""
        text, lists = event.text, _lists()
        if self._is_first and self.echo:
            is_text, prompt = isinstance(self.echo, str), self.request.prompt
            text = (self.echo if is_text else self.tokenizer.decode(prompt)) + text
            if self.has_logprobs:
                hidden = set(self.tokenizer.beginning) if is_text else set()
                self._append(lists, [[(prompt[0], None)], *prompt_logprobs], hidden)
        self._is_first = False
        if event.logprobs:
            self._append(lists, [event.logprobs], self.unseen)
        self.text += text
        for name, values in lists.items():
            self.lists[name] += values
        self.finish = FINISH.get(event.finish_reason or "", event.finish_reason or "")
        if not (text or lists["tokens"] or self.finish):
            return None
        logprobs = lists if self.has_logprobs else None
        return {"index": self.index, "text": text, "logprobs": logprobs, "finish_reason": self.finish or None}

    def _append(self, lists: JSON, found: Sequence[Any], hidden: Set[int]) -> None:
        """`hidden` are tokens that are not in the text."""
        for entries in found:
            token, logprob = entries[0]
            name, spelled = _spelled(self.tokenizer, token)
            lists["tokens"].append(name)
            lists["token_logprobs"].append(logprob)
            likeliest = {_spelled(self.tokenizer, one)[0]: value for one, value in reversed(entries)}
            lists["top_logprobs"].append(None if logprob is None else likeliest)
            if spelled and spelled[0] & 0xC0 != 0x80:  # begins a character: one that was begun before is cut off
                self._characters += len(self._decoder.decode(b"", final=True))
            lists["text_offset"].append(self._characters)
            if token not in hidden:
                self._characters += len(self._decoder.decode(spelled))

    def whole(self) -> JSON:
        logprobs = self.lists if self.has_logprobs else None
        return {"index": self.index, "text": self.text, "logprobs": logprobs, "finish_reason": self.finish}


def _lists() -> JSON:
    return {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}


@dataclass
class Answer:
    """What one request gets: `rows` are its choices, in order of prompts and continuations."""

    model: ServedModel
    body: ChatRequest | CompletionRequest
    requests: Sequence[Request]
    created: int = field(default_factory=lambda: int(time.time()))
    completion_tokens: int = 0
    cached_tokens: int = 0
    prompt_logprobs: dict[int, Sequence[Logprobs]] = field(default_factory=dict)  # by the prompt's number

    def __post_init__(self) -> None:
        is_chat, n = isinstance(self.body, ChatRequest), self.body.n or 1
        self.id = f"{'chatcmpl' if is_chat else 'cmpl'}-{uuid.uuid4().hex}"
        self.object = "chat.completion" if is_chat else "text_completion"
        self.rows: list[Any] = []
        for number, request in enumerate(self.requests):
            for index in range(number * n, number * n + n):
                if isinstance(self.body, ChatRequest):
                    self.rows.append(ChatRow(index, self.body, self.model))
                else:
                    self.rows.append(CompletionRow(index, self.body, self.model, request))

    def _choice(self, number: int, event: Event) -> JSON | None:
        """The choice of the next chunk; None if there is nothing to say yet. Raises `ApiError` for a row's error."""
        if event.error == FAULTS[-1]:  # the model's; the others are of what the request wants
            raise ApiError(500, event.error, code="generation_failed")
        if event.error:
            raise ApiError(400, f"{rule_of(self.body)}: {event.error}", rule_of(self.body), "generation_failed")
        self.completion_tokens += event.token is not None
        self.cached_tokens += event.cached_tokens if event.index == 0 else 0  # the others copy it
        if event.prompt_logprobs:
            self.prompt_logprobs[number] = event.prompt_logprobs
        row = self.rows[number * (self.body.n or 1) + event.index]
        return row.read(event, self.prompt_logprobs.get(number, ()))

    async def whole(self, jobs: Sequence[Events]) -> bytes:
        """The answer at its end, as JSON."""
        events = [(number, event) for number, job in enumerate(jobs) async for event in job]

        def build() -> bytes:
            for number, event in sorted(events, key=lambda pair: pair[1].index):  # the first has the prompt's scores
                self._choice(number, event)
            choices = [row.whole() for row in self.rows]
            return json.dumps(self._envelope(self.object) | {"choices": choices, "usage": self.usage()}).encode()

        return await asyncio.to_thread(build)  # many log-probabilities are much work

    async def stream(self, jobs: Sequence[Events]) -> AsyncIterator[bytes]:
        """Server-sent events. An error after the first is an event too, and the last."""
        options = getattr(self.body, "stream_options", None)
        has_usage = bool(options and options.include_usage)
        chunk = self._envelope(self.object if self.object == "text_completion" else f"{self.object}.chunk")
        usage = {"usage": None} if has_usage else {}
        for number, job in enumerate(jobs):
            async for event in job:
                if (choice := self._choice(number, event)) is not None:
                    yield event_line(chunk | {"choices": [choice]} | usage)
        if has_usage:
            yield event_line(chunk | {"choices": [], "usage": self.usage()})
        yield b"data: [DONE]\n\n"

    def _envelope(self, kind: str) -> JSON:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model.name}

    def usage(self) -> JSON:
        """Tokens of all prompts, each counted once, and of all continuations."""
        prompt = sum(len(request.prompt) for request in self.requests)
        return {
            "prompt_tokens": prompt,
            "completion_tokens": self.completion_tokens,
            "total_tokens": prompt + self.completion_tokens,
            "prompt_tokens_details": {"cached_tokens": self.cached_tokens},
        }


def event_line(content: JSON) -> bytes:
    """ASCII alone: some clients take other characters, such as U+2028, for line ends."""
    return f"data: {json.dumps(content)}\n\n".encode()
