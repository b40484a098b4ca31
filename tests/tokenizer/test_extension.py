"""Further tokens and another chat template: ids that were there stay, and what ends a turn follows."""

from __future__ import annotations

from pathlib import Path

import pytest

from slmkit.config import UserError
from slmkit.tokenizer import SLMTokenizer

CONVERSATION = [
    {"role": "system", "content": "Be kind."},
    {"role": "user", "content": " the cat?"},
    {"role": "assistant", "content": "sat.\n"},
]
RENDERED = {
    "chatml": "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\n the cat?<|im_end|>\n"
    "<|im_start|>assistant\nsat.\n<|im_end|>\n",
    "llama3": "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nBe kind.<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n\nthe cat?<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\nsat.<|eot_id|>",
    "gemma": "<bos><start_of_turn>user\nBe kind.\n\nthe cat?<end_of_turn>\n<start_of_turn>model\nsat.<end_of_turn>\n",
}
END = {"chatml": "<|im_end|>", "llama3": "<|eot_id|>", "gemma": "<end_of_turn>"}
ADDED = {"chatml": 0, "llama3": 4, "gemma": 3}  # to a tokenizer that has ChatML's


@pytest.mark.parametrize("name", RENDERED)
def test_a_built_in_template_brings_its_tokens(tokenizer: SLMTokenizer, tmp_path: Path, name: str) -> None:
    changed = tokenizer.extended(chat_template=name)
    changed.save_pretrained(tmp_path)
    for one in (changed, SLMTokenizer.from_pretrained(tmp_path)):
        assert len(one) == len(tokenizer) + ADDED[name]
        assert one.apply_chat_template(CONVERSATION, tokenize=False) == RENDERED[name]
        chat = one.encode_chat(CONVERSATION)
        assert one.decode(chat.ids) == RENDERED[name]
        assert one.end_of_turn_id == one.special_tokens[END[name]] == [i for i, t in zip(*_pair(chat)) if t][-1]
        assert one.stop_token_ids == {one.eos_token_id, one.end_of_turn_id}
        assert one.encode("the cat <|eot_id|>") == tokenizer.encode("the cat <|eot_id|>")
    assert tokenizer.end_of_turn_id == tokenizer.special_tokens["<|im_end|>"]
    assert (changed.bos_token_id is None) == (name == "chatml")


def _pair(chat):
    return chat.ids, chat.trained


def test_a_tokenizer_that_has_them_keeps_them(llama_directory: Path) -> None:
    foreign = SLMTokenizer.from_pretrained(llama_directory)
    changed = foreign.extended(chat_template="llama3")
    assert len(changed) == len(foreign)
    assert changed.special_tokens == foreign.special_tokens
    assert changed.encode_chat(CONVERSATION) == foreign.encode_chat(CONVERSATION)
    # Its own token goes on to begin texts, whatever the format's is called.
    gemma = foreign.extended(chat_template="gemma")
    assert gemma.bos_token_id == foreign.bos_token_id
    assert "<bos>" not in gemma.special_tokens


@pytest.mark.parametrize("name", ["gpt2_directory", "sentencepiece_directory"])
def test_foreign_vocabularies_grow_behind_their_last_id(name: str, request: pytest.FixtureRequest) -> None:
    foreign = SLMTokenizer.from_pretrained(request.getfixturevalue(name))
    changed = foreign.extended(chat_template="chatml")
    assert {i for i in changed.special_tokens.values() if i not in foreign.special_tokens.values()} == {
        len(foreign),
        len(foreign) + 1,
    }
    assert changed.decode(changed.encode_chat(CONVERSATION).ids).replace("> ", ">").count("<|im_end|>") == 3


def test_a_word_gets_a_token_in_any_text_and_a_special_token_only_from_the_template(
    tokenizer: SLMTokenizer, tmp_path: Path
) -> None:
    changed = tokenizer.extended(added_tokens=["photosynthesis", "the"], additional_special_tokens=["<|tool|>"])
    changed.save_pretrained(tmp_path)
    text = "photosynthesis of <|tool|> and photosynthesis"
    for one in (changed, SLMTokenizer.from_pretrained(tmp_path)):
        (word,) = one.added_words.values()  # "the" is one token already
        assert one.encode(text).count(word) == 2
        assert one.special_tokens["<|tool|>"] not in one.encode(text)
        assert one.special_tokens["<|tool|>"] in one.encode(text, allow_special=True)
        assert one.decode(one.encode(text)) == text
        assert [ids.tolist() for ids in one.encode_batch([text, "a"])] == [one.encode(text), one.encode("a")]
        assert one.fingerprint == changed.fingerprint
        assert one.pieces_of_new_tokens(tokenizer) == {
            one.special_tokens["<|tool|>"]: tokenizer.encode("<|tool|>"),
            word: tokenizer.encode("photosynthesis"),
        }
    special = tokenizer.extended(additional_special_tokens=["<|tool|>"])
    assert len({changed.fingerprint, special.fingerprint, tokenizer.fingerprint}) == 3


def test_transformers_loads_it_with_the_same_ids(tokenizer: SLMTokenizer, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    changed = tokenizer.extended("llama3", added_tokens=["photosynthesis"], additional_special_tokens=["<|tool|>"])
    changed.save_pretrained(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    text = "photosynthesis <|tool|> the cat"
    assert theirs.encode(text, add_special_tokens=False) == changed.encode(text, allow_special=True)
    assert theirs.bos_token == "<|begin_of_text|>"
    assert {"<|tool|>", "<|eot_id|>", "<|im_end|>"} <= set(theirs.all_special_tokens)
    ids = theirs.apply_chat_template(CONVERSATION[:2], add_generation_prompt=True, return_dict=False)
    assert changed.encode_chat(CONVERSATION[:2], add_generation_prompt=True).ids == ids


def test_a_template_of_ones_own_is_a_file(tokenizer: SLMTokenizer, tmp_path: Path) -> None:
    path = tmp_path / "plain.jinja"
    path.write_text("{% for m in messages %}{{ m.role }}: {{ m.content }}<|stop|>{% endfor %}")
    changed = tokenizer.extended(chat_template=str(path), additional_special_tokens=["<|stop|>"])
    assert changed.end_of_turn_id == changed.special_tokens["<|stop|>"]
    assert changed.decode(changed.encode_chat(CONVERSATION[1:]).ids).endswith("assistant: sat.\n<|stop|>")
    with pytest.raises(UserError, match=r"name the token that it ends with in tokenizer\.additional_special_tokens"):
        tokenizer.extended(chat_template=str(path)).encode_chat(CONVERSATION)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"chat_template": "lama3"}, "chat_template 'lama3': no file, .* did you mean 'llama3'"),
        ({"added_tokens": [" "]}, "an added token is ' ': expected text"),
        ({"added_tokens": ["<|im_end|>"]}, "'<|im_end|>' is a special token".replace("|", r"\|")),
        ({"added_tokens": ["x y"], "additional_special_tokens": ["x y"]}, "'x y' is a special token"),
    ],
)
def test_what_cannot_be_added_is_one_line(tokenizer: SLMTokenizer, changes: dict, words: str) -> None:
    with pytest.raises(UserError, match=words) as raised:
        tokenizer.extended(**changes)
    assert "\n" not in str(raised.value)
