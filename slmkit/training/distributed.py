"""Distributed training: process groups, DDP and FSDP, gathering and broadcasting of values.

Every process reads its own rows of a step. With `ddp` each holds the whole model and gradients are summed over
processes once a step (Li et al. 2020, arXiv:2006.15704); with `fsdp` each holds a shard of every weight, gradient and
moment, and a block's weights are gathered when that block runs (Zhao et al. 2023, arXiv:2304.11277). Losses are sums,
divided by the trained tokens of the step on all ranks, so that an update equals that of one process. Only rank 0
writes files and prints.
"""

from __future__ import annotations

import contextlib
import datetime
import warnings
from collections.abc import Iterator, Mapping
from typing import Any, Literal, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from slmkit.config import UserError
from slmkit.device import Device, Ranks
from slmkit.model.decoder import Decoder

Parallel = Literal["auto", "ddp", "fsdp"]
T = TypeVar("T")
PREPARATION = datetime.timedelta(days=30)  # how long the others wait for the first process to prepare data


class Group:
    """The processes of a run. A group of one process needs no communication."""

    def __init__(self, ranks: Ranks, patient: dist.ProcessGroup | None = None) -> None:
        """`patient` is the same processes with a timeout long enough for data preparation."""
        self.rank, self.world, self._patient = ranks.rank, ranks.world, patient
        self._replica: DistributedDataParallel | None = None
        self._shards: list[Any] = []  # with fsdp: the modules that gather their weights, each block and the model

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, which writes files and prints."""
        return self.rank == 0

    def share(self, model: Decoder, parallel: Parallel, device: torch.device) -> None:
        """Wrap `model` for training on all ranks; it must be the same on every rank, and on its device.

        Parameters keep their names. With `fsdp` they become shards: make the optimizers afterwards.
        """
        if self.world == 1:
            return
        if parallel == "fsdp":
            self._shards = _sharded(model, self.world, device)
        else:
            where = [device] if device.type == "cuda" else None
            with warnings.catch_warnings():  # torch 2.11 lacks the name that torch 2.13 recommends
                warnings.simplefilter("ignore", FutureWarning)
                self._replica = _Replica(model, device_ids=where, broadcast_buffers=False, gradient_as_bucket_view=True)

    def prepared(self, model: Decoder, is_last: bool) -> Decoder:
        """The module to call for a micro-batch. Ranks exchange gradients in the step's last micro-batch only."""
        if self._replica is not None:
            self._replica.require_backward_grad_sync = is_last
            return cast(Decoder, self._replica)
        for shard in self._shards:
            shard.set_requires_gradient_sync(is_last, recurse=False)
        return model

    @contextlib.contextmanager
    def whole(self, model: Decoder) -> Iterator[None]:
        """Context manager in which every rank holds all weights and can run the model alone. All ranks enter it."""
        for shard in self._shards:
            shard.set_reshard_after_forward(False, recurse=False)
            shard.unshard()
        yield
        for shard in self._shards:
            shard.reshard()
            shard.set_reshard_after_forward(shard is not model, recurse=False)

    def gather(self, *numbers: float) -> list[list[float]]:
        """Gathers each number from all ranks, in rank order: one list per number."""
        if self.world == 1:
            return [[number] for number in numbers]
        mine = torch.tensor(numbers, dtype=torch.float64)
        everyone = [torch.empty_like(mine) for _ in range(self.world)]
        dist.all_gather(everyone, mine)
        return torch.stack(everyone).T.tolist()  # [numbers][world]

    def sum(self, *numbers: float) -> list[float]:
        """Sums over all ranks, bit-identical on each."""
        return [sum(everyone) for everyone in self.gather(*numbers)]

    def collect(self, thing: T) -> list[T]:
        """Gathers one object from each rank, in rank order, on all ranks, without the timeout of a step."""
        if self.world == 1:
            return [thing]
        things: list[Any] = [None] * self.world
        dist.all_gather_object(things, thing, group=self._patient)
        return things

    def any(self, is_so: bool) -> bool:
        """Whether the condition holds on any rank: the same answer on all."""
        return any(self.gather(is_so)[0])

    def from_main(self, value: T) -> T:
        """Rank 0's JSON-like value on every rank, without the timeout of a step."""
        return self.collect(value)[0]


