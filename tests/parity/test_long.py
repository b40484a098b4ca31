"""A model of 8,192 positions, read past them with each scaling, computes what the reference computes.

10,000 tokens in the ordinary suite; `make test-long` reads 32,768 and 131,072, which takes half an hour on two cores.
"""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("transformers")

from tests.long import several
from tests.model.test_rope import TRAINED, scalings
from tests.parity.configurations import VOCAB
from tests.parity.twins import BEFORE_5, text, twins_of

LENGTHS = several([10_000], [32_768, 131_072])
SHAPE = {
    "vocab_size": VOCAB, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 1,
    "num_key_value_heads": 1, "head_dim": 16, "bos_token_id": None, "eos_token_id": None, "pad_token_id": None,
}  # fmt: skip


@pytest.mark.skipif(BEFORE_5, reason="the older reference is read in eager attention, which holds every score")
@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("kind", scalings(1))
def test_logits_past_the_trained_length(kind: str, length: int) -> None:
    rope = scalings(length / TRAINED)[kind] | {"rope_theta": 500_000.0}
    positions = TRAINED if kind == "dynamic" else length
    pair = twins_of("Llama", SHAPE | {"max_position_embeddings": positions, "rope_parameters": rope})
    pair.theirs.set_attn_implementation("sdpa")
    ids = text(1, length)
    with torch.no_grad():
        ours, theirs = pair.ours.logits(pair.ours(ids)), pair.theirs(ids).logits
    assert (ours - theirs).abs().max() <= 1e-4
