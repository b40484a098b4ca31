"""A reference model with random weights, and ours read from what it saves."""

from __future__ import annotations

import functools
import random
import tempfile
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import Tensor

from slmkit.model import Decoder, SLMConfig, load_decoder
from tests.parity.configurations import DRAW, LENGTH, VOCAB


@dataclass(frozen=True)
class Twins:
    """The same weights in both implementations, in evaluation mode."""

    theirs: Any
    ours: Decoder
    config: SLMConfig


@functools.lru_cache(maxsize=4)  # the checks of one configuration follow each other
def twins(family: str, number: int) -> Twins:
    """The family's configuration of that number, always the same one."""
    name, draw = DRAW[family]
    return twins_of(name, draw(random.Random(f"{family} {number}")))


def twins_of(name: str, settings: dict[str, Any]) -> Twins:
    """`settings` of transformers' `{name}Config`: the reference makes the model, and we read what it saves."""
    config_class = getattr(transformers, f"{name}TextConfig", None) or getattr(transformers, f"{name}Config")
    theirs = transformers.AutoModelForCausalLM.from_config(config_class(**settings)).eval()
    randomise(theirs)
    with tempfile.TemporaryDirectory() as directory:
        theirs.save_pretrained(directory)
        ours, config = load_decoder(directory)
    return Twins(theirs, ours, config)


def randomise(model: torch.nn.Module) -> None:
    """Weights with which every part matters: large matrices, and norms and biases that are not one and zero."""
    generator = torch.Generator().manual_seed(11)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.3)
            else:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) / parameter.size(-1) ** 0.5)


def text(rows: int = 2, length: int = LENGTH) -> Tensor:
    return torch.randint(VOCAB, (rows, length), generator=torch.Generator().manual_seed(rows))
