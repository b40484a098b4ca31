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

from slmkit.model.config import SLMConfig
from slmkit.model.decoder import Decoder
from slmkit.model.files.directory import load_decoder
from tests.parity.configurations import DRAW, LENGTH, VOCAB

BEFORE_5 = transformers.__version__ < "5"


@dataclass(frozen=True)
class Twins:
    """The same weights in both implementations, in evaluation mode."""

    theirs: Any
    ours: Decoder
    config: SLMConfig


@functools.cache  # each check goes through all configurations, which are small
def twins(family: str, number: int) -> Twins:
    """The family's configuration of that number, always the same one."""
    name, draw = DRAW[family]
    return twins_of(name, draw(random.Random(f"{family} {number}")))


def twins_of(name: str, settings: dict[str, Any]) -> Twins:
    """`settings` of transformers' `{name}Config`: the reference makes the model, and we read what it saves."""
    if BEFORE_5 and "rope_parameters" in settings:
        settings = in_older_spelling(name, settings)
    config_class = getattr(transformers, f"{name}TextConfig", None) or getattr(transformers, f"{name}Config")
    theirs = transformers.AutoModelForCausalLM.from_config(config_class(**settings)).eval()
    randomise(theirs)
    with tempfile.TemporaryDirectory() as directory:
        theirs.save_pretrained(directory)
        ours, config = load_decoder(directory)
    return Twins(theirs, ours, config)


def in_older_spelling(name: str, settings: dict[str, Any]) -> dict[str, Any]:
    """RoPE as transformers 4 takes it: layers with a window are never scaled there, and OLMo 2 is not at all."""
    settings = settings | {"attn_implementation": "eager"}  # the others leave out the cap of scores there
    rope = settings.pop("rope_parameters")
    if "sliding_attention" in rope:
        if name != "Olmo3":  # which has one base for all layers
            settings["rope_local_base_freq"] = rope["sliding_attention"]["rope_theta"]
        rope = rope["full_attention"]
    scaling = {key: value for key, value in rope.items() if key != "rope_theta"}
    scaled = scaling["rope_type"] != "default" and name != "Olmo2"
    return settings | {"rope_theta": rope["rope_theta"], "rope_scaling": scaling if scaled else None}


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
