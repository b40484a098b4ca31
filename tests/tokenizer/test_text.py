"""Text and bytes come back as they went in, special tokens are never spelled by a user, and training keeps ids."""

from __future__ import annotations

import copy
import random
import re
import subprocess
import sys
import time

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers.pre_tokenizers import ByteLevel

from slmkit.config import UserError
from slmkit.tokenizer import SLMTokenizer
from slmkit.tokenizer.byte_level import BYTE_CHARACTERS

from .conftest import TEXTS

SPECIAL = ["<|endoftext|>", "<|pad|>", "<|im_start|>", "<|im_end|>"]
ANY_CHARACTER = st.characters(codec=None)  # halves of surrogate pairs too
ANY_TEXT = st.lists(st.text(ANY_CHARACTER) | st.sampled_from([*SPECIAL, " the cat", "\r\n", "é", "\ufdd0"])).map(
    "".join
)
ANY_BYTES = st.lists(st.binary() | st.sampled_from([b"the cat", "猫".encode(), "猫".encode()[:2], b"\xff"])).map(
    b"".join
)


@settings(deadline=None)
@given(ANY_TEXT)
@example("a\ud800b")
def test_any_text_comes_back(tokenizer: SLMTokenizer, text: str) -> None:
    """Half of a surrogate pair becomes U+FFFD where special tokens are read, as in conversations."""
    replaced = re.sub("[\ud800-\udfff]", "\ufffd", text)
    for ids, expected in ((tokenizer.encode(text), text), (tokenizer.encode(text, allow_special=True), replaced)):
        assert tokenizer.decode_bytes(ids) == expected.encode("utf-8", "surrogatepass")
        assert b"".join(map(tokenizer.token_bytes, ids)) == tokenizer.decode_bytes(ids)


@settings(deadline=None)
@given(st.text())
def test_decoding_gives_the_text_itself(tokenizer: SLMTokenizer, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text)) == text


@settings(deadline=None)
@given(ANY_BYTES)
def test_any_bytes_come_back(tokenizer: SLMTokenizer, data: bytes) -> None:
    assert tokenizer.decode_bytes(tokenizer.encode_bytes(data)) == data


def test_valid_stretches_among_bytes_are_encoded_as_text(tokenizer: SLMTokenizer) -> None:
    [byte] = tokenizer.encode_bytes(b"\xff")
    assert tokenizer.token_bytes(byte) == b"\xff"
    cat = tokenizer.encode(" the cat")
    assert len(cat) < len(" the cat")
    assert tokenizer.encode_bytes(b" the cat\xff the cat") == [*cat, byte, *cat]


@settings(deadline=None)
@given(st.lists(ANY_TEXT, max_size=5))
def test_a_batch_is_its_texts_one_by_one(tokenizer: SLMTokenizer, texts: list[str]) -> None:
    assert [ids.tolist() for ids in tokenizer.encode_batch(texts)] == [tokenizer.encode(text) for text in texts]


def test_bytes_that_are_not_text_decode_to_replacement_characters(tokenizer: SLMTokenizer) -> None:
    assert tokenizer.decode(tokenizer.encode_bytes(b"a\xffb\xe7\x8c")) == "a\ufffdb\ufffd"


def test_an_untrained_tokenizer_has_the_special_tokens_and_the_bytes() -> None:
    tokenizer = SLMTokenizer(1000)
    assert len(tokenizer) == 260
    assert tokenizer.vocab_size == 1000
    assert tokenizer.special_tokens == {"<|endoftext|>": 0, "<|pad|>": 1, "<|im_start|>": 2, "<|im_end|>": 3}
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.end_of_turn_id) == (0, 1, 3)
    assert tokenizer.stop_token_ids == {0, 3}
    assert sorted(map(tokenizer.token_bytes, range(4, 260))) == [bytes([byte]) for byte in range(256)]
    assert len(tokenizer.encode("é")) == 2


def test_the_alphabet_of_bytes_is_gpt2s() -> None:
    assert sorted(BYTE_CHARACTERS) == sorted(ByteLevel.alphabet())
    spelled = ByteLevel(add_prefix_space=False, use_regex=False).pre_tokenize_str("Ā\n é")[0][0]
    assert spelled == "".join(BYTE_CHARACTERS[byte] for byte in "Ā\n é".encode())


def test_training_keeps_the_ids_of_special_tokens_and_bytes(tokenizer: SLMTokenizer) -> None:
    untrained = SLMTokenizer()
    assert len(tokenizer) > len(untrained)
    assert tokenizer.special_tokens == untrained.special_tokens
    assert [tokenizer.token_bytes(i) for i in range(260)] == [untrained.token_bytes(i) for i in range(260)]
    assert len(tokenizer.encode(TEXTS[0])) < len(untrained.encode(TEXTS[0])) / 2


def test_training_stops_early_when_no_pair_repeats() -> None:
    tokenizer = SLMTokenizer(1000)
    tokenizer.train(["abab cd"])
    assert len(tokenizer) == 261
    assert tokenizer.vocab_size == 1000
    assert tokenizer.decode([260]) == "ab"


