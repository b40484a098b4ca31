"""Constrained output: masks over the vocabulary by regular expressions and choices, with tokenizers of every kind."""

from __future__ import annotations

import re
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from slmkit.config import UserError
from slmkit.generation.constraints import Grammar
from slmkit.generation.engine import Engine, Request
from slmkit.generation.sampling_settings import SamplingSettings
from slmkit.model.initialization import build_decoder
from slmkit.tokenizer import SLMTokenizer
from tests.generation.walks import accepts, byte_level_tokenizer, refusal, tokenizer_of, walk
from tests.model.test_decoder import tiny

BYTE_LEVEL = byte_level_tokenizer()
KINDS = ["gemma-like", "metaspace-first", "metaspace-special-bytes", "byte-level-words", "llama3-like"]
PATTERNS = [
    "abc", "a|bc|", "[a-f]{3,5}", r"\d{3}-\d{4}", r"\w+\s\S{1,3}", r"[^a\d]{2}", ".{4}", "(?i)no|on", "é+|猫{2}",
    "😀{1,2}", r"a/b\\c\"'", "a\nb\t", "^(?:x|y)?z$", "[]a^-]{3}", r"(?P<name>ab)+c", "(?s:.){2}", r"\x41\u00e9", "",
    "~#&@<>", "<unk>|</s>|<s>",
]  # fmt: skip


@pytest.mark.parametrize("pattern", PATTERNS)
def test_walks_match_the_whole_pattern(pattern: str) -> None:
    grammar = Grammar.regex(BYTE_LEVEL, pattern)
    for seed in range(20):
        text = walk(grammar, BYTE_LEVEL, seed)
        assert re.fullmatch(pattern, text, re.ASCII), text


pieces = st.sampled_from(["a", "b", "[ab]", "[^a]", ".", r"\d", r"\w", r"\.", "(a|b)", "(?:bc)", "é", "[a-c0-2]", " "])
patterns = st.lists(st.tuples(pieces, st.sampled_from(["", "?", "{1,2}", "{2}"])), min_size=1, max_size=5)


@settings(max_examples=60, deadline=None)
@given(patterns, st.text("ab c.1é", max_size=6), st.integers(0, 9))
def test_random_patterns_accept_what_re_accepts(parts: list[tuple[str, str]], text: str, seed: int) -> None:
    pattern = "".join(piece + times for piece, times in parts)
    grammar = Grammar.regex(BYTE_LEVEL, pattern)
    assert re.fullmatch(pattern, walk(grammar, BYTE_LEVEL, seed), re.ASCII)
    assert accepts(grammar, BYTE_LEVEL.encode(text)) == bool(re.fullmatch(pattern, text, re.ASCII))


CHOICES = ["yes", "no", "not at all", " a space", "é 猫 😀", 'q"\\[a-z]+\n', "<|im_end|>"]


@pytest.mark.parametrize("kind", ["own", *KINDS])
def test_choices_are_exact_with_every_kind_of_tokenizer(kind: str, tmp_path: Path) -> None:
    tokenizer = BYTE_LEVEL if kind == "own" else tokenizer_of(kind, tmp_path)
    grammar = Grammar.choices(tokenizer, CHOICES)
    seen = {walk(grammar, tokenizer, seed) for seed in range(60)}
    # A text may end where a longer choice goes on ("no"); a space before the first word is the decoder's affair.
    assert {text.strip() for text in seen} == {text.strip() for text in CHOICES}
    assert seen <= {*CHOICES, "a space"}


@pytest.mark.parametrize("kind", ["own", *KINDS])
def test_the_tokens_of_the_tokenizer_itself_are_allowed(kind: str, tmp_path: Path) -> None:
    """What the model learned to write, not bytes instead: two ids may spell the same."""
    tokenizer = BYTE_LEVEL if kind == "own" else tokenizer_of(kind, tmp_path)
    text = "the cat sat: it's 12345.\n"
    grammar = Grammar.regex(tokenizer, "[^x]*")
    assert accepts(grammar, tokenizer.encode_continuation(text))


