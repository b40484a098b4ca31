"""Streamed text: whole characters, no stop strings, and together exactly what was generated."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from slmkit.generation import SamplingSettings, complete, stream_completion
from slmkit.generation import text as text_module
from slmkit.generation.text import TextStream
from slmkit.model import SLMConfig, build_decoder
from slmkit.model.decoder import Decoder
from slmkit.tokenizer import SLMTokenizer

TOKENIZER = SLMTokenizer(260)


@pytest.fixture(scope="module")
def decoder() -> Decoder:
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    return build_decoder(SLMConfig(vocab_size=260, max_position_embeddings=128, initializer_range=0.3, **shape), seed=1)


def stream_of(
    said: bytes, decoder: Decoder, monkeypatch: pytest.MonkeyPatch, stop: list[str], end: bool = False
) -> TextStream:
    """A stream whose model says exactly these bytes, one token each."""

    def steps(*arguments: object) -> Iterator[torch.Tensor]:
        yield from (torch.tensor([i]) for i in TOKENIZER.encode_bytes(said))
        if end:
            yield torch.tensor([TOKENIZER.end_of_turn_id])
            yield torch.tensor([TOKENIZER.encode("x")[0]])

    monkeypatch.setattr(text_module, "token_steps", steps)
    return TextStream(decoder, TOKENIZER, [0], SamplingSettings(), 100, stop)


@pytest.mark.parametrize(
    ("said", "stop", "expected"),
    [
        ("no stop here", [], "no stop here"),
        ("one. Two", [". "], "one"),
        ("ab", ["abc"], "ab"),  # held back to the end, then shown
        ("aabc!", ["abc"], "a"),
        ("xxSTOP", ["STOPS", "STOP"], "xx"),
        ("über 🦊 fox", ["🦊"], "über "),
        ("STOP", ["STOP"], ""),
        ("a\nb", ["\n\n"], "a\nb"),
    ],
)
def test_nothing_of_a_stop_string_is_ever_shown(
    said: str, stop: list[str], expected: str, decoder: Decoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    stream = stream_of(said.encode(), decoder, monkeypatch, stop)
    pieces = list(stream)
    assert "".join(pieces) == expected
    assert all(pieces)
    assert stream.finish_reason == ("stop" if expected != said else "length")


def test_a_character_of_several_tokens_comes_whole(decoder: Decoder, monkeypatch: pytest.MonkeyPatch) -> None:
    assert list(stream_of("aé🦊".encode(), decoder, monkeypatch, [])) == ["a", "é", "🦊"]


def test_bytes_that_never_become_a_character_are_shown_as_such(
    decoder: Decoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "".join(stream_of(b"a\xf0\x9f", decoder, monkeypatch, [])) == "a\ufffd"


def test_an_end_token_ends_it_and_is_not_shown(decoder: Decoder, monkeypatch: pytest.MonkeyPatch) -> None:
    stream = stream_of(b"done", decoder, monkeypatch, [], end=True)
    assert "".join(stream) == "done"
    assert (stream.finish_reason, stream.tokens) == ("stop", 5)


@pytest.mark.parametrize("prompt", ["", "Once", "naïve 🦊"])
def test_the_pieces_together_are_the_whole(prompt: str, decoder: Decoder) -> None:
    settings = SamplingSettings(seed=2)
    stream = stream_completion(decoder, TOKENIZER, prompt, settings=settings, max_new_tokens=60)
    whole = complete(decoder, TOKENIZER, prompt, settings=settings, max_new_tokens=60)
    assert "".join(stream) == whole.text
    assert whole.tokens <= 60
    assert whole.text


def test_a_stop_string_cuts_what_would_have_been_said(decoder: Decoder) -> None:
    settings = SamplingSettings(seed=2)
    free = complete(decoder, TOKENIZER, "a", settings=settings, max_new_tokens=60).text
    stop = free[10:13]
    cut = complete(decoder, TOKENIZER, "a", settings=settings, max_new_tokens=60, stop=[stop])
    assert cut.text == free[: free.index(stop)]
    assert cut.finish_reason == "stop"
