"""Parameters, memory and FLOPs of a model: the figures that `slm inspect` prints."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from slmkit.device import find_device
from slmkit.find import find_model_directory
from slmkit.model.architectures import Architecture, architecture_of
from slmkit.model.config import SLMConfig, find_model_or_preset
from slmkit.model.decoder import Decoder
from slmkit.model.files.adapter_directory import ADAPTER_WEIGHTS, config_directory, is_adapter
from slmkit.model.files.directory import empty_decoder
from slmkit.model.files.stored import stored_tensors
from slmkit.model.sizes import cache_size, cache_variants, flops_per_token, parameters_by_module
from slmkit.training.estimate.memory import MemoryProfile, reading_bytes, training_bytes
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
    window_bytes: int  # of a row's cache, for layers with a window
    cache_of_a_row: int
    memory: dict[str, int]
    compute_dtype: str

    @property
    def parameter_count(self) -> int:
        return sum(self.parameters.values())


def inspect_model(
    model: str | Path,
    rows: int = 8,
    length: int | None = None,
    precision: str = "auto",
    optimizer: str = "adamw",
    adapted: Callable[[Path], Decoder] | None = None,
) -> Inspection:
    """`model` is a model directory, an adapter, a run or a preset; `rows` of `length` tokens go through it at once.

    `adapted` builds the meta model of an adapter directory: training is then that of the adapter on a frozen base.
    Raises `UserError` for a model that does not exist, and for a length beyond its context.
    """
    found = find_model_or_preset(model)
    if isinstance(found, str):
        config = SLMConfig.from_preset(found)
    else:
        config = SLMConfig.from_pretrained(config_directory(found))
    a, decoder = architecture_of(config), empty_decoder(config)
    length = length or min(a.max_positions, LONGEST_BY_DEFAULT)
    a.expect(length)
    parameters = parameters_by_module(a)
    if isinstance(found, Path) and is_adapter(found):
        adapter = find_model_directory(model)
        tensors = stored_tensors(adapter / ADAPTER_WEIGHTS).values()
        parameters["adapter"] = sum(torch.Size(tensor.shape).numel() for tensor in tensors)
        decoder = decoder if adapted is None else adapted(adapter)
    device, flops, cache = find_device("cpu", precision), flops_per_token(a, length), cache_size(a, length)
    settings, profile = TrainSettings(optimizer=optimizer), MemoryProfile(decoder)
    recomputed = settings.model_copy(update={"gradient_checkpointing": 1})
    return Inspection(
        summary=_summary(config, a),
        length=length,
        parameters=parameters,
        operations={
            "forward, matrices": flops.matrices,
            "forward, attention": flops.attention,
            "backward": flops.backward,
        },
        cache_bytes={"this configuration": cache.per_token}
        | {name: cache_size(variant, length).per_token for name, variant in cache_variants(a).items()},
        window_bytes=cache.of_windows,
        cache_of_a_row=cache.at_length,
        memory={
            f"training with {optimizer}": training_bytes(profile, settings, rows, length, device),
            "… and gradient_checkpointing": training_bytes(profile, recomputed, rows, length, device),
            "running in float32": reading_bytes(a, rows, length, torch.float32),
            "running in bfloat16": reading_bytes(a, rows, length, torch.bfloat16),
        },
        compute_dtype=str(device.describe()["compute_dtype"]),
    )


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
