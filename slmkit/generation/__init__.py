"""From logits to text: sampling, the generator, streaming, conversations. The names are loaded when first used."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from slmkit.generation.chat import ChatSession
    from slmkit.generation.ensemble import Ensemble, common_tokenizer, together
    from slmkit.generation.generator import FinishReason, IdStream, generate_ids
    from slmkit.generation.language_model import LanguageModel
    from slmkit.generation.sampling_settings import SamplingSettings
    from slmkit.generation.text import Continuation, TextStream, complete, stream_completion

__all__ = [
    "ChatSession",
    "Continuation",
    "Ensemble",
    "FinishReason",
    "IdStream",
    "LanguageModel",
    "SamplingSettings",
    "TextStream",
    "common_tokenizer",
    "complete",
    "generate_ids",
    "stream_completion",
    "together",
]

_HOME = {
    "ChatSession": "chat",
    "Continuation": "text",
    "Ensemble": "ensemble",
    "FinishReason": "generator",
    "IdStream": "generator",
    "LanguageModel": "language_model",
    "SamplingSettings": "sampling_settings",
    "TextStream": "text",
    "common_tokenizer": "ensemble",
    "complete": "text",
    "generate_ids": "generator",
    "stream_completion": "text",
    "together": "ensemble",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"slmkit.generation.{_HOME[name]}"), name)
