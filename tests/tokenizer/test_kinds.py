"""Every kind of tokenizer gives the ids of `transformers`, in texts, in training rows and in prompts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from slmkit.tokenizer import ChatTokens, SLMTokenizer

from .kinds import MADE, PROSE, REAL, directory_of, special_padding

transformers = pytest.importorskip("transformers")

SYSTEM, TALK = (
    {"role": "system", "content": "Be kind."},
    [
        {"role": "user", "content": " Where is the cat?\n"},
        {"role": "assistant", "content": "By the sea."},
        {"role": "user", "content": "Les élèves?"},
        {"role": "assistant", "content": "\n  là-bas 🐈 "},
    ],
)
# Between {% generation %} tags is what is learned: `transformers` then gives a mask too.
TURNS = (
    "{% for m in messages %}BEFORE{% if m.role == 'assistant' %}{% generation %}{{ ANSWER + eos_token }}"
    "{% endgeneration %}{% else %}{{ QUESTION }}{% endif %}{% endfor %}{% if add_generation_prompt %}PROMPT{% endif %}"
)


def template(before: str, answer: str, question: str, prompt: str = "") -> str:
    parts = {"BEFORE": before, "ANSWER": answer, "QUESTION": question, "PROMPT": prompt}
    text = TURNS
    for name, part in parts.items():
        text = text.replace(name, part)
    return text


TEMPLATES = {
    "llama2": "{{ bos_token }}"
    + template("", "' ' + m.content | trim + ' '", "'[INST] ' + m.content | trim + ' [/INST]'"),
    "mistral": "{{ bos_token }}" + template("", "m.content", "'[INST]' + m.content + '[/INST]'"),
    "zephyr": template("<|{{ m.role }}|>\n", "m.content", "m.content + eos_token + '\n'", "<|assistant|>\n"),
    "plain": template("{{ m.role + ': ' }}", "m.content", "m.content + '\n'", "{{ 'assistant: ' }}"),
}


@pytest.fixture(scope="module", params=[*MADE, *REAL])
def directory(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return directory_of(request.param, tmp_path_factory.mktemp("kinds"))


@pytest.fixture(scope="module")
def ours(directory: Path) -> SLMTokenizer:
    return SLMTokenizer.from_pretrained(directory)


@pytest.fixture(scope="module")
def theirs(directory: Path) -> Any:
    return transformers.AutoTokenizer.from_pretrained(directory)


def texts_with_special(ours: SLMTokenizer) -> list[str]:
    one, other = (sorted(ours.special_tokens) * 2)[:2]
    return [f"{one}the cat", f"the cat {one} sat{other}", f" {one} {other}\n the", f"{one}{other}"]


def test_texts_have_the_same_ids(ours: SLMTokenizer, theirs: Any) -> None:
    for text in [*PROSE, *texts_with_special(ours)]:
        assert ours.encode(text, allow_special=True) == theirs(text, add_special_tokens=False).input_ids, text
        assert ours(text).input_ids == theirs(text).input_ids, text
        assert ours.encode(text) == ours.encode_batch([text])[0].tolist(), text
    for text in PROSE:
        assert ours.encode(text) == theirs(text, add_special_tokens=False).input_ids, text
        behind = len(ours.ending)  # what ends a text stands behind no prompt, since that is to go on
        ids = theirs(text).input_ids
        assert ours.encode_prompt(text) == (ids[: len(ids) - behind] or [ours.eos_token_id])


def test_no_text_becomes_a_special_token(ours: SLMTokenizer, theirs: Any) -> None:
    special = {*ours.special_tokens.values()} - {theirs.unk_token_id}
    for text in texts_with_special(ours):
        assert not special & {*ours.encode(text)}, text


def test_no_text_is_lost_where_bytes_are_special(tmp_path: Path) -> None:
    tokenizer, config = special_padding()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    ours, theirs = SLMTokenizer.from_pretrained(tmp_path), transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert ours.pad_token_id == theirs.pad_token_id == ours.encode("!")[0]
    for text in ("the cat! sat", "!!! no! !\n"):
        assert ours.encode(text) == theirs(text, add_special_tokens=False).input_ids
        assert ours.decode(ours.encode(text)) == text
    fallback = SLMTokenizer.from_pretrained(directory_of("metaspace-special-bytes", tmp_path))
    newline = fallback.encode("\n")[-1]
    assert fallback.decode(fallback.encode("cat\nsat"), skip_special_tokens=True) == "cat\nsat"
    assert fallback.token_bytes(newline) == b"\n"


@pytest.mark.parametrize("name", TEMPLATES)
def test_conversations_have_the_same_ids_and_mask(ours: SLMTokenizer, theirs: Any, directory: Path, name: str) -> None:
    ours.chat_template = theirs.chat_template = TEMPLATES[name]
    # Where a tokenizer drops white space, `transformers` looks for learned text that begins with it and gives up.
    compare(ours, theirs, masks=not any(kind in directory.name for kind in ("word", "trims")))


@pytest.mark.parametrize("name", ["chatml", "llama3", "gemma"])
def test_the_built_in_templates_give_the_same_ids(ours: SLMTokenizer, tmp_path: Path, name: str) -> None:
    if name != "chatml" and len(ours) > 20_000:
        pytest.skip("one template is enough for a vocabulary that takes seconds to write and read")
    ours.extended(chat_template=name).save_pretrained(tmp_path)
    changed, reference = SLMTokenizer.from_pretrained(tmp_path), transformers.AutoTokenizer.from_pretrained(tmp_path)
    compare(changed, reference, masks=False)


def compare(ours: SLMTokenizer, theirs: Any, masks: bool) -> None:
    for messages in (TALK[:2], TALK, [SYSTEM, *TALK], TALK[:1], TALK[:3]):
        prompt = messages[-1]["role"] == "user"
        expected = theirs.apply_chat_template(
            messages, add_generation_prompt=prompt, return_dict=True, return_assistant_tokens_mask=masks
        )
        chat = ours.encode_chat(messages, prompt)
        assert chat.ids == expected["input_ids"]
        if masks and not prompt:
            assert chat.trained == [bool(is_learned) for is_learned in expected["assistant_masks"]]


def test_a_conversation_that_spells_special_tokens_keeps_the_others(ours: SLMTokenizer) -> None:
    """The template's own tokens are those of a conversation without, and there are no more."""
    ours.chat_template = TEMPLATES["zephyr"]
    special = {*ours.special_tokens.values()}
    for word in [*ours.special_tokens][:4]:

        def chat(said: str) -> ChatTokens:
            asked = [{"role": "user", "content": said}, {"role": "assistant", "content": f"the {said} cat"}]
            return ours.encode_chat(asked)

        spelled, harmless = chat(word), chat("x")
        unknown = {ours.convert_tokens_to_ids(ours._names.get("unk_token", ""))}
        assert [i for i in spelled.ids if i in special - unknown] == [i for i in harmless.ids if i in special - unknown]
        assert spelled.trained[-2:] == harmless.trained[-2:]


def test_the_parts_of_a_long_text_are_the_text(ours: SLMTokenizer) -> None:
    """Encoded part by part, a text gains nothing, and its ids are those of the whole where it is cut at words."""
    whole = "The cat sat by the sea. " * 5 + "and the sea sang to the cat"
    for cut in (24, 48, 52):
        parts = [*ours.encode(whole[:cut]), *ours._encoder.encode_continuation(whole[cut:])]
        assert ours.decode(parts) == ours.decode(ours.encode(whole))


def test_all_that_is_encoded_is_decoded_as_transformers_does(ours: SLMTokenizer, theirs: Any) -> None:
    for text in PROSE:
        ids = ours.encode(text)
        assert ours.decode(ids) == theirs.decode(ids, clean_up_tokenization_spaces=False)


def test_where_prompt_and_history_cannot_agree_it_is_told(tokenizer: SLMTokenizer) -> None:
    assert not tokenizer.extended(chat_template="llama3").prompt_is_prefix()
    assert tokenizer.prompt_is_prefix()
