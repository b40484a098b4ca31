"""What changes a built model: LoRA, merging, quantization. The names below are loaded when they are first used."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from slmkit.adapt.adapter import load_adapter, save_adapter
    from slmkit.adapt.folding import fold
    from slmkit.adapt.load import load_adapted, load_model
    from slmkit.adapt.lora import add_lora
    from slmkit.adapt.swapping import swap
    from slmkit.model.lora_settings import LoRASettings

__all__ = ["LoRASettings", "add_lora", "fold", "load_adapted", "load_adapter", "load_model", "save_adapter", "swap"]

_HOME = {
    "LoRASettings": "slmkit.model.lora_settings",
    "add_lora": "slmkit.adapt.lora",
    "fold": "slmkit.adapt.folding",
    "load_adapted": "slmkit.adapt.load",
    "load_adapter": "slmkit.adapt.adapter",
    "load_model": "slmkit.adapt.load",
    "save_adapter": "slmkit.adapt.adapter",
    "swap": "slmkit.adapt.swapping",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)