ALONE = Group(Ranks())


class _Replica(DistributedDataParallel):
    """DDP wrapper that passes attribute access on to the wrapped model."""

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.module, name)


@contextlib.contextmanager
def join(device: Device, timeout_seconds: float) -> Iterator[Group]:
    """Joins the processes that `torchrun` started; a single process needs no group.

    Communication in a step times out after `timeout_seconds`. Raises `UserError` where another process has failed or
    cannot be reached.
    """
    ranks = device.ranks
    if ranks.world == 1:
        yield ALONE
        return
    if device.torch_device.type == "cuda":
        torch.cuda.set_device(device.torch_device)
    # Python numbers go over gloo even where gradients go over NCCL: no synchronisation with the accelerator.
    backend = "cpu:gloo,cuda:nccl" if device.torch_device.type == "cuda" else "gloo"
    try:
        dist.init_process_group(backend, timeout=datetime.timedelta(seconds=timeout_seconds))
        yield Group(ranks, dist.new_group(backend="gloo", timeout=PREPARATION))
    except RuntimeError as error:
        if not _is_about_peers(error):
            raise
        raise UserError(
            f"lost the other processes ({' '.join(str(error).split())[:200]}); "
            "the one that failed says why, or its host is not reached (train.ddp_timeout says how long to wait)"
        ) from error
    dist.destroy_process_group()


def _is_about_peers(error: RuntimeError) -> bool:
    return isinstance(error, dist.DistError) or any(word in str(error) for word in ("gloo", "NCCL", "ProcessGroup"))


def _sharded(model: Decoder, world: int, device: torch.device) -> list[Any]:
    """Shards all parameters over ranks. Returns the modules that gather them: blocks, and the model for the rest."""
    from torch.distributed.device_mesh import init_device_mesh  # here, since importing it takes a second
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    mesh = init_device_mesh(device.type, (world,))
    # Weights are gathered in their own type and cast by autocast, as in one process; gradients are summed in float32.
    policy = MixedPrecisionPolicy(reduce_dtype=torch.float32, cast_forward_inputs=False)
    for block in model.blocks:
        fully_shard(block, mesh=mesh, mp_policy=policy)
    # Parameters outside the blocks stay gathered until the backward pass: the loss needs the head.
    fully_shard(model, mesh=mesh, mp_policy=policy, reshard_after_forward=False)
    return [*model.blocks, model]


def is_share(tensor: Tensor) -> bool:
    """Whether `tensor` [...] is a shard (`DTensor`); tested without importing the class, which takes a second."""
    return hasattr(tensor, "full_tensor")


def whole(tensor: Tensor) -> Tensor:
    """The full tensor [...]: a shard is gathered, a plain tensor returned unchanged. All ranks must call it."""
    return cast(Any, tensor).full_tensor() if is_share(tensor) else tensor


def own_share(tensor: Tensor) -> Tensor:
    """The part of a tensor [...] that this rank holds, split along the first axis; a plain tensor unchanged."""
    return cast(Any, tensor).to_local() if is_share(tensor) else tensor


def on_main(tensors: Mapping[str, Tensor], group: Group) -> dict[str, Tensor]:
    """Copies of all `tensors`, [...] each, in rank 0's CPU memory; empty on other ranks. All ranks must call it.

    Shards are gathered one by one: no device holds more than one full tensor at a time.
    """
    copies = {}
    for name, tensor in tensors.items():
        full = whole(tensor)
        if group.is_main:
            copies[name] = full.detach().to("cpu", copy=True).contiguous()
    return copies


def share_like(full: Tensor, like: Tensor) -> Tensor:
    """This rank's shard of a full tensor [...], placed as `like` [...]; unchanged where `like` is a plain tensor."""
    if not is_share(like) or full.shape != like.shape:
        return full
    from torch.distributed.tensor import distribute_tensor

    mesh, placements = cast(Any, like).device_mesh, cast(Any, like).placements
    return distribute_tensor(full.to(like.device), mesh, placements, src_data_rank=None)
