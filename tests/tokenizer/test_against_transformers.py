"""`transformers` loads what is saved here, and gives the same ids and the same rendered conversations."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from slmkit.tokenizer import SLMTokenizer

from .conftest import TEXTS

transformers = pytest.importorskip("transformers")

SPECIAL = ["<|endoftext|>", "<|pad|>", "<|im_start|>", "<|im_end|>"]
TEXT = st.lists(st.text() | st.sampled_from([*SPECIAL, *TEXTS[:4], "  ", "\r\n", "'s", "42"])).map("".join)
CONVERSATION = [
    {"role": "system", "content": "Be kind."},
    {"role": "user", "content": " the cat? "},
    {"role": "assistant", "content": "sang to the sea"},
    {"role": "user", "content": "and then\n"},
    {"role": "assistant", "content": "sat."},
]


@pytest.fixture(scope="module")
def theirs(tokenizer: SLMTokenizer, tmp_path_factory: pytest.TempPathFactory) -> Any:
    directory = tmp_path_factory.mktemp("saved")
    tokenizer.save_pretrained(directory)
    return transformers.AutoTokenizer.from_pretrained(directory)


@settings(deadline=None)
@given(TEXT)
def test_any_text_has_the_same_ids(tokenizer: SLMTokenizer, theirs: Any, text: str) -> None:
    assert theirs.encode(text, add_special_tokens=False) == tokenizer.encode(text, allow_special=True)
    assert theirs.encode(text, split_special_tokens=True, add_special_tokens=False) == tokenizer.encode(text)


@settings(deadline=None)
@given(st.lists(st.integers(0, 399)))
def test_any_ids_have_the_same_text(tokenizer: SLMTokenizer, theirs: Any, ids: list[int]) -> None:
    # transformers replaces bytes that are not UTF-8 between special tokens, so a special token may not cut a character.
    ids = [index for index in ids if index not in tokenizer.special_tokens.values()]
    assert theirs.decode(ids) == tokenizer.decode(ids)


def test_special_tokens_have_the_same_jobs(tokenizer: SLMTokenizer, theirs: Any) -> None:
    assert len(theirs) == len(tokenizer)
    assert (theirs.eos_token_id, theirs.pad_token_id) == (tokenizer.eos_token_id, tokenizer.pad_token_id)
    assert theirs.bos_token is None
    assert set(theirs.all_special_tokens) == set(tokenizer.special_tokens)
    ids = tokenizer.encode("<|im_start|>é", allow_special=True)
    assert theirs.decode(ids, skip_special_tokens=True) == tokenizer.decode(ids, skip_special_tokens=True) == "é"


@pytest.mark.parametrize("count", [2, 3, 4, 5])
def test_conversations_are_rendered_the_same(tokenizer: SLMTokenizer, theirs: Any, count: int) -> None:
    messages, prompt = CONVERSATION[:count], count % 2 == 0
    text = theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt)
    assert tokenizer.apply_chat_template(messages, add_generation_prompt=prompt, tokenize=False) == text
    ids = theirs.apply_chat_template(messages, add_generation_prompt=prompt, return_dict=False)
    assert tokenizer.apply_chat_template(messages, add_generation_prompt=prompt) == ids
    assert tokenizer.encode_chat(messages, add_generation_prompt=prompt).ids == ids


@pytest.mark.parametrize("name", ["llama_directory", "gemma_directory"])
def test_others_templates_are_rendered_the_same(name: str, request: pytest.FixtureRequest) -> None:
    directory: Path = request.getfixturevalue(name)
    ours = SLMTokenizer.from_pretrained(directory)
    theirs = transformers.AutoTokenizer.from_pretrained(directory)
    for count in (2, 5):
        messages, prompt = CONVERSATION[:count], count == 2
        text = theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt)
        assert ours.apply_chat_template(messages, add_generation_prompt=prompt, tokenize=False) == text
        ids = theirs.apply_chat_template(messages, add_generation_prompt=prompt, return_dict=False)
        assert ours.encode_chat(messages, add_generation_prompt=prompt).ids == ids


@pytest.mark.parametrize("name", ["gpt2_directory", "llama_directory", "gemma_directory"])
def test_others_vocabularies_give_the_same_ids(name: str, request: pytest.FixtureRequest) -> None:
    directory: Path = request.getfixturevalue(name)
    theirs = transformers.PreTrainedTokenizerFast.from_pretrained(directory)
    text = "".join(TEXTS[:4]) + "<|eot_id|> <end_of_turn>"
    ours = SLMTokenizer.from_pretrained(directory)
    assert ours.encode(text, allow_special=True) == theirs.encode(text, add_special_tokens=False)
    assert ours.decode(ours.encode(text)) == text


def test_what_transformers_saves_again_is_the_same_tokenizer(
    tokenizer: SLMTokenizer, theirs: Any, tmp_path: Path
) -> None:
    theirs.save_pretrained(tmp_path)
    again = SLMTokenizer.from_pretrained(tmp_path)
    assert again.fingerprint == tokenizer.fingerprint
    assert again.chat_template == tokenizer.chat_template
    assert (again.eos_token_id, again.pad_token_id, again.end_of_turn_id) == (0, 1, 3)
    assert again.special_tokens == tokenizer.special_tokens
