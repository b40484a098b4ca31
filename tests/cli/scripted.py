"""Models that say what a test wants: real ones, whose next token depends on the last one alone."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path

import torch

from slmkit.model.config import SLMConfig
from slmkit.model.files.directory import save_decoder
from slmkit.model.initialization import build_decoder
from slmkit.tokenizer import SLMTokenizer

BYTES = SLMTokenizer(260)


def save_scripted_model(folder: Path, *answers: Sequence[str], context: int = 4096, ends: bool = True) -> None:
    """A model that answers any message with one of the answers, equally likely. Each part of an answer is a token, so
    no part may occur twice. Without `ends` an answer begins again after its last part.
    """
    parts = list(dict.fromkeys(itertools.chain(*answers)))
    tokenizer = BYTES.extended(added_tokens=parts)
    ids = {part: len(tokenizer) - len(parts) + number for number, part in enumerate(parts)}
    assert all(tokenizer.decode([ids[part]]) == part for part in parts)
    width = len(tokenizer) + len(tokenizer) % 2
    config = SLMConfig(
        vocab_size=len(tokenizer), hidden_size=width, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1,
        max_position_embeddings=context, tie_word_embeddings=False,
    )  # fmt: skip
    decoder = build_decoder(config, seed=0)
    weights = dict(decoder.named_parameters())
    with torch.no_grad():
        for name in ("blocks.0.attention.out.weight", "blocks.0.mlp.down.weight", "head.weight"):
            weights[name].zero_()
        weights["embedding.weight"].copy_(torch.eye(len(tokenizer), width))
        begin = tokenizer.encode_chat([{"role": "user", "content": "?"}], add_generation_prompt=True).ids[-1]
        for answer in answers:
            row = [begin, *(ids[part] for part in answer), tokenizer.end_of_turn_id if ends else ids[answer[0]]]
            for last, following in itertools.pairwise(row):
                weights["head.weight"][following, last] = 5.0
    save_decoder(decoder, config, folder)
    tokenizer.save_pretrained(folder)
