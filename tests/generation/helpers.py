"""A model small enough for every test, a tokenizer that is only what the protocol asks for, and a script to speak."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import pytest
import torch

from slmkit.generation import generator
from slmkit.generation.ensemble import LanguageModel
from slmkit.generation.text import TextStream, TextTokenizer
from slmkit.model.config import SLMConfig
from slmkit.model.decoder import Decoder
from slmkit.model.initialization import build_decoder
from slmkit.tokenizer import SLMTokenizer

TOKENIZER = SLMTokenizer(260)


def byte_decoder(context: int = 128) -> Decoder:
    """Untrained, with a token for each byte; weights large enough for it to say something definite."""
    config = SLMConfig(
        vocab_size=260, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=context, initializer_range=0.3,
    )  # fmt: skip
    return build_decoder(config, seed=1).eval()


class ByteTokens:
    """A tokenizer with `encode` and `decode` alone, whose tokens are any byte strings."""

    def __init__(self, tokens: Sequence[bytes]) -> None:
        self.tokens = list(tokens)

    def encode(self, text: str) -> list[int]:
        return [self.tokens.index(bytes([byte])) for byte in text.encode()]

    def decode(self, ids: Sequence[int]) -> str:
        return b"".join(self.tokens[index] for index in ids).decode("utf-8", "replace")


class Continuation:
    """A text that was streamed to its end."""

    def __init__(self, stream: TextStream) -> None:
        self.text = "".join(stream)
        self.tokens, self.finish_reason = stream.tokens, stream.finish_reason


def complete(decoder: LanguageModel, tokenizer: TextTokenizer, prompt: str, **options: object) -> Continuation:
    return Continuation(TextStream(decoder, tokenizer, prompt, **options))


def make_models_say(ids: Sequence[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever model is asked in this test generates exactly `ids`."""

    def steps(
        decoder: Decoder, prompt_ids: torch.Tensor, count: int, settings: object, known: object = None
    ) -> Iterator[torch.Tensor]:
        yield from (torch.tensor([token]) for token in ids[:count])

    monkeypatch.setattr(generator, "token_steps", steps)
