"""Between the network and the application: who may come in, how much and how long, and when the server ends.

uvicorn with h11 carries it. h11 takes only what RFC 9112 allows, and bounds the headers; httptools, the other choice,
bounds nothing. uvicorn has no deadline for the receipt of a request, so `Connection` adds them.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import hashlib
import hmac
import ipaddress
import json
import logging
import math
import re
import signal
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from http import HTTPStatus
from types import FrameType
from typing import Annotated, Any

import uvicorn
from h11 import IDLE
from pydantic import Field, field_validator
from uvicorn.protocols.http.h11_impl import H11Protocol

from slmkit.config import Settings, UserError
from slmkit.serving.worker import Worker

LOCAL = {"localhost", "127.0.0.1", "[::1]"}  # names of this machine in a Host header
SEND_BUFFER = 2**17  # bytes that the kernel keeps for a client that reads slowly
HEADERS = {
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "no-referrer",
    "content-security-policy": "default-src 'none'; frame-ancestors 'none'",
    "cache-control": "no-store",
}
PREFLIGHT = [
    (b"access-control-allow-methods", b"GET, POST"),
    (b"access-control-allow-headers", b"authorization, content-type"),
    (b"access-control-max-age", b"600"),
]
Count = Annotated[int, Field(ge=1)]
Seconds = Annotated[float, Field(gt=0)]
logger = logging.getLogger(__name__)


class Limits(Settings):
    """Who may come in, and how much. Sizes are bytes, times seconds."""

    keys: list[str] = Field(default_factory=list, repr=False)  # one of them is required; none: everybody may
    origins: list[str] = Field(default_factory=list)  # of pages of other sites that may call this server
    hosts: list[str] = Field(default_factory=list)  # names of this server beside those of `LOCAL`
    max_headers: Count = 2**14
    max_body: Count = 2**20
    header_seconds: Seconds = 10.0
    body_seconds: Seconds = 30.0
    send_seconds: Seconds = 30.0  # for a client to read what fills its connection
    max_connections: Count = 1000
    requests_per_key: Count | None = None  # at once
    requests_per_minute: Count | None = None  # of each key

    @field_validator("origins")
    @classmethod
    def _named(cls, origins: list[str]) -> list[str]:
        for origin in origins:
            if not re.fullmatch(r"https?://[^/\s*@]+", origin):
                raise ValueError(f"{origin!r} is no origin, such as https://chat.example.org")
        return origins


class Refusal(Exception):  # noqa: N818
    """An answer without the application, in OpenAI's envelope."""

    def __init__(self, status: int, message: str, code: str, **headers: str) -> None:
        super().__init__(message)
        self.status, self.code, self.headers = status, code, headers

    def body(self) -> bytes:
        kinds = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
        kind = kinds.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return json.dumps({"error": {"message": str(self), "type": kind, "param": None, "code": self.code}}).encode()

    def response(self) -> bytes:
        """The whole response, for a connection that carries no request yet."""
        body, fields = self.body(), HEADERS | {"content-type": "application/json", "connection": "close"} | self.headers
        lines = [f"HTTP/1.1 {self.status} {HTTPStatus(self.status).phrase}"]
        lines += [f"{name}: {value}" for name, value in (fields | {"content-length": str(len(body))}).items()]
        return "\r\n".join([*lines, "", ""]).encode() + body


