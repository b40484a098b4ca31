"""`slm serve` under load and attack, in a process of its own: what others do changes nobody's text, and nothing leaks.

A short form by default; `make test-load` has the long one, which measures times and memory too.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import re
import signal
import statistics
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Coroutine, Iterator
from pathlib import Path
from typing import Any, TypeVar

import pytest

from benchmarks.load import Connection, Reply, load
from tests.serving.processes import (
    Server,
    ask,
    complete,
    completion,
    connect,
    model_directory,
    read_until,
    request_bytes,
    slm_serve,
    until,
)

pytestmark = pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads /proc")
IS_LONG = bool(os.environ.get("SLMKIT_TEST_LOAD"))
LEAVERS, STAYERS, ROUNDS, STALLED = (500, 100, 4, 50) if IS_LONG else (60, 20, 2, 5)
COMPLETIONS = "/v1/completions"
LONG_PROMPT = "The fox had a red kite and the owl said wait for the wind. " * 40  # several passes of reading
T = TypeVar("T")


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with slm_serve(model_directory(), "--max-queue", "1000", fork=False) as found:
        yield found


@pytest.fixture(scope="module")
def expected(server: Server) -> list[str]:
    """The texts of `asked`, one at a time."""
    return [answer_of(reply) for reply in run(load(server.url, COMPLETIONS, [asked(n) for n in range(STAYERS)], 1))]


def asked(number: int, **more: Any) -> dict[str, Any]:
    """A request whose answer differs from that to the next number; each third is not streamed."""
    prompt = f"{number}: the fox had {number * 7919} kites" + (LONG_PROMPT[: 60 * (number % 7)])
    return completion(20 + number % 13, prompt=prompt, stream=number % 3 > 0, **more)


def answer_of(reply: Reply | None) -> str:
    assert reply is not None
    assert not reply.lost
    assert reply.status == 200, reply.body
    if reply.deltas():
        assert reply.finish_reason == "length"
        return reply.text
    (choice,) = json.loads(reply.body)["choices"]
    assert choice["finish_reason"] == "length"
    return choice["text"]


def run(work: Coroutine[Any, Any, T]) -> T:
    return asyncio.run(asyncio.wait_for(work, 240))


def metrics(url: str) -> dict[str, float]:
    with urllib.request.urlopen(f"{url}/metrics", timeout=30) as found:
        lines = found.read().decode().splitlines()
    return {name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines if line[0] != "#")}


def rows(url: str) -> float:
    """In slots, or waiting."""
    found = metrics(url)
    return sum(value for name, value in found.items() if name.startswith(("slm_running_rows", "slm_waiting_rows")))


def generated(url: str) -> float:
    return metrics(url).get('slm_generated_tokens_total{model="tiny"}', 0)


def faults(url: str) -> list[str]:
    """Answers of 500 and more, and faults of the engine."""
    found = {name: value for name, value in metrics(url).items() if value}
    return [name for name in found if re.search(r'status="5', name) or name.startswith("slm_engine_faults_total")]


def memory(server: Server) -> int:
    """Bytes that the server's process holds."""
    pages = Path(f"/proc/{server.process.pid}/statm").read_text().split()[1]  # type: ignore[attr-defined]
    return int(pages) * os.sysconf("SC_PAGE_SIZE")


def descriptors(server: Server) -> int:
    return len(os.listdir(f"/proc/{server.process.pid}/fd"))  # type: ignore[attr-defined]


# -- clients that leave -----------------------------------------------------------------------------------------------


async def leave(url: str, number: int) -> None:
    """A client that is cut: in mid-stream, while its long prompt is read, without a stream, or while it waits."""
    chance, connection = random.Random(number), await Connection.open(url)
    way = number % 4
    body = completion(1500, prompt=f"{number} {LONG_PROMPT if way == 1 else ''}", stream=way != 2)
    await asyncio.sleep(chance.random() * 0.5)
    reply = connection.send(COMPLETIONS, body)
    if way == 0:
        for _ in range(2000):
            await asyncio.sleep(0.01)
            if len(reply.pieces) > number % 9:
                break
    else:
        await asyncio.sleep(chance.random() * (0.02 if way == 1 else 0.3))
    connection.cut()


def test_clients_that_leave_disturb_nobody(server: Server, expected: list[str]) -> None:
    """What stays equals the texts alone; slots, memory and descriptors are free again after every round."""
    held, opened = list[int](), descriptors(server)

    async def together() -> list[Reply | None]:
        leaving = [asyncio.create_task(leave(server.url, number)) for number in range(LEAVERS)]
        replies = await load(server.url, COMPLETIONS, [asked(n) for n in range(STAYERS)], STAYERS)
        await asyncio.gather(*leaving)
        return replies

    for _ in range(ROUNDS):
        found = [answer_of(reply) for reply in run(together())]
        assert found == expected
        until(lambda: rows(server.url) == 0)
        complete(server.url, 1)  # the steps before are counted by now
        count = generated(server.url)
        complete(server.url, 7)
        assert generated(server.url) == count + 7  # nobody else's
        until(lambda: descriptors(server) <= opened + 3)
        held.append(memory(server))
    assert faults(server.url) == []
    assert not IS_LONG or held[-1] <= held[0] * 1.05 + 2**23, held


