"""Clients as they are: OpenAI's package, lm-eval, curl, and what a chat front end sends."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any, Literal

import numpy as np
import openai
import pydantic
import pytest

from slmkit.serving.doors import Limits
from slmkit.serving.models import ServedModel
from tests.serving.servers import TEXT, Client, Script, direct_logprobs, llama, serving
from tests.serving.test_chat import CALL, WEATHER, said

Messages = Any  # of the package's own types


@pytest.fixture
def api(client: Client) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{client.url}/v1", api_key="none", max_retries=0)


def test_chat(api: openai.OpenAI) -> None:
    fields: Messages = {"model": "m1", "messages": [said("user", "Hello")], "max_tokens": 12, "seed": 1}
    whole = api.chat.completions.create(**fields, extra_body={"top_k": 40, "repetition_penalty": 1.1})
    assert whole.choices[0].message.role == "assistant"
    assert whole.usage is not None
    assert whole.usage.total_tokens == whole.usage.prompt_tokens + whole.usage.completion_tokens
    stream = api.chat.completions.create(
        **fields,
        extra_body={"top_k": 40, "repetition_penalty": 1.1},
        stream=True,
        stream_options={"include_usage": True},
    )
    *chunks, last = stream
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == whole.choices[0].message.content
    assert last.usage is not None
    assert last.usage.completion_tokens == whole.usage.completion_tokens
    assert last.usage.prompt_tokens_details is not None
    assert last.usage.prompt_tokens_details.cached_tokens is not None
    copied = [said("user", "Hello"), whole.choices[0].message, said("user", "And then?")]
    assert api.chat.completions.create(model="m1", messages=copied, max_tokens=3).choices  # type: ignore[arg-type]
    told = [said("user", "Hello"), whole.choices[0].message.model_dump(), said("user", "And then?")]
    assert api.chat.completions.create(model="m1", messages=told, max_tokens=3).choices  # type: ignore[arg-type]


def test_completions(api: openai.OpenAI) -> None:
    whole = api.completions.create(
        model="m1", prompt=["The fox", "The owl"], max_tokens=6, seed=1, logprobs=2, echo=True
    )
    assert [choice.index for choice in whole.choices] == [0, 1]
    logprobs = whole.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.tokens is not None
    assert len(logprobs.tokens) == len(logprobs.token_logprobs or [])
    pieces = ["", ""]
    for chunk in api.completions.create(
        model="m1", prompt=["The fox", "The owl"], max_tokens=6, seed=1, echo=True, stream=True
    ):
        pieces[chunk.choices[0].index] += chunk.choices[0].text
    assert pieces == [choice.text for choice in whole.choices]


def test_models(api: openai.OpenAI, m1: ServedModel) -> None:
    assert [model.id for model in api.models.list()] == ["m1", "m2", "m3"]
    found = api.models.retrieve("m1")
    assert (found.id, found.object, found.created) == ("m1", "model", m1.created)


def test_embeddings(api: openai.OpenAI) -> None:
    """The package asks for base64, and decodes it."""
    asked = api.embeddings.create(model="m1", input=["The fox", "A much longer text about the owl and the river"])
    floats = api.embeddings.create(model="m1", input="The fox", encoding_format="float")
    assert len(asked.data) == 2
    assert np.float32(asked.data[0].embedding).tolist() == floats.data[0].embedding
    assert asked.usage.prompt_tokens > floats.usage.prompt_tokens


def test_errors(api: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match="no model 'm4'") as missing:
        api.chat.completions.create(model="m4", messages=[{"role": "user", "content": "?"}])
    assert missing.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as long:
        api.completions.create(model="m1", prompt=[5] * 5000)
    assert long.value.code == "context_length_exceeded"
    with pytest.raises(openai.BadRequestError, match="did you mean 'temperature'") as unknown:
        api.completions.create(model="m1", prompt="a", extra_body={"temprature": 1})
    assert unknown.value.param == "temprature"
    with pytest.raises(openai.NotFoundError):
        api.models.retrieve("m4")
    with pytest.raises(openai.NotFoundError):
        api.images.generate(prompt="a fox")


def test_keys() -> None:
    with serving(llama(), limits=Limits(keys=["right"])) as client:
        api = openai.OpenAI(base_url=f"{client.url}/v1", api_key="wrong", max_retries=0)
        with pytest.raises(openai.AuthenticationError):
            api.models.list()
        assert api.with_options(api_key="right").completions.create(model="m1", prompt="a", max_tokens=2).choices


def test_errors_in_a_stream(m3: Script) -> None:
    script = Script()
    with serving(script.served) as client:
        script.say("a", "b", "c")
        logits = script.decoder.logits
        script.decoder.logits = lambda hidden: logits(hidden) * (np.nan if float(hidden.max()) >= 2 else 1.0)  # type: ignore
        api = openai.OpenAI(base_url=f"{client.url}/v1", api_key="none", max_retries=0)
        pieces = []
        with pytest.raises(openai.APIError):  # noqa: PT012
            for chunk in api.completions.create(model="m3", prompt=[5], stream=True):
                pieces.append(chunk.choices[0].text)
        assert pieces == ["a", "b"]


def test_tools(api: openai.OpenAI, m3: Script) -> None:
    fields: Messages = {"model": "m3", "messages": [said("user", "?")], "tools": [WEATHER]}
    m3.say(CALL, prompt=m3.chat_length(fields))
    (call,) = api.chat.completions.create(**fields).choices[0].message.tool_calls or []
    assert call.type == "function"
    assert json.loads(call.function.arguments) == {"place": "Oslo", "days": 2}
    with api.chat.completions.stream(**fields) as stream:  # puts the deltas together
        (streamed,) = stream.get_final_completion().choices[0].message.tool_calls or []
    assert streamed.function.arguments == call.function.arguments
    asked = api.chat.completions.create(**fields)
    result = said("tool", "rain", tool_call_id=call.id)
    messages = [said("user", "?"), asked.choices[0].message, result]
    assert api.chat.completions.create(**fields | {"messages": messages}, max_tokens=3).choices


class Animal(pydantic.BaseModel):
    kind: Literal["fox", "owl"]
    legs: int


def test_structured_output(api: openai.OpenAI) -> None:
    parsed = api.chat.completions.parse(
        model="m1", messages=[{"role": "user", "content": "An animal"}], response_format=Animal, max_tokens=200
    )
    animal = parsed.choices[0].message.parsed
    assert isinstance(animal, Animal)


# -- lm-eval ----------------------------------------------------------------------------------------------------------

ENDINGS = [
    ("The fox asked the owl", [" for wind.", " to be a river.", " and the kite.", " on the hill"], 0),
    ("They waited near the river", [" until the evening.", " said: 7", " a kite", " owl owl owl"], 0),
    ("naïve café", [" Öl", " 😀 naïve", "猫が座った", " один два"], 2),
    ("Once upon a time", [" there was a fox", " the the", "", " kite"], 0),
    ("A", [" b c d", " fox", " mill over the hill", " ?"], 1),
]


def what_it_says(model: ServedModel) -> tuple[str, list[str], int]:
    """A context that the model continues greedily by the first of the endings."""
    for word in TEXT.split():
        ids = model.tokenizer.encode(word)
        token = int(direct_logprobs(model, [*ids, 0])[-1].argmax())
        if model.tokenizer.encode(word + model.tokenizer.decode(token)) == [*ids, token]:
            return word, [model.tokenizer.decode(token), " fox"], 0
    raise AssertionError("no such word")


@pytest.mark.parametrize("batch_size", [1, 16])
def test_lm_eval(
    client: Client, m1: ServedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, batch_size: int
) -> None:
    """Each log-likelihood, and whether it was the likeliest, as from the model itself."""
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    evaluator = pytest.importorskip("lm_eval.evaluator")
    from lm_eval.tasks import TaskManager

    # What takes most of its time: the list of its own tasks, and the versions of all that is installed.
    monkeypatch.setattr(evaluator, "add_env_info", lambda results: None)
    m1.tokenizer.save_pretrained(tmp_path / "tokenizer")
    items = [*ENDINGS, what_it_says(m1)]
    rows = [{"context": context, "endings": endings, "label": label} for context, endings, label in items]
    (tmp_path / "items.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    task = {
        "task": "endings",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(tmp_path / "items.jsonl")}, "cache_dir": str(tmp_path / "cache")},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{context}}",
        "doc_to_choice": "endings",
        "doc_to_target": "label",
        "target_delimiter": "",
        "metric_list": [{"metric": "acc"}],
    }
    found = evaluator.simple_evaluate(
        model="local-completions",
        model_args={
            "model": "m1",
            "base_url": f"{client.url}/v1/completions",
            "tokenizer": str(tmp_path / "tokenizer"),
            "tokenizer_backend": "huggingface",
            "max_length": 1024,
        },
        batch_size=batch_size,
        tasks=[task],
        task_manager=TaskManager(include_defaults=False),
        log_samples=True,
        bootstrap_iters=0,
    )
    samples = found["samples"]["endings"]
    assert len(samples) == len(items)
    is_right, is_greedy = [], set()
    for sample in samples:
        context, endings, label = items[sample["doc_id"]]
        scores = []
        for ending, (response,) in zip(endings, sample["resps"]):
            ids, begun = m1.tokenizer.encode(context + ending), len(m1.tokenizer.encode(context))
            direct = direct_logprobs(m1, ids)[begun - 1 :]
            of_tokens = [float(row[token]) for row, token in zip(direct, ids[begun:])]
            greedy = all(int(row.argmax()) == token for row, token in zip(direct, ids[begun:]))
            assert float(response[0]) == pytest.approx(sum(of_tokens), abs=1e-4)
            assert str(response[1]) == str(greedy)
            is_greedy.add(greedy)
            scores.append(sum(of_tokens))
        is_right.append(int(np.argmax(scores)) == label)
    assert is_greedy == {True, False}
    assert found["results"]["endings"]["acc,none"] == pytest.approx(np.mean(is_right))


# -- others -----------------------------------------------------------------------------------------------------------


def test_curl(client: Client) -> None:
    def curl(path: str, *options: str) -> str:
        return subprocess.run(
            ["curl", "-sS", "-N", f"{client.url}{path}", *options],
            capture_output=True,
            text=True,
            check=True,
            timeout=60,
        ).stdout

    body = '{"model": "m1", "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 5, "seed": 1'
    whole = json.loads(curl("/v1/chat/completions", "-H", "Content-Type: application/json", "-d", body + "}"))
    streamed = curl("/v1/chat/completions", "-d", body + ', "stream": true}')  # as a form, which curl says by itself
    events = [line.removeprefix("data: ") for line in streamed.splitlines() if line]
    assert events.pop() == "[DONE]"
    text = "".join(json.loads(event)["choices"][0]["delta"].get("content", "") for event in events)
    assert text == whole["choices"][0]["message"]["content"]
    assert json.loads(curl("/health")) == {"status": "ok"}
    assert curl("/health", "--head").startswith("HTTP/1.1 200")  # as load balancers ask
    assert "slm_" in curl("/metrics")


def test_a_chat_front_end(client: Client) -> None:
    """Open WebUI: the list of models, a streamed chat with the user's settings, and what it asks in the background."""
    headers = {"Authorization": "Bearer none", "HTTP-Referer": "https://openwebui.com/", "X-Title": "Open WebUI"}
    listed = client.send("GET", "/v1/models", **headers).json
    assert [entry["id"] for entry in listed["data"]] == ["m1", "m2", "m3"]
    system = said("system", "You talk to a friend.")
    history = [
        system,
        said("user", "Hello"),
        said("assistant", "Hi!"),
        said("user", [{"type": "text", "text": "Go on"}]),
    ]
    chat = {
        "stream": True, "model": "m1", "messages": history, "stream_options": {"include_usage": True}, "max_tokens": 9,
        "temperature": 0.7, "top_p": 0.9, "frequency_penalty": 0.1, "presence_penalty": 0.1, "seed": 3, "stop": ["###"],
        "top_k": 40, "min_p": 0.0, "logit_bias": {"5": -100},
    }  # fmt: skip
    answer = client.send("POST", "/v1/chat/completions", chat, **headers)
    assert answer.texts[0]
    assert answer.events[-1]["usage"]["completion_tokens"] <= 9
    title = {"model": "m1", "messages": [said("user", "Name this chat")], "stream": False, "max_completion_tokens": 12}
    assert isinstance(client.send("POST", "/v1/chat/completions", title, **headers).texts[0], str)
    texts = {"input": ["one", "two"], "model": "m1"}
    assert len(client.send("POST", "/v1/embeddings", texts, **headers).json["data"]) == 2
