"""Which tensors of a model a checkpoint holds, and in which format: all, or only the trained ones."""

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
    """The format of a run's model on disk; every loader of models reads it."""

    def tensors(self, model: Decoder) -> Mapping[str, Tensor]:
        """The tensors to save, by the model's own names, in the parameters' shapes."""

    def write(self, model: Decoder, tensors: Mapping[str, Tensor], directory: Path) -> None:
        """Write the tensors; `model` gives shapes and names. Raises `UserError` when that fails."""

    def read(self, directory: Path, model: Decoder) -> dict[str, Tensor]:
        """The tensors as saved. Raises `UserError` for a file that is damaged or of another model."""


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
