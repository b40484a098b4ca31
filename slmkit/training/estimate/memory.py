"""Peak memory of a training step or a forward pass, measured by running it on meta tensors."""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from slmkit.device import Device
from slmkit.model.architectures import Architecture
from slmkit.model.decoder import Decoder
from slmkit.training.estimate.memory_profile import MemoryProfile
from slmkit.training.optimizers.choose import make_optimizers, trained
from slmkit.training.precision import to_weight_dtype
from slmkit.training.recipe.recipe import TrainSettings


class Ledger(TorchDispatchMode):
    """Adds up the bytes of all live tensors while active; `peak` is the maximum.

    Boolean masks count as all True, since meta tensors have no values.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: weakref.WeakSet[torch.UntypedStorage] = weakref.WeakSet()

    def __torch_dispatch__(self, func: Callable, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.index.Tensor and _is_masked(args[1]):
            result = args[0].flatten(0, args[1][0].dim() - 1).clone()
        else:
            result = func(*args, **(kwargs or {}))
        tree_map_only(Tensor, self._note, result)
        return result

    def _note(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()  # views share it
        if storage in self._known:
            return
        size = storage.nbytes()
        self._known.add(storage)
        weakref.finalize(storage, self._gone, size)
        self.now += size
        self.peak = max(self.peak, self.now)

    def _gone(self, size: int) -> None:
        self.now -= size


def _is_masked(indices: Sequence[Tensor | None]) -> bool:
    return len(indices) == 1 and indices[0] is not None and indices[0].dtype == torch.bool


def training_bytes(
    inventory: MemoryProfile, settings: TrainSettings, rows: int, length: int, device: Device, recompute_every: int = 0
) -> int:
    """Peak bytes of a step: weights, gradients, optimizer state, activations kept for the backward pass, and the
    teacher or reference model.

    One micro-batch is `rows` of `length` tokens, all learned; every `recompute_every`-th block is recomputed in the
    backward pass.
    """
    with FakeTensorMode(), Ledger() as ledger:
        decoder, beside = inventory.built()
        decoder.recompute_every = recompute_every
        optimizers = _optimizers_of(decoder, settings, device)
        batch, objective = inventory.batch(rows, length), inventory.objective(beside)
        for parameter in trained(decoder).values():
            parameter.grad = torch.empty_like(parameter)
        _update(optimizers)  # creates the optimizer state that all steps but the first have
        with device.autocast():
            loss = objective(decoder, batch).total
        loss.backward()
        _update(optimizers)
    return ledger.peak


def state_bytes(inventory: MemoryProfile, settings: TrainSettings, device: Device) -> int:
    """Bytes held between two steps: weights, optimizer state, and the teacher or reference model."""
    with FakeTensorMode(), Ledger() as ledger:
        decoder, beside = inventory.built()
        optimizers = _optimizers_of(decoder, settings, device)
        for parameter in trained(decoder).values():
            parameter.grad = torch.empty_like(parameter)
        _update(optimizers)
        held = ledger.now
        del beside
    return held


def weights_bytes(inventory: MemoryProfile) -> int:
    """Bytes of all models before the first step."""
    with FakeTensorMode():
        models = [model for model in inventory.built() if model is not None]
        return sum(tensor.nbytes for model in models for tensor in _tensors_of(model))


def checkpoint_bytes(inventory: MemoryProfile, settings: TrainSettings, device: Device) -> int:
    """Bytes of a checkpoint: trained weights and optimizer state, without frozen weights."""
    state = state_bytes(replace(inventory, beside=None), settings, device)
    if isinstance(inventory.model, Architecture):
        return state
    return state - sum(tensor.nbytes for tensor in _tensors_of(inventory.model) if not tensor.requires_grad)


def reading_peaks(inventory: MemoryProfile, length: int, device: Device) -> list[int]:
    """Peak bytes that each forward pass between two steps adds to those held already."""
    peaks = []
    for read in inventory.readings:
        with FakeTensorMode(), torch.no_grad(), Ledger() as ledger:
            decoder, beside = inventory.built()
            weights = ledger.now
            with device.autocast():
                read(decoder.eval(), beside, length)
        peaks.append(ledger.peak - weights)
    return peaks


def _tensors_of(model: Decoder) -> Iterator[Tensor]:
    return itertools.chain(model.parameters(), model.buffers())


def _optimizers_of(decoder: Decoder, settings: TrainSettings, device: Device) -> list[torch.optim.Optimizer]:
    """The optimizers of a meta decoder, with its weights in their training type."""
    to_weight_dtype(decoder, device)
    if settings.optimizer == "adamw_8bit":  # bitsandbytes' needs real tensors
        return [_MomentsOf8Bits(trained(decoder).values(), {})]
    return make_optimizers(decoder, settings, device)


class _MomentsOf8Bits(torch.optim.Optimizer):
    """Takes as much memory as bitsandbytes' AdamW: two bytes per parameter, and two numbers per block of 256."""

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for p in self.param_groups[0]["params"]:
            if not self.state[p]:
                blocks = torch.empty(2, -(-p.numel() // 256))
                self.state[p] = {"moments": torch.empty(2, *p.shape, dtype=torch.uint8), "blocks": blocks}


def _update(optimizers: list[torch.optim.Optimizer]) -> None:
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


def reading_bytes(architecture: Architecture, rows: int, length: int, dtype: torch.dtype) -> int:
    """Peak bytes of reading `rows` prompts of `length` tokens: weights, KV cache and activations."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with FakeTensorMode(), torch.no_grad(), Ledger() as ledger:
            decoder = Decoder(architecture).eval()
            cache = decoder.new_cache(rows, length)
            hidden = decoder(torch.zeros(rows, length, dtype=torch.long), cache)
            decoder.logits(hidden[:, -1])
    finally:
        torch.set_default_dtype(before)
    return ledger.peak
