"""Models whose predictions are known exactly: uniform (U), and one that counts (P)."""

from __future__ import annotations

import math

import torch

from slmkit.model.config import SLMConfig
from slmkit.model.decoder import Decoder
from slmkit.model.initialization import build_decoder


def uniform(vocab_size: int, context: int = 64) -> Decoder:
    """Every next token has probability 1 / vocab_size."""
    decoder = _small(vocab_size, 32, context)
    torch.nn.init.zeros_(decoder.head_weight)
    return decoder


def counting(vocab_size: int, probability: float, context: int = 64) -> Decoder:
    """The id after the previous one (modulo vocab_size) has `probability`, the others share the rest equally.

    The embedding is the identity, the blocks add nothing, and the last norm scales a unit vector to √vocab_size.
    """
    width = vocab_size + vocab_size % 2
    decoder = _small(vocab_size, width, context)
    with torch.no_grad():
        for name, weight in decoder.blocks.named_parameters():
            if "norm" not in name:
                weight.zero_()
        decoder.embedding.weight.copy_(torch.eye(vocab_size, width))
        step = math.log(probability * (vocab_size - 1) / (1 - probability))  # the logit above the others'
        following = torch.eye(vocab_size, width).roll(1, 0)  # row (i + 1) has its one in column i
        decoder.head_weight.copy_(following * step / math.sqrt(width))
    return decoder


def _small(vocab_size: int, width: int, context: int) -> Decoder:
    return build_decoder(
        SLMConfig(
            vocab_size=vocab_size, hidden_size=width, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
            max_position_embeddings=context, tie_word_embeddings=False, rms_norm_eps=1e-12,
        )
    ).eval()  # fmt: skip
