"""The families: for each one function from its config to an `Architecture`, and a row of `FAMILIES`.

Whatever else tells a family apart is data in its row: its table of weight names, the fields it reads, and what its
config.json spells otherwise.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from slmkit.config import UserError
from slmkit.model import names
from slmkit.model.architecture import Architecture, Latent, Layer
from slmkit.model.rope import DynamicNTK, Yarn, yarn_growth
from slmkit.model.rope_settings import rope_of

if TYPE_CHECKING:
    from slmkit.model.config import SLMConfig

Names = Mapping[str, str]
FULL, SLIDING = "full_attention", "sliding_attention"


@dataclass(frozen=True)
class Family:
    """What slmkit knows of a family.

    `fields` are those of `SLMConfig` that not all families have and this one reads. `defaults` are its own where
    `SLMConfig`'s would be wrong; a function gets the other fields.
    """

    class_name: str  # `architectures` in config.json
    architecture: Callable[[SLMConfig], Architecture]
    names: Names
    fields: frozenset[str] = frozenset()
    defaults: Mapping[str, Any] = field(default_factory=dict)
    # Of config.json: what a missing key means, our fields that are spelled otherwise, keys with one legal value, and
    # keys that follow from others (None: read and dropped, never written).
    absent: Mapping[str, Any] = field(default_factory=dict)
    spelling: Mapping[str, str] = field(default_factory=dict)
    fixed: Mapping[str, Any] = field(default_factory=dict)
    derived: Mapping[str, Callable[[dict[str, Any]], Any] | None] = field(default_factory=dict)
    or_more: tuple[str, ...] = ()  # of `fixed`: a larger number means the same
    rope_by_kind: bool = False  # rope_parameters are written once for each kind of layer
    # Ends of linears' names that peft takes for parts of fused experts: an adapter's file names their weights instead.
    experts_of_peft: tuple[str, ...] = ()
    transposed: tuple[str, ...] = ()  # endings of the names of matrices that are stored [in, out]


def family_of(model_type: str) -> Family:
    """Raises `UserError` for a family that is not supported."""
    if model_type not in FAMILIES:
        raise UserError(f"model_type {model_type!r} is not supported; known: {', '.join(sorted(FAMILIES))}")
    return FAMILIES[model_type]


def architecture_of(config: SLMConfig) -> Architecture:
    """The decoder's choices for a config. Raises `UserError` for a family that is not supported."""
    return family_of(config.model_type).architecture(config)


def optional_fields() -> frozenset[str]:
    """The fields of `SLMConfig` that some families have and others do not."""
    return frozenset().union(*(family.fields for family in FAMILIES.values()))


def _layers(config: SLMConfig) -> tuple[Layer, ...]:
    """What the config says of each layer: its rotation, by kind where kinds differ in it, and its window."""
    depth, positions = config.num_hidden_layers, config.max_position_embeddings
    kinds = config.layer_types or ["sliding_attention" if config.sliding_window else "full_attention"] * depth
    turns = config.no_rope_layers or [1] * depth  # 1: does turn
    return tuple(
        Layer(
            rope=rope_of(config.rope_parameters, kind, config.head_dim, positions) if turn else None,
            window=config.sliding_window if kind == "sliding_attention" else None,
        )
        for kind, turn in zip(kinds, turns)
    )


def families_with(field_name: str) -> list[str]:
    """The families that read this field."""
    return sorted(name for name, family in FAMILIES.items() if field_name in family.fields)


def _positions(config: SLMConfig, layers: tuple[Layer, ...]) -> int:
    """The longest text: what the config says, and with dynamic NTK, which begins where that ends, its factor more."""
    scalings = [layer.rope.scaling for layer in layers if layer.rope is not None]
    growth = max((scaling.factor for scaling in scalings if isinstance(scaling, DynamicNTK)), default=1.0)
    return round(config.max_position_embeddings * growth)


