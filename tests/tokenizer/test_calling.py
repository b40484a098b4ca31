"""The tokenizer called as the field does: what comes out equals what `transformers` gives for the same files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from slmkit.config import UserError
from slmkit.tokenizer import SLMTokenizer

from .kinds import directory_of

transformers = pytest.importorskip("transformers")
TEXTS = ["The cat sat", "x", "by the sea and"]


@pytest.fixture(params=["metaspace-first", "byte-level", "wordpiece"])
def both(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[SLMTokenizer, Any]:
    directory = directory_of(request.param, tmp_path)
    return SLMTokenizer.from_pretrained(directory), transformers.AutoTokenizer.from_pretrained(directory)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize(
    "options",
    [
        {"padding": True, "return_tensors": "pt"},
        {"padding": True, "truncation": True, "max_length": 4, "return_tensors": "pt"},
        {"padding": "max_length", "max_length": 40},
        {"max_length": 3},
        {"max_length": 3, "truncation": False},
        {"max_length": 3, "padding": True},
        {"truncation": True},
        {"padding": True, "pad_to_multiple_of": 8},
        {"padding": "max_length", "max_length": 13, "pad_to_multiple_of": 8},
        {"pad_to_multiple_of": 8},
        {"add_special_tokens": False},
        {},
    ],
)
def test_a_call_gives_the_batch_of_transformers(both: tuple, side: str, options: dict) -> None:
    ours, theirs = both
    ours.padding_side = theirs.padding_side = side
    found, expected = ours(TEXTS, **options), theirs(TEXTS, **options)
    for name in ("input_ids", "attention_mask"):
        assert (
            torch.as_tensor(found[name]).tolist() == torch.as_tensor(expected[name]).tolist()
            if ("return_tensors" in options)
            else found[name] == expected[name]
        )
    assert found.input_ids is found["input_ids"]
    if options.get("padding") is True and "max_length" not in options:
        unpadded = [ours(text) for text in TEXTS]
        for rows in (unpadded, [row.input_ids for row in unpadded], ours(TEXTS)):
            again = ours.pad(rows, pad_to_multiple_of=options.get("pad_to_multiple_of"))
            assert {**again} == {name: torch.as_tensor(found[name]).tolist() for name in found}
    assert {**found}.keys() == {"input_ids", "attention_mask"}
    assert ours("The cat").input_ids == theirs("The cat").input_ids


def test_the_collators_of_transformers_take_the_tokenizer(both: tuple) -> None:
    for multiple in (None, 8):
        batches = []
        for tokenizer in both:
            collate = transformers.DataCollatorForLanguageModeling(tokenizer, mlm=False, pad_to_multiple_of=multiple)
            batches += [
                collate([tokenizer(text) for text in TEXTS]),
                collate([tokenizer(text).input_ids for text in TEXTS]),
            ]
        for found, expected in zip(batches[:2], batches[2:]):
            assert found.keys() == expected.keys()
            assert all(torch.equal(found[name], expected[name]) for name in found)
    with pytest.raises(UserError, match="pad: expected input_ids and attention_mask, found input_ids, labels"):
        both[0].pad([{"input_ids": [1], "labels": [1]}])


@pytest.mark.parametrize("longest", [4, 10**30, 1e30])
def test_the_length_in_the_config_cuts_as_in_transformers(longest: float, tmp_path: Path) -> None:
    directory = directory_of("byte-level", tmp_path)
    path = directory / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"model_max_length": longest}))
    ours, theirs = SLMTokenizer.from_pretrained(directory), transformers.AutoTokenizer.from_pretrained(directory)
    assert ours(TEXTS, truncation=True).input_ids == theirs(TEXTS, truncation=True).input_ids
    assert (max(map(len, ours(TEXTS, truncation=True).input_ids)) == 4) is (longest == 4)
    assert ours(TEXTS).input_ids == theirs(TEXTS).input_ids


def test_names_and_conversions_are_theirs(both: tuple) -> None:
    ours, theirs = both
    for name in ("pad_token_id", "eos_token_id", "bos_token_id", "eos_token", "bos_token", "pad_token", "vocab_size"):
        assert getattr(ours, name) == (len(theirs) if name == "vocab_size" else getattr(theirs, name))
    ids = ours.encode(TEXTS[0])
    assert ours.convert_ids_to_tokens(ids) == theirs.convert_ids_to_tokens(ids)
    assert ours.convert_tokens_to_ids(ours.convert_ids_to_tokens(ids)) == ids
    assert ours.get_vocab() == theirs.get_vocab()
    assert ours.batch_decode([ids, ids]) == [ours.decode(ids)] * 2


def test_what_makes_no_batch_is_refused(tokenizer: SLMTokenizer, gpt2_directory: Path) -> None:
    with pytest.raises(UserError, match="pass padding=True"):
        tokenizer(TEXTS, return_tensors="pt")
    bare = SLMTokenizer.from_pretrained(gpt2_directory)
    with pytest.raises(UserError, match="no padding token"):
        bare(TEXTS, padding=True)
    bare.pad_token = bare.eos_token
    assert bare(TEXTS, padding=True).attention_mask[1].count(0) > 0
    chat = [{"role": "user", "content": "hello"}]
    ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt")
    assert ids.tolist() == [tokenizer.encode_chat(chat, add_generation_prompt=True).ids]


@pytest.mark.parametrize(
    ("arguments", "options", "said"),
    [
        *[((wrong,), {}, "expected a text") for wrong in (None, 5, [["a", "b"]], ["a", None], b"a", {"text": "a"})],
        (("a", "b"), {}, "no pairs"),
        (("a",), {"padding": "longst"}, "did you mean 'longest'"),
        (("a",), {"padding": "max_length"}, "max_length None"),
        (("a",), {"truncation": "only_frist"}, "did you mean 'only_first'"),
        (("a",), {"truncation": True, "max_length": "4"}, "max_length '4'"),
    ],
)
def test_a_call_refuses_what_is_no_text_or_option(
    tokenizer: SLMTokenizer, arguments: tuple, options: dict, said: str
) -> None:
    with pytest.raises(UserError, match=said):
        tokenizer(*arguments, **options)


def test_decode_takes_one_id_or_one_row(both: tuple) -> None:
    ours, theirs = both
    ids = ours.encode(TEXTS[0])
    assert ours.decode(ids[1]) == theirs.decode(ids[1])
    assert ours.decode(torch.tensor(ids[1])) == ours.decode(ids[1])
    assert ours.decode(torch.tensor(ids)) == ours.decode(ids)
    for wrong in (torch.tensor([ids]), torch.tensor([[ids[0]]]), [ids], "12", 1.5, None):
        with pytest.raises(UserError, match="batch_decode"):
            ours.decode(wrong)
    for wrong in (5, None, ["a"]):
        with pytest.raises(UserError, match="expected one text"):
            ours.encode(wrong)


def test_switches_reach_the_chat_template_as_in_transformers(both: tuple) -> None:
    ours, theirs = both
    ours.chat_template = theirs.chat_template = (
        "{% for m in messages %}{{ m.content }}{% endfor %}{% if enable_thinking is false %} the cat{% endif %}"
    )
    chat = [{"role": "user", "content": "x"}]
    for switches in ({}, {"enable_thinking": False}, {"enable_thinking": True}):
        found = ours.apply_chat_template(chat, tokenize=False, continue_final_message=False, **switches)
        assert found == theirs.apply_chat_template(chat, tokenize=False, **switches)
        assert ours.decode(ours.apply_chat_template(chat, **switches)).strip() == found
    assert found != ours.apply_chat_template(chat, tokenize=False, enable_thinking=False)
    for wrong in ({"continue_final_message": True}, {"add_generation_promt": True}, {"padding": True}):
        with pytest.raises(UserError, match=next(iter(wrong))):
            ours.apply_chat_template(chat, **wrong)
    for tokenize in (True, False):
        with pytest.raises(UserError, match="one conversation at a time"):
            ours.apply_chat_template([chat, chat], tokenize=tokenize)
