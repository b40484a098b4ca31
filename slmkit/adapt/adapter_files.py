"""The checkpoints of a run that trains an adapter: the adapter alone, and no copy of its base."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from slmkit.adapt.adapter import expect_base, read_tensors, save_adapter, trained_tensors
from slmkit.model import Decoder, SLMConfig
from slmkit.model.lora_settings import LoRASettings


@dataclass(frozen=True)
class AdapterFiles:
    """An adapter's directory, for the model in `base`; a `training.model_files.ModelFiles`."""

    config: SLMConfig
    settings: LoRASettings
    base: Path
    base_fingerprint: str

    def tensors(self, model: Decoder) -> Mapping[str, Tensor]:
        return trained_tensors(model)

    def write(self, model: Decoder, tensors: Mapping[str, Tensor], directory: Path) -> None:
        save_adapter(model, self.config, self.settings, self.base, directory, tensors, self.base_fingerprint)

    def read(self, directory: Path, model: Decoder) -> dict[str, Tensor]:
        expect_base(directory, lambda: self.base_fingerprint)
        return read_tensors(model, self.config, directory)
