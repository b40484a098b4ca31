"""A model's weights as GGUF, the format of llama.cpp: its tensors, their types, and its settings.

llama.cpp has a decoder of its own for each family, which computes some choices in one way only. A model with another
choice is refused: an approximation would be another model.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from slmkit.config import UserError
from slmkit.export.gguf_tokenizer import add_tokenizer
from slmkit.model.architectures import Architecture, architecture_of
from slmkit.model.config import SLMConfig
from slmkit.model.families import family_of
from slmkit.model.files.directory import empty_decoder, from_disk, open_weights, stored_names
from slmkit.model.files.stored import expect_finite
from slmkit.model.rope import Linear, Yarn
from slmkit.tokenizer import SLMTokenizer

# Ours → GGUF's names of a layer's modules, and of those outside the layers.
NAMES = {
    "embedding": "token_embd",
    "place": "position_embd",
    "norm": "output_norm",
    "head": "output",
    "attention_in": "attn_norm",
    "attention.query": "attn_q",
    "attention.key": "attn_k",
    "attention.value": "attn_v",
    "attention.query attention.key attention.value": "attn_qkv",
    "attention.query_norm": "attn_q_norm",
    "attention.key_norm": "attn_k_norm",
    "attention.query.down": "attn_q_a",
    "attention.query.norm": "attn_q_a_norm",
    "attention.query.up": "attn_q_b",
    "attention.latent": "attn_kv_a_mqa",
    "attention.latent_norm": "attn_kv_a_norm",
    "attention.out": "attn_output",
    "attention_out": "post_attention_norm",
    "mlp_in": "ffn_norm",
    "mlp.gate": "ffn_gate",
    "mlp.up": "ffn_up",
    "mlp.down": "ffn_down",
    "mlp_out": "post_ffw_norm",
}

# -- what llama.cpp computes ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Need:
    """A choice that a decoder of llama.cpp fixes: the field of config.json, what must hold, and that in words."""

    field: str
    holds: Callable[[Architecture], bool]
    words: str


def _without_windows(a: Architecture) -> bool:
    return all(layer.window is None or layer.window >= a.max_positions for layer in a.layers)


def _turning(pattern: Callable[[int], bool]) -> Callable[[Architecture], bool]:
    return lambda a: all((layer.rope is not None) == pattern(i) for i, layer in enumerate(a.layers, 1))


SILU = Need("hidden_act", lambda a: a.activation == "silu", "silu")
GELU = Need("hidden_act", lambda a: a.activation in ("gelu_new", "gelu_pytorch_tanh"), "gelu_pytorch_tanh")
NO_WINDOWS = Need("sliding_window", _without_windows, "full attention")
NO_QKV_BIAS = Need("attention_bias", lambda a: not a.out_bias, "attention without biases")
NO_MLP_BIAS = Need("mlp_bias", lambda a: not a.mlp_bias, "an MLP without biases")
WHOLE_HEADS = Need("head_dim", lambda a: a.heads * a.head_dim == a.width, "hidden_size / num_attention_heads")
ALL_TURN = Need("no_rope_layers", _turning(lambda number: True), "RoPE in every layer")
NO_CAPS = (
    Need("attn_logit_softcapping", lambda a: a.attention_cap is None, "uncapped scores"),
    Need("final_logit_softcapping", lambda a: a.logit_cap is None, "uncapped logits"),
)


@dataclass(frozen=True)
class Loader:
    """A decoder of llama.cpp, and how it expects a family's weights and settings."""

    name: str  # `general.architecture`
    needs: tuple[Need, ...]
    neighbours: bool = False  # RoPE rotates channels 2i and 2i + 1, instead of i and i + dim / 2
    scalings: tuple[type, ...] = (Linear, Yarn)  # of RoPE, those that it computes by settings
    has_factors: bool = False  # it reads a divisor of each frequency
    shares_head: bool = True  # without a head in the file, the embedding is the head
    full_every: int = 0  # which layers have no window where the file does not say; 0: no layer may have one


LOADERS = {
    "llama": Loader("llama", (SILU,), neighbours=True, has_factors=True),
    "mistral": Loader("llama", (SILU, NO_WINDOWS), neighbours=True, has_factors=True),
}


def loader_of(config: SLMConfig, a: Architecture) -> Loader:
    """The decoder of llama.cpp for a model. Raises `UserError` that names the field that it cannot hold."""
    loader = LOADERS.get(config.model_type)
    if loader is None:
        raise UserError(f"model_type {config.model_type!r} has no GGUF; those that have: {', '.join(sorted(LOADERS))}")
    for need in loader.needs:
        if not need.holds(a):
            raise UserError(
                f"{need.field} is {getattr(config, need.field)!r}: llama.cpp's {loader.name} has only {need.words}"
            )
    return loader


