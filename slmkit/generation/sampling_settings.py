"""What the next token is chosen by. No torch here: a command checks its options before it loads anything."""

from __future__ import annotations

import math
from dataclasses import dataclass

from slmkit.config import UserError


@dataclass(frozen=True)
class SamplingSettings:
    """What to sample by. Temperature 0, or `do_sample=False`, is greedy. Raises `UserError` for values out of range."""

    temperature: float = 1.0
    top_k: int = 0  # 0: all tokens
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    do_sample: bool = True
    seed: int | None = None  # None: another text each time

    def __post_init__(self) -> None:
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

    @property
    def is_greedy(self) -> bool:
        return not self.do_sample or self.temperature == 0
