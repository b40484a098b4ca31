"""Forecast of a run's memory, time, disk and loss, by arithmetic or from measured speed; `plan.json` of a run.

(`loop.Plan` is the loop's input; a forecast is its expected cost.)
"""

from __future__ import annotations

import functools
import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from slmkit.device import Device, measured_peak, peak_memory, reset_peak_memory, resident_memory
from slmkit.files import write_whole
from slmkit.model.sizes import flops_per_token, parameter_count
from slmkit.training.estimate.memory import (
    MemoryProfile,
    checkpoint_bytes,
    reading_peaks,
    state_bytes,
    training_bytes,
    weights_bytes,
)
from slmkit.training.logging.logger import StepFlops
from slmkit.training.logging.progress import clock
from slmkit.training.loop import Report, State
from slmkit.training.optimizers.choose import trained
from slmkit.training.recipe.recipe import TrainSettings

EFFICIENCY = {"cpu": 0.25, "cuda": 0.35}  # share of the peak that a small model's step reaches, if not measured
FORWARD_SHARE = 1 / 3  # of a training step's operations
EVALUATION_SECONDS = 1.0  # for samples, the plot and the checkpoint, without the validation itself
# On a CPU: bytes that libraries load and compile in the first steps and evaluation, and bytes that glibc holds per byte
# in use, since it keeps freed blocks (device.keep_freed_memory). Measured on Linux, models of 1 to 29 M parameters.
LIBRARIES, HELD = 120 << 20, 1.37
# Bytes that evaluations, samples, plots and checkpoints add to those of the first steps, measured the same way.
BETWEEN_STEPS = 70 << 20
WARM_UP = 3  # steps that are not counted: loading, compiling and allocating at first use
PROBED = 20  # steps after which the speed is known


@dataclass(frozen=True)
class Estimate:
    """Bytes, seconds, and nats per token; None if unknown."""

    parameters: int  # of the whole model, without an adapter
    trained: int
    frozen_parameters: int  # of a teacher or reference model; 0 if none is in memory
    steps: int
    tokens: int  # positions that pass through the model
    tokens_per_second: float
    seconds: float
    memory_bytes: int  # added to the process by training, or allocated on the device
    counted_bytes: int  # the same by arithmetic alone
    disk_bytes: int
    loss: float | None


