"""Weight for weight the same as the reference implementation, in both directions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from slmkit.model.config import SLMConfig
from slmkit.model.decoder import Decoder
from slmkit.model.files.directory import load_decoder, save_decoder
from slmkit.model.initialization import build_decoder
from tests.model.test_decoder import tiny

transformers = pytest.importorskip("transformers")

LLAMA3_ROPE = {
    "rope_type": "llama3", "rope_theta": 500_000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}  # fmt: skip
SHAPES: dict[str, dict[str, Any]] = {
    "grouped heads, tied": {},
    "all heads, untied": {"num_key_value_heads": 4, "tie_word_embeddings": False},
    "one key-value head": {"num_key_value_heads": 1},
    "biases": {"attention_bias": True, "mlp_bias": True},
    "wide heads": {"head_dim": 16},
    "other base and eps": {
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
        "rms_norm_eps": 1e-2,
    },
    "llama 3 rope": {"rope_parameters": LLAMA3_ROPE},
    "gelu": {"hidden_act": "gelu_pytorch_tanh"},
}


def reference(directory: Path) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()


def input_ids() -> torch.Tensor:
    return torch.randint(97, (3, 40), generator=torch.Generator().manual_seed(0))


def largest_difference(ours: Decoder, theirs: Any) -> float:
    with torch.no_grad():
        return (ours.logits(ours(input_ids())) - theirs(input_ids()).logits).abs().max().item()


def randomised(config: SLMConfig) -> Decoder:
    """Weights in which norms and biases matter as well."""
    decoder = build_decoder(config, seed=2).eval()
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in decoder.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return decoder


@pytest.mark.parametrize("shape", SHAPES)
def test_transformers_computes_the_logits_we_compute(shape: str, tmp_path: Path) -> None:
    config = tiny(**SHAPES[shape])
    ours = randomised(config)
    save_decoder(ours, config, tmp_path)
    assert largest_difference(ours, reference(tmp_path)) <= 1e-4


@pytest.mark.parametrize("shape", SHAPES)
def test_we_compute_the_logits_of_what_transformers_saves(shape: str, tmp_path: Path) -> None:
    config = tiny(**SHAPES[shape])
    save_decoder(randomised(config), config, tmp_path / "ours")
    theirs = reference(tmp_path / "ours")
    theirs.save_pretrained(tmp_path / "theirs")
    ours, _ = load_decoder(tmp_path / "theirs")
    assert largest_difference(ours, theirs) <= 1e-4


# Wrong readings of the architecture: were one of these not to change the logits, the tests above could not fail.
WRONG_READINGS: dict[str, dict[str, Any]] = {
    "another RoPE base": {"rope_parameters": {"rope_type": "default", "rope_theta": 20_000.0}},
    "llama 3's stretch left out": {"rope_parameters": {"rope_type": "default", "rope_theta": 500_000.0}},
    "another eps": {"rms_norm_eps": 1e-2},
    "another activation": {"hidden_act": "gelu"},
}


@pytest.mark.parametrize("reading", WRONG_READINGS)
def test_a_wrong_reading_of_the_config_would_be_noticed(reading: str, tmp_path: Path) -> None:
    right = tiny(**(SHAPES["llama 3 rope"] if "llama 3" in reading else {}))
    ours = randomised(right)
    save_decoder(ours, right, tmp_path)
    mutant = Decoder(build_decoder(right.model_copy(update=WRONG_READINGS[reading])).architecture).eval()
    mutant.load_state_dict(ours.state_dict())
    assert largest_difference(mutant, reference(tmp_path)) > 1e-3


@pytest.mark.parametrize("module", ["attention_in", "mlp_in"])
def test_a_norm_left_out_would_be_noticed(module: str, tmp_path: Path) -> None:
    ours = randomised(tiny())
    save_decoder(ours, tiny(), tmp_path)
    setattr(ours.blocks[1], module, torch.nn.Identity())
    assert largest_difference(ours, reference(tmp_path)) > 1e-3


def test_the_biggest_preset_has_the_size_of_the_published_model() -> None:
    with torch.device("meta"):
        decoder = Decoder(build_decoder_architecture("llama-3.2-1b"))
    assert sum(p.numel() for p in decoder.parameters()) == 1_235_814_400


def build_decoder_architecture(preset: str) -> Any:
    from slmkit.model.architectures import architecture_of

    return architecture_of(SLMConfig.from_preset(preset))
