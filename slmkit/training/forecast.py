"""What a run will take: memory, time, disk, and the loss to expect; by arithmetic, and by speed where it was measured.

(`loop.Plan` is what the loop is told to do; a forecast is what to expect of it.)
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F

from slmkit.device import Device, measured_peak
from slmkit.model import SLMConfig
from slmkit.model.architecture import Architecture
from slmkit.model.families import architecture_of
from slmkit.model.sizes import flops_per_token, parameter_count
from slmkit.training.memory import Blueprint, Ledger, built, frozen_bytes, state_bytes, training_bytes
from slmkit.training.recipe import TrainSettings
from slmkit.training.scaling import expected_loss

EFFICIENCY = {"cpu": 0.25, "cuda": 0.35}  # of plain products' speed that a small model's step reaches, unmeasured
VALIDATION_ROWS = 8  # that go through the model at once
FORWARD_SHARE = 1 / 3  # of a training step's operations
EVALUATION_SECONDS = 1.0  # for samples, the picture and the checkpoint, beside the validation itself
# On a CPU: what libraries load and compile in a run's first steps and evaluation, and what glibc holds for each byte in
# use, since it keeps freed blocks (device.keep_freed_memory). Measured on Linux, models of 1 to 29 M parameters.
LIBRARIES, HELD = 120 << 20, 1.37


@dataclass(frozen=True)
class Forecast:
    """Bytes, seconds, and nats a token; None where nothing can be said."""

    parameters: int
    steps: int
    tokens: int  # positions that pass through the model
    tokens_per_second: float
    seconds: float
    memory_bytes: int  # that training adds to the process, or takes of the device
    disk_bytes: int
    loss: float | None


def forecast(
    config: SLMConfig,
    settings: TrainSettings,
    steps: int,
    device: Device,
    *,
    tokens_per_second: float | None = None,
    unique_tokens: int | None = None,
    validation_tokens: int = 0,
    from_scratch: bool = True,
    blueprint: Blueprint | None = None,
) -> Forecast:
    """The forecast of a run of `steps`. Without a measured `tokens_per_second`, by the device's measured peak.

    `unique_tokens` is the training text's length; its shards count among the disk it takes. `blueprint` is of a model
    in which something was changed after it was built.
    """
    a = architecture_of(config)
    blueprint = blueprint or a
    length = settings.sequence_length or config.max_position_embeddings
    rows = settings.rows_per_step(length)
    tokens = steps * rows * length
    rate = tokens_per_second or guessed_rate(a, length, device)
    evaluations = -(-steps // (settings.eval_steps or max(1, steps // 10)))
    evaluating = evaluations * (validation_tokens * FORWARD_SHARE / rate + EVALUATION_SECONDS)
    state = state_bytes(blueprint, settings, device)
    return Forecast(
        parameters=parameter_count(a),
        steps=steps,
        tokens=tokens,
        tokens_per_second=rate,
        seconds=tokens / rate + evaluating,
        memory_bytes=run_bytes(blueprint, settings, rows, length, device, state),
        disk_bytes=disk_bytes(state - frozen_bytes(blueprint), settings, steps, config.vocab_size, unique_tokens or 0),
        loss=loss_ahead(parameter_count(a), tokens, unique_tokens, config.vocab_size) if from_scratch else None,
    )


def loss_ahead(parameters: int, tokens: int, unique_tokens: int | None, vocab_size: int) -> float | None:
    """The law's loss; None for so few tokens that it leads beyond the loss of guessing, where it holds nothing."""
    loss = expected_loss(parameters, tokens, unique_tokens)
    return loss if loss < math.log(vocab_size) else None


def guessed_rate(a: Architecture, length: int, device: Device) -> float:
    """Tokens a second by the device's peak and the share of it that such models reach."""
    efficiency = EFFICIENCY.get(device.torch_device.type, EFFICIENCY["cpu"])
    return efficiency * measured_peak(device) / (3 * flops_per_token(a, length).forward)


def run_bytes(blueprint: Blueprint, settings: TrainSettings, rows: int, length: int, device: Device, state: int) -> int:
    """The most that a run adds to its process, or takes of the device: in a step or a validation."""
    micro = min(rows, settings.rows_per_micro_batch(length))
    training = training_bytes(blueprint, settings, micro, length, device, settings.gradient_checkpointing)
    validation = _validation_bytes(blueprint, length, device)
    if device.torch_device.type != "cpu":
        return max(training, state + validation)
    # Blocks that a step has left are in pieces too small for a validation that needs more than all of them.
    beside = validation if validation > training - state else 0
    return LIBRARIES + round(HELD * training) + beside


def _validation_bytes(blueprint: Blueprint, length: int, device: Device) -> int:
    """What a batch of validation adds to the weights."""
    with FakeTensorMode(), torch.no_grad(), Ledger() as ledger:
        decoder = built(blueprint).eval()
        weights = ledger.now
        ids = torch.zeros(VALIDATION_ROWS, length, dtype=torch.long)
        with device.autocast():
            logits = decoder.logits(decoder(ids).flatten(0, 1)).float()
        F.cross_entropy(logits, ids.flatten(), reduction="sum")
    return ledger.peak - weights


def disk_bytes(state: int, settings: TrainSettings, steps: int, vocab_size: int, unique_tokens: int) -> int:
    """Checkpoints at their most (those kept, the best, and one being written), and the text's tokens."""
    interval = settings.save_steps or settings.eval_steps or max(1, steps // 10)
    checkpoints = min(-(-steps // interval), settings.save_total_limit + 1) + 1
    return checkpoints * state + unique_tokens * (2 if vocab_size <= 65_536 else 4)
