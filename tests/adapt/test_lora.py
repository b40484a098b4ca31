"""LoRA's layers: what they compute, what of them is trained, and a base kept in fewer bits."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from slmkit.adapt.adapter import trained_tensors
from slmkit.adapt.lora import FORMATS, DoRALinear, FrozenLinear, LoRALinear, adapted_linears, add_lora, fold
from slmkit.config import UserError
from slmkit.model.config import SLMConfig
from slmkit.model.files.adapter_directory import LoRASettings
from slmkit.model.initialization import build_decoder
from tests.adapt.helpers import FAMILIES, KINDS, adapted, config_of, ids, logits


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", FAMILIES)
def test_an_adapter_starts_as_nothing_and_alone_is_trained(family: str, kind: str) -> None:
    config = config_of(family)
    decoder = build_decoder(config).eval()
    before, weights = logits(decoder), {name: p.clone() for name, p in decoder.named_parameters()}
    add_lora(decoder, config, LoRASettings(r=4, **KINDS[kind]))
    assert (logits(decoder) - before).abs().max() < 2e-5
    loss = F.cross_entropy(decoder.logits(decoder(ids())).flatten(0, 1), ids().flatten())
    loss.backward()
    with_gradient = {name for name, p in decoder.named_parameters() if p.grad is not None}
    assert with_gradient == trained_tensors(decoder).keys()
    assert {name.rpartition(".")[2] for name in with_gradient} <= {"lora_A", "lora_B", "magnitude"}
    torch.optim.SGD(decoder.parameters(), lr=1.0).step()
    after = {name.replace(".base.", "."): p for name, p in decoder.named_parameters()}
    assert all(torch.equal(after[name], weight) for name, weight in weights.items())


def test_the_same_seed_draws_the_same_adapter() -> None:
    def drawn(seed: int) -> torch.Tensor:
        decoder = build_decoder(config_of("llama"))
        add_lora(decoder, config_of("llama"), LoRASettings(), seed)
        return decoder.blocks[1].mlp.up.lora_A

    assert torch.equal(drawn(1), drawn(1))
    assert not torch.equal(drawn(1), drawn(2))
    assert not torch.equal(*(linear.lora_A for linear in _two_alike()))


def _two_alike() -> tuple[LoRALinear, LoRALinear]:
    decoder = build_decoder(config_of("llama"))
    add_lora(decoder, config_of("llama"), LoRASettings())
    return decoder.blocks[0].attention.key, decoder.blocks[0].attention.value


def test_scales_are_the_papers() -> None:
    assert LoRASettings(r=16, lora_alpha=8).scale == 0.5
    assert LoRASettings(r=16, lora_alpha=8, use_rslora=True).scale == 2


@pytest.mark.parametrize("kind", [LoRALinear, DoRALinear])
def test_the_layer_computes_what_its_matrix_says(kind: type[LoRALinear]) -> None:
    torch.manual_seed(0)
    layer = kind(torch.nn.Linear(24, 40), r=3, scale=0.7)
    torch.nn.init.normal_(layer.lora_A)
    torch.nn.init.normal_(layer.lora_B)
    x = torch.randn(5, 24)
    assert torch.allclose(layer(x), F.linear(x, layer.weight, layer.bias), atol=1e-5)


def test_dora_gives_rows_their_learned_length_and_treats_the_sums_as_constant() -> None:
    """Equation 5 written out, with the gradients of section 4.3."""
    torch.manual_seed(0)
    layer = DoRALinear(torch.nn.Linear(24, 40), r=3, scale=0.7)
    for parameter in (layer.lora_A, layer.lora_B, layer.magnitude):
        torch.nn.init.normal_(parameter)
    x = torch.randn(5, 24)
    layer(x).square().sum().backward()
    a, b, m = (p.detach().clone().requires_grad_() for p in (layer.lora_A, layer.lora_B, layer.magnitude))
    total = layer.base.weight.detach() + 0.7 * b @ a
    dense = m[:, None] * total / total.detach().norm(dim=1, keepdim=True)
    F.linear(x, dense, layer.base.bias.detach()).square().sum().backward()
    for ours, written_out in ((layer.lora_A, a), (layer.lora_B, b), (layer.magnitude, m)):
        assert torch.allclose(ours.grad, written_out.grad, rtol=1e-3, atol=1e-3)
    assert torch.allclose(layer.weight.norm(dim=1), layer.magnitude.abs(), rtol=1e-4)


def test_dropout_leaves_out_inputs_of_the_update_in_training_alone() -> None:
    layer = LoRALinear(torch.nn.Linear(64, 8), r=8, scale=1.0, dropout=0.5)
    torch.nn.init.normal_(layer.lora_A)
    torch.nn.init.normal_(layer.lora_B)
    x = torch.randn(3, 64)
    assert not torch.equal(layer.train()(x), layer(x))
    assert torch.equal(layer.eval()(x), layer(x))
    torch.nn.init.zeros_(layer.lora_B)
    assert torch.equal(layer.train()(x), layer.base(x))


def test_latent_attention_reads_the_adapted_matrix_while_it_decodes() -> None:
    """Decoding there never multiplies by the matrix as it is, but takes it apart."""
    config = SLMConfig(
        model_type="deepseek_v3", vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, max_position_embeddings=64, initializer_range=0.2, kv_lora_rank=16,
        qk_rope_head_dim=4, qk_nope_head_dim=8, v_head_dim=8,
    )  # fmt: skip
    decoder = build_decoder(config).eval()
    adapted(decoder, config)
    x = ids()
    with torch.no_grad():
        cache = decoder.new_cache(3, 20)
        pieces = torch.cat([decoder(piece, cache) for piece in x.split([10] + [1] * 10, dim=1)], dim=1)
        assert (pieces - decoder(x)).abs().max() < 1e-4


@pytest.mark.parametrize("kind", KINDS)
def test_folding_changes_no_logits_and_leaves_a_plain_model(kind: str) -> None:
    config = config_of("qwen3")
    decoder = build_decoder(config).eval()
    plain = logits(decoder)
    names = decoder.state_dict().keys()
    adapted(decoder, config, **KINDS[kind])
    before = logits(decoder)
    fold(decoder)
    assert decoder.state_dict().keys() == names
    assert (logits(decoder) - before).abs().max() < 1e-4
    assert (before - plain).abs().max() > 1e-2
    assert all(parameter.requires_grad for parameter in decoder.parameters())


def test_a_second_adapter_is_refused_until_the_first_is_folded() -> None:
    config = config_of("llama")
    decoder = build_decoder(config)
    adapted(decoder, config)
    with pytest.raises(UserError, match=r"has an adapter already: fold\(\)"):
        add_lora(decoder, config, LoRASettings())
    add_lora(fold(decoder), config, LoRASettings())


# -- a base in fewer bits ---------------------------------------------------------------------------------------------

ERRORS = {"bfloat16": 0.002, "int8": 0.01, "nf4": 0.12}  # relative to the weights, on normal ones
BYTES = {"bfloat16": 2.0, "int8": 1.04, "nf4": 0.57}


@pytest.mark.parametrize("name", FORMATS)
def test_a_base_in_fewer_bits_is_near_and_small(name: str) -> None:
    torch.manual_seed(0)
    linear = torch.nn.Linear(250, 130)
    torch.nn.init.normal_(linear.weight)
    frozen = FrozenLinear(linear, name)
    error = (frozen.weight - linear.weight).norm() / linear.weight.norm()
    assert 0 < error < ERRORS[name]
    assert (frozen.codes.nbytes + frozen.scales.nbytes) / linear.weight.numel() <= BYTES[name]
    x = torch.randn(7, 250)
    assert torch.allclose(frozen(x), F.linear(x, frozen.weight, linear.bias), atol=1e-5)


@pytest.mark.parametrize("name", FORMATS)
def test_gradients_pass_through_it_and_no_matrix_is_kept_for_them(name: str) -> None:
    torch.manual_seed(0)
    frozen = FrozenLinear(torch.nn.Linear(256, 128), name)
    x = torch.randn(4, 256, requires_grad=True)
    kept: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        y = frozen(x)
    y.square().sum().backward()
    assert max(kept, default=0) < 256 * 128
    twin = x.detach().clone().requires_grad_()
    F.linear(twin, frozen.weight, frozen.bias).square().sum().backward()
    assert torch.allclose(x.grad, twin.grad, rtol=1e-5, atol=1e-5)


def test_under_autocast_layers_are_in_the_type_of_products() -> None:
    for kind in (LoRALinear, DoRALinear):
        with torch.autocast("cpu", torch.bfloat16):
            assert kind(torch.nn.Linear(32, 16), r=2, scale=1.0)(torch.randn(4, 32)).dtype == torch.bfloat16


@pytest.mark.parametrize("name", FORMATS)
def test_under_autocast_products_are_in_its_type(name: str) -> None:
    frozen = FrozenLinear(torch.nn.Linear(32, 16), name)
    x = torch.randn(4, 32, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        y = frozen(x)
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert x.grad.dtype == torch.float32
    assert torch.allclose(x.grad, frozen.weight.sum(0).expand(4, -1), atol=0.05)


def test_nf4_is_the_reference_implementations() -> None:
    functional = pytest.importorskip("bitsandbytes.functional")
    torch.manual_seed(0)
    weight = torch.randn(128, 192)
    packed, state = functional.quantize_4bit(weight, blocksize=64, quant_type="nf4")
    linear = torch.nn.Linear(192, 128)
    linear.weight.data.copy_(weight)
    assert torch.allclose(FrozenLinear(linear, "nf4").weight, functional.dequantize_4bit(packed, state), atol=1e-5)


@pytest.mark.parametrize("name", FORMATS)
def test_an_adapter_learns_beside_it(name: str) -> None:
    config = config_of("llama")
    decoder = build_decoder(config)
    add_lora(decoder, config, LoRASettings(r=4, base_weights=name, use_dora=True))
    assert all(linear.base.kind == name for linear in adapted_linears(decoder).values())
    optimizer = torch.optim.AdamW(trained_tensors(decoder).values(), lr=3e-2)
    losses = []
    for _ in range(12):
        loss = F.cross_entropy(decoder.logits(decoder(ids()))[:, :-1].flatten(0, 1), ids()[:, 1:].flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.5
    if name != "bfloat16":
        with pytest.raises(UserError, match=f"stored in {name}, which is too coarse"):
            fold(decoder)


def test_what_is_trained_whole_is_neither_adapted_nor_rounded() -> None:
    config = config_of("llama")
    decoder = build_decoder(config)
    weight = decoder.blocks[0].mlp.down.weight.clone()
    add_lora(decoder, config, LoRASettings(base_weights="nf4", modules_to_save=["down_proj", "embedding"]))
    assert torch.equal(decoder.blocks[0].mlp.down.weight, weight)
    whole = {name for name in trained_tensors(decoder) if "lora" not in name}
    assert whole == {"embedding.weight", *(f"blocks.{i}.mlp.down.weight" for i in (0, 1))}
    with pytest.raises(UserError, match="modules_to_save: 'embeddings' matches no module; there are: embedding"):
        add_lora(build_decoder(config), config, LoRASettings(modules_to_save=["embeddings"]))
