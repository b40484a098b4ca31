"""config.json: its spelling in transformers 4 and 5, and defaults for older files."""

from __future__ import annotations

from numbers import Integral
from pathlib import Path
from typing import Any

from slmkit.config import read_table
from slmkit.model.families import FULL, SLIDING, Family

HARMLESS = {name: {*keys.split()} for name, keys in read_table(Path(__file__).with_name("harmless_keys.yaml")).items()}
# Keys that transformers reads for every family, or older programs wrote: the one supported value.
ONLY_WITH: dict[str, Any] = {
    "attention_chunk_size": None, "cross_attention_hidden_size": None, "is_causal": True, "is_encoder_decoder": False,
    "partial_rotary_factor": 1.0, "per_layer_config": None, "pruned_heads": {},
    "rope_interleaved": False, "tie_encoder_decoder": False, "use_mrope": False,
}  # fmt: skip
# The same for each group of a compressed-tensors config, and for the `weights` of a group: the supported values.
GROUP_ONLY_WITH: dict[str, tuple[Any, ...]] = {
    "input_activations": (None,), "output_activations": (None,), "format": (None, "pack-quantized"),
}  # fmt: skip
WEIGHTS_ONLY_WITH: dict[str, tuple[Any, ...]] = {
    "num_bits": (4, 8), "type": ("int",), "symmetric": (True,), "strategy": ("group", "channel"),
    "actorder": (None, "static", "weight"), "dynamic": (False, None),
}  # fmt: skip
MOST_LAYERS = 1_000  # no published model has as many; what a damaged file asks for would not end
OWN_FORMAT = "slmkit"  # `made_by` of a quantization that transformers has no form for
# Written as null if derived from other fields.
NULL_IS_ABSENT = {"head_dim", "intermediate_size", "layer_types", "no_rope_layers", "num_key_value_heads"}


def from_published(content: dict[str, Any], family: Family) -> dict[str, Any]:
    """The content of a config.json → fields of `SLMConfig`, under their own names."""
    _expect_one_rope(content)
    ours = {theirs: name for name, theirs in family.spelling.items()}
    content = {family.spelling.get(key, key): value for key, value in family.absent.items()} | content
    spelled = {ours[key]: content.pop(key) for key in tuple(content) if key in ours}
    content |= spelled  # if the file has both, the family's spelling counts
    for key in NULL_IS_ABSENT:
        if content.get(key, ...) is None:
            del content[key]
    expect_depth(content.get("num_hidden_layers") or 1)
    _read_layers(content)
    for key in HARMLESS["config"] | family.derived.keys():
        content.pop(key, None)
    for key, value in (ONLY_WITH | _fixed(family, content)).items():
        found = content.pop(key, value)
        is_more = key in family.or_more and isinstance(found, int) and isinstance(value, int) and found > value
        if found not in (value, None) and not is_more:
            raise ValueError(f"{key} is {str(found)[:80]}: only {value!r} is supported")
    if "rope_parameters" in family.fields:
        _read_rope(content, family.rope_by_kind)
    expect_quantization(content.pop("quantization_config", None))
    return content


def expect_depth(layers: Any) -> None:
    """Raises `ValueError` for what is no number of layers: before anything is made for each of them."""
    if not isinstance(layers, Integral) or int(layers) > MOST_LAYERS:
        raise ValueError(
            f"num_hidden_layers: expected a whole number of at most {MOST_LAYERS:,}, found {str(layers)[:80]!r}"
        )


def expect_quantization(found: Any) -> None:
    """Raises `ValueError` that names the first key of a `quantization_config` for weights that cannot be read here."""
    if found is None or (isinstance(found, dict) and found.get("made_by") == OWN_FORMAT):
        return
    method = found.get("quant_method") if isinstance(found, dict) else None
    if method == "bitsandbytes":
        wanted: dict[str, tuple[Any, ...]] = {
            "load_in_4bit": (True,), "bnb_4bit_quant_type": ("nf4",), "bnb_4bit_quant_storage": ("uint8", None),
        }  # fmt: skip
        _expect_values("quantization_config", found, wanted)
        _expect_names("quantization_config", found, "llm_int8_skip_modules")
    elif method == "compressed-tensors":
        wanted = {"kv_cache_scheme": (None,), "sparsity_config": (None, {}), "transform_config": (None, {})}
        _expect_values("quantization_config", found, wanted | {"format": ("pack-quantized",)})
        _expect_names("quantization_config", found, "ignore")
        groups = found.get("config_groups")
        for name, group in groups.items() if isinstance(groups, dict) else [("", groups)]:
            where = f"quantization_config.config_groups{name and '.'}{name}"
            _expect_values(where, group, GROUP_ONLY_WITH)
            _expect_names(where, group, "targets")
            _expect_values(f"{where}.weights", weights := group.get("weights"), WEIGHTS_ONLY_WITH)
            size, by_channel = weights.get("group_size"), weights["strategy"] == "channel"
            if size not in (None, -1) if by_channel else type(size) is not int or size < 1:
                expected = "null, for strategy 'channel'" if by_channel else "a whole number above 0"
                raise ValueError(f"{where}.weights: group_size is {str(size)[:80]!r}: expected {expected}")
    else:
        raise ValueError(
            f"quantization_config is {str(found)[:80]}: only compressed-tensors (pack-quantized) and bitsandbytes "
            "(nf4) are supported: use the full model, and `slm quantize`"
        )


