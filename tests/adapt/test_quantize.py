"""Codes and scales, and the modules that hold them."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from slmkit.adapt.adapter import trained_tensors
from slmkit.adapt.lora import add_lora, fold
from slmkit.adapt.quantize import (
    LARGEST,
    QuantizedEmbedding,
    QuantizedLinear,
    encode,
    quantized_modules,
    round_to,
    rounded,
    to_quantize,
    unpack,
)  # fmt: skip
from slmkit.config import UserError
from slmkit.model.config import SLMConfig
from slmkit.model.decoder import Decoder, Embedding
from slmkit.model.files.adapter_directory import LoRASettings
from slmkit.model.initialization import build_decoder
from slmkit.model.kernels import GROUPS, NF4, dequantize
from tests.model.test_cache import FAMILIES, config, ids

every_kind = pytest.mark.parametrize("kind", LARGEST)
every_group = pytest.mark.parametrize("group", GROUPS)


def decode(codes: torch.Tensor, scales: torch.Tensor, kind: str) -> torch.Tensor:
    return dequantize(kind, codes, scales, codes.size(1) * (1 if kind == "int8" else 2) // scales.size(1))


def weights(rows: int = 24, columns: int = 256) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(0)) * 0.1


@every_kind
@every_group
def test_no_weight_is_further_from_its_code_than_half_a_step(kind: str, group: int) -> None:
    weight = weights()
    codes, scales = encode(weight, kind, group)
    assert codes.dtype == (torch.int8 if kind == "int8" else torch.uint8)
    assert codes.shape == (24, 256 if kind == "int8" else 128)
    assert scales.shape == (24, 256 // group)
    assert torch.equal(scales, scales.bfloat16().float())
    errors = (decode(codes, scales, kind) - weight).abs().unflatten(1, (-1, group)) / scales[..., None]
    largest = (weight.unflatten(1, (-1, group)).abs() / scales[..., None]).amax(-1)
    step = NF4.diff().max() if kind == "nf4" else torch.tensor(1.0)
    # Beyond the last code a weight is clipped: int4's largest may be, for the sake of all others.
    clipped = (largest - LARGEST[kind]).clamp(min=0)
    assert (errors.amax(-1) <= torch.maximum(step / 2, clipped) + 1e-3).all()
    assert clipped.max() < {"int8": 0.6, "int4": 4, "nf4": 0.01}[kind]


def test_bytes_are_where_the_kernels_expect_them() -> None:
    weight = torch.zeros(1, 64)
    weight[0, 0], weight[0, 16], weight[0, 33] = -7.0, 7.0, 7.0  # groups of 32: 0 … 31, 32 … 63
    codes, scales = encode(weight, "int4", 32)
    assert scales.tolist() == [[1.0, 1.0]]
    assert codes[0, 0] == 1 | 15 << 4  # value 0 in the low nibble, value 0 + 32 / 2 in the high one
    assert codes[0, 17] == 15 | 8 << 4
    assert unpack(codes, 2, "int4").flatten().tolist() == [int(value) + 8 for value in weight[0].tolist()]
    codes, scales = encode(weight, "int8", 32)
    assert codes[0, 0] == -127
    assert scales[0, 0] == pytest.approx(7 / 127, rel=2**-8)


def test_a_smaller_step_is_taken_where_it_is_nearer_to_all_weights() -> None:
    weight = weights()
    weight[:, 0] = 0.5
    codes, scales = encode(weight, "int4", 64)
    step = (weight.unflatten(1, (-1, 64)).abs().amax(-1, keepdim=True) / 7).bfloat16().float()
    plain = (weight.unflatten(1, (-1, 64)) / step).round().clamp(-8, 7) * step
    assert (decode(codes, scales, "int4") - weight).square().sum() < 0.95 * (plain.flatten(1) - weight).square().sum()


@every_kind
def test_zeros_and_tiny_numbers_stay_finite(kind: str) -> None:
    for weight in (torch.zeros(2, 64), torch.full((2, 64), 1e-30)):
        back = decode(*encode(weight, kind, 32), kind)
        assert back.isfinite().all()
        assert (back - weight).abs().max() <= 1e-30


def test_nf4_is_the_reference_implementations() -> None:
    functional = pytest.importorskip("bitsandbytes.functional")
    weight = weights()
    weight *= 2 ** torch.randn(24, 1).round()  # so that scales differ
    scales = weight.unflatten(1, (-1, 64)).abs().amax(-1)
    weight *= (scales.bfloat16().float() / scales).repeat_interleave(64, 1)  # theirs are not rounded
    packed, state = functional.quantize_4bit(weight, blocksize=64, quant_type="nf4")
    torch.testing.assert_close(decode(*encode(weight, "nf4", 64), "nf4"), functional.dequantize_4bit(packed, state))


@every_kind
def test_products_and_gradients_are_those_of_the_dequantized_matrix(kind: str) -> None:
    linear = torch.nn.Linear(64, 48)
    quantized = rounded(linear, kind, 32)
    assert isinstance(quantized, QuantizedLinear)
    assert (quantized.in_features, quantized.out_features, quantized.group) == (64, 48, 32)
    for shape in ((64,), (3, 64), (2, 40, 64)):
        x = torch.randn(shape, requires_grad=True)
        y = quantized(x)
        torch.testing.assert_close(y, F.linear(x, quantized.weight, linear.bias), atol=1e-4, rtol=1e-3)
        y.sum().backward()
        torch.testing.assert_close(x.grad, quantized.weight.sum(0).expand(shape), atol=1e-4, rtol=1e-5)
    with torch.autocast("cpu", torch.bfloat16):
        assert quantized(x).dtype == torch.bfloat16
    assert not [name for name, parameter in quantized.named_parameters() if parameter.requires_grad]


@every_kind
def test_an_embedding_looks_up_and_is_a_tied_head(kind: str) -> None:
    embedding = Embedding(97, 64)
    quantized = rounded(embedding, kind, 32)
    assert isinstance(quantized, QuantizedEmbedding)
    x = torch.tensor([[3, 96, 0]])
    assert torch.equal(quantized(x), quantized.weight[x])
    hidden = torch.randn(2, 5, 64)
    torch.testing.assert_close(quantized.project(hidden), F.linear(hidden, quantized.weight), atol=2e-3, rtol=0)


@every_kind
def test_a_conversion_to_16_bits_leaves_scales_as_they_are(kind: str) -> None:
    decoder = small()
    round_to(decoder, to_quantize(decoder, kind, 32, "int8"), 32)
    before = {name: module.weight for name, module in quantized_modules(decoder).items()}
    decoder.bfloat16()
    for name, module in quantized_modules(decoder).items():
        assert module.scales.dtype == torch.float32
        assert torch.equal(module.weight, before[name])
    assert decoder.logits(decoder(ids())).dtype == torch.bfloat16


def small(**changes: object) -> Decoder:
    shape = {
        "vocab_size": 97, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 2,
        "max_position_embeddings": 64, "initializer_range": 0.3,
    }  # fmt: skip
    return build_decoder(SLMConfig(**(shape | changes)), seed=0).eval()


@pytest.mark.parametrize("family", FAMILIES)
@every_kind
def test_every_family_computes_nearly_the_same(family: str, kind: str) -> None:
    full, decoder = (build_decoder(config(family), seed=3).eval() for _ in range(2))
    chosen = to_quantize(decoder, kind, 32, "int8")
    round_to(decoder, chosen, 32)
    assert quantized_modules(decoder).keys() == chosen.keys()
    assert len(chosen) >= 4 * len(decoder.blocks)
    with torch.no_grad():
        logits, wanted = (one.logits(one(ids())) for one in (decoder, full))
        cache = decoder.new_cache(2, 40)
        steps = torch.cat([decoder.logits(decoder(part, cache)) for part in ids().split([30, 1, 1, 8], dim=1)], dim=1)
    assert (logits - wanted).std() < {"int8": 0.05, "int4": 0.5, "nf4": 0.5}[kind] * wanted.std()
    # A few rows are multiplied with activations of 16 bits.
    torch.testing.assert_close(steps, logits, atol=1e-3 * float(logits.abs().max()), rtol=0)


def test_what_is_quantized_depends_on_format_and_shape() -> None:
    tied, own = small(), small(tie_word_embeddings=False)
    layers = dict.fromkeys((name for name in to_quantize(tied, "int4", 32, "bfloat16")), "int4")
    assert len(layers) == 14
    assert to_quantize(tied, "int4", 32, "bfloat16") == layers
    assert to_quantize(tied, "int4", 32, "int8") == layers | {"embedding": "int8"}
    assert to_quantize(own, "int4", 32, "bfloat16") == layers | {"head": "int8"}
    assert to_quantize(own, "nf4", 32, "bfloat16") == dict.fromkeys(layers, "nf4")
    assert to_quantize(own, "nf4", 32, "int8") == dict.fromkeys(layers, "nf4") | {"head": "int8", "embedding": "int8"}
    # 96 columns are no multiple of 64: those of the MLP's second matrix stay in 16 bits.
    assert "blocks.0.mlp.down" not in to_quantize(tied, "int4", 64, "bfloat16")
    with pytest.raises(UserError, match="no matrix can be quantized in groups of 128: .*--group is one of 32, 64, 128"):
        to_quantize(tied, "int4", 128, "bfloat16")


@every_kind
def test_an_adapter_learns_on_top(kind: str) -> None:
    shape = config("llama")
    decoder = build_decoder(shape)
    round_to(decoder, to_quantize(decoder, kind, 32, "bfloat16"), 32)
    before = {name: tensor.clone() for name, tensor in decoder.state_dict().items()}
    add_lora(decoder, shape, LoRASettings(r=4))
    assert all(".lora_" in name for name in trained_tensors(decoder))
    optimizer = torch.optim.AdamW(trained_tensors(decoder).values(), lr=3e-2)
    losses = []
    for _ in range(12):
        loss = F.cross_entropy(decoder.logits(decoder(ids()))[:, :-1].flatten(0, 1), ids()[:, 1:].flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.5
    after = {name.replace(".base.", "."): tensor for name, tensor in decoder.state_dict().items()}
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    with pytest.raises(UserError, match=f"stored in {kind}, which is too coarse"):
        fold(decoder)
    fresh = build_decoder(shape)
    round_to(fresh, to_quantize(fresh, kind, 32, "bfloat16"), 32)
    with pytest.raises(UserError, match="lora.base_weights nf4: its weights are quantized"):
        add_lora(fresh, shape, LoRASettings(r=4, base_weights="nf4"))


@every_kind
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_no_conversion_rounds_scales(kind: str, dtype: torch.dtype) -> None:
    """Not even those that neither float16 nor bfloat16 can hold."""
    quantized = rounded(torch.nn.Linear(64, 8), kind, 32)
    quantized.scales.mul_(1.2345e-6)
    scales = quantized.scales.clone()
    assert torch.equal(quantized.to(dtype).scales, scales)
    assert quantized.bias.dtype == dtype


@every_kind
def test_replaced_codes_and_changed_biases_count(kind: str) -> None:
    quantized, other = (rounded(torch.nn.Linear(64, 8), kind, 32) for _ in range(2))
    x = torch.randn(3, 64)
    assert not torch.equal(quantized(x), other(x))
    quantized.load_state_dict(other.state_dict(), assign=True)
    assert torch.equal(quantized(x), other(x))
    quantized.bfloat16()
    before = quantized(x)
    with torch.no_grad():
        quantized.bias.add_(5)
    assert (quantized(x) - before - 5).abs().max() <= 0.05


def test_a_quantized_embedding_gives_rows_of_the_models_precision() -> None:
    module = rounded(torch.nn.Embedding(10, 64).bfloat16(), "int8", 32)
    assert module(torch.tensor([[1, 2]])).dtype == torch.bfloat16
    assert module.scales.dtype == torch.float32