class Doors:
    """ASGI middleware outside of everything: keys, hosts and origins, sizes, deadlines, security headers.

    Puts `key_id`, a digest of the request's key, into `scope["state"]`. `count` is told each request's route, model
    (`scope["state"]["model"]`) and status.
    """

    def __init__(self, app: Any, limits: Limits, count: Callable[[str, str, int], None] | None = None) -> None:
        self.app, self.limits, self.count = app, limits, count
        self.digests = [_digest(key) for key in limits.keys]
        self.open = Counter[str]()  # requests of a key
        self.allowed: dict[str, tuple[float, float]] = {}  # key → requests it may begin, and when that was so

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        state, started = scope.setdefault("state", {}), False

        async def answer(message: dict[str, Any]) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                message["headers"] = self._with_security(message.get("headers", ()), headers.get("origin"))
                if self.count is not None:
                    route = getattr(scope.get("route"), "path", "other")
                    self.count(route, state.get("model", ""), message["status"])
            await send(message)

        try:
            self._check_host(scope, headers)
            if self._is_preflight(scope, headers):
                await answer({"type": "http.response.start", "status": 204, "headers": PREFLIGHT})
                await answer({"type": "http.response.body"})
                return
            key = state["key_id"] = self._key_of(scope, headers)
            with self._counted(key):
                body = await self._body(headers, receive)
                await self.app(scope, _replaying(body, receive), answer)
        except Refusal as refusal:
            await self._refuse(refusal, receive, answer)
        except Exception:
            if started:
                raise  # uvicorn closes the connection
            logger.exception("an error in the application")
            await self._refuse(Refusal(500, "internal error: see the server's log", "internal_error"), receive, answer)

    def _check_host(self, scope: Any, headers: Mapping[str, str]) -> None:
        """Raises `Refusal` for a page of another site: by its own name for this machine (DNS rebinding), or openly."""
        host, origin = headers.get("host", ""), headers.get("origin")
        name = re.sub(r":\d*$", "", host).lower()
        if (self.limits.hosts or is_loopback(scope["server"][0])) and name not in LOCAL.union(self.limits.hosts):
            raise Refusal(
                403, f"Host {host!r:.100}: not a name of this server (--allow-host tells it)", "host_not_allowed"
            )
        foreign = origin is not None and origin.partition("://")[2] != host and origin not in self.limits.origins
        is_page = _is_public(scope) and scope["path"] != "/health"  # a link to the page may be anywhere
        if foreign or (headers.get("sec-fetch-site") == "cross-site" and origin is None and not is_page):
            raise Refusal(403, f"Origin {origin!r:.100}: not allowed (--cors allows it)", "origin_not_allowed")

    def _is_preflight(self, scope: Any, headers: Mapping[str, str]) -> bool:
        asks = scope["method"] == "OPTIONS" and "access-control-request-method" in headers
        return asks and headers.get("origin") in self.limits.origins

    def _key_of(self, scope: Any, headers: Mapping[str, str]) -> str:
        """The digest of the request's key. Raises `Refusal` for none, or a wrong one."""
        if not self.digests or _is_public(scope):
            return ""
        scheme, _, key = headers.get("authorization", "").partition(" ")
        digest = _digest(key.strip()) if scheme.lower() == "bearer" else ""
        # With all keys, so that the time tells nothing about which, or how much of it, was right.
        if not sum([hmac.compare_digest(digest, known) for known in self.digests]):
            what = "a wrong API key" if digest else "no API key: send Authorization: Bearer KEY"
            raise Refusal(401, what, "invalid_api_key", **{"www-authenticate": "Bearer"})
        return digest

    @contextlib.contextmanager
    def _counted(self, key: str) -> Iterator[None]:
        """Raises `Refusal` for a key with too many requests, at once or per minute."""
        at_once, minute, now = self.limits.requests_per_key, self.limits.requests_per_minute, time.monotonic()
        if at_once is not None and self.open[key] >= at_once:
            raise Refusal(429, f"{at_once} requests of this key are open", "too_many_requests", **{"retry-after": "1"})
        if minute is not None:
            allowed, then = self.allowed.get(key, (float(minute), now))
            allowed = min(minute, allowed + (now - then) * minute / 60)
            if allowed < 1:
                wait = str(math.ceil((1 - allowed) * 60 / minute))
                raise Refusal(
                    429, f"more than {minute} requests a minute", "rate_limit_exceeded", **{"retry-after": wait}
                )
            self.allowed[key] = allowed - 1, now
        self.open[key] += 1
        try:
            yield
        finally:
            self.open[key] -= 1

    async def _body(self, headers: Mapping[str, str], receive: Any) -> bytes:
        """The whole body. Raises `Refusal` for one that is too large, compressed, or too slow."""
        too_large = Refusal(413, f"a body of more than {self.limits.max_body:,} bytes", "request_too_large")
        if headers.get("content-encoding", "identity") != "identity":
            raise Refusal(415, "a compressed body: send it as it is", "unsupported_encoding")
        if int(headers.get("content-length", 0)) > self.limits.max_body:
            raise too_large
        if "content-length" not in headers and "transfer-encoding" not in headers:
            return b""
        body, is_whole = bytearray(), False
        try:
            async with asyncio.timeout(self.limits.body_seconds):
                while not is_whole:
                    message = await receive()
                    body += message.get("body", b"")
                    is_whole = not message.get("more_body", False)  # or the client is gone
                    if len(body) > self.limits.max_body:
                        raise too_large
        except TimeoutError:
            late = f"the body took longer than {self.limits.body_seconds:g} s"
            raise Refusal(408, late, "request_timeout") from None
        return bytes(body)

    def _with_security(self, sent: Any, origin: str | None) -> list[tuple[bytes, bytes]]:
        """The headers of a response, and those that it leaves out."""
        names = {name.decode().lower() for name, _ in sent}
        more = {name: value for name, value in HEADERS.items() if name not in names}
        if origin in self.limits.origins:
            more |= {"access-control-allow-origin": origin or "", "vary": "Origin"}
        else:
            more |= {"cross-origin-resource-policy": "same-origin"}
        return [*sent, *((name.encode(), value.encode()) for name, value in more.items())]

    async def _refuse(self, refusal: Refusal, receive: Any, send: Any) -> None:
        body, headers = refusal.body(), {"content-type": "application/json", "connection": "close"} | refusal.headers
        headers["content-length"] = str(len(body))
        fields = [(name.encode(), value.encode()) for name, value in headers.items()]
        await send({"type": "http.response.start", "status": refusal.status, "headers": fields})
        await send({"type": "http.response.body", "body": body, "more_body": refusal.status == 413})
        if refusal.status == 413:  # closed with unread input, the connection would be reset before the client has read
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(1):
                    while (await receive()).get("more_body"):
                        pass
            await send({"type": "http.response.body", "body": b""})


