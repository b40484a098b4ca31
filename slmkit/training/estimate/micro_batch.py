"""Micro-batch size: the largest that fits in memory, and the error when none fits."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from slmkit.config import UserError
from slmkit.device import Device, available_memory
from slmkit.model.decoder import Decoder
from slmkit.training.estimate.memory import training_bytes
from slmkit.training.estimate.memory_profile import MemoryProfile
from slmkit.training.optimizers.choose import make_optimizers
from slmkit.training.precision import to_weight_dtype
from slmkit.training.recipe.recipe import TrainSettings

# Share of the free memory: the estimate is right to 15 %, and allocators waste some.
USABLE = {"cpu": 0.7}
USABLE_ELSEWHERE = 0.85


def resolve_micro_batch(
    settings: TrainSettings, model: Decoder, inventory: MemoryProfile, length: int, device: Device
) -> TrainSettings:
    """`settings` with `micro_batch_tokens: auto` replaced by the most tokens that fit.

    The micro-batches of a step are of about equal size. On an accelerator the size is tested by a step without effect.
    Raises `UserError` when not even one row of `length` tokens fits.
    """
    if settings.micro_batch_tokens != "auto":
        return settings
    rows = settings.rows_per_step(length)
    fitting = fitting_rows(inventory, settings, rows, length, device, available_memory(device))
    if device.torch_device.type != "cpu":
        fitting = tried_rows(model, inventory, settings, fitting, length, device)
    micro_batches = -(-rows // fitting)
    return settings.model_copy(update={"micro_batch_tokens": -(-rows // micro_batches) * length})


def fitting_rows(
    inventory: MemoryProfile, settings: TrainSettings, most: int, length: int, device: Device, free: int
) -> int:
    """The largest number of rows, at most `most`, whose estimated memory is within the usable share of `free` bytes.

    Raises `UserError` when not even one fits. One row if the system does not report free memory.
    """
    usable = int(free * USABLE.get(device.torch_device.type, USABLE_ELSEWHERE))

    def needed(rows: int) -> int:
        return training_bytes(inventory, settings, rows, length, device, settings.gradient_checkpointing)

    if usable == 0:
        return 1
    fits, fails = 1, most
    of_fits, of_fails = needed(fits), needed(fails)
    if of_fits > usable:
        raise lack_of_memory(inventory, settings, 1, length, device, free)
    if of_fails <= usable:
        return most
    while fits + 1 < fails:  # memory is nearly linear in rows: interpolation needs few steps
        guess = fits + (fails - fits) * (usable - of_fits) // (of_fails - of_fits)
        middle = min(max(guess, fits + 1), fails - 1)
        if (of_middle := needed(middle)) <= usable:
            fits, of_fits = middle, of_middle
        else:
            fails, of_fails = middle, of_middle
    return fits


def tried_rows(
    model: Decoder, inventory: MemoryProfile, settings: TrainSettings, rows: int, length: int, device: Device
) -> int:
    """The largest of `rows`, `rows // 2`, … for which a step fits in memory, beside the inventory's teacher or
    reference model.
    """
    while True:
        try:
            _try(model, inventory, settings, rows, length, device)
            return rows
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error) or rows == 1:
                raise
        # Outside the except clause, whose traceback keeps the tensors alive.
        rows //= 2
        model.zero_grad(set_to_none=True)
        if device.torch_device.type == "cuda":
            torch.cuda.empty_cache()


def _try(
    model: Decoder, inventory: MemoryProfile, settings: TrainSettings, rows: int, length: int, device: Device
) -> None:
    """Two forward and backward passes with an update in between that changes nothing: no gradient, no rate."""
    model.to(device.torch_device)
    to_weight_dtype(model, device)
    model.recompute_every = settings.gradient_checkpointing
    optimizers = make_optimizers(model, settings, device)
    objective = inventory.objective(inventory.built_beside(device.torch_device))
    batch = inventory.batch(rows, length).to(device.torch_device)
    for _ in range(2):
        with device.autocast():
            loss = objective(model, batch).total
        loss.backward()
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter.grad.zero_()
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = 0.0
            optimizer.step()
    model.zero_grad(set_to_none=True)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether the error is an out-of-memory error, of any device's allocator."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    words = ("can't allocate memory", "not enough memory", "out of memory")
    return isinstance(error, RuntimeError) and any(phrase in str(error) for phrase in words)


@contextmanager
def lack_of_memory_explained(
    inventory: MemoryProfile, settings: TrainSettings, rows: int, length: int, device: Device
) -> Iterator[None]:
    """Context manager that turns an out-of-memory error into a `UserError` with figures and remedies."""
    free = available_memory(device)
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise lack_of_memory(inventory, settings, rows, length, device, free) from error


def lack_of_memory(
    inventory: MemoryProfile, settings: TrainSettings, rows: int, length: int, device: Device, free: int
) -> UserError:
    """The error for micro-batches of `rows` rows: memory needed, memory free, and memory needed with each remedy."""

    def needed(rows: int, recompute_every: int, changed: TrainSettings = settings) -> str:
        return f"about {training_bytes(inventory, changed, rows, length, device, recompute_every) / 2**30:.2f} GiB"

    every = settings.gradient_checkpointing
    remedies = []
    if rows > 1:
        fewer = rows // 2
        remedies.append(f"train.micro_batch_tokens={fewer * length} ({needed(fewer, every)})")
    if every != 1:
        remedies.append(f"train.gradient_checkpointing=1 ({needed(rows, 1)})")
    if settings.optimizer == "adamw":
        small = settings.model_copy(update={"optimizer": "adamw_8bit"})
        remedies.append(f"train.optimizer=adamw_8bit ({needed(rows, every, small)})")
    remedies += [f"train.sequence_length={length // 2}", "a smaller model"]
    there = f", of {free / 2**30:.2f} GiB that were free" if free else ""
    return UserError(
        f"out of memory: a step through {rows} × {length} tokens at once needs {needed(rows, every)}{there}; "
        f"set {', or '.join(remedies[:-1])}, or take {remedies[-1]}"
    )
