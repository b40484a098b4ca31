"""`slm serve` in a process of its own, a small model on disk, and clients that see every byte."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, Protocol
from urllib.parse import urlsplit

from slmkit import SLMConfig, SLMForCausalLM, SLMTokenizer
from tests.cli import helpers

SLM = "from slmkit.cli import main; main()"
# Between SIGUSR1 and SIGUSR2 each step of an engine takes a quarter of a second longer, so nothing ends meanwhile.
WITH_SLOW_STEPS = f"""
import signal, time
from slmkit.generation.engine import Engine
step, seconds = Engine.step, [0.0]
def slow(self):
    time.sleep(seconds[0])
    return step(self)
Engine.step = slow
signal.signal(signal.SIGUSR1, lambda *_: seconds.__setitem__(0, 0.25))
signal.signal(signal.SIGUSR2, lambda *_: seconds.__setitem__(0, 0.0))
{SLM}
"""
TEXT = "The fox had a red kite. The kite flew over the hill, and the owl said: Wait for the wind.\n"


@functools.cache
def model_directory() -> Path:
    """A Llama of two layers with a context of 2,048: random, so that it never ends a text by itself."""
    folder = Path(tempfile.mkdtemp(prefix="slm-served-")) / "tiny"
    tokenizer = SLMTokenizer(vocab_size=300)
    tokenizer.train([TEXT] * 8)
    config = SLMConfig(
        vocab_size=300, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=2048, initializer_range=0.3, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    SLMForCausalLM(config).eval().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


class Process(Protocol):
    """What a `Server` needs of `subprocess.Popen`."""

    def send_signal(self, sig: int) -> None: ...

    def wait(self, timeout: float | None = None) -> int: ...

    def poll(self) -> int | None: ...


class Fork:
    """A fork of a process that has imported torch, as `slm` of `tests.cli.helpers`: it starts in a tenth of a second.

    Only one is there at a time, and no other `slm` beside it.
    """

    def __init__(self, code: str, words: list[str], descriptors: list[int], **environment: str) -> None:
        helpers.begin(code, words, Path.cwd(), descriptors, **environment)
        self.server, _ = helpers._server(os.getpid())
        self.pid, self.code = int.from_bytes(helpers._receive(self.server, 8)), None

    def send_signal(self, sig: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, sig)

    def poll(self) -> int | None:
        try:
            return self.wait(0.001)
        except subprocess.TimeoutExpired:
            return None

    def wait(self, timeout: float | None = None) -> int:
        if self.code is None:
            self.server.settimeout(timeout)
            try:
                self.code = int.from_bytes(helpers._receive(self.server, 8), signed=True)
            except TimeoutError:
                raise subprocess.TimeoutExpired("slm serve", timeout or 0) from None
            finally:
                self.server.settimeout(None)
        return self.code


class Server:
    """`slm serve` that is ready. `lines`: what it has printed until then; `errors`: its standard error."""

    def __init__(self, process: Process, lines: list[str], errors: IO[str]) -> None:
        self.process, self.lines, self.errors = process, lines, errors
        found = re.search(r"http://[\w.\[\]:]+", "\n".join(lines))
        assert found, lines
        self.url = found[0].removesuffix("/v1")

    def end(self, number: int = signal.SIGTERM, seconds: float = 300) -> tuple[int, str]:
        """Send a signal; returns the exit code and what was printed on standard error."""
        self.process.send_signal(number)
        return self.wait(seconds)

    def wait(self, seconds: float = 300) -> tuple[int, str]:
        code = self.process.wait(seconds)
        self.errors.seek(0)
        return code, self.errors.read()


@contextlib.contextmanager
def slm_serve(
    *arguments: str | Path, command: str = "serve", code: str = SLM, fork: bool = True, **environment: str
) -> Iterator[Server]:
    """`slm serve ARGUMENTS --port 0`. `code`: what runs instead of the command's own start. Without `fork` it starts
    as a user starts it, which takes seconds.
    """
    words, variables = [command, *map(str, arguments), "--port", "0"], {"OMP_NUM_THREADS": "1", **environment}
    reading, writing = os.pipe()
    with open(reading, encoding="utf-8") as printed, tempfile.TemporaryFile("w+") as errors, open(os.devnull) as none:
        process: Process
        if fork:
            process = Fork(code, words, [none.fileno(), writing, errors.fileno()], **variables)
        else:
            process = subprocess.Popen(
                [sys.executable, "-c", code, *words], stdout=writing, stderr=errors, env={**os.environ, **variables}
            )
        os.close(writing)
        try:
            lines = []
            for line in printed:
                lines.append(line.rstrip())
                if line.startswith(("try:", "the page:")):
                    break
            if not lines:
                process.wait(300)
                errors.seek(0)
                raise AssertionError(errors.read())
            yield Server(process, lines, errors)
        finally:
            process.send_signal(signal.SIGKILL)
            process.wait()


class Answer:
    """An HTTP response as it came over the socket."""

    def __init__(self, raw: bytes) -> None:
        self.raw = raw
        head, _, self.body = raw.partition(b"\r\n\r\n")
        first, *fields = head.decode("latin-1").split("\r\n")
        self.status = int(first.split(" ")[1]) if first.startswith("HTTP/1.1 ") else 0
        self.headers = {name.lower(): value.strip() for name, _, value in (field.partition(":") for field in fields)}
        if self.headers.get("transfer-encoding") == "chunked":
            rest, self.body = self.body, b""
            while rest:
                size, _, rest = rest.partition(b"\r\n")
                self.body, rest = self.body + rest[: int(size, 16)], rest[int(size, 16) + 2 :]

    @property
    def error(self) -> dict[str, Any]:
        """Its error, in OpenAI's envelope and one line."""
        found = json.loads(self.body)
        assert found.keys() == {"error"}
        assert found["error"].keys() == {"message", "type", "param", "code"}
        assert "\n" not in found["error"]["message"]
        assert self.headers["content-type"] == "application/json"
        return found["error"]


