"""What is calculated for many GPUs is what two and four processes exchange and hold."""

from __future__ import annotations

import ctypes
import sys

import pytest
import torch

from slmkit.config import UserError
from slmkit.data.batch import Batch
from slmkit.device import find_device, peak_memory, reset_peak_memory, resident_memory
from slmkit.model.config import SLMConfig
from slmkit.model.files.directory import empty_decoder
from slmkit.model.initialization import build_decoder
from slmkit.training.distributed import Group, join
from slmkit.training.estimate.cluster import GPUS, RESERVED, ClusterEstimate, forecast_on_gpus, ring_seconds
from slmkit.training.estimate.memory import AllocationTracker, MemoryProfile
from slmkit.training.loop import Plan, State, train_step
from slmkit.training.objective import next_token
from slmkit.training.optimizers.choose import make_optimizers
from slmkit.training.recipe.recipe import TrainSettings
from tests.training.estimate.test_memory import M_MMAP_THRESHOLD, M_TRIM_THRESHOLD
from tests.training.ranks import on_ranks

CPU = find_device("cpu", "float32")
SHAPE = {
    "vocab_size": 4_099, "hidden_size": 512, "num_hidden_layers": 3, "num_attention_heads": 4,
    "max_position_embeddings": 256,
}  # fmt: skip
LENGTH = 256
WITHIN = 0.15  # of the memory


def train(shape: dict, group: Group, micro_batches: int, steps: int) -> AllocationTracker:
    """Real steps with FSDP, of one row a micro-batch on each rank; what the last of them exchanged."""
    settings, config = TrainSettings(), SLMConfig(**shape)
    model = build_decoder(config, seed=1)
    group.share(model, "fsdp", CPU.torch_device)
    state = State(model, make_optimizers(model, settings, CPU))
    ids = torch.randint(config.vocab_size, (micro_batches, LENGTH + 1))
    batch = Batch(ids[:, :-1].contiguous(), ids[:, 1:].contiguous(), micro_batches * LENGTH)
    for _ in range(steps):
        with AllocationTracker() as tracker:
            train_step(state, next_token, batch, Plan(steps, 1, 1.0, lambda step: 1.0, CPU, group=group))
    return tracker


def compare(said: ClusterEstimate) -> None:
    mallopt = ctypes.CDLL("libc.so.6").mallopt
    mallopt(M_MMAP_THRESHOLD, 65536)  # memory goes back to the system as soon as it is freed
    mallopt(M_TRIM_THRESHOLD, 0)
    with join(find_device("cpu", "float32"), 60) as group:
        train(SHAPE | {"hidden_size": 64, "vocab_size": 128}, group, 1, 1)  # what libraries load is none of the model's
        reset_peak_memory(CPU)
        before = resident_memory()
        exchanged = train(SHAPE, group, said.micro_batches, 2).exchanged
        grown = peak_memory(CPU) - before
    assert exchanged["_allgather_base_"] == said.gathered_bytes
    # Each reduce-scatter hands out this rank's part of the sum.
    assert exchanged["_reduce_scatter_base_"] * said.gpus == said.reduced_bytes
    # Figures and the gradients' norm, which are not counted.
    assert 0 < sum(size for name, size in exchanged.items() if "base" not in name) < 2_000
    assert said.memory_bytes - RESERVED == pytest.approx(grown, rel=WITHIN)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize(("world", "micro_batches"), [(2, 2), (4, 1)])
def test_processes_exchange_and_hold_what_was_calculated(world: int, micro_batches: int) -> None:
    settings = TrainSettings(
        sequence_length=LENGTH, tokens_per_step=world * micro_batches * LENGTH, micro_batch_tokens=LENGTH,
        precision="float32",
    )  # fmt: skip
    said = forecast_on_gpus(MemoryProfile(empty_decoder(SLMConfig(**SHAPE))), settings, world, "h100")
    assert said.micro_batches == micro_batches
    on_ranks(world, compare, said)


def test_a_ring_is_as_fast_as_its_slowest_link() -> None:
    gpu = GPUS["h100"]
    assert ring_seconds(8e9, 8, gpu) == pytest.approx(7e9 / gpu.link, rel=0.01)
    # On two nodes half of all bytes cross the network, over eight adapters.
    slow = gpu._replace(network=1e9)
    assert ring_seconds(8e9, 16, slow) == pytest.approx(4e9 / 8e9, rel=0.01)
    # Small messages take the time of the hops: 511 of them, 63 between nodes.
    assert 1e-3 < ring_seconds(1, 512, gpu) < 3e-3


def test_what_cannot_be_is_said() -> None:
    profile = MemoryProfile(empty_decoder(SLMConfig(**SHAPE)))
    settings = TrainSettings(sequence_length=64, tokens_per_step=256)
    with pytest.raises(UserError, match="unknown GPU 'tpu'; known: a100, h100, h200"):
        forecast_on_gpus(profile, settings, 2, "tpu")
    with pytest.raises(UserError, match="4 rows for 8 GPUs: raise train.tokens_per_step"):
        forecast_on_gpus(profile, settings, 8, "h100")
