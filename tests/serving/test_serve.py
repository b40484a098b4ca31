"""`slm serve` as a process: its start, its doors, signals under load, and what it does when the engine fails."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import threading
from pathlib import Path
from typing import Any, cast

import pytest

from slmkit import SLMConfig
from slmkit.config import UserError
from slmkit.generation.engine import Request
from slmkit.generation.sampling_settings import SamplingSettings
from slmkit.model.decoder import Decoder
from slmkit.serving.app import create_app
from slmkit.serving.doors import Limits
from slmkit.serving.models import ServedModel, chat_requests, completion_requests
from slmkit.serving.protocol import ChatRequest, CompletionRequest, read
from slmkit.serving.server import bind, serve
from slmkit.serving.worker import Worker
from tests.adapt.helpers import adapted, save_adapter
from tests.cli.helpers import refused
from tests.serving.processes import (
    SLM,
    WITH_SLOW_STEPS,
    Answer,
    Server,
    ask,
    complete,
    completion,
    connect,
    model_directory,
    read_all,
    request_bytes,
    slm_serve,
    until,
)
from tests.serving.servers import alone

KEY, OTHER_KEY = "a-key-of-many-characters", "another-key-of-many-characters"


class Streams:
    """Streaming requests that are open, each read in a thread of its own."""

    def __init__(self, server: Server, count: int, tokens: int, **headers: str) -> None:
        self.raw = [b""] * count

        def read(number: int) -> None:
            with connect(server.url) as connection:
                body = completion(tokens, stream=True, stream_options={"include_usage": True})
                connection.sendall(request_bytes("POST", "/v1/completions", body, **headers))
                self.raw[number] = connection.recv(1)
                self.raw[number] += read_all(connection)

        self.threads = [threading.Thread(target=read, args=[number], daemon=True) for number in range(count)]
        for thread in self.threads:
            thread.start()
        until(lambda: all(self.raw))

    def ended(self) -> list[Answer]:
        for thread in self.threads:
            thread.join(120)
            assert not thread.is_alive()
        return [Answer(raw) for raw in self.raw]


def tokens_in(answer: Answer) -> int:
    """Of a stream that came to its end."""
    *_, usage, end = answer.body.decode().strip().split("\n\n")
    assert end == "data: [DONE]"
    return json.loads(usage.removeprefix("data: "))["usage"]["completion_tokens"]


def last_error(answer: Answer) -> str:
    """The message with which a stream ended."""
    *_, last = answer.body.decode().strip().split("\n\n")
    return json.loads(last.removeprefix("data: "))["error"]["message"]


def health(server: Server) -> int:
    return ask(server.url, "GET", "/health").status


# -- the start --------------------------------------------------------------------------------------------------------


def test_it_says_where_it_is_what_it_serves_and_serves_it() -> None:
    directory = model_directory()
    with slm_serve(directory, f"again={directory}", fork=False) as server:
        first, *models, last = server.lines
        assert first.startswith(f"{server.url}/v1 is ready")
        assert models == [f"  {name}  (context 2,048, {directory})" for name in ("tiny", "again")]
        assert last == f"try: curl {server.url}/v1/models"
        listed = json.loads(ask(server.url, "GET", "/v1/models").body)["data"]
        assert [one["id"] for one in listed] == ["tiny", "again"]
        texts = [complete(server.url, 8, model=name) for name in ("tiny", "again")]
        assert [answer.status for answer in texts] == [200, 200]
        assert json.loads(texts[0].body)["choices"] == json.loads(texts[1].body)["choices"]
        nothing = ask(server.url, "GET", "/")
        assert (nothing.status, "--ui" in nothing.error["message"]) == (404, True)
        metrics = ask(server.url, "GET", "/metrics").body.decode()
        assert 'slm_requests_total{model="tiny",route="/v1/completions",status="200"} 1.0' in metrics
        assert 'slm_generated_tokens_total{model="again"} 8.0' in metrics
        assert server.end() == (0, "")


def test_wrong_options_are_one_line(tmp_path: Path) -> None:
    directory = model_directory()
    (tmp_path / "keys").write_text(f"{KEY}\n")
    (tmp_path / "keys").chmod(0o644)
    (tmp_path / "empty").write_text("# none\n")
    (tmp_path / "short").write_text("secret\n")
    for name in ("empty", "short"):
        (tmp_path / name).chmod(0o600)
    assert "are both named tiny: give one as NAME=PATH" in refused("serve", directory, directory)
    assert "give --key-file, or set SLM_API_KEYS" in refused("serve", directory, "--host", "0.0.0.0")
    assert "chmod 600" in refused("serve", directory, "--key-file", tmp_path / "keys")
    (tmp_path / "latin").write_bytes(b"# \xfcber\n")
    assert "latin: not a text in UTF-8" in refused("serve", directory, "--key-file", tmp_path / "latin")
    assert "no key in it" in refused("serve", directory, "--key-file", tmp_path / "empty")
    assert "a key of 6 characters" in refused("serve", directory, "--key-file", tmp_path / "short")
    assert "no such file" in refused("serve", directory, "--key-file", tmp_path / "nosuch")
    assert "no such host" in refused("serve", directory, "--host", "nosuch.invalid")
    assert "is no origin" in refused("serve", directory, "--cors", "*")
    assert "no name of a host" in refused("serve", directory, "--allow-host", "chat.example.org:8000")
    assert "memory: " in refused("serve", directory, "--memory", "inf")
    # 2 layers × keys and values × 64 channels × 64 positions at least × 4 bytes, and 2,048 positions
    assert "tiny needs 6.1e-05 GiB for the shortest text" in refused("serve", directory, "--memory", "0.00006")
    assert "nosuch' does not exist" in refused("serve", directory, "--ui", "--data", tmp_path / "nosuch")
    assert "did you mean" in refused("serve", f"{directory}x")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        assert "taken by another program" in refused("serve", directory, "--port", str(taken.getsockname()[1]))


def test_two_that_load_for_one_port() -> None:
    """Both may bind it while neither listens. The second one that has loaded says so, in a line."""
    first = bind("127.0.0.1", 0)
    with first, bind("127.0.0.1", first.getsockname()[1]) as second:
        first.listen()
        worker = Worker([])
        with pytest.raises(UserError, match=r"--port \d+: taken by another program"):
            serve(create_app(worker, {}), second, Limits(), worker, 1.0, lambda: None)


def test_a_missing_package_is_named_with_the_extra() -> None:
    import subprocess
    import sys

    for name in ("fastapi", "uvicorn", "prometheus_client"):
        code = f"import sys; sys.modules[{name!r}] = None; {SLM}"
        words = [sys.executable, "-c", code, "serve", str(model_directory())]
        done = subprocess.run(words, capture_output=True, text=True)
        assert (done.returncode, done.stderr) == (2, "slm: the server needs more packages: pip install slmkit[serve]\n")


def test_keys_come_from_a_file_and_from_the_environment(tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.write_text(f"# of the laptop\n{KEY}  # mine\n\n")
    keys.chmod(0o600)
    with slm_serve(model_directory(), "--key-file", keys, "--host", "0.0.0.0", SLM_API_KEYS=f"{OTHER_KEY},") as server:
        url = server.url.replace("0.0.0.0", "127.0.0.1")
        assert ask(url, "GET", "/health").status == 200
        for key, status in ((KEY, 200), (OTHER_KEY, 200), ("", 401), ("# of the laptop", 401), (f"{KEY}  # mine", 401)):
            assert complete(url, 1, key).status == status
        assert server.end() == (0, "")


def test_a_full_queue_is_429_at_once_and_nothing_that_was_taken_is_lost() -> None:
    with slm_serve(model_directory(), "--max-rows", "1", "--max-queue", "3", code=WITH_SLOW_STEPS) as server:
        streams = Streams(server, 1, 1500)
        server.process.send_signal(signal.SIGUSR1)
        waiting = [connect(server.url) for _ in range(3)]
        for connection in waiting:
            connection.sendall(request_bytes("POST", "/v1/completions", completion(5)))
        until(lambda: b'slm_waiting_rows{model="tiny"} 3.0' in ask(server.url, "GET", "/metrics").body)
        answer = complete(server.url)
        assert (answer.status, answer.error["type"], answer.headers["retry-after"]) == (429, "rate_limit_error", "1")
        assert b'slm_waiting_rows{model="tiny"} 3.0' in ask(server.url, "GET", "/metrics").body  # it did not wait
        server.process.send_signal(signal.SIGUSR2)
        assert [Answer(read_all(connection)).status for connection in waiting] == [200] * 3
        assert tokens_in(streams.ended()[0]) == 1500
        assert server.end() == (0, "")


def test_a_request_that_takes_too_long_gets_an_error_and_a_stream_an_error_line() -> None:
    with slm_serve(model_directory(), "--request-seconds", "0.2") as server:
        answer = complete(server.url, 2000)
        assert (answer.status, answer.error["code"]) == (504, "generation_failed")
        stream = complete(server.url, 2000, stream=True)
        assert "longer than 0.2 s" in last_error(stream)
        assert complete(server.url, 3).status == 200


# -- the end ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_under_load_finishes_what_runs_and_refuses_what_comes(number: int) -> None:
    with slm_serve(model_directory(), "--drain", "300", code=WITH_SLOW_STEPS) as server:
        streams = Streams(server, 30, 400)
        server.process.send_signal(signal.SIGUSR1)
        server.process.send_signal(number)
        until(lambda: health(server) == 503)
        answer = complete(server.url)
        assert (answer.status, answer.headers["retry-after"]) == (503, "1")
        assert answer.error["code"] == "service_unavailable"
        server.process.send_signal(signal.SIGUSR2)
        for answer in streams.ended():
            assert tokens_in(answer) == 400
        assert server.wait() == (0, "")
    with pytest.raises(ConnectionRefusedError):
        connect(server.url)


def test_what_does_not_finish_in_time_ends_with_an_error() -> None:
    with slm_serve(model_directory(), "--drain", "0.3", "--max-rows", "2", code=WITH_SLOW_STEPS) as server:
        streams = Streams(server, 20, 2000)
        server.process.send_signal(signal.SIGUSR1)
        assert server.end() == (0, "")
        for answer in streams.ended():
            assert "shut down" in last_error(answer)


def test_a_second_ctrl_c_ends_it_at_once() -> None:
    with slm_serve(model_directory(), "--drain", "600", "--max-rows", "1", code=WITH_SLOW_STEPS) as server:
        Streams(server, 3, 2000)
        server.process.send_signal(signal.SIGUSR1)
        server.process.send_signal(signal.SIGINT)
        until(lambda: health(server) == 503)
        assert server.end(signal.SIGINT)[0] == 130  # 0 if they were finished


def test_a_reader_that_has_stopped_does_not_hold_up_the_end() -> None:
    with slm_serve(model_directory()) as server:
        stalled = connect(server.url, receive_buffer=4096)
        stalled.sendall(request_bytes("POST", "/v1/completions", completion(2000, stream=True, n=4, logprobs=5)))
        stalled.recv(1)
        idle = connect(server.url)
        assert server.end()[0] == 0
        stalled.close()
        idle.close()


# -- faults, injected into the real process ---------------------------------------------------------------------------

# After SIGUSR1 FAULTS steps of every engine fail, one by default; after SIGUSR2 what the worker's thread does next.
WITH_FAULTS = f"""
import os, signal
from slmkit.generation.engine import Engine
from slmkit.serving.worker import Worker
step, send, left = Engine.step, Worker._send, {{"step": 0, "send": 0}}
def broken(name, function):
    def call(self):
        if left[name]:
            left[name] -= 1
            raise RuntimeError("injected")
        return function(self)
    return call
