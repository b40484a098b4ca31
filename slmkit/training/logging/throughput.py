"""Time, memory and MFU of a run."""

from __future__ import annotations

import time

from slmkit.device import Device, measured_peak, peak_memory
from slmkit.model.decoder import Decoder
from slmkit.model.sizes import flops_per_token
from slmkit.training.loop import Report, State


class StepFlops:
    """FLOPs of an update, forward and backward. A frozen matrix needs no weight gradient; adapter parameters beside it
    have their own products.
    """

    def __init__(self, model: Decoder, length: int) -> None:
        a = model.architecture
        self.per_token, self.head = flops_per_token(a, length), 2 * a.vocab_size * a.width
        self.is_frozen = not all(parameter.requires_grad for parameter in model.parameters())
        trained = sum(p.numel() for p in model.blocks.parameters() if p.requires_grad and p.dim() == 2)
        self.adapter = trained if self.is_frozen else 0

    def of_step(self, positions: int, trained: int) -> int:
        """FLOPs of an update in which `trained` of all positions are learned: only those pass through the head."""
        matrices = positions * self.per_token.matrices - (positions - trained) * self.head
        attention, adapter = positions * self.per_token.attention, positions * 2 * self.adapter
        return (2 if self.is_frozen else 3) * matrices + 3 * (attention + adapter)


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
        self.flops = StepFlops(model, length)
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
        return self.flops.of_step(self.positions, trained)
