"""`plan.json` of a run: predicted and actual memory, time and disk."""

from __future__ import annotations

import json
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from slmkit.device import Device, peak_memory, reset_peak_memory, resident_memory
from slmkit.model.config import SLMConfig
from slmkit.training.estimate.forecast import forecast
from slmkit.training.estimate.memory import weights_bytes
from slmkit.training.estimate.memory_profile import MemoryProfile
from slmkit.training.logging.progress import clock
from slmkit.training.loop import Report, State
from slmkit.training.recipe.recipe import TrainSettings

FIRST, PROBED = 3, 20  # warm-up steps that are not counted; steps after which the speed is known
NAME = "plan.json"


def _mebibytes(size: int) -> str:
    return f"{size / 2**20:,.0f} MiB"


SHOWN: dict[str, tuple[str, Callable[[Any], str]]] = {
    "seconds": ("time", clock),
    "memory_bytes": ("memory", _mebibytes),
    "disk_bytes": ("disk", _mebibytes),
    "validation_loss": ("loss", "{:.3f}".format),
}


class PlanFile:
    """Hook for every step that writes the forecast once the speed is known; `complete` adds the actual figures.

    Create it when all models of its inventory are in memory but nothing else of training, and call it last, so that
    its times cover the whole step. Seconds are those of this process, from its first step.
    """

    def __init__(
        self,
        root: Path,
        config: SLMConfig,
        settings: TrainSettings,
        steps: int,
        device: Device,
        inventory: MemoryProfile,
        *,
        unique_tokens: int | None = None,
        validation_tokens: int = 0,
        from_scratch: bool = True,
    ) -> None:
        self.path, self.config, self.settings, self.steps, self.device = root / NAME, config, settings, steps, device
        self.unique_tokens, self.validation_tokens, self.from_scratch = unique_tokens, validation_tokens, from_scratch
        self.inventory = inventory
        weights = weights_bytes(inventory)  # first: counting loads libraries, which belong to the memory before the run
        self.before = 0 if device.torch_device.type == "cuda" else max(0, resident_memory() - weights)
        self.content: dict[str, Any] = {"steps": steps}
        reset_peak_memory(device)
        self.began = self.last = time.perf_counter()
        self.begun = self.probed = -1
        self.seconds: list[float] = []

    def update(self, state: State, report: Report) -> None:
        if self.begun < 0:
            self.begun = state.step - 1
            self.probed = self.begun + min(PROBED, max(1, (self.steps - self.begun) // 3))
            self._write()  # not before: a run that cannot be resumed keeps its file
        now = time.perf_counter()
        self.seconds.append(now - self.last)
        self.last = now
        if state.step == self.probed:
            self._predict()
            self.last = time.perf_counter()

    def complete(self, validation_loss: float | None) -> str:
        """Write the actual figures; returns both as one line. Empty if nothing was predicted."""
        if "predicted" not in self.content:
            return ""
        self.content["real"] = {
            "seconds": round(time.perf_counter() - self.began, 1),
            "memory_bytes": peak_memory(self.device),
            "disk_bytes": sum(path.stat().st_size for path in self.path.parent.rglob("*") if path.is_file()),
            "validation_loss": validation_loss,
        }
        self._write()
        predicted, real = self.content["predicted"], self.content["real"]
        parts = [
            f"{what} {show(real[name])} where {show(predicted[name])} was expected"
            for name, (what, show) in SHOWN.items()
            if real[name] and predicted[name]
        ]
        return "the run took: " + ", ".join(parts)

    def _predict(self) -> None:
        held = peak_memory(self.device) - self.before
        counted = self.seconds[min(FIRST, len(self.seconds) - 1) :]
        length = self.settings.sequence_length or self.config.max_position_embeddings
        rate = self.settings.rows_per_step(length) * length / statistics.median(counted)
        ahead = forecast(
            self.config,
            self.settings,
            self.steps,
            self.device,
            tokens_per_second=rate,
            held_bytes=held,
            unique_tokens=self.unique_tokens,
            validation_tokens=self.validation_tokens,
            from_scratch=self.from_scratch,
            inventory=self.inventory,
        )
        self.content |= {
            "parameters": ahead.parameters,
            "tokens": ahead.tokens,
            "memory_before_bytes": self.before,  # the part of the memory below that was in use before the run
            "counted_memory_bytes": self.before + ahead.counted_bytes,  # by arithmetic alone, as `slm plan` says it
            "probe": {"steps": len(counted), "tokens_per_second": round(rate), "memory_bytes": self.before + held},
            "predicted": {
                "seconds": round(ahead.seconds * (self.steps - self.begun) / self.steps, 1),
                "memory_bytes": self.before + ahead.memory_bytes,
                "disk_bytes": ahead.disk_bytes,
                "validation_loss": None if ahead.loss is None else round(ahead.loss, 3),
            },
        }
        self._write()

    def _write(self) -> None:
        fresh = self.path.with_suffix(".tmp")
        fresh.write_text(json.dumps(self.content, indent=2) + "\n", encoding="utf-8")
        os.replace(fresh, self.path)
