"""Models small enough for every test, the server around them on a real socket, and clients that keep the raw bytes."""

from __future__ import annotations

import contextlib
import http.client
import json
import threading
from collections.abc import Iterator, Mapping, Sequence
from typing import Any
from urllib.parse import urlsplit

import torch

from slmkit.data import stories
from slmkit.generation.engine import Engine, Request
from slmkit.model.config import SLMConfig
from slmkit.model.initialization import build_decoder
from slmkit.serving.app import create_app
from slmkit.serving.doors import Limits
from slmkit.serving.models import ServedModel
from slmkit.serving.server import Server, bind, url_of
from slmkit.serving.worker import Worker
from slmkit.tokenizer import SLMTokenizer
from tests.generation.helpers import ScriptedModel

JSON = dict[str, Any]
TEXT = """Once upon a time there was a fox who wanted a kite. The fox asked the owl, and the owl said: "Wait for wind."
They waited near the river until the evening, and when the wind came the kite flew over the hill and the mill.
{"name": "Ann", "age": 7, "tags": ["a", "b"], "is_ok": true, "more": null, "value": -1.5e3}
It was 12:30 on 2024-02-29; 1, 2, 3, 4, 5, 6, 7, 8, 9, 10. Äpfel, Öl, naïve café, один два три, 猫が座った, नमस्ते 😀.
"""
# Tokens of the scripted model beside the bytes.
WORDS = [
    " A", " B", " O", " P", " Q", " R", "?\n", " Alice", "!", "Alice:", " O P", "ab", "bc", "abc", "ca", "aa", " the",
    "<tool_call>\n", "{\"name\": \"f\"", "\ufffd",
]  # fmt: skip


def tokenizer_512() -> SLMTokenizer:
    """A byte-level BPE of 512 tokens, with ChatML."""
    tokenizer = SLMTokenizer(512)
    tokenizer.train([TEXT] * 3 + [story.text for story in stories.tell_many(0, 40)])
    assert len(tokenizer) == 512
    return tokenizer


def llama(name: str = "m1", context: int = 1024, **options: Any) -> ServedModel:
    """M1: two layers, 64 wide; weights large enough for it to say something definite."""
    config = SLMConfig(
        vocab_size=512, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=context, initializer_range=0.3,
    )  # fmt: skip
    return ServedModel(name, build_decoder(config, seed=1).eval(), tokenizer_512(), options=options)


def gemma(name: str = "m2", **options: Any) -> ServedModel:
    """M2: Gemma 3 with a window of 16 on five of six layers; its head is wider than the vocabulary."""
    config = SLMConfig(
        model_type="gemma3_text", vocab_size=520, hidden_size=64, intermediate_size=96, num_hidden_layers=6,
        num_attention_heads=4, num_key_value_heads=1, head_dim=16, max_position_embeddings=256, sliding_window=16,
        layer_types=["sliding_attention"] * 5 + ["full_attention"], initializer_range=0.3,
    )  # fmt: skip
    return ServedModel(name, build_decoder(config, seed=2).eval(), tokenizer_512(), options=options)


class Script:
    """M3: says what it is told, after any prompt."""

    def __init__(self, name: str = "m3", context: int = 4096, **options: Any) -> None:
        self.tokenizer = SLMTokenizer(260).extended(added_tokens=WORDS)
        self.decoder = ScriptedModel(len(self.tokenizer), 1, [], context)
        self.served = ServedModel(name, self.decoder, self.tokenizer, options=options)  # type: ignore[arg-type]

    def ids(self, *tokens: str | bytes | int) -> list[int]:
        """Words of `WORDS` as one token, other text and bytes as one token a byte."""
        found: list[int] = []
        for token in tokens:
            if isinstance(token, int):
                found.append(token)
            elif token in self.tokenizer.added_words:
                found.append(self.tokenizer.added_words[str(token)])
            else:
                found += self.tokenizer.encode_bytes(token if isinstance(token, bytes) else token.encode())
        return found

    def say(self, *tokens: str | bytes | int, prompt: int = 1, ends: bool = True) -> None:
        """What the model answers to a prompt of `prompt` tokens; with `ends` an end token follows."""
        end = self.tokenizer.eos_token_id
        said = [*self.ids(*tokens), *([end] if ends else [])]
        self.decoder.script = [0] * (prompt - 1) + said + [end] * self.decoder.max_positions

    def chat_length(self, body: JSON) -> int:
        """Tokens of a chat's prompt."""
        from slmkit.serving.models import chat_requests
        from slmkit.serving.protocol import ChatRequest, read

        asked = read(ChatRequest, json.dumps(body).encode())
        return len(chat_requests(asked, self.served, "")[0].prompt)


