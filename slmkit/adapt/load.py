"""Loading a model directory, or an adapter with its base."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from slmkit.adapt.adapter import AdapterFiles, expect_base, fingerprint, load_adapter
from slmkit.adapt.adapter_config import read_adapter_config
from slmkit.adapt.lora import adapted_linears, add_lora, fold
from slmkit.adapt.quantize import expect_full, quantized_modules
from slmkit.adapt.quantized_files import load_quantized
from slmkit.config import UserError
from slmkit.model.config import SLMConfig
from slmkit.model.decoder import Decoder
from slmkit.model.files.adapter_directory import LoRASettings, base_of, is_adapter
from slmkit.model.files.directory import empty_decoder, load_decoder, quantization_of

Prepare = Callable[[Decoder, SLMConfig], tuple[Decoder, SLMConfig]]


def load_model(directory: str | Path, device: torch.device | str = "cpu") -> tuple[Decoder, SLMConfig]:
    """Read a model directory, quantized or not; an adapter is folded into its base, unless that is quantized.

    Raises `UserError` as `load_decoder` and `load_adapter` do, and if an adapter's base is missing.
    """
    if not is_adapter(directory):
        return load_whole(directory, device)
    decoder, config, _ = load_adapted(directory, device)
    return (decoder if quantized_modules(decoder) else fold(decoder)), config


def load_whole(directory: str | Path, device: torch.device | str = "cpu") -> tuple[Decoder, SLMConfig]:
    """Read a model directory that is no adapter. Raises `UserError` as `load_decoder` and `load_quantized` do."""
    return (load_quantized if quantization_of(directory) else load_decoder)(directory, device)


def load_adapted(directory: str | Path, device: torch.device | str = "cpu") -> tuple[Decoder, SLMConfig, LoRASettings]:
    """A frozen base with its adapter, for further training. Raises `UserError` as `load_model` does."""
    decoder, config = load_whole(base_of(directory), device)
    expect_base(directory, lambda: fingerprint(decoder))
    decoder, config, settings = load_adapter(decoder, config, directory)
    return decoder.eval(), config, settings


def adapter_meta_model(directory: str | Path) -> Decoder:
    """The model that `load_adapted` reads, on the meta device, to estimate memory."""
    config = SLMConfig.from_pretrained(base_of(directory))
    return load_adapter(empty_decoder(config), config, directory)[0]


def start_adapter(
    directory: str | Path, settings: LoRASettings, seed: int = 0, prepare: Prepare | None = None
) -> tuple[Decoder, SLMConfig, AdapterFiles]:
    """A new adapter for the model in `directory`, or the adapter in `directory`, to be trained, and its files.

    `prepare` changes a model before it gets a new adapter, for example its vocabulary.

    Raises `UserError` if the settings of an existing adapter differ from `settings`.
    """
    has_adapter = is_adapter(directory)
    if has_adapter:
        _expect_same(directory, settings)
    base = base_of(directory) if has_adapter else Path(directory)
    decoder, config = load_whole(base)
    before = fingerprint(decoder)
    if has_adapter:
        expect_base(directory, lambda: before)
        decoder, config, _ = load_adapter(decoder, config, directory, settings.base_weights)
        for adapted in adapted_linears(decoder).values():
            adapted.dropout.p = settings.lora_dropout
    else:
        if prepare is not None:
            expect_full(decoder, f"{base}, which would get more tokens")
            decoder, config = prepare(decoder, config)
        add_lora(decoder, config, settings, seed)
    return decoder, config, AdapterFiles(config, settings, base.resolve(), before)


def _expect_same(directory: str | Path, settings: LoRASettings) -> None:
    """Raises `UserError` if the adapter in `directory` has another rank, scale or kind."""
    described = read_adapter_config(Path(directory)).settings
    for name in ("r", "lora_alpha", "use_rslora", "use_dora"):
        found, wanted = getattr(described, name), getattr(settings, name)
        if found != wanted:
            raise UserError(
                f"{directory}: an adapter of {name} {found}, the recipe's lora.{name} is {wanted}: "
                "set it so to train that adapter on, or fold it in first with `slm merge`"
            )
