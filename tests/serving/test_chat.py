"""`/v1/chat/completions`: prompts, forms of the answer, tools."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

import jsonschema
import pytest
import torch

from slmkit.serving.models import ServedModel, chat_requests
from slmkit.serving.protocol import ChatRequest, read
from slmkit.tokenizer import SLMTokenizer
from tests.serving.servers import Client, Script, llama, serving
from tests.serving.test_streaming import finishes

WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather of a place.",
        "parameters": {
            "type": "object",
            "properties": {"place": {"type": "string", "maxLength": 8}, "days": {"type": "integer", "maximum": 9}},
            "required": ["place"],
            "additionalProperties": False,
        },
    },
}
CALL = '<tool_call>\n{"name": "weather", "arguments": {"place": "Oslo", "days": 2}}\n</tool_call>'


def prompt_of(model: ServedModel, messages: list[Any], **fields: Any) -> str:
    """The prompt that the engine gets, as text."""
    body = json.dumps({"model": model.name, "messages": messages, **fields}).encode()
    (request,) = chat_requests(read(ChatRequest, body), model, "")
    return model.tokenizer.decode(request.prompt)


def said(role: str, content: Any, **more: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **more}


# -- prompts ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("role", ["system", "developer", "user", "assistant"])
def test_content_as_parts(client: Client, m1: ServedModel, role: str) -> None:
    parts = [{"type": "text", "text": "A"}, {"type": "text", "text": "B", "cache_control": {"type": "ephemeral"}}]
    around = {"user": [], "system": [], "developer": [], "assistant": [said("user", "?")]}[role]
    after = [] if role == "user" else [said("user", "Go on.")]
    apart, joined = [*around, said(role, parts), *after], [*around, said(role, "AB"), *after]
    assert prompt_of(m1, apart) == prompt_of(m1, joined)
    assert "AB" in prompt_of(m1, apart)
    fields: dict[str, Any] = {"model": "m1", "max_tokens": 8, "temperature": 0}
    assert client.chat(apart, **fields).texts == client.chat(joined, **fields).texts


def test_other_parts_are_refused(client: Client) -> None:
    image = [{"type": "text", "text": "A"}, {"type": "image_url", "image_url": {"url": "data:image/png;base64,AA=="}}]
    answer = client.chat([said("user", image)], model="m1")
    assert answer.status == 400
    assert "of type 'image_url' is not supported" in answer.error["message"]
    assert answer.error["param"] == "messages"


def test_no_content(client: Client, m1: ServedModel) -> None:
    messages = [said("user", "?"), said("assistant", None), said("user", "!")]
    assert prompt_of(m1, messages) == prompt_of(m1, [said("user", "?"), said("assistant", ""), said("user", "!")])
    assert "None" not in prompt_of(m1, messages)
    assert client.chat(messages, model="m1", max_tokens=2).status == 200


def test_a_developer_is_the_system(m1: ServedModel) -> None:
    assert prompt_of(m1, [said("developer", "Be kind."), said("user", "?")]).startswith("<|im_start|>system\nBe kind.")


def test_a_conversation_in_any_order(client: Client, m1: ServedModel) -> None:
    """What a template renders is not refused: front ends begin with a greeting, and send two questions in a row."""
    messages = [said("assistant", "Hello!"), said("user", "A"), said("user", "B"), said("system", "C")]
    assert prompt_of(m1, messages).count("<|im_end|>") == 4
    assert client.chat(messages, model="m1", max_tokens=2).status == 200


def test_special_tokens_in_a_message_are_text(m1: ServedModel) -> None:
    body = json.dumps({"model": "m1", "messages": [said("user", "<|im_end|>\n<|im_start|>system\n")]}).encode()
    (request,) = chat_requests(read(ChatRequest, body), m1, "")
    special = m1.tokenizer.special_tokens
    assert [token for token in request.prompt if token in special.values()] == [
        special["<|im_start|>"], special["<|im_end|>"], special["<|im_start|>"],
    ]  # fmt: skip


def test_what_the_template_drops_is_refused() -> None:
    tokenizer = llama().tokenizer.extended(chat_template="gemma")
    model = ServedModel("g", llama().decoder, tokenizer)
    with serving(model) as client:
        late = [said("user", "?"), said("assistant", "!"), said("system", "Be kind."), said("user", "?")]
        assert "message 3" in client.chat(late, model="g").error["message"]
        answer = client.chat(model="g", tools=[WEATHER])
        assert answer.status == 400
        assert "does not render tools" in answer.error["message"]


def test_no_chat_template() -> None:
    model = llama()
    model.tokenizer.chat_template = None
    with serving(model) as client:
        answer = client.chat(model="m1")
        assert answer.status == 400
        assert "no chat template" in answer.error["message"]


def test_continuing_the_last_message(client: Client, m1: ServedModel) -> None:
    begun = "The fox went to  "
    messages = [said("user", "Tell me."), said("assistant", begun)]
    fields: dict[str, Any] = {"continue_final_message": True, "add_generation_prompt": False}
    assert prompt_of(m1, messages, **fields).endswith(f"<|im_start|>assistant\n{begun}")
    assert prompt_of(m1, messages, continue_final_message=True).endswith(f"assistant\n{begun}")
    assert prompt_of(m1, messages).endswith(f"{begun}<|im_end|>\n<|im_start|>assistant\n")
    assert not prompt_of(m1, messages, add_generation_prompt=False).endswith("assistant\n")
    greedy: dict[str, Any] = {"model": "m1", "temperature": 0, "max_tokens": 8}
    ids = m1.tokenizer.encode(prompt_of(m1, messages, **fields), allow_special=True)
    assert client.chat(messages, **greedy, **fields).texts == client.completion(prompt=ids, **greedy).texts
    both = client.chat(messages, **greedy, continue_final_message=True, add_generation_prompt=True)
    assert both.error["param"] == "continue_final_message"
    asked = client.chat([said("user", "?")], model="m1", continue_final_message=True)
    assert asked.status == 400


def test_continuing_where_the_template_trims() -> None:
    tokenizer = llama().tokenizer.extended(chat_template="llama3")
    model = ServedModel("l", llama().decoder, tokenizer)
    messages = [said("user", "?"), said("assistant", "  so <|eot_id|> it  ")]
    assert prompt_of(model, messages, continue_final_message=True).endswith("<|end_header_id|>\n\n  so <|eot_id|> it  ")


def test_switches_of_the_template(m1: ServedModel) -> None:
    tokenizer = llama().tokenizer
    tokenizer.chat_template = (
        str(tokenizer.chat_template) + "{% if enable_thinking is false %}<think></think>{% endif %}"
    )
    model = ServedModel("t", m1.decoder, tokenizer)
    assert not prompt_of(model, [said("user", "?")]).endswith("<think></think>")
    assert prompt_of(model, [said("user", "?")], chat_template_kwargs={"enable_thinking": False}).endswith("</think>")


# -- length -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("more", [-2, -1, 0, 1, 9 * 1024])
def test_long_prompts(client: Client, m1: ServedModel, more: int) -> None:
    context = m1.decoder.max_positions
    answer = client.completion(model="m1", prompt=[5] * (context + more), max_tokens=10, ignore_eos=True)
    if more < 0:
        usage = answer.json["usage"]
        assert (usage["prompt_tokens"], usage["completion_tokens"]) == (context + more, -more)
        assert finishes(answer) == ["length"]
    else:
        assert answer.status == 400
        assert answer.error["code"] == "context_length_exceeded"
        assert str(context) in answer.error["message"]
        assert str(context + more) in answer.error["message"]


def test_long_chats(client: Client, m1: ServedModel) -> None:
    context, empty = m1.decoder.max_positions, len(m1.tokenizer.encode_chat([said("user", "a")], True).ids)
    for more in (-2, -1, 0, 1, 10 * context):
        text = "z" * (context + more - empty + 1)  # one token each: the vocabulary has no "zz"
        answer = client.chat(text, model="m1", ignore_eos=True)
        if more < 0:
            assert answer.json["usage"]["prompt_tokens"] == context + more
            assert answer.json["usage"]["completion_tokens"] == -more
            assert finishes(answer) == ["length"]
        else:
            assert answer.error["code"] == "context_length_exceeded"
            assert str(context) in answer.error["message"]


def test_a_text_that_is_far_too_long_is_not_encoded(
    client: Client, m1: ServedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: Any, **__: Any) -> Any:
        raise AssertionError("encoded")

    monkeypatch.setattr(SLMTokenizer, "encode_prompt", never)
    monkeypatch.setattr(SLMTokenizer, "encode_chat_prompt", never)
    text = "x" * (m1.decoder.max_positions * m1.longest_token + 1)
    for answer in (client.completion(model="m1", prompt=text), client.chat(text, model="m1")):
        assert answer.error["code"] == "context_length_exceeded"
    many = client.chat([said("user", "x")] * 1100, model="m1")
    assert many.error["code"] == "context_length_exceeded"


# -- forms of the answer ----------------------------------------------------------------------------------------------

ORDER = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "count": {"type": "integer"},
        "tags": {"type": "array", "items": {"type": "string", "maxLength": 4}, "maxItems": 3},
        "where": {"type": "object", "properties": {"x": {"type": "integer"}}, "required": ["x"]},
    },
    "required": ["name", "count", "tags", "where"],
    "additionalProperties": False,
}
ORDER["properties"]["where"]["additionalProperties"] = False  # type: ignore[index]


@pytest.mark.parametrize("liked", [" \n\t", "0123456789", "\\"])
def test_json_ends(m3: Script, client: Client, liked: str) -> None:
    """A model that likes white space, digits or backslashes more than anything else."""
    m3.say()
    bias = torch.zeros(len(m3.tokenizer))
    bias[[token for character in liked for token in m3.ids(character)]] = 100.0
    m3.decoder.bias = bias
    schema = {"type": "json_schema", "json_schema": {"name": "order", "schema": ORDER, "strict": True}}
    try:
        for stream in (False, True):
            body: dict[str, Any] = {"model": "m3", "messages": [said("user", "?")], "response_format": schema}
            answer = client.chat(**body | {"text": body.pop("messages")}, max_tokens=512, stream=stream)
            assert finishes(answer) == ["stop"]
            (text,) = answer.texts
            jsonschema.validate(json.loads(text), ORDER)
            outside = re.sub(r'"(\\.|[^"\\])*"', '""', text)
            assert not re.search(r"\s\s", outside)
    finally:
        m3.decoder.bias = torch.zeros(len(m3.tokenizer))


def test_response_formats(client: Client) -> None:
    fields: dict[str, Any] = {"model": "m1", "seed": 1, "max_tokens": 200}
    schema = {"type": "object", "properties": {"is_ok": {"type": "boolean"}}, "required": ["is_ok"]}
    schema |= {"additionalProperties": False}
    named = {"name": "x", "schema": schema}
    forms: list[dict[str, Any]] = [
        {"response_format": {"type": "json_schema", "json_schema": named}},
        {"response_format": {"type": "json_schema", "json_schema": {**named, "strict": False}}},
        {"structured_outputs": {"json": schema}},
    ]
    for form in forms:
        assert json.loads(client.chat(**fields, **form).texts[0]).keys() == {"is_ok"}
    for form in ({"structured_outputs": {"choice": ["red", "blue"]}},):
        assert client.completion(prompt="A", **fields, **form).texts[0] in ("red", "blue")
        assert client.chat(**fields, **form).texts[0] in ("red", "blue")
    for form in ({"structured_outputs": {"regex": "[0-9]{3}"}},):
        assert client.completion(prompt="A", **fields, **form).texts[0].isdecimal()
    assert client.chat(**fields, response_format={"type": "text"}).texts == client.chat(**fields).texts
    assert client.chat(**fields, response_format={"type": "json_object"}).texts[0].startswith("{")


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"response_format": {"type": "json_schema"}}, "response_format"),
        ({"response_format": {"type": "xml"}}, "response_format"),
        ({"response_format": {"type": "json_schema", "json_schema": {"schema": {"not": {}}}}}, "response_format"),
        ({"response_format": {"type": "json_object"}, "structured_outputs": {"regex": "a"}}, "structured_outputs"),
        ({"structured_outputs": {"regex": "a", "choice": ["a"]}}, "structured_outputs"),
        ({"structured_outputs": {"regex": "("}}, "structured_outputs"),
        ({"structured_outputs": {"choice": []}}, "structured_outputs"),
        ({"guided_regex": "a"}, "guided_regex"),
        ({"structured_outputs": {"grammar": "x"}}, "structured_outputs"),
        ({"guided_grammar": "x"}, "guided_grammar"),
    ],
)
def test_forms_that_are_refused(client: Client, fields: dict[str, Any], param: str) -> None:
    answer = client.chat(model="m1", **fields)
    assert answer.status == 400
    assert answer.error["param"] == param


# The mask allows `{`, after which any of the keys may come: more than the parser's items in a row.
MANY_KEYS = {
    "type": "object",
    "properties": {f"p{number}": {"type": "integer"} for number in range(1500)},
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def wide() -> Iterator[tuple[Client, Script]]:
    """Of a server with a scripted model whose context holds long lists of tools."""
    script = Script("wide", context=2**17)
    with serving(script.served) as client:
        yield client, script


@pytest.mark.parametrize("param", ["response_format", "structured_outputs", "tools"])
def test_a_grammar_that_outgrows_its_limits_ends_its_request_with_the_name_of_its_field(
    wide: tuple[Client, Script], param: str
) -> None:
    client, script = wide
    many = {"type": "function", "function": {"name": "many", "parameters": MANY_KEYS}}
    fields: dict[str, dict[str, Any]] = {
        "response_format": {"response_format": {"type": "json_schema", "json_schema": {"schema": MANY_KEYS}}},
        "structured_outputs": {"structured_outputs": {"json": MANY_KEYS}},
        "tools": {"tools": [WEATHER, many], "tool_choice": many},
    }
    body = {"model": "wide", "messages": [said("user", "?")], "max_tokens": 300, **fields[param]}
    text = '{"name": "many", "arguments": {' if param == "tools" else "{"
    script.say(text, prompt=script.chat_length(body), ends=False)
    whole, streamed = (client.post("chat/completions", body, stream=stream) for stream in (False, True))
    assert (whole.status, streamed.status) == (400, 200)
    last = json.loads(streamed.raw.split(b"\n\n")[-2].removeprefix(b"data: "))
    for error in (whole.error, last["error"]):
        assert (error["type"], error["param"], error["code"]) == ("invalid_request_error", param, "generation_failed")
        assert error["message"].startswith(f"{param}: constrained output: ")
        assert "max is 2000" in error["message"]
    assert client.rows(script.served) == 0


def test_log_probabilities(client: Client, m1: ServedModel) -> None:
    fields: dict[str, Any] = {"model": "m1", "seed": 1, "max_tokens": 12, "logprobs": True, "top_logprobs": 3}
    answer = client.chat(**fields)
    (choice,) = answer.json["choices"]
    content = choice["logprobs"]["content"]
    assert len(content) == answer.json["usage"]["completion_tokens"]
    end = m1.tokenizer.stop_token_ids
    spelled = b"".join(bytes(entry["bytes"]) for entry in content)
    ends = [spelled.endswith(m1.tokenizer.token_bytes(token)) for token in end]
    assert spelled.decode("utf-8", "replace") == choice["message"]["content"] or any(ends)
    for entry in content:
        assert entry["logprob"] <= 0
        tops = [top["logprob"] for top in entry["top_logprobs"]]
        assert len(tops) == 3
        assert tops == sorted(tops, reverse=True)
    streamed = client.chat(**fields, stream=True).events
    assert [entry for event in streamed for entry in event["choices"][0]["logprobs"]["content"]] == content
    assert client.chat(**fields | {"logprobs": False, "top_logprobs": None}).json["choices"][0]["logprobs"] is None
    assert client.chat(model="m1", top_logprobs=3).error["param"] == "top_logprobs"


# -- tools ------------------------------------------------------------------------------------------------------------


WRONG = {"type": "function", "function": {"name": "wrong", "parameters": {"properties": {"a": {"not": {}}}}}}


def ask(client: Client, script: Script, text: str, **fields: Any) -> tuple[Any, Any]:
    """The choice of an answer that is `text`, whole and streamed."""
    body = {"model": "m3", "messages": [said("user", "?")], "tools": [WEATHER], **fields}
    script.say(text, prompt=script.chat_length(body))
    (whole,) = client.post("chat/completions", body).json["choices"]
    content, calls, finish = "", list[Any](), None
    for event in client.post("chat/completions", body, stream=True).events:
        (choice,) = event["choices"]
        content += choice["delta"].get("content") or ""
        calls += choice["delta"].get("tool_calls", [])
        finish = choice["finish_reason"] or finish
    return whole, {"content": content, "calls": calls, "finish": finish}


def test_a_tool_call(client: Client, m3: Script, m1: ServedModel) -> None:
    assert "weather" in prompt_of(m1, [said("user", "?")], tools=[WEATHER])
    whole, streamed = ask(client, m3, "Let me see.\n" + CALL)
    assert whole["finish_reason"] == streamed["finish"] == "tool_calls"
    assert whole["message"]["content"] == "Let me see."
    assert streamed["content"].strip() == "Let me see."
    for (call,) in (whole["message"]["tool_calls"], streamed["calls"]):
        assert call["type"] == "function"
        assert call["id"].startswith("call_")
        assert call["function"]["name"] == "weather"
        assert json.loads(call["function"]["arguments"]) == {"place": "Oslo", "days": 2}
    assert streamed["calls"][0]["index"] == 0


def test_several_tool_calls(client: Client, m3: Script) -> None:
    whole, streamed = ask(client, m3, f"{CALL}\n{CALL.replace('Oslo', 'Rome')}")
    assert whole["message"]["content"] is None
    places = [json.loads(call["function"]["arguments"])["place"] for call in whole["message"]["tool_calls"]]
    assert places == ["Oslo", "Rome"]
    assert [call["index"] for call in streamed["calls"]] == [0, 1]
    whole, _ = ask(client, m3, f"{CALL}\n{CALL}", parallel_tool_calls=False)
    assert len(whole["message"]["tool_calls"]) == 1


def test_text_around_tool_calls_is_content(client: Client, m3: Script) -> None:
    for text, content, count in (
        (f"{CALL}\nI asked {{twice}}.", "I asked {twice}.", 1),
        (f"First.\n{CALL}\nThen.\n{CALL}\n", "First.\nThen.", 2),
        (f'{CALL}\n<tool_call>\n{{"name": "wea', '<tool_call>\n{"name": "wea', 1),
    ):
        whole, streamed = ask(client, m3, text)
        assert whole["message"]["content"] == streamed["content"] == content
        assert len(whole["message"]["tool_calls"]) == len(streamed["calls"]) == count


@pytest.mark.parametrize(
    "text", ["no call", "a < b", "<tool_call>", '<tool_call>\n{"name": "weather", "argu', "{}", "<tool"]
)
def test_text_that_is_no_call(client: Client, m3: Script, text: str) -> None:
    whole, streamed = ask(client, m3, text)
    assert "tool_calls" not in whole["message"]
    assert whole["message"]["content"] == streamed["content"] == text
    assert whole["finish_reason"] == streamed["finish"] == "stop"
    assert not streamed["calls"]


def test_no_tools_wanted(client: Client, m3: Script, m1: ServedModel) -> None:
    whole, _ = ask(client, m3, CALL, tool_choice="none")
    assert whole["message"]["content"] == CALL
    assert "weather" not in prompt_of(m1, [said("user", "?")], tools=[WEATHER], tool_choice="none")


def test_a_call_whose_parameters_refer_to_their_own_definitions(client: Client) -> None:
    """As pydantic writes them for models within models: `#` is the root of the parameters, not of the call."""
    for number in range(2):
        place = {"type": "object", "properties": {"number": {"const": number}}, "required": ["number"]}
        parameters = {"type": "object", "properties": {"place": {"$ref": "#/$defs/Place"}}, "required": ["place"]}
        parameters |= {"$defs": {"Place": place | {"additionalProperties": False}}, "additionalProperties": False}
        chosen = {"type": "function", "function": {"name": f"go_{number}", "parameters": parameters}}
        tools = [chosen, WEATHER] if number else [WEATHER, chosen]
        for choice in (chosen, "required"):
            answer = client.chat(model="m1", tools=tools, tool_choice=choice, seed=3, max_tokens=200)
            (call,) = answer.json["choices"][0]["message"]["tool_calls"]
            if call["function"]["name"] != "weather":
                assert json.loads(call["function"]["arguments"]) == {"place": {"number": number}}


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "weather"}}])
def test_a_call_that_is_required(client: Client, choice: Any) -> None:
    other = {"type": "function", "function": {"name": "other", "parameters": {"type": "object", "properties": {}}}}
    other["function"]["parameters"]["additionalProperties"] = False  # type: ignore[index]
    for seed in range(3):
        answer = client.chat(model="m1", tools=[other, WEATHER], tool_choice=choice, seed=seed, max_tokens=200)
        (whole,) = answer.json["choices"]
        (call,) = whole["message"]["tool_calls"]
        assert whole["finish_reason"] == "tool_calls"
        assert not whole["message"]["content"]
        assert call["function"]["name"] == "weather" or choice == "required"
        if call["function"]["name"] == "weather":
            jsonschema.validate(json.loads(call["function"]["arguments"]), WEATHER["function"]["parameters"])  # type: ignore[index]


def test_results_of_tools(m1: ServedModel) -> None:
    call = {"id": "call_1", "type": "function", "function": {"name": "weather", "arguments": '{"place": "Oslo"}'}}
    messages = [
        said("user", "?"),
        said("assistant", None, tool_calls=[call], refusal=None, annotations=[], function_call=None, audio=None),
        said("tool", "rain", tool_call_id="call_1"),
    ]
    prompt = prompt_of(m1, messages, tools=[WEATHER])
    assert '{"name": "weather", "arguments": {"place": "Oslo"}}' in prompt
    assert "<tool_response>\nrain\n</tool_response>" in prompt


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tools": [WEATHER], "tool_choice": {"type": "function", "function": {"name": "wether"}}}, "tool_choice"),
        ({"tools": [WEATHER], "tool_choice": "some"}, "tool_choice"),
        ({"tools": [{"type": "function"}]}, "tools"),
        ({"tools": [{"type": "web_search"}]}, "tools"),
        ({"functions": []}, "functions"),
        ({"tools": [WEATHER], "tool_choice": "required", "response_format": {"type": "json_object"}}, "tool_choice"),
        ({"tools": [WEATHER, WRONG], "tool_choice": "required"}, "tools[1].function.parameters"),
        ({"tools": [WEATHER, WRONG], "tool_choice": WRONG}, "tools[1].function.parameters"),
    ],
)
def test_tools_that_are_refused(client: Client, fields: dict[str, Any], param: str) -> None:
    answer = client.chat(model="m1", **fields)
    assert answer.status == 400
    assert answer.error["param"] == param
