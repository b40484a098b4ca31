"""`/v1/completions`: every form of prompt, and log-probabilities as lm-eval reads them."""

from __future__ import annotations

import asyncio
import itertools
import json
from collections.abc import AsyncIterator
from typing import Any

import pytest

from slmkit.generation.engine import Event
from slmkit.serving.answers import Answer, _spelled
from slmkit.serving.models import ServedModel, completion_requests
from slmkit.serving.protocol import CompletionRequest, read
from tests.serving.servers import TEXT, Client, Script, direct_logprobs

PROMPTS = ["The fox asked", 'the owl said: "', "naïve café 😀", "a"]


def expect_scores(model: ServedModel, found: dict[str, Any], ids: list[int], top: int) -> None:
    """`found` is the legacy form of log-probabilities of all `ids`."""
    direct = direct_logprobs(model, ids)
    assert found["token_logprobs"][0] is None
    assert found["top_logprobs"][0] is None
    assert {len(values) for values in found.values()} == {len(ids)}
    for place, token in enumerate(ids[1:]):
        assert found["token_logprobs"][place + 1] == pytest.approx(float(direct[place, token]), abs=1e-4)
        best = found["top_logprobs"][place + 1]
        assert top <= len(best) <= top + 1
        expected = sorted(direct[place].topk(top).values.tolist())
        assert sorted(best.values())[-top:] == pytest.approx(expected, abs=1e-4)
        # lm-eval compares with ==.
        assert (found["token_logprobs"][place + 1] == max(best.values())) == bool(direct[place].argmax() == token)


@pytest.mark.parametrize("name", ["m1", "m2"])
@pytest.mark.parametrize("top", [1, 5, 20])
def test_echo_of_ids(client: Client, name: str, top: int, request: pytest.FixtureRequest) -> None:
    model = request.getfixturevalue(name)
    prompts = [model.tokenizer.encode(text) for text in (*PROMPTS[:3], TEXT[:150])]
    answer = client.completion(model=name, prompt=prompts, echo=True, logprobs=top, max_tokens=0).json
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2, 3]
    for choice, ids in zip(answer["choices"], prompts):
        expect_scores(model, choice["logprobs"], ids, top)
        assert choice["text"] == model.tokenizer.decode(ids)
        assert choice["finish_reason"] == "length"
    assert answer["usage"]["completion_tokens"] == 0
    assert answer["usage"]["prompt_tokens"] == sum(map(len, prompts))


def test_echo_with_new_tokens(client: Client, m1: ServedModel) -> None:
    ids = m1.tokenizer.encode(PROMPTS[0])
    fields = {"model": "m1", "prompt": ids, "echo": True, "logprobs": 5, "temperature": 0}
    for count in (1, 4):
        (choice,) = client.completion(**fields, max_tokens=count).json["choices"]
        new = client.completion(model="m1", prompt=ids, max_tokens=count, temperature=0, logprobs=0).json["choices"][0]
        assert choice["text"] == PROMPTS[0] + new["text"]
        tokens = choice["logprobs"]["tokens"][len(ids) :]
        assert tokens == new["logprobs"]["tokens"]
        names = {_spelled(m1.tokenizer, index)[0]: index for index in range(512)}
        said = [names[token] for token in tokens]
        expect_scores(m1, choice["logprobs"], [*ids, *said], 5)


def test_text_and_ids_say_the_same(client: Client, m1: ServedModel) -> None:
    """A text gets the tokenizer's own beginning, which its own ids have to bring along."""
    for text in PROMPTS:
        ids = m1.tokenizer.encode_prompt(text)
        for fields in (
            {"max_tokens": 6},
            {"max_tokens": 3, "echo": True},
            {"max_tokens": 2, "echo": True, "logprobs": 2},
        ):
            of_text = client.completion(model="m1", prompt=text, temperature=0, **fields)
            of_ids = client.completion(model="m1", prompt=ids, temperature=0, **fields)
            assert of_text.texts[0].startswith(text) == bool(fields.get("echo"))
            assert of_ids.texts[0].removeprefix(m1.tokenizer.decode(m1.tokenizer.beginning)) == of_text.texts[0]
            assert of_text.json["usage"]["prompt_tokens"] == len(ids)