def _llama(config: SLMConfig, **choices: Any) -> Architecture:
    """Llama 3.2, and what others have in common with it: `choices` are where they differ."""
    layers = choices.get("layers") or _layers(config)
    common: dict[str, Any] = {
        "vocab_size": config.vocab_size,
        "width": config.hidden_size,
        "heads": config.num_attention_heads,
        "kv_heads": config.num_key_value_heads,
        "head_dim": config.head_dim,
        "mlp_width": config.intermediate_size,
        "max_positions": _positions(config, layers),
        "layers": layers,
        "norm": "rms",
        "norm_eps": config.rms_norm_eps,
        "norm_at": "pre",
        "qk_norm": "none",
        "activation": config.hidden_act,
        "gated_mlp": True,
        "qkv_bias": config.attention_bias,
        "out_bias": config.attention_bias,
        "mlp_bias": config.mlp_bias,
        "tied": config.tie_word_embeddings,
        "attention_scale": config.head_dim**-0.5,
        "attention_dropout": config.attention_dropout,
        "hidden_dropout": config.hidden_dropout,
    }
    return Architecture(**common | choices)


def _gpt2(config: SLMConfig) -> Architecture:
    return _llama(
        config,
        kv_heads=config.num_attention_heads,
        head_dim=config.hidden_size // config.num_attention_heads,
        layers=(Layer(),) * config.num_hidden_layers,
        learned_positions=True,
        norm="layer",
        gated_mlp=False,
        qkv_bias=True,
        out_bias=True,
        mlp_bias=True,
    )


def _qwen3(config: SLMConfig) -> Architecture:
    return _llama(config, qk_norm="head")


def _qwen2(config: SLMConfig) -> Architecture:
    return _llama(config, qkv_bias=True)


def _olmo2(config: SLMConfig) -> Architecture:
    return _llama(config, norm_at="post", qk_norm="width")


def _gemma2(config: SLMConfig, **choices: Any) -> Architecture:
    common: dict[str, Any] = {
        "norm": "rms+1",
        "norm_at": "both",
        "embedding_scale": config.hidden_size**0.5,
        "attention_scale": config.query_pre_attn_scalar**-0.5,
        "attention_cap": config.attn_logit_softcapping,
        "logit_cap": config.final_logit_softcapping,
    }
    return _llama(config, **common | choices)


def _gemma3(config: SLMConfig) -> Architecture:
    return _gemma2(config, qk_norm="head")


def _deepseek(config: SLMConfig) -> Architecture:
    latent = Latent(
        query_rank=config.q_lora_rank,
        kv_rank=config.kv_lora_rank,
        rope_dim=config.qk_rope_head_dim,
        plain_dim=config.qk_nope_head_dim,
        value_dim=config.v_head_dim,
        neighbours_turn=config.rope_interleave,
    )
    layer = Layer(rope_of(config.rope_parameters, FULL, latent.rope_dim, config.max_position_embeddings))
    scale, scaling = (latent.plain_dim + latent.rope_dim) ** -0.5, layer.rope and layer.rope.scaling
    if isinstance(scaling, Yarn) and scaling.mscale_all_dim:  # longer, as the turned channels are
        scale *= yarn_growth(scaling.factor, scaling.mscale_all_dim) ** 2
    layers = (layer,) * config.num_hidden_layers
    return _llama(config, layers=layers, kv_heads=config.num_attention_heads, latent=latent, attention_scale=scale)


def _slm(config: SLMConfig) -> Architecture:
    """No published family: every choice is a field, to study what each of them does."""
    return _llama(
        config,
        norm=config.norm,
        norm_at=config.norm_at,
        qk_norm=config.qk_norm,
        gated_mlp=config.gated_mlp,
        attention_cap=config.attn_logit_softcapping,
        logit_cap=config.final_logit_softcapping,
    )


def _layer_types(fields: dict[str, Any], full_every: int | None = None) -> list[str] | None:
    """Layers with the window, every so many of them one without; None where nothing has a window."""
    if not fields["sliding_window"]:
        return None
    layers = range(1, fields["num_hidden_layers"] + 1)
    return [FULL if full_every and i % full_every == 0 else SLIDING for i in layers]


