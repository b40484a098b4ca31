"""Streams: borders of stop strings and characters, the usage chunk, several choices, errors."""

from __future__ import annotations

import asyncio
import json
import random
import re
import time
from collections.abc import AsyncIterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch

from slmkit.generation.engine import Event
from slmkit.serving import app
from slmkit.serving.answers import Answer as Made
from slmkit.serving.models import ServedModel, completion_requests
from slmkit.serving.protocol import CompletionRequest, read
from tests.long import several
from tests.serving.servers import Answer, Client, Script, chunks_of, llama, serving

MODES: list[dict[str, Any]] = [{"stream": False}, {"stream": True}, {"n": 2}, {"n": 2, "stream": True}]


def oracle(text: str, stops: list[str]) -> str:
    """Everything before the stop string that is complete first."""
    ends = [(text.find(stop) + len(stop), text.find(stop)) for stop in stops if stop in text]
    return text[: min(ends)[1]] if ends else text


@pytest.mark.parametrize(
    ("tokens", "stops", "expected"),
    [
        ([" A", " B", " O", " P", " Q", " R"], ["O P Q"], " A B "),
        (["W", "?\n", " A"], ["\n"], "W?"),
        ([" Alice", "!"], ["\n", "Alice:"], " Alice!"),
        ([" O P", " Q"], ["Q", " P Q"], " O"),
    ],
)
def test_stop_strings_over_borders_of_tokens(
    client: Client, m3: Script, tokens: list[str], stops: list[str], expected: str
) -> None:
    m3.say(*tokens)
    for mode in MODES:
        answer = client.completion(model="m3", prompt=[5], stop=stops, max_tokens=100, **mode)
        assert answer.texts == [expected] * mode.get("n", 1)
        assert finishes(answer) == ["stop"] * mode.get("n", 1)
        deltas = (
            [choice["text"] for event in answer.events for choice in event["choices"]] if mode.get("stream") else []
        )
        assert sum(map(len, deltas)) == (len(expected) * mode.get("n", 1) if deltas else 0)


def finishes(answer: Answer) -> list[str]:
    """The finish reasons in order of the index; each choice has one."""
    is_stream = answer.headers["content-type"].startswith("text/event-stream")
    choices = (
        [choice for event in answer.events for choice in event["choices"]] if is_stream else answer.json["choices"]
    )
    found = [(choice["index"], choice["finish_reason"]) for choice in choices if choice["finish_reason"]]
    assert len({index for index, _ in found}) == len(found)
    return [reason for _, reason in sorted(found)]


def test_stop_strings_at_random(client: Client, m3: Script) -> None:
    dice = random.Random(1)
    pieces = ["a", "b", "c", "ab", "bc", "abc", "ca", "aa"]
    for _ in range(several(60, 200)):
        tokens = dice.choices(pieces, k=dice.randint(1, 10))
        stops = ["".join(dice.choices("abc", k=dice.randint(1, 4))) for _ in range(dice.randint(1, 3))]
        m3.say(*tokens)
        expected = oracle("".join(tokens), stops)
        for mode in MODES[1:3]:
            answer = client.completion(model="m3", prompt=[5], stop=stops, max_tokens=100, **mode)
            assert answer.texts == [expected] * mode.get("n", 1), (tokens, stops)


class Kept:
    """A job whose events are all there."""

    def __init__(self, events: list[Event]) -> None:
        self.events = events

    async def __aiter__(self) -> AsyncIterator[Event]:
        for event in self.events:
            yield event


def test_stop_strings_of_hundreds_of_texts() -> None:
    """As above, below the socket: 200 texts of a script at a time, since a longer prompt begins further on in it."""
    dice, script = random.Random(2), Script(max_rows=64)
    for _ in range(several(2, 10)):
        tokens = dice.choices(["a", "b", "c", "ab", "bc", "abc", "ca", "aa"], k=210)
        script.say(*tokens)
        engine, asked = script.served.new_engine(), {}
        for start in range(200):
            count = dice.randint(1, 10)
            stops = ["".join(dice.choices("abc", k=dice.randint(1, 4))) for _ in range(dice.randint(1, 3))]
            expected = oracle("".join(tokens[start : start + count]), stops)
            for n in (1, 2):
                fields = {"model": "m3", "prompt": [5] * (start + 1), "stop": stops, "max_tokens": count, "n": n}
                body = read(CompletionRequest, json.dumps(fields).encode())
                requests = completion_requests(body, script.served, "")
                asked[engine.insert(requests[0])] = body, requests, list[Event](), expected
        while engine.is_busy:
            for event in engine.step():
                asked[event.handle][2].append(event)
        asyncio.run(check_texts(script, [*asked.values()]))


