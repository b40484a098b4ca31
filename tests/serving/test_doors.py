"""Who may come in, and how much: over real sockets, around the real application."""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import json
import select
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest

from slmkit.config import UserError
from slmkit.serving import doors as module
from slmkit.serving.app import create_app
from slmkit.serving.doors import HEADERS, Doors, Limits
from slmkit.serving.models import ServedModel
from slmkit.serving.protocol import ApiError
from slmkit.serving.server import bind
from slmkit.serving.worker import Worker
from tests.serving.processes import (
    Answer,
    ask,
    complete,
    completion,
    connect,
    model_directory,
    read_all,
    read_until,
    request_bytes,
    send_raw,
    until,
)
from tests.serving.servers import running

KEY, OTHER_KEY = "a-key-of-many-characters", "another-key-of-many-characters"


@pytest.fixture(scope="module")
def served() -> ServedModel:
    return ServedModel.load("tiny", model_directory(), "cpu", max_rows=8)


class Running:
    def __init__(self, url: str, worker: Worker, app: Any) -> None:
        self.url, self.worker, self.app = url, worker, app

    def rows(self) -> float:
        return self.worker.registry.get_sample_value("slm_running_rows", {"model": "tiny"}) or 0.0

    def generated(self) -> float:
        return self.worker.registry.get_sample_value("slm_generated_tokens_total", {"model": "tiny"}) or 0.0


@contextlib.contextmanager
def server(model: ServedModel, **limits: Any) -> Iterator[Running]:
    worker = Worker([model])
    worker.start()
    app = create_app(worker, {"tiny": model}, {"echo": lambda **body: body})
    try:
        with running(app, Limits(**limits), worker) as url:
            yield Running(url, worker, app)
    finally:
        worker.stop()


@pytest.fixture(scope="module")
def plain(served: ServedModel) -> Iterator[Running]:
    with server(served) as found:
        yield found


@pytest.fixture(scope="module")
def locked(served: ServedModel) -> Iterator[Running]:
    with server(served, keys=[KEY, OTHER_KEY]) as found:
        yield found


# -- keys -------------------------------------------------------------------------------------------------------------

PUBLIC = {"/", "/health"}
WRONG = [
    "", "Bearer", "Bearer ", "Bearer wrong", f"Bearer {KEY[:-1]}", f"Bearer {KEY}x", f"Bearer {KEY.upper()}", KEY,
    f"Basic {KEY}", f"Bearer {KEY} {KEY}", f"Bearer {'x' * 5000}", "Bearer \xe9\xff", f"Token {KEY}", "Bearer None",
]  # fmt: skip


def all_routes(app: Any) -> list[tuple[str, str]]:
    found = []
    for route in app.routes:
        path = route.path.replace("{name:path}", "tiny").replace("{name}", "echo")
        found += [(method, path) for method in sorted(route.methods)]
    assert len(found) > 12
    return found


def test_every_route_but_health_and_the_files_of_the_page_needs_a_key(locked: Running) -> None:
    routes = [
        *all_routes(locked.app),
        ("GET", "/nosuch"),
        ("DELETE", "/v1/models"),
        ("GET", "//health"),
        ("TRACE", "/"),
    ]
    for method, path in routes:
        is_public = method in ("GET", "HEAD") and (path in PUBLIC or path.startswith("/page/"))
        for authorization in WRONG[:4]:
            answer = ask(locked.url, method, path, authorization=authorization)
            assert (answer.status == 401) is not is_public, (method, path, answer.raw)
        if not is_public:
            assert answer.headers["www-authenticate"] == "Bearer"
            right = ask(locked.url, method, path, {} if method == "POST" else None, authorization=f"Bearer {KEY}")
            assert right.status not in (0, 401, 403), (method, path)


def test_wrong_keys_are_refused_and_right_ones_are_not(locked: Running) -> None:
    for authorization in WRONG:
        answer = ask(locked.url, "GET", "/v1/models", authorization=authorization)
        assert answer.status == 401, authorization
        assert (answer.error["type"], answer.error["code"]) == ("authentication_error", "invalid_api_key")
        assert KEY not in answer.raw.decode()
    for authorization in (f"Bearer {KEY}", f"Bearer {OTHER_KEY}", f"bearer  {KEY}", f"BEARER {KEY} "):
        assert ask(locked.url, "GET", "/v1/models", authorization=authorization).status == 200
    assert KEY not in repr(Limits(keys=[KEY]))


