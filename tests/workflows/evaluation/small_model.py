"""A small model directory whose every weight matters, with a tokenizer of bytes."""

from __future__ import annotations

from pathlib import Path

from slmkit.model.config import SLMConfig
from slmkit.model.files.directory import save_decoder
from slmkit.tokenizer import SLMTokenizer
from tests.parity.test_transformers import randomised

SHAPE = {
    "vocab_size": 260, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2,
    "max_position_embeddings": 256, "initializer_range": 0.2,
}  # fmt: skip


def write_model(directory: Path, **changes: int) -> Path:
    config = SLMConfig(**(SHAPE | changes))
    save_decoder(randomised(config), config, directory)
    SLMTokenizer(260).save_pretrained(directory)
    return directory
