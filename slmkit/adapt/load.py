"""Whatever a MODEL may be: a model directory, or an adapter beside the model it belongs to."""

from __future__ import annotations

from pathlib import Path

import torch

from slmkit.adapt.adapter import load_adapter
from slmkit.adapt.fold import fold
from slmkit.model import Decoder, SLMConfig, load_decoder
from slmkit.model.adapter_directory import base_of, is_adapter
from slmkit.model.lora_settings import LoRASettings


def load_model(directory: str | Path, device: torch.device | str = "cpu") -> tuple[Decoder, SLMConfig]:
    """Read a model directory as `load_decoder` does; an adapter is folded into its base.

    Raises `UserError` as `load_decoder` and `load_adapter` do, and where an adapter's base is not there.
    """
    if not is_adapter(directory):
        return load_decoder(directory, device)
    decoder, config, _ = load_adapted(directory, device)
    return fold(decoder), config


def load_adapted(directory: str | Path, device: torch.device | str = "cpu") -> tuple[Decoder, SLMConfig, LoRASettings]:
    """An adapter beside its frozen base, to be trained on. Raises `UserError` as `load_model` does."""
    decoder, config = load_decoder(base_of(directory), device)
    settings = load_adapter(decoder, config, directory)
    return decoder.eval(), config, settings