def _expect_values(where: str, found: Any, wanted: dict[str, tuple[Any, ...]]) -> None:
    if not isinstance(found, dict):
        raise ValueError(f"{where}: expected an object, found {str(found)[:80]!r}")
    for key, values in wanted.items():
        value = found.get(key)
        if value not in values:
            supported = " or ".join(map(repr, values))
            raise ValueError(f"{where}: {key} is {str(value)[:80]!r}: only {supported} is supported")


def _expect_names(where: str, found: dict[str, Any], key: str) -> None:
    names = found.get(key)
    if names is not None and not (isinstance(names, list) and all(isinstance(name, str) for name in names)):
        raise ValueError(f"{where}: {key} is {str(names)[:80]!r}: expected a list of names")


def to_published(fields: dict[str, Any], family: Family) -> dict[str, Any]:
    """Fields of `SLMConfig` → the content of a config.json, with RoPE and windows in the spellings of all versions."""
    content = {family.spelling.get(name, name): value for name, value in fields.items()}
    if "rope_parameters" in fields:
        content |= _older_rope(fields["rope_parameters"])
    derived = {key: value(fields) for key, value in family.derived.items() if value is not None}
    head = {"architectures": [family.class_name], "dtype": "float32", "use_cache": True}
    return head | content | _fixed(family, fields) | derived


def _fixed(family: Family, fields: dict[str, Any]) -> dict[str, Any]:
    return {key: value(fields) if callable(value) else value for key, value in family.fixed.items()}


def _read_rope(content: dict[str, Any], by_kind: bool) -> None:
    """Convert the older `rope_theta`, `rope_local_base_freq` and `rope_scaling` to `rope_parameters`, in place."""
    theta, local, scaling = (content.pop(key, None) for key in ("rope_theta", "rope_local_base_freq", "rope_scaling"))
    newer = content.get("rope_parameters")
    if newer and FULL in newer:
        content["rope_parameters"] = {
            kind: _complete(newer[kind], theta) for kind in (FULL, SLIDING) if newer.get(kind)
        }
        return
    rope = _complete(newer or scaling or {}, theta)
    # Layers with a window may have another RoPE base, and are never scaled.
    content["rope_parameters"] = {FULL: rope, SLIDING: _complete({}, local or theta)} if by_kind else rope


def _expect_one_rope(content: dict[str, Any]) -> None:
    """Raises `ValueError` for a key of RoPE with different values in the spellings of transformers 5 and 4."""
    found, scaling = content.get("rope_parameters"), content.get("rope_scaling")
    newer: Any = found.get(FULL, found) if isinstance(found, dict) else None
    older = {"rope_theta": content.get("rope_theta")} | (scaling if isinstance(scaling, dict) else {})
    for key in sorted(newer.keys() & older.keys()) if isinstance(newer, dict) else ():
        if newer[key] != older[key] and None not in (newer[key], older[key]):
            raise ValueError(
                f"{key} is {str(newer[key])[:80]} in rope_parameters and {str(older[key])[:80]} in the older spelling: "
                "remove the wrong one"
            )


def _complete(rope: dict[str, Any], theta: float | None) -> dict[str, Any]:
    rope = dict(rope)
    if "type" in rope:  # transformers before 4.43
        rope.setdefault("rope_type", rope.pop("type"))
    partial = rope.pop("partial_rotary_factor", None)
    if partial not in (None, 1.0):
        raise ValueError(f"partial_rotary_factor is {str(partial)[:80]}: only 1.0 is supported")
    return {"rope_type": "default", "rope_theta": theta or 10_000.0} | rope


def _older_rope(rope: dict[str, Any]) -> dict[str, Any]:
    """`rope_theta` and `rope_scaling` as transformers 4, vLLM and llama.cpp's converter read them."""
    older = {"rope_local_base_freq": rope[SLIDING]["rope_theta"]} if SLIDING in rope else {}
    full = rope.get(FULL, rope)
    scaled = full["rope_type"] != "default"
    scaling = {key: value for key, value in full.items() if key != "rope_theta"} if scaled else None
    return older | {"rope_theta": full["rope_theta"], "rope_scaling": scaling}


def _read_layers(content: dict[str, Any]) -> None:
    """Convert the shorthands for sliding layers to `sliding_window` and `layer_types`, in place."""
    first = content.pop("max_window_layers", None)
    every = content.pop("sliding_window_pattern", content.pop("_sliding_window_pattern", None))
    turning_every = content.pop("no_rope_layer_interval", None)
    depth = content.get("num_hidden_layers")
    if content.pop("use_sliding_window", True) is False:
        content["sliding_window"] = None
    if turning_every and depth and "no_rope_layers" not in content:
        content["no_rope_layers"] = [int(i % turning_every != 0) for i in range(1, depth + 1)]
    if set(content.get("layer_types") or ()) == {FULL} and not content.get("sliding_window"):
        del content["layer_types"]
    if not content.get("sliding_window") or not depth or "layer_types" in content:
        return
    if every is not None:
        content["layer_types"] = [FULL if i % every == 0 else SLIDING for i in range(1, depth + 1)]
    elif first is not None:
        content["layer_types"] = [SLIDING if i >= first else FULL for i in range(depth)]
