"""A model's weights as GGUF, the format of llama.cpp: its tensors, their types, and its settings.

llama.cpp has a decoder of its own for each family, which computes some choices in one way only. A model with another
choice is refused: an approximation would be another model.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from slmkit.config import UserError, did_you_mean
from slmkit.export.gguf_tokenizer import add_tokenizer
from slmkit.export.gguf_types import KINDS, TABLES, PlannedTensor, encoded, file_type, weights_by_type, with_type
from slmkit.export.runtimes import Loaded, Stored
from slmkit.model.architectures import Architecture, architecture_of
from slmkit.model.config import SLMConfig
from slmkit.model.families import family_of
from slmkit.model.files.directory import empty_decoder, from_disk, open_weights, stored_names
from slmkit.model.latent_attention import EPS
from slmkit.model.rope import Linear, Llama3, Rope, Yarn, yarn_growth
from slmkit.tokenizer import SLMTokenizer

MOST_FALLBACK = 0.25  # of the weights, without being asked

# -- what llama.cpp computes ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Need:
    """A choice that another program's decoder fixes: the field of config.json, what must hold, and that in words."""

    field: str
    holds: Callable[[Architecture], bool]
    words: str


def _no_windows(a: Architecture) -> bool:
    return all(layer.window is None or layer.window >= a.max_positions for layer in a.layers)


def _all_turn_but(every: int | None, a: Architecture) -> bool:
    return all((layer.rope is None) == bool(every and i % every == 0) for i, layer in enumerate(a.layers, 1))


