"""Sampling settings. Does not import torch, so that a command can check its options first."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass
from numbers import Integral, Real
from pathlib import Path
from typing import Any, Self

from slmkit.config import UserError
from slmkit.model.files.generation_config import FILE, not_obeyed, read_generation_config


@dataclass(frozen=True)
class SamplingSettings:
    """Sampling settings. Temperature 0 or `do_sample=False` is greedy. Raises `UserError` for values out of range."""

    temperature: float = 1.0
    top_k: int = 0  # 0: all tokens
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    do_sample: bool = True
    seed: int | None = None  # None: another text each time

    def __post_init__(self) -> None:
        for name in ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "seed"):
            kind, found = Integral if name in ("top_k", "seed") else Real, getattr(self, name)
            if not isinstance(found, kind) and (name, found) != ("seed", None):
                raise UserError(f"{name} {found!r}: expected a {'whole number' if kind is Integral else 'number'}")
        checks = (
            (0 <= self.temperature < math.inf, "temperature", "0 (greedy) or more", self.temperature),
            (self.top_k >= 0, "top_k", "0 (all tokens) or more", self.top_k),
            (0 < self.top_p <= 1, "top_p", "above 0 and up to 1", self.top_p),
            (0 <= self.min_p < 1, "min_p", "from 0 up to below 1", self.min_p),
            (
                0 < self.repetition_penalty < math.inf,
                "repetition_penalty",
                "above 0 (1: none)",
                self.repetition_penalty,
            ),
            (self.seed is None or 0 <= self.seed < 2**63, "seed", "from 0 up to below 2^63", self.seed),
        )
        for is_right, name, expected, found in checks:
            if not is_right:
                raise UserError(f"{name} {found}: expected {expected}")

    @classmethod
    def for_model(cls, directory: str | Path, seed: int | None, usual: Mapping[str, float], **given: Any) -> Self:
        """The values in `given`; for those that are None, the model's `generation_config.json`, then `usual`.

        As in transformers, a file with a recommendation is greedy unless it says `do_sample: true`. Raises `UserError`
        for a wrong value in the file; logs the recommendations that are ignored.
        """
        content = read_generation_config(Path(directory))
        if ignored := not_obeyed(content):
            path = Path(directory) / FILE
            logging.getLogger(__name__).warning(f"{path}: ignored, since it is not supported: {', '.join(ignored)}")
        told: dict[str, Any] = {name: content[name] for name in usual if content.get(name) is not None}
        if content.get("do_sample") is False or (told and not content.get("do_sample")):
            told = {"temperature": 0.0} | {name: told[name] for name in told if name == "repetition_penalty"}
        chosen = {name: value for name, value in given.items() if value is not None}
        return cls(seed=seed, **({**(told or usual)} | chosen))

    @property
    def is_greedy(self) -> bool:
        return not self.do_sample or self.temperature == 0