# -- tensors ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PlannedTensor:
    """A tensor of the file. `reason`: why it has its type."""

    name: str
    shape: tuple[int, ...]  # [out, in]
    type: str
    reason: str
    bytes: int
    underflows: int = 0  # weights that are not zero, and are in this type
    source: str = field(default="", repr=False)  # its name in the model directory
    change: Callable[[Tensor], Tensor] = field(default=lambda tensor: tensor, repr=False)


def interleaved(rows: Tensor, heads: int, dim: int) -> Tensor:
    """Rows of a query or key for RoPE that rotates neighbours: of each head's last `dim` channels, i and i + dim / 2
    become 2i and 2i + 1.  [heads * channels, …] → same
    """
    channels = rows.unflatten(0, (heads, -1))  # [heads, channels, …]
    still, turning = channels[:, :-dim], channels[:, -dim:]
    return torch.cat((still, turning.unflatten(1, (2, -1)).transpose(1, 2).flatten(1, 2)), dim=1).flatten(0, 1)


def _tensors(config: SLMConfig, a: Architecture, loader: Loader) -> Iterator[PlannedTensor]:
    """The tensors in the order of the file, in float32 still."""
    state = empty_decoder(config).state_dict()
    turned = {"attention.query": a.heads, "attention.key": a.kv_heads} if loader.neighbours else {}
    for stored, ours in stored_names(state, family_of(config.model_type)).items():
        paths = [name.rpartition(".")[0].split(".") for name in ours]
        layer = paths[0][1] if paths[0][0] == "blocks" else None
        modules = [".".join(path[2:] if layer else path) for path in paths]
        name = f"{NAMES[' '.join(modules)]}.{ours[0].rpartition('.')[2]}"
        shape = (sum(state[one].shape[0] for one in ours), *state[ours[0]].shape[1:])
        change: Callable[[Tensor], Tensor] = lambda tensor: tensor  # noqa: E731
        if modules[0] in turned:
            change = lambda tensor, heads=turned[modules[0]]: interleaved(tensor, heads, a.head_dim)  # noqa: E731
        elif a.norm == "rms+1" and len(shape) == 1 and "norm" in name:
            change = lambda tensor: tensor + 1  # noqa: E731
        name = f"blk.{layer}.{name}" if layer else name
        yield PlannedTensor(name, shape, "F32", "", 4 * math.prod(shape), 0, stored, change)


def plan_tensors(config: SLMConfig, kind: str, *, allow_fallback: bool = False) -> list[PlannedTensor]:
    """The tensors of a file whose weights are of `kind`, in its order."""
    if kind != "F32":
        raise UserError(f"--type {kind}: only F32 is written so far")
    a = architecture_of(config)
    return list(_tensors(config, a, loader_of(config, a)))


def write_gguf(model: Path, path: Path, kind: str, *, allow_fallback: bool = False) -> list[PlannedTensor]:
    """Write the model directory as GGUF to `path`, one tensor in memory at a time."""
    from gguf import GGMLQuantizationType, GGUFWriter

    config = SLMConfig.from_pretrained(model)
    a = architecture_of(config)
    loader = loader_of(config, a)
    plan = plan_tensors(config, kind, allow_fallback=allow_fallback)
    family = family_of(config.model_type)
    tensors = open_weights(model, empty_decoder(config), family)
    writer = GGUFWriter(path, loader.name)
    writer.add_context_length(a.max_positions)
    writer.add_embedding_length(a.width)
    writer.add_block_count(a.depth)
    writer.add_feed_forward_length(a.mlp_width)
    writer.add_head_count(a.heads)
    writer.add_head_count_kv(a.kv_heads)
    writer.add_key_length(a.head_dim)
    writer.add_value_length(a.head_dim)
    writer.add_layer_norm_rms_eps(a.norm_eps)
    writer.add_vocab_size(a.vocab_size)
    writer.add_file_type(0)
    rope = a.layers[0].rope
    if rope is not None:
        writer.add_rope_dimension_count(rope.dim)
        writer.add_rope_freq_base(rope.theta)
    add_tokenizer(writer, SLMTokenizer.from_pretrained(model), model, a.vocab_size)
    for planned in plan:
        writer.add_tensor_info(
            planned.name, planned.shape, np.dtype(np.float32), planned.bytes, GGMLQuantizationType.F32
        )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for planned in plan:
        stored = tensors[planned.source]
        tensor = from_disk(family, stored.name, stored.read().float())
        expect_finite(tensor, f"{stored.path}: {stored.name!r}", "the model is broken: use another checkpoint")
        writer.write_tensor_data(planned.change(tensor).contiguous().numpy())
    writer.close()
    return plan
