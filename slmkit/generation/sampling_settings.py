"""Sampling settings. Does not import torch, so that a command can check its options first."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

from pydantic import ConfigDict, Field, field_validator

from slmkit.config import Settings, load_settings
from slmkit.model.files import generation_config as published


class SamplingSettings(Settings):
    """Sampling settings. Temperature 0 or `do_sample=False` is greedy. Raises `UserError` for values out of range."""

    model_config = ConfigDict(frozen=True, strict=True)

    temperature: published.Temperature = 1.0
    top_k: published.TopK = 0  # 0: all tokens
    top_p: published.TopP = 1.0
    min_p: published.MinP = 0.0
    repetition_penalty: published.Penalty = 1.0
    do_sample: bool = True
    seed: int | None = Field(None, ge=0, lt=2**63)  # None: another text each time

    @field_validator("*", mode="before")
    @classmethod
    def _plain(cls, value: Any) -> Any:
        """Numbers of numpy and scalar tensors as Python's."""
        return value.item() if hasattr(value, "item") else value

    @field_validator("do_sample", mode="before")
    @classmethod
    def _zero_and_one(cls, value: Any) -> Any:
        return bool(value) if isinstance(value, int) and value in (0, 1) else value

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
        told: dict[str, Any] = {name: content[name] for name in usual if content.get(name) is not None}
        if content.get("do_sample") is False or (told and not content.get("do_sample")):
            told = {"temperature": 0.0} | {name: told[name] for name in told if name == "repetition_penalty"}
        chosen = {name: value for name, value in given.items() if value is not None}
        return load_settings(cls, {"seed": seed, **(told or usual), **chosen})

    @property
    def is_greedy(self) -> bool:
        return not self.do_sample or self.temperature == 0
