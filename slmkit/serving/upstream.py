"""`--engine vllm` and `--engine llamacpp`: each model in a child process on loopback, behind the same doors and names.

A request goes to the child of its model, and what comes back is handed on byte for byte; of an error the message, in
our envelope. A child that ends by itself is a failure, as that of the engines' thread is in `worker`.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import secrets
import shutil
import time
from collections.abc import AsyncGenerator, Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import fastapi
import h11
from fastapi.responses import Response

from slmkit.config import UserError
from slmkit.files.child import Child, free_port
from slmkit.serving.answers import event_line
from slmkit.serving.app import base_app, named
from slmkit.serving.metrics import Metrics
from slmkit.serving.protocol import JSON, ApiError, ChatRequest, Common, CompletionRequest, json_object, read, try_later
from slmkit.serving.worker import State, failed

MEMORY = 0.9  # of a GPU, for all models together; vLLM's own default for one
HANDED_ON = (b"content-type", b"content-length", b"retry-after")
GONE = (OSError, h11.RemoteProtocolError)


@dataclass(frozen=True)
class Engine:
    """A program whose child processes serve models.

    `commands`: model's name → from a port, the command that serves it there. `key`: the variable of the environment
    from which a child takes the key of its requests. `body`: from a request's path, body and the caller's key, what the
    child is asked.
    """

    name: str
    commands: Mapping[str, Callable[[int], list[str]]]
    key: str
    body: Callable[[str, bytes, str | None], JSON]


def vllm(directories: Mapping[str, Path]) -> Engine:
    """Raises `UserError` if it is not installed."""
    if shutil.which("vllm") is None:
        raise UserError("--engine vllm: no command vllm here: pip install vllm (it needs a GPU), or take slm")
    memory = MEMORY / len(directories)

    def command(name: str, directory: Path, port: int) -> list[str]:
        options = {"host": "127.0.0.1", "port": port, "served-model-name": name, "gpu-memory-utilization": memory}
        return ["vllm", "serve", str(directory), *(f"--{option}={value}" for option, value in options.items())]

    commands = {name: partial(command, name, directory) for name, directory in directories.items()}
    return Engine("vllm", commands, "VLLM_API_KEY", vllm_body)


def vllm_body(path: str, body: bytes, key: str | None) -> JSON:
    """With the caller's group of prefixes."""
    return json_object(body) | ({"cache_salt": key} if key and path != "/v1/embeddings" else {})


# What llama.cpp would ignore, or understand otherwise.
NOT_IN_LLAMA_CPP = {"best_of", "echo", "stop_token_ids", "structured_outputs"}


def llama_cpp_body(beginnings: Mapping[str, str], path: str, body: bytes, key: str | None) -> JSON:
    """The fields of our API that llama.cpp has, under its names: it trusts its own further ones. `beginnings`: by
    model, text before each prompt.
    """
    if path == "/v1/embeddings":
        raise ApiError(400, "no embeddings with --engine llamacpp: take slm", code="unsupported_parameter")
    request = read(ChatRequest if path == "/v1/chat/completions" else CompletionRequest, body)
    asked = request.model_dump(
        mode="json", by_alias=True, exclude_none=True, exclude={*Common.model_fields} - {"model"}
    )
    for name in sorted(asked.keys() & NOT_IN_LLAMA_CPP):
        raise ApiError(400, f"{name}: not with --engine llamacpp: take slm", name, "unsupported_parameter")
    if begins := beginnings.get(request.model):
        prompts = asked.get("prompt")
        whole = [begins + one if isinstance(one, str) else one for one in prompts] if isinstance(prompts, list) else ""
        asked |= {"prompt": whole or begins + prompts} if prompts else {}
    for message in asked.get("messages", ()):
        message["role"] = "system" if message["role"] == "developer" else message["role"]
    renamed = {"repetition_penalty": "repeat_penalty", "max_completion_tokens": "max_tokens"}
    # Beginnings of prompts are kept only where all callers are one.
    return {renamed.get(name, name): value for name, value in asked.items()} | {"cache_prompt": key is None}


class Upstream(Child):
    """The child that serves one model, with a key that this process alone knows."""

    def __init__(self, name: str, engine: Engine) -> None:
        self.name, self.key, self.port = name, secrets.token_hex(32), free_port()
        super().__init__(engine.commands[name](self.port), {engine.key: self.key})  # its log goes where errors go

    async def ask(self, method: str, path: str, body: bytes = b"") -> AsyncGenerator[Any]:
        """The events of the response: an `h11.Response`, then `h11.Data`. Raises one of `GONE` if it breaks off."""
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        try:
            connection = h11.Connection(h11.CLIENT)
            headers = {
                "host": f"127.0.0.1:{self.port}", "authorization": f"Bearer {self.key}", "connection": "close",
                "content-type": "application/json", "content-length": str(len(body)),
            }  # fmt: skip
            request = h11.Request(method=method, target=path, headers=[*headers.items()])
            for part in (request, h11.Data(data=body), h11.EndOfMessage()):
                writer.write(connection.send(part) or b"")
            while not isinstance(event := connection.next_event(), h11.EndOfMessage):
                if event is h11.NEED_DATA:
                    connection.receive_data(await reader.read(2**16))
                else:
                    yield event
        finally:
            writer.close()

    async def is_well(self) -> bool:
        with contextlib.suppress(*GONE, TimeoutError):
            async with asyncio.timeout(5), contextlib.aclosing(self.ask("GET", "/health")) as events:
                return (await anext(events)).status_code == 200
        return False


