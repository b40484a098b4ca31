"""Carries the application: the listening socket, deadlines of a connection, signals, and the end.

uvicorn with h11 does the work. h11 takes only what RFC 9112 allows, and bounds the headers; httptools bounds nothing.
uvicorn has no deadline for the receipt of a request, so `Connection` adds them.
"""

from __future__ import annotations

import asyncio
import errno
import functools
import resource
import signal
import socket
import sys
from collections.abc import Callable
from http import HTTPStatus
from types import FrameType
from typing import TYPE_CHECKING, Any, Protocol

import uvicorn
from h11 import IDLE
from uvicorn.protocols.http.h11_impl import H11Protocol

from slmkit.config import UserError
from slmkit.serving.doors import HEADERS, Doors, Limits, is_loopback, refusal_parts, too_large_headers
from slmkit.serving.protocol import ApiError

if TYPE_CHECKING:
    from slmkit.serving.metrics import Metrics
    from slmkit.serving.worker import State  # imports torch, and the port is taken before that

FILES = 256  # that a process has open beside its connections
WHY_NO_PORT = {
    errno.EACCES: "ports below 1024 need root's rights; take another, such as 8000",
    errno.EADDRINUSE: "taken by another program; take another, or 0 for one that is free",
}
SEND_BUFFER = 2**17  # bytes that the kernel keeps for a client that reads slowly


class Engines(Protocol):
    """What runs the models: `Worker` or `Upstreams`."""

    metrics: Metrics

    @property
    def state(self) -> State: ...

    async def drain(self, seconds: float) -> None: ...


