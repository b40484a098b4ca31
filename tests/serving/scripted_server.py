"""A server that says what a test tells it to, in pieces of bytes that the test cuts: no model does on demand."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, StreamingResponse

from slmkit.serving.app import add_page


@dataclass
class Script:
    """What the server answers, and what it was asked."""

    models: dict[str, dict[str, Any]] = field(default_factory=lambda: {"tiny": {"chat": True, "context": 256}})
    say: Callable[[dict[str, Any]], Iterable[str]] = lambda body: ["Hello", " there."]  # deltas for a request
    cut: Callable[[bytes], Iterable[bytes]] = lambda stream: [stream]  # the bytes of each event, as they are sent
    pause: float = 0.0  # seconds before each delta
    finish: str = "stop"
    refuse: tuple[int, str] | None = None  # status and message, once
    key: str = ""  # that requests of /v1 and /page/NAME need
    asked: list[dict[str, Any]] = field(default_factory=list)
    cut_off: int = 0  # requests whose client went away before the end

    def app(self) -> FastAPI:
        app = FastAPI()
        add_page(app, {"about": lambda: {"models": self.models}})

        @app.middleware("http")
        async def doors(request: Request, call_next: Any) -> Any:
            is_open = request.method == "GET" and not request.url.path.startswith("/v1")
            if self.key and not is_open and request.headers.get("authorization") != f"Bearer {self.key}":
                return JSONResponse({"error": {"message": "no such key"}}, 401)
            return await call_next(request)

        @app.get("/v1/models")
        def models() -> dict[str, Any]:
            return {"object": "list", "data": [{"id": name} for name in self.models]}

        @app.post("/v1/{path:path}")
        async def answer(path: str, request: Request) -> Any:
            body = {**await request.json(), "path": path}
            self.asked.append(body)
            if self.refuse is not None:
                (status, message), self.refuse = self.refuse, None
                return JSONResponse({"error": {"message": message}}, status)
            return StreamingResponse(self._events(body), media_type="text/event-stream")

        return app

    async def _events(self, body: dict[str, Any]) -> AsyncIterator[bytes]:
        is_chat, tokens = body["path"] == "chat/completions", 0
        try:
            for text in self.say(body):
                await asyncio.sleep(self.pause)
                tokens += 1
                choice = {"delta": {"content": text}} if is_chat else {"text": text}
                for piece in self.cut(_event({"choices": [{"index": 0, "finish_reason": None, **choice}]})):
                    yield piece
                    await asyncio.sleep(0)
            yield _event({"choices": [{"index": 0, "delta": {}, "finish_reason": self.finish}]})
            yield _event({"choices": [], "usage": {"completion_tokens": tokens, "total_tokens": tokens + 10}})
            yield b"data: [DONE]\n\n"
        except (asyncio.CancelledError, GeneratorExit):  # while it waited, or while an event was sent
            self.cut_off += 1
            raise


def _event(content: dict[str, Any]) -> bytes:
    return f"data: {json.dumps(content, ensure_ascii=False)}\n\n".encode()
