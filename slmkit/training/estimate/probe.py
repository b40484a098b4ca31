"""Training speed and memory of a run, measured by a few real steps on random tokens."""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass

import torch
from torch import nn

from slmkit.data.batch import Batch
from slmkit.device import Device, peak_memory, reset_peak_memory, resident_memory
from slmkit.model.decoder import Decoder
from slmkit.training.estimate.forecast import WARM_UP
from slmkit.training.estimate.memory import MemoryProfile, tensors_of
from slmkit.training.fit import fresh_state
from slmkit.training.loop import Plan, train_step
from slmkit.training.recipe.recipe import Recipe, TrainSettings

STEPS = 20
LONGEST = 20.0  # seconds


@dataclass(frozen=True)
class Probe:
    """Measurements. `memory_bytes` is what training added to the process, or allocated on the device."""

    tokens_per_second: float
    step_seconds: float  # of a whole step, with all its micro-batches
    memory_bytes: int
    steps: int


def probe(
    profile: MemoryProfile, settings: TrainSettings, device: Device, steps: int = STEPS, longest: float = LONGEST
) -> Probe:
    """Train the profile's models, with random weights, for `steps` real steps, or for `longest` seconds.

    If a step has several micro-batches, steps of one and two micro-batches alternate, and the time of a whole step is
    computed from both: its micro-batches and one update.
    """
    length = settings.sequence_length or profile.model.architecture.max_positions
    micro, rows = settings.rows_per_micro_batch(length), settings.rows_per_step(length)
    parts = rows / micro
    before = resident_memory()
    reset_peak_memory(device)
    model, frozen = profile.built()
    for each in (model, frozen):
        _randomize(each)
    objective = profile.objective(None if frozen is None else frozen.to(device.torch_device))
    state = fresh_state(Recipe(train=settings), model, device)
    model.train()
    plan = Plan(steps, micro, settings.max_grad_norm, lambda step: 1.0, device)
    seconds: dict[int, list[float]] = {1: [], 2: []}  # by the number of micro-batches
    began = time.perf_counter()
    while state.step < steps and time.perf_counter() - began <= longest:
        micro_batches = 1 + (parts > 1 and state.step % 2)
        ids = torch.randint(profile.model.architecture.vocab_size, (micro * micro_batches, length + 1))
        extra = profile.extra(len(ids), length)
        batch = Batch(ids[:, :-1].contiguous(), ids[:, 1:].contiguous(), len(ids) * length, extra=extra)
        started = time.perf_counter()
        train_step(state, objective, batch, plan)
        seconds[micro_batches].append(time.perf_counter() - started)
    one, two = (statistics.median(times[min(WARM_UP, len(times) // 2) :] or [0.0]) for times in seconds.values())
    whole = max(one, one + (parts - 1) * (two - one)) if two else one * parts
    used = peak_memory(device) - (before if device.torch_device.type != "cuda" else 0)
    return Probe(rows * length / whole, whole, max(0, used), state.step)


def _randomize(model: Decoder | None) -> None:
    """Random matrices, since an accelerator multiplies zeros faster; norms and scales of 1, adapters of 0."""
    tensors = [] if model is None else [*tensors_of(model)]
    has_adapter = any(isinstance(tensor, nn.Parameter) and not tensor.requires_grad for tensor in tensors)
    for tensor in tensors:
        if tensor.dim() < 2:
            tensor.data.fill_(1)
        elif tensor.is_floating_point():
            tensor.data.normal_(std=0.0 if has_adapter and tensor.requires_grad else 0.02)
        else:  # codes of a quantized weight
            tensor.random_()
