"""Training speed and memory of a model, measured by a few real steps on random tokens."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from slmkit.data.batch import Batch
from slmkit.device import Device, peak_memory, reset_peak_memory, resident_memory
from slmkit.model.architectures import architecture_of
from slmkit.model.config import SLMConfig
from slmkit.model.decoder import Decoder
from slmkit.model.initialization import build_decoder
from slmkit.training.estimate.memory_profile import MemoryProfile
from slmkit.training.fit import fresh_state
from slmkit.training.loop import Every, Plan, Report, State, StopRequested, train
from slmkit.training.objective import Objective
from slmkit.training.recipe.recipe import Recipe, TrainSettings

STEPS = 20
FIRST = 3  # warm-up steps, not counted: loading, compiling and allocating at first use
LONGEST = 20.0  # seconds


@dataclass(frozen=True)
class Probe:
    """Measurements. `memory_bytes` is what training added to the process, or allocated on the device."""

    tokens_per_second: float
    step_seconds: float  # of a whole step, with all its micro-batches
    memory_bytes: int
    steps: int


@dataclass(frozen=True)
class ProbeTarget:
    """What to measure: the memory profile, and models with random weights: the trained one, and the teacher or
    reference model."""

    inventory: MemoryProfile
    models: Callable[[], tuple[Decoder, Decoder | None]]

    @classmethod
    def fresh(cls, config: SLMConfig) -> ProbeTarget:
        """Next-token training of a new model."""
        return cls(MemoryProfile(architecture_of(config)), lambda: (build_decoder(config, seed=0), None))


class RandomBatches:
    """Batches of random tokens; `rows` gives the number of rows of each step."""

    def __init__(self, inventory: MemoryProfile, length: int, rows: list[int]) -> None:
        self.vocab_size, self.length, self.rows = inventory.architecture.vocab_size, length, rows
        self.extra = inventory.extra
        self.rows_per_step, self.separate = max(rows), False
        self.total_rows: int | None = None
        self.rows_in_epoch: int | None = None

    def batch(self, step: int, rank: int = 0, world: int = 1) -> Batch:
        generator = torch.Generator().manual_seed(step)
        rows, length = self.rows[step], self.length
        ids = torch.randint(self.vocab_size, (rows, length + 1), generator=generator)
        extra = self.extra(rows, length)
        return Batch(ids[:, :-1].contiguous(), ids[:, 1:].contiguous(), rows * length, extra=extra)

    def has(self, step: int) -> bool:
        return step < len(self.rows)

    def shares(self, step: int) -> dict[str, float]:
        return {}

    def position(self) -> dict[str, Any]:
        return {}

    def seek(self, step: int, position: dict[str, Any]) -> None:
        """Does nothing: any batch can be made at any time."""


def probe(
    subject: ProbeTarget, settings: TrainSettings, device: Device, steps: int = STEPS, longest: float = LONGEST
) -> Probe:
    """Train the subject for `steps` real steps, or for `longest` seconds.

    If a step has several micro-batches, steps of one and two micro-batches alternate, and the time of a whole step is
    computed from both: its micro-batches and one update.
    """
    length = settings.sequence_length or subject.inventory.architecture.max_positions
    micro, rows = settings.rows_per_micro_batch(length), settings.rows_per_step(length)
    parts = max(1, rows / micro)
    turns = [min(rows, micro) * (1 + (parts > 1 and number % 2)) for number in range(steps)]
    before = resident_memory()
    reset_peak_memory(device)
    model, beside = subject.models()
    objective = subject.inventory.objective(None if beside is None else beside.to(device.torch_device))
    state = fresh_state(Recipe(train=settings), model, device)
    batches, plan = RandomBatches(subject.inventory, length, turns), _plan(steps, micro, settings, device)
    seconds = _times(state, objective, batches, plan, longest)
    counted = list(zip(turns, seconds))[min(FIRST, len(seconds) // 2) :]
    ones, twos = ([time for rows, time in counted if (rows == turns[0]) is is_one] for is_one in (True, False))
    one = statistics.median(ones or [time / 2 for time in twos])
    whole = max(one, one + (parts - 1) * (statistics.median(twos) - one)) if ones and twos else one * parts
    used = peak_memory(device) - (before if device.torch_device.type != "cuda" else 0)
    return Probe(rows * length / whole, whole, max(0, used), len(seconds))


def _times(state: State, objective: Objective, batches: RandomBatches, plan: Plan, longest: float) -> list[float]:
    """Seconds of each step, as many as fit into `longest` seconds."""
    seconds: list[float] = []
    stop, began = StopRequested(), time.perf_counter()
    last = began

    def note(state: State, report: Report) -> None:
        nonlocal last
        now = time.perf_counter()
        seconds.append(now - last)
        stop.is_set = now - began > longest
        last = now

    train(state, objective, batches, plan, (Every(1, note),), stop)
    return seconds


def _plan(steps: int, micro: int, settings: TrainSettings, device: Device) -> Plan:
    # One more step than there are, so that none is treated as the run's last.
    return Plan(steps, micro, settings.max_grad_norm, lambda step: 1.0, device)
