"""Peak memory of a run: its models and passes, run on meta tensors.

`slm plan`, `slm inspect`, a run's `plan.json` and `micro_batch_tokens: auto` use it.
"""

from __future__ import annotations

import copy
import itertools
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from slmkit.data.batch import Batch
from slmkit.device import Device
from slmkit.model.architectures import Architecture
from slmkit.model.decoder import Decoder
from slmkit.model.sizes import LOGITS_AT_ONCE
from slmkit.training.distributed import ALONE, Group, is_share
from slmkit.training.losses import token_log_probabilities
from slmkit.training.objective import Objective, next_token
from slmkit.training.optimizers.choose import make_optimizers, trained
from slmkit.training.precision import to_weight_dtype
from slmkit.training.recipe.recipe import TrainSettings

VALIDATION_ROWS = 8  # rows per validation batch

Reading = Callable[[Decoder, Decoder | None, int], object]  # the model, the teacher or reference model, tokens per row


def meta_model_of(model: Decoder) -> Decoder:
    """A copy of the model on the meta device, with the same frozen parameters."""
    return _copy(model, lambda tensor: tensor.detach().to("meta"))


def zeros_like(model: Decoder, device: torch.device | str = "cpu") -> Decoder:
    """A copy of a meta model on `device`, all zeros, in training mode."""
    return _copy(model, lambda tensor: torch.zeros(tensor.shape, dtype=tensor.dtype, device=device)).train()


def tensors_of(model: nn.Module) -> Iterator[Tensor]:
    """All parameters and buffers, in any shapes."""
    return itertools.chain(model.parameters(), model.buffers())


def _copy(model: Decoder, make: Callable[[Tensor], Tensor]) -> Decoder:
    """A copy of a model with each tensor replaced by `make(tensor)`."""
    memo: dict[int, Any] = {}
    for tensor in tensors_of(model):
        made = make(tensor)
        is_parameter = isinstance(tensor, nn.Parameter)
        memo[id(tensor)] = nn.Parameter(made, requires_grad=tensor.requires_grad) if is_parameter else made
    return copy.deepcopy(model, memo)


# -- forward passes between two steps ---------------------------------------------------------------------------------


def read_text(model: Decoder, frozen: Decoder | None, length: int) -> None:
    """Forward pass of a validation batch, with as many logits as are held at once."""
    ids = torch.zeros(VALIDATION_ROWS, length, dtype=torch.long)
    hidden, labels = model(ids).flatten(0, 1), ids.flatten()[:LOGITS_AT_ONCE]
    nn.functional.cross_entropy(model.logits(hidden[:LOGITS_AT_ONCE]).float(), labels, reduction="sum")


def read_answers(model: Decoder, rows: int, length: int) -> None:
    """Log-probabilities of `rows` rows, with chunked logits."""
    ids = torch.zeros(rows, length, dtype=torch.long)
    token_log_probabilities(model(ids).flatten(0, 1), model.head_weight, ids.flatten(), model.architecture.logit_cap)


def write_answers(model: Decoder, prompts: int, count: int, length: int, new: int) -> None:
    """Generation for a batch of prompts of `length` tokens: `count` answers of `new` tokens to each, in the type of
    the weights.
    """
    with torch.autocast("cpu", enabled=False):
        cache = model.new_cache(prompts * count, length + new)
        model(torch.zeros(1, min(length, cache.at_once), dtype=torch.long), cache[:1])
        cache.lengths[:] = length
        model.logits(model(torch.zeros(prompts * count, 1, dtype=torch.long), cache)[:, -1])


# -- the models and passes of an objective ----------------------------------------------------------------------------


