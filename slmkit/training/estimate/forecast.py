"""Forecast of a run's memory, time, disk and loss, by arithmetic or from measured speed.

(`loop.Plan` is the loop's input; a forecast is its expected cost.)
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from slmkit.device import Device, measured_peak
from slmkit.model.architectures import architecture_of
from slmkit.model.config import SLMConfig
from slmkit.model.sizes import parameter_count
from slmkit.training.estimate.flops import operations_per_token
from slmkit.training.estimate.memory import checkpoint_bytes, reading_peaks, state_bytes, training_bytes
from slmkit.training.estimate.memory_profile import MemoryProfile
from slmkit.training.estimate.scaling_laws import expected_loss
from slmkit.training.recipe.recipe import TrainSettings

EFFICIENCY = {"cpu": 0.25, "cuda": 0.35}  # share of the peak that a small model's step reaches, if not measured
FORWARD_SHARE = 1 / 3  # of a training step's operations
EVALUATION_SECONDS = 1.0  # for samples, the plot and the checkpoint, without the validation itself
# On a CPU: bytes that libraries load and compile in the first steps and evaluation, and bytes that glibc holds per byte
# in use, since it keeps freed blocks (device.keep_freed_memory). Measured on Linux, models of 1 to 29 M parameters.
LIBRARIES, HELD = 120 << 20, 1.37
# Bytes that evaluations, samples, plots and checkpoints add to those of the first steps, measured the same way.
BETWEEN_STEPS = 70 << 20


@dataclass(frozen=True)
class Estimate:
    """Bytes, seconds, and nats per token; None if unknown."""

    parameters: int  # of the whole model, without an adapter
    trained: int
    beside: int  # parameters of a teacher or reference model; 0 if none is in memory
    steps: int
    tokens: int  # positions that pass through the model
    tokens_per_second: float
    seconds: float
    memory_bytes: int  # added to the process by training, or allocated on the device
    counted_bytes: int  # the same by arithmetic alone
    disk_bytes: int
    loss: float | None


def forecast(
    config: SLMConfig,
    settings: TrainSettings,
    steps: int,
    device: Device,
    *,
    tokens_per_second: float | None = None,
    held_bytes: int | None = None,
    unique_tokens: int | None = None,
    validation_tokens: int = 0,
    from_scratch: bool = True,
    inventory: MemoryProfile | None = None,
) -> Estimate:
    """The forecast of a run of `steps` steps. Speed is `tokens_per_second` or estimated from the device's measured
    peak; memory is from `held_bytes`, the most that a few measured steps added to the process, or by arithmetic.

    `unique_tokens` is the training text's length; its shards count as disk space. `inventory` is needed if memory
    holds more than a new model with next-token loss.
    """
    a = architecture_of(config)
    inventory = inventory or MemoryProfile(a)
    length = settings.sequence_length or config.max_position_embeddings
    rows = settings.rows_per_step(length)
    tokens = steps * rows * length
    rate = tokens_per_second or guessed_rate(inventory, length, device)
    evaluations = -(-steps // settings.evaluation_interval(steps))
    evaluating = evaluations * (validation_tokens * FORWARD_SHARE / rate + EVALUATION_SECONDS)
    checkpoint = checkpoint_bytes(inventory, settings, device)
    memory, counted = run_bytes(inventory, settings, rows, length, device, held_bytes)
    return Estimate(
        parameters=parameter_count(a),
        trained=inventory.trained,
        beside=parameter_count(inventory.beside.architecture) if inventory.beside is not None else 0,
        steps=steps,
        tokens=tokens,
        tokens_per_second=rate,
        seconds=tokens / rate + evaluating,
        memory_bytes=memory,
        counted_bytes=counted,
        disk_bytes=disk_bytes(checkpoint, settings, steps, config.vocab_size, unique_tokens or 0),
        loss=loss_ahead(parameter_count(a), tokens, unique_tokens, config.vocab_size) if from_scratch else None,
    )


def loss_ahead(parameters: int, tokens: int, unique_tokens: int | None, vocab_size: int) -> float | None:
    """Expected loss in nats per token; None for so few tokens that the law exceeds the loss of guessing."""
    loss = expected_loss(parameters, tokens, unique_tokens)
    return loss if loss < math.log(vocab_size) else None


def guessed_rate(inventory: MemoryProfile, length: int, device: Device) -> float:
    """Tokens per second, from the device's peak and `EFFICIENCY`."""
    efficiency = EFFICIENCY.get(device.torch_device.type, EFFICIENCY["cpu"])
    return efficiency * measured_peak(device) / operations_per_token(inventory, length)


def run_bytes(
    inventory: MemoryProfile, settings: TrainSettings, rows: int, length: int, device: Device, held: int | None = None
) -> tuple[int, int]:
    """Peak bytes of a run, in a step or a forward pass between two: from `held`, measured in a few steps, and by
    arithmetic alone. Both are equal without `held`.
    """
    micro, used = min(rows, settings.rows_per_micro_batch(length)), inventory.used(length)
    training = training_bytes(inventory, settings, micro, used, device, settings.gradient_checkpointing)
    reading, state = max(reading_peaks(inventory, used, device)), state_bytes(inventory, settings, device)
    if device.torch_device.type != "cpu":
        return max(held or training, state + reading), max(training, state + reading)
    # Blocks freed by a step are too small to reuse for a forward pass that needs more than all of them.
    beside = reading if reading > training - state else 0
    counted = LIBRARIES + round(HELD * training) + beside
    return (held + BETWEEN_STEPS + beside if held else counted), counted


def disk_bytes(state: int, settings: TrainSettings, steps: int, vocab_size: int, unique_tokens: int) -> int:
    """Bytes of the checkpoints at most (those kept, the best, and one being written), and of the text's tokens."""
    interval = settings.save_steps or settings.evaluation_interval(steps)
    checkpoints = min(-(-steps // interval), settings.save_total_limit + 1) + 1
    return checkpoints * state + unique_tokens * (2 if vocab_size <= 65_536 else 4)
