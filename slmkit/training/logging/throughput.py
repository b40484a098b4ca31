"""How hard the machine works: time, memory, and operations a second as a share of what it can do (MFU)."""

from __future__ import annotations

import time

from slmkit.device import Device, measured_peak, peak_memory
from slmkit.model.decoder import Decoder
from slmkit.training.estimate.flops import StepOperations
from slmkit.training.loop import Report, State


class ThroughputMonitor:
    """A hook for every step that adds `seconds` of the run so far, `mfu` and `memory_bytes` to its report.

    MFU (model FLOPs utilisation; Chowdhery et al. 2022, arXiv:2204.02311, appendix B) is the operations that the
    model's products need, forward and backward and once each, over what the device's own plain products reach in the
    same type: of a measured peak, not of a datasheet's. Recomputed layers count once.
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
        """`rows_per_step` rows of `length` tokens are one update, on as many such devices as there are ranks.

        None where rows are of any length: then there is no `mfu`, since nobody counts the operations.

        A run that goes on has trained `tokens` and taken `seconds` already.
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
        """Operations of an update in which `trained` of all positions are learned."""
        return self.operations.of_step(self.positions, trained)
