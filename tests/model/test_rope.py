"""Rotations: the reference's numbers at every scaling, and what a rotation is."""

from __future__ import annotations

import pytest
import torch

from slmkit.config import UserError
from slmkit.model.architectures import architecture_of
from slmkit.model.config import SLMConfig
from slmkit.model.rope import Rope, Rotary, rotate

transformers = pytest.importorskip("transformers")

TRAINED = 8_192
READ = [8_192, 32_768, 131_072]
ORIGINAL = {"original_max_position_embeddings": TRAINED}


def scalings(factor: float) -> dict[str, dict]:
    return {
        "default": {"rope_type": "default"},
        "linear": {"rope_type": "linear", "factor": factor},
        "dynamic": {"rope_type": "dynamic", "factor": factor},
        "dynamic, original": {"rope_type": "dynamic", "factor": factor, "original_max_position_embeddings": 32},
        "yarn": {"rope_type": "yarn", "factor": factor} | ORIGINAL,
        "yarn, mscale": {"rope_type": "yarn", "factor": factor, "mscale": 0.7, "mscale_all_dim": 1.2} | ORIGINAL,
        "llama3": {"rope_type": "llama3", "factor": factor, "low_freq_factor": 1.0, "high_freq_factor": 4.0} | ORIGINAL,
    }


@pytest.mark.parametrize("length", READ)
@pytest.mark.parametrize("kind", scalings(1))
def test_angles_at_8k_32k_and_128k_are_the_references(kind: str, length: int) -> None:
    parameters = scalings(length / TRAINED)[kind] | {"rope_theta": 500_000.0}
    shape = {"hidden_size": 256, "num_attention_heads": 4}
    positions = TRAINED if kind.startswith("dynamic") else length
    theirs = transformers.LlamaConfig(max_position_embeddings=positions, rope_parameters=dict(parameters), **shape)
    rotary = transformers.models.llama.modeling_llama.LlamaRotaryEmbedding(theirs)
    architecture = architecture_of(SLMConfig(max_position_embeddings=positions, rope_parameters=parameters, **shape))
    rope = architecture.layers[0].rope
    assert rope is not None
    assert architecture.max_positions == length
    where = torch.cat((torch.arange(0, length, 997), torch.tensor([length - 1])))[None]
    cosines, sines = Rotary(rope)(where, torch.tensor([length]))
    expected_cosines, expected_sines = rotary(torch.zeros(1), where)
    # An angle of 131,072 radians has lost six binary digits in float32, here as there.
    torch.testing.assert_close(cosines[:, 0], expected_cosines, rtol=0, atol=1e-5)
    torch.testing.assert_close(sines[:, 0], expected_sines, rtol=0, atol=1e-5)


def test_a_rotation_keeps_lengths_and_products_depend_on_distance_alone() -> None:
    rotary = Rotary(Rope(theta=100.0, dim=8))
    q, k = torch.randn(2, 1, 1, 1, 8, generator=torch.Generator().manual_seed(0))

    def turned(x: torch.Tensor, position: int) -> torch.Tensor:
        return rotate(x, rotary(torch.tensor([[position]]), torch.tensor([position + 1])))

    torch.testing.assert_close(turned(q, 70).norm(), q.norm())
    torch.testing.assert_close((turned(q, 9) * turned(k, 4)).sum(), (turned(q, 105) * turned(k, 100)).sum())
    assert not torch.allclose((turned(q, 9) * turned(k, 4)).sum(), (turned(q, 9) * turned(k, 5)).sum())


@pytest.mark.parametrize(
    ("parameters", "words"),
    [
        ({"rope_type": "spiral"}, "rope_type 'spiral' is not supported; known: default, dynamic"),
        ({"rope_type": "linear"}, "factor None; expected a number of 1 or more"),
        ({"rope_type": "llama3", "factor": 8.0}, "low_freq_factor is missing"),
        ({"rope_type": "linear", "factor": 2.0, "facto": 1}, "unknown key 'facto'; did you mean 'factor'"),
    ],
)
def test_rope_parameters_that_make_no_rotation_are_refused(parameters: dict, words: str) -> None:
    with pytest.raises(UserError, match=words):
        architecture_of(SLMConfig(rope_parameters=parameters))
