"""tiktoken's core gives the very ids of `tokenizers`, and vocabularies for which it would not are left alone."""

from __future__ import annotations

import copy
import random
import time

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from tokenizers.pre_tokenizers import ByteLevel, Split

from slmkit.tokenizer import SLMTokenizer, fast_encoder
from slmkit.tokenizer.byte_level import BYTE_CHARACTERS
from slmkit.tokenizer.fast_encoder import FastEncoder, cuts_in_long_words

from .conftest import TEXTS

RUNS = ["a", "ab", "aab", "é", "猫", ".", "-", " ", "\n", "\t ", "'", "1", "'s"]


def slow(tokenizer: SLMTokenizer, text: str) -> list[int]:
    return tokenizer._tokenizer.encode(text, add_special_tokens=False).ids


def byte_level(vocabulary: list[str], merges: list[tuple[str, str]]) -> Tokenizer:
    """A tokenizer of the bytes, these tokens behind them, and these merges."""
    tokens = [*sorted(BYTE_CHARACTERS), *vocabulary]
    tokenizer = Tokenizer(models.BPE({token: index for index, token in enumerate(tokens)}, merges))
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


@pytest.fixture(scope="module")
def running() -> SLMTokenizer:
    """A tokenizer with long tokens of one repeated character."""
    tokenizer = SLMTokenizer(700)
    tokenizer.train([*TEXTS, *[run * 40 + "x" for run in RUNS] * 5])
    assert tokenizer._encoder.fast is not None
    return tokenizer


@settings(deadline=None, max_examples=200)
@given(
    st.lists(st.text() | st.sampled_from([*RUNS, " the cat", "  ", "'ll", "ſ", "\u2028", "\x85", "\ufdd0"])).map(
        "".join
    )
)
def test_any_text_has_the_ids_of_the_library(running: SLMTokenizer, text: str) -> None:
    assume("<|" not in text)  # the library reads special tokens in it
    assert running.encode(text) == slow(running, text)


SHORT = "aab'' \n1é"


@settings(deadline=None, max_examples=100)
@given(st.text(alphabet=SHORT, max_size=60), st.lists(st.text(alphabet=SHORT, min_size=1, max_size=12), min_size=1))
def test_any_vocabulary_that_is_taken_gives_the_ids_of_the_library(text: str, texts: list[str]) -> None:
    tokenizer = SLMTokenizer(300)
    tokenizer.train(texts * 3)
    if tokenizer._encoder.fast:
        assert tokenizer.encode(text) == slow(tokenizer, text)


LETTERS = st.sampled_from("abc")


@settings(deadline=None, max_examples=200)
@given(st.data())
def test_any_list_of_merges_that_is_taken_gives_the_ids_of_the_library(data: st.DataObject) -> None:
    tokens, merges = ["a", "b", "c"], []
    for _ in range(data.draw(st.integers(0, 12))):
        pair = (data.draw(st.sampled_from(tokens)), data.draw(st.sampled_from(tokens)))
        if pair not in merges:
            merges.append(pair)
            tokens += [pair[0] + pair[1]] * (pair[0] + pair[1] not in tokens)
    merges = data.draw(st.permutations(merges))
    tokenizer = byte_level(data.draw(st.permutations(tokens[3:])), merges)
    encoder = FastEncoder.of(tokenizer)
    if encoder is not None:
        for _ in range(5):
            text = data.draw(st.text(alphabet="abc", max_size=40))
            assert encoder.encode_array(text).tolist() == tokenizer.encode(text).ids


def test_both_libraries_class_every_character_alike() -> None:
    # All of the planes with letters, and one in 64 of those without.
    codes = [*range(0xD800), *range(0xE000, 0x33480), *range(0x33480, 0x110000, 64)]
    characters = [chr(code) for code in codes]
    for name in (r"\p{L}", r"\p{N}", r"\s"):
        removed = Split(Regex(name), "removed")
        core = fast_encoder._tiktoken.CoreBPE({bytes([byte]): byte for byte in range(256)}, {}, name)
        for character in characters:
            assert bool(core.encode_ordinary(character)) == (not removed.pre_tokenize_str(character)), ascii(character)