@pytest.mark.parametrize("kind", ["own", "gemma-like", "metaspace-first", "metaspace-special-bytes", "llama3-like"])
def test_text_without_a_choice_is_spelled_as_the_tokenizer_does(kind: str, tmp_path: Path) -> None:
    tokenizer = BYTE_LEVEL if kind == "own" else tokenizer_of(kind, tmp_path)
    text = "aa the cat sat by the sea, and the sea sang to the cat"
    matcher, ids = Grammar.choices(tokenizer, [text]).start(), list[int]()
    while not matcher.is_done:
        (token,) = np.flatnonzero(matcher.allowed().numpy())
        ids.append(int(token))
        matcher.accept(ids[-1])
    assert ids == tokenizer.encode_continuation(text)


def test_the_end_is_allowed_exactly_where_the_text_may_end() -> None:
    stops = sorted(BYTE_LEVEL.stop_token_ids)
    assert len(stops) == 2
    matcher = Grammar.regex(BYTE_LEVEL, "(ab)*").start()
    for byte in (*"ab" * 3,):
        assert matcher.may_end == (byte == "a")
        assert matcher.allowed()[stops].tolist() == [matcher.may_end] * 2
        assert matcher.allowed()[BYTE_LEVEL.encode(byte)[0]]
        matcher.accept(BYTE_LEVEL.encode(byte)[0])
    assert not matcher.is_done
    matcher.accept(stops[1])
    assert matcher.is_done
    with pytest.raises(UserError, match="token 0 is not allowed here"):
        matcher.accept(stops[0])


def test_a_text_that_nothing_can_follow_is_done_without_a_stop_token() -> None:
    matcher = Grammar.choices(BYTE_LEVEL, ["ab"]).start()
    for token in BYTE_LEVEL.encode("ab"):
        assert not matcher.is_done
        matcher.accept(token)
    assert matcher.is_done
    assert np.flatnonzero(matcher.allowed().numpy()).tolist() == sorted(BYTE_LEVEL.stop_token_ids)


def test_special_suppressed_and_unused_ids_are_never_inside() -> None:
    tokenizer = byte_level_tokenizer().extended("chatml", additional_special_tokens=["<tool>"])
    a, b, newline = (tokenizer.encode(character)[0] for character in ("a", "b", "\n"))
    tokenizer.use_generation_config({"eos_token_id": [newline], "suppress_tokens": [b]})
    allowed = Grammar.regex(tokenizer, "(?s:.)+").start(vocab_size=len(tokenizer) + 64).allowed()
    assert len(allowed) == len(tokenizer) + 64
    assert allowed[a]
    assert not allowed[b]
    assert not allowed[newline]  # a stop token: it ends the text, and is not in it
    assert not allowed[len(tokenizer) :].any()
    assert not allowed[[*tokenizer.special_tokens.values()]].any()
    after = Grammar.regex(tokenizer, "(?s:.)*").start(vocab_size=newline + 1).allowed()
    assert len(after) == newline + 1
    assert after[newline]


def test_rollback_is_exact() -> None:
    grammar, random = Grammar.json_object(BYTE_LEVEL), np.random.default_rng(0)
    matcher, ids, masks = grammar.start(), list[int](), [grammar.start().allowed()]
    for _ in range(300):
        if random.random() < 0.3 and ids:
            count = int(random.integers(0, min(9, len(ids)) + 1))
            matcher.rollback(count)
            del ids[len(ids) - count :], masks[len(masks) - count :]
            assert matcher.allowed().equal(masks[-1])
        elif matcher.is_done:
            matcher.rollback(len(ids))
            ids, masks = [], masks[:1]
        else:
            ids.append(int(random.choice(np.flatnonzero(masks[-1].numpy()))))
            matcher.accept(ids[-1])
            masks.append(matcher.prepare().allowed())
    fresh = grammar.start()
    for token, mask in zip(ids, masks):
        assert fresh.allowed().equal(mask)
        fresh.accept(token)