Engine.step, Worker._send = broken("step", step), broken("send", send)
def note(name):
    def handle(*_):
        left[name] += int(os.environ.get("FAULTS", 1))
    return handle
signal.signal(signal.SIGUSR1, note("step"))
signal.signal(signal.SIGUSR2, note("send"))
{SLM}
"""


def test_a_fault_in_a_step_fails_what_it_concerns_and_the_next_request_is_right() -> None:
    with slm_serve(model_directory(), code=WITH_FAULTS) as server:
        right = json.loads(complete(server.url, 20).body)["choices"]
        for _ in range(5):
            streams = Streams(server, 5, 2000)
            server.process.send_signal(signal.SIGUSR1)
            for answer in streams.ended():
                assert "the engine failed" in last_error(answer)
            assert health(server) == 200
            assert json.loads(complete(server.url, 20).body)["choices"] == right
        assert b'slm_engine_faults_total{model="tiny"} 5.0' in ask(server.url, "GET", "/metrics").body
        code, log = server.end()
        assert (code, log.count("RuntimeError: injected")) == (0, 5)


def test_faults_again_and_again_end_the_process() -> None:
    with slm_serve(model_directory(), code=WITH_FAULTS, FAULTS="3") as server:
        server.process.send_signal(signal.SIGUSR1)
        statuses = []
        while server.process.poll() is None:
            try:
                statuses.append(complete(server.url, 5).status)
            except (ConnectionError, json.JSONDecodeError, IndexError):
                break
        assert statuses[:2] == [500, 500]
        assert set(statuses[2:]) <= {500, 503, 0}
        assert server.wait()[0] == 1


def test_a_thread_that_dies_ends_what_is_open_and_the_process() -> None:
    with slm_serve(model_directory(), code=WITH_FAULTS) as server:
        streams = Streams(server, 10, 2000)
        server.process.send_signal(signal.SIGUSR2)
        for answer in streams.ended():
            assert "the server failed" in last_error(answer)
        code, log = server.wait()
        assert (code, "the engines' thread has ended" in log) == (1, True)


# -- the page ---------------------------------------------------------------------------------------------------------


def test_the_page_is_there_with_its_functions_and_reads_runs(tmp_path: Path) -> None:
    def call(name: str, **body: Any) -> Any:
        return json.loads(ask(server.url, "POST", f"/page/{name}", body).body)

    with slm_serve(model_directory(), "--ui", "--runs", tmp_path) as server:
        assert server.lines[-1] == f"the page: {server.url}/"
        assert b"<html" in ask(server.url, "GET", "/").body
        assert call("about")["models"]["tiny"]["context"] == 2048
        assert call("runs") == []
        look = call("look", model="tiny", text="The fox")
        assert len(look["likeliest"]) == len(look["ids"])
        assert call("attention", model="tiny", ids=look["ids"], layer=1, head=3)["weights"][0] == [10_000]
        assert len(call("lens", model="tiny", ids=look["ids"])["likeliest"]) == 2
        assert "did you mean 'tiny'" in call("look", model="tinny", text="x")["error"]["message"]
        assert "Unexpected keyword" in call("look", model="tiny", texd="x")["error"]["message"]
        assert complete(server.url).status == 200


def test_the_page_without_a_model_shows_runs(tmp_path: Path) -> None:
    with slm_serve("--runs", tmp_path, "--no-browser", command="ui") as server:
        assert server.lines[1].startswith("  none, ")
        assert json.loads(ask(server.url, "GET", "/v1/models").body)["data"] == []
        assert json.loads(ask(server.url, "POST", "/page/runs", {}).body) == []
        assert b"<html" in ask(server.url, "GET", "/").body
        assert server.end() == (0, "")


def test_models_that_share_weights_share_the_memory() -> None:
    from slmkit.adapt.load import load_model
    from slmkit.workflows.serve import share_equal_weights

    first, second = (load_model(model_directory())[0] for _ in range(2))
    changed = second.blocks[1].mlp.up.weight
    changed.data = changed.data + 1
    share_equal_weights([first, second])
    places = [{name: weight.data_ptr() for name, weight in each.named_parameters()} for each in (first, second)]
    assert [name for name in places[0] if places[0][name] != places[1][name]] == ["blocks.1.mlp.up.weight"]


def test_an_adapter_is_served_by_name_beside_its_base(tmp_path: Path) -> None:
    base = ServedModel.load("base", model_directory())
    config, decoder = SLMConfig.from_pretrained(model_directory()), cast(Decoder, base.decoder)
    settings = adapted(decoder, config)  # the base in memory has the adapter from here on
    save_adapter(decoder, config, settings, model_directory(), tmp_path / "fox")
    base.tokenizer.save_pretrained(tmp_path / "fox")
    fields: dict[str, Any] = {"max_tokens": 12, "temperature": 0}
    (expected,) = alone(base, Request(base.tokenizer.encode_prompt("The fox had"), 12, SamplingSettings(temperature=0)))
    with slm_serve(tmp_path / "fox", model_directory()) as server:
        listed = json.loads(ask(server.url, "GET", "/v1/models").body)["data"]
        assert [one["id"] for one in listed] == ["fox", "tiny"]
        texts = {}
        for name in ("fox", "tiny", "fox"):
            body = {"model": name, "prompt": "The fox had", "ignore_eos": True, **fields}
            texts[name] = json.loads(ask(server.url, "POST", "/v1/completions", body).body)["choices"][0]["text"]
        assert texts["fox"] == expected != texts["tiny"]


def test_memory_for_less_than_the_context_is_warned_of() -> None:
    with slm_serve(model_directory(), "--memory", "0.001") as server:
        assert complete(server.url, 5).status == 200
        refused = complete(server.url, 2000)
        assert (refused.status, "more than the allowed 1.0 MiB" in refused.error["message"]) == (400, True)
        code, errors = server.end()
    assert (code, errors.count("\n")) == (0, 1)
    assert "its whole context of 2,048 tokens 0.00195 GiB" in errors


def test_what_a_request_leaves_out_is_as_in_the_commands(tmp_path: Path) -> None:
    """One model, without advice and with some: `slm chat` and `/v1/chat/completions`, `slm generate` and the texts."""
    from slmkit.cli.show import open_model
    from slmkit.generation.sampling_settings import USUAL, USUAL_IN_CHAT

    shutil.copytree(model_directory(), tmp_path / "model")
    given: dict[str, Any] = {"seed": None, "temperature": None, "top_p": None}
    chat = SamplingSettings(temperature=0.6, top_p=0.95, min_p=0.05)
    text = SamplingSettings(temperature=0.8, top_p=0.95, min_p=0.05)
    for advice, expected in (
        ({"do_sample": True}, (chat, text)),
        ({"do_sample": True, "temperature": 0.3}, (SamplingSettings(temperature=0.3),) * 2),
        ({"do_sample": False}, (SamplingSettings(temperature=0),) * 2),
    ):
        (tmp_path / "model" / "generation_config.json").write_text(json.dumps(advice))
        served, folder = ServedModel.load("model", tmp_path / "model"), str(tmp_path / "model")
        assert tuple(open_model(folder, None, "cpu", usual, given)[2] for usual in (USUAL_IN_CHAT, USUAL)) == expected
        body: dict[str, Any] = {"model": "model", "max_tokens": 1}
        asked = json.dumps({**body, "messages": [{"role": "user", "content": "Hello"}]}).encode()
        (request,) = chat_requests(read(ChatRequest, asked), served, "")
        assert request.settings == expected[0]
        (request,) = completion_requests(
            read(CompletionRequest, json.dumps({**body, "prompt": "The"}).encode()), served, ""
        )
        assert request.settings == expected[1]


def test_the_newest_run_that_learned_to_chat_is_chosen_and_named(tmp_path: Path) -> None:
    from slmkit.workflows.serve import named_models, newest_chat_run

    assert newest_chat_run(tmp_path) == []
    for number, (name, objective) in enumerate((("old", "sft"), ("new", "sft"), ("text", "pretrain"), ("bare", "sft"))):
        run = tmp_path / name
        run.mkdir()
        (run / "recipe.yaml").write_text(f"objective: {objective}\n")
        (run / "metrics.jsonl").write_text("")
        if name != "bare":
            shutil.copytree(model_directory(), run / "checkpoints" / "step-1")
            (run / "best").symlink_to("checkpoints/step-1")
        os.utime(run, (number, number))
    assert newest_chat_run(tmp_path) == [str(tmp_path / "new")]
    assert [*named_models([str(tmp_path / "old"), f"b={tmp_path / 'new'}"])] == ["old", "b"]
    with slm_serve("--runs", tmp_path, "--no-browser", command="ui") as server:
        assert server.lines[0] == (
            f"{tmp_path / 'new'}: the newest run of {tmp_path} that learned to chat; for another: slm ui MODEL"
        )