@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize("around", [("", ""), ("it's ", " x"), ("'s", "'s"), ("  ", "  y"), ("1", "a")])
def test_long_words_are_cut_without_a_trace(running: SLMTokenizer, run: str, around: tuple[str, str]) -> None:
    text = around[0] + run * (9000 // len(run)) + around[1]
    assert running.encode(text) == slow(running, text)


def test_long_words_without_rhythm_are_cut_without_a_trace(running: SLMTokenizer) -> None:
    rng = random.Random(0)
    text = "".join(rng.choices("abécat猫", k=20_000))
    assert len(cuts_in_long_words(text)) == 8
    assert running.encode(text) == slow(running, text)


def test_where_the_parts_of_a_long_word_never_meet_it_is_encoded_in_one_go() -> None:
    """Nine bytes of a run are one token; cut anywhere but at a ninth, what follows is encoded otherwise."""
    tokenizer = SLMTokenizer(300)
    tokenizer.train([("x" * 3000 + " ") * 30])
    text = "x" * 10_000
    assert max(map(len, map(tokenizer.token_bytes, tokenizer.encode(text)))) >= 128
    assert tokenizer.encode(text) == slow(tokenizer, text)


def test_ordinary_text_is_never_cut() -> None:
    assert cuts_in_long_words("a word and another\n" * 10_000) == []
    assert cuts_in_long_words("word,12\n" * 10_000) == []


def test_a_token_that_two_merges_make_ranks_by_the_one_that_happens() -> None:
    # "abc" is made of ab and c, for (b, c) comes later; the merge of a and bc is listed but never done.
    tokenizer = byte_level(["ab", "bc", "abc", "bcb"], [("a", "b"), ("b", "c"), ("a", "bc"), ("bc", "b"), ("ab", "c")])
    encoder = FastEncoder.of(tokenizer)
    assert encoder is not None
    for text in ("abc", "abcb", "bcb", "babcbc"):
        assert encoder.encode_array(text).tolist() == tokenizer.encode(text).ids


def test_tokens_that_no_merge_makes_are_never_given() -> None:
    tokenizer = byte_level(["ab", "cab"], [("a", "b")])
    encoder = FastEncoder.of(tokenizer)
    assert encoder is not None
    assert encoder.encode_array("cab").tolist() == tokenizer.encode("cab").ids == [66, 256]


def refused() -> dict[str, Tokenizer]:
    tokenizers = {name: byte_level(["ab"], [("a", "b")]) for name in ("normalizer", "digits", "prefix", "added", "unk")}
    tokenizers["normalizer"].normalizer = normalizers.NFC()
    tokenizers["digits"].pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(), ByteLevel()])
    tokenizers["prefix"].pre_tokenizer = ByteLevel(add_prefix_space=True)
    tokenizers["added"].add_tokens([AddedToken("abab", special=False)])
    tokenizers["unk"] = Tokenizer(models.BPE({"a": 0, "b": 1, "ab": 2}, [("a", "b")]))
    tokenizers["unk"].pre_tokenizer = ByteLevel(add_prefix_space=False)
    # "ab" is made by a merge that stands before those of its parts: the ranks would do it in another order.
    tokenizers["order"] = byte_level(["ab", "abc", "cab", "abcab"], [("abc", "ab"), ("a", "b"), ("ab", "c")])
    return tokenizers


@pytest.mark.parametrize("name", refused())
def test_what_might_differ_is_left_to_the_library(name: str) -> None:
    assert FastEncoder.of(refused()[name]) is None


def test_a_copy_and_a_retrained_tokenizer_encode_by_their_own_vocabulary() -> None:
    tokenizer = SLMTokenizer(300)
    assert tokenizer.encode("abab") == slow(tokenizer, "abab")
    tokenizer.train(["abab"] * 3)
    assert tokenizer.encode("abab") == slow(tokenizer, "abab")
    assert copy.deepcopy(tokenizer).encode("abab") == tokenizer.encode("abab")


def test_a_megabyte_of_one_character_takes_about_as_long_as_ordinary_text(running: SLMTokenizer) -> None:
    """Thousands of times as long, where each merge looks at all of it."""

    def seconds(text: str) -> float:
        def once() -> float:
            started = time.process_time()
            running.encode(text)
            return time.process_time() - started

        return min(once() for _ in range(3))

    ordinary = seconds(((TEXTS[0] + TEXTS[1]) * 6000)[:1_000_000])
    assert all(seconds(run * 1_000_000) < 20 * ordinary for run in "a.-")
