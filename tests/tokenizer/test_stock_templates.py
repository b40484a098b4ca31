"""The templates that well-known models come with, as they are: what is learned is what generation will be asked for.

Their text is read from the installed `trl`, which ships them, and is no part of this repository.
"""

from __future__ import annotations

import importlib.util
import random
from itertools import groupby
from pathlib import Path

import pytest

from slmkit.tokenizer import ChatTokens, SLMTokenizer
from slmkit.tokenizer.chat import render

from .conftest import TEXTS, learned_rows

FOUND = importlib.util.find_spec("trl")
FOLDER = Path((FOUND.submodule_search_locations or ["."])[0]) / "chat_templates" if FOUND else Path("absent")
pytestmark = pytest.mark.skipif(not (FOLDER / "qwen3.jinja").is_file(), reason="trl ships the templates")

# Stock template → the built-in one with the same tokens, and what it makes of an assistant's turn.
STOCK = {
    "llama3": ("llama3", lambda said: said.strip() + "<|eot_id|>"),
    "llama3_1": ("llama3", lambda said: said.strip() + "<|eot_id|>"),
    "llama3_2": ("llama3", lambda said: said.strip() + "<|eot_id|>"),
    "gemma3": ("gemma", lambda said: said.strip() + "<end_of_turn>"),
    "qwen2_5": ("chatml", lambda said: said + "<|im_end|>"),
    "qwen3": ("chatml", lambda said: "<think>\n\n</think>\n\n" + said.lstrip("\n") + "<|im_end|>"),
    "qwen3_instruct_2507": ("chatml", lambda said: said + "<|im_end|>"),
}
REWRITES = {"qwen3"}


def with_stock(tokenizer: SLMTokenizer, name: str) -> SLMTokenizer:
    changed = tokenizer.extended(chat_template=STOCK[name][0])
    changed.chat_template = (FOLDER / f"{name}.jinja").read_text(encoding="utf-8")
    return changed


def random_conversations(seed: str, count: int = 100) -> list[list[dict[str, str]]]:
    chance = random.Random(seed)
    words = " ".join(TEXTS).split(" ")

    def said(role: str) -> dict[str, str]:
        text = " ".join(chance.choices(words, k=chance.randint(1, 20))).strip() or "yes"
        return {"role": role, "content": chance.choice(["", " "]) + text + chance.choice(["", "\n"])}

    return [
        [*([said("system")] if chance.random() < 0.5 else [])]
        + [said(role) for role in ("user", "assistant") * chance.randint(1, 4)]
        for _ in range(count)
    ]


def learned(tokenizer: SLMTokenizer, chat: ChatTokens) -> list[str]:
    runs = groupby(zip(chat.ids, chat.trained), key=lambda pair: pair[1])
    return [tokenizer.decode(index for index, _ in run) for is_trained, run in runs if is_trained]


@pytest.mark.parametrize("name", STOCK)
def test_every_turn_of_the_assistant_is_learned_once_behind_its_own_prompt(tokenizer: SLMTokenizer, name: str) -> None:
    ours, spelled = with_stock(tokenizer, name), STOCK[name][1]
    for messages in random_conversations(name):
        rows = learned_rows(ours, messages)
        answers = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
        assert [text for row in rows for text in learned(ours, row)] == [
            spelled(messages[index]["content"]) for index in answers
        ]
        assert len(rows) == (len(answers) if name in REWRITES else 1)
        if name in REWRITES:
            # As generation will be asked: the prompt's ids are the row's, up to what is learned.
            for index, row in zip(answers, rows):
                prompt = ours.encode_chat(messages[:index], add_generation_prompt=True).ids
                assert row.ids[: len(prompt)] == prompt
                assert row.trained.index(True) == len(prompt)
        assert ours.decode(rows[-1].ids) == render(ours.chat_template or "", messages, **ours._names)


@pytest.mark.parametrize("name", STOCK)
def test_the_template_says_which_token_ends_a_turn(tokenizer: SLMTokenizer, name: str) -> None:
    ours = with_stock(tokenizer, name)
    assert STOCK[name][1]("").endswith(next(t for t, i in ours.special_tokens.items() if i == ours.end_of_turn_id))


@pytest.mark.parametrize(("stock", "built_in"), [("llama3", "llama3"), ("gemma3", "gemma")])
def test_the_built_in_templates_write_what_the_published_ones_write(
    tokenizer: SLMTokenizer, stock: str, built_in: str
) -> None:
    ours, theirs = tokenizer.extended(chat_template=built_in), with_stock(tokenizer, stock)
    for messages in random_conversations(stock):
        assert ours.encode_chat(messages) == theirs.encode_chat(messages)
        prompt = messages[:-1]
        assert ours.apply_chat_template(prompt, True, tokenize=False) == theirs.apply_chat_template(
            prompt, True, tokenize=False
        )


def test_reasoning_is_learned_in_the_turn_that_it_belongs_to(tokenizer: SLMTokenizer) -> None:
    ours = with_stock(tokenizer, "qwen3")
    messages = [
        {"role": "user", "content": "the cat?"},
        {"role": "assistant", "content": "<think>\nA cat.\n</think>\n\nsat"},
        {"role": "user", "content": "and?"},
        {"role": "assistant", "content": "<think>\nThe sea.\n</think>\n\nsang"},
    ]
    first, second = learned_rows(ours, messages)
    assert learned(ours, first) == ["<think>\nA cat.\n</think>\n\nsat<|im_end|>"]
    assert learned(ours, second) == ["<think>\nThe sea.\n</think>\n\nsang<|im_end|>"]
    assert "A cat." not in ours.decode(second.ids)
