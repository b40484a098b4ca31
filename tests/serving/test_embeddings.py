"""`/v1/embeddings`."""

from __future__ import annotations

import base64

import numpy as np
import pytest
import torch

from slmkit.serving.models import ServedModel
from tests.serving.servers import TEXT, Client


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
        ({"input": ["a"] * 200}, "input"),
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