def test_a_stop_token_is_taken_back_like_any_other() -> None:
    matcher, (a,) = Grammar.regex(BYTE_LEVEL, "a*").start(), BYTE_LEVEL.encode("a")
    for token in (a, a, BYTE_LEVEL.eos_token_id):
        matcher.accept(token)
    matcher.rollback(2)
    assert not matcher.is_done
    matcher.accept(a)
    matcher.rollback(2)
    assert matcher.allowed()[a]
    with pytest.raises(UserError, match="1 tokens cannot be taken back"):
        matcher.rollback(1)


def test_a_token_that_is_not_allowed_changes_nothing() -> None:
    matcher, (a, b) = Grammar.regex(BYTE_LEVEL, "ab").start(), (BYTE_LEVEL.encode(x)[0] for x in "ab")
    before = matcher.allowed()
    for wrong in (b, BYTE_LEVEL.eos_token_id, 2):
        with pytest.raises(UserError, match=f"token {wrong} is not allowed here"):
            matcher.accept(wrong)
    assert matcher.allowed().equal(before)
    matcher.accept(a)
    assert matcher.allowed()[b]


def test_threads_share_a_grammar() -> None:
    schema = {"type": "array", "items": {"type": "string", "maxLength": 9}, "maxItems": 9}
    grammar = Grammar.json_schema(BYTE_LEVEL, schema)
    alone = [walk(grammar, BYTE_LEVEL, seed) for seed in range(64)]
    with ThreadPoolExecutor(16) as pool:
        assert [*pool.map(lambda seed: walk(grammar, BYTE_LEVEL, seed), range(64))] == alone
        made = [*pool.map(lambda number: Grammar.regex(BYTE_LEVEL, f"a{{{number % 4 + 1}}}"), range(64))]
    for number, each in enumerate(made):
        assert walk(each, BYTE_LEVEL, number) == "a" * (number % 4 + 1)


def test_masks_are_made_in_the_background() -> None:
    matchers = [Grammar.json_object(BYTE_LEVEL).start().prepare() for _ in range(20)]
    assert all(matcher.allowed().equal(matchers[0].allowed()) for matcher in matchers)
    for matcher in matchers:
        assert not matcher.may_end  # waits for the thread
        matcher.accept(BYTE_LEVEL.encode("{")[0])
        matcher.prepare().rollback(1)
        assert not matcher.prepare().may_end
        assert matcher.allowed().equal(Grammar.json_object(BYTE_LEVEL).start().allowed())


def test_a_grammar_is_compiled_once_for_each_tokenizer() -> None:
    first = Grammar.json_schema(BYTE_LEVEL, {"type": "integer", "maximum": 77})
    assert Grammar.json_schema(BYTE_LEVEL, {"type": "integer", "maximum": 77, "title": "t"}) is first
    other = SLMTokenizer(300)
    assert Grammar.json_schema(other, {"type": "integer", "maximum": 77}) is not first
    other.use_generation_config({"eos_token_id": 5})
    assert Grammar.json_schema(other, {"type": "integer"}).start().vocabulary.stops == [0, 3, 5]


class Foreign:
    def encode(self, text: str) -> list[int]:
        return [*text.encode()]

    def decode(self, ids: Any) -> str:
        return bytes(ids).decode()


