"""A small model with a tokenizer and a chat template, for the tests of export."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import torch

from slmkit.data import stories
from slmkit.model.config import SLMConfig
from slmkit.model.decoder import Decoder
from slmkit.model.files.directory import save_decoder
from slmkit.model.initialization import build_decoder
from slmkit.tokenizer import SLMTokenizer

CONTEXT, ORIGINAL = 192, 64
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 10_000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": ORIGINAL,
}  # fmt: skip


@functools.cache
def small_tokenizer() -> SLMTokenizer:
    """Not to be changed by a test."""
    tokenizer = SLMTokenizer(400)
    tokenizer.train(story.text for story in stories.tell_many(0, 50))
    return tokenizer


def small_config(**changes: Any) -> SLMConfig:
    shape = {
        "vocab_size": 400, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": CONTEXT,
        "rope_parameters": LLAMA3, "initializer_range": 0.2,
    }  # fmt: skip
    return SLMConfig(**(shape | changes))


def write_small(directory: Path, **changes: Any) -> Path:
    """Random weights, large enough for order and positions to matter, norms too."""
    tokenizer = small_tokenizer()
    config = small_config(eos_token_id=[tokenizer.eos_token_id, tokenizer.end_of_turn_id], **changes)
    decoder, generator = build_decoder(config, seed=1), torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in decoder.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.3)
    save_decoder(decoder, config, directory)
    tokenizer.save_pretrained(directory)
    return directory


def loaded(directory: Path) -> tuple[Decoder, SLMTokenizer]:
    from slmkit.adapt.load import load_model

    return load_model(directory)[0], SLMTokenizer.from_pretrained(directory)
