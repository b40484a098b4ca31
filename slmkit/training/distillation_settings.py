"""The `distillation` section of a recipe."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from slmkit.config import Settings

Divergence = Literal["forward_kl", "reverse_kl", "js"]


class DistillationSettings(Settings):
    """Whom to learn from, and how much; `slmkit.training.distillation` has the formulas.

    The loss is `alpha` times the cross-entropy of the labels plus `1 - alpha` times temperature² times the divergence
    from the teacher: 1 is learning without a teacher, 0 from the teacher alone.
    """

    teacher: str | None = None  # a model or run directory, of the same tokenizer
    cache: str | None = None  # what `slm distill-cache` stored of it: no teacher is in memory then
    reads: Literal["text", "conversations"] = "text"  # what is learned: all of a text, or the assistant's turns
    alpha: float = Field(0.5, ge=0, le=1)
    temperature: float = Field(3.0, gt=0)
    divergence: Divergence = "forward_kl"
    top_k: int = Field(64, gt=0)  # of a cache: how many of the teacher's likeliest tokens are known at each position
    hidden_weight: float = Field(0.0, ge=0)  # of matching hidden states besides, layer by layer

    @model_validator(mode="after")
    def _is_taught(self) -> DistillationSettings:
        if self.teacher is None and self.cache is None:
            raise ValueError("no teacher: name a model directory as teacher, or what was stored of one as cache")
        if self.cache is not None and self.hidden_weight:
            raise ValueError(
                "hidden_weight needs the teacher itself, of which a cache has the likeliest tokens alone: drop either"
            )
        return self
