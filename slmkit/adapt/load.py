"""Loading a model directory, or an adapter with its base."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from slmkit.adapt.adapter import AdapterFiles, expect_base, fingerprint, grown_for, load_adapter
from slmkit.adapt.adapter_config import read_adapter_config
from slmkit.adapt.lora import adapted_linears, add_lora, fold, keep_base_in, modules_to_save
from slmkit.config import UserError
from slmkit.model.config import SLMConfig
from slmkit.model.decoder import Decoder
from slmkit.model.files.adapter_directory import LoRASettings, base_of, is_adapter
from slmkit.model.files.directory import empty_decoder, load_decoder

Prepare = Callable[[Decoder, SLMConfig], tuple[Decoder, SLMConfig]]


def load_model(directory: str | Path, device: torch.device | str = "cpu") -> tuple[Decoder, SLMConfig]:
    """Read a model directory as `load_decoder` does; an adapter is folded into its base.

    Raises `UserError` as `load_decoder` and `load_adapter` do, and if an adapter's base is missing.
    """
    if not is_adapter(directory):
        return load_decoder(directory, device)
    decoder, config, _ = load_adapted(directory, device)
    return fold(decoder), config


def load_adapted(directory: str | Path, device: torch.device | str = "cpu") -> tuple[Decoder, SLMConfig, LoRASettings]:
    """A frozen base with its adapter, for further training. Raises `UserError` as `load_model` does."""
    decoder, config = load_decoder(base_of(directory), device)
    expect_base(directory, lambda: fingerprint(decoder))
    decoder, config = grown_for(directory, decoder, config)
    settings = load_adapter(decoder, config, directory)
    return decoder.eval(), config, settings


def adapter_blueprint(directory: str | Path) -> Decoder:
    """The model that `load_adapted` reads, on the meta device, to estimate memory."""
    config = SLMConfig.from_pretrained(base_of(directory))
    decoder, config = grown_for(directory, empty_decoder(config), config)
    load_adapter(decoder, config, directory)
    return decoder


def start_adapter(
    directory: str | Path, settings: LoRASettings, seed: int = 0, prepare: Prepare | None = None
) -> tuple[Decoder, SLMConfig, AdapterFiles]:
    """A new adapter for the model in `directory`, or the adapter in `directory`, to be trained, and its files.

    `prepare` changes a model before it gets a new adapter, for example its vocabulary.

    Raises `UserError` if the settings of an existing adapter differ from `settings`.
    """
    if not is_adapter(directory):
        decoder, config = load_decoder(directory)
        before = fingerprint(decoder)
        if prepare is not None:
            decoder, config = prepare(decoder, config)
        add_lora(decoder, config, settings, seed)
        return decoder, config, AdapterFiles(config, settings, Path(directory).resolve(), before)
    described = read_adapter_config(Path(directory)).settings
    for name in ("r", "lora_alpha", "use_rslora", "use_dora"):
        found, wanted = getattr(described, name), getattr(settings, name)
        if found != wanted:
            raise UserError(
                f"{directory}: an adapter of {name} {found}, the recipe's lora.{name} is {wanted}: "
                "set it so to train that adapter on, or fold it in first with `slm merge`"
            )
    base = base_of(directory)
    decoder, config = load_decoder(base)
    before = fingerprint(decoder)
    expect_base(directory, lambda: before)
    decoder, config = grown_for(directory, decoder, config)
    keep_base_in(decoder, settings.base_weights, modules_to_save(decoder, config, described))
    load_adapter(decoder, config, directory)
    for adapted in adapted_linears(decoder).values():
        adapted.dropout.p = settings.lora_dropout
    return decoder, config, AdapterFiles(config, settings, base, before)
