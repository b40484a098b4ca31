"""Sampling settings. Does not import torch, so that a command can check its options first."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import ConfigDict, Field, field_validator

from slmkit.config import Settings, UserError, load_settings
from slmkit.model.files import generation_config as published

# For texts and for conversations, where neither a user nor the model says it: the same in all commands.
USUAL = {"temperature": 0.8, "top_p": 0.95, "min_p": 0.05}
USUAL_IN_CHAT = USUAL | {"temperature": 0.6}
COLDEST = 1e-5  # below it the logits of float32 may overflow, and only ties are not greedy
# OpenAI's ranges.
CountPenalty = Annotated[float, Field(ge=-2, le=2, description="0: none")]
Bias = Annotated[float, Field(ge=-100, le=100)]


class SamplingSettings(Settings):
    """Sampling settings, named as in transformers and OpenAI. Raises `UserError` for values out of range.

    Temperature 0 or `do_sample=False` is greedy: the most likely token after bias and penalties. `logit_bias` (id →
    what is added to the logit) comes before `repetition_penalty`, which counts prompt and new tokens; the presence and
    frequency penalties count new tokens only.
    """

    model_config = ConfigDict(frozen=True, strict=True)

    temperature: published.Temperature = 1.0
    top_k: published.TopK = 0  # 0: all tokens
    top_p: published.TopP = 1.0
    min_p: published.MinP = 0.0
    typical_p: published.TypicalP = 1.0
    repetition_penalty: published.Penalty = 1.0
    presence_penalty: CountPenalty = 0.0
    frequency_penalty: CountPenalty = 0.0
    logit_bias: dict[Annotated[int, Field(ge=0)], Bias] = Field(default_factory=dict)
    do_sample: bool = True
    seed: int | None = Field(None, ge=0, lt=2**63)  # None: another text each time

    @field_validator("*", mode="before")
    @classmethod
    def _plain(cls, value: Any) -> Any:
        """Numbers of numpy and scalar tensors as Python's."""
        try:
            return value.item() if hasattr(value, "item") else value
        except (RuntimeError, ValueError, TypeError):
            return f"{type(value).__name__} of {list(value.shape)} values"  # no number; its `repr` may have many lines

    @field_validator("do_sample", mode="before")
    @classmethod
    def _zero_and_one(cls, value: Any) -> Any:
        return bool(value) if isinstance(value, int) and value in (0, 1) else value

    @field_validator("logit_bias", mode="before")
    @classmethod
    def _whole_keys(cls, value: Any) -> Any:
        """The keys of JSON as numbers."""
        if not isinstance(value, Mapping):
            return value
        return {int(key) if isinstance(key, str) and key.isdecimal() else key: one for key, one in value.items()}

    @classmethod
    def for_model(cls, directory: str | Path, seed: int | None, usual: Mapping[str, float], **given: Any) -> Self:
        """The values in `given`; for those that are None, the model's `generation_config.json`, then `usual`.

        As in transformers, a file with a recommendation is greedy unless it says `do_sample: true`. Raises `UserError`
        for a wrong value in the file; logs the recommendations that are ignored.
        """
        content = published.read_generation_config(Path(directory))
        if ignored := published.not_obeyed(content):
            path = Path(directory) / published.FILE
            logging.getLogger(__name__).warning(f"{path}: ignored, since it is not supported: {', '.join(ignored)}")
        names = (cls.model_fields.keys() & published.GenerationAdvice.model_fields.keys()) - {"do_sample"}
        told: dict[str, Any] = {name: content[name] for name in names if content.get(name) is not None}
        if content.get("do_sample") is False or (told and not content.get("do_sample")):
            told = {"temperature": 0.0} | {name: told[name] for name in told if name == "repetition_penalty"}
        chosen = {name: value for name, value in given.items() if value is not None}
        return load_settings(cls, {"seed": seed, **(told or usual), **chosen})

    @property
    def is_greedy(self) -> bool:
        return not self.do_sample or self.temperature < COLDEST

    @property
    def has_counts(self) -> bool:
        """Whether it matters how often a token was generated."""
        return self.presence_penalty != 0 or self.frequency_penalty != 0

    @property
    def has_filters(self) -> bool:
        """Whether tokens are removed before one is drawn."""
        return self.top_k != 0 or self.top_p != 1 or self.min_p != 0 or self.typical_p != 1

    def expect_ids_below(self, vocab_size: int) -> None:
        """Raises `UserError` if `logit_bias` names an id that a model of this vocabulary does not have."""
        if (highest := max(self.logit_bias, default=0)) >= vocab_size:
            raise UserError(f"logit_bias: the id {highest} is not below the model's {vocab_size:,} tokens")