@contextlib.contextmanager
def running(app: Any, limits: Limits | None = None, worker: Any = None) -> Iterator[str]:
    """What `serve` does, in a thread, on a free port of 127.0.0.1: gives the URL, such as http://127.0.0.1:40001."""
    listening, is_ready = bind("127.0.0.1", 0), threading.Event()
    server = Server(app, limits or Limits(), worker, 0.0, is_ready.set)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, name="slm-http", daemon=True)
    thread.start()
    is_ready.wait()
    try:
        yield url_of(listening)
    finally:
        server.should_exit = True
        thread.join()


@contextlib.contextmanager
def serving(*models: ServedModel, limits: Limits | None = None, **options: Any) -> Iterator[Client]:
    """The server in a thread; `options` are the worker's."""
    worker = Worker(models, **options)
    worker.start()
    limits = limits or Limits()
    try:
        with running(create_app(worker, {model.name: model for model in models}), limits, worker) as url:
            yield Client(url, worker)
    finally:
        worker.stop()


class Answer:
    """What came back, whole."""

    def __init__(self, status: int, headers: Mapping[str, str], raw: bytes) -> None:
        self.status, self.headers, self.raw = status, {name.lower(): value for name, value in headers.items()}, raw

    @property
    def json(self) -> Any:
        return json.loads(self.raw)

    @property
    def error(self) -> JSON:
        """Its error, if it is one in OpenAI's envelope."""
        assert self.status >= 400, self.raw
        assert self.headers["content-type"].startswith("application/json")
        assert self.json.keys() == {"error"}
        error = self.json["error"]
        assert error.keys() == {"message", "type", "param", "code"}
        assert isinstance(error["message"], str)
        assert "\n" not in error["message"]
        return error

    @property
    def events(self) -> list[JSON]:
        """The chunks of a stream that ended as it should."""
        assert self.status == 200, self.raw
        assert self.headers["content-type"].startswith("text/event-stream")
        return chunks_of(self.raw)

    @property
    def texts(self) -> list[str]:
        """Of the choices, in order, streamed or not."""
        if not self.headers["content-type"].startswith("text/event-stream"):
            assert self.status == 200, self.raw
            choices = sorted(self.json["choices"], key=lambda choice: choice["index"])
            return [choice["text"] if "text" in choice else choice["message"]["content"] for choice in choices]
        found: dict[int, str] = {}
        for choice in (choice for event in self.events for choice in event["choices"]):
            piece = choice["text"] if "text" in choice else choice["delta"].get("content", "")
            found[choice["index"]] = found.get(choice["index"], "") + piece
        return [found[index] for index in sorted(found)]


def chunks_of(raw: bytes) -> list[JSON]:
    """The JSON of each event; the last one is [DONE]."""
    assert raw.endswith(b"data: [DONE]\n\n"), raw[-300:]
    *events, end = raw.decode().split("\n\n")[:-1]
    assert end == "data: [DONE]"
    return [json.loads(event.removeprefix("data: ")) for event in events if not event.startswith(":")]


class Client:
    """Plain HTTP/1.1 over one socket a request."""

    def __init__(self, url: str, worker: Worker) -> None:
        self.url, self.worker = url, worker

    def connect(self, timeout: float = 60.0) -> http.client.HTTPConnection:
        return http.client.HTTPConnection(urlsplit(self.url).netloc, timeout=timeout)

    def send(self, method: str, path: str, body: Any = None, **headers: str) -> Answer:
        content = body if isinstance(body, bytes | None) else json.dumps(body).encode()
        connection = self.connect()
        try:
            connection.request(method, path, content, {"Content-Type": "application/json", **headers})
            response = connection.getresponse()
            return Answer(response.status, dict(response.getheaders()), response.read())
        finally:
            connection.close()

    def get(self, path: str) -> Answer:
        return self.send("GET", path)

    def post(self, path: str, body: Any = None, **fields: Any) -> Answer:
        return self.send("POST", f"/v1/{path}", {**body, **fields} if isinstance(body, dict) else body)

    def completion(self, **fields: Any) -> Answer:
        return self.post("completions", fields)

    def chat(self, text: str | list[JSON] = "Hello", **fields: Any) -> Answer:
        messages = [{"role": "user", "content": text}] if isinstance(text, str) else text
        return self.post("chat/completions", {"messages": messages, **fields})

    def rows(self, model: ServedModel) -> int:
        """In the engine's slots, or waiting."""
        return model.engine.running_rows + model.engine.waiting_rows


def alone(model: ServedModel, request: Request) -> list[str]:
    """The texts of a request in an engine of its own, without the server."""
    engine = Engine(model.decoder, model.tokenizer)
    engine.insert(request)
    texts = [""] * request.n
    while engine.is_busy:
        for event in engine.step():
            texts[event.index] += event.text
    return texts


def direct_logprobs(model: ServedModel, ids: Sequence[int]) -> torch.Tensor:
    """ids [tokens] → log-probabilities of each token but the first, [tokens - 1, vocab_size], in one forward pass."""
    with torch.inference_mode():
        hidden = model.decoder(torch.tensor([list(ids)]))
        return model.decoder.logits(hidden)[0, :-1].float().log_softmax(-1)
