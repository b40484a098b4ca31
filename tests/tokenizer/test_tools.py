"""Tool calls and reasoning go through the chat template: the assistant's are learned, what a tool answers is not."""

from __future__ import annotations

from itertools import groupby
from pathlib import Path
from typing import Any

import pytest

from slmkit.config import UserError
from slmkit.tokenizer import ChatTokens, SLMTokenizer
from slmkit.tokenizer.chat import DROPPED, ConversationError

from .test_stock_templates import FOLDER

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "find_cat",
            "description": "Où est le chat?",
            "parameters": {"type": "object", "properties": {"place": {"type": "string"}}},
        },
    }
]


def call(**arguments: str) -> dict[str, Any]:
    return {"type": "function", "id": "call00001", "function": {"name": "find_cat", "arguments": arguments}}


CALLING: list[dict[str, Any]] = [
    {"role": "system", "content": "Be kind."},
    {"role": "user", "content": "Where is the cat?"},
    {"role": "assistant", "content": "", "tool_calls": [call(place="sea"), call(place="forêt")]},
    {"role": "tool", "content": '{"found": true}', "name": "find_cat", "tool_call_id": "call00001"},
    {"role": "tool", "content": '{"found": false}', "name": "find_cat", "tool_call_id": "call00001"},
    {"role": "assistant", "content": "By the sea."},
]
THINKING: list[dict[str, Any]] = [
    {"role": "user", "content": "2 + 2?"},
    {"role": "assistant", "content": "4", "reasoning_content": "It's two and two."},
]


def learned(tokenizer: SLMTokenizer, chat: ChatTokens) -> list[str]:
    runs = groupby(zip(chat.ids, chat.trained), key=lambda pair: pair[1])
    return [tokenizer.decode(index for index, _ in run) for is_trained, run in runs if is_trained]


def test_calls_are_learned_and_the_answers_of_tools_are_not(tokenizer: SLMTokenizer) -> None:
    assert learned(tokenizer, tokenizer.encode_chat(CALLING, tools=TOOLS)) == [
        '<tool_call>\n{"name": "find_cat", "arguments": {"place": "sea"}}\n</tool_call>\n'
        '<tool_call>\n{"name": "find_cat", "arguments": {"place": "forêt"}}\n</tool_call><|im_end|>',
        "By the sea.<|im_end|>",
    ]
    unweighted = [*CALLING[:2], {**CALLING[2], "weight": 0}, *CALLING[3:]]
    assert learned(tokenizer, tokenizer.encode_chat(unweighted, tools=TOOLS)) == ["By the sea.<|im_end|>"]
    text = tokenizer.apply_chat_template(CALLING, tokenize=False, tools=TOOLS)
    assert '<|im_start|>user\n<tool_response>\n{"found": true}\n</tool_response>\n<tool_response>\n{"found": f' in text
    assert text.startswith("<|im_start|>system\nBe kind.\n\n# Tools")
    assert "Où est le chat?" in text


def test_reasoning_is_learned_with_the_answer(tokenizer: SLMTokenizer) -> None:
    assert learned(tokenizer, tokenizer.encode_chat(THINKING)) == [
        "<think>\nIt's two and two.\n</think>\n\n4<|im_end|>"
    ]


@pytest.mark.parametrize("name", ["llama3", "gemma"])
def test_a_template_that_would_drop_them_is_refused_by_what_it_drops(tokenizer: SLMTokenizer, name: str) -> None:
    other = tokenizer.extended(chat_template=name)
    for messages, tools, what in (
        (CALLING[1:3], None, "tool_calls"),
        (CALLING[1:2], TOOLS, "tools"),
        (THINKING, None, "reasoning_content"),
    ):
        with pytest.raises(ConversationError, match=f"does not render {what}: use one that does") as raised:
            other.render_chat(messages, tools=tools)
        assert raised.value.reason == DROPPED
        with pytest.raises(UserError, match=what):
            other.apply_chat_template(messages, tools=tools, tokenize=False)


@pytest.mark.skipif(not (FOLDER / "qwen3.jinja").is_file(), reason="trl ships the templates")
@pytest.mark.parametrize("name", ["chatml", "qwen2_5", "qwen3", "llama3_1", "qwen3_instruct_2507"])
def test_templates_get_what_transformers_gives_them(tokenizer: SLMTokenizer, tmp_path: Path, name: str) -> None:
    transformers = pytest.importorskip("transformers")
    ours = tokenizer.extended(chat_template="llama3" if name.startswith("llama") else "chatml")
    if name != "chatml":
        ours.chat_template = (FOLDER / f"{name}.jinja").read_text(encoding="utf-8")
    ours.save_pretrained(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    single = [*CALLING[:2], {**CALLING[2], "tool_calls": [call(place="sea")]}, CALLING[3]]  # Llama's takes one at once
    for messages, tools in ((single, TOOLS), ([*single, CALLING[5]], TOOLS), (CALLING[:2], TOOLS), (THINKING, None)):
        if messages is THINKING and name in ("llama3_1", "qwen2_5", "qwen3_instruct_2507"):
            continue  # refused, since these do not render reasoning
        prompt = messages[-1]["role"] != "assistant"
        text = theirs.apply_chat_template(messages, tools=tools, tokenize=False, add_generation_prompt=prompt)
        assert ours.apply_chat_template(messages, prompt, tokenize=False, tools=tools) == text
        ids = theirs.apply_chat_template(messages, tools=tools, add_generation_prompt=prompt, return_dict=False)
        assert ours.encode_chat(messages, prompt, tools).ids == ids


def test_neither_a_call_nor_a_tool_can_forge_a_special_token(tokenizer: SLMTokenizer) -> None:
    def count(word: str) -> int:
        tools = [{"type": "function", "function": {"name": "f", "description": word, "parameters": {"x": [word]}}}]
        messages = [
            {"role": "user", "content": "?"},
            {"role": "assistant", "content": None, "tool_calls": [call(place=word)], "reasoning_content": word},
            {"role": "tool", "content": word},
        ]
        ids = tokenizer.encode_chat(messages, True, tools).ids
        assert tokenizer.decode(ids) == tokenizer.apply_chat_template(messages, True, tokenize=False, tools=tools)
        return sum(index in tokenizer.special_tokens.values() for index in ids)

    assert count("<|im_end|>") == count("x")


@pytest.mark.parametrize(
    ("messages", "words"),
    [
        (CALLING[:3] + CALLING[5:], "message 4: assistant where it is the tool's turn"),
        (CALLING[:2] + CALLING[3:], "message 3: tool where it is the assistant's turn"),
        ([CALLING[1] | {"tool_calls": [call()]}], "message 1: tool_calls in a message of the user"),
        ([CALLING[1], CALLING[2] | {"tool_calls": [{"name": "f"}]}], "message 2: tool_calls: expected a list of"),
        ([CALLING[1], CALLING[2] | {"tool_calls": "f"}], "message 2: tool_calls: expected a list of"),
        ([CALLING[1], {"role": "assistant", "content": None}], "message 2: content is nothing"),
    ],
)
def test_malformed_calls_are_one_line(tokenizer: SLMTokenizer, messages: list, words: str) -> None:
    with pytest.raises(ConversationError, match=words) as raised:
        tokenizer.encode_chat(messages)
    assert "\n" not in str(raised.value)
