"""Initial weights: all of them, in one place."""

from __future__ import annotations

import torch
from torch import nn

from slmkit.model.config import SLMConfig
from slmkit.model.decoder import Decoder
from slmkit.model.families import architecture_of


def build_decoder(config: SLMConfig, seed: int = 0) -> Decoder:
    """A decoder with fresh weights; the same seed gives the same weights whatever was drawn before."""
    decoder = Decoder(architecture_of(config))
    generator = torch.Generator().manual_seed(seed)
    residual_std = config.initializer_range / (2 * config.num_hidden_layers) ** 0.5
    for name, parameter in decoder.named_parameters():
        if name.endswith(("attention.out.weight", "mlp.down.weight")):
            # Each block adds to the residual stream twice; its variance should not grow with depth (GPT-2).
            nn.init.normal_(parameter, std=residual_std, generator=generator)
        elif parameter.dim() == 2:
            nn.init.normal_(parameter, std=config.initializer_range, generator=generator)
        elif name.endswith("bias"):
            nn.init.zeros_(parameter)
    return decoder  # the weights of norms are left as they were made: they change nothing