class Connection(H11Protocol):
    """uvicorn's connection with deadlines, for receiving headers and for sending, and a cap on how many there are."""

    def __init__(self, limits: Limits, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.limits, self.timers = limits, dict[str, asyncio.TimerHandle]()

    def start_timer(self, name: str, seconds: float, end: Callable[[], None]) -> None:
        if name not in self.timers:
            self.timers[name] = self.loop.call_later(seconds, end)

    def stop_timer(self, name: str) -> None:
        if timer := self.timers.pop(name, None):
            timer.cancel()

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER)
        if len(self.connections) > self.limits.max_connections:
            self.end(ApiError(503, "too many connections: try again", code="overloaded", headers={"Retry-After": "1"}))
        self.watch_headers()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self.watch_headers()

    def watch_headers(self) -> None:
        """From the first byte of a request, or the connection's beginning, to the end of the headers."""
        if self.conn.their_state is IDLE:
            what = f"the headers took longer than {self.limits.header_seconds:g} s"
            late = ApiError(408, what, code="request_timeout")
            self.start_timer("headers", self.limits.header_seconds, lambda: self.end(late))
        else:
            self.stop_timer("headers")

    def end(self, refusal: ApiError) -> None:
        """Answer without a request, and close."""
        if not self.transport.is_closing():
            body, headers = refusal_parts(refusal)
            lines = [f"HTTP/1.1 {refusal.status} {HTTPStatus(refusal.status).phrase}"]
            lines += [f"{name}: {value}" for name, value in (HEADERS | headers).items()]
            self.transport.write("\r\n".join([*lines, "", ""]).encode() + body)
            self.close()

    def close(self) -> None:
        """After what is written was sent, but no later than the deadline: the client may not read."""
        self.transport.close()
        self.start_timer("sending", self.limits.send_seconds, self.transport.abort)

    def send_400_response(self, msg: str) -> None:
        if getattr(sys.exception(), "error_status_hint", 400) == 431:  # h11's, which uvicorn handles
            self.end(too_large_headers(self.limits.max_headers))
        else:
            self.end(ApiError(400, "no valid HTTP/1.1", code="invalid_http"))

    def pause_writing(self) -> None:
        super().pause_writing()
        self.start_timer("sending", self.limits.send_seconds, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        self.stop_timer("sending")

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self.transport.is_closing():
            self.close()

    def timeout_keep_alive_handler(self) -> None:
        self.close()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        for timer in self.timers.values():
            timer.cancel()


class Server(uvicorn.Server):
    """uvicorn's, which drains the worker before it ends, and ends when the worker has failed."""

    def __init__(
        self, app: Any, limits: Limits, worker: Engines | None, drain: float, tell_ready: Callable[[], object]
    ) -> None:
        self.worker, self.drain, self.tell_ready = worker, drain, tell_ready
        count = None if worker is None else lambda *labels: worker.metrics.requests.labels(*labels).inc()
        super().__init__(
            uvicorn.Config(
                Doors(app, limits, count), http=functools.partial(Connection, limits),  # type: ignore[arg-type]
                ws="none", log_config=None, access_log=False, server_header=False,
                log_level="critical",  # `Doors` logs what fails; what clients send wrong is counted, not logged
                proxy_headers=False, h11_max_incomplete_event_size=limits.max_headers,
                timeout_graceful_shutdown=2,  # for what the clients have not read yet
            )
        )  # fmt: skip

    @property
    def has_failed(self) -> bool:
        return self.worker is not None and self.worker.state == "failed"

    async def on_tick(self, counter: int) -> bool:
        return await super().on_tick(counter) or self.has_failed

    async def main_loop(self) -> None:
        self.tell_ready()
        await super().main_loop()
        if self.worker is not None:
            draining = asyncio.create_task(self.worker.drain(self.drain))
            if (await asyncio.wait([draining], timeout=0.1))[1]:  # requests are open
                print(f"finishing open requests, at most {self.drain:g} s; Ctrl-C ends them at once", flush=True)
            while not draining.done() and not self.force_exit:
                await asyncio.sleep(0.02)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        await super().shutdown(sockets)
        self._captured_signals.clear()  # or they would be raised again, and end the process

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self.force_exit = self.should_exit and sig == signal.SIGINT
        self.should_exit = True


def bind(host: str, port: int, has_keys: bool = False) -> socket.socket:
    """A socket that does not listen yet, so that clients come when the models are loaded.

    Raises `UserError` for an address that is not this machine's, a port that is taken, and an address beyond this
    machine without keys.
    """
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, _, _, _, address = min(found, key=lambda one: one[0])  # IPv4 first
        if not has_keys and not is_loopback(str(address[0])):
            raise UserError(f"--host {host}: other machines could use the models: give --key-file, or set SLM_API_KEYS")
        listening = socket.socket(family, socket.SOCK_STREAM)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(address)
        return listening
    except socket.gaierror:
        raise UserError(f"--host {host}: no such host") from None
    except OSError as error:
        if why := WHY_NO_PORT.get(error.errno or 0):
            raise UserError(f"--port {port}: {why}") from None
        raise UserError(f"--host {host}: not an address of this machine ({error.strerror})") from None


def url_of(listening: socket.socket) -> str:
    host, port = listening.getsockname()[:2]
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"


def serve(
    app: Any, listening: socket.socket, limits: Limits, worker: Engines, drain: float, tell_ready: Callable[[], None]
) -> int:
    """Serve until SIGTERM or SIGINT, or the worker's failure. Then nothing new is taken, what is open has `drain`
    seconds to end, and the rest ends with an error. A second SIGINT ends it at once.

    Returns the exit code: 0, 1 after a failure, 130 after a second SIGINT. Raises `UserError` if another program has
    begun to listen at the port.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    enough = limits.max_connections + FILES
    if soft < enough:
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(enough, hard) if hard >= 0 else enough, hard))
    try:
        listening.listen()
    except OSError:  # two may bind one port while neither listens
        raise UserError(f"--port {listening.getsockname()[1]}: {WHY_NO_PORT[errno.EADDRINUSE]}") from None
    server = Server(app, limits, worker, drain, tell_ready)
    server.run(sockets=[listening])
    return 130 if server.force_exit else int(server.has_failed)
