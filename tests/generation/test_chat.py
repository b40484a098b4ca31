"""A conversation is remembered, trimmed when it outgrows the context, and kept when an answer is broken off."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from slmkit.config import UserError
from slmkit.generation import ChatSession, SamplingSettings
from slmkit.model import SLMConfig, build_decoder
from slmkit.tokenizer import SLMTokenizer

TOKENIZER = SLMTokenizer(260)


def session(**changes: object) -> ChatSession:
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = SLMConfig(vocab_size=260, max_position_embeddings=256, initializer_range=0.3, **shape)
    settings = SamplingSettings(seed=1)
    return ChatSession(build_decoder(config, seed=1), TOKENIZER, settings, **({"max_new_tokens": 12} | changes))


def test_both_sides_are_remembered() -> None:
    chat = session(system="Be kind.")
    answer = "".join(chat.reply("Hello")).strip()
    assert answer
    assert chat.messages == [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": answer},
    ]


def test_an_answer_broken_off_is_remembered_as_far_as_it_went() -> None:
    chat = session()
    pieces = chat.reply("Hello")
    said = next(pieces) + next(pieces) + next(pieces)
    pieces.close()
    assert chat.messages[-1] == {"role": "assistant", "content": said.strip()}


def test_reset_forgets_all_but_the_system_message() -> None:
    chat = session(system="Be kind.")
    "".join(chat.reply("Hello"))
    chat.reset()
    assert chat.messages == [{"role": "system", "content": "Be kind."}]


def test_the_oldest_exchanges_make_room_and_the_system_message_stays() -> None:
    chat = session(system="Be kind.")
    for number in range(6):
        "".join(chat.reply(f"message number {number}"))
    assert chat.forgotten > 0
    assert chat.forgotten % 2 == 0
    assert chat.messages[0]["role"] == "system"
    assert chat.messages[1]["role"] == "user"
    assert "message number 5" in chat.messages[-2]["content"]
    assert len(TOKENIZER.encode_chat(chat.messages).ids) <= 256


def test_a_message_that_leaves_no_room_is_refused_and_not_remembered() -> None:
    chat = session()
    with pytest.raises(UserError, match="context of 256"):
        "".join(chat.reply("x" * 300))
    assert chat.messages == []


def test_what_is_saved_is_a_row_of_conversation_data(tmp_path: Path) -> None:
    from slmkit.data import read_conversations

    chat = session()
    "".join(chat.reply("Hello"))
    chat.save(tmp_path / "chat.jsonl")
    assert list(read_conversations(tmp_path / "chat.jsonl")) == [chat.messages]
    assert json.loads((tmp_path / "chat.jsonl").read_text())["messages"] == chat.messages


def test_a_place_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot be saved"):
        session().save(tmp_path / "nowhere" / "chat.json")