def connect(url: str, receive_buffer: int | None = None) -> socket.socket:
    """`receive_buffer`: bytes that the kernel takes for a client that does not read."""
    connection = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    if receive_buffer is not None:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
    connection.settimeout(300)
    parts = urlsplit(url)
    connection.connect((parts.hostname, parts.port))
    return connection


def read_all(connection: socket.socket) -> bytes:
    """Until the server closes the connection."""
    raw = b""
    with contextlib.suppress(ConnectionResetError):
        while part := connection.recv(65536):
            raw += part
    return raw


def read_until(connection: socket.socket, end: bytes) -> bytes:
    """Until these bytes are there."""
    raw = b""
    while end not in raw:
        part = connection.recv(65536)
        assert part, raw
        raw += part
    return raw


def send_raw(url: str, content: bytes) -> Answer:
    """Send these bytes, and read until the server closes the connection."""
    with connect(url) as connection:
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            connection.sendall(content)
        return Answer(read_all(connection))


def request_bytes(method: str, path: str, body: Any = None, **headers: str) -> bytes:
    """A request after which the connection is closed. Underscores in names of headers become hyphens."""
    content = b"" if body is None else body if isinstance(body, bytes) else json.dumps(body).encode()
    fields = {"host": "localhost", "connection": "close"}
    fields |= {"content-type": "application/json", "content-length": str(len(content))} if body is not None else {}
    fields |= {name.replace("_", "-"): value for name, value in headers.items()}
    lines = [f"{method} {path} HTTP/1.1", *(f"{name}: {value}" for name, value in fields.items() if value)]
    return "\r\n".join([*lines, "", ""]).encode("latin-1") + content


def ask(url: str, method: str, path: str, body: Any = None, **headers: str) -> Answer:
    return send_raw(url, request_bytes(method, path, body, **headers))


def completion(tokens: int = 5, **more: Any) -> dict[str, Any]:
    """The body of a request to /v1/completions."""
    body = {"model": "tiny", "prompt": "The fox had", "max_tokens": tokens, "temperature": 0, "ignore_eos": True}
    return body | more


def complete(url: str, tokens: int = 5, key: str = "", **more: Any) -> Answer:
    authorization = f"Bearer {key}" if key else ""
    return ask(url, "POST", "/v1/completions", completion(tokens, **more), authorization=authorization)


def until(condition: Any, seconds: float = 300) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not come true in time"
        time.sleep(0.01)