def _digest(key: str) -> str:
    return hashlib.sha256(key.encode("utf-8", "surrogatepass")).hexdigest()


def _is_public(scope: Any) -> bool:
    """What needs no key: `/health`, and the page's files."""
    path = scope["path"]
    return scope["method"] in ("GET", "HEAD") and (path in ("/", "/health") or path.startswith("/page/"))


def _replaying(body: bytes, receive: Any) -> Callable[[], Any]:
    """What the application receives: the body, and later that the client is gone."""
    messages = [{"type": "http.request", "body": body, "more_body": False}]

    async def next_message() -> Any:
        return messages.pop() if messages else await receive()

    return next_message


# -- the server -------------------------------------------------------------------------------------------------------


class Connection(H11Protocol):
    """uvicorn's connection with deadlines, for receiving headers and for sending, and a cap on how many there are."""

    def __init__(self, limits: Limits, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.limits = limits
        self.header_timer: asyncio.TimerHandle | None = None
        self.send_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER)
        if len(self.connections) > self.limits.max_connections:
            self._end(Refusal(503, "too many connections: try again", "overloaded", **{"retry-after": "1"}))
        self._watch_headers()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._watch_headers()

    def _watch_headers(self) -> None:
        """From the first byte of a request, or the connection's beginning, to the end of the headers."""
        if self.conn.their_state is IDLE and self.header_timer is None:
            late = Refusal(408, f"the headers took longer than {self.limits.header_seconds:g} s", "request_timeout")
            self.header_timer = self.loop.call_later(self.limits.header_seconds, self._end, late)
        elif self.conn.their_state is not IDLE and self.header_timer is not None:
            self.header_timer.cancel()
            self.header_timer = None

    def _end(self, refusal: Refusal) -> None:
        if not self.transport.is_closing():
            self.transport.write(refusal.response())
            self.transport.close()

    def send_400_response(self, msg: str) -> None:
        self._end(Refusal(400, f"no HTTP, or headers of more than {self.limits.max_headers:,} bytes", "invalid_http"))

    def pause_writing(self) -> None:
        super().pause_writing()
        self._watch_sending()

    def resume_writing(self) -> None:
        super().resume_writing()
        if self.send_timer is not None:
            self.send_timer.cancel()

    def _watch_sending(self) -> None:
        self.send_timer = self.loop.call_later(self.limits.send_seconds, self.transport.abort)

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self.transport.is_closing():  # but not closed, as long as the client does not read
            self._watch_sending()

    def timeout_keep_alive_handler(self) -> None:
        super().timeout_keep_alive_handler()
        self._watch_sending()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        for timer in (self.header_timer, self.send_timer):
            if timer is not None:
                timer.cancel()