def test_training_twice_on_the_same_text_gives_the_same_tokenizer(tokenizer: SLMTokenizer) -> None:
    again = SLMTokenizer(400)
    again.train(["other text"] * 3)
    assert again.fingerprint != tokenizer.fingerprint
    again.train(iter(TEXTS))
    assert again.fingerprint == tokenizer.fingerprint


def test_half_a_surrogate_pair_does_not_stop_training() -> None:
    tokenizer = SLMTokenizer(300)
    tokenizer.train(["abab\ud83d"])
    assert tokenizer.encode("ab") == [260]


@pytest.mark.parametrize("spelling", SPECIAL)
def test_a_special_token_in_a_text_is_ordinary_text(tokenizer: SLMTokenizer, spelling: str) -> None:
    text = f"a {spelling} b"
    index = tokenizer.special_tokens[spelling]
    assert index not in tokenizer.encode(text)
    assert index not in tokenizer.encode_batch([text])[0]
    assert index not in tokenizer.encode_bytes(text.encode() + b"\xff")
    assert tokenizer.encode(text, allow_special=True) == [*tokenizer.encode("a "), index, *tokenizer.encode(" b")]
    assert tokenizer.token_bytes(index) == spelling.encode()


def test_a_copy_reads_special_tokens_as_text_too(tokenizer: SLMTokenizer) -> None:
    assert copy.deepcopy(tokenizer).encode("<|im_end|>") == tokenizer.encode("<|im_end|>")


def test_special_tokens_are_shown_or_skipped_as_asked(tokenizer: SLMTokenizer) -> None:
    ids = [2, *tokenizer.encode("<|pad|> hé"), 3, 0]
    assert tokenizer.decode(ids) == "<|im_start|><|pad|> hé<|im_end|><|endoftext|>"
    assert tokenizer.decode(ids, skip_special_tokens=True) == "<|pad|> hé"


@pytest.mark.parametrize("index", [-1, 400, 10**9])
def test_an_id_outside_the_vocabulary_is_named(tokenizer: SLMTokenizer, index: int) -> None:
    for use in (tokenizer.token_bytes, lambda index: tokenizer.decode([5, index])):
        with pytest.raises(UserError, match=rf"token id {index} .* 0 to 399"):
            use(index)


def test_a_vocabulary_too_small_for_the_bytes_is_refused() -> None:
    assert len(SLMTokenizer(260)) == 260
    with pytest.raises(UserError, match="vocab_size 259.* need 260"):
        SLMTokenizer(259)


@pytest.mark.parametrize("texts", [[], ["", ""], iter(())])
def test_training_on_no_text_is_refused(texts: list[str]) -> None:
    with pytest.raises(UserError, match="no text to train"):
        SLMTokenizer().train(texts)


def test_training_on_one_string_is_refused() -> None:
    with pytest.raises(UserError, match="put it into a list"):
        SLMTokenizer().train("some text")


def test_fingerprints_tell_tokenizers_apart(tokenizer: SLMTokenizer) -> None:
    smaller = SLMTokenizer(399)
    smaller.train(TEXTS)
    assert len({tokenizer.fingerprint, smaller.fingerprint, SLMTokenizer().fingerprint}) == 3
    assert len(tokenizer.fingerprint) == 64


def test_importing_it_imports_neither_torch_nor_transformers() -> None:
    script = "import sys, slmkit.tokenizer; sys.exit(bool({'torch', 'transformers'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0


def test_the_smallest_vocabulary_has_one_token_for_each_byte() -> None:
    """As in recipes/own-text-characters.yaml."""
    tokenizer = SLMTokenizer(260)
    tokenizer.train(["Hello there, hello there."] * 9)
    text = "Hello, café! 猫"
    assert len(tokenizer) == 260
    assert len(tokenizer.encode(text)) == len(text.encode())
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_text_without_spaces_is_learned_from_in_seconds() -> None:
    chance = random.Random(0)
    dna = "".join(chance.choices("ACGT", k=300_000))
    tokenizer, started = SLMTokenizer(600), time.process_time()
    tokenizer.train([dna])
    assert time.process_time() - started < 20  # minutes, where it is one word
    assert len(tokenizer) == 600
    assert tokenizer.encode(dna[:5_000]) == tokenizer._tokenizer.encode(dna[:5_000], add_special_tokens=False).ids
    assert tokenizer.decode(tokenizer.encode(dna)) == dna


def test_an_untrained_tokenizer_decodes_what_a_model_of_its_size_may_draw() -> None:
    tokenizer = SLMTokenizer(1000)
    assert tokenizer.decode([*tokenizer.encode("a"), 260, 999]) == "a"
    with pytest.raises(UserError, match="token id 1000"):
        tokenizer.decode([1000])


def test_training_prints_nothing_without_a_terminal(capfd: pytest.CaptureFixture[str]) -> None:
    SLMTokenizer(300).train(TEXTS, show_progress=True)
    assert capfd.readouterr() == ("", "")