async def check_texts(script: Script, asked: Sequence[tuple[Any, Any, list[Event], str]]) -> None:
    for body, requests, events, expected in asked:
        for is_stream in (False, True):
            texts = await texts_of(Made(script.served, body, requests), Kept(events), is_stream)
            assert texts == [expected] * (body.n or 1), (body.stop, expected)


async def texts_of(answer: Made, job: Kept, is_stream: bool) -> list[str]:
    if not is_stream:
        return [choice["text"] for choice in json.loads(await answer.whole([job]))["choices"]]
    texts = [""] * (answer.body.n or 1)
    for chunk in chunks_of(b"".join([event async for event in answer.stream([job])])):
        for choice in chunk["choices"]:
            texts[choice["index"]] += choice["text"]
    return texts


def test_characters_split_over_tokens(client: Client, m3: Script) -> None:
    text = "x 😀 y 👨‍👩‍👧 नमस्ते e\u0301 é z \u2028 猫"
    m3.say(*[bytes([byte]) for byte in text.encode()])
    for mode in MODES:
        answer = client.completion(model="m3", prompt=[5], max_tokens=500, **mode)
        assert answer.texts == [text] * mode.get("n", 1)
        assert "\ufffd" not in "".join(answer.texts)
        if mode.get("stream"):
            assert answer.raw.isascii()  # so that no reader takes U+2028 for the end of a line
            for event in answer.events:
                assert all("\ufffd" not in choice["text"] for choice in event["choices"])


@pytest.mark.parametrize("cut", range(1, 12))
def test_an_end_within_a_character(client: Client, m3: Script, cut: int) -> None:
    text = "a😀b猫é"
    m3.say(*[bytes([byte]) for byte in text.encode()])
    whole = client.completion(model="m3", prompt=[5], max_tokens=cut)
    (said,) = whole.texts
    assert said.rstrip("\ufffd") == text.encode()[:cut].decode(errors="ignore")
    assert said == text.encode()[:cut].decode(errors="replace")
    streamed = client.completion(model="m3", prompt=[5], max_tokens=cut, stream=True)
    assert streamed.texts == [said]
    deltas = [choice["text"] for event in streamed.events for choice in event["choices"]]
    assert all("\ufffd" not in delta for delta in deltas[:-1])


def test_a_model_that_says_the_replacement_character(client: Client, m3: Script) -> None:
    m3.say("a", "\ufffd", "b")
    for stream in (False, True):
        assert client.completion(model="m3", prompt=[5], stream=stream).texts == ["a\ufffdb"]


@pytest.mark.parametrize("route", ["completions", "chat/completions"])
@pytest.mark.parametrize("n", [1, 2])
@pytest.mark.parametrize("options", ["absent", None, {}, {"include_usage": False}, {"include_usage": True}])
def test_usage_chunk(client: Client, route: str, n: int, options: Any) -> None:
    body: dict[str, Any] = {"model": "m1", "n": n, "max_tokens": 5, "seed": 3}
    body |= {"prompt": "The fox"} if route == "completions" else {"messages": [{"role": "user", "content": "Hi"}]}
    whole = client.post(route, body).json
    given = {} if options == "absent" else {"stream_options": options}
    events = client.post(route, body, stream=True, **given).events
    if isinstance(options, dict) and options.get("include_usage"):
        *events, last = events
        assert last["choices"] == []
        assert last["usage"]["completion_tokens"] == whole["usage"]["completion_tokens"]
        assert last["usage"]["prompt_tokens"] == whole["usage"]["prompt_tokens"]
        assert last["usage"]["total_tokens"] == whole["usage"]["total_tokens"]
        assert all(event["usage"] is None for event in events)
        assert any(choice["finish_reason"] for choice in events[-1]["choices"])
    else:
        assert all("usage" not in event for event in events)
    assert all(event["choices"] for event in events)
    assert len({(event["id"], event["created"]) for event in events}) == 1
    assert events[0]["id"] != whole["id"]


def test_usage_counts_the_tokens_of_all_choices(client: Client, m3: Script) -> None:
    m3.say("a", "b")
    usage = client.completion(model="m3", prompt=[5], n=3).json["usage"]
    assert (usage["prompt_tokens"], usage["completion_tokens"], usage["total_tokens"]) == (1, 9, 10)  # and the ends


