"""What holds for the tests of every folder."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(autouse=True, scope="session")
def the_peak_is_measured_with_products_of_float32() -> Iterator[None]:
    """Most CPUs emulate products of fewer bits: measuring their speed takes half a minute, for a figure (MFU) alone."""
    from slmkit.training import gauges

    measured = gauges.measured_peak
    gauges.measured_peak = lambda device: measured(dataclasses.replace(device, compute_dtype=torch.float32))
    yield
    gauges.measured_peak = measured


@pytest.fixture
def without_plan_and_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs without the arithmetic of plan.json and without drawings, seconds of each, for tests of something else."""
    from slmkit.training import disk_hooks, plan_file

    for draw in ("plot_losses", "plot_shares"):
        monkeypatch.setattr(disk_hooks, draw, lambda *arguments: None)
    monkeypatch.setattr(plan_file.PlanFile, "update", lambda *arguments: None)
    monkeypatch.setattr(plan_file, "weights_bytes", lambda inventory: 0)
