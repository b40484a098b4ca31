"""The arithmetic of sizes is what is counted."""

from __future__ import annotations

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from slmkit.model import attend
from slmkit.model.architectures import architecture_of
from slmkit.model.config import PRESETS, SLMConfig
from slmkit.model.decoder import Decoder
from slmkit.model.initialization import build_decoder
from slmkit.model.sizes import cache_size, cache_variants, flops_per_token, parameter_count, parameters_by_module
from tests.model.test_cache import FAMILIES, SIZES, config

PUBLISHED = {
    "gpt2": 124_439_808,
    "llama-3.2-1b": 1_235_814_400,
    "gemma-3-270m": 268_098_176,
    "qwen3-0.6b": 596_049_920,
    "smollm2-135m": 134_515_008,
}
OPTIONS = [
    {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": False},
    {"qk_norm": "head", "norm": "layer", "norm_at": "both", "gated_mlp": False, "mlp_bias": True},
    {"qk_norm": "width", "norm_at": "post", "num_key_value_heads": 2, "head_dim": 10},
]
WIDE = {"hidden_size": 128, "intermediate_size": 256, "vocab_size": 500, "num_attention_heads": 4}


def architectures() -> list[SLMConfig]:
    by_option = [SLMConfig(model_type="slm", hidden_size=32, num_attention_heads=4, **option) for option in OPTIONS]
    return [config(family) for family in FAMILIES] + by_option


@pytest.mark.parametrize("c", architectures(), ids=lambda c: c.model_type)
def test_parameters_are_counted_exactly(c: SLMConfig) -> None:
    a, decoder = architecture_of(c), build_decoder(c)
    assert parameter_count(a) == sum(p.numel() for p in decoder.parameters()) == sum(parameters_by_module(a).values())
    sizes = {name: parameter.numel() for name, parameter in decoder.named_parameters()}
    assert parameters_by_module(a)["attention"] == sum(sizes[name] for name in sizes if ".attention." in name)
    norms = [name for name in sizes if name.startswith("norm.") or "attention_" in name or "mlp_" in name]
    assert parameters_by_module(a)["norms"] == sum(sizes[name] for name in norms)


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_have_their_published_size(preset: str) -> None:
    a = architecture_of(SLMConfig.from_preset(preset))
    assert parameter_count(a) == PUBLISHED.get(preset, parameter_count(a))


@pytest.mark.parametrize("family", FAMILIES)
def test_operations_are_those_that_pytorch_counts(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Attention over all keys, as is usual; blocks of queries on a CPU leave out most of the masked ones."""
    monkeypatch.setattr(attend, "LONGEST_IN_PRODUCTS", 0)
    rows, length = 2, 48
    c = SLMConfig(model_type=family, **SIZES | FAMILIES[family] | WIDE)
    decoder = build_decoder(c)
    ids = torch.randint(500, (rows, length))
    with sdpa_kernel(SDPBackend.MATH):
        with FlopCounterMode(display=False) as forward:
            loss = decoder.logits(decoder(ids)).sum()
        with FlopCounterMode(display=False) as backward:
            loss.backward()
    counted = flops_per_token(decoder.architecture, length)
    assert forward.get_total_flops() / (rows * length) == pytest.approx(counted.forward, rel=0.01)
    assert backward.get_total_flops() / (rows * length) == pytest.approx(counted.backward, rel=0.01)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("length", [3, 50])
def test_the_cache_takes_what_is_said(family: str, length: int) -> None:
    decoder = build_decoder(config(family))
    cache = decoder.new_cache(1, length, at_once=1)
    held = sum(tensor.numel() * tensor.element_size() for tensor in (*cache.keys, *cache.values))
    size = cache_size(decoder.architecture, length, bytes_per_number=4)
    assert size.at_length == held
    assert size.per_token * length <= held


def test_sharing_keys_and_values_shrinks_the_cache_in_proportion() -> None:
    a = architecture_of(SLMConfig.from_preset("llama-3.2-1b"))
    sizes = {name: cache_size(variant, 1).per_token for name, variant in cache_variants(a).items()}
    assert cache_size(a, 1).per_token == sizes["grouped, 4 queries a key"] == 16 * 2 * 8 * 64 * 2
    assert sizes["multi-head"] == 4 * sizes["grouped, 4 queries a key"] == 32 * sizes["multi-query"]


def test_counting_takes_no_memory() -> None:
    with torch.device("meta"):
        assert next(Decoder(architecture_of(SLMConfig.from_preset("gpt2"))).parameters()).device.type == "meta"
