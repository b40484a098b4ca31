"""What is accepted, what is refused and how, and that every answer is as the server's own description says."""

from __future__ import annotations

import http.client
import json
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis.errors import Unsatisfiable

from slmkit.serving.models import ServedModel
from slmkit.serving.protocol import REFUSED
from tests.long import several
from tests.serving.servers import Client, llama, serving
from tests.serving.test_chat import said

CHAT = {"model": "m1", "messages": [said("user", "Hello")], "max_tokens": 3}
TEXT = {"model": "m1", "prompt": "Hello", "max_tokens": 3}


def refused(client: Client, route: str, fields: dict[str, Any], param: str | None) -> str:
    """The message of the refusal of a request with these fields too."""
    body = {**(CHAT if route.startswith("chat") else TEXT), **fields}
    answer = client.post(route, body)
    assert answer.status == 400, answer.raw
    error = answer.error
    assert error["type"] == "invalid_request_error"
    assert error["param"] == param
    assert len(error["message"]) < 1000
    return str(error["message"])


@pytest.mark.parametrize("route", ["completions", "chat/completions"])
@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"n": 10**6}, "n"),
        ({"n": 0}, "n"),
        ({"n": -1}, "n"),
        ({"n": 1.5}, "n"),
        ({"n": True}, "n"),
        ({"n": "2"}, "n"),
        ({"n": 2, "best_of": 3}, "best_of"),
        ({"max_tokens": -1}, "max_tokens"),
        ({"max_tokens": 10**30}, "max_tokens"),
        ({"max_tokens": False}, "max_tokens"),
        ({"temperature": -0.1}, "temperature"),
        ({"temperature": "hot"}, "temperature"),
        ({"temperature": True}, "temperature"),
        ({"top_p": 1.5}, "top_p"),
        ({"top_k": -2}, "top_k"),
        ({"min_p": 2}, "min_p"),
        ({"repetition_penalty": 0}, "repetition_penalty"),
        ({"presence_penalty": 2.5}, "presence_penalty"),
        ({"frequency_penalty": -2.5}, "frequency_penalty"),
        ({"logit_bias": {"5": 101}}, "logit_bias"),
        ({"logit_bias": {"x": 1}}, "logit_bias"),
        ({"logit_bias": {"99999": 1}}, "logit_bias"),
        ({"logit_bias": {str(token): 1 for token in range(301)}}, "logit_bias"),
        ({"logit_bias": [5]}, "logit_bias"),
        ({"stop": 5}, "stop"),
        ({"stop": ["a", 5]}, "stop"),
        ({"stop": "x" * 2000}, "stop"),
        ({"stop": ["x"] * 65}, "stop"),
        ({"seed": -1}, "seed"),
        ({"seed": 2**63}, "seed"),
        ({"stream": "yes"}, "stream"),
        ({"stream_options": {"include_usage": 1}}, "stream_options"),
        ({"stream_options": []}, "stream_options"),
        ({"user": 5}, "user"),
        ({"model": 5}, "model"),
        ({"skip_special_tokens": False}, "skip_special_tokens"),
    ],
)
def test_values_out_of_bounds(client: Client, route: str, fields: dict[str, Any], param: str) -> None:
    assert refused(client, route, fields, param).startswith((param, "a stop string"))


@pytest.mark.parametrize(
    ("route", "fields", "param"),
    [
        ("completions", {"logprobs": 21}, "logprobs"),
        ("completions", {"logprobs": True}, "logprobs"),
        ("completions", {"prompt": []}, "prompt"),
        ("completions", {"prompt": [[]]}, "prompt"),
        ("completions", {"prompt": [[1], "a"]}, "prompt"),
        ("completions", {"prompt": [-1]}, "prompt"),
        ("completions", {"prompt": [10**20]}, "prompt"),
        ("completions", {"prompt": ["a"] * 129}, "prompt"),
        ("completions", {"prompt": ["a"] * 100, "n": 2}, "prompt"),
        ("completions", {"prompt": None}, "prompt"),
        ("chat/completions", {"top_logprobs": 21, "logprobs": True}, "top_logprobs"),
        ("chat/completions", {"logprobs": 5}, "logprobs"),
        ("chat/completions", {"messages": []}, "messages"),
        ("chat/completions", {"messages": "Hello"}, "messages"),
        ("chat/completions", {"messages": [said("bot", "Hello")]}, "messages"),
        ("chat/completions", {"messages": [{"content": "Hello"}]}, "messages"),
        ("chat/completions", {"messages": [said("user", 5)]}, "messages"),
        ("chat/completions", {"messages": [said("user", "a", tool_calls=[])]}, None),
        ("chat/completions", {"modalities": ["text", "audio"]}, "modalities"),
        ("chat/completions", {"chat_template_kwargs": {"messages": "x"}}, "chat_template_kwargs"),
    ],
)
def test_values_of_one_route(client: Client, route: str, fields: dict[str, Any], param: str | None) -> None:
    if param is None:
        assert client.post(route, {**CHAT, **fields}).status == 200
    else:
        refused(client, route, fields, param)


