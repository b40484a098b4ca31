"""`/v1/embeddings`."""

from __future__ import annotations

import base64
import json
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from slmkit.serving.models import ServedModel
from slmkit.serving.protocol import EmbeddingRequest, read
from tests.serving.servers import TEXT, Client, serving
from tests.serving.test_batches import Slow, ask_and_leave, wait_for


def vectors(client: Client, **fields: object) -> list[np.ndarray]:
    data = client.post("embeddings", fields).json["data"]
    assert [entry["index"] for entry in data] == list(range(len(data)))
    assert {entry["object"] for entry in data} == {"embedding"}
    if fields.get("encoding_format") == "base64":
        return [np.frombuffer(base64.b64decode(entry["embedding"]), "<f4") for entry in data]
    return [np.array(entry["embedding"], np.float32) for entry in data]


@pytest.mark.parametrize("name", ["m1", "m2"])
def test_the_mean_of_hidden_states(client: Client, name: str, request: pytest.FixtureRequest) -> None:
    model: ServedModel = request.getfixturevalue(name)
    ids = (model.tokenizer.encode(TEXT) * 2)[:250]
    with torch.inference_mode():
        expected = model.decoder(torch.tensor([ids]))[0].mean(0).numpy()
    (found,) = vectors(client, model=name, input=ids)
    np.testing.assert_allclose(found, expected, atol=2e-5)


def test_forms_of_input_and_output(client: Client, m1: ServedModel) -> None:
    long = TEXT[:300]
    texts, ids = ["a", long], [m1.tokenizer.encode_prompt("a"), m1.tokenizer.encode_prompt(long)]
    together = vectors(client, model="m1", input=texts)
    for one, text, of_text in zip(ids, texts, together):
        for given in (text, [text], one, [one]):  # the lengths of others change nothing
            np.testing.assert_array_equal(vectors(client, model="m1", input=given)[0], of_text)
    np.testing.assert_array_equal(vectors(client, model="m1", input=ids), together)
    np.testing.assert_array_equal(vectors(client, model="m1", input=ids, encoding_format="base64"), together)
    np.testing.assert_array_equal(vectors(client, model="m1", input=ids[::-1], encoding_format="float"), together[::-1])
    usage = client.post("embeddings", {"model": "m1", "input": texts}).json["usage"]
    assert usage == {"prompt_tokens": len(ids[0]) + len(ids[1]), "total_tokens": len(ids[0]) + len(ids[1])}


def test_a_text_as_long_as_the_context(client: Client, m1: ServedModel) -> None:
    ids = (m1.tokenizer.encode(TEXT) * 9)[: m1.decoder.max_positions]
    assert len(vectors(client, model="m1", input=ids)[0]) == 64
    assert client.post("embeddings", {"model": "m1", "input": [*ids, 5]}).error["code"] == "context_length_exceeded"


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"input": "a", "encoding_format": "int8"}, "encoding_format"),
        ({"input": ""}, "input"),
        ({"input": ["a", ""]}, "input"),
        ({"input": []}, "input"),
        ({"input": [[]]}, "input"),
        ({"input": [1, "a"]}, "input"),
        ({"input": [True]}, "input"),
        ({"input": {"a": 1}}, "input"),
        ({}, "input"),
        ({"input": "a", "dimensions": 8}, "dimensions"),
        ({"input": ["a"] * 2049}, "input"),
        ({"input": [[5] * 1000] * 301}, "input"),  # tokens in all
        ({"input": "a", "inptu": "b"}, "inptu"),
    ],
)
def test_refusals(client: Client, fields: dict[str, object], param: str) -> None:
    answer = client.post("embeddings", {"model": "m1", **fields})
    assert answer.status == 400
    assert answer.error["param"] == param


def test_unknown_ids_are_refused(client: Client) -> None:
    answer = client.post("embeddings", {"model": "m1", "input": [5, 512]})
    assert answer.status == 400
    assert "512" in answer.error["message"]


def test_as_many_texts_as_openai_takes(client: Client, m1: ServedModel) -> None:
    assert len(read(EmbeddingRequest, json.dumps({"model": "m1", "input": ["a"] * 2048}).encode()).input) == 2048
    texts = [TEXT[number % 97 :][: 1 + number % 30] for number in range(200)]
    found = vectors(client, model="m1", input=texts, encoding_format="base64")
    for number in (0, 1, 50, 100, 199):
        np.testing.assert_array_equal(found[number], vectors(client, model="m1", input=texts[number])[0])


def test_embeddings_take_turns_with_generation() -> None:
    """45 clients ask for embeddings without end; a completion of one token waits for a few pieces, not for them."""
    model, is_done = Slow(0.01), threading.Event()

    def embed() -> None:
        while not is_done.is_set():
            assert client.post("embeddings", {"model": "slow", "input": [[5] * 1000]}).status in (200, 429)

    with serving(model.served) as client, ThreadPoolExecutor(45) as threads:
        others = [threads.submit(embed) for _ in range(45)]
        try:
            wait_for(lambda: len(client.worker._tasks) == 45)
            for _ in range(5):
                assert client.completion(model="slow", prompt="The", max_tokens=1, ignore_eos=True).status == 200
        finally:
            is_done.set()
        for other in others:
            other.result()
    inserted = [place for place, what in enumerate(model.order) if what == "insert"]
    assert len(inserted) == 5
    for place in inserted:  # its pass follows, after at most one piece of embeddings
        assert min(model.order[place + 1 : place + 3]) < 10, model.order[place - 3 : place + 10]


def test_a_client_that_leaves_ends_its_embeddings() -> None:
    model = Slow(0.05)
    with serving(model.served) as client:
        body = {"model": "slow", "input": [[5] * 1000] * 40}
        ask_and_leave(client, body, lambda connection: wait_for(lambda: model.read > 0), "embeddings")
        wait_for(lambda: not client.worker._tasks)
        tokens = model.read
        time.sleep(4 * model.seconds)
        assert model.read <= tokens + 256  # the piece that had begun


def test_embeddings_that_take_too_long_and_a_full_queue() -> None:
    model, long = Slow(0.05), [[5] * 1000] * 40
    with serving(model.served, request_seconds=4, max_queue=1) as client, ThreadPoolExecutor(2) as threads:
        late = [threads.submit(client.post, "embeddings", {"model": "slow", "input": long}) for _ in range(2)]
        wait_for(lambda: len(client.worker._tasks) == 2)
        assert client.post("embeddings", {"model": "slow", "input": "a"}).error["type"] == "rate_limit_error"
        assert [one.result().status for one in late] == [504, 504]
        client.worker.request_seconds = 600
        assert client.post("embeddings", {"model": "slow", "input": "a"}).status == 200