def test_what_one_key_reads_is_not_known_to_another(locked: Running) -> None:
    def cached(key: str) -> int:
        prompt = "The owl said: Wait for the wind. " * 5
        return json.loads(complete(locked.url, 2, key, prompt=prompt).body)["usage"]["prompt_tokens_details"][
            "cached_tokens"
        ]

    assert cached(KEY) == 0
    assert cached(KEY) > 50
    assert cached(OTHER_KEY) == 0


def test_the_time_of_a_refusal_does_not_tell_how_much_of_a_key_was_right(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each key is compared with all, as digests of one length, by a function whose time tells nothing."""
    keys = [KEY, OTHER_KEY, "a-third-key-of-many-characters"]
    compared: list[tuple[str, str]] = []

    def noted(one: str, other: str) -> bool:
        compared.append((one, other))
        return hmac.compare_digest(one, other)

    monkeypatch.setattr(module, "hmac", SimpleNamespace(compare_digest=noted))
    locked = Doors(None, Limits(keys=keys))
    for guess in ("x" * len(KEY), KEY[:-1] + "x", "a-third-key-of-many-characterx", KEY, OTHER_KEY):
        compared.clear()
        with contextlib.nullcontext() if guess in keys else pytest.raises(ApiError):
            locked._key_of({"authorization": f"Bearer {guess}"})
        digest = hashlib.sha256(guess.encode()).hexdigest()
        assert compared == [(digest, hashlib.sha256(key.encode()).hexdigest()) for key in keys]


# -- hosts and origins ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("localhost", 200), ("localhost:80", 200), ("LOCALHOST:1", 200), ("127.0.0.1:8000", 200), ("[::1]:8000", 200),
        ("evil.example", 403), ("evil.example:8000", 403), ("localhost.evil.example", 403), ("127.0.0.1.nip.io", 403),
        ("localhost@evil.example", 403), ("0.0.0.0", 403), ("::1", 403), ("", 400),
    ],
)  # fmt: skip
def test_a_name_that_is_not_this_machines_is_refused(plain: Running, host: str, status: int) -> None:
    for path in ("/v1/models", "/health", "/"):
        answer = ask(plain.url, "GET", path, host=host)
        assert answer.status == status
        assert status == 200 or answer.error["code"] in ("host_not_allowed", "invalid_http")


def test_a_name_that_was_told_is_allowed(served: ServedModel) -> None:
    with server(served, hosts=["models.example.org"]) as running:
        assert ask(running.url, "GET", "/v1/models", host="models.example.org:8000").status == 200
        assert ask(running.url, "GET", "/v1/models").status == 200
        assert ask(running.url, "GET", "/v1/models", host="example.org").status == 403


def test_names_are_told_in_any_case_and_without_a_port() -> None:
    assert Limits(hosts=["Chat.Example.ORG", "[::2]"]).hosts == ["chat.example.org", "[::2]"]
    for wrong in ("chat.example.org:8000", "https://chat.example.org", "", "*"):
        with pytest.raises(UserError, match="no name of a host"):
            Limits(hosts=[wrong])


def test_pages_of_other_sites_can_neither_ask_nor_read(plain: Running) -> None:
    evil = "https://evil.example"
    for headers in (
        {"origin": evil, "content_type": "text/plain"},  # what a page may send without a preflight
        {"origin": "null"},
        {"origin": "http://localhost:1"},  # another program of this machine
        {"sec_fetch_site": "cross-site"},
    ):
        answer = ask(plain.url, "POST", "/v1/completions", completion(), **headers)
        assert (answer.status, answer.error["code"]) == (403, "origin_not_allowed")
        assert "access-control-allow-origin" not in answer.headers
    preflight = ask(plain.url, "OPTIONS", "/v1/completions", origin=evil, access_control_request_method="POST")
    assert preflight.status == 403
    assert not [name for name in preflight.headers if name.startswith("access-control")]
    assert ask(plain.url, "POST", "/v1/completions", completion(), origin="http://localhost").status == 200
    assert ask(plain.url, "GET", "/", sec_fetch_site="cross-site").status == 200  # a link to the page
    assert (
        ask(plain.url, "GET", "/", sec_fetch_site="cross-site").headers["cross-origin-resource-policy"] == "same-origin"
    )


def test_an_origin_that_was_told_may_and_never_with_credentials(served: ServedModel) -> None:
    told, other = "https://chat.example.org", "https://chat.example.org.evil.example"
    with server(served, origins=[told], keys=[KEY]) as running:
        names = "authorization,content-type,x-stainless-os"  # of OpenAI's JavaScript client
        asked = {"access_control_request_method": "POST", "access_control_request_headers": names}
        preflight = ask(running.url, "OPTIONS", "/v1/completions", origin=told, **asked)  # it has no key
        assert (preflight.status, preflight.body) == (204, b"")
        assert preflight.headers["access-control-allow-origin"] == told
        assert preflight.headers["access-control-allow-methods"] == "GET, POST"
        assert preflight.headers["access-control-allow-headers"] == names
        answer = ask(running.url, "POST", "/v1/completions", completion(), origin=told, authorization=f"Bearer {KEY}")
        assert (answer.status, answer.headers["access-control-allow-origin"]) == (200, told)
        assert answer.headers["vary"] == "Origin"
        refused = ask(running.url, "POST", "/v1/completions", completion(), origin=told)
        assert (refused.status, refused.headers["access-control-allow-origin"]) == (401, told)  # so that it can be read
        for each in (preflight, answer, refused):
            assert "access-control-allow-credentials" not in each.headers
        assert ask(running.url, "OPTIONS", "/v1/completions", origin=other, **asked).status == 403
        assert ask(running.url, "GET", "/v1/models", origin=other, authorization=f"Bearer {KEY}").status == 403
    for wrong in ("*", "null", "chat.example.org", "https://*.example.org", "https://a/b", "https://a@b"):
        with pytest.raises(UserError, match="is no origin"):
            Limits(origins=[wrong])


def test_all_answers_have_the_headers_of_security(plain: Running) -> None:
    answers = [
        ask(plain.url, "GET", "/health"), ask(plain.url, "GET", "/nosuch"), ask(plain.url, "GET", "/", host="evil"),
        complete(plain.url), ask(plain.url, "POST", "/v1/completions", b"{"), send_raw(plain.url, b"nonsense\r\n\r\n"),
        ask(plain.url, "GET", "/"),
    ]  # fmt: skip
    for answer in answers:
        assert HEADERS.keys() <= answer.headers.keys(), answer.raw
        assert "server" not in answer.headers
    assert "script-src 'self'" in answers[-1].headers["content-security-policy"]  # its own stays


# -- sizes ------------------------------------------------------------------------------------------------------------


def test_bodies_over_the_limit_are_refused_at_once_and_without_memory(served: ServedModel) -> None:
    with server(served, max_body=10_000) as running:
        just = json.dumps(completion()).encode().ljust(10_000)
        assert ask(running.url, "POST", "/v1/completions", just).status == 200
        assert ask(running.url, "POST", "/v1/completions", just + b" ").status == 413
        before = psutil.Process().memory_info().rss
        with connect(running.url) as connection:
            head = request_bytes("POST", "/v1/completions", b"", content_length=str(10**12))
            connection.sendall(head)
            first = read_until(connection, b"}}")  # before any of the body was sent
            assert Answer(first).error["code"] == "request_too_large"
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                for _ in range(500):
                    connection.sendall(b"x" * 100_000)
        chunk = b"%x\r\n%s\r\n" % (1000, b"x" * 1000)
        head = request_bytes("POST", "/v1/completions", b"", content_length="", transfer_encoding="chunked")
        assert send_raw(running.url, head + chunk * 50 + b"0\r\n\r\n").status == 413
        assert psutil.Process().memory_info().rss - before < 30 * 2**20  # of 50 that were sent
        assert complete(running.url).status == 200


def test_a_large_body_of_a_client_that_sends_all_of_it_first_gets_its_answer(plain: Running) -> None:
    import httpx

    answer = httpx.post(f"{plain.url}/v1/completions", content=b"x" * 3_000_000, headers={"host": "localhost"})
    assert (answer.status_code, answer.json()["error"]["code"]) == (413, "request_too_large")


def test_a_refusal_reaches_a_client_that_is_still_sending(locked: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LINGER", 120.0)
    body = b"x" * 1_000_000
    with connect(locked.url) as connection:
        connection.sendall(request_bytes("POST", "/v1/completions", b"", content_length=str(len(body))))
        assert Answer(read_until(connection, b"}}")).status == 401
        for first in range(0, len(body), 10_000):  # a reset connection would raise
            connection.sendall(body[first : first + 10_000])
            time.sleep(0.002)  # so that the server sees the parts


def test_a_body_of_two_lengths_is_refused(plain: Running) -> None:
    head = request_bytes("POST", "/v1/completions", b"", content_length="40", transfer_encoding="chunked")
    answer = send_raw(plain.url, head + b"0\r\n\r\nGET /v1/models HTTP/1.1\r\nhost: a\r\n\r\n")
    assert (answer.status, answer.error["code"]) == (400, "invalid_http")
    assert answer.raw.count(b"HTTP/1.1 ") == 1


def test_compressed_bodies_are_refused(plain: Running) -> None:
    import gzip

    bomb = gzip.compress(b" " * 100_000_000)
    for encoding in ("gzip", "deflate", "br", "x"):
        answer = ask(plain.url, "POST", "/v1/completions", bomb, content_encoding=encoding)
        assert (answer.status, answer.error["code"]) == (415, "unsupported_encoding")
    body = json.dumps(completion()).encode()
    assert ask(plain.url, "POST", "/v1/completions", body, content_encoding="identity").status == 200


@pytest.mark.parametrize(
    "content",
    [
        b"nonsense\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"\0" * 300,  # TLS
        b"GET /health HTTP/1.1\r\nhost: localhost\r\nhost: evil.example\r\n\r\n",
        b"POST /health HTTP/1.1\r\nhost: localhost\r\ncontent-length: -1\r\n\r\n",
        b"POST /health HTTP/1.1\r\nhost: localhost\r\ncontent-length: 5\r\ncontent-length: 6\r\n\r\nhello",
        b"POST /health HTTP/1.1\r\nhost: localhost\r\ntransfer-encoding: chunked\r\n\r\nzz\r\n",
        b"POST /health HTTP/1.1\r\nhost: localhost\r\ntransfer-encoding: gzip, chunked\r\n\r\n0\r\n\r\n",
        b"GET /health HTTP/1.1\r\nhost: localhost\r\nx : y\r\n\r\n",
        b"GET /\xff\xfe HTTP/1.1\r\nhost: localhost\r\n\r\n",
    ],
)
def test_what_is_no_http_is_refused_in_the_envelope(plain: Running, content: bytes) -> None:
    answer = send_raw(plain.url, content)
    assert (answer.status, answer.error["code"]) == (400, "invalid_http"), answer.raw  # 408 if it waited for more
    assert ask(plain.url, "GET", "/health").status == 200


def test_large_headers_are_refused_however_they_arrive(plain: Running) -> None:
    many = {f"x_{number}": "y" for number in range(3_000)}
    for headers in ({"x": "y" * 20_000}, many):
        answer = ask(plain.url, "GET", "/health", **headers)
        assert (answer.status, answer.error["code"]) == (431, "headers_too_large")
    for head in (b"GET /health HTTP/1.1\r\nhost: localhost\r\nx: ", b"GET /"):  # without an end, so in parts
        answer = send_raw(plain.url, head + b"x" * 50_000)
        assert (answer.status, answer.error["code"]) == (431, "headers_too_large")
    assert ask(plain.url, "GET", f"/health?{'x' * 20_000}").status == 431
    assert ask(plain.url, "GET", "/health", x="y" * 10_000).status == 200


def test_nothing_that_looks_like_a_path_is_opened(plain: Running) -> None:
    names = [
        "../../etc/passwd", "/etc/passwd", "..%2f..%2fetc/passwd", "%2e%2e/%2e%2e/etc/passwd", "....//....//etc/passwd",
        "..\\..\\etc\\passwd", "file:///etc/passwd", "C:\\boot.ini", "index.html/../../../setup", "~root/.ssh/id_rsa",
        "/proc/self/environ", ".", "..", "%00", "a%00.html", str(model_directory()), f"{model_directory()}/config.json",
    ]  # fmt: skip
    opened: list[str] = []
    _watch_opened(opened)
    for name in names:
        for path in (f"/page/{name}", f"/{name}", f"/v1/models/{name}"):
            assert ask(plain.url, "GET", path.replace("\\", "%5C")).status in (404, 405), path
        for path, field in (("/v1/completions", "model"), ("/page/echo/../" + name.replace("\\", "%5C"), "name")):
            answer = ask(plain.url, "POST", path, completion() | {field: name})
            assert answer.status in (400, 404, 405), (path, answer.raw)
    _watch_opened(None)
    assert not opened


_opened: list[list[str] | None] = [None]


def _watch_opened(into: list[str] | None) -> None:
    """Note which files are opened from here on, or stop that."""

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open" and _opened[-1] is not None and isinstance(arguments[0], str | bytes | Path):
            _opened[-1].append(str(arguments[0]))

    if len(_opened) == 1:
        sys.addaudithook(hook)  # cannot be taken away again
    _opened.append(into)


# -- deadlines --------------------------------------------------------------------------------------------------------


HEAD = b"GET /health HTTP/1.1\r\nhost: localhost\r\nx: "
BODY = request_bytes("POST", "/v1/completions", b"", content_length="500000")


def drip(connection: Any, first: bytes) -> bytes:
    """A byte every 0.1 s, until the server answers or closes; returns what it said."""
    connection.sendall(first)
    connection.settimeout(0.1)
    for _ in range(1200):
        with contextlib.suppress(TimeoutError):
            first = connection.recv(1)
            return first + (read_all(connection) if first else b"")
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            connection.sendall(b"x")
    raise AssertionError("it was never closed")


def test_slow_requests_are_ended_by_a_deadline(served: ServedModel) -> None:
    """Bytes that come meanwhile do not put it off."""
    ends: list[bytes] = []
    with server(served, header_seconds=1.0, body_seconds=1.0) as running:

        def attack(first: bytes) -> None:
            with connect(running.url) as connection:
                ends.append(drip(connection, first))

        threads = [threading.Thread(target=attack, args=[first]) for first in [HEAD, BODY] * 25]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(ends) == 50
        for said in ends:
            assert said == b"" or (Answer(said).status, Answer(said).error["code"]) == (408, "request_timeout")
        assert any(ends)
        until(lambda: len(psutil.Process().net_connections()) < 20)


def test_others_are_answered_while_slow_requests_are_open(served: ServedModel) -> None:
    with server(served, header_seconds=300, body_seconds=300) as running, contextlib.ExitStack() as stack:
        slow = [stack.enter_context(connect(running.url)) for _ in range(50)]
        for connection, first in zip(slow, [HEAD, BODY] * 25):
            connection.sendall(first)
        assert [complete(running.url, 3).status for _ in range(5)] == [200] * 5
        assert select.select(slow, [], [], 0)[0] == []


def test_a_connection_without_a_word_is_ended(served: ServedModel) -> None:
    with server(served, header_seconds=0.5) as running:
        began = time.monotonic()
        with connect(running.url) as connection:
            assert Answer(read_all(connection)).status == 408
            assert time.monotonic() - began > 0.4


def test_a_second_request_has_a_deadline_of_its_own(served: ServedModel) -> None:
    """The time between two requests is none of it."""
    with server(served, header_seconds=2.0) as running, connect(running.url) as connection:
        for _ in range(3):  # over one connection
            connection.sendall(request_bytes("GET", "/health", connection="keep-alive"))
            read_until(connection, b'{"status":"ok"}')
        time.sleep(2.2)
        connection.sendall(request_bytes("GET", "/health", connection="keep-alive"))
        read_until(connection, b'{"status":"ok"}')
        assert Answer(drip(connection, b"GET /health HTTP/1.1\r\nx: ")).status == 408


def test_clients_that_do_not_read_are_ended_and_their_rows_leave(served: ServedModel) -> None:
    with server(served, send_seconds=1.0) as running:
        stalled = [connect(running.url, receive_buffer=4096) for _ in range(4)]
        body = completion(1900, stream=True, n=2, logprobs=5)
        for connection in stalled:
            connection.sendall(request_bytes("POST", "/v1/completions", body))
        until(lambda: running.generated() > 0)
        assert complete(running.url, 5).status == 200
        until(lambda: running.rows() == 0)
        for connection in stalled:
            with connection:
                raw = read_all(connection)
                assert raw.startswith(b"HTTP/1.1 200")
                assert b"[DONE]" not in raw  # it was cut
        assert running.worker.state == "ok"


def test_more_connections_than_allowed_are_told_so(served: ServedModel) -> None:
    with server(served, max_connections=5) as running:
        held = [connect(running.url) for _ in range(5)]
        until(lambda: ask(running.url, "GET", "/health").status == 503)
        answer = ask(running.url, "GET", "/health")
        assert (answer.status, answer.headers["retry-after"]) == (503, "1")
        assert answer.error["code"] == "overloaded"
        for connection in held:
            connection.close()
        until(lambda: ask(running.url, "GET", "/health").status == 200)


# -- rates ------------------------------------------------------------------------------------------------------------


def test_a_key_gets_as_many_requests_a_minute_as_told(served: ServedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [1000.0]
    monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: now[0]))
    with server(served, keys=[KEY, OTHER_KEY], requests_per_minute=30) as running:
        statuses = [complete(running.url, 1, KEY) for _ in range(32)]
        assert [answer.status for answer in statuses] == [200] * 30 + [429] * 2
        refused = statuses[-1]
        assert (refused.status, refused.error["type"]) == (429, "rate_limit_error")
        assert int(refused.headers["retry-after"]) == 2
        assert complete(running.url, 1, OTHER_KEY).status == 200
        assert ask(running.url, "GET", "/health").status == 200
        now[0] += 2
        assert [complete(running.url, 1, KEY).status for _ in range(2)] == [200, 429]


def test_a_key_has_as_many_open_requests_as_told(served: ServedModel) -> None:
    with server(served, keys=[KEY, OTHER_KEY], requests_per_key=1) as running:
        with connect(running.url) as connection:
            headers = {"authorization": f"Bearer {KEY}"}
            connection.sendall(request_bytes("POST", "/v1/completions", completion(1900, stream=True), **headers))
            connection.recv(100)
            refused = complete(running.url, 1, KEY)
            assert (refused.status, refused.headers["retry-after"]) == (429, "1")
            assert complete(running.url, 1, OTHER_KEY).status == 200
        until(lambda: complete(running.url, 1, KEY).status == 200)  # the first one's client is gone


# -- errors of the application ----------------------------------------------------------------------------------------


def test_an_error_of_the_application_is_an_envelope_and_a_broken_stream_is_cut() -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            return
        if scope["path"] == "/late":
            await send({"type": "http.response.start", "status": 200, "headers": []})
            await send({"type": "http.response.body", "body": b"some", "more_body": True})
        raise RuntimeError("a secret of the server")

    with running(app) as url:
        answer = ask(url, "GET", "/early")
        assert (answer.status, answer.error["type"]) == (500, "server_error")
        assert b"secret" not in answer.raw
        late = ask(url, "GET", "/late")
        assert b"some" in late.raw
        assert not late.raw.endswith(b"0\r\n\r\n")


# -- the address ------------------------------------------------------------------------------------------------------


def test_addresses_that_cannot_be_had_are_one_line() -> None:
    with bind("127.0.0.1", 0) as listening:
        listening.listen()
        with pytest.raises(UserError, match="taken by another program"):
            bind("127.0.0.1", listening.getsockname()[1])
    for host in ("0.0.0.0", "8.8.8.8", "::"):
        with pytest.raises(UserError, match="give --key-file, or set SLM_API_KEYS"):
            bind(host, 0)
    with pytest.raises(UserError, match="no such host"):
        bind("nosuch.invalid", 0, True)
    with pytest.raises(UserError, match="not an address of this machine"):
        bind("203.0.113.1", 0, True)
    with bind("0.0.0.0", 0, True) as listening:
        assert listening.getsockname()[1] > 0
    with bind("localhost", 0) as listening:
        assert listening.getsockname()[0] == "127.0.0.1"
