"""A small model that has learned something: it reads bytes of the built-in stories."""

from __future__ import annotations

import functools
from pathlib import Path

import torch
from torch.nn import functional as F

from slmkit.data import stories
from slmkit.model.config import SLMConfig
from slmkit.model.decoder import Decoder
from slmkit.model.files.directory import save_decoder
from slmkit.model.initialization import build_decoder
from slmkit.tokenizer import SLMTokenizer

LENGTH = 128
TOKENIZER = SLMTokenizer(260)
SHAPE = SLMConfig(
    vocab_size=260, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2,
    max_position_embeddings=LENGTH,
)  # fmt: skip


def rows(seed: int, count: int) -> torch.Tensor:
    """Bytes of stories [count, length], by the ids of a tokenizer without merges."""
    text = "".join(story.text for story in stories.tell_many(seed, count // 2))
    return torch.tensor(TOKENIZER.encode(text)[: count * LENGTH]).view(count, LENGTH)


def loss(decoder: Decoder, ids: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(decoder.logits(decoder(ids)[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())


@functools.cache
def trained_decoder(steps: int = 120) -> Decoder:
    """Not to be changed by a test."""
    decoder, data = build_decoder(SHAPE, seed=0).train(), rows(1, 16 * steps)
    optimizer = torch.optim.AdamW(decoder.parameters(), lr=3e-3)
    for batch in data.split(16):
        loss(decoder, batch).backward()
        optimizer.step()
        optimizer.zero_grad()
    return decoder.eval()


def write_trained(directory: Path) -> Path:
    save_decoder(trained_decoder(), SHAPE, directory)
    TOKENIZER.save_pretrained(directory)
    return directory
