"""Rotary position embedding (Su et al. 2021, arXiv:2104.09864), and its scalings for longer texts than in training.

Channel pair i of a head is rotated by theta^(-2i / dim) radians per position. A scaling lowers those frequencies, so
that new positions have angles known from training.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

import dataclasses
from typing import Any

from slmkit.config import UserError, did_you_mean


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
    """A base that grows with the text once it is longer than `original` positions (arXiv:2309.00071, section 3.3).

    The only scaling whose frequencies depend on the text's length: cached keys are rotated again at every position.
    """

    factor: float
    original: int

    def theta(self, theta: float, dim: int, length: Tensor) -> Tensor:
        """length [...], in positions → the base at that length  [...]."""
        growth = self.factor * length.clamp(min=self.original) / self.original - (self.factor - 1)
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
    import torch  # here, so that checking a config does not import torch

    return torch.arange(0, dim, 2, dtype=torch.float32)


KINDS = ("default", "dynamic", "linear", "llama3", "yarn")
_SCALINGS: dict[str, type[Linear | Llama3 | Yarn]] = {"linear": Linear, "llama3": Llama3, "yarn": Yarn}


def rope_of(parameters: dict[str, Any], kind: str, dim: int, max_positions: int) -> Rope:
    """The `Rope` of layers of a kind (`full_attention`, `sliding_attention`).

    Raises `UserError` for an unknown `rope_type`, and for missing or unknown keys.
    """
    own = dict(parameters.get(kind, parameters))
    rope_type, theta = own.pop("rope_type", "default"), float(own.pop("rope_theta", 10_000.0))
    where = f"rope_parameters of rope_type {rope_type!r}"
    if rope_type == "default":
        _refuse_others(where, own, set())
        return Rope(theta, dim)
    if rope_type == "dynamic":
        # transformers uses max_position_embeddings as the original length and ignores this key.
        _refuse_others(where, own, {"factor", "original_max_position_embeddings"})
        return Rope(theta, dim, DynamicNTK(_factor(where, own), max_positions))
    if rope_type not in _SCALINGS:
        raise UserError(f"rope_parameters.rope_type {rope_type!r} is not supported; known: {', '.join(KINDS)}")
    return Rope(theta, dim, _scaling(where, _SCALINGS[rope_type], own, max_positions))


def _scaling(where: str, kind: type[Linear | Llama3 | Yarn], own: dict[str, Any], max_positions: int) -> Scaling:
    fields = {field.name: field for field in dataclasses.fields(kind)}
    _refuse_others(where, own, set(fields))
    given = {name: value for name, value in own.items() if value is not None}  # null counts as absent
    original = "original_max_position_embeddings"
    if original in fields:
        given.setdefault(original, max_positions)
        given.setdefault("factor", max_positions / given[original])
    _factor(where, given)
    for name, field in fields.items():
        if name not in given and field.default is dataclasses.MISSING:
            raise UserError(f"{where}: {name} is missing; expected a number")
    return kind(**given)


def _factor(where: str, own: dict[str, Any]) -> float:
    factor = own.get("factor")
    if not isinstance(factor, int | float) or factor < 1:
        raise UserError(f"{where}: factor {factor!r}; expected a number of 1 or more")
    return float(factor)


def _refuse_others(where: str, own: dict[str, Any], known: set[str]) -> None:
    for name in own:
        if name not in known:
            raise UserError(f"{where}: unknown key {name!r}; {did_you_mean(name, known | {'rope_theta', 'rope_type'})}")
