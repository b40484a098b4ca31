"""Micro-batch size: the largest that fits in memory, and the error when none fits."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from slmkit.config import UserError
from slmkit.device import Device, available_memory
from slmkit.training.estimate.memory import MemoryProfile, run_step, training_bytes
from slmkit.training.recipe.recipe import USUAL_AT_ONCE, TrainSettings

# Numbers of one activation [tokens, width] on a CPU, if the recipe says nothing: a MiB. Than with all rows of a step at
# once, a pass takes as long at a width of 512 with 16,384 tokens, and 5 to 10 % longer at 384 with 50,257, whose head
# has a large gradient; the memory is a third.
ACTIVATION_ON_A_CPU = 2**18
# Share of the free memory: the estimate is right to 15 %, and allocators waste some.
USABLE = {"cpu": 0.7}
USABLE_ELSEWHERE = 0.85
OUT_OF_MEMORY = ("can't allocate memory", "not enough memory", "out of memory")  # in messages of allocators


def with_usual_micro_batch(settings: TrainSettings, width: int, device: Device) -> TrainSettings:
    """`settings` with the usual `micro_batch_tokens` of a model of this width on this device, if they name none."""
    if settings.micro_batch_tokens is not None:
        return settings
    usual = ACTIVATION_ON_A_CPU // width if device.torch_device.type == "cpu" else USUAL_AT_ONCE
    return settings.model_copy(update={"micro_batch_tokens": usual})


def resolve_micro_batch(settings: TrainSettings, profile: MemoryProfile, length: int, device: Device) -> TrainSettings:
    """`settings` with a number of `micro_batch_tokens`: for `auto` the most that fit, for None the usual one.

    The micro-batches of a step are of about equal size. On an accelerator the size is tested by a step.
    Raises `UserError` when not even one row of `length` tokens fits.
    """
    if settings.micro_batch_tokens != "auto":
        return with_usual_micro_batch(settings, profile.model.architecture.width, device)
    rows = settings.rows_per_step(length)
    fitting = fitting_rows(profile, settings, rows, length, device, available_memory(device))
    if device.torch_device.type != "cpu":
        fitting = tried_rows(profile, settings, fitting, length, device)
    micro_batches = -(-rows // fitting)
    return settings.model_copy(update={"micro_batch_tokens": -(-rows // micro_batches) * length})


def fitting_rows(
    profile: MemoryProfile, settings: TrainSettings, most: int, length: int, device: Device, free: int
) -> int:
    """The largest number of rows, at most `most`, whose estimated memory is within the usable share of `free` bytes.

    Raises `UserError` when not even one fits. One row if the system does not report free memory.
    """
    usable = int(free * USABLE.get(device.torch_device.type, USABLE_ELSEWHERE))
    if usable == 0:
        return 1
    fits, fails = 1, most
    of_fits, of_fails = (training_bytes(profile, settings, rows, length, device) for rows in (fits, fails))
    if of_fits > usable:
        raise lack_of_memory(profile, settings, 1, length, device, free)
    if of_fails <= usable:
        return most
    while fits + 1 < fails:  # memory is nearly linear in rows: interpolation needs few steps
        guess = fits + (fails - fits) * (usable - of_fits) // (of_fails - of_fits)
        middle = min(max(guess, fits + 1), fails - 1)
        needed = training_bytes(profile, settings, middle, length, device)
        if needed <= usable:
            fits, of_fits = middle, needed
        else:
            fails, of_fails = middle, needed
    return fits


def tried_rows(profile: MemoryProfile, settings: TrainSettings, rows: int, length: int, device: Device) -> int:
    """The largest of `rows`, `rows // 2`, … for which a step really fits in memory."""
    while True:
        try:
            run_step(profile, settings, rows, length, device, device.torch_device)
            return rows
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error) or rows == 1:
                raise
        # Outside the except clause, whose traceback keeps the tensors alive.
        rows //= 2
        if device.torch_device.type == "cuda":
            torch.cuda.empty_cache()


def is_out_of_memory(error: BaseException) -> bool:
    """Whether the error is an out-of-memory error, of any device's allocator."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(phrase in str(error) for phrase in OUT_OF_MEMORY)


@contextmanager
def lack_of_memory_explained(
    profile: MemoryProfile, settings: TrainSettings, rows: int, length: int, device: Device
) -> Iterator[None]:
    """Context manager that turns an out-of-memory error into a `UserError` with figures and remedies."""
    free = available_memory(device)
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise lack_of_memory(profile, settings, rows, length, device, free) from error


def lack_of_memory(
    profile: MemoryProfile, settings: TrainSettings, rows: int, length: int, device: Device, free: int
) -> UserError:
    """The error for micro-batches of `rows` rows: memory needed, memory free, and memory needed with each remedy."""

    def needed(rows: int = rows, **changes: object) -> str:
        changed = settings.model_copy(update=changes)
        return f"about {training_bytes(profile, changed, rows, length, device) / 2**30:.2f} GiB"

    remedies = []
    if rows > 1:
        remedies.append(f"train.micro_batch_tokens={rows // 2 * length} ({needed(rows // 2)})")
    if settings.gradient_checkpointing != 1:
        remedies.append(f"train.gradient_checkpointing=1 ({needed(gradient_checkpointing=1)})")
    if settings.optimizer == "adamw":
        remedies.append(f"train.optimizer=adamw_8bit ({needed(optimizer='adamw_8bit')})")
    remedies.append(f"train.sequence_length={length // 2}")
    there = f", of {free / 2**30:.2f} GiB that were free" if free else ""
    return UserError(
        f"out of memory: a step through {rows} × {length} tokens at once needs {needed()}{there}; "
        f"set {', or '.join(remedies)}, or take a smaller model"
    )
