"""Negative control: each wrong reading of a family, applied to a right model, is noticed in the logits."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

from slmkit.model.architectures import Architecture, Layer
from slmkit.model.attend import Context
from slmkit.model.decoder import Decoder
from slmkit.model.rope import Rope, Yarn
from tests.parity.configurations import LLAMA3, VOCAB, YARN, Settings
from tests.parity.twins import text, twins_of

BASE: Settings = {
    "vocab_size": VOCAB,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 6,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "rope_parameters": {"rope_type": "default", "rope_theta": 100.0},
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
LLAMA = ("Llama", BASE)
LLAMA3_ROPE = ("Llama", BASE | {"rope_parameters": LLAMA3 | {"factor": 8.0, "rope_theta": 100.0}})
LLAMA_LINEAR = ("Llama", BASE | {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 100.0}})
LLAMA_YARN = ("Llama", BASE | {"rope_parameters": YARN | {"factor": 8.0, "rope_theta": 100.0}})
GPT2 = (
    "GPT2",
    {
        "vocab_size": VOCAB,
        "n_embd": 24,
        "n_layer": 3,
        "n_head": 4,
        "n_positions": 128,
        "bos_token_id": None,
        "eos_token_id": None,
    },
)
MISTRAL = ("Mistral", BASE | {"sliding_window": 5})
QWEN2 = ("Qwen2", {key: value for key, value in BASE.items() if key != "head_dim"})
QWEN3 = ("Qwen3", BASE)
SMOLLM3 = ("SmolLM3", BASE | {"no_rope_layers": [1, 0, 1, 0], "use_sliding_window": False, "sliding_window": None})
OLMO2 = ("Olmo2", BASE)
GEMMA = BASE | {"sliding_window": 5, "query_pre_attn_scalar": 17}
GEMMA2 = ("Gemma2", GEMMA | {"attn_logit_softcapping": 0.5, "final_logit_softcapping": 0.5})
GEMMA3 = (
    "Gemma3",
    GEMMA
    | {
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "rope_parameters": {
            "sliding_attention": {"rope_type": "default", "rope_theta": 10.0},
            "full_attention": {"rope_type": "default", "rope_theta": 1000.0},
        },
    },
)
DEEPSEEK = (
    "DeepseekV3",
    {key: value for key, value in BASE.items() if key != "head_dim"}
    | {
        "num_key_value_heads": 4,
        "q_lora_rank": 7,
        "kv_lora_rank": 9,
        "qk_rope_head_dim": 4,
        "qk_nope_head_dim": 5,
        "v_head_dim": 6,
        "first_k_dense_replace": 4,
        "rope_parameters": YARN | {"factor": 8.0, "rope_theta": 100.0, "mscale": 0.7, "mscale_all_dim": 1.0},
    },
)


def rebuilt(decoder: Decoder, **choices: Any) -> Decoder:
    """The same weights, read with another architecture."""
    other = Decoder(replace(decoder.architecture, **choices)).eval()
    other.load_state_dict(decoder.state_dict())
    return other


def layers(a: Architecture, change: Callable[[Layer], Layer]) -> tuple[Layer, ...]:
    return tuple(change(layer) for layer in a.layers)


def rope(change: Callable[[Rope], Rope]) -> Callable[[Decoder], Decoder]:
    def turned(layer: Layer) -> Layer:
        return layer if layer.rope is None else replace(layer, rope=change(layer.rope))

    return lambda decoder: rebuilt(decoder, layers=layers(decoder.architecture, turned))


def window(change: Callable[[int | None], int | None]) -> Callable[[Decoder], Decoder]:
    return lambda decoder: rebuilt(
        decoder, layers=layers(decoder.architecture, lambda layer: replace(layer, window=change(layer.window)))
    )


def other(**choices: Any) -> Callable[[Decoder], Decoder]:
    return lambda decoder: rebuilt(decoder, **choices)


def in_blocks(change: Callable[[Any], None]) -> Callable[[Decoder], Decoder]:
    """Surgery on every block."""

    def operate(decoder: Decoder) -> Decoder:
        for block in decoder.blocks:
            change(block)
        return decoder

    return operate


def without(*names: str) -> Callable[[Decoder], Decoder]:
    """Modules replaced by nothing; names of the decoder's or, with a dot in front, of each block's."""

    def operate(decoder: Decoder) -> Decoder:
        for name in names:
            homes = decoder.blocks if name.startswith(".") else [decoder]
            for home in homes:
                parent, _, leaf = name.lstrip(".").rpartition(".")
                setattr(home.get_submodule(parent), leaf, torch.nn.Identity())
        return decoder

    return operate


def post_norms_in_front(block: Any) -> None:
    block.attention_in, block.attention_out = block.attention_out, block.attention_in
    block.mlp_in, block.mlp_out = block.mlp_out, block.mlp_in


def two_norms_swapped(block: Any) -> None:
    block.attention_out, block.mlp_in = block.mlp_in, block.attention_out


def norm_of_one_head(block: Any) -> None:
    for norm in (block.attention.query_norm, block.attention.key_norm):
        norm.weight.data = norm.weight.data[: norm.shape[-1]]
        norm.shape = norm.shape[-1:]


def key_value_heads_dealt_out(block: Any) -> None:
    """Query head i reads key head i mod 2, and not i div 2."""
    order = torch.tensor([0, 2, 1, 3])
    attention = block.attention
    attention.query.weight.data = attention.query.weight.unflatten(0, (4, -1))[order].flatten(0, 1)
    attention.out.weight.data = attention.out.weight.unflatten(1, (4, -1))[:, order].flatten(1, 2)


def gate_and_up_swapped(block: Any) -> None:
    block.mlp.gate, block.mlp.up = block.mlp.up, block.mlp.gate


def query_and_key_swapped(block: Any) -> None:
    block.attention.query, block.attention.key = block.attention.key, block.attention.query


def out_not_transposed(block: Any) -> None:
    block.attention.out.weight.data = block.attention.out.weight.T.contiguous()


def qkv_biases_dropped(block: Any) -> None:
    for projection in (block.attention.query, block.attention.key, block.attention.value):
        projection.bias.data.zero_()


def positions_from_one(decoder: Decoder) -> Decoder:
    assert decoder.place is not None
    decoder.place.weight.data = decoder.place.weight.roll(-1, 0)
    return decoder


def neighbours(decoder: Decoder) -> Decoder:
    latent = decoder.architecture.latent
    assert latent is not None
    return rebuilt(decoder, latent=replace(latent, neighbours_turn=False))


def scaled_by_value_dim(decoder: Decoder) -> Decoder:
    return rebuilt(decoder, attention_scale=6**-0.5)


WRONG: dict[str, tuple[tuple[str, Settings], Callable[[Decoder], Decoder]]] = {
    "another RoPE base": (LLAMA, rope(lambda r: replace(r, theta=200.0))),
    "llama3's stretch left out": (LLAMA3_ROPE, rope(lambda r: replace(r, scaling=None))),
    "llama3's factor halved": (LLAMA3_ROPE, rope(lambda r: replace(r, scaling=replace(r.scaling, factor=4.0)))),
    "linear stretch left out": (LLAMA_LINEAR, rope(lambda r: replace(r, scaling=None))),
    "YaRN's temperature left out": (
        LLAMA_YARN,
        rope(lambda r: replace(r, scaling=replace(r.scaling, attention_factor=1.0))),
    ),
    "YaRN's ramp left out": (LLAMA_YARN, rope(lambda r: replace(r, scaling=Yarn(8.0, 16, beta_fast=1e-3)))),
    "layers without RoPE turned": (
        SMOLLM3,
        lambda d: rebuilt(d, layers=(d.architecture.layers[0],) * 4),
    ),
    "RoPE left out everywhere": (LLAMA, rope(lambda r: None)),  # type: ignore[arg-type, return-value]
    "window one too wide": (MISTRAL, window(lambda w: w + 1)),  # type: ignore[operator]
    "window one too narrow": (GEMMA3, window(lambda w: w and w - 1)),
    "window in the full layers too": (GEMMA3, window(lambda w: 5)),
    "no window": (MISTRAL, window(lambda w: None)),
    "global base in local layers": (GEMMA3, rope(lambda r: replace(r, theta=1000.0))),
    "bases of local and global swapped": (GEMMA3, rope(lambda r: replace(r, theta=10_000.0 / r.theta))),
    "another eps": (LLAMA, other(norm_eps=1e-2)),
    "weights of norms not offset by one": (GEMMA3, other(norm="rms")),
    "norm before attention left out": (LLAMA, without(".attention_in")),
    "norm before the MLP left out": (QWEN3, without(".mlp_in")),
    "norm after the MLP left out": (GEMMA3, without(".mlp_out")),
    "last norm left out": (SMOLLM3, without("norm")),
    "post-norms read as pre-norms": (OLMO2, in_blocks(post_norms_in_front)),
    "two of the four norms swapped": (GEMMA3, in_blocks(two_norms_swapped)),
    "QK-norm left out": (QWEN3, without(".attention.query_norm", ".attention.key_norm")),
    "QK-norm over one head instead of all": (OLMO2, in_blocks(norm_of_one_head)),
    "embeddings not scaled": (GEMMA3, other(embedding_scale=1.0)),
    "scores scaled by the head's width": (GEMMA3, other(attention_scale=6**-0.5)),
    "scores not capped": (GEMMA2, other(attention_cap=None)),
    "logits not capped": (GEMMA2, other(logit_cap=None)),
    "exact GELU instead of tanh's": (GPT2, other(activation="gelu")),
    "GELU instead of SiLU": (LLAMA, other(activation="gelu_pytorch_tanh")),
    "gate and up swapped": (LLAMA, in_blocks(gate_and_up_swapped)),
    "biases of query, key and value dropped": (QWEN2, in_blocks(qkv_biases_dropped)),
    "fused query and key in the other order": (GPT2, in_blocks(query_and_key_swapped)),
    "a transposed matrix read as it is": (GPT2, in_blocks(out_not_transposed)),
    "positions from one": (GPT2, positions_from_one),
    "key and value heads dealt out instead of grouped": (LLAMA, in_blocks(key_value_heads_dealt_out)),
    "halves turn instead of neighbours": (DEEPSEEK, neighbours),
    "norm of the latent left out": (DEEPSEEK, without(".attention.latent_norm")),
    "norm of the query's latent left out": (DEEPSEEK, without(".attention.query.norm")),
    "scores scaled without YaRN's growth": (DEEPSEEK, other(attention_scale=9**-0.5)),
    "scores scaled by the values' width": (DEEPSEEK, scaled_by_value_dim),
}


def difference(decoder: Decoder, theirs: Any) -> float:
    with torch.no_grad():
        return (decoder.logits(decoder(text())) - theirs(text()).logits).abs().max().item()


@pytest.mark.parametrize("reading", WRONG)
def test_a_wrong_reading_is_noticed(reading: str) -> None:
    (name, settings), wrong = WRONG[reading]
    pair = twins_of(name, settings)
    assert difference(pair.ours, pair.theirs) <= 1e-4
    assert difference(wrong(copy.deepcopy(pair.ours)), pair.theirs) > 2e-4


@pytest.mark.parametrize("shift", [-1, 1])
def test_a_shifted_mask_is_noticed(shift: int, monkeypatch: pytest.MonkeyPatch) -> None:
    pair = twins_of(*MISTRAL)
    right = Context._mask

    def shifted(self: Context, *what: Any) -> torch.Tensor:
        moved = right(self, *what).roll(shift, -1)
        moved[..., 0, 0] = True  # a query that sees nothing is no reading at all
        return moved

    monkeypatch.setattr(Context, "_mask", shifted)
    assert difference(pair.ours, pair.theirs) > 2e-4
