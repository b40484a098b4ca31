"""Clients of a server that streams: many connections in one asyncio process, as little work for each as there can be.

Pieces are kept as they arrive, with their times, and read after the load has ended.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

END = b"\r\n0\r\n\r\n"  # of a body in chunks; a text in JSON has no bare line end


@dataclass
class Reply:
    """What came for one request. Times: seconds of `time.perf_counter`."""

    sent: float
    pieces: list[tuple[float, bytes]] = field(default_factory=list)  # as they came from the socket
    lost: bool = False  # the connection ended before the answer
    ended: bool = False  # the whole answer is there

    @property
    def status(self) -> int:
        """Of HTTP; 0 without an answer."""
        return int(self.pieces[0][1][9:12]) if self.pieces else 0

    @property
    def body(self) -> bytes:
        head, _, rest = b"".join(piece for _, piece in self.pieces).partition(b"\r\n\r\n")
        return b"".join(_chunks(rest)) if b"chunked" in head.lower() else rest

    def events(self) -> list[tuple[float, dict[str, Any]]]:
        """The server-sent events but the last, `[DONE]`, each with the time at which it was complete."""
        found, seen, text = list[tuple[float, dict[str, Any]]](), 0, b""
        for came, piece in self.pieces:
            text += piece
            while (end := text.find(b"\n\n", seen)) >= 0:
                start = text.rfind(b"data: ", seen, end)
                if start >= 0 and not text.startswith(b"[DONE]", start + 6):
                    found.append((came, json.loads(b"".join(_joined(text[start + 6 : end])))))
                seen = end + 2
        return found

    def deltas(self) -> list[tuple[float, str]]:
        """When each piece of text came, and what it was."""
        found = []
        for came, event in self.events():
            for choice in event.get("choices", ()):
                if text := (choice.get("delta") or {}).get("content") or choice.get("text"):
                    found.append((came, text))
        return found

    @property
    def text(self) -> str:
        return "".join(text for _, text in self.deltas())

    @property
    def finish_reason(self) -> str | None:
        reasons = [choice["finish_reason"] for _, event in self.events() for choice in event.get("choices", ())
                   if choice.get("finish_reason")]  # fmt: skip
        return reasons[-1] if reasons else None


def _joined(line: bytes) -> list[bytes]:
    """A line without the sizes of chunks that a server may have put into it."""
    return [line] if b"\r\n" not in line else line.split(b"\r\n")[::3]


def _chunks(body: bytes) -> list[bytes]:
    found, at = [], 0
    while (end := body.find(b"\r\n", at)) >= 0 and (size := int(body[at:end].split(b";")[0], 16)):
        found.append(body[end + 2 : end + 2 + size])
        at = end + 2 + size + 2
    return found


class Connection(asyncio.Protocol):
    """One connection, for one request after the other."""

    def __init__(self) -> None:
        self.transport: asyncio.Transport
        self.reply: Reply | None = None
        self.answered: asyncio.Future[None] | None = None
        self.size: int | None = None  # of an answer that is not in chunks: head and body
        self.tail = END[:2]  # the last bytes that came

    @classmethod
    async def open(cls, url: str) -> Connection:
        host, port = urlsplit(url).hostname, urlsplit(url).port
        return (await asyncio.get_running_loop().create_connection(cls, host, port))[1]

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport  # type: ignore[assignment]

    def data_received(self, data: bytes) -> None:
        if self.reply is None or self.answered is None:
            return
        self.reply.pieces.append((time.perf_counter(), data))
        if len(self.reply.pieces) == 1:
            head, _, data = data.partition(b"\r\n\r\n")  # servers send their headers at once
            length = head.lower().partition(b"content-length:")[2].split(b"\r\n")[0]
            self.size = len(head) + 4 + int(length) if length else None
        if self.size is None:
            self.tail = (self.tail + data[-len(END) :])[-len(END) :]
            ended = self.tail == END
        else:
            ended = sum(len(piece) for _, piece in self.reply.pieces) >= self.size
        if ended and not self.answered.done():
            self.answered.set_result(None)

    def connection_lost(self, exc: Exception | None) -> None:
        if self.answered is not None and not self.answered.done():
            self.answered.set_exception(ConnectionResetError("the server closed the connection"))

    def send(self, path: str, content: Mapping[str, Any] | bytes, headers: Mapping[str, str] | None = None) -> Reply:
        """Begin a request; `answered` is done with its answer."""
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        lines = {"Host": "127.0.0.1", "Content-Type": "application/json", "Content-Length": len(body)}
        head = "".join(f"{name}: {value}\r\n" for name, value in (lines | dict(headers or {})).items())
        self.reply, self.answered = Reply(time.perf_counter()), asyncio.get_running_loop().create_future()
        self.tail = END[:2]
        self.transport.write(f"POST {path} HTTP/1.1\r\n{head}\r\n".encode() + body)
        return self.reply

    async def post(self, path: str, content: Mapping[str, Any] | bytes, **headers: str) -> Reply:
        """The whole reply, or as much as came: then it is `lost`."""
        reply = self.send(path, content, headers)
        await self.end()
        return reply

    async def end(self) -> None:
        """Wait for the end of the answer."""
        assert self.reply is not None
        assert self.answered is not None
        try:
            await self.answered
            self.reply.ended = True
        except ConnectionError:
            self.reply.lost = True

    def close(self) -> None:
        self.transport.close()

    def cut(self) -> None:
        """Away at once, without a word: what a browser does whose window is closed."""
        if self.answered is not None:
            self.answered.cancel()
        self.transport.abort()


async def load(
    url: str, path: str, contents: Sequence[Mapping[str, Any]], clients: int, seconds: float = 1e9
) -> list[Reply | None]:
    """The reply to each content, in their order, by clients that take the next one as soon as they have an answer.

    Each request has a connection of its own, since some servers close theirs without a word. After `seconds` the
    clients leave: some replies have not `ended` then, and those to requests that were not sent are None.
    """
    replies: list[Reply | None] = [None] * len(contents)
    bodies, numbers = [json.dumps(content).encode() for content in contents], itertools.count()

    async def one() -> None:
        while (number := next(numbers)) < len(bodies):
            connection = await Connection.open(url)
            try:
                replies[number] = connection.send(path, bodies[number])
                await connection.end()
            finally:
                connection.cut()

    tasks = [asyncio.create_task(one()) for _ in range(min(clients, len(contents)))]
    _, late = await asyncio.wait(tasks, timeout=seconds)
    for task in late:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=bool(late))
    return replies
