"""`--engine vllm`: `vllm serve` of each model as a child process on loopback, behind the same command, doors and names.

A request goes to the child of its model, and what comes back is handed on byte for byte. A child that ends by itself is
a failure, as that of the engines' thread is in `worker`.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import secrets
import shutil
import time
from collections.abc import AsyncGenerator, Mapping
from pathlib import Path
from typing import Any

import fastapi
import h11
from fastapi.responses import Response

from slmkit.child import Child, free_port
from slmkit.config import UserError
from slmkit.serving.answers import event_line
from slmkit.serving.app import base_app, named
from slmkit.serving.metrics import Metrics
from slmkit.serving.protocol import json_object, try_later
from slmkit.serving.worker import State, failed

MEMORY = 0.9  # of a GPU, for all models together; vLLM's own default for one
HANDED_ON = (b"content-type", b"content-length", b"retry-after")
GONE = (OSError, h11.RemoteProtocolError)


class Upstream(Child):
    """The child that serves one model, with a key that this process alone knows."""

    def __init__(self, name: str, directory: Path, memory: float) -> None:
        self.name, self.key = name, secrets.token_hex(32)
        self.port = free_port()
        options = {"host": "127.0.0.1", "port": self.port, "served-model-name": name, "gpu-memory-utilization": memory}
        words = ["vllm", "serve", str(directory), *(f"--{option}={value}" for option, value in options.items())]
        super().__init__(words, {"VLLM_API_KEY": self.key})  # its log goes where errors go

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

    def __init__(self, directories: Mapping[str, Path], most_open: int, request_seconds: float) -> None:
        """`most_open`: requests at once. Raises `UserError` if vllm is not installed."""
        if shutil.which("vllm") is None:
            raise UserError("--engine vllm: no command vllm here: pip install vllm (it needs a GPU), or take slm")
        self.most_open, self.request_seconds, self.open, self.is_draining = most_open, request_seconds, 0, False
        self.metrics = Metrics([])
        share = MEMORY / len(directories)
        self.children = {name: Upstream(name, directory, share) for name, directory in directories.items()}
        entry = {"object": "model", "created": int(time.time()), "owned_by": "vllm"}
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
                    raise UserError(f"vllm ended with code {child.process.returncode} while it loaded {child.name}")
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
        """To the child of the model, with the caller's group of prefixes, and back what it answers."""
        body = json_object(await request.body())
        child = named(self.children, str(body.get("model")))
        request.state.model, key = child.name, request.state.key_id  # the model: for the metrics
        if self.state != "ok":
            raise try_later(503, "the server is shutting down: try again")
        if self.open >= self.most_open:
            raise try_later(429, "the queue is full: try again")
        if key and request.url.path != "/v1/embeddings":
            body["cache_salt"] = key
        return Copy(self, child.ask("POST", request.url.path, json.dumps(body).encode()))


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