def _scaled_by(width_at_depth: int, a: Architecture) -> bool:
    """Scores are divided by the root of head_dim, in a model of that depth by that of hidden_size / heads."""
    return a.attention_scale == (a.width // a.heads if a.depth == width_at_depth else a.head_dim) ** -0.5


def _compressed_as_read(a: Architecture) -> bool:
    lite = a.depth in (26, 27) or (a.depth, a.vocab_size) == (48, 128_256)  # llama.cpp takes these for DeepSeek-V2-Lite
    return not (lite and a.latent and a.latent.query_rank)


SILU = Need("hidden_act", lambda a: a.activation == "silu", "silu")
GELU = Need("hidden_act", lambda a: a.activation in ("gelu_new", "gelu_pytorch_tanh"), "gelu_pytorch_tanh")
NO_WINDOWS = Need("sliding_window", _no_windows, "windows of max_position_embeddings or more")
NO_ATTENTION_BIAS = Need("attention_bias", lambda a: not a.out_bias, "attention without biases")
NO_MLP_BIAS = Need("mlp_bias", lambda a: not a.mlp_bias, "an MLP without biases")
WHOLE_HEADS = Need("head_dim", lambda a: a.heads * a.head_dim == a.width, "hidden_size / num_attention_heads")
ALL_TURN = Need("no_rope_layers", partial(_all_turn_but, None), "RoPE in every layer")
CAPPED_SCORES = Need("attn_logit_softcapping", lambda a: a.attention_cap is not None, "capped scores")
CAPPED_LOGITS = Need("final_logit_softcapping", lambda a: a.logit_cap is not None, "capped logits")
SHALLOW = Need("num_hidden_layers", lambda a: a.depth <= 512, "up to 512")
TIED = Need("tie_word_embeddings", lambda a: a.tied, "a head that is the embedding")
FREE_CHOICES = (
    Need("norm", lambda a: a.norm == "rms", "rms"),
    Need("norm_at", lambda a: a.norm_at == "pre", "pre"),
    Need("qk_norm", lambda a: a.qk_norm == "none", "none"),
    Need("gated_mlp", lambda a: a.gated_mlp, "a gated MLP"),
    Need("attn_logit_softcapping", lambda a: a.attention_cap is None, "uncapped scores"),
    Need("final_logit_softcapping", lambda a: a.logit_cap is None, "uncapped logits"),
)


@dataclass(frozen=True)
class Loader:
    """A decoder of llama.cpp, and how it expects a family's weights and settings."""

    name: str  # `general.architecture`
    needs: tuple[Need, ...]
    neighbours: bool = False  # RoPE rotates channels 2i and 2i + 1, instead of i and i + dim / 2
    scalings: tuple[type, ...] = (Linear, Yarn)  # of RoPE, those that settings describe
    has_factors: bool = False  # it reads a divisor of each frequency of RoPE
    shares_head: bool = True  # without a head in the file, the embedding is the head
    full_every: int = 0  # every how manyeth layer has no window, if the file does not say; 0: no layer may have one
    # RoPE of layers with a window: that of the others, or unscaled with the base of the others, or with its own base.
    sliding_rope: Callable[[Rope, Rope], Rope] = lambda full, sliding: full


LLAMA = Loader("llama", (SILU, NO_WINDOWS, ALL_TURN), neighbours=True, has_factors=True)
OLMO2 = Loader(
    "olmo2", (SILU, NO_ATTENTION_BIAS, WHOLE_HEADS), shares_head=False, full_every=4,
    sliding_rope=lambda full, sliding: Rope(full.theta, full.dim),
)  # fmt: skip
LOADERS = {
    "gpt2": Loader("gpt2", (GELU,)),
    "llama": LLAMA,
    "mistral": LLAMA,
    "slm": replace(LLAMA, needs=(*LLAMA.needs, *FREE_CHOICES)),
    "qwen2": Loader("qwen2", (SILU, NO_WINDOWS, WHOLE_HEADS)),
    "qwen3": Loader("qwen3", (SILU, NO_WINDOWS, NO_ATTENTION_BIAS)),
    "smollm3": Loader(
        "smollm3",
        (SILU, NO_WINDOWS, NO_ATTENTION_BIAS, NO_MLP_BIAS,
         Need("no_rope_layers", partial(_all_turn_but, 4), "RoPE in all but every fourth layer")),
        neighbours=True,
    ),
    "olmo2": OLMO2,
    "olmo3": OLMO2,
    "gemma2": Loader(
        "gemma2",
        (GELU, NO_ATTENTION_BIAS, CAPPED_SCORES, CAPPED_LOGITS, TIED,
         Need("query_pre_attn_scalar", partial(_scaled_by, 46), "head_dim, at 46 layers hidden_size / heads")),
        full_every=2,
    ),
    "gemma3_text": Loader(
        "gemma3",
        (GELU, NO_ATTENTION_BIAS,
         Need("query_pre_attn_scalar", partial(_scaled_by, 62), "head_dim, at 62 layers hidden_size / heads")),
        scalings=(Linear,), full_every=6, sliding_rope=lambda full, sliding: Rope(sliding.theta, sliding.dim),
    ),
    "deepseek_v3": Loader(
        "deepseek2",
        (SILU, NO_ATTENTION_BIAS, Need("rms_norm_eps", lambda a: a.norm_eps == EPS, f"{EPS}, as its inner norms"),
         Need("q_lora_rank", _compressed_as_read, "null at 26 or 27 layers")),
        scalings=(Yarn,),
    ),
}  # fmt: skip


def expect_held(needs: Iterable[Need], config: SLMConfig, a: Architecture, program: str) -> None:
    """Raises `UserError` for the first need of a program that a model does not meet."""
    for need in needs:
        if not need.holds(a):
            found = str(getattr(config, need.field, config.rope_parameters))[:80]
            raise UserError(f"{need.field} is {found}: {program} computes only {need.words}")


def loader_of(config: SLMConfig, a: Architecture) -> Loader:
    """The decoder of llama.cpp for a model. Raises `UserError` that names the field that it cannot hold."""
    loader = LOADERS[config.model_type]
    expect_held((SHALLOW, *loader.needs), config, a, f"llama.cpp's {loader.name}")
    return loader


def settings_of(a: Architecture, loader: Loader) -> dict[str, Any]:
    """The settings of a file, without the architecture's name in front of each."""
    key_length, value_length, kv_heads, eps = a.head_dim, a.head_dim, a.kv_heads, "layer_norm_rms_epsilon"
    more: dict[str, Any] = {}
    if a.latent is not None:  # one key for all heads, which is the latent and the rotary channels
        key_length, value_length, kv_heads = a.latent.kv_rank + a.latent.rope_dim, a.latent.kv_rank, 1
        more = {
            "attention.q_lora_rank": a.latent.query_rank or 0,
            "attention.kv_lora_rank": a.latent.kv_rank,
            "attention.key_length_mla": a.latent.plain_dim + a.latent.rope_dim,
            "attention.value_length_mla": a.latent.value_dim,
            "leading_dense_block_count": a.depth,
            "expert_feed_forward_length": 0,
            "expert_shared_count": 0,
        }
    for key, cap in (("attn_logit_softcapping", a.attention_cap), ("final_logit_softcapping", a.logit_cap)):
        more |= {} if cap is None else {key: float(cap)}
    windows = [layer.window for layer in a.layers]
    if loader.full_every and any(windows):
        usual = [number % loader.full_every != 0 for number in range(1, a.depth + 1)]
        sliding = [window is not None for window in windows]
        more["attention.sliding_window"] = next(filter(None, windows))
        more |= {} if sliding == usual else {"attention.sliding_window_pattern": sliding}
    elif a.attention_cap is not None:  # Gemma 2 always has windows there: as wide as the context, they do nothing
        more["attention.sliding_window"] = a.max_positions
    return more | {
        "vocab_size": a.vocab_size,
        "context_length": a.max_positions,
        "embedding_length": a.width,
        "block_count": a.depth,
        "feed_forward_length": a.mlp_width,
        "attention.head_count": a.heads,
        "attention.head_count_kv": kv_heads,
        "attention.key_length": key_length,
        "attention.value_length": value_length,
        f"attention.{'layer_norm_epsilon' if a.norm == 'layer' else eps}": float(a.norm_eps),
    }


def rope_of_file(a: Architecture, loader: Loader) -> tuple[dict[str, Any], Tensor | None]:
    """Settings of RoPE, and divisors of its frequencies [dim / 2] where no setting describes them.

    Raises `UserError` for a scaling that llama.cpp does not have.
    """
    ropes = {layer.window is not None and loader.full_every > 0: layer.rope for layer in a.layers if layer.rope}
    if not ropes:
        return {}, None
    full = ropes.get(False) or ropes[True]
    refused = f"rope_parameters: llama.cpp's {loader.name} has no such RoPE"
    settings: dict[str, Any] = {"rope.dimension_count": full.dim, "rope.freq_base": full.theta}
    if True in ropes:
        if ropes[True] != loader.sliding_rope(full, ropes[True]):
            raise UserError(f"{refused} in layers with a window: {ropes[True]}")
        settings |= {"rope.freq_base_swa": ropes[True].theta}
    scaling = full.scaling
    if scaling is None:
        return settings, None
    if isinstance(scaling, Yarn) and Yarn in loader.scalings and _has_usual_ramp(scaling):
        settings |= {
            "rope.scaling.type": "yarn",
            "rope.scaling.factor": float(scaling.factor),
            "rope.scaling.original_context_length": int(scaling.original_max_position_embeddings),
        }
        return settings | _yarn_lengths(a, scaling), None
    if isinstance(scaling, Linear) and Linear in loader.scalings:
        return settings | {"rope.scaling.type": "linear", "rope.scaling.factor": float(scaling.factor)}, None
    if isinstance(scaling, Llama3 | Yarn) and loader.has_factors:
        if isinstance(scaling, Yarn):
            settings["rope.scaling.attn_factor"] = scaling.length
        return settings, replace(full, scaling=None).frequencies() / full.frequencies()
    raise UserError(f"{refused}: {scaling}")


def _has_usual_ramp(scaling: Yarn) -> bool:
    """Whether YaRN blends frequencies between the turns that llama.cpp knows."""
    return scaling.truncate and (scaling.beta_fast, scaling.beta_slow) == (32, 1) and scaling.factor > 1


def _yarn_lengths(a: Architecture, scaling: Yarn) -> dict[str, float]:
    """llama.cpp multiplies cosines and sines by YaRN's usual factor, and by one of ours. With latent attention it takes
    the usual factor away, and multiplies scores by (attn_factor * (1 + multiplier * ln(factor)))².
    """
    multiplier = 0.0  # llama.cpp reads it as none, and then keeps the usual factor
    if a.latent is not None:
        wanted = a.attention_scale * (a.latent.plain_dim + a.latent.rope_dim) ** 0.5
        multiplier = (wanted**0.5 / scaling.length - 1) / math.log(scaling.factor)
    if multiplier == 0:
        return {"rope.scaling.attn_factor": scaling.length / yarn_growth(scaling.factor)}
    return {"rope.scaling.attn_factor": scaling.length, "rope.scaling.yarn_log_multiplier": multiplier}


# -- tensors ----------------------------------------------------------------------------------------------------------

NAMES: dict[str, str] = TABLES["names"]


def interleaved(rows: Tensor, heads: int, dim: int) -> Tensor:
    """Rows of a query or key for RoPE that rotates neighbours: of each head's last `dim` channels, i and i + dim / 2
    become 2i and 2i + 1.  [heads * channels, …] → same
    """
    channels = rows.unflatten(0, (heads, -1))  # [heads, channels, …]
    still, turning = channels.tensor_split([channels.size(1) - dim], dim=1)
    return torch.cat((still, turning.unflatten(1, (2, -1)).transpose(1, 2).flatten(1, 2)), dim=1).flatten(0, 1)


def tensors_of(config: SLMConfig, a: Architecture, loader: Loader) -> Iterator[PlannedTensor]:
    """The tensors in the order of the file, in float32."""
    state, latent = empty_decoder(config).state_dict(), a.latent
    turning = {"attention.query": a.heads, "attention.key": a.kv_heads} if loader.neighbours else {}
    if latent is not None and not latent.neighbours_turn:
        turning = {"attention.query": a.heads, "attention.query.up": a.heads, "attention.latent": 1}
    dim = a.head_dim if latent is None else latent.rope_dim
    for source, ours in stored_names(state, family_of(config.model_type)).items():
        paths = [name.rpartition(".")[0].split(".") for name in ours]
        block = f"blk.{paths[0][1]}." if paths[0][0] == "blocks" else ""
        module = " ".join(".".join(path[2:] if block else path) for path in paths)
        shape = (sum(state[one].shape[0] for one in ours), *state[ours[0]].shape[1:])
        if module == "attention.key_value":
            yield from _keys_and_values(a, block, source)
            continue
        planned = PlannedTensor(f"{block}{NAMES[module]}.{ours[0].rpartition('.')[2]}", shape, source=source)
        if module in turning:
            planned = replace(planned, change=partial(interleaved, heads=turning[module], dim=dim))
        elif a.norm == "rms+1" and "norm" in NAMES[module]:
            planned = replace(planned, change=lambda tensor: tensor + 1)
        yield planned
        if module == "embedding" and a.tied and not loader.shares_head:
            yield replace(planned, name="output.weight")
    factors = rope_of_file(a, loader)[1]
    if factors is not None:
        yield PlannedTensor("rope_freqs.weight", tuple(factors.shape), change=lambda _: factors)


def matrices_of(gguf: Path, loaded: Loaded) -> Iterator[Stored]:
    """The matrices of a file of the model, as `Runtime.stored`."""
    from gguf import GGML_QUANT_SIZES, GGUFReader, quants

    found = {tensor.name: tensor for tensor in GGUFReader(gguf).tensors}
    config, a, state = loaded.config, loaded.decoder.architecture, loaded.decoder.state_dict()
    names = stored_names(state, family_of(config.model_type))
    for planned in tensors_of(config, a, loader_of(config, a)):
        if len(planned.shape) > 1 and planned.name in found:
            ours, one = names[planned.source], found[planned.name]
            whole = torch.cat([state[name] for name in ours])  # [out, in]
            places = planned.change(torch.arange(whole.numel()).view(whole.shape))
            values = torch.tensor(quants.dequantize(one.data, one.tensor_type))
            group = max(32, GGML_QUANT_SIZES[one.tensor_type][0])
            yield Stored(planned.name, ours, values, one.tensor_type.name, group, places)


def _keys_and_values(a: Architecture, block: str, source: str) -> Iterator[PlannedTensor]:
    """The matrices from latents to keys, transposed, and to values, of each head: [heads, out, in]."""
    latent, heads = a.latent, a.heads
    assert latent is not None
    shapes = (heads, latent.kv_rank, latent.plain_dim), (heads, latent.value_dim, latent.kv_rank)
    sizes = [latent.plain_dim, latent.value_dim]

    def part(index: int, rows: Tensor) -> Tensor:
        matrix = rows.unflatten(0, (heads, -1)).split(sizes, dim=1)[index]  # [heads, plain_dim or value_dim, kv_rank]
        return matrix if index else matrix.mT

    for index, name in enumerate(("attn_k_b", "attn_v_b")):
        yield PlannedTensor(f"{block}{name}.weight", shapes[index], source=source, change=partial(part, index))


def plan_tensors(config: SLMConfig, kind: str, *, allow_fallback: bool = False) -> list[PlannedTensor]:
    """The tensors of a file of a kind such as F32, Q8_0 or Q4_K_M, in its order, with types and sizes.

    Raises `UserError` for an unknown kind, for a model that llama.cpp does not compute, and, without `allow_fallback`,
    where more than a quarter of the weights cannot have the kind's types.
    """
    if kind not in KINDS:
        raise UserError(f"--type {kind}: {did_you_mean(kind, KINDS)}")
    a = architecture_of(config)
    tensors = list(tensors_of(config, a, loader_of(config, a)))
    has_head = any(planned.name == "output.weight" for planned in tensors)
    plan = [with_type(planned, kind, a.depth, has_head) for planned in tensors]
    fallback = [planned for planned in plan if planned.is_fallback]
    share = sum(planned.weights for planned in fallback) / sum(planned.weights for planned in plan)
    if share > MOST_FALLBACK and not allow_fallback:
        raise UserError(
            f"--type {kind}: {share:.0%} of the weights cannot have it, as {fallback[0].name}: {fallback[0].reason}; "
            "use Q8_0 or Q4_0, whose blocks have 32 columns, or F16, or --allow-fallback"
        )
    return plan


def summary(plan: list[PlannedTensor]) -> str:
    """Shares of the types, the size, and reasons for fallbacks, in one line."""
    weights = weights_by_type(plan)
    shares = ", ".join(f"{type_} {count / weights.total():.1%}" for type_, count in weights.most_common())
    reasons = "; ".join(sorted({planned.reason for planned in plan if planned.is_fallback}))
    return f"{shares} of the weights, {sum(planned.bytes for planned in plan):,} bytes{reasons and f' ({reasons})'}"


# -- the file ---------------------------------------------------------------------------------------------------------


def write_gguf(model: Path, path: Path, kind: str, *, allow_fallback: bool = False) -> list[PlannedTensor]:
    """Write a model directory as GGUF to `path`, with one tensor at a time in memory, and return what was written.

    Raises `UserError` as `plan_tensors`, `open_weights` and `add_tokenizer` do, for NaN and infinity, and for weights
    that float16 cannot hold; `OSError` if the disk is full.
    """
    import gguf

    config = SLMConfig.from_pretrained(model)
    a, family = architecture_of(config), family_of(config.model_type)
    loader, plan = loader_of(config, a), plan_tensors(config, kind, allow_fallback=allow_fallback)
    stored = open_weights(model, empty_decoder(config), family)
    writer = gguf.GGUFWriter(path, loader.name)
    writer.add_file_type(file_type(weights_by_type(plan), kind))
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    add: dict[type, Callable[[str, Any], None]]
    add = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
    for key, value in (settings_of(a, loader) | rope_of_file(a, loader)[0]).items():
        add.get(type(value), writer.add_array)(f"{loader.name}.{key}", value)
    add_tokenizer(writer, SLMTokenizer.from_pretrained(model), model, a.vocab_size)
    for planned in plan:
        type_ = gguf.GGMLQuantizationType[planned.type]
        writer.add_tensor_info(planned.name, planned.shape, np.dtype(np.float32), planned.bytes, type_)
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        written = []
        for planned in plan:
            tensor = torch.empty(0)
            if planned.source:
                tensor = from_disk(family, planned.source, stored[planned.source].read().float())
            data, underflows = encoded(planned, planned.change(tensor))
            writer.write_tensor_data(data)
            written.append(replace(planned, underflows=underflows))
    finally:
        writer.close()
    return written
