"""Initial weights: all of them, in one place."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from slmkit.config import UserError, did_you_mean
from slmkit.model.config import SLMConfig
from slmkit.model.decoder import Attention, Decoder
from slmkit.model.families import architecture_of


def build_decoder(config: SLMConfig, seed: int = 0, initialization: str = "gpt2") -> Decoder:
    """A decoder with fresh weights; the same seed gives the same weights whatever was drawn before.

    `initialization` is a name in `INITIALIZATIONS`. Raises `UserError` for another one.
    """
    if initialization not in INITIALIZATIONS:
        raise UserError(f"unknown initialization {initialization!r}; {did_you_mean(initialization, INITIALIZATIONS)}")
    decoder = Decoder(architecture_of(config))
    INITIALIZATIONS[initialization](decoder, config, torch.Generator().manual_seed(seed))
    return decoder


def gpt2(decoder: Decoder, config: SLMConfig, generator: torch.Generator) -> None:
    """Normal weights of one standard deviation, less where a block adds to the residual stream (GPT-2)."""
    residual_std = config.initializer_range / (2 * config.num_hidden_layers) ** 0.5
    for name, parameter in decoder.named_parameters():
        if name.endswith(("attention.out.weight", "mlp.down.weight")):
            # Each block adds to the residual stream twice; its variance should not grow with depth.
            nn.init.normal_(parameter, std=residual_std, generator=generator)
        elif parameter.dim() == 2:
            nn.init.normal_(parameter, std=config.initializer_range, generator=generator)
        elif name.endswith("bias"):
            nn.init.zeros_(parameter)
    # The weights of norms are left as they were made: they change nothing.


def copying(decoder: Decoder, config: SLMConfig, generator: torch.Generator) -> None:
    """Attention that repeats what it looks at, so that a small model soon learns where to look.

    The output projection starts as the transpose of the value projection: their product is near the identity, and
    with tied embeddings a head then raises the probability of the tokens it attends to (mimetic initialization,
    Trockman & Kolter 2023, arXiv:2305.09828). Larger embeddings keep tokens apart while all of them are pushed the
    same way in the first steps.
    """
    gpt2(decoder, config, generator)
    nn.init.normal_(decoder.embedding.weight, std=0.3, generator=generator)
    std = config.hidden_size**-0.5
    for attention in (module for module in decoder.modules() if isinstance(module, Attention)):
        for projection in (attention.query, attention.key, attention.value):
            nn.init.normal_(projection.weight, std=std, generator=generator)
        with torch.no_grad():
            attention.out.weight.copy_(_value_of_each_head(attention.value.weight, config).T)


def _value_of_each_head(value: Tensor, config: SLMConfig) -> Tensor:
    """[kv_heads × head_dim, width] → [heads × head_dim, width]: heads that share a value head repeat it."""
    shared = config.num_attention_heads // config.num_key_value_heads
    return value.unflatten(0, (-1, config.head_dim)).repeat_interleave(shared, 0).flatten(0, 1)


INITIALIZATIONS: dict[str, Callable[[Decoder, SLMConfig, torch.Generator], None]] = {"gpt2": gpt2, "copying": copying}