def _one_in(full_every: int) -> Callable[[dict[str, Any]], list[str] | None]:
    return lambda fields: _layer_types(fields, full_every)


def _bases(full: float, sliding: float) -> dict[str, dict[str, Any]]:
    return {kind: {"rope_type": "default", "rope_theta": theta} for kind, theta in ((FULL, full), (SLIDING, sliding))}


def _three_of_four_turn(fields: dict[str, Any]) -> list[int]:
    return [int(i % 4 != 0) for i in range(1, fields["num_hidden_layers"] + 1)]


def _first_sliding(fields: dict[str, Any]) -> int:
    """The first layer with a window, as Qwen's older configs say which layers have one; the depth where none has."""
    kinds = fields["layer_types"] or []
    return kinds.index(SLIDING) if SLIDING in kinds else fields["num_hidden_layers"]


_ROTARY = frozenset({"num_key_value_heads", "head_dim", "rope_parameters"})
_BIASES = frozenset({"attention_bias", "mlp_bias"})
_WINDOWS = frozenset({"sliding_window", "layer_types"})
_CAPS = frozenset({"attn_logit_softcapping", "final_logit_softcapping"})
_LATENT = frozenset({"q_lora_rank", "kv_lora_rank", "qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim"})
_UNTIED = {"tie_word_embeddings": False, "rms_norm_eps": 1e-6}
_QWEN_WINDOWS: dict[str, Any] = {
    "use_sliding_window": lambda fields: fields["sliding_window"] is not None,
    "max_window_layers": _first_sliding,
}
_GEMMA_DEFAULTS: dict[str, Any] = {
    "hidden_act": "gelu_pytorch_tanh",
    "rms_norm_eps": 1e-6,
    "query_pre_attn_scalar": 256,
}
_GEMMA_ABSENT: dict[str, Any] = {"rms_norm_eps": 1e-6, "sliding_window": 4096, "head_dim": 256}
# Experts are not supported: every layer is dense, and what experts there would be is never asked for.
_EXPERTS = (
    "n_routed_experts", "n_shared_experts", "n_group", "topk_group", "topk_method", "num_experts_per_tok",
    "moe_intermediate_size", "moe_layer_freq", "norm_topk_prob", "routed_scaling_factor", "scoring_func", "seq_aux",
    "aux_loss_alpha", "ep_size", "num_nextn_predict_layers", "num_mtp_layers", "output_router_logits",
    "router_aux_loss_coef", "num_key_value_heads", "head_dim", "qk_head_dim",
)  # fmt: skip
_DENSE: dict[str, Any] = dict.fromkeys(_EXPERTS) | {
    "num_key_value_heads": lambda fields: fields["num_attention_heads"],
}

