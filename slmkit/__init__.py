"""Grow a small language model, from raw text to a model you talk to.

The names below are loaded when they are first used, so that `import slmkit` costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from slmkit.api import SLMEnsemble, SLMForCausalLM, SLMTrainer
    from slmkit.api.callbacks import Callback
    from slmkit.config import UserError
    from slmkit.data.text_dataset import TextDataset
    from slmkit.model.config import SLMConfig
    from slmkit.tokenizer import SLMTokenizer
    from slmkit.training.distillation import DistillationLoss

__version__ = "0.1.0"
__all__ = [
    "Callback",
    "DistillationLoss",
    "SLMConfig",
    "SLMEnsemble",
    "SLMForCausalLM",
    "SLMTokenizer",
    "SLMTrainer",
    "TextDataset",
    "UserError",
]

_HOME = {
    "Callback": "slmkit.api.callbacks",
    "DistillationLoss": "slmkit.training.distillation",
    "SLMConfig": "slmkit.model.config",
    "SLMEnsemble": "slmkit.api",
    "SLMForCausalLM": "slmkit.api",
    "SLMTokenizer": "slmkit.tokenizer",
    "SLMTrainer": "slmkit.api",
    "TextDataset": "slmkit.data.text_dataset",
    "UserError": "slmkit.config",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'slmkit' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)
