"""Many processes, one update: who they are to each other, and how they share a model, numbers and files.

Every process reads its own rows of a step. With `ddp` each holds the whole model and the gradients are summed over
processes once a step (Li et al. 2020, arXiv:2006.15704); with `fsdp` each holds a share of every weight, gradient and
moment, and gathers a block's weights when it comes to that block (Zhao et al. 2023, arXiv:2304.11277). Losses are sums,
divided by the trained tokens of the step on all ranks, so that an update is that of one process. The first process
alone writes files and speaks.
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
    """The processes of a run. One by itself is a group too, in which there is nothing to share or to wait for."""

    def __init__(self, ranks: Ranks, patient: dist.ProcessGroup | None = None) -> None:
        """`patient` is the same processes with a timeout that no preparation of data reaches."""
        self.rank, self.world, self._patient = ranks.rank, ranks.world, patient
        self._replica: DistributedDataParallel | None = None
        self._shards: list[Any] = []  # with fsdp the blocks and the model itself, each of which gathers its weights

    @property
    def is_main(self) -> bool:
        """Whether this is the process that writes files and speaks."""
        return self.rank == 0

    def share(self, model: Decoder, parallel: Parallel, device: torch.device) -> None:
        """Make `model`, which is the same on every rank and on its device, one that all ranks train together.

        Its parameters keep their names. With `fsdp` they become shares, so that optimizers are to be made afterwards.
        """
        if self.world == 1:
            return
        if parallel == "fsdp":
            self._shards = _sharded(model, self.world, device)
        else:
            where = [device] if device.type == "cuda" else None
            with warnings.catch_warnings():  # the name that torch 2.13 wants instead is not known to 2.11
                warnings.simplefilter("ignore", FutureWarning)
                self._replica = _Replica(model, device_ids=where, broadcast_buffers=False, gradient_as_bucket_view=True)

    def prepared(self, model: Decoder, is_last: bool) -> Decoder:
        """What to call in place of `model` for a micro-batch. Ranks exchange gradients in the step's last one alone."""
        if self._replica is not None:
            self._replica.require_backward_grad_sync = is_last
            return cast(Decoder, self._replica)
        for shard in self._shards:
            shard.set_requires_gradient_sync(is_last, recurse=False)
        return model

    @contextlib.contextmanager
    def whole(self, model: Decoder) -> Iterator[None]:
        """Within, every rank holds all weights and can run the model by itself. All ranks must enter together."""
        for shard in self._shards:
            shard.set_reshard_after_forward(False, recurse=False)
            shard.unshard()
        yield
        for shard in self._shards:
            shard.reshard()
            shard.set_reshard_after_forward(shard is not model, recurse=False)

    def gather(self, *numbers: float) -> list[list[float]]:
        """Each of the numbers from all ranks, in their order: one list a number."""
        if self.world == 1:
            return [[number] for number in numbers]
        mine = torch.tensor(numbers, dtype=torch.float64)
        everyone = [torch.empty_like(mine) for _ in range(self.world)]
        dist.all_gather(everyone, mine)
        return torch.stack(everyone).T.tolist()  # [numbers][world]

    def sum(self, *numbers: float) -> list[float]:
        """The sums over all ranks, the same to the last bit on each."""
        return [sum(everyone) for everyone in self.gather(*numbers)]

    def collect(self, thing: T) -> list[T]:
        """Something of each rank, in their order, on all of them."""
        if self.world == 1:
            return [thing]
        things: list[Any] = [None] * self.world
        dist.all_gather_object(things, thing, group=self._patient)
        return things

    def any(self, is_so: bool) -> bool:
        """Whether it is so on any rank: the same answer on all of them."""
        return any(self.gather(is_so)[0])

    def from_main(self, value: T) -> T:
        """The value that the first rank gives, on every rank, however long it takes to come. It must be JSON-like."""
        if self.world == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0, group=self._patient)
        return box[0]


ALONE = Group(Ranks())


class _Replica(DistributedDataParallel):
    """A model that sums its gradients over ranks as they arise, and otherwise looks like the one inside."""

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.module, name)


@contextlib.contextmanager
def join(device: Device, timeout_seconds: float) -> Iterator[Group]:
    """Meet the other processes that `torchrun` started; alone, this does nothing.

    A rank that hears nothing of another for `timeout_seconds` in the middle of a step gives up. Raises `UserError`
    where another process has failed or cannot be reached, so that none waits for it forever.
    """
    ranks = device.ranks
    if ranks.world == 1:
        yield ALONE
        return
    if device.torch_device.type == "cuda":
        torch.cuda.set_device(device.torch_device)
    # Numbers of Python go over gloo also where gradients go over NCCL: no need to wait for the accelerator.
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
    """Leave this rank its share of every parameter; returns what gathers them: blocks, and the model for the rest."""
    from torch.distributed.device_mesh import init_device_mesh  # here, since importing it takes a second
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    mesh = init_device_mesh(device.type, (world,))
    # Weights are gathered as they are and cast by autocast, as in one process; gradients are summed in float32.
    policy = MixedPrecisionPolicy(reduce_dtype=torch.float32, cast_forward_inputs=False)
    for block in model.blocks:
        fully_shard(block, mesh=mesh, mp_policy=policy)
    # What is outside the blocks stays gathered until the backward pass: the loss needs the head.
    fully_shard(model, mesh=mesh, mp_policy=policy, reshard_after_forward=False)
    return [*model.blocks, model]


def is_share(tensor: Tensor) -> bool:
    """Whether this rank holds only a part of it: a `DTensor`, told without its class, whose import takes a second."""
    return hasattr(tensor, "full_tensor")


def whole(tensor: Tensor) -> Tensor:
    """A tensor as it is, or all of one of which this rank holds a share. All ranks must ask together."""
    return cast(Any, tensor).full_tensor() if is_share(tensor) else tensor


def own_share(tensor: Tensor) -> Tensor:
    """A tensor as it is, or the part of it that this rank holds."""
    return cast(Any, tensor).to_local() if is_share(tensor) else tensor


def on_main(tensors: Mapping[str, Tensor], group: Group) -> dict[str, Tensor]:
    """Copies of all of `tensors` in the first rank's CPU memory; nothing on the others. All ranks must ask together.

    Shares are gathered one by one: no device holds more than one whole tensor at a time.
    """
    copies = {}
    for name, tensor in tensors.items():
        full = whole(tensor)
        if group.is_main:
            copies[name] = full.detach().to("cpu", copy=True).contiguous()
    return copies


def share_like(full: Tensor, like: Tensor) -> Tensor:
    """This rank's share of a tensor that every rank holds whole, placed as `like`'s; as it is where `like` is whole."""
    if not is_share(like) or full.shape != like.shape:
        return full
    from torch.distributed.tensor import distribute_tensor

    mesh, placements = cast(Any, like).device_mesh, cast(Any, like).placements
    return distribute_tensor(full.to(like.device), mesh, placements, src_data_rank=None)
