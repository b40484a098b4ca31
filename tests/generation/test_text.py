"""Streamed text: whole characters, no stop strings, and together exactly what was generated."""

from __future__ import annotations

import pytest
import torch

from slmkit.config import UserError
from slmkit.generation.generator import TextStream, generate_ids
from slmkit.generation.sampling_settings import SamplingSettings
from slmkit.model.decoder import Decoder
from tests.generation.helpers import TOKENIZER, ByteTokens, byte_decoder, complete, make_models_say

SETTINGS = SamplingSettings(seed=2)


@pytest.fixture(scope="module")
def decoder() -> Decoder:
    return byte_decoder()


def stream(decoder: Decoder, stop: list[str] | None = None, max_new_tokens: int = 100) -> TextStream:
    return TextStream(decoder, TOKENIZER, [0], settings=SETTINGS, max_new_tokens=max_new_tokens, stop=stop or [])


@pytest.mark.parametrize(
    ("said", "stop", "expected"),
    [
        ("no stop here", [], "no stop here"),
        ("one. Two", [". "], "one"),
        ("ab", ["abc"], "ab"),  # held back to the end, then shown
        ("aabc!", ["abc"], "a"),
        ("xxSTOP", ["STOPS", "STOP"], "xx"),
        ("über 🦊 fox", ["🦊"], "über "),
        ("über 🦊é fox", ["🦊é"], "über "),
        ("STOP", ["STOP"], ""),
        ("a\nb", ["\n\n"], "a\nb"),
    ],
)
def test_nothing_of_a_stop_string_is_ever_shown(
    said: str, stop: list[str], expected: str, decoder: Decoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_models_say(TOKENIZER.encode(said), monkeypatch)
    text = stream(decoder, stop, max_new_tokens=len(said.encode()))
    pieces = list(text)
    assert "".join(pieces) == expected
    assert all(pieces)
    assert text.finish_reason == ("stop" if expected != said else "length")


def test_a_stop_string_ends_the_work_too(decoder: Decoder, monkeypatch: pytest.MonkeyPatch) -> None:
    make_models_say(TOKENIZER.encode("one. Two and more"), monkeypatch)
    text = stream(decoder, [". "])
    assert "".join(text) == "one"
    assert text.tokens == len("one. ")


def test_an_end_token_ends_it_and_is_not_shown(decoder: Decoder, monkeypatch: pytest.MonkeyPatch) -> None:
    make_models_say([*TOKENIZER.encode("done"), TOKENIZER.end_of_turn_id, *TOKENIZER.encode("x")], monkeypatch)
    text = stream(decoder)
    assert "".join(text) == "done"
    assert (text.finish_reason, text.tokens) == ("stop", 5)


def test_no_special_token_is_shown(decoder: Decoder, monkeypatch: pytest.MonkeyPatch) -> None:
    turn_start = TOKENIZER.special_tokens["<|im_start|>"]
    first, second = TOKENIZER.encode("é")
    make_models_say([turn_start, first, TOKENIZER.pad_token_id, second, turn_start], monkeypatch)
    assert list(stream(decoder, max_new_tokens=5)) == ["é"]


def test_the_reason_is_told_when_the_context_is_full(decoder: Decoder) -> None:
    full = complete(decoder, TOKENIZER, "a" * 120, settings=SETTINGS, max_new_tokens=100)
    assert (full.tokens, full.finish_reason) == (7, "context")


@pytest.mark.parametrize("stop", [[], ["e"], ["\x01\x02", "qu"]], ids=str)
@pytest.mark.parametrize("prompt", ["", "Once", "naïve 🦊"])
def test_the_pieces_together_are_what_was_generated(prompt: str, stop: list[str], decoder: Decoder) -> None:
    text = TextStream(decoder, TOKENIZER, prompt, settings=SETTINGS, max_new_tokens=60, stop=stop)
    whole = complete(decoder, TOKENIZER, prompt, settings=SETTINGS, max_new_tokens=60, stop=stop)
    assert "".join(text) == whole.text
    assert (text.tokens, text.finish_reason) == (whole.tokens, whole.finish_reason)
    if not stop:
        ids = torch.tensor([[TOKENIZER.eos_token_id, *TOKENIZER.encode(prompt)]])
        generated = generate_ids(
            decoder, ids, max_new_tokens=60, stop_ids=TOKENIZER.stop_token_ids, settings=SETTINGS, pad_token_id=1
        )
        assert whole.text == TOKENIZER.decode(generated[0, ids.size(1) :].tolist(), skip_special_tokens=True)


def test_a_stop_string_cuts_what_would_have_been_said(decoder: Decoder) -> None:
    free = complete(decoder, TOKENIZER, "a", settings=SETTINGS, max_new_tokens=60).text
    stop = free[10:13]
    cut = complete(decoder, TOKENIZER, "a", settings=SETTINGS, max_new_tokens=60, stop=[stop])
    assert cut.text == free[: free.index(stop)]
    assert cut.finish_reason == "stop"


def test_a_plain_text_begins_behind_an_end_of_text_token(decoder: Decoder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("slmkit.generation.engine.for_decoding", lambda decoder: decoder)
    prompts = []
    forward = decoder.forward
    monkeypatch.setattr(decoder, "forward", lambda ids, cache: prompts.append(ids.tolist()) or forward(ids, cache))
    for prompt in ("", "Once"):
        complete(decoder, TOKENIZER, prompt, settings=SETTINGS, max_new_tokens=1)
    assert prompts == [[[TOKENIZER.eos_token_id]], [[TOKENIZER.eos_token_id, *TOKENIZER.encode("Once")]]]


def test_encode_and_decode_are_all_a_tokenizer_needs(decoder: Decoder) -> None:
    plain = ByteTokens([bytes([number % 256]) for number in range(260)])
    settings = SamplingSettings(do_sample=False)
    whole = complete(decoder, plain, "Once", settings=settings, max_new_tokens=20)
    assert whole.tokens == 20
    assert whole.text
    with pytest.raises(UserError, match="an empty prompt"):
        complete(decoder, plain, "", settings=settings, max_new_tokens=20)


def test_a_wrong_prompt_is_refused_before_the_first_piece_is_asked_for(decoder: Decoder) -> None:
    with pytest.raises(UserError, match="context of 128"):
        TextStream(decoder, TOKENIZER, "x" * 200, settings=SETTINGS, max_new_tokens=5)
