"""Parameters, memory and FLOPs of a model: the figures that `slm inspect` prints."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from slmkit.device import Device, find_device
from slmkit.find import find_model_directory
from slmkit.model.architectures import Architecture, architecture_of
from slmkit.model.config import SLMConfig
from slmkit.model.files.adapter_directory import ADAPTER_WEIGHTS, config_directory, is_adapter
from slmkit.model.files.stored import stored_tensors
from slmkit.model.presets import find_model_or_preset
from slmkit.model.sizes import cache_size, cache_variants, flops_per_token, parameters_by_module
from slmkit.training.estimate.memory import reading_bytes, training_bytes
from slmkit.training.estimate.memory_profile import Blueprint, MemoryProfile
from slmkit.training.recipe.recipe import TrainSettings

LONGEST_BY_DEFAULT = 2_048  # tokens


@dataclass(frozen=True)
class Inspection:
    """Figures of one model: sizes in bytes, FLOPs per token; a multiply-add counts as two."""

    summary: str
    length: int
    parameters: dict[str, int]
    operations: dict[str, int]
    cache_bytes: dict[str, int]  # per token, of layers without a window: this configuration and others
    windows: str
    cache_of_a_row: int
    memory: dict[str, int]
    device: str

    @property
    def parameter_count(self) -> int:
        return sum(self.parameters.values())


def inspect_model(
    model: str | Path,
    rows: int = 8,
    length: int | None = None,
    precision: str = "auto",
    optimizer: str = "adamw",
    adapted: Callable[[Path], Blueprint] | None = None,
) -> Inspection:
    """`model` is a model directory, an adapter, a run or a preset; `rows` of `length` tokens go through it at once.

    `adapted` builds the model of an adapter directory: training is then that of the adapter on a frozen base. Raises
    `UserError` for a model that does not exist, and for a length beyond its context.
    """
    config = config_of(model)
    a = architecture_of(config)
    length = length or min(a.max_positions, LONGEST_BY_DEFAULT)
    a.expect(length)
    device = find_device("cpu", precision)
    adapter = _adapter_directory(model)
    blueprint = adapted(adapter) if adapted is not None and adapter is not None else a
    flops = flops_per_token(a, length)
    cache = cache_size(a, length)
    windows = f", and {cache.of_windows:,} a row for layers with a window" if cache.of_windows else ""
    return Inspection(
        summary=_summary(config, a),
        length=length,
        parameters=parameters_by_module(a) | _adapter_of(adapter),
        operations={
            "forward, matrices": flops.matrices,
            "forward, attention": flops.attention,
            "backward": flops.backward,
        },
        cache_bytes={"as it is": cache.per_token}
        | {name: cache_size(variant, length).per_token for name, variant in cache_variants(a).items()},
        windows=windows,
        cache_of_a_row=cache.at_length,
        memory=_memory(a, blueprint, rows, length, device, optimizer),
        device=f"products in {device.describe()['compute_dtype']}",
    )


def config_of(model: str | Path) -> SLMConfig:
    """The config of a preset, a model directory, an adapter's base or a run's best checkpoint.

    Raises `UserError` for none of them.
    """
    found = find_model_or_preset(model)
    return (
        SLMConfig.from_preset(found) if isinstance(found, str) else SLMConfig.from_pretrained(config_directory(found))
    )


def _adapter_directory(model: str | Path) -> Path | None:
    """The directory of `model` if it is an adapter; else None."""
    found = find_model_or_preset(model)
    return find_model_directory(model) if isinstance(found, Path) and is_adapter(found) else None


def _adapter_of(directory: Path | None) -> dict[str, int]:
    """Parameters of an adapter, without its base."""
    if directory is None:
        return {}
    tensors = stored_tensors(directory / ADAPTER_WEIGHTS).values()
    return {"adapter": sum(torch.Size(tensor.shape).numel() for tensor in tensors)}


def _memory(
    a: Architecture, blueprint: Blueprint, rows: int, length: int, device: Device, optimizer: str
) -> dict[str, int]:
    settings, inventory = TrainSettings(optimizer=optimizer), MemoryProfile(blueprint)
    return {
        f"training with {optimizer}": training_bytes(inventory, settings, rows, length, device),
        "… and gradient_checkpointing": training_bytes(inventory, settings, rows, length, device, recompute_every=1),
        "running in float32": reading_bytes(a, rows, length, torch.float32),
        "running in bfloat16": reading_bytes(a, rows, length, torch.bfloat16),
    }


def _summary(config: SLMConfig, a: Architecture) -> str:
    attention = f"{a.heads} heads over {a.kv_heads} key-value heads of {a.head_dim}"
    if a.latent is not None:
        attention = f"{a.heads} heads over latents of {a.latent.kv_rank} + {a.latent.rope_dim}"
    windows = sum(layer.window is not None for layer in a.layers)
    seen = f" ({windows} with a window)" if windows else ""
    return (
        f"{config.model_type}, {a.depth} layers{seen} of width {a.width}, {attention}, MLP {a.mlp_width}, "
        f"{a.vocab_size:,} tokens, context {a.max_positions:,}"
    )