class Upstreams:
    """The children of all models. To `server` and `app` it is what the worker is; `app` hands requests on."""

    def __init__(self, engine: Engine, most_open: int, request_seconds: float) -> None:
        """`most_open`: requests at once."""
        self.engine = engine
        self.most_open, self.request_seconds, self.open, self.is_draining = most_open, request_seconds, 0, False
        self.metrics = Metrics([])
        self.children = {name: Upstream(name, engine) for name in engine.commands}
        entry = {"object": "model", "created": int(time.time()), "owned_by": engine.name}
        self.app = base_app(self, {name: {"id": name, **entry} for name in self.children})
        for path in ("/v1/chat/completions", "/v1/completions", "/v1/embeddings"):
            self.app.post(path, response_class=Response)(self.hand_on)

    @property
    def state(self) -> State:
        if self.is_draining:
            return "draining"
        return "failed" if any(child.process.poll() is not None for child in self.children.values()) else "ok"

    def wait_until_ready(self) -> None:
        """Raises `UserError` if a child ends before it answers."""
        for child in self.children.values():
            while not asyncio.run(child.is_well()):
                if child.process.poll() is not None:
                    code = child.process.returncode
                    raise UserError(f"{self.engine.name} ended with code {code} while it loaded {child.name}")
                time.sleep(0.2)

    async def drain(self, seconds: float) -> None:
        """Wait at most `seconds` for the open requests; the others break off."""
        self.is_draining, until = self.state == "ok", time.monotonic() + seconds
        while self.open and time.monotonic() < until:
            await asyncio.sleep(0.02)
        for child in self.children.values() if self.open else ():
            child.kill()

    def stop(self) -> None:
        """End the children."""
        for child in self.children.values():
            child.process.terminate()
        for child in self.children.values():
            child.stop()

    async def hand_on(self, request: fastapi.Request) -> Response:
        """To the child of the model, and back what it answers."""
        path, body = request.url.path, self.engine.body(request.url.path, await request.body(), request.state.key_id)
        child = named(self.children, str(body.get("model")))
        request.state.model = child.name  # for the metrics
        if self.state != "ok":
            raise try_later(503, "the server is shutting down: try again")
        if self.open >= self.most_open:
            raise try_later(429, "the queue is full: try again")
        return Copy(self, child.ask("POST", path, json.dumps(body).encode()))


def refusal(status: int, body: bytes) -> ApiError:
    """The child's error, with the fields that every error has here."""
    try:
        error = json.loads(body)["error"]
        code = error.get("code") if isinstance(error.get("code"), str) else error.get("type")
        return ApiError(status, error["message"], error.get("param"), code)
    except (ValueError, KeyError, TypeError, AttributeError):
        return failed("the engine answered with an error that says nothing", status)


class Copy(Response):
    """The response of a child, byte for byte. One that breaks off, or takes too long, ends with an error."""

    def __init__(self, upstreams: Upstreams, events: AsyncGenerator[Any]) -> None:
        super().__init__()
        self.upstreams, self.events = upstreams, events

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        kind, seconds = b"", self.upstreams.request_seconds
        self.upstreams.open += 1
        try:
            async with asyncio.timeout(seconds), contextlib.aclosing(self.events) as events:
                async for event in events:
                    if isinstance(event, h11.Response) and event.status_code >= 400:
                        body = b"".join([bytes(part.data) async for part in events if isinstance(part, h11.Data)])
                        raise refusal(event.status_code, body)
                    if isinstance(event, h11.Response):
                        fields = [(name, value) for name, value in event.headers if name in HANDED_ON]
                        kind = dict(fields).get(b"content-type", b"")
                        await send({"type": "http.response.start", "status": event.status_code, "headers": fields})
                    elif isinstance(event, h11.Data):
                        await send({"type": "http.response.body", "body": bytes(event.data), "more_body": True})
        except (*GONE, TimeoutError) as reason:
            error = failed("the engine broke off before the answer was complete: send the request again")
            if isinstance(reason, TimeoutError):
                error = failed(f"the request took longer than {seconds:g} s", 504)
            if not kind.startswith(b"text/event-stream"):
                raise error from None
            await send({"type": "http.response.body", "body": event_line(error.envelope()), "more_body": True})
        finally:
            self.upstreams.open -= 1
        await send({"type": "http.response.body", "body": b""})