def forecast(
    profile: MemoryProfile,
    settings: TrainSettings,
    steps: int,
    device: Device,
    *,
    tokens_per_second: float | None = None,
    held_bytes: int | None = None,
    unique_tokens: int | None = None,
    validation_tokens: int = 0,
    from_scratch: bool = True,
) -> Estimate:
    """The forecast of a run of `steps` steps. Speed is `tokens_per_second` or estimated from the device's measured
    peak; memory is from `held_bytes`, the most that a few measured steps added to the process, or by arithmetic.

    `unique_tokens` is the training text's length; its shards count as disk space.
    """
    a = profile.model.architecture
    length = settings.sequence_length or a.max_positions
    tokens = steps * settings.rows_per_step(length) * length
    rate = tokens_per_second or guessed_rate(profile, length, device)
    evaluations = -(-steps // settings.evaluation_interval(steps))
    evaluating = evaluations * (validation_tokens * FORWARD_SHARE / rate + EVALUATION_SECONDS)
    memory, counted = run_bytes(profile, settings, length, device, held_bytes)
    checkpoint = checkpoint_bytes(profile, settings, device)
    return Estimate(
        parameters=parameter_count(a),
        trained=sum(parameter.numel() for parameter in trained(profile.model).values()),
        frozen_parameters=parameter_count(profile.frozen.architecture) if profile.frozen is not None else 0,
        steps=steps,
        tokens=tokens,
        tokens_per_second=rate,
        seconds=tokens / rate + evaluating,
        memory_bytes=memory,
        counted_bytes=counted,
        disk_bytes=disk_bytes(checkpoint, settings, steps, a.vocab_size, unique_tokens or 0),
        loss=loss_ahead(parameter_count(a), tokens, unique_tokens, a.vocab_size) if from_scratch else None,
    )


def loss_ahead(parameters: int, tokens: int, unique_tokens: int | None, vocab_size: int) -> float | None:
    """Expected loss in nats per token; None for so few tokens that the law exceeds the loss of guessing."""
    loss = expected_loss(parameters, tokens, unique_tokens)
    return loss if loss < math.log(vocab_size) else None


def guessed_rate(profile: MemoryProfile, length: int, device: Device) -> float:
    """Tokens per second, from the device's peak and `EFFICIENCY`."""
    efficiency = EFFICIENCY.get(device.torch_device.type, EFFICIENCY["cpu"])
    frozen = 0 if profile.frozen is None else flops_per_token(profile.frozen.architecture, length).forward
    return efficiency * measured_peak(device) / (StepFlops(profile.model, length).of_step(1, 1) + frozen)


def run_bytes(
    profile: MemoryProfile, settings: TrainSettings, length: int, device: Device, held: int | None = None
) -> tuple[int, int]:
    """Peak bytes of a run, in a step or a forward pass between two: from `held`, measured in a few steps, and by
    arithmetic alone. Both are equal without `held`.
    """
    used = profile.used(length)
    training = training_bytes(profile, settings, settings.rows_per_micro_batch(length), used, device)
    reading, state = max(reading_peaks(profile, used, device)), state_bytes(profile, settings, device)
    if device.torch_device.type != "cpu":
        return max(held or training, state + reading), max(training, state + reading)
    # Blocks freed by a step are too small to reuse for a forward pass that needs more than all of them.
    between = reading if reading > training - state else 0
    counted = LIBRARIES + round(HELD * training) + between
    return (held + BETWEEN_STEPS + between if held else counted), counted


def disk_bytes(checkpoint: int, settings: TrainSettings, steps: int, vocab_size: int, unique_tokens: int) -> int:
    """Bytes of the checkpoints at most (those kept, the best, and one being written), and of the text's tokens."""
    interval = settings.save_steps or settings.evaluation_interval(steps)
    checkpoints = min(-(-steps // interval), settings.save_total_limit + 1) + 1
    return checkpoints * checkpoint + unique_tokens * (2 if vocab_size <= 65_536 else 4)


# -- plan.json --------------------------------------------------------------------------------------------------------


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

    Create it when all models of its profile are in memory but nothing else of training, and call it last, so that
    its times cover the whole step. Seconds are those of this process, from its first step.
    """

    def __init__(
        self, root: Path, profile: MemoryProfile, settings: TrainSettings, steps: int, device: Device, **data: Any
    ) -> None:
        """`data` are arguments of `forecast` about the training text."""
        self.path, self.steps, self.device = root / "plan.json", steps, device
        self.forecast = functools.partial(forecast, profile, settings, steps, device, **data)
        weights = weights_bytes(profile)  # first: counting loads libraries, which belong to the memory before the run
        self.before = 0 if device.torch_device.type == "cuda" else max(0, resident_memory() - weights)
        self.content: dict[str, Any] = {"steps": steps}
        reset_peak_memory(device)
        length = settings.sequence_length or profile.model.architecture.max_positions
        self.tokens_per_step = settings.rows_per_step(length) * length
        self.times = [time.perf_counter()]  # of the beginning, and of the end of each step
        self.first = 0  # step that this process starts from

    def update(self, state: State, report: Report) -> None:
        if "predicted" in self.content:
            return
        if len(self.times) == 1:
            self.first = state.step - 1
            self._write()  # not before: a run that cannot be resumed keeps its file
        self.times.append(time.perf_counter())
        if state.step - self.first == min(PROBED, max(1, (self.steps - self.first) // 3)):
            self._predict()

    def complete(self, validation_loss: float | None) -> str:
        """Write the actual figures; returns both as one line. Empty if nothing was predicted."""
        if "predicted" not in self.content:
            return ""
        self.content["real"] = {
            "seconds": round(time.perf_counter() - self.times[0], 1),
            "memory_bytes": peak_memory(self.device),
            "disk_bytes": sum(path.stat().st_size for path in self.path.parent.rglob("*") if path.is_file()),
            "validation_loss": validation_loss,
        }
        self._write()
        predicted, real = self.content["predicted"], self.content["real"]
        parts = [
            f"{what} {show(real[name])} (predicted {show(predicted[name])})"
            for name, (what, show) in SHOWN.items()
            if real[name] and predicted[name]
        ]
        return "the run took: " + ", ".join(parts)

    def _predict(self) -> None:
        held = peak_memory(self.device) - self.before
        seconds = np.diff(self.times)
        counted = seconds[min(WARM_UP, len(seconds) - 1) :]
        rate = self.tokens_per_step / float(np.median(counted))
        estimate = self.forecast(tokens_per_second=rate, held_bytes=held)
        self.content |= {
            "parameters": estimate.parameters,
            "tokens": estimate.tokens,
            "memory_before_bytes": self.before,  # the part of the memory below that was in use before the run
            "counted_memory_bytes": self.before + estimate.counted_bytes,  # by arithmetic alone, as `slm plan` says it
            "probe": {"steps": len(counted), "tokens_per_second": round(rate), "memory_bytes": self.before + held},
            "predicted": {
                "seconds": round(estimate.seconds * (self.steps - self.first) / self.steps, 1),
                "memory_bytes": self.before + estimate.memory_bytes,
                "disk_bytes": estimate.disk_bytes,
                "validation_loss": None if estimate.loss is None else round(estimate.loss, 3),
            },
        }
        self._write()

    def _write(self) -> None:
        write_whole(self.path, json.dumps(self.content, indent=2) + "\n")


# -- published scaling laws --------------------------------------------------------------------------------------------

# They were fitted on models of about 60 M parameters and more: for smaller models they are extrapolations.
# Hoffmann et al. 2022 (arXiv:2203.15556), approach 3, with the fit corrected by Besiroglu et al. 2024
# (arXiv:2404.10102): L(N, D) = E + A / N^α + B / D^β, in nats a token of web text in a vocabulary of 32,000.
E, A, ALPHA, B, BETA = 1.8172, 482.01, 0.3478, 2085.43, 0.3658
# Muennighoff et al. 2023 (arXiv:2305.16264): repeated tokens are worth less in each epoch.
REPETITIONS = 15.39
HIGHEST_RATE = 1e-2  # AdamW's; the law exceeds it below a million parameters, where it was not tested


def expected_loss(parameters: float, tokens: float, unique_tokens: float | None = None) -> float:
    """Expected loss in nats per token, of `parameters` with embeddings after `tokens` trained tokens.

    `unique_tokens`: size of the training text, if it is read more than once.
    """
    if unique_tokens is not None and unique_tokens < tokens:
        repetitions = tokens / unique_tokens - 1
        tokens = unique_tokens * (1 + REPETITIONS * (1 - math.exp(-repetitions / REPETITIONS)))
    return E + A / parameters**ALPHA + B / tokens**BETA


def parameters_for(tokens: float) -> float:
    """Compute-optimal number of parameters for `tokens` tokens.

    At constant 6 N D, the loss is lowest at α A / N^α = β B / D^β.
    """
    return (ALPHA * A / (BETA * B) * tokens**BETA) ** (1 / ALPHA)


def learning_rate_for(parameters: float, tokens: float) -> float:
    """AdamW's peak rate: Li et al. 2025 (arXiv:2503.04715, "Step Law"), 1.79 N^-0.713 D^0.307, N without embeddings."""
    return min(HIGHEST_RATE, 1.79 * parameters**-0.713 * tokens**0.307)


def tokens_per_step_for(tokens: float) -> float:
    """Tokens per step: Li et al. 2025, 0.58 D^0.571."""
    return 0.58 * tokens**0.571
