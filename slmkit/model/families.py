"""The families: one row each, with weight names, supported fields, and the spelling of config.json.

The function from a family's config to its `Architecture` is in `architectures.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from slmkit.config import UserError, read_table

Names = Mapping[str, str]
FULL, SLIDING = "full_attention", "sliding_attention"
NOT_IN_TRANSFORMERS = ("slm",)  # families that transformers has no code for


@dataclass(frozen=True)
class Family:
    """Description of a family.

    `fields` are the optional fields of `SLMConfig` that this family reads. `defaults` replace those of `SLMConfig`; a
    function is called with the other fields.
    """

    class_name: str  # `architectures` in config.json
    names: Names
    fields: frozenset[str] = frozenset()
    defaults: Mapping[str, Any] = field(default_factory=dict)
    # In config.json: values of missing keys, other spellings of our fields, keys with one supported value, and keys
    # derived from others (None: read and dropped, never written).
    absent: Mapping[str, Any] = field(default_factory=dict)
    spelling: Mapping[str, str] = field(default_factory=dict)
    fixed: Mapping[str, Any] = field(default_factory=dict)
    derived: Mapping[str, Callable[[dict[str, Any]], Any] | None] = field(default_factory=dict)
    or_more: tuple[str, ...] = ()  # keys of `fixed` for which a larger number means the same
    rope_by_kind: bool = False  # rope_parameters are written once for each kind of layer
    # Suffixes of linears that peft treats as parts of fused experts: an adapter's file names their weights instead.
    experts_of_peft: tuple[str, ...] = ()
    transposed: tuple[str, ...] = ()  # endings of the names of matrices that are stored [in, out]


def family_of(model_type: str) -> Family:
    """The family of a `model_type`. Raises `UserError` if it is not supported."""
    if model_type not in FAMILIES:
        raise UserError(f"model_type {model_type!r} is not supported; known: {', '.join(sorted(FAMILIES))}")
    return FAMILIES[model_type]


def optional_fields() -> frozenset[str]:
    """The fields of `SLMConfig` that not all families have."""
    return frozenset().union(*(family.fields for family in FAMILIES.values()))


def families_with(field_name: str) -> list[str]:
    """The families that read this field."""
    return sorted(name for name, family in FAMILIES.items() if field_name in family.fields)


def _layer_types(fields: dict[str, Any], full_every: int | None = None) -> list[str] | None:
    """Sliding layers, with every `full_every`-th layer full; None without a window."""
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
    """Index of the first layer with a window, as in Qwen's older configs; the number of layers if none has one."""
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
# Experts are not supported: every layer is dense, and the keys that describe experts are ignored.
_EXPERTS = (
    "n_routed_experts", "n_shared_experts", "n_group", "topk_group", "topk_method", "num_experts_per_tok",
    "moe_intermediate_size", "moe_layer_freq", "norm_topk_prob", "routed_scaling_factor", "scoring_func", "seq_aux",
    "aux_loss_alpha", "ep_size", "num_nextn_predict_layers", "num_mtp_layers", "output_router_logits",
    "router_aux_loss_coef", "num_key_value_heads", "head_dim", "qk_head_dim",
)  # fmt: skip
_DENSE: dict[str, Any] = dict.fromkeys(_EXPERTS) | {"num_key_value_heads": lambda fields: fields["num_attention_heads"]}

_NAMES = read_table(Path(__file__).with_name("names.yaml"))
# Names of weights, ours → those of the reference implementation, by table.
NAMES: dict[str, Names] = {
    table: {ours: theirs for part in parts for ours, theirs in _NAMES["parts"][part].items()}
    for table, parts in _NAMES["tables"].items()
}

