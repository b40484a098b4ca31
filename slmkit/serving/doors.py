"""What stands before the application: keys, names of hosts and origins, sizes and rates, security headers."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import hmac
import ipaddress
import json
import logging
import math
import re
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from http import HTTPStatus
from typing import Annotated, Any

from pydantic import Field, field_validator

from slmkit.config import Settings

LOCAL = {"localhost", "127.0.0.1", "[::1]"}  # names of this machine in a Host header
HEADERS = {
    "x-content-type-options": "nosniff", "x-frame-options": "DENY", "referrer-policy": "no-referrer",
    "content-security-policy": "default-src 'none'; frame-ancestors 'none'", "cache-control": "no-store",
}  # fmt: skip
PREFLIGHT = [
    (b"access-control-allow-methods", b"GET, POST"), (b"access-control-max-age", b"600"),
    (b"access-control-allow-headers", b"authorization, content-type"),
]  # fmt: skip
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


def is_loopback(address: str) -> bool:
    try:
        return ipaddress.ip_address(address.partition("%")[0]).is_loopback
    except ValueError:
        return False


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