@dataclass(frozen=True)
class MemoryProfile:
    """The trained model, the frozen model in memory, and the passes through both. Both are on the meta device.

    `frozen` is a teacher or a reference model. `objective` makes a step's objective from it; `extra(rows, length)`
    gives the extra tensors required by the objective. `readings` are the forward passes between two steps. `longest` is
    the longest row in tokens, if rows are padded.
    """

    model: Decoder
    frozen: Decoder | None = None
    objective: Callable[[Decoder | None], Objective] = lambda frozen: next_token
    extra: Callable[[int, int], Mapping[str, Tensor]] = lambda rows, length: {}
    readings: tuple[Reading, ...] = (read_text,)
    longest: int | None = None

    def built(self, device: torch.device | str = "cpu") -> tuple[Decoder, Decoder | None]:
        """The trained model, and the teacher or reference model: all zeros."""
        frozen = None if self.frozen is None else zeros_like(self.frozen, device).eval().requires_grad_(False)
        return zeros_like(self.model, device), frozen

    def batch(self, rows: int, length: int) -> Batch:
        """A batch in which every token is learned: [rows, length]."""
        ids = torch.zeros(rows, length, dtype=torch.long)
        return Batch(ids, ids, rows * length, extra=self.extra(rows, length))

    def used(self, length: int) -> int:
        """Positions computed at most for a row of `length` tokens."""
        return min(length, self.longest or length)


# -- bytes ------------------------------------------------------------------------------------------------------------


class AllocationTracker(TorchDispatchMode):
    """Adds up the bytes of all live tensors while active; `peak` is the maximum. `exchanged` counts the bytes that
    collective operations of processes hand out, by operation.

    Boolean masks count as all True, since meta tensors have no values.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.exchanged: Counter[str] = Counter()
        self._sizes: weakref.WeakKeyDictionary[torch.UntypedStorage, list[int]] = weakref.WeakKeyDictionary()

    def __enter__(self) -> Self:
        resize = self._resize = torch.UntypedStorage.resize_

        def noted(storage: torch.UntypedStorage, size: int) -> torch.UntypedStorage:  # how FSDP frees gathered weights
            self._change(storage, size)
            return resize(storage, size)

        torch.UntypedStorage.resize_ = noted  # type: ignore[method-assign]
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        torch.UntypedStorage.resize_ = self._resize  # type: ignore[method-assign]
        super().__exit__(*error)

    def __torch_dispatch__(self, func: Callable, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(map(is_share, types)):  # the same operation on this process's part follows
            return NotImplemented
        indices = args[1] if func is torch.ops.aten.index.Tensor else []
        if len(indices) == 1 and indices[0] is not None and indices[0].dtype == torch.bool:
            result = args[0].flatten(0, indices[0].dim() - 1).clone()
        else:
            result = func(*args, **(kwargs or {}))
        if func.namespace == "c10d":
            self.exchanged[func._opname] += sum(tensor.nbytes for tensor in tree_leaves(args[0]))
        tree_map_only(Tensor, self._note, result)
        return result

    def _note(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()  # views share it
        if storage not in self._sizes:
            self._sizes[storage] = size = [0]
            weakref.finalize(storage, self._gone, size)
            self._change(storage, storage.nbytes())

    def _change(self, storage: torch.UntypedStorage, size: int) -> None:
        if storage in self._sizes:
            self.now += size - self._sizes[storage][0]
            self._sizes[storage][0] = size
            self.peak = max(self.peak, self.now)

    def _gone(self, size: list[int]) -> None:
        self.now -= size[0]


def training_bytes(profile: MemoryProfile, settings: TrainSettings, rows: int, length: int, device: Device) -> int:
    """Peak bytes of a step: weights, gradients, optimizer state, activations kept for the backward pass, and the
    teacher or reference model. One micro-batch is `rows` of `length` tokens, all learned.
    """
    with FakeTensorMode(), AllocationTracker() as tracker:
        run_step(profile, settings, rows, length, device, torch.device("cpu"))
    return tracker.peak


def run_step(
    profile: MemoryProfile, settings: TrainSettings, rows: int, length: int, device: Device, where: torch.device
) -> None:
    """A training step of the profile's models, of at most two micro-batches of zeros, in the types of `device`."""
    decoder, frozen = profile.built(where)
    optimizers = optimizers_after_a_step(decoder, settings, device)
    objective, batch = profile.objective(frozen), profile.batch(rows, length).to(where)
    parts = 2 if rows < settings.rows_per_step(length) else 1  # later micro-batches find gradients in memory
    step_of(decoder, optimizers, objective, batch, settings, device, micro_batches=parts)