FAMILIES: dict[str, Family] = {
    "gpt2": Family(
        "GPT2LMHeadModel",
        NAMES["gpt2"],
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
        transposed=("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight"),
    ),
    "llama": Family("LlamaForCausalLM", NAMES["llama"], _ROTARY | _BIASES, absent=_UNTIED),
    "mistral": Family(
        "MistralForCausalLM", NAMES["llama"], _ROTARY | {"sliding_window"}, absent=_UNTIED | {"sliding_window": 4096}
    ),
    "qwen2": Family(
        "Qwen2ForCausalLM",
        NAMES["llama"],
        _ROTARY | _WINDOWS,
        defaults={"layer_types": _layer_types},
        absent=_UNTIED | {"sliding_window": 4096, "use_sliding_window": False, "max_window_layers": 28},
        derived=_QWEN_WINDOWS,
    ),
    "qwen3": Family(
        "Qwen3ForCausalLM",
        NAMES["qwen3"],
        _ROTARY | _WINDOWS | {"attention_bias"},
        defaults={"layer_types": _layer_types},
        absent=_UNTIED | {"head_dim": 128},
        derived=_QWEN_WINDOWS,
    ),
    "smollm3": Family(
        "SmolLM3ForCausalLM",
        NAMES["llama"],
        _ROTARY | _WINDOWS | _BIASES | {"no_rope_layers"},
        defaults={"no_rope_layers": _three_of_four_turn},
        absent={"rms_norm_eps": 1e-6, "rope_theta": 2e6},
        derived={"use_sliding_window": _QWEN_WINDOWS["use_sliding_window"], "no_rope_layer_interval": None},
    ),
    "olmo2": Family(
        "Olmo2ForCausalLM", NAMES["olmo2"], _ROTARY | {"attention_bias"}, absent={"tie_word_embeddings": False}
    ),
    "olmo3": Family(
        "Olmo3ForCausalLM",
        NAMES["olmo2"],
        _ROTARY | _WINDOWS | {"attention_bias"},
        defaults={"layer_types": _one_in(4), "rope_parameters": _bases(full=5e5, sliding=5e5)},
        absent={"tie_word_embeddings": False, "sliding_window": 4096, "rope_theta": 5e5},
        rope_by_kind=True,
    ),
    "gemma2": Family(
        "Gemma2ForCausalLM",
        NAMES["gemma2"],
        _ROTARY | _WINDOWS | _CAPS | {"attention_bias", "query_pre_attn_scalar"},
        defaults=_GEMMA_DEFAULTS | {"layer_types": _one_in(2)},
        absent=_GEMMA_ABSENT | {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0},
        spelling={"hidden_act": "hidden_activation"},
        derived={"use_bidirectional_attention": None},
    ),
    "gemma3_text": Family(
        "Gemma3ForCausalLM",
        NAMES["gemma3"],
        _ROTARY | _WINDOWS | {"attention_bias", "query_pre_attn_scalar", "final_logit_softcapping"},
        defaults=_GEMMA_DEFAULTS | {"layer_types": _one_in(6), "rope_parameters": _bases(full=1e6, sliding=1e4)},
        absent=_GEMMA_ABSENT | {"rope_theta": 1e6, "rope_local_base_freq": 1e4},
        spelling={"hidden_act": "hidden_activation"},
        # The reference reads attn_logit_softcapping and never applies it.
        fixed={"attn_logit_softcapping": None, "use_bidirectional_attention": False},
        rope_by_kind=True,
    ),
    "deepseek_v3": Family(
        "DeepseekV3ForCausalLM",
        NAMES["deepseek"],
        _LATENT | {"rope_parameters", "rope_interleave", "attention_bias"},
        absent=_UNTIED | {"first_k_dense_replace": 3},
        fixed={"first_k_dense_replace": lambda fields: fields["num_hidden_layers"]},
        or_more=("first_k_dense_replace",),
        experts_of_peft=(".gate_proj", ".up_proj", ".down_proj"),
        derived=_DENSE,
    ),
    "slm": Family(
        "SLMForCausalLM",
        NAMES["slm"],
        _ROTARY | _WINDOWS | _BIASES | _CAPS | {"no_rope_layers", "norm", "norm_at", "qk_norm", "gated_mlp"},
    ),
}