@pytest.mark.parametrize(
    ("name", "near"),
    [("temprature", "temperature"), ("max_token", "max_tokens"), ("topp", "top_p"), ("stop_sequences", "stop")],
)
def test_misspellings(client: Client, name: str, near: str) -> None:
    for route in ("completions", "chat/completions"):
        assert f"did you mean '{near}'" in refused(client, route, {name: 1}, name) or name == "stop_sequences"
    assert client.completion(**TEXT, **{name: None}).status == 200  # null is absent


def test_what_is_not_there_is_refused_by_name(client: Client) -> None:
    for name in REFUSED:
        message = refused(client, "chat/completions", {name: 1}, name)
        assert message.startswith(f"{name} is not supported")
        assert client.post("chat/completions", {**CHAT, name: None}).status == 200


def test_what_changes_nothing_is_accepted(client: Client) -> None:
    fields: dict[str, Any] = {
        "user": "u", "metadata": {"a": "b"}, "store": True, "service_tier": "auto", "safety_identifier": "s",
        "prompt_cache_key": "k", "best_of": 1, "top_k": -1, "skip_special_tokens": True, "stream": None, "stop": None,
        "logit_bias": {}, "stream_options": None, "seed": 5,
    }  # fmt: skip
    assert client.completion(**TEXT, **fields).texts == client.completion(**TEXT, seed=5).texts
    fields |= {
        "parallel_tool_calls": True,
        "modalities": ["text"],
        "tools": [],
        "tool_choice": "none",
        "prediction": {},
    }
    fields |= {"response_format": {"type": "text"}, "add_generation_prompt": True, "continue_final_message": False}
    assert (
        client.post("chat/completions", {**CHAT, **fields}).texts
        == client.post("chat/completions", {**CHAT, "seed": 5}).texts
    )


def test_sampling_reaches_the_model(client: Client, m1: ServedModel) -> None:
    """Each setting changes what is said, as in the engine alone."""
    from slmkit.generation.engine import Request
    from slmkit.generation.sampling_settings import SamplingSettings
    from slmkit.generation.text import end_tokens
    from tests.serving.servers import alone

    settings: list[dict[str, Any]] = [
        {}, {"temperature": 0.3}, {"top_k": 3}, {"top_p": 0.4}, {"min_p": 0.5}, {"typical_p": 0.3},
        {"repetition_penalty": 1.9}, {"presence_penalty": 0.9}, {"frequency_penalty": 2.0}, {"logit_bias": {"40": 9.0}},
    ]  # fmt: skip
    texts = set()
    for fields in settings:
        asked = SamplingSettings(seed=11, **{**fields, "logit_bias": {40: 9.0} if "logit_bias" in fields else {}})
        request = Request(m1.tokenizer.encode_prompt("The"), 60, asked, end_tokens(m1.tokenizer))
        found = client.completion(model="m1", prompt="The", max_tokens=60, seed=11, **fields).texts
        assert found == alone(m1, request)
        texts.add(found[0])
    assert len(texts) == len(settings)


