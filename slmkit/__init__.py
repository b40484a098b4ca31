"""Grow a small language model, from raw text to a model you talk to.

The names below are loaded when they are first used, so that `import slmkit` costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from slmkit.api.callbacks import Callback
    from slmkit.api.causal_lm import SLMEnsemble, SLMForCausalLM
    from slmkit.api.trainer import SLMTrainer
    from slmkit.config import UserError
    from slmkit.data.rows.datasets import TextDataset
    from slmkit.model.config import SLMConfig
    from slmkit.tokenizer import SLMTokenizer
    from slmkit.training.objectives.distillation import DistillationLoss

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
    "DistillationLoss": "slmkit.training.objectives.distillation",
    "SLMConfig": "slmkit.model.config",
    "SLMEnsemble": "slmkit.api.causal_lm",
    "SLMForCausalLM": "slmkit.api.causal_lm",
    "SLMTokenizer": "slmkit.tokenizer",
    "SLMTrainer": "slmkit.api.trainer",
    "TextDataset": "slmkit.data.rows.datasets",
    "UserError": "slmkit.config",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'slmkit' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)
