"""The architecture: what a model is made of, how it is initialised, and how it is written to and read from disk.

The names below are loaded when they are first used: `SLMConfig` needs no torch, which takes seconds to import.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from slmkit.model.cache import KVCache
    from slmkit.model.config import SLMConfig
    from slmkit.model.decoder import Decoder
    from slmkit.model.directory import load_decoder, save_decoder
    from slmkit.model.initialization import build_decoder

__all__ = ["Decoder", "KVCache", "SLMConfig", "build_decoder", "load_decoder", "save_decoder"]

_HOME = {
    "Decoder": "decoder",
    "KVCache": "cache",
    "SLMConfig": "config",
    "build_decoder": "initialization",
    "load_decoder": "directory",
    "save_decoder": "directory",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"slmkit.model.{_HOME[name]}"), name)
