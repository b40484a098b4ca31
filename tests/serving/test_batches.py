"""Many requests at once: each gets what it gets alone, and those whose client goes away leave at once."""

from __future__ import annotations

import json
import os
import random
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from urllib.parse import urlsplit

import pytest

from slmkit.serving.doors import Limits
from slmkit.serving.models import ServedModel
from slmkit.serving.worker import Worker
from tests.serving.servers import TEXT, Client, gemma, llama, serving
from tests.serving.test_chat import said

IS_LONG = bool(os.environ.get("SLMKIT_TEST_LOAD"))  # `make test-load`
SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 8}, "age": {"type": "integer", "maximum": 99, "minimum": 0}},
    "required": ["name", "age"],
    "additionalProperties": False,
}
MIXED: list[dict[str, Any]] = [
    {"seed": 1},
    {"seed": 2, "repetition_penalty": 1.3},
    {"seed": 3, "presence_penalty": 0.8},
    {"seed": 4, "logit_bias": {"40": 100, "41": -100}},
    {"seed": 5, "top_k": 1},
    {"seed": 6, "min_p": 0.1},
    {"seed": 7, "structured_outputs": {"regex": "[a-z]{3,9}"}},
    {"seed": 8, "structured_outputs": {"json": SCHEMA}},
    {"seed": 9, "temperature": 0.5},
    {"seed": 10, "stop": ["e"]},
    {"seed": 11, "logprobs": 3},
    {"seed": 12, "n": 2},
]


def plain(answer: Any) -> Any:
    """What may not depend on others."""
    assert answer.status == 200, answer.raw
    return [(choice["text"], choice["finish_reason"], rounded(choice["logprobs"])) for choice in answer.json["choices"]]


def rounded(found: Any) -> Any:
    return found and [None if value is None else round(value, 3) for value in found["token_logprobs"]]


@pytest.mark.parametrize("make", [llama, gemma])
def test_mixed_settings(make: Any) -> None:
    """All kinds of requests in one batch, begun in any order: each equals itself alone."""
    model: ServedModel = make()
    dice = random.Random(5)
    words = TEXT.split()
    asked = [
        {"model": model.name, "prompt": " ".join(dice.choices(words, k=3)), "max_tokens": 16, **fields}
        for fields in MIXED
    ]
    with serving(model) as client, ThreadPoolExecutor(len(asked)) as threads:
        alone = [plain(client.post("completions", body)) for body in asked]
        for _ in range(200 if IS_LONG else 12):
            order = dice.sample(range(len(asked)), len(asked))
            found = [threads.submit(client.post, "completions", asked[number]) for number in order]
            for number, answer in zip(order, found):
                assert plain(answer.result()) == alone[number], asked[number]


def test_what_is_cached_says_nothing_else() -> None:
    """Conversations with one system message, edited, asked again, longer and shorter by a token: as without a cache."""
    dice = random.Random(6)
    words = TEXT.split()
    chats = []
    for _ in range(60 if IS_LONG else 12):
        turns = [said("system", "You are a friend of the fox. " + " ".join(words[:20]))]
        for _ in range(dice.randint(1, 3)):
            turns += [
                said("user", " ".join(dice.choices(words, k=4))),
                said("assistant", " ".join(dice.choices(words, k=4))),
            ]
        question = said("user", " ".join(dice.choices(words, k=3)))
        chats += [[*turns, question], [*turns, question], [*turns, said("user", question["content"] + " a")]]
        chats += [[*turns, said("user", question["content"][:-1])], [*turns[:-1], said("assistant", "No."), question]]
    dice.shuffle(chats)
    fields: dict[str, Any] = {"max_tokens": 8, "temperature": 0}
    with_cache, without = llama("m1", max_rows=8), llama("m2", reuse=False)
    seen: list[list[int]] = []
    with serving(with_cache, without) as client, ThreadPoolExecutor(8) as threads:
        cached = list(threads.map(lambda chat: client.chat(chat, model="m1", **fields).json, chats))
        fresh = [client.chat(chat, model="m2", **fields).json for chat in chats]
    for one, other in zip(cached, fresh):
        assert one["choices"] == other["choices"]
        assert other["usage"]["prompt_tokens_details"] == {"cached_tokens": 0}
    counts = [answer["usage"]["prompt_tokens_details"]["cached_tokens"] for answer in cached]
    assert sum(counts) > 0
    for chat, count in zip(chats, counts):
        seen.append(with_cache.tokenizer.encode_chat(chat, add_generation_prompt=True).ids)
        assert count < len(seen[-1])
    for ids, count in zip(seen, counts):
        common = max(shared(ids, other) for other in seen if other is not ids)
        assert count <= common


def shared(one: list[int], other: list[int]) -> int:
    return next((place for place, (a, b) in enumerate(zip(one, other)) if a != b), min(len(one), len(other)))


# -- clients that go away ---------------------------------------------------------------------------------------------