FAMILIES: dict[str, Family] = {
    "gpt2": Family(
        "GPT2LMHeadModel",
        _gpt2,
        names.GPT2,
        defaults={"hidden_act": "gelu_new", "intermediate_size": lambda fields: 4 * fields["hidden_size"]},
        spelling={
            "hidden_size": "n_embd",
            "num_hidden_layers": "n_layer",
            "num_attention_heads": "n_head",
            "intermediate_size": "n_inner",
            "max_position_embeddings": "n_positions",
            "hidden_act": "activation_function",
            "rms_norm_eps": "layer_norm_epsilon",
            "attention_dropout": "attn_pdrop",
            "hidden_dropout": "resid_pdrop",
        },
        fixed={"scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False, "add_cross_attention": False},
        derived={
            "n_ctx": lambda fields: fields["max_position_embeddings"],
            "embd_pdrop": lambda fields: fields["hidden_dropout"],
            "reorder_and_upcast_attn": None,
        },
        transposed=names.GPT2_TRANSPOSED,
    ),
    "llama": Family("LlamaForCausalLM", _llama, names.LLAMA, _ROTARY | _BIASES, absent=_UNTIED),
    "mistral": Family(
        "MistralForCausalLM",
        _llama,
        names.LLAMA,
        _ROTARY | {"sliding_window"},
        absent=_UNTIED | {"sliding_window": 4096},
    ),
    "qwen2": Family(
        "Qwen2ForCausalLM",
        _qwen2,
        names.LLAMA,
        _ROTARY | _WINDOWS,
        defaults={"layer_types": _layer_types},
        absent=_UNTIED | {"sliding_window": 4096, "use_sliding_window": False, "max_window_layers": 28},
        derived=_QWEN_WINDOWS,
    ),
    "qwen3": Family(
        "Qwen3ForCausalLM",
        _qwen3,
        names.QWEN3,
        _ROTARY | _WINDOWS | {"attention_bias"},
        defaults={"layer_types": _layer_types},
        absent=_UNTIED | {"head_dim": 128},
        derived=_QWEN_WINDOWS,
    ),
    "smollm3": Family(
        "SmolLM3ForCausalLM",
        _llama,
        names.LLAMA,
        _ROTARY | _WINDOWS | _BIASES | {"no_rope_layers"},
        defaults={"no_rope_layers": _three_of_four_turn},
        absent={"rms_norm_eps": 1e-6, "rope_theta": 2e6},
        derived={"use_sliding_window": _QWEN_WINDOWS["use_sliding_window"], "no_rope_layer_interval": None},
    ),
    "olmo2": Family(
        "Olmo2ForCausalLM",
        _olmo2,
        names.OLMO2,
        _ROTARY | {"attention_bias"},
        absent={"tie_word_embeddings": False},
    ),
    "olmo3": Family(
        "Olmo3ForCausalLM",
        _olmo2,
        names.OLMO2,
        _ROTARY | _WINDOWS | {"attention_bias"},
        defaults={"layer_types": _one_in(4), "rope_parameters": _bases(full=5e5, sliding=5e5)},
        absent={"tie_word_embeddings": False, "sliding_window": 4096, "rope_theta": 5e5},
        rope_by_kind=True,
    ),
    "gemma2": Family(
        "Gemma2ForCausalLM",
        _gemma2,
        names.GEMMA2,
        _ROTARY | _WINDOWS | _CAPS | {"attention_bias", "query_pre_attn_scalar"},
        defaults=_GEMMA_DEFAULTS | {"layer_types": _one_in(2)},
        absent=_GEMMA_ABSENT | {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0},
        spelling={"hidden_act": "hidden_activation"},
        derived={"use_bidirectional_attention": None},
    ),
    "gemma3_text": Family(
        "Gemma3ForCausalLM",
        _gemma3,
        names.GEMMA3,
        _ROTARY | _WINDOWS | {"attention_bias", "query_pre_attn_scalar", "final_logit_softcapping"},
        defaults=_GEMMA_DEFAULTS | {"layer_types": _one_in(6), "rope_parameters": _bases(full=1e6, sliding=1e4)},
        absent=_GEMMA_ABSENT | {"rope_theta": 1e6, "rope_local_base_freq": 1e4},
        spelling={"hidden_act": "hidden_activation"},
        # The reference reads a cap of scores and never applies it.
        fixed={"attn_logit_softcapping": None, "use_bidirectional_attention": False},
        rope_by_kind=True,
    ),
    "deepseek_v3": Family(
        "DeepseekV3ForCausalLM",
        _deepseek,
        names.DEEPSEEK,
        _LATENT | {"rope_parameters", "rope_interleave", "attention_bias"},
        absent=_UNTIED | {"first_k_dense_replace": 3},
        fixed={"first_k_dense_replace": lambda fields: fields["num_hidden_layers"]},
        or_more=("first_k_dense_replace",),
        experts_of_peft=(".gate_proj", ".up_proj", ".down_proj"),
        derived=_DENSE,
    ),
    "slm": Family(
        "SLMForCausalLM",
        _slm,
        names.SLM,
        _ROTARY | _WINDOWS | _BIASES | _CAPS | {"no_rope_layers", "norm", "norm_at", "qk_norm", "gated_mlp"},
    ),
}