def test_several_choices(client: Client) -> None:
    asked: dict[str, Any] = {"model": "m1", "n": 3, "seed": 7, "temperature": 1, "max_tokens": 12}
    streamed = client.chat("Hello", stream=True, **asked)
    first: dict[int, Any] = {}
    ended: set[int] = set()
    for choice in (choice for event in streamed.events for choice in event["choices"]):
        assert choice["index"] not in ended
        first.setdefault(choice["index"], choice["delta"])
        if choice["finish_reason"]:
            ended.add(choice["index"])
    assert ended == first.keys() == {0, 1, 2}
    assert all(delta["role"] == "assistant" for delta in first.values())
    assert len(set(streamed.texts)) == 3
    assert streamed.texts == client.chat("Hello", **asked).texts == client.chat("Hello", stream=True, **asked).texts
    # One that stops does not stop the others.
    stop = streamed.texts[1].strip()[:3]
    texts = client.chat("Hello", stop=[stop], **asked).texts
    assert texts == [oracle(text, [stop]) for text in streamed.texts]


def test_roles_come_once_and_first(client: Client) -> None:
    events = client.chat(model="m1", stream=True, max_tokens=6).events
    roles = ["role" in choice["delta"] for event in events for choice in event["choices"]]
    assert roles == [True] + [False] * (len(roles) - 1)
    assert {event["object"] for event in events} == {"chat.completion.chunk"}


def test_an_error_in_mid_stream_is_the_last_event(m3: Script) -> None:
    script = Script()
    script.say("a", "b", "c", "d")
    with serving(script.served) as client:
        logits = script.decoder.logits

        def break_down(hidden: Any) -> Any:
            values = logits(hidden)
            return values * torch.nan if bool((hidden >= 2).any()) else values

        script.decoder.logits = break_down  # type: ignore[method-assign]
        answer = client.completion(model="m3", prompt=[5], stream=True)
        events = answer.raw.decode().split("\n\n")
        assert events[-1] == ""
        assert "[DONE]" not in answer.raw.decode()
        error = json.loads(events[-2].removeprefix("data: "))["error"]
        assert error.keys() == {"message", "type", "param", "code"}
        assert error["type"] == "server_error"
        texts = [json.loads(event.removeprefix("data: "))["choices"][0]["text"] for event in events[:-2]]
        assert "".join(texts) == "ab"
        failed = client.completion(model="m3", prompt=[5])
        assert failed.status == 500
        assert failed.error["message"] == error["message"]
        script.decoder.logits = logits  # type: ignore[method-assign]
        assert client.completion(model="m3", prompt=[5]).texts == ["abcd"]


def test_a_fault_of_the_engine_ends_a_stream_with_an_error() -> None:
    script = Script()
    script.say("a", "b", "c", "d")
    with serving(script.served) as client:
        logits = script.decoder.logits

        def fall(hidden: Any) -> Any:
            if bool((hidden >= 2).any()):
                raise RuntimeError("no more")
            return logits(hidden)

        script.decoder.logits = fall  # type: ignore[method-assign]
        answer = client.completion(model="m3", prompt=[5], stream=True)
        last = json.loads(answer.raw.decode().split("\n\n")[-2].removeprefix("data: "))
        assert last["error"]["type"] == "server_error"
        assert "no more" not in answer.raw.decode()
        assert client.completion(model="m3", prompt=[5]).error["type"] == "server_error"
        script.decoder.logits = logits  # type: ignore[method-assign]
        assert client.completion(model="m3", prompt=[5]).texts == ["abcd"]


def test_a_comment_keeps_a_waiting_stream_open(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(app, "PATIENCE", 0.05)
    script = Script(max_rows=1)
    script.say("a", "b", "c")
    with serving(script.served) as client, ThreadPoolExecutor() as threads:
        forward = script.decoder.forward

        def slow(*arguments: Any) -> Any:
            time.sleep(0.2)
            return forward(*arguments)

        script.decoder.forward = slow  # type: ignore[method-assign]
        answers = [threads.submit(client.completion, model="m3", prompt=[5], stream=True) for _ in range(2)]
        raws = [answer.result().raw for answer in answers]
        assert any(re.match(rb"(: waiting\n\n)+data: ", raw) for raw in raws)
        assert all(answer.result().texts == ["abc"] for answer in answers)


def test_ids_are_unique(client: Client, m1: ServedModel) -> None:
    asked = read(CompletionRequest, b'{"model": "m1", "prompt": "a"}')
    assert len({Made(m1, asked, []).id for _ in range(10_000)}) == 10_000


def test_a_chat_ends_where_its_context_does() -> None:
    model = llama(context=40)
    with serving(model) as client:
        whole = client.chat("Hello", model="m1", ignore_eos=True)
        assert finishes(whole) == ["length"]
        assert whole.json["usage"]["total_tokens"] == 40
        assert finishes(client.chat("Hello", model="m1", ignore_eos=True, stream=True)) == ["length"]
