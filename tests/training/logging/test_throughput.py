"""MFU counts the products that are really computed, and the peak is one that this machine reaches."""

from __future__ import annotations

import mmap
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode, addmm_flop

from slmkit.device import find_device, measured_peak, peak_memory, reset_peak_memory
from slmkit.model import attend
from slmkit.model.initialization import build_decoder
from slmkit.model.sizes import flops_per_token
from slmkit.training.logging.logger import ThroughputMonitor
from slmkit.training.logging.metrics_log import MetricsLog
from slmkit.training.objective import next_token
from tests.training.helpers import LENGTH, config, run, stream

CPU = find_device("cpu", "float32")


@pytest.mark.parametrize("share", [1.0, 0.25])
def test_the_operations_of_a_step_are_those_that_are_counted(share: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of all labels, and of a conversation's few: what is not learned does not pass the head."""
    monkeypatch.setattr(attend, "LONGEST_IN_PRODUCTS", 0)  # into the kernel
    model = build_decoder(config(), seed=0)
    batch = stream(rows=4).batch(0)
    learned = torch.arange(batch.labels.numel()).view_as(batch.labels) < share * batch.labels.numel()
    labels = torch.where(learned, batch.ids, -100)
    in_place = {torch.ops.aten.addmm_: lambda *shapes, **_: addmm_flop(*shapes)}  # torch counts only the other form
    with FlopCounterMode(display=False, custom_mapping=in_place) as counter:
        next_token(model, type(batch)(batch.ids, labels, int(learned.sum()))).total.backward()
    gauges = ThroughputMonitor(model, CPU, rows_per_step=4, length=LENGTH)
    # torch's counter does not look into the attention kernel of CPUs; test_sizes counts its products.
    attention = 3 * batch.ids.numel() * flops_per_token(model.architecture, LENGTH).attention
    assert gauges.step_flops(int(learned.sum())) - attention == counter.get_total_flops()


def test_half_the_time_is_twice_the_share() -> None:
    gauges = ThroughputMonitor(build_decoder(config(), seed=0), CPU, rows_per_step=8, length=LENGTH)
    first = {"tokens": 256, "tokens_per_second": 100_000}
    second = {"tokens": 512, "tokens_per_second": 200_000}
    for report in (first, second):
        gauges.update(None, report)
    assert second["mfu"] == pytest.approx(2 * first["mfu"], rel=0.02)
    assert first["mfu"] > 0


def test_the_peak_is_measured_once_and_no_product_is_faster() -> None:
    peak = measured_peak(CPU)
    assert peak == measured_peak(find_device("cpu", "float32"))
    assert 1e9 < peak < 1e14


def test_the_peak_of_memory_follows_what_is_allocated() -> None:
    reset_peak_memory(CPU)
    before = peak_memory(CPU)
    with mmap.mmap(-1, 64 << 20) as block:  # fresh pages: what an allocator kept from earlier tests is in use already
        block.write(b"1" * len(block))
        assert peak_memory(CPU) - before >= len(block)


def test_a_run_logs_its_gauges_and_its_time_goes_on_when_resumed(tmp_path: Path) -> None:
    run(tmp_path, max_steps=8)
    lines = MetricsLog(tmp_path / "metrics.jsonl").read()
    assert all(0 < line["mfu"] < 1.5 and line["memory_bytes"] > 50 << 20 for line in lines)
    run(tmp_path, resume=True, max_steps=12)
    seconds = [line["seconds"] for line in MetricsLog(tmp_path / "metrics.jsonl").read()]
    assert seconds == sorted(seconds)
    assert len(seconds) == 12