class Slow:
    """A model whose steps take a while, and that counts the tokens it reads. `order`: how many each pass had, and
    "insert" where the engine was given a request. `gate`: where each pass waits while it is not set.
    """

    def __init__(self, seconds: float, **options: Any) -> None:
        self.served, self.read, self.seconds = llama("slow", **options), 0, seconds
        self.order, self.gate = list[int | str](), threading.Event()
        self.gate.set()
        forward, insert = self.served.decoder.forward, self.served.engine.insert

        def slow(ids: Any, *rest: Any, **named: Any) -> Any:
            time.sleep(self.seconds)
            self.read += ids.numel()
            self.order.append(ids.numel())
            assert self.gate.wait(120)
            return forward(ids, *rest, **named)

        def noted(request: Any) -> int:
            self.order.append("insert")
            return insert(request)

        self.served.engine.insert = noted  # type: ignore[method-assign]
        self.served.decoder.forward = slow  # type: ignore[method-assign]
        self.served.engine.compiled = self.served.decoder


def ask_and_leave(client: Client, body: dict[str, Any], after: Any, path: str = "completions") -> None:
    """Send a request, wait for `after(socket)`, and close the connection."""
    content = json.dumps(body).encode()
    address = urlsplit(client.url)
    with socket.create_connection((address.hostname, address.port), timeout=30) as connection:
        head = f"POST /v1/{path} HTTP/1.1\r\nHost: {address.netloc}\r\nContent-Type: application/json\r\n"
        connection.sendall(f"{head}Content-Length: {len(content)}\r\n\r\n".encode() + content)
        after(connection)


def wait_for(condition: Any, seconds: float = 120.0) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.005)


@pytest.fixture
def slow() -> Iterator[tuple[Slow, Client]]:
    model = Slow(0.05, max_rows=2)
    with serving(model.served) as client:
        yield model, client


@pytest.mark.parametrize("stream", [True, False])
def test_leaving_while_it_is_generated(slow: tuple[Slow, Client], stream: bool) -> None:
    model, client = slow
    body = {"model": "slow", "prompt": "The fox", "max_tokens": 900, "ignore_eos": True, "stream": stream, "n": 2}
    ask_and_leave(client, body, lambda connection: wait_for(lambda: model.read > 20) or model.gate.clear())
    # The thread has word of it at the gate, or had it before.
    wait_for(lambda: not client.worker._commands.empty() or client.rows(model.served) == 0)
    passes = len(model.order)
    model.gate.set()
    wait_for(lambda: client.rows(model.served) == 0)
    time.sleep(4 * model.seconds)
    assert len(model.order) <= passes + 1  # if it was not in the step yet


def test_leaving_while_the_prompt_is_read(slow: tuple[Slow, Client]) -> None:
    model, client = slow
    prompt = [number % 500 + 5 for number in range(900)]  # four passes of 256
    body = {"model": "slow", "prompt": prompt, "max_tokens": 50, "stream": True}
    ask_and_leave(client, body, lambda connection: wait_for(lambda: model.read > 0))
    wait_for(lambda: client.rows(model.served) == 0)
    assert model.read <= 3 * 256


def test_leaving_the_queue(slow: tuple[Slow, Client]) -> None:
    model, client = slow
    with ThreadPoolExecutor() as threads:
        long = threads.submit(
            client.completion, model="slow", prompt="The", max_tokens=150, n=2, ignore_eos=True, temperature=0
        )
        wait_for(lambda: model.read > 0)
        prompt = [number % 500 + 5 for number in range(600)]
        for stream in (True, False):
            body = {"model": "slow", "prompt": prompt, "max_tokens": 50, "stream": stream}
            ask_and_leave(client, body, lambda connection: wait_for(lambda: client.rows(model.served) == 3))
            wait_for(lambda: client.rows(model.served) == 2)
        model.seconds = 0.0
        assert len(long.result().texts) == 2
    assert model.read < 2 * 150 + 50  # the others never began


def test_those_who_stay_are_not_disturbed() -> None:
    model = llama(max_rows=8)
    bodies = [{"model": "m1", "prompt": word, "max_tokens": 20, "seed": 3} for word in TEXT.split()[:20]]
    with serving(model, max_queue=1000) as client, ThreadPoolExecutor(16) as threads:
        alone = [client.post("completions", body).texts for body in bodies]

        def leave(number: int) -> None:
            body = {**bodies[number % 20], "max_tokens": 500, "ignore_eos": True, "stream": number % 3 > 0}
            if number % 3 == 2:
                ask_and_leave(client, body, lambda connection: connection.recv(200))
            else:
                ask_and_leave(client, body, lambda connection: time.sleep(0.01))

        leaving = [threads.submit(leave, number) for number in range(100)]
        staying = [threads.submit(client.post, "completions", bodies[number % 20]) for number in range(40)]
        for number, answer in enumerate(staying):
            assert answer.result().texts == alone[number % 20]
        for one in leaving:
            one.result()
        wait_for(lambda: client.rows(model) == 0)
    assert not [thread for thread in threading.enumerate() if thread.name == "slm-http"]


