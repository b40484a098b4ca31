"""A model small enough for every test, a tokenizer that is only what the protocol asks for, and a script to speak."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from slmkit.generation import engine
from slmkit.generation.ensemble import LanguageModel
from slmkit.generation.generator import TextStream
from slmkit.generation.text import TextTokenizer
from slmkit.model.cache import KVCache
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


LENDER = byte_decoder()  # of caches


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


class ScriptedModel(nn.Module):
    """Says `ids` after a prompt of `prompt` tokens: the logit of the next one is the largest, by `margin`.

    `bias` [vocab_size] is added to the logits everywhere.
    """

    def __init__(self, vocab_size: int, prompt: int, ids: Sequence[int], context: int = 4096) -> None:
        super().__init__()
        self.vocab_size, self.max_positions, self.ropes, self.script = vocab_size, context, (), [0] * (prompt - 1)
        self.script += [*ids, *[0] * context]
        self.bias, self.margin, self.device = torch.zeros(vocab_size), 50.0, torch.device("cpu")
        self.eval()
        self.forwards = 0

    def new_cache(self, slots: int, max_length: int, at_once: int) -> KVCache:
        return LENDER.new_cache(slots, max_length, at_once)

    def cache_bytes(self, slots: int, max_length: int, at_once: int) -> int:
        return slots * max_length

    def forward(self, ids: Tensor, cache: KVCache) -> Tensor:
        """ids [rows, new] → the positions of the next tokens, as hidden states [rows, new, 1]."""
        self.forwards += 1
        positions = torch.from_numpy(cache.lengths[:, None] + np.arange(ids.size(1)))
        cache.lengths += ids.size(1)
        return positions[..., None].float()

    def logits(self, hidden: Tensor) -> Tensor:
        said = torch.tensor([self.script[int(place)] for place in hidden.flatten()]).view(hidden.shape[:-1])
        return self.margin * F.one_hot(said, self.vocab_size).float() + self.bias


def make_models_say(ids: Sequence[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever decoder is asked in this test generates exactly `ids` after its prompt."""
    forward = Decoder.forward

    def script(decoder: Decoder, hidden: Tensor) -> Tensor:
        said, decoder.said = ids[decoder.said] if decoder.said < len(ids) else 0, decoder.said + 1
        return 50.0 * F.one_hot(torch.full(hidden.shape[:-1], said), decoder.vocab_size).float()

    def begin(decoder: Decoder, x: Tensor, cache: KVCache | None = None, **rest: object) -> Tensor:
        if cache is not None and (x.size(1) > 1 or int(cache.lengths.max()) == 0):
            decoder.said = 0
        return forward(decoder, x, cache, **rest)

    monkeypatch.setattr(engine, "for_decoding", lambda decoder: decoder)
    monkeypatch.setattr(Decoder, "said", 0, raising=False)  # where all of the prompt but a token is known
    monkeypatch.setattr(Decoder, "forward", begin)
    monkeypatch.setattr(Decoder, "logits", script)