REFUSED: dict[str, tuple[str, Any, str]] = {
    "unfinished": ("regex", "(a", "regex '(a': missing ), unterminated subpattern"),
    "look-ahead": ("regex", "(?=a)b", "regex: look-around, including look-ahead and look-behind, is not supported"),
    "look-behind": ("regex", "(?<!a)b", "look-around"),
    "group": ("regex", r"(a)\1", "backreferences are not supported"),
    "border": ("regex", r"a\b", "lookarounds not supported"),
    "anchor inside": ("regex", "a^b", "lookarounds not supported"),
    "sets": ("regex", "[a-z&&[bc]]", "libraries differ on"),
    "property": ("regex", r"\p{L}", "bad escape"),
    "deep": ("regex", "(" * 5000 + ")" * 5000, "regex"),
    "long": ("regex", "a" * 70_000, "regex of 70,009 characters: at most 65,536 are compiled"),
    "many": ("regex", "a{1000000}", "regex 'a{1000000}': its counts demand 1,000,000 characters: at most 10,000"),
    "many of many": ("regex", "[0-9]|(b(x{200}){1,9}y{3}){100}", "its counts demand 20,401"),
    "no text": ("regex", 3, "regex: expected a regular expression, found a whole number"),
    "no choice": ("choices", [], "choices: expected a list of one or more texts, found a list []"),
    "one text": ("choices", "yes", "choices: expected a list of one or more texts, found text 'yes'"),
    "empty": ("choices", ["a", ""], "choices: expected texts that are not empty, found ''"),
    "numbers": ("choices", ["a", 1], "choices: expected texts that are not empty, found 1"),
    "surrogate": ("choices", ["\ud800"], "choices"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_constraint_is_one_line(name: str) -> None:
    kind, value, said = REFUSED[name]
    assert said in refusal(lambda: getattr(Grammar, kind)(BYTE_LEVEL, value))


def test_a_vocabulary_that_cannot_spell_it(tmp_path: Path) -> None:
    tokenizer = tokenizer_of("unigram-unknown", tmp_path)
    assert "'€' cannot be spelled with the tokens" in refusal(lambda: Grammar.choices(tokenizer, ["the cat", "€"]))
    assert walk(Grammar.choices(tokenizer, ["the cat"]), tokenizer, 0) == "the cat"
    assert "regex" in refusal(lambda: Grammar.regex(tokenizer, "€"))


def test_a_row_whose_text_cannot_go_on_ends_with_an_error_and_the_others_go_on(tmp_path: Path) -> None:
    tokenizer = tokenizer_of("unigram-unknown", tmp_path)
    decoder = build_decoder(tiny(vocab_size=len(tokenizer) + 31, initializer_range=0.3), seed=1).eval()
    engine = Engine(decoder, tokenizer)
    for pattern in ("the€", "[a-z]{40}", "(the )?cat"):
        engine.insert(Request([5], 50, SamplingSettings(seed=3), grammar=Grammar.regex(tokenizer, pattern)))
    texts, ends = ["", "", ""], dict[int, str]()
    while engine.is_busy:
        for event in engine.step():
            texts[event.handle] += event.text
            ends[event.handle] = event.error or str(event.finish_reason)
    assert ends[0].startswith("no token is left to choose from")
    assert (ends[1], ends[2]) == ("stop", "stop")
    assert texts[0] == "the"
    assert re.fullmatch("[a-z]{40}", texts[1])
    assert texts[2] in ("the cat", "cat")


@pytest.mark.parametrize("kind", ["wordpiece", "word-level", "unigram-first"])
def test_tokens_that_are_not_the_text_in_a_row_are_refused(kind: str, tmp_path: Path) -> None:
    assert "not the bytes of its tokens in a row" in refusal(lambda: Grammar.json_object(tokenizer_of(kind, tmp_path)))


def test_a_tokenizer_without_bytes_is_refused() -> None:
    assert "needs the bytes of each token, which Foreign does not tell" in refusal(
        lambda: Grammar.regex(Foreign(), "a")
    )


def test_without_the_library_one_line_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "llguidance", None)
    tokenizer = SLMTokenizer(300)
    assert "pip install slmkit[constrain]" in refusal(lambda: Grammar.json_object(tokenizer))
    assert "pip install slmkit[constrain]" in refusal(lambda: Grammar.regex(tokenizer, "a"))
