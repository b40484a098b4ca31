"""Forecast of a step with FSDP on many GPUs, by calculation: products, communication, memory, checkpoints.

Memory is that of the code that trains: rank 0's step runs on fake tensors, in a group of processes that do not exist.
Seconds follow from published rates of the hardware, which nothing here measures.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from slmkit.config import UserError
from slmkit.device import PRECISIONS, Device, Ranks
from slmkit.training.distributed import Group
from slmkit.training.estimate.memory import (
    AllocationTracker,
    MemoryProfile,
    checkpoint_bytes,
    meta_model_of,
    optimizers_after_a_step,
    step_of,
)
from slmkit.training.logging.logger import StepFlops
from slmkit.training.recipe.recipe import TrainSettings


class Gpu(NamedTuple):
    """Rates of one GPU in nodes of eight: FLOP/s of dense bfloat16 products, bytes, and bytes/s one way."""

    peak: float  # this and the next two are the datasheet's
    memory: float
    bandwidth: float
    link: float  # bus bandwidth that NCCL reaches over NVLink
    network: float  # that NCCL reaches over the GPU's own adapter, of 400 Gb/s, or 200 Gb/s beside an A100


GPUS = {
    "a100": Gpu(312e12, 80e9, 2.04e12, link=240e9, network=23e9),
    "h100": Gpu(989e12, 80e9, 3.35e12, link=370e9, network=46e9),
    "h200": Gpu(989e12, 141e9, 4.8e12, link=370e9, network=46e9),
}
NODE = 8  # GPUs
EFFICIENCY = 0.45  # share of `peak` in a step's products: 42 to 50 % are published for about 1.3 B parameters on H100s
# Ring collectives as NCCL itself foretells them (its tuning.cc), with its protocols Simple and LL128, of which it takes
# the faster: seconds of a start, of a hop over NVLink and over the network, and the share of the bandwidth.
PROTOCOLS = ((8.4e-6, 3.4e-6, 14e-6, 1.0), (14e-6, 1.9e-6, 4e-6, 0.92))
# All ranks agree on numbers in each step (weights of the loss, its sum, whether to stop) by a ring of TCP connections:
# the rounds of a step, and the seconds of a hop.
AGREEMENTS, TCP_HOP = 3, 30e-6
RESERVED = 3e9  # bytes for CUDA, NCCL's buffers, and the chunk of logits, which is larger than a CPU's
UPDATE_BYTES = 28  # that AdamW reads and writes for each number of its share: float32 weight, gradient and two moments
TO_HOST, TO_DISK = 10e9, 1e9  # bytes/s of copying to rank 0's memory, and of writing to a shared file system
FILLED = 0.9  # share of a GPU's memory that `micro_batch_tokens: auto` fills
FP32 = 4  # bytes


@dataclass(frozen=True)
class ClusterEstimate:
    """A step on all GPUs, in seconds; bytes are those of one GPU."""

    gpus: int
    rows: int  # of a GPU's micro-batch
    micro_batches: int
    tokens: int  # on all GPUs
    gathered_bytes: int  # of weights
    reduced_bytes: int  # of gradients
    products: float
    communication: float  # of collectives alone
    waiting: float  # for them: the part that no product hides
    update: float
    agreement: float  # of numbers between hosts
    memory_bytes: int
    checkpoint_bytes: int  # of all GPUs together
    checkpoint_seconds: tuple[float, float]  # in which the run waits; of writing in the background
    model_flops: float  # of a token; recomputed layers count once
    peak: float  # FLOP/s of a GPU by its datasheet

    @property
    def step_seconds(self) -> float:
        return self.products + self.waiting + self.update + self.agreement

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.step_seconds

    @property
    def mfu(self) -> float:
        return self.model_flops * self.tokens_per_second / self.gpus / self.peak


def ring_seconds(size: float, gpus: int, gpu: Gpu) -> float:
    """Seconds of an all-gather, or of a reduce-scatter, of `size` bytes on all GPUs together.

    A GPU receives all but its own share over NVLink, a node all but its own over its adapters; both at the same time.
    """
    nodes = -(-gpus // NODE)
    within, between = (gpus - 1) / gpus / gpu.link, (nodes - 1) / nodes / (min(NODE, gpus) * gpu.network)
    return min(
        start + (gpus - nodes) * hop + (nodes - 1) * far_hop + size * max(within, between) / share
        for start, hop, far_hop, share in PROTOCOLS
    )


def padded_numbers(module: nn.Module, gpus: int) -> int:
    """Numbers in a module's parameters as FSDP gathers them: each first axis is filled up to a multiple of `gpus`."""
    return sum(-(-len(p) // gpus) * gpus * p.numel() // len(p) for p in module.parameters())


def step_of_a_rank(
    profile: MemoryProfile, settings: TrainSettings, rows: int, length: int, device: Device, gpus: int, parts: int = 1
) -> tuple[int, Counter[str]]:
    """Peak bytes of a rank in a step of `parts` micro-batches, and the bytes that its collectives hand out."""
    dist.init_process_group("fake", rank=0, world_size=gpus)
    try:
        decoder, group = meta_model_of(profile.model), Group(Ranks(0, 0, gpus))
        group.share(decoder, "fsdp", torch.device("cpu"))
        with FakeTensorMode(allow_non_fake_inputs=True), AllocationTracker() as tracker:
            decoder.to_empty(device="cpu").train()
            optimizers = optimizers_after_a_step(decoder, settings, device)
            objective, batch = profile.objective(profile.built()[1]), profile.batch(rows, length)
            tracker.peak = tracker.now  # until now DTensor tried its operations on whole tensors that hold nothing
            step_of(decoder, optimizers, objective, batch, settings, device, group, parts)
    finally:
        dist.destroy_process_group()
    return tracker.peak, tracker.exchanged


def rows_and_memory(
    profile: MemoryProfile, settings: TrainSettings, rows: int, length: int, device: Device, gpus: int, gpu: Gpu
) -> tuple[int, int]:
    """How many of the `rows` of a GPU go into a micro-batch, and its peak bytes. `micro_batch_tokens: auto` takes all,
    or half of them, and so on, until they fit.
    """

    def memory(at_once: int) -> int:
        parts = 2 if at_once < rows else 1  # whole gradients are held between micro-batches
        return int(RESERVED) + step_of_a_rank(profile, settings, at_once, length, device, gpus, parts)[0]

    at_once = min(rows, settings.rows_per_micro_batch(length))
    needed = memory(at_once)
    while settings.micro_batch_tokens == "auto" and needed > FILLED * gpu.memory and at_once > 1:
        at_once = -(-at_once // 2)
        needed = memory(at_once)
    return at_once, needed


def forecast_on_gpus(profile: MemoryProfile, settings: TrainSettings, gpus: int, name: str) -> ClusterEstimate:
    """The forecast of a step on `gpus` GPUs called `name`.

    Raises `UserError` for an unknown GPU, and for more GPUs than a step has rows.
    """
    if name not in GPUS:
        raise UserError(f"unknown GPU {name!r}; known: {', '.join(GPUS)}")
    gpu, model = GPUS[name], profile.model
    precision = "bfloat16" if settings.precision == "auto" else settings.precision
    device = Device(torch.device("cpu"), *PRECISIONS[precision], keeps_master=precision == "bfloat16-master")
    length = settings.sequence_length or model.architecture.max_positions
    step_rows = settings.rows_per_step(length)
    if step_rows < gpus:
        raise UserError(f"a step has {step_rows} rows for {gpus} GPUs: raise train.tokens_per_step")
    rows, memory = rows_and_memory(profile, settings, -(-step_rows // gpus), length, device, gpus, gpu)
    micro_batches, tokens, depth = -(-step_rows // (gpus * rows)), rows * length, len(model.blocks)

    # Seconds of a block's products, forward and backward, and of the head's, in a micro-batch.
    flops = StepFlops(model, length)
    rate = EFFICIENCY * gpu.peak / tokens
    forward = (flops.of_step(1, 1) / 3 - flops.head) / depth / rate
    backward = (2 + (1 / settings.gradient_checkpointing if settings.gradient_checkpointing else 0)) * forward
    products = micro_batches * (depth * (forward + backward) + 3 * flops.head / rate)

    # While a block runs, the next one's weights are gathered, forward and again backward; in the last micro-batch its
    # gradients are reduced meanwhile. Nothing hides what is gathered first, nor the embedding's gradient at the end.
    block = padded_numbers(model.blocks[0], gpus)
    rest = padded_numbers(model, gpus) - depth * block
    size = device.weight_dtype.itemsize
    gather, gather_rest = (ring_seconds(size * numbers, gpus, gpu) for numbers in (block, rest))
    reduce, reduce_rest = (ring_seconds(FP32 * numbers, gpus, gpu) for numbers in (block, rest))
    hidden = [max(0.0, gather - forward) + max(0.0, gather + sums - backward) for sums in (0.0, reduce)]
    waiting = micro_batches * (gather_rest + gather + depth * hidden[0]) + depth * (hidden[1] - hidden[0]) + reduce_rest

    checkpoint = checkpoint_bytes(profile, settings, device)
    gathering = sum(3 * ring_seconds(FP32 * p.numel(), gpus, gpu) for p in model.parameters())
    return ClusterEstimate(
        gpus=gpus,
        rows=rows,
        micro_batches=micro_batches,
        tokens=step_rows * length,
        gathered_bytes=micro_batches * size * (2 * depth * block + rest),
        reduced_bytes=FP32 * (depth * block + rest),
        products=products,
        communication=micro_batches * (2 * depth * gather + gather_rest) + depth * reduce + reduce_rest,
        waiting=waiting,
        update=UPDATE_BYTES * padded_numbers(model, gpus) / gpus / gpu.bandwidth,
        agreement=AGREEMENTS * (gpus - 1) * TCP_HOP,
        memory_bytes=memory,
        checkpoint_bytes=checkpoint,
        checkpoint_seconds=(gathering + checkpoint / TO_HOST, checkpoint / TO_DISK),
        model_flops=flops.of_step(1, 1),
        peak=gpu.peak,
    )
