"""Conversion of an adapter's tensors between `peft`'s names and ours.

    base_model.model.{module}.lora_A.weight  [r, in]      …lora_B.weight  [out, r]      …lora_magnitude_vector  [out]

Where the reference implementation fuses several of our linears into one matrix, their updates are fused too: the A's
are concatenated along r, and the B's are blocks on a diagonal, so that each part gets its own update only.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from slmkit.adapt.adapter_config import Shape
from slmkit.adapt.lora import LoRALinear
from slmkit.config import UserError
from slmkit.model.config import SLMConfig
from slmkit.model.families import family_of
from slmkit.model.files.directory import reference_name

PREFIX = "base_model.model."
A, B, MAGNITUDE = "lora_A.weight", "lora_B.weight", "lora_magnitude_vector"


@dataclass(frozen=True)
class Update:
    """The update of one linear: tensors as in `LoRALinear`, and their scale."""

    a: Tensor  # [r, in]
    b: Tensor  # [out, r]
    magnitude: Tensor | None  # [out]
    scale: float

    @property
    def shape(self) -> Shape:
        return Shape(self.a.size(0), self.scale)


def update_of(linear: LoRALinear, tensors: Mapping[str, Tensor], name: str) -> Update:
    """The update of the linear `name`, from `tensors` under our names."""
    a, b = tensors[f"{name}.lora_A"], tensors[f"{name}.lora_B"]
    return Update(a, b, tensors.get(f"{name}.magnitude"), linear.scale)


def fused_linears(config: SLMConfig, linears: list[str]) -> dict[str, list[str]]:
    """The reference's name of each matrix → our linears that are fused in it, in order."""
    family = family_of(config.model_type)
    fused: dict[str, list[str]] = {}
    for name in linears:
        fused.setdefault(reference_name(name, family), []).append(name)
    return fused


def fuse(parts: Sequence[Update | Tensor]) -> Update:
    """One update of a fused matrix from its parts' updates; a part without one is given as its weight [out, in]."""
    if len(parts) == 1 and isinstance(parts[0], Update):
        return parts[0]
    updates = [part for part in parts if isinstance(part, Update)]
    scale = updates[0].scale
    blocks, magnitudes = [], []
    for part in parts:
        if isinstance(part, Update):
            blocks.append(part.b * (part.scale / scale))
            magnitudes.append(part.magnitude)
        else:
            blocks.append(part.new_zeros(part.size(0), 0))
            magnitudes.append(part.norm(dim=1))
    has_magnitude = updates[0].magnitude is not None
    return Update(
        torch.cat([update.a for update in updates]),
        torch.block_diag(*blocks),
        torch.cat([m for m in magnitudes if m is not None]) if has_magnitude else None,
        scale,
    )


def split(update: Update, rows: list[int], ranks: list[int] | None = None) -> list[Update | None]:
    """The update of each part of a fused matrix, with `rows` rows each; None for a part without one.

    `ranks`: rank of each part if known, 0 for one that is not adapted. Else, without block structure in B, every part
    gets all of A.
    """
    if len(rows) == 1:
        return [update]
    b_rows = update.b.split(rows)
    if ranks is not None:
        ends = torch.tensor([0, *ranks]).cumsum(0).tolist()
        columns = [torch.arange(start, end) for start, end in itertools.pairwise(ends)]
    else:
        columns = [part.any(0).nonzero().flatten() for part in b_rows]
        if sum(map(len, columns)) != len(torch.cat(columns).unique()) or not any(map(len, columns)):
            columns = [torch.arange(update.a.size(0))] * len(rows)
    magnitudes = update.magnitude.split(rows) if update.magnitude is not None else [None] * len(rows)
    parts: list[Update | None] = []
    for b, chosen, magnitude in zip(b_rows, columns, magnitudes):
        if ranks is None and magnitude is not None and not len(chosen):
            chosen = torch.zeros(1, dtype=torch.long)  # B is zero there: only the magnitude is learned
        parts.append(Update(update.a[chosen], b[:, chosen], magnitude, update.scale) if len(chosen) else None)
    return parts


def to_peft(updates: Mapping[str, Update]) -> dict[str, Tensor]:
    """Updates by the reference's module names → the tensors of `adapter_model.safetensors`."""
    tensors: dict[str, Tensor] = {}
    for name, update in updates.items():
        tensors[f"{PREFIX}{name}.{A}"], tensors[f"{PREFIX}{name}.{B}"] = update.a, update.b
        if update.magnitude is not None:
            tensors[f"{PREFIX}{name}.{MAGNITUDE}"] = update.magnitude
    return tensors


def from_peft(tensors: Mapping[str, Tensor]) -> tuple[dict[str, dict[str, Tensor]], dict[str, Tensor]]:
    """Tensors of a file → tensors of updates by module, and fully trained tensors by name.

    Raises `UserError` for a name that is neither.
    """
    updates: dict[str, dict[str, Tensor]] = {}
    whole: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        name = key.removeprefix(PREFIX)
        kind = next((kind for kind in (A, B, MAGNITUDE) if name.endswith(f".{kind}")), None)
        if name == key or ("lora_" in name and kind is None):
            raise UserError(f"{key!r} is not a LoRA weight of a linear layer")
        if kind is not None:
            updates.setdefault(name.removesuffix(f".{kind}"), {})[kind] = tensor
        elif ".base_layer." not in name:  # stored by peft for an adapted head, and not needed
            whole[name] = tensor
    return updates, whole