def step_of(
    decoder: Decoder, optimizers: list[torch.optim.Optimizer], objective: Objective, batch: Batch,
    settings: TrainSettings, device: Device, group: Group = ALONE, micro_batches: int = 1,
) -> None:  # fmt: skip
    """Gradients of equal micro-batches, and the update."""
    decoder.recompute_every = settings.gradient_checkpointing
    for number in range(micro_batches):
        model = group.prepared(decoder, is_last=number == micro_batches - 1)
        with device.autocast():
            loss = objective(model, batch).total
        loss.backward()
        del loss
    for optimizer in optimizers:
        optimizer.step()


def state_bytes(profile: MemoryProfile, settings: TrainSettings, device: Device) -> int:
    """Bytes held between two steps: weights, optimizer state, and the teacher or reference model."""
    with FakeTensorMode(), AllocationTracker() as tracker:
        models = profile.built()
        optimizers = optimizers_after_a_step(models[0], settings, device)
        held = tracker.now
        del models, optimizers
    return held


def weights_bytes(profile: MemoryProfile) -> int:
    """Bytes of all models before the first step."""
    with FakeTensorMode():
        return sum(tensor.nbytes for model in profile.built() if model is not None for tensor in tensors_of(model))


def checkpoint_bytes(profile: MemoryProfile, settings: TrainSettings, device: Device) -> int:
    """Bytes of a checkpoint: trained weights and optimizer state, without frozen weights."""
    not_saved = [tensor for tensor in tensors_of(profile.model) if not tensor.requires_grad]
    if profile.frozen is not None:
        not_saved += tensors_of(profile.frozen)
    return state_bytes(profile, settings, device) - sum(tensor.nbytes for tensor in not_saved)


def reading_peaks(profile: MemoryProfile, length: int, device: Device) -> list[int]:
    """Peak bytes that each forward pass between two steps adds to those held already."""
    peaks = []
    for read in profile.readings:
        with FakeTensorMode(), torch.no_grad(), AllocationTracker() as tracker:
            decoder, frozen = profile.built()
            weights = tracker.now
            with device.autocast():
                read(decoder.eval(), frozen, length)
        peaks.append(tracker.peak - weights)
    return peaks


def optimizers_after_a_step(decoder: Decoder, settings: TrainSettings, device: Device) -> list[torch.optim.Optimizer]:
    """The optimizers of a meta decoder, with the state that all steps but the first have; weights in their training
    type.
    """
    to_weight_dtype(decoder, device)
    parameters = trained(decoder).values()
    if settings.optimizer == "adamw_8bit":  # bitsandbytes' needs real tensors
        optimizers: list[torch.optim.Optimizer] = [_MomentsOf8Bits(parameters, {})]
    else:
        optimizers = make_optimizers(decoder, settings, device)
    for parameter in parameters:
        parameter.grad = torch.empty_like(parameter)
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return optimizers


class _MomentsOf8Bits(torch.optim.Optimizer):
    """Takes as much memory as bitsandbytes' AdamW: two bytes per parameter, and two numbers per block of 256."""

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for p in self.param_groups[0]["params"]:
            if not self.state[p]:
                blocks = p.new_empty(2, -(-p.numel() // 256), dtype=torch.float32)
                self.state[p] = {"moments": p.new_empty(2, *p.shape, dtype=torch.uint8), "blocks": blocks}


def reading_bytes(architecture: Architecture, rows: int, length: int, dtype: torch.dtype) -> int:
    """Peak bytes of reading `rows` prompts of `length` tokens one after the other: weights, KV cache, activations."""
    with torch.device("meta"):
        decoder = Decoder(architecture).to(dtype)
    with FakeTensorMode(), torch.no_grad(), AllocationTracker() as tracker:
        model = zeros_like(decoder).eval()
        cache = model.new_cache(rows, length)
        hidden = model(torch.zeros(1, min(length, cache.at_once), dtype=torch.long), cache[:1])[:, -1]
        model.logits(hidden.expand(rows, -1))
    return tracker.peak
