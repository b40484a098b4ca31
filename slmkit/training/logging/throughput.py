"""Time, memory and MFU of a run."""

from __future__ import annotations

import time

from slmkit.device import Device, measured_peak, peak_memory
from slmkit.model.decoder import Decoder
from slmkit.training.estimate.flops import StepOperations
from slmkit.training.loop import Report, State


class ThroughputMonitor:
    """Hook for every step that adds `seconds` of the run so far, `mfu` and `memory_bytes` to its report.

    MFU (model FLOPs utilisation; Chowdhery et al. 2022, arXiv:2204.02311, appendix B) is the FLOPs per second of the
    model's matrix products, forward and backward, over the device's peak in the same type: a measured peak, not the
    datasheet's. Recomputed layers count once.
    """

    def __init__(
        self,
        model: Decoder,
        device: Device,
        rows_per_step: int | None,
        length: int,
        tokens: int = 0,
        seconds: float = 0.0,
    ) -> None:
        """An update is `rows_per_step` rows of `length` tokens, on as many such devices as there are ranks.

        None if rows vary in length: then there is no `mfu`.

        `tokens` and `seconds` are those of a resumed run so far.
        """
        self.device, self.positions = device, (rows_per_step or 0) * length
        self.operations = StepOperations.of(model, length)
        self.peak = measured_peak(device) * device.ranks.world
        self.tokens = tokens
        self.started = time.monotonic() - seconds

    def update(self, state: State, report: Report) -> None:
        trained, self.tokens = report["tokens"] - self.tokens, report["tokens"]
        seconds = trained / max(1, report["tokens_per_second"])
        if seconds > 0 and self.positions:
            report["mfu"] = round(self.step_flops(trained) / seconds / self.peak, 4)
        report["seconds"] = round(time.monotonic() - self.started, 2)
        report["memory_bytes"] = peak_memory(self.device)

    def step_flops(self, trained: int) -> int:
        """FLOPs of an update in which `trained` of all positions are learned."""
        return self.operations.of_step(self.positions, trained)