def test_a_row_leaves_its_slot_long_before_its_end_when_its_client_is_cut(server: Server) -> None:
    """That it is the next step: test_batches.py."""

    async def one() -> int:
        """The tokens that came until the cut."""
        connection = await Connection.open(server.url)
        reply = connection.send(COMPLETIONS, completion(1900, stream=True))
        while len(reply.pieces) < 5:
            await asyncio.sleep(0.001)
        connection.cut()
        return sum(piece.count(b'"text"') for _, piece in reply.pieces)

    more = []
    for _ in range(5):
        before = generated(server.url)
        came = run(one())
        until(lambda: rows(server.url) == 0)
        more.append(generated(server.url) - before - came)
    assert min(more) < 900, more
    # A step takes a millisecond: a few begin while the last events and the end of the connection are on their way.
    assert not IS_LONG or statistics.median(more) <= 20, more


# -- clients that do not read -----------------------------------------------------------------------------------------


def test_stalled_readers_stall_nobody(server: Server, expected: list[str]) -> None:
    """Each asks for far more than its connection holds, and never reads."""
    body = completion(1900 if IS_LONG else 500, prompt="Once", stream=True, logprobs=5)
    with contextlib.ExitStack() as stack:
        stalled = [stack.enter_context(connect(server.url, 4096)) for _ in range(STALLED)]
        for connection in stalled:
            connection.sendall(request_bytes("POST", COMPLETIONS, body))
        assert [
            answer_of(r) for r in run(load(server.url, COMPLETIONS, list(map(asked, range(STAYERS))), 8))
        ] == expected
        until(lambda: rows(server.url) == 0, 120)  # events are kept, up to the answer's end
        if IS_LONG:  # the server's deadline for sending
            until(lambda: descriptors(server) < STALLED, 60)
    assert faults(server.url) == []


# -- attacks ----------------------------------------------------------------------------------------------------------


def bombs() -> dict[str, bytes]:
    """Wrong requests are refused while others run."""
    fields: dict[str, Any] = {
        "n": 10**9, "max_tokens": 10**30, "temperature": -1, "top_k": -5, "seed": -1, "logprobs": 10**6,
        "stop": ["x" * 500_000], "best_of": 10**6, "prompt": [10**18], "logit_bias": {str(n): 1 for n in range(50_000)},
        "stream_options": [[[]]], "structured_outputs": {"regex": "("},
    }  # fmt: skip
    found = {name: json.dumps(completion() | {name: value}).encode() for name, value in fields.items()}
    found |= {f"temperature {word}": f'{{"model":"tiny","prompt":"a","temperature":{word}}}'.encode()
              for word in ("NaN", "1e309", "-Infinity")}  # fmt: skip
    messages = [{"role": "user", "content": "a"}] * 20_000
    return found | {
        "deep": b"[" * 500_000,
        "deep field": b'{"model":"tiny","prompt":"a","metadata":' + b'{"a":' * 100_000 + b"1" + b"}" * 100_001,
        "many messages": json.dumps({"model": "tiny", "messages": messages}).encode(),
        "many prompts": json.dumps(completion(prompt=["a"] * 100_000)).encode(),
        "no UTF-8": b'{"model":"tiny","prompt":"\xff"}',
        "long model": json.dumps({"model": "x" * 900_000, "prompt": "a"}).encode(),
        "a path": json.dumps(completion(model="../../etc/passwd")).encode(),
    }


def test_bombs_are_refused_and_leave_nothing(server: Server) -> None:
    """None of them reaches an engine."""
    held, count = list[int](), generated(server.url)
    for _ in range(3 if not IS_LONG else 20):
        for name, body in bombs().items():
            for path in (COMPLETIONS, "/v1/chat/completions", "/v1/embeddings"):
                started = time.perf_counter()
                answer = ask(server.url, "POST", path, body)
                assert 400 <= answer.status < 500, (name, path, answer.body)
                assert len(answer.error["message"]) < 1000, name
                assert not IS_LONG or time.perf_counter() - started < 3, (name, path)
        held.append(memory(server))
    assert not IS_LONG or held[-1] - held[0] < 2**24, held
    assert (rows(server.url), generated(server.url)) == (0, count)
    assert faults(server.url) == []


