"""How much memory a step of training or of reading takes: it is run on tensors that have shapes and no content."""

from __future__ import annotations

import copy
import itertools
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from slmkit.device import Device
from slmkit.model import Decoder
from slmkit.model.architecture import Architecture
from slmkit.training.losses import linear_cross_entropy
from slmkit.training.optimizers import make_optimizers, trained
from slmkit.training.precision import to_weight_dtype
from slmkit.training.recipe import TrainSettings

# What a model is made of: its architecture, or where something has been changed in it, itself without its content.
Blueprint = Architecture | Decoder


def blueprint_of(model: Decoder) -> Blueprint:
    """The model as it is built now, what is trained of it and what is not, with tensors that have shapes alone."""
    return _copy(model, lambda tensor: tensor.detach().to("meta"))


def _copy(model: Decoder, make: Callable[[Tensor], Tensor]) -> Decoder:
    """A copy of a model in which `make(tensor)` stands for each of its tensors."""
    memo: dict[int, Any] = {}
    for tensor in itertools.chain(model.parameters(), model.buffers()):
        made = make(tensor)
        is_parameter = isinstance(tensor, nn.Parameter)
        memo[id(tensor)] = nn.Parameter(made, requires_grad=tensor.requires_grad) if is_parameter else made
    return copy.deepcopy(model, memo)


def built(blueprint: Blueprint) -> Decoder:
    """A model of tensors whose bytes the ledger in force counts."""
    if isinstance(blueprint, Architecture):
        return Decoder(blueprint)
    return _copy(blueprint, lambda tensor: torch.empty(tensor.shape, dtype=tensor.dtype)).train()


class Ledger(TorchDispatchMode):
    """Adds up the bytes of all tensors alive while it is on; `peak` is the most there were at once."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: weakref.WeakSet[torch.UntypedStorage] = weakref.WeakSet()

    def __torch_dispatch__(self, func: Callable, types: Any, args: Any = (), kwargs: Any = None) -> Any:
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


def training_bytes(
    blueprint: Blueprint,
    settings: TrainSettings,
    rows: int,
    length: int,
    device: Device,
    recompute_every: int = 0,
) -> int:
    """The most that a step needs at once: weights, gradients, the optimizer's state and what the backward pass keeps.

    `rows` of `length` tokens are one micro-batch. Of a plain loss over every token, with `recompute_every` n-th block
    computed a second time.
    """
    with FakeTensorMode(), Ledger() as ledger:
        decoder = built(blueprint)
        decoder.recompute_every = recompute_every
        optimizers = _optimizers_of(decoder, settings, device)
        ids = torch.zeros(rows, length, dtype=torch.long)
        for parameter in trained(decoder).values():
            parameter.grad = torch.empty_like(parameter)
        _update(optimizers)  # so that their state is there, as in every step but the first
        with device.autocast():
            hidden = decoder(ids).flatten(0, 1)
            loss = linear_cross_entropy(hidden, decoder.head_weight, ids.flatten(), decoder.architecture.logit_cap)
        del hidden
        loss.backward()
        _update(optimizers)
    return ledger.peak


def state_bytes(blueprint: Blueprint, settings: TrainSettings, device: Device) -> int:
    """What stays between two steps: weights and the optimizer's state."""
    with FakeTensorMode(), Ledger() as ledger:
        decoder = built(blueprint)
        optimizers = _optimizers_of(decoder, settings, device)
        for parameter in trained(decoder).values():
            parameter.grad = torch.empty_like(parameter)
        _update(optimizers)
        return ledger.now


def frozen_bytes(blueprint: Blueprint) -> int:
    """Of weights that are not trained, and go into no checkpoint of a run that trains others."""
    if isinstance(blueprint, Architecture):
        return 0
    frozen = (p for p in blueprint.parameters() if not p.requires_grad)
    return sum(tensor.nbytes for tensor in itertools.chain(frozen, blueprint.buffers()))


def _optimizers_of(decoder: Decoder, settings: TrainSettings, device: Device) -> list[torch.optim.Optimizer]:
    """The optimizers of a decoder whose tensors have no content, its weights in their type."""
    to_weight_dtype(decoder, device)
    if settings.optimizer == "adamw_8bit":  # bitsandbytes' runs on real tensors alone
        return [_MomentsOf8Bits(trained(decoder).values(), {})]
    return make_optimizers(decoder, settings, device)


class _MomentsOf8Bits(torch.optim.Optimizer):
    """Takes the memory that bitsandbytes' AdamW takes: two bytes a parameter, and two numbers a block of 256."""

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
    """The most that reading `rows` prompts of `length` tokens needs at once: weights, cache and what passes through."""
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
