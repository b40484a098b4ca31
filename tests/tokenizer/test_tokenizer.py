"""The tokenizer loses nothing, grows without moving an id, and is the same in transformers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from slmkit.config import UserError
from slmkit.tokenizer import SLMTokenizer
from slmkit.tokenizer.tokenizer import SPECIALS

TEXT = "The fox found a lantern. The other fox found the lantern's mother, naïvely! 1234 times.\n" * 40


@pytest.fixture(scope="module")
def trained() -> SLMTokenizer:
    tokenizer = SLMTokenizer(vocab_size=330)
    tokenizer.train([TEXT])
    return tokenizer


TRAINED = SLMTokenizer(330)
TRAINED.train([TEXT])


def test_a_new_one_is_the_bytes_and_the_special_tokens_and_usable_at_once() -> None:
    tokenizer = SLMTokenizer(vocab_size=1000)
    assert len(tokenizer) == 260
    assert tokenizer.encode("hé") == [tokenizer.encode_bytes(bytes([b]))[0] for b in "hé".encode()]
    assert list(tokenizer.special_tokens.values()) == [0, 1, 2, 3]


def test_training_grows_it_and_keeps_every_id(trained: SLMTokenizer) -> None:
    fresh = SLMTokenizer(330)
    assert len(trained) == 330
    assert [trained.token_bytes(i) for i in range(260)] == [fresh.token_bytes(i) for i in range(260)]
    assert len(trained.encode(TEXT)) < len(fresh.encode(TEXT)) / 3


def test_too_little_text_leaves_it_smaller_and_says_so_by_its_length() -> None:
    tokenizer = SLMTokenizer(5000)
    tokenizer.train(["abab"])
    assert 260 < len(tokenizer) < 270
    assert tokenizer.vocab_size == 5000


@given(st.text())
@settings(max_examples=400, deadline=None)
def test_any_text_comes_back(text: str) -> None:
    assert TRAINED.decode(TRAINED.encode(text)) == text


@given(st.binary())
@settings(max_examples=400, deadline=None)
def test_any_bytes_come_back(data: bytes) -> None:
    assert TRAINED.decode_bytes(TRAINED.encode_bytes(data)) == data


def test_half_a_surrogate_pair_is_not_lost() -> None:
    text = "a\ud83db"
    assert TRAINED.decode_bytes(TRAINED.encode(text)).decode("utf-8", "surrogatepass") == text
    assert TRAINED.encode_batch(["x", text])[1] == TRAINED.encode(text)


@pytest.mark.parametrize("special", SPECIALS)
def test_text_that_spells_a_special_token_is_text(special: str) -> None:
    ids = TRAINED.encode(f"a{special}b")
    assert not set(ids) & set(TRAINED.special_tokens.values())
    assert TRAINED.decode(ids) == f"a{special}b"
    assert TRAINED.encode_batch([special])[0] == TRAINED.encode(special)
    allowed = TRAINED.encode(f"a{special}b", allow_special=True)
    assert allowed == [*TRAINED.encode("a"), TRAINED.special_tokens[special], *TRAINED.encode("b")]


def test_decoding_can_leave_special_tokens_out() -> None:
    ids = [TRAINED.eos_token_id, *TRAINED.encode("fox"), TRAINED.end_of_turn_id]
    assert TRAINED.decode(ids) == "<|endoftext|>fox<|im_end|>"
    assert TRAINED.decode(ids, skip_special_tokens=True) == "fox"


def test_bytes_that_are_no_text_decode_to_the_replacement_character() -> None:
    assert TRAINED.decode(TRAINED.encode_bytes(b"a\xffb")) == "a\ufffdb"


@pytest.mark.parametrize("token_id", [330, -1, 10**9])
def test_an_id_outside_the_vocabulary_is_named(token_id: int) -> None:
    with pytest.raises((UserError, OverflowError), match=str(token_id) if token_id != 10**9 else ""):
        TRAINED.decode([token_id])


def test_it_survives_disk_with_the_same_fingerprint(trained: SLMTokenizer, tmp_path: Path) -> None:
    trained.save_pretrained(tmp_path)
    loaded = SLMTokenizer.from_pretrained(tmp_path)
    assert loaded.fingerprint == trained.fingerprint
    assert loaded.encode(TEXT) == trained.encode(TEXT)
    assert (loaded.eos_token_id, loaded.pad_token_id, loaded.end_of_turn_id) == (0, 1, 3)
    assert loaded.chat_template == trained.chat_template


def test_another_tokenizer_has_another_fingerprint(trained: SLMTokenizer) -> None:
    other = SLMTokenizer(330)
    other.train([TEXT + "and something else entirely, over and over. " * 30])
    assert len({SLMTokenizer(330).fingerprint, trained.fingerprint, other.fingerprint}) == 3


@pytest.mark.parametrize("text", [TEXT, "  two  spaces\n\n\ttab", "日本語 🦊 naïve", "it's 12345 o'clock!!", ""])
def test_transformers_gives_the_same_ids(trained: SLMTokenizer, text: str, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    trained.save_pretrained(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert theirs(text)["input_ids"] == trained.encode(text)
    assert theirs.decode(trained.encode(text)) == text
    assert (theirs.eos_token_id, theirs.pad_token_id) == (0, 1)
    assert len(theirs) == len(trained)


def test_what_transformers_saves_is_read(trained: SLMTokenizer, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    trained.save_pretrained(tmp_path / "ours")
    transformers.AutoTokenizer.from_pretrained(tmp_path / "ours").save_pretrained(tmp_path / "theirs")
    again = SLMTokenizer.from_pretrained(tmp_path / "theirs")
    assert again.encode(TEXT) == trained.encode(TEXT)
    assert again.chat_template == trained.chat_template
    assert (again.eos_token_id, again.pad_token_id, again.end_of_turn_id) == (0, 1, 3)


def test_a_vocabulary_without_room_for_the_bytes_is_refused() -> None:
    with pytest.raises(UserError, match="vocab_size 259.* need 260"):
        SLMTokenizer(259)


@pytest.mark.parametrize("texts", [[], ["", ""]])
def test_training_on_no_text_is_refused(texts: list[str]) -> None:
    with pytest.raises(UserError, match="no text"):
        SLMTokenizer(300).train(texts)


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("tokenizer.json", None, "no such file"),
        ("tokenizer.json", "{", "not a readable tokenizer.json"),
        ("tokenizer_config.json", "[]", "cannot be read"),
        ("tokenizer_config.json", json.dumps({"eos_token": "</s>"}), "names no end-of-text token"),
    ],
)
def test_a_missing_or_damaged_file_is_one_line(
    trained: SLMTokenizer, name: str, content: str | None, words: str, tmp_path: Path
) -> None:
    trained.save_pretrained(tmp_path)
    if content is None:
        (tmp_path / name).unlink()
    else:
        (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=words) as caught:
        SLMTokenizer.from_pretrained(tmp_path)
    assert "\n" not in str(caught.value)