# -- the event loop ---------------------------------------------------------------------------------------------------


LARGE = ["a" * 5_000_000, (TEXT * 12_000)[:5_000_000]]
ASKING: dict[str, Any] = {
    "completions": lambda text: {"prompt": text},
    "chat/completions": lambda text: {"messages": [said("user", text)]},
    "embeddings": lambda text: {"input": text},
}
SHORT = {"completions": {"max_tokens": 2}, "chat/completions": {"max_tokens": 2}}


@pytest.mark.parametrize("path", ASKING)
def test_the_server_answers_others_while_a_prompt_is_read(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The reading of a prompt is held until others were answered, which does not happen if it holds the event loop."""
    model, is_reading, may_read = llama(), threading.Event(), threading.Event()
    room = model.expect_room

    def held(*arguments: Any) -> None:
        is_reading.set()
        assert may_read.wait(120), "nobody was answered meanwhile"
        room(*arguments)

    with serving(model, limits=Limits(max_body=8 * 2**20)) as client, ThreadPoolExecutor(1) as threads:
        body = {"model": "m1", "prompt": "The", "max_tokens": 300, "ignore_eos": True, "stream": True}
        connection = client.connect()
        connection.request("POST", "/v1/completions", json.dumps(body))
        stream = connection.getresponse()
        monkeypatch.setattr(model, "expect_room", held)
        asked = threads.submit(client.post, path, {"model": "m1", **ASKING[path](LARGE[0])})
        assert is_reading.wait(120)
        for _ in range(3):
            assert client.get("/health").json == {"status": "ok"}
        assert stream.read().endswith(b"data: [DONE]\n\n")  # all of the other one's answer
        assert not asked.done()
        may_read.set()
        assert asked.result().error["code"] == "context_length_exceeded"
        connection.close()


class Counting:
    """An encoder that notes which of its functions that encode are called."""

    def __init__(self, encoder: Any) -> None:
        self.encoder, self.calls = encoder, list[str]()

    def __getattr__(self, name: str) -> Any:
        if name.startswith("encode"):
            self.calls.append(name)
        return getattr(self.encoder, name)


@pytest.mark.parametrize("text", LARGE, ids=["a", "mixed"])
@pytest.mark.parametrize("path", ASKING)
def test_a_prompt_that_cannot_fit_is_refused_before_it_is_encoded(
    path: str, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would take seconds."""
    model = llama()
    encoder = Counting(model.tokenizer._encoder)
    monkeypatch.setattr(model.tokenizer, "_encoder", encoder)
    with serving(model, limits=Limits(max_body=8 * 2**20)) as client:
        answer = client.post(path, {"model": "m1", **ASKING[path](text)})
        assert answer.error["code"] == "context_length_exceeded"
        assert encoder.calls == []
        assert client.post(path, {"model": "m1", **ASKING[path]("The fox"), **SHORT.get(path, {})}).status == 200
        assert encoder.calls


def test_a_full_queue() -> None:
    """429 with the time to wait, for some; the others are answered."""
    model = Slow(0.2, max_rows=1)
    with serving(model.served, max_queue=2) as client, ThreadPoolExecutor(3) as threads:
        fields: dict[str, Any] = {"model": "slow", "prompt": "The", "max_tokens": 30, "temperature": 0}
        fields["ignore_eos"] = True
        found = [threads.submit(client.completion, **fields, stream=number % 2 == 0) for number in range(3)]
        wait_for(lambda: client.rows(model.served) == 3)
        refused = [client.completion(**fields, stream=stream) for stream in (True, False)]
        model.seconds = 0.0
        answers = [one.result() for one in found]
    assert [answer.status for answer in answers] == [200] * 3
    assert len({answer.texts[0] for answer in answers}) == 1
    for answer in refused:
        assert answer.status == 429
        assert answer.error["type"] == "rate_limit_error"
        assert int(answer.headers["retry-after"]) >= 1


def test_the_end_of_the_server() -> None:
    """What is open ends with an error in the stream, and nothing new is taken."""
    model = Slow(0.05)
    with serving(model.served) as client, ThreadPoolExecutor(2) as threads:
        worker: Worker = client.worker
        fields: dict[str, Any] = {"model": "slow", "prompt": "The", "max_tokens": 500, "ignore_eos": True}
        open_one = threads.submit(client.completion, **fields, stream=True)
        wait_for(lambda: model.read > 5)
        draining = threads.submit(lambda: __import__("asyncio").run(worker.drain(0.3)))
        wait_for(lambda: worker.state == "draining")
        refused = client.completion(**fields)
        assert refused.status == 503
        assert refused.error["code"] == "service_unavailable"
        assert refused.headers["retry-after"]
        assert client.get("/health").status == 503
        assert client.post("embeddings", {"model": "slow", "input": "The"}).status == 503
        draining.result()
        last = open_one.result().raw.decode().split("\n\n")[-2]
        assert json.loads(last.removeprefix("data: "))["error"]["type"] == "server_error"
