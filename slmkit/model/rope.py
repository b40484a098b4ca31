"""Rotary position embedding (Su et al. 2021, arXiv:2104.09864), and its scalings for longer texts than in training.

Channel pair i of a head is rotated by theta^(-2i / dim) radians per position. A scaling lowers those frequencies, so
that new positions have angles known from training.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from slmkit.config import UserError, did_you_mean

ORIGINAL = "original_max_position_embeddings"
Rotation = tuple[Tensor, Tensor]  # cosines and sines, each [batch or 1, 1, sequence, dim]


@dataclass(frozen=True)
class Linear:
    """Divides all frequencies by `factor` (Chen et al. 2023, arXiv:2306.15595)."""

    factor: float

    def stretch(self, frequencies: Tensor, theta: float, dim: int) -> Tensor:  # [dim / 2] → [dim / 2]
        return frequencies / self.factor


@dataclass(frozen=True)
class Llama3:
    """Divides low frequencies by `factor`, keeps high ones, and interpolates those between.

    A frequency is low or high if the channel makes fewer than `low_freq_factor` or more than `high_freq_factor` turns
    within the original context (Llama 3.1's reference implementation).
    """

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int

    def stretch(self, frequencies: Tensor, theta: float, dim: int) -> Tensor:  # [dim / 2] → [dim / 2]
        turns = self.original_max_position_embeddings * frequencies / (2 * math.pi)
        low, high = self.low_freq_factor, self.high_freq_factor
        kept = ((turns - low) / (high - low)).clamp(0, 1)  # 1: unchanged, 0: divided by factor
        return kept * frequencies + (1 - kept) * frequencies / self.factor


@dataclass(frozen=True)
class Yarn:
    """As Llama3, with a ramp over channels instead of turns, and scaled queries and keys (arXiv:2309.00071).

    Frequencies of more than `beta_fast` turns within the original context are kept, those of fewer than `beta_slow`
    turns are divided by `factor`.
    """

    factor: float
    original_max_position_embeddings: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True  # round the ramp's ends to whole channels
    attention_factor: float | None = None  # None: computed from factor, mscale and mscale_all_dim
    mscale: float | None = None
    mscale_all_dim: float | None = None

    def stretch(self, frequencies: Tensor, theta: float, dim: int) -> Tensor:  # [dim / 2] → [dim / 2]
        fast, slow = (self._channel(turns, theta, dim) for turns in (self.beta_fast, self.beta_slow))
        if self.truncate:
            fast, slow = math.floor(fast), math.ceil(slow)
        fast, slow = max(fast, 0), min(slow, dim - 1)
        channel = frequencies.new_tensor(range(dim // 2))
        kept = 1 - ((channel - fast) / (slow - fast or 0.001)).clamp(0, 1)
        return kept * frequencies + (1 - kept) * frequencies / self.factor

    def _channel(self, turns: float, theta: float, dim: int) -> float:
        """The (fractional) channel that makes `turns` turns within the original context."""
        return dim * math.log(self.original_max_position_embeddings / (turns * 2 * math.pi)) / (2 * math.log(theta))

    @property
    def length(self) -> float:
        """Factor on cosines and sines, which sharpens attention in longer contexts."""
        if self.attention_factor is not None:
            return self.attention_factor
        if self.mscale and self.mscale_all_dim:
            return yarn_growth(self.factor, self.mscale) / yarn_growth(self.factor, self.mscale_all_dim)
        return yarn_growth(self.factor)


def yarn_growth(factor: float, mscale: float = 1.0) -> float:
    """0.1 mscale ln(factor) + 1: YaRN's equation 22."""
    return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0


@dataclass(frozen=True)
class DynamicNTK:
    """A base that grows with the text once it is longer than the original context (arXiv:2309.00071, section 3.3).

    The only scaling whose frequencies depend on the text's length: cached keys are rotated again at every position.
    """

    factor: float
    original_max_position_embeddings: int

    def theta(self, theta: float, dim: int, length: Tensor) -> Tensor:
        """length [...], in positions → the base at that length  [...]."""
        original = self.original_max_position_embeddings
        growth = self.factor * length.clamp(min=original) / original - (self.factor - 1)
        return theta * growth ** (dim / (dim - 2))


Scaling = Linear | Llama3 | Yarn | DynamicNTK


@dataclass(frozen=True)
class Rope:
    """RoPE of a layer, over `dim` channels of each head."""

    theta: float
    dim: int
    scaling: Scaling | None = None

    @property
    def depends_on_length(self) -> bool:
        return isinstance(self.scaling, DynamicNTK)

    def frequencies(self) -> Tensor:
        """Frequency of each pair of channels, in radians per position; for dynamic NTK the unscaled one.  [dim / 2]"""
        frequencies = 1.0 / self.theta ** (channels(self.dim) / self.dim)
        if self.scaling is None or isinstance(self.scaling, DynamicNTK):
            return frequencies
        return self.scaling.stretch(frequencies, self.theta, self.dim)


def channels(dim: int) -> Tensor:
    """The first channel of each pair.  [dim / 2]"""
    return torch.arange(0, dim, 2, dtype=torch.float32)


# By `rope_type`.
SCALINGS: dict[str, Any] = {"default": None, "dynamic": DynamicNTK, "linear": Linear, "llama3": Llama3, "yarn": Yarn}


def rope_of(parameters: dict[str, Any], kind: str, dim: int, max_positions: int) -> Rope:
    """The `Rope` of layers of a kind (`full_attention`, `sliding_attention`).

    Raises `UserError` for an unknown `rope_type`, and for missing or unknown keys.
    """
    own = {name: value for name, value in parameters.get(kind, parameters).items() if value is not None}
    rope_type, theta = own.pop("rope_type", "default"), float(own.pop("rope_theta", 10_000.0))
    if rope_type not in SCALINGS:
        raise UserError(f"rope_parameters.rope_type {rope_type!r} is not supported; known: {', '.join(SCALINGS)}")
    where, scaling = f"rope_parameters of rope_type {rope_type!r}", SCALINGS[rope_type]
    fields = {} if scaling is None else {field.name: field for field in dataclasses.fields(scaling)}
    for name in own:
        if name not in fields:
            raise UserError(
                f"{where}: unknown key {name!r}; {did_you_mean(name, [*fields, 'rope_theta', 'rope_type'])}"
            )
    if scaling is None:
        return Rope(theta, dim)
    if scaling is DynamicNTK:
        own[ORIGINAL] = max_positions  # transformers does not read the key either
    elif ORIGINAL in fields:
        own.setdefault(ORIGINAL, max_positions)
        own.setdefault("factor", max_positions / own[ORIGINAL])
    factor = own.get("factor")
    if not isinstance(factor, int | float) or factor < 1:
        raise UserError(f"{where}: factor {factor!r}; expected a number of 1 or more")
    for name, field in fields.items():
        if name not in own and field.default is dataclasses.MISSING:
            raise UserError(f"{where}: {name} is missing; expected a number")
    return Rope(theta, dim, scaling(**own))


class Rotary(nn.Module):
    """Cosines and sines of one `Rope`, computed from positions and shared by its layers."""

    def __init__(self, rope: Rope) -> None:
        super().__init__()
        self.rope = rope
        self.frequencies: Tensor
        self.register_buffer("frequencies", torch.empty(0), persistent=False)
        self._compute(torch.get_default_device())

    def _apply(self, *args: Any, **kwargs: Any) -> Rotary:
        """Recompute the frequencies in float32 after `to_empty`, `to` or `half`: they are in no file."""
        super()._apply(*args, **kwargs)
        self._compute(self.frequencies.device)
        return self

    def _compute(self, device: torch.device) -> None:
        with torch.device("cpu"):  # on the meta device it would import the compiler, which takes seconds
            self.frequencies = self.rope.frequencies().to(device)

    def forward(self, positions: Tensor, length: Tensor) -> Rotation:
        """positions [batch or 1, sequence], length [batch or 1] of the whole text → `Rotation`, in float32."""
        if self.frequencies.is_meta and not positions.is_meta:  # built on meta, then weights assigned
            self._compute(positions.device)
        frequencies = self.frequencies  # [dim / 2]
        if isinstance(self.rope.scaling, DynamicNTK):
            theta = self.rope.scaling.theta(self.rope.theta, self.rope.dim, length)  # [batch or 1]
            pairs = channels(self.rope.dim).to(length.device)
            frequencies = 1.0 / theta[:, None, None] ** (pairs / self.rope.dim)  # [batch or 1, 1, dim / 2]
        angles = positions[:, :, None] * frequencies  # [batch or 1, sequence, dim / 2]
        angles = torch.cat((angles, angles), dim=-1)[:, None]  # [batch or 1, 1, sequence, dim]
        growth = self.rope.scaling.length if isinstance(self.rope.scaling, Yarn) else 1.0
        return angles.cos() * growth, angles.sin() * growth


def rotate(x: Tensor, rotation: Rotation | None) -> Tensor:
    """Rotate channels i and i + dim / 2 as a pair, as Hugging Face's weights expect; None: x unchanged.

    x [batch, heads, sequence, dim] → the same shape and precision.
    """
    if rotation is None:
        return x
    cosines, sines = rotation
    first, second = x.chunk(2, dim=-1)
    turned = torch.cat((-second, first), dim=-1)
    return (x * cosines + turned * sines).to(x.dtype)
