"""`adapter_config.json` in the format of `peft`."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import Field

from slmkit.config import UserError, load_settings, read_json_object
from slmkit.model.families import Family
from slmkit.model.files.adapter_directory import ADAPTER_CONFIG, LoRASettings, scale_of
from slmkit.model.files.published import HARMLESS

WEIGHT = r"(\.weight)?"  # at the end of a pattern: peft compares it with names of modules or of weights
# Initialisations of A and B that leave the base unchanged; others change it, and it is not stored with the adapter.
STARTS = (True, False, "gaussian", "eva", "orthogonal")


class AdapterConfig(LoRASettings):
    """Content of an adapter's config: settings, and what peft knows besides."""

    alpha_pattern: dict[str, float] = Field(default_factory=dict)
    exclude_modules: str | list[str] = Field(default_factory=list)
    layers_to_transform: int | list[int] | None = None
    # experts' weights, which no model here has, match nothing in peft either
    target_parameters: list[str] = Field(default_factory=list)
    ensure_weight_tying: bool = False  # the stored embedding is also the head

    @property
    def settings(self) -> LoRASettings:
        return LoRASettings(**{name: getattr(self, name) for name in LoRASettings.model_fields})

    @property
    def excluded(self) -> list[str]:
        """Modules that have no update."""
        named = [self.exclude_modules] if isinstance(self.exclude_modules, str) else self.exclude_modules
        return [*self.modules_to_save, *named]

    def scale_at(self, name: str, r: int) -> float:
        """Factor on the update of the reference's module `name`, of rank `r`."""
        alphas = (alpha for key, alpha in self.alpha_pattern.items() if re.match(rf"(.*\.)?({key})$", name))
        return scale_of(next(alphas, self.lora_alpha), r, self.use_rslora)


def read_adapter_config(directory: Path) -> AdapterConfig:
    """The adapter's config. Raises `UserError` if the file is invalid, or needs an unsupported feature."""
    path = directory / ADAPTER_CONFIG
    content = read_json_object(path)
    if content.pop("peft_type", None) != "LORA":
        raise UserError(f"{path}: not a LoRA adapter: expected peft_type LORA, the only kind that is supported")
    if (start := content.pop("init_lora_weights", True)) not in STARTS:
        raise UserError(
            f"{path}: init_lora_weights {start!r} also changes the base: convert it to plain LoRA with peft"
        )
    if (bias := content.pop("bias", "none")) != "none":
        raise UserError(f"{path}: bias {bias!r}: trained biases are not supported; expected none")
    known = {key: content.pop(key) for key in tuple(content) if key in AdapterConfig.model_fields}
    for key, value in content.items():
        if key not in HARMLESS["adapter"] and value not in (None, False, {}, []):
            raise UserError(f"{path}: {key} is {value!r}, which is not supported")
    known = {key: value for key, value in known.items() if value is not None}
    if known.get("target_parameters"):
        known.setdefault("target_modules", [])
    return load_settings(AdapterConfig, known, origin=str(path))


def adapter_config(
    base: str,
    settings: LoRASettings,
    shapes: Mapping[str, tuple[int, float]],
    others: Sequence[str],
    family: Family,
) -> dict[str, Any]:
    """Content of the file for modules of these names, ranks and scales; `others` are linears that are not adapted.

    In families with experts, peft treats modules with names of experts' parts as fused experts, also in dense layers.
    It finds such linears by the names of their weights, for which it supports neither dropout nor DoRA.
    """
    modules, weights = modules_and_weights(shapes, family, settings)
    alphas = {name: scale * (r**0.5 if settings.use_rslora else r) for name, (r, scale) in shapes.items()}
    r, rank_pattern = _common({name: r for name, (r, _) in shapes.items()})
    alpha, alpha_pattern = _common({name: _whole(alpha) for name, alpha in alphas.items()})
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": r,
        "lora_alpha": alpha,
        "lora_dropout": 0.0 if weights else settings.lora_dropout,
        "target_modules": target_names(modules, others),
        "target_parameters": [f"{name}.weight" for name in target_names(weights, others)] or None,
        "modules_to_save": None,
        "use_rslora": settings.use_rslora,
        "use_dora": settings.use_dora,
        "rank_pattern": rank_pattern,
        "alpha_pattern": alpha_pattern,
        "fan_in_fan_out": bool(family.transposed),
        "bias": "none",
        "init_lora_weights": True,
        "inference_mode": True,
    }


def modules_and_weights(names: Iterable[str], family: Family, settings: LoRASettings) -> tuple[list[str], list[str]]:
    """The reference's names of linears that peft finds as modules, and those that it finds by their weights.

    Raises `UserError` for DoRA of the latter.
    """
    weights = [name for name in names if name.endswith(family.experts_of_peft)]
    if weights and settings.use_dora:
        raise UserError(
            f"use_dora: peft cannot load DoRA of {weights[0]!r} in this family: "
            "set lora.target_modules to linears of the attention, or drop use_dora"
        )
    return [name for name in names if name not in weights], weights


def target_names(adapted: Sequence[str], others: Sequence[str]) -> list[str]:
    """The shortest name suffixes that match all adapted modules, and no other."""
    ends: dict[str, None] = {}
    for name in adapted:
        parts = name.split(".")
        tails = (".".join(parts[-n:]) for n in range(1, len(parts)))
        ends[next((tail for tail in tails if not any(f".{other}".endswith(f".{tail}") for other in others)), name)] = (
            None
        )
    return list(ends)


def _common(values: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """The most common value, and the entries with another."""
    common = Counter(values.values()).most_common(1)[0][0]
    return common, {f"{re.escape(name)}{WEIGHT}": value for name, value in values.items() if value != common}


def _whole(number: float) -> float:
    """The number as an integer if it is one up to rounding, as peft expects of an alpha."""
    nearest = round(number)
    return nearest if abs(number - nearest) < 1e-9 * max(1, nearest) else number