def test_what_is_too_large_or_without_a_key_is_refused() -> None:
    """While others with a key are served."""
    key = "k" * 32
    with slm_serve(model_directory(), SLM_API_KEYS=key) as server:
        before = complete(server.url, key=key).body
        held = memory(server)
        large_ones = 200 if IS_LONG else 40
        for number in range(large_ones):
            large = request_bytes("POST", COMPLETIONS, b"x" * (2**20 + 1), authorization=f"Bearer {key}")
            with connect(server.url) as connection:
                with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                    connection.sendall(large)
                with contextlib.suppress(ConnectionResetError):
                    assert b" 413 " in connection.recv(100)
            wrong = random.Random(number).choice(["", "x", key[:-1], key + "k", "é", "k" * 9000])
            assert ask(server.url, "POST", COMPLETIONS, completion(), authorization=f"Bearer {wrong}").status in (
                400,
                401,
            )
        after = json.loads(complete(server.url, key=key).body)
        assert after["choices"] == json.loads(before)["choices"]
        assert memory(server) - held < 0.6 * large_ones * 2**20


@pytest.mark.skipif(not IS_LONG, reason="takes minutes: make test-load")
def test_schemathesis_finds_no_answer_that_is_not_documented(server: Server, tmp_path: Path) -> None:
    """The tool as it is, on the server's own document, by several clients at once."""
    pytest.importorskip("schemathesis")
    checks = "not_a_server_error,status_code_conformance,content_type_conformance,response_schema_conformance"
    seconds = 120
    found = subprocess.run(
        [Path(sys.executable).parent / "schemathesis", "run", f"{server.url}/openapi.json", "--checks", checks,
         "--max-time", str(seconds), "--workers", "4", "--no-color", "--generation-database", "none"],
        capture_output=True, text=True, cwd=tmp_path, timeout=seconds + 200,
    )  # fmt: skip
    assert found.returncode == 0, found.stdout[-5000:] + found.stderr[-1000:]
    assert faults(server.url) == []
    until(lambda: rows(server.url) == 0)


# -- the end, and times ----------------------------------------------------------------------------------------


def test_sigterm_under_load_lets_every_open_answer_end(expected: list[str]) -> None:
    clients = 100 if IS_LONG else 24

    async def until_the_end(server: Server) -> list[Reply | None]:
        loading = asyncio.create_task(load(server.url, COMPLETIONS, [asked(n) for n in range(clients)], clients))
        await asyncio.sleep(0.1)
        while not generated(server.url):
            await asyncio.sleep(0.01)
        server.process.send_signal(signal.SIGTERM)
        return await loading

    with slm_serve(model_directory()) as server:
        found = run(until_the_end(server))
        code, errors = server.wait()
    assert code == 0, errors
    assert "Traceback" not in errors
    assert not [reply for reply in found if reply is not None and reply.lost and reply.pieces]  # none is cut
    ended = {number: reply for number, reply in enumerate(found) if reply is not None and not reply.lost}
    assert {reply.status for reply in ended.values()} <= {200, 503}
    answered = {number: answer_of(reply) for number, reply in ended.items() if reply.status == 200}
    assert answered
    assert all(answered[number] == text for number, text in enumerate(expected) if number in answered)


def health_times(url: str, seconds: float) -> list[float]:
    """Every 20 ms, over one connection."""
    found, end = list[float](), time.monotonic() + seconds
    with connect(url) as connection:
        while time.monotonic() < end:
            started = time.perf_counter()
            connection.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
            assert b" 200 " in read_until(connection, b"}")
            found.append(time.perf_counter() - started)
            time.sleep(0.02)
    return found


@pytest.mark.skipif(not IS_LONG, reason="measures times, for a machine with nothing else to do: make test-load")
def test_health_answers_quickly_while_large_prompts_are_refused() -> None:
    """5 MB of one character and of mixed text, beside four streams. Without times: test_batches.py."""
    texts = ["a" * 5_000_000, "".join(random.Random(0).choices("the fox, a kite. Über 😀\n", k=3_500_000))]
    bodies = [json.dumps(completion(prompt=text)).encode() for text in texts]
    p99 = lambda times: statistics.quantiles(times, n=100)[98]  # noqa: E731
    with slm_serve(model_directory(), "--max-body", str(2**23), fork=False) as server:
        stop, statuses = threading.Event(), list[tuple[int, str]]()

        def stream() -> None:
            while not stop.is_set():
                complete(server.url, 300, stream=True)

        def attack() -> None:
            for body in bodies * 8:
                answer = ask(server.url, "POST", COMPLETIONS, body)
                statuses.append((answer.status, answer.error["code"]))

        readers = [threading.Thread(target=stream) for _ in range(4)]
        attacker = threading.Thread(target=attack)
        for reader in readers:
            reader.start()
        try:
            usual = p99(health_times(server.url, 3))
            attacker.start()
            times = health_times(server.url, 3)
            attacker.join()
        finally:
            stop.set()
            for reader in readers:
                reader.join()
    assert set(statuses) == {(400, "context_length_exceeded")}
    assert p99(times) < max(0.1, 3 * usual), (p99(times), usual)