def test_the_models_advice(m1: ServedModel) -> None:
    """Where a request says nothing, the model's own settings count."""
    from slmkit.generation.sampling_settings import SamplingSettings

    advice = SamplingSettings(temperature=0.0)
    advised = ServedModel("a", m1.decoder, m1.tokenizer, advice, advice, max_new_tokens=4)
    with serving(advised) as client:
        greedy = client.completion(model="a", prompt="The fox", max_tokens=20)
        assert greedy.texts == client.completion(model="a", prompt="The fox", max_tokens=20, temperature=0).texts
        assert (
            greedy.texts != client.completion(model="a", prompt="The fox", max_tokens=20, temperature=1, seed=1).texts
        )
        assert client.chat(model="a", ignore_eos=True).json["usage"]["completion_tokens"] == 4
        assert client.completion(model="a", prompt="The", ignore_eos=True).json["usage"]["completion_tokens"] == 16


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b'"text"',
        b"\xff\xfe",
        b'{"model": "m1", "prompt": "\\ud800"}',
        b'{"model": "m1", "prompt": "a", "temperature": NaN}',
        b'{"model": "m1", "prompt": "a", "temperature": Infinity}',
        b'{"model": "m1", "prompt": "a", "temperature": 1e309}',
        b'{"model": "m1", "prompt": "a", "temperature": -1e309}',
        b'{"model": "m1", "prompt": "a", "max_tokens": ' + b"9" * 5000 + b"}",
        b'{"model": "m1", "prompt": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
        b'{"model": "m1", "prompt": "a", "metadata": ' + b'{"a":' * 5000 + b"1" + b"}" * 5001,
        b'{"model": "m1", "prompt": [' + b"true," * 100_000 + b"1]}",
        b'{"model": "m1", "prompt": "a", "stop": [' + b"1," * 100_000 + b"1]}",
        b'{"model": "m1", "prompt": "a", ' + b",".join(b'"x%d": 1' % number for number in range(50_000)) + b"}",
        b'{"model": "' + b"m" * 500_000 + b'", "prompt": "a"}',
    ],
)
def test_bodies_that_are_no_requests(client: Client, body: bytes) -> None:
    answer = client.send("POST", "/v1/completions", body)
    assert answer.status in (400, 404)
    assert len(answer.raw) < 2000
    assert answer.error["type"] == "invalid_request_error"


def test_routes_that_are_not_there(client: Client) -> None:
    for method, path, status in (
        ("GET", "/nothing", 404),
        ("POST", "/v1/nothing", 404),
        ("GET", "/v1/chat/completions", 405),
        ("DELETE", "/v1/models/m1", 405),
        ("PUT", "/v1/completions", 405),
        ("GET", "/v1/models/none", 404),
        ("GET", "/v1/models/..%2f..%2fetc%2fpasswd", 404),
        ("GET", "/docs", 404),
        ("GET", "/redoc", 404),
    ):
        answer = client.send(method, path)
        assert answer.status == status
        assert answer.error["type"] == "invalid_request_error"
        if status == 405:
            assert answer.headers["allow"]


def test_an_error_of_our_own_says_nothing(client: Client, m1: ServedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> Any:
        raise RuntimeError("secret")

    monkeypatch.setattr(type(m1), "text_ids", fail)
    answer = client.completion(**TEXT)
    assert answer.status == 500
    assert answer.error["type"] == "server_error"
    assert b"secret" not in answer.raw


def test_health_and_metrics(client: Client) -> None:
    assert client.get("/health").json == {"status": "ok"}
    assert b"slm_generated_tokens_total" in client.get("/metrics").raw
    assert {entry["id"] for entry in client.get("/v1/models").json["data"]} == {"m1", "m2", "m3"}


def test_one_connection_for_many_requests(client: Client) -> None:
    connection: http.client.HTTPConnection = client.connect()
    for fields in ({}, {"stream": True}, {"n": 0}, {"stream": True, "n": 2}, {}):
        connection.request("POST", "/v1/completions", json.dumps({**TEXT, **fields}).encode())
        response = connection.getresponse()
        assert response.status == (400 if fields.get("n") == 0 else 200)
        response.read()
    connection.close()


@pytest.mark.parametrize("mode", ["positive", "negative"])
def test_the_servers_own_description(mode: str) -> None:
    """schemathesis makes requests of the OpenAPI document, valid and not, and holds the answers against it."""
    schemathesis = pytest.importorskip("schemathesis")
    with serving(llama(context=64)) as client:
        check_description(client, schemathesis, mode)


def check_description(client: Client, schemathesis: Any, mode: str) -> None:
    schema = schemathesis.openapi.from_url(f"{client.url}/openapi.json")
    # A request that the document allows may be refused: its model is not there, or its text is too long.
    schema.config.checks.positive_data_acceptance.enabled = False
    tried = set()
    for result in schema.get_all_operations():
        operation = result.ok()
        case = operation.as_strategy(generation_mode=schemathesis.GenerationMode(mode))

        @settings(
            max_examples=several(15, 40), deadline=None, database=None, derandomize=True,
            suppress_health_check=list(HealthCheck),
            phases=[Phase.generate],
        )  # fmt: skip
        @given(case=case)
        def check(case: Any) -> None:
            case.call_and_validate(timeout=30)
            tried.add((case.path, case.method))

        try:
            check()
        except Unsatisfiable:  # a GET has no wrong requests
            assert operation.method == "get"
    assert {("/v1/chat/completions", "POST"), ("/v1/completions", "POST"), ("/v1/embeddings", "POST")} <= tried
