"""`--engine vllm` and `--engine llamacpp` with real children: a command `vllm` that is `slm serve` behind vLLM's names
of options, and llama.cpp itself.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import stat
import sys
from pathlib import Path

import psutil
import pytest

from slmkit import SLMTokenizer
from slmkit.export.gguf import write_gguf
from tests.cli.helpers import refused
from tests.serving.processes import (
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


# -- llama.cpp --------------------------------------------------------------------------------------------------------


def chat(url: str, tokens: int, key: str = "") -> Answer:
    messages = [{"role": "user", "content": "The fox had"}]
    body = {"model": "tiny", "messages": messages, "max_tokens": tokens, "temperature": 0}
    return ask(url, "POST", "/v1/chat/completions", body, authorization=f"Bearer {key}" if key else "")


@pytest.fixture(scope="module")
def with_ends(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small model, with its turn's end among the ends of a text."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    shutil.copytree(model_directory(), folder)
    ends = sorted(SLMTokenizer.from_pretrained(folder).stop_token_ids)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": ends}))
    return folder


@pytest.fixture(scope="module")
def model_file(with_ends: Path) -> Path:
    path = with_ends.with_name("as-file.gguf")
    write_gguf(with_ends, path, "F32")
    return path


def test_llama_cpp_gives_the_same_text_behind_the_same_doors(with_ends: Path) -> None:
    with slm_serve(with_ends) as server:  # what the own engine says
        own = complete(server.url, 20), chat(server.url, 20)
        server.end()
    keys = {"SLM_API_KEYS": f"{KEY},{OTHER_KEY}"}
    with slm_serve(f"tiny={with_ends}", "--engine", "llamacpp", **keys) as server:
        assert "llamacpp" in server.lines[1]
        server.errors.seek(0)
        assert "writing a GGUF of F32" in server.errors.read()
        assert not [word for word in child_of(server).cmdline() if KEY in word]
        through = complete(server.url, 20, KEY), chat(server.url, 20, KEY)
        assert [answer.status for answer in through] == [200, 200]
        texts = [json.loads(answer.body)["choices"][0] for answer in (*own, *through)]
        # Its KV cache has 16 bits, so that near ties end the equality.
        assert texts[0]["text"][:4] == texts[2]["text"][:4]
        assert texts[1]["message"]["content"][:4] == texts[3]["message"]["content"][:4]
        stream = complete(server.url, 20, KEY, stream=True)
        assert stream.headers["content-type"].startswith("text/event-stream")
        assert stream.body.endswith(b"data: [DONE]\n\n")
        # The doors are the same, and only through them the child is reached.
        assert complete(server.url, 5).status == 401
        port = child_of(server).net_connections("tcp")[0].laddr.port
        assert complete(f"http://127.0.0.1:{port}", 5, KEY).status == 401
        bearer = {"authorization": f"Bearer {KEY}"}
        listed = json.loads(ask(server.url, "GET", "/v1/models", **bearer).body)["data"]
        assert [one["id"] for one in listed] == ["tiny"]
        assert complete(server.url, 5, KEY, model="other").error["code"] == "model_not_found"
        for field, value in (("n_discard", -1), ("stop_token_ids", [3]), ("grammar", "root ::= x"), ("id_slot", 7)):
            assert complete(server.url, 5, KEY, **{field: value}).error["param"] == field
        long = complete(server.url, 5, KEY, prompt="a b " * 4000)  # the child's own refusal, in our envelope
        assert long.status == 400
        assert long.error.keys() == {"message", "type", "param", "code"}
        assert long.error["code"] == "exceed_context_size_error"


def test_llama_cpp_serves_a_file_and_ends_with_the_server(model_file: Path) -> None:
    client = pytest.importorskip("openai")
    with slm_serve(model_file, "--engine", "llamacpp") as server:
        api = client.OpenAI(base_url=f"{server.url}/v1", api_key="none")
        said = api.chat.completions.create(
            model="as-file", messages=[{"role": "user", "content": "Hi"}], max_tokens=5, temperature=0
        )
        assert said.usage.completion_tokens == 5
        children = psutil.Process(server.process.pid).children(recursive=True)  # type: ignore[attr-defined]
        server.end(signal.SIGKILL)
        psutil.wait_procs(children, 60)
        assert not [child for child in children if child.is_running() and child.status() != psutil.STATUS_ZOMBIE]


def test_llama_cpp_drains_and_its_death_is_a_failure(model_file: Path) -> None:
    with slm_serve(f"tiny={model_file}", "--engine", "llamacpp", "--drain", "60") as server:
        stream = connect(server.url)
        stream.sendall(request_bytes("POST", "/v1/completions", completion(1000, stream=True)))
        first = stream.recv(1)
        server.process.send_signal(signal.SIGTERM)
        until(lambda: ask(server.url, "GET", "/health").status == 503)
        assert (first + read_all(stream)).endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n")
        assert server.wait(60)[0] == 0
    with slm_serve(f"tiny={model_file}", "--engine", "llamacpp") as server:
        child_of(server).kill()
        assert server.wait(60)[0] == 1


def test_a_file_that_llama_cpp_refuses_is_one_line(model_file: Path, tmp_path: Path) -> None:
    wrong, cut, other = (tmp_path / f"{name}.gguf" for name in ("wrong", "cut", "other"))
    wrong.write_bytes(model_file.read_bytes().replace(b"gpt-2", b"gpt-x"))
    cut.write_bytes(model_file.read_bytes()[:-20_000])
    other.write_text("no model")
    with (
        pytest.raises(AssertionError, match="llamacpp ended with code 1 while it loaded wrong"),
        slm_serve(wrong, "--engine", "llamacpp"),
    ):
        pass
    assert "not a readable GGUF" in refused("serve", cut, "--engine", "llamacpp")
    assert "not a readable GGUF" in refused("serve", other, "--engine", "llamacpp")
    assert "leave it out with --engine llamacpp" in refused("serve", model_file, "--engine", "llamacpp", "--ui")
    assert "no config.json in it" in refused("serve", model_file)
