"""What of a model goes into a checkpoint, and how: all of it, or, handed in from outside, what was trained of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from torch import Tensor

from slmkit.model.config import SLMConfig
from slmkit.model.decoder import Decoder
from slmkit.model.files.directory import read_state, save_decoder


class ModelFiles(Protocol):
    """The form in which a run's model is on disk. What it writes, others load as they load any model."""

    def tensors(self, model: Decoder) -> Mapping[str, Tensor]:
        """What is copied of a model between two steps, under its own names."""

    def write(self, model: Decoder, tensors: Mapping[str, Tensor], directory: Path) -> None:
        """Write what was copied; of `model` only shapes and names count. Raises `UserError` when it cannot."""

    def read(self, directory: Path, model: Decoder) -> dict[str, Tensor]:
        """What was written, as it was copied. Raises `UserError` for a file that is damaged or of another model."""


@dataclass(frozen=True)
class WholeModel:
    """A model directory."""

    config: SLMConfig

    def tensors(self, model: Decoder) -> Mapping[str, Tensor]:
        return model.state_dict()

    def write(self, model: Decoder, tensors: Mapping[str, Tensor], directory: Path) -> None:
        save_decoder(model, self.config, directory, tensors)

    def read(self, directory: Path, model: Decoder) -> dict[str, Tensor]:
        return read_state(directory, self.config)