def test_offsets_of_tokens(client: Client, m1: ServedModel) -> None:
    """In characters of the text, also where a token is part of one."""
    text = "A 😀 naïve 猫 fox"
    for stream in (False, True):
        answer = client.completion(model="m1", prompt=text, echo=True, logprobs=1, max_tokens=5, seed=1, stream=stream)
        (whole,) = answer.texts
        choices = [choice for event in (answer.events if stream else [answer.json]) for choice in event["choices"]]
        found = {name: list(itertools.chain.from_iterable(choice["logprobs"][name] for choice in choices))
                 for name in ("tokens", "text_offset")}  # fmt: skip
        begun = len(m1.tokenizer.beginning)
        assert found["text_offset"][:begun] == [0] * begun
        assert found["text_offset"] == sorted(found["text_offset"])
        for token, offset in list(zip(found["tokens"], found["text_offset"]))[begun:]:
            if not token.startswith("bytes:") and token not in m1.tokenizer.special_tokens:
                assert whole[offset : offset + len(token)] == token
        assert any(token.startswith("bytes:\\x") for token in found["tokens"])
        ids = m1.tokenizer.encode_prompt(text)
        spelled = [m1.tokenizer.token_bytes(token) for token in ids]
        complete = [len(b"".join(spelled[begun:place]).decode(errors="ignore")) for place in range(len(ids))]
        assert found["text_offset"][: len(ids)] == complete


def test_lists_of_prompts(client: Client) -> None:
    alone = [client.completion(model="m1", prompt=text, n=2, seed=4, max_tokens=6).texts for text in PROMPTS]
    for stream in (False, True):
        together = client.completion(model="m1", prompt=PROMPTS, n=2, seed=4, max_tokens=6, stream=stream)
        assert together.texts == list(itertools.chain.from_iterable(alone))


def test_no_new_tokens(client: Client) -> None:
    (choice,) = client.completion(model="m1", prompt="The fox", max_tokens=0).json["choices"]
    assert (choice["text"], choice["logprobs"], choice["finish_reason"]) == ("", None, "length")
    (choice,) = client.completion(model="m1", prompt="The fox", max_tokens=0, echo=True).json["choices"]
    assert (choice["text"], choice["logprobs"]) == ("The fox", None)
    (choice,) = client.completion(model="m1", prompt="The fox", max_tokens=0, logprobs=2).json["choices"]
    assert choice["logprobs"] == {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}


def test_echo_of_several_choices(client: Client, m1: ServedModel) -> None:
    """All have the scores of the prompt, which the engine computes once."""
    ids = m1.tokenizer.encode_prompt("The fox")
    direct = direct_logprobs(m1, ids)
    expected = [float(direct[place, token]) for place, token in enumerate(ids[1:])]
    fields = {"model": "m1", "prompt": ids, "echo": True, "logprobs": 1, "n": 3, "seed": 1, "max_tokens": 4}
    for choice in client.completion(**fields).json["choices"]:
        found = choice["logprobs"]["token_logprobs"]
        assert found[0] is None
        assert found[1 : len(ids)] == pytest.approx(expected, abs=1e-4)
        assert len(found) == len(ids) + 4
    assert client.completion(**fields, stream=True).error["param"] == "stream"


def test_scores_of_a_prompt_may_come_late(m1: ServedModel) -> None:
    """Another choice may have its first token before the one whose event has the scores."""

    class Job:
        async def __aiter__(self) -> AsyncIterator[Event]:
            yield Event(0, 1, 9, "b", "length", logprobs=[(9, -1.0)])
            yield Event(0, 0, 8, "a", "length", logprobs=[(8, -2.0)], prompt_logprobs=[[(7, -3.0)]])

    body = {"model": "m1", "prompt": [6, 7], "n": 2, "echo": True, "logprobs": 0, "max_tokens": 1}
    asked = read(CompletionRequest, json.dumps(body).encode())
    answer = Answer(m1, asked, completion_requests(asked, m1, ""))
    choices = json.loads(asyncio.run(answer.whole([Job()])))["choices"]
    assert [choice["logprobs"]["token_logprobs"] for choice in choices] == [[None, -3.0, -2.0], [None, -3.0, -1.0]]


def test_the_whole_context_is_scored(client: Client, m1: ServedModel) -> None:
    ids = (m1.tokenizer.encode(TEXT) * 9)[: m1.decoder.max_positions]
    answer = client.completion(model="m1", prompt=ids, echo=True, logprobs=1, max_tokens=0)
    expect_scores(m1, answer.json["choices"][0]["logprobs"], ids, 1)
    assert client.completion(model="m1", prompt=ids, echo=True, logprobs=1, max_tokens=1).error["code"] == (
        "context_length_exceeded"
    )


def test_stop_tokens_and_ends_that_are_ignored(client: Client, m3: Script) -> None:
    m3.say("a", "b", "c")
    (end,) = m3.ids("b")
    answer = client.completion(model="m3", prompt=[5], stop_token_ids=[end])
    assert answer.json["choices"][0]["finish_reason"] == "stop"
    assert (
        client.completion(model="m3", prompt=[5], ignore_eos=True, max_tokens=9).json["usage"]["completion_tokens"] == 9
    )
