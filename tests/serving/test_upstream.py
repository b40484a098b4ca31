"""`--engine vllm` with a real child: a command `vllm` that is `slm serve` behind vLLM's names of options."""

from __future__ import annotations

import json
import os
import signal
import stat
import sys
from pathlib import Path

import psutil
import pytest

from tests.cli.helpers import refused
from tests.serving.processes import (
    WITH_SLOW_STEPS,
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

pytestmark = pytest.mark.slow
KEY, OTHER_KEY = "a-key-of-many-characters", "another-key-of-many-characters"
# The options that vLLM's documentation lists, and its key from the environment.
VLLM = f"""#!{sys.executable}
import argparse, os, sys
parser = argparse.ArgumentParser("vllm")
parser.add_argument("command", choices=["serve"])
parser.add_argument("model")
for name in ("host", "port", "served-model-name", "gpu-memory-utilization"):
    parser.add_argument(f"--{{name}}", required=True)
asked = parser.parse_args()
if os.environ.get("VLLM_FAILS"):
    sys.exit(7)
os.environ["SLM_API_KEYS"] = os.environ.pop("VLLM_API_KEY")
model = f"{{asked.served_model_name}}={{asked.model}}"
sys.argv = ["slm", "serve", model, "--host", asked.host, "--port", asked.port, "--drain", "0"]
{WITH_SLOW_STEPS}
"""


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A PATH on which there is a `vllm`."""
    command = tmp_path_factory.mktemp("bin") / "vllm"
    command.write_text(VLLM)
    command.chmod(command.stat().st_mode | stat.S_IXUSR)
    return f"{command.parent}{os.pathsep}{os.environ['PATH']}"


def child_of(server: Server) -> psutil.Process:
    return psutil.Process(server.process.pid).children()[0]  # type: ignore[attr-defined]


def test_without_vllm_one_line_says_how(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "pip install vllm" in refused("serve", model_directory(), "--engine", "vllm")
    assert "leave it out with --engine vllm" in refused("serve", model_directory(), "--engine", "vllm", "--ui")


def test_a_child_that_ends_while_it_loads_is_one_line(path: str) -> None:
    with (
        pytest.raises(AssertionError, match="vllm ended with code 7 while it loaded tiny"),
        slm_serve(model_directory(), "--engine", "vllm", PATH=path, VLLM_FAILS="1"),
    ):
        pass


def test_requests_go_to_the_child_and_come_back_byte_for_byte(path: str) -> None:
    with slm_serve(model_directory()) as server:  # what the own engine says
        own = complete(server.url, 20), complete(server.url, 20, stream=True)
        server.end()
    keys = {"SLM_API_KEYS": f"{KEY},{OTHER_KEY}"}
    with slm_serve(f"tiny={model_directory()}", "--engine", "vllm", PATH=path, **keys) as server:
        assert "vllm" in server.lines[1]
        assert not [word for word in child_of(server).cmdline() if KEY in word]
        through = complete(server.url, 20, KEY), complete(server.url, 20, KEY, stream=True)
        assert [answer.status for answer in through] == [200, 200]
        assert [answer.headers["content-type"] for answer in own] == [
            answer.headers["content-type"] for answer in through
        ]
        assert json.loads(through[0].body)["choices"] == json.loads(own[0].body)["choices"]
        texts = [
            b"".join(line for line in answer.body.split(b"\n") if b"text" in line) for answer in (own[1], through[1])
        ]
        assert len(texts[0].split(b'"text"')) == len(texts[1].split(b'"text"'))
        assert through[1].body.endswith(b"data: [DONE]\n\n")
        # The doors are the same, and only through them the child is reached.
        assert complete(server.url, 5).status == 401
        port = child_of(server).net_connections("tcp")[0].laddr.port
        assert complete(f"http://127.0.0.1:{port}", 5, KEY).status == 401
        bearer = {"authorization": f"Bearer {KEY}"}
        assert [one["id"] for one in json.loads(ask(server.url, "GET", "/v1/models", **bearer).body)["data"]] == [
            "tiny"
        ]
        assert ask(server.url, "GET", "/v1/models/tiny", **bearer).status == 200
        assert ask(server.url, "GET", "/nosuch", **bearer).error["code"] == "not_found"
        assert ask(server.url, "POST", "/v1/completions", b"{", **bearer).status == 400
        assert complete(server.url, 5, KEY, model="other").error["code"] == "model_not_found"
        assert complete(server.url, 5, KEY, temperature=-1).status == 400  # the child's own refusal
        metrics = ask(server.url, "GET", "/metrics", **bearer).body.decode()
        assert 'slm_requests_total{model="tiny",route="/v1/completions",status="200"} 2.0' in metrics
        assert ask(server.url, "GET", "/health").status == 200


def test_the_child_ends_with_the_server_after_the_drain_and_a_client_that_leaves_ends_its_request(path: str) -> None:
    with slm_serve(f"tiny={model_directory()}", "--engine", "vllm", "--drain", "60", PATH=path) as server:
        child = child_of(server)
        stream = request_bytes("POST", "/v1/completions", completion(1000, stream=True))
        gone = connect(server.url)
        gone.sendall(stream)
        gone.recv(1)
        gone.close()
        stays = connect(server.url)
        stays.sendall(stream)
        first = stays.recv(1)
        child.send_signal(signal.SIGUSR1)
        server.process.send_signal(signal.SIGTERM)
        until(lambda: ask(server.url, "GET", "/health").status == 503)
        assert complete(server.url).status == 503
        child.send_signal(signal.SIGUSR2)
        assert (first + read_all(stays)).endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n")
        assert server.wait()[0] == 0
        assert not child.is_running()


def test_what_is_open_at_the_end_of_the_drain_gets_an_error(path: str) -> None:
    with slm_serve(f"tiny={model_directory()}", "--engine", "vllm", "--drain", "0.2", PATH=path) as server:
        child = child_of(server)
        stream = connect(server.url)
        stream.sendall(request_bytes("POST", "/v1/completions", completion(2000, stream=True)))
        first = stream.recv(1)
        child.send_signal(signal.SIGUSR1)
        assert server.end()[0] == 0
        assert b"the engine broke off" in first + read_all(stream)
        assert not child.is_running()


def test_a_child_that_dies_is_a_failure(path: str) -> None:
    with slm_serve(f"tiny={model_directory()}", "--engine", "vllm", PATH=path) as server:
        stream = connect(server.url)
        stream.sendall(request_bytes("POST", "/v1/completions", completion(2000, stream=True)))
        first = stream.recv(1)
        child_of(server).kill()
        assert b"the engine broke off" in first + read_all(stream)
        assert server.wait()[0] == 1


def test_a_killed_server_leaves_no_child_behind(path: str) -> None:
    with slm_serve(f"tiny={model_directory()}", "--engine", "vllm", PATH=path) as server:
        children = psutil.Process(server.process.pid).children(recursive=True)  # type: ignore[attr-defined]
        assert len(children) == 2  # and what watches it
        server.end(signal.SIGKILL)
        psutil.wait_procs(children, 120)
        assert not [child for child in children if child.is_running() and child.status() != psutil.STATUS_ZOMBIE]
