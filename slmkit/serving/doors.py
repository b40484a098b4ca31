"""What stands before the application: keys, names of hosts and origins, sizes and rates, security headers."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import hmac
import ipaddress
import json
import re
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from typing import Annotated, Any

import anyio
from pydantic import Field, field_validator

from slmkit.config import Settings
from slmkit.serving.protocol import ApiError, api_error, try_later

PUBLIC = re.compile(r"/$|/health$|/page/")  # to GET without a key: the page's files, and whether the server is well
LOCAL = {"localhost", "127.0.0.1", "[::1]"}  # names of this machine in a Host header
HEADERS = {
    "x-content-type-options": "nosniff", "x-frame-options": "DENY", "referrer-policy": "no-referrer",
    "content-security-policy": "default-src 'none'; frame-ancestors 'none'", "cache-control": "no-store",
}  # fmt: skip
PREFLIGHT = [
    (b"access-control-allow-methods", b"GET, POST"), (b"access-control-max-age", b"600"),
]  # fmt: skip
LINGER = 1.0  # seconds in which a client that is refused may send the rest of its body
Count = Annotated[int, Field(ge=1)]
Seconds = Annotated[float, Field(gt=0)]


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

    @field_validator("hosts")
    @classmethod
    def _without_port(cls, hosts: list[str]) -> list[str]:
        for host in hosts:
            if not re.fullmatch(r"[^\[\]:/\s*@]+|\[[0-9a-fA-F:.]+\]", host):
                raise ValueError(f"{host!r} is no name of a host, such as chat.example.org")
        return [host.lower() for host in hosts]


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
        is_started = is_complete = False

        async def answer(message: dict[str, Any]) -> None:
            nonlocal is_started, is_complete
            if message["type"] == "http.response.start":
                is_started = True
                self._note(scope, message["status"])
                message["headers"] = self._with_security(message.get("headers", ()), headers.get("origin"))
            else:
                is_complete = not message.get("more_body", False)
            await send(message)

        until_gone = anyio.CancelScope()
        try:
            with until_gone:
                await self._pass(scope, headers, receive, answer, until_gone)
        except Exception as error:
            if is_complete:  # the application has logged and answered it
                return
            refusal = api_error(error)
            if is_started:
                raise  # uvicorn closes the connection
            await _refuse(refusal, receive, answer)
        if until_gone.cancelled_caught and not is_started:
            self._note(scope, 499)

    async def _pass(
        self, scope: Any, headers: Mapping[str, str], receive: Any, send: Any, until_gone: anyio.CancelScope
    ) -> None:
        """Hand the request to the application, which is cancelled when the client closes the connection.

        Raises `ApiError` for a request that may not come in.
        """
        self._expect_no_more_headers(scope)
        is_public = scope["method"] in ("GET", "HEAD") and PUBLIC.match(scope["path"]) is not None
        if {"content-length", "transfer-encoding"} <= headers.keys():  # a proxy may have believed the other one
            raise ApiError(400, "a body with both Content-Length and Transfer-Encoding", code="invalid_http")
        self._expect_own_host(scope["server"][0], headers)
        self._expect_own_site(headers, is_public)
        if scope["method"] == "OPTIONS" and {"origin", "access-control-request-method"} <= headers.keys():
            # Any headers: OpenAI's JavaScript client sends some of its own.
            wanted = headers.get("access-control-request-headers", "").encode("latin-1")
            allowed = [*PREFLIGHT, (b"access-control-allow-headers", wanted)]
            await send({"type": "http.response.start", "status": 204, "headers": allowed})
            await send({"type": "http.response.body"})
            return
        key = "" if is_public else self._key_of(headers)
        scope.setdefault("state", {})["key_id"] = key
        with contextlib.nullcontext() if is_public else self._counted(key):
            messages = [{"type": "http.request", "body": await self._body(headers, receive), "more_body": False}]

            async def replay() -> Any:
                return messages.pop() if messages else await receive()

            async def watch() -> None:
                while (await receive())["type"] != "http.disconnect":
                    pass
                until_gone.cancel()

            watching = asyncio.ensure_future(watch())
            try:
                await self.app(scope, replay, send)
            finally:
                watching.cancel()

    def _expect_no_more_headers(self, scope: Any) -> None:
        """h11 bounds only headers that come in parts. Raises `ApiError`."""
        size = sum(len(name) + len(value) + 4 for name, value in scope["headers"])
        if size + len(scope["raw_path"]) + len(scope["query_string"]) > self.limits.max_headers:
            raise too_large_headers(self.limits.max_headers)

    def _expect_own_host(self, address: str, headers: Mapping[str, str]) -> None:
        """Another site may let its own name lead to this machine (DNS rebinding), whose browser then takes both for
        one. Raises `ApiError` for a name that is not this server's.
        """
        host = headers.get("host", "")
        name = re.sub(r":\d*$", "", host).lower()
        if (self.limits.hosts or is_loopback(address)) and name not in LOCAL.union(self.limits.hosts):
            what = f"Host {host!r:.100}: not a name of this server (--allow-host NAME makes it one)"
            raise ApiError(403, what, code="host_not_allowed")

    def _expect_own_site(self, headers: Mapping[str, str], is_public: bool) -> None:
        """Raises `ApiError` for a request of another site's page, unless its origin is allowed."""
        origin = headers.get("origin")
        if origin is None:
            is_foreign = headers.get("sec-fetch-site") == "cross-site" and not is_public
        else:
            is_foreign = origin.partition("://")[2] != headers.get("host") and origin not in self.limits.origins
        if is_foreign:
            what = f"a page of another site, Origin {origin!r:.100}: not allowed (--cors ORIGIN allows it)"
            raise ApiError(403, what, code="origin_not_allowed")

    def _key_of(self, headers: Mapping[str, str]) -> str:
        """The digest of the request's key. Raises `ApiError` for none, or a wrong one."""
        if not self.digests:
            return ""
        scheme, _, key = headers.get("authorization", "").partition(" ")
        digest = _digest(key.strip()) if scheme.lower() == "bearer" else ""
        # With all keys, so that the time tells nothing about which of them was right, or how much of it.
        if not sum([hmac.compare_digest(digest, known) for known in self.digests]):
            what = "a wrong API key" if digest else "no API key: send Authorization: Bearer KEY"
            raise ApiError(401, what, code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"})
        return digest

    @contextlib.contextmanager
    def _counted(self, key: str) -> Iterator[None]:
        """Raises `ApiError` for a key with too many requests, at once or per minute."""
        at_once, minute, now = self.limits.requests_per_key, self.limits.requests_per_minute, time.monotonic()
        if at_once is not None and self.open[key] >= at_once:
            raise try_later(429, f"{at_once} requests of this key are open: wait for one")
        if minute is not None:  # a bucket of `minute` requests, which fills again in a minute
            left, then = self.allowed.get(key, (float(minute), now))
            left = min(minute, left + (now - then) * minute / 60)
            if left < 1:
                raise try_later(429, f"more than {minute} requests of this key in a minute", (1 - left) * 60 / minute)
            self.allowed[key] = left - 1, now
        self.open[key] += 1
        try:
            yield
        finally:
            self.open[key] -= 1

    async def _body(self, headers: Mapping[str, str], receive: Any) -> bytes:
        """The whole body. Raises `ApiError` for one that is too large, compressed, or too slow."""
        most, body, is_whole = self.limits.max_body, bytearray(), False
        too_large = ApiError(413, f"a body of more than {most:,} bytes", code="request_too_large")
        if headers.get("content-encoding", "identity").lower() != "identity":
            raise ApiError(415, "a compressed body: send it as it is", code="unsupported_encoding")
        if int(headers.get("content-length", 0)) > most:
            raise too_large
        try:
            async with asyncio.timeout(self.limits.body_seconds):
                while not is_whole:
                    message = await receive()
                    body += message.get("body", b"")
                    is_whole = not message.get("more_body", False)  # or the client is gone
                    if len(body) > most:
                        raise too_large
        except TimeoutError:
            what = f"the body took longer than {self.limits.body_seconds:g} s"
            raise ApiError(408, what, code="request_timeout") from None
        return bytes(body)

    def _note(self, scope: Any, status: int) -> None:
        if self.count is not None:
            self.count(getattr(scope.get("route"), "path", "other"), scope.get("state", {}).get("model", ""), status)

    def _with_security(self, sent: Any, origin: str | None) -> list[tuple[bytes, bytes]]:
        """The headers of a response, and those of `HEADERS` that it leaves out."""
        names = {name.decode().lower() for name, _ in sent}
        more = {name: value for name, value in HEADERS.items() if name not in names}
        if origin in self.limits.origins:
            more |= {"access-control-allow-origin": origin or "", "vary": "Origin"}
        else:
            more |= {"cross-origin-resource-policy": "same-origin"}
        return [*sent, *_encoded(more)]


def too_large_headers(most: int) -> ApiError:
    return ApiError(431, f"headers of more than {most:,} bytes", code="headers_too_large")


def is_loopback(address: str) -> bool:
    try:
        return ipaddress.ip_address(address.partition("%")[0]).is_loopback
    except ValueError:
        return False


def refusal_parts(refusal: ApiError) -> tuple[bytes, dict[str, str]]:
    """Body and headers of an answer after which the connection ends."""
    body = json.dumps(refusal.envelope()).encode()
    return body, {
        "content-type": "application/json", "connection": "close", "content-length": str(len(body)), **refusal.headers
    }  # fmt: skip


async def _refuse(refusal: ApiError, receive: Any, send: Any) -> None:
    body, headers = refusal_parts(refusal)
    await send({"type": "http.response.start", "status": refusal.status, "headers": _encoded(headers)})
    if refusal.status not in (408, 500):  # closed with unread input, it would be reset before the client has read
        await send({"type": "http.response.body", "body": body, "more_body": True})
        body = b""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(LINGER):
                while (await receive()).get("more_body"):
                    pass
    await send({"type": "http.response.body", "body": body})


def _encoded(headers: Mapping[str, str]) -> list[tuple[bytes, bytes]]:
    return [(name.encode(), value.encode("latin-1")) for name, value in headers.items()]


def _digest(key: str) -> str:
    return hashlib.sha256(key.encode("utf-8", "surrogatepass")).hexdigest()