class Server(uvicorn.Server):
    """uvicorn's, which drains the worker before it ends, and ends when the worker has failed."""

    def __init__(self, config: uvicorn.Config, worker: Worker | None, drain: float) -> None:
        super().__init__(config)
        self.worker, self.drain = worker, drain

    async def on_tick(self, counter: int) -> bool:
        return await super().on_tick(counter) or (self.worker is not None and self.worker.state == "failed")

    async def main_loop(self) -> None:
        await super().main_loop()
        if self.worker is not None:
            draining = asyncio.create_task(self.worker.drain(self.drain))
            while not draining.done() and not self.force_exit:
                await asyncio.sleep(0.02)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        await super().shutdown(sockets)
        self._captured_signals.clear()  # or they would be raised again, and end the process

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self.force_exit = self.should_exit and sig == signal.SIGINT
        self.should_exit = True

    @property
    def exit_code(self) -> int:
        has_failed = self.worker is not None and self.worker.state == "failed"
        return 130 if self.force_exit else int(has_failed)


def is_loopback(address: str) -> bool:
    try:
        return ipaddress.ip_address(address.partition("%")[0]).is_loopback
    except ValueError:
        return False


def bind(host: str, port: int) -> socket.socket:
    """A listening socket. Raises `UserError` for an address that is not this machine's, and a port that is taken."""
    try:
        family, _, _, _, address = min(
            socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE), key=lambda found: found[0]
        )
        return socket.create_server(address[:2], family=family, backlog=1024)
    except socket.gaierror:
        raise UserError(f"--host {host}: no such host") from None
    except PermissionError:
        raise UserError(f"--port {port}: ports below 1024 need root's rights; take another, such as 8000") from None
    except OSError as error:
        why = {98: f"the port {port} is taken by another program; take another, or 0 for any that is free"}
        raise UserError(f"{host}:{port}: {why.get(error.errno or 0, error.strerror)}") from None
    except OverflowError:
        raise UserError(f"--port {port}: expected 0 to 65535") from None


def _server(app: Any, limits: Limits, worker: Worker | None, drain: float) -> Server:
    count = None if worker is None else lambda *labels: worker.metrics.requests.labels(*labels).inc()
    config = uvicorn.Config(
        Doors(app, limits, count),
        http=functools.partial(Connection, limits),  # type: ignore[arg-type]
        ws="none",
        log_config=None,
        log_level="error",
        access_log=False,
        server_header=False,
        proxy_headers=False,
        h11_max_incomplete_event_size=limits.max_headers,
        timeout_graceful_shutdown=2,  # for what the clients have not read yet
    )
    return Server(config, worker, drain)


def url_of(listening: socket.socket) -> str:
    host, port = listening.getsockname()[:2]
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"


def serve(app: Any, listening: socket.socket, limits: Limits, worker: Worker, drain: float = 30.0) -> int:
    """Serve until SIGTERM or SIGINT, or the worker's failure. Then nothing new is taken, what is open has `drain`
    seconds to end, and the rest ends with an error. A second SIGINT ends it at once.

    Returns the exit code: 0, 1 after a failure, 130 after a second SIGINT.
    """
    server = _server(app, limits, worker, drain)
    server.run(sockets=[listening])
    return server.exit_code


@contextlib.contextmanager
def running(
    app: Any, limits: Limits | None = None, worker: Worker | None = None, *, drain: float = 0.0
) -> Iterator[str]:
    """The same in a thread, on a free port of 127.0.0.1: gives the URL, such as http://127.0.0.1:40001."""
    listening = bind("127.0.0.1", 0)
    server = _server(app, limits or Limits(), worker, drain)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, name="slm-http", daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.005)
    try:
        yield url_of(listening)
    finally:
        server.should_exit = True
        thread.join()
