"""What holds for the tests of every folder."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

# A busy machine takes longer than hypothesis expects.
settings.register_profile("slmkit", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("slmkit")

# What `make test-fast` leaves out: whole lives of models, processes, kills, and all families of parity but Llama.
SLOW = (
    "test_documents.py", "test_families_life.py", "test_growing_life.py", "test_hub.py", "test_life.py",
    "test_lora_life.py", "test_python_docs.py", "test_streamed_life.py", "test_distill_life.py", "cli/", "hosts/",
    "workflows/", "training/checkpoints/", "training/recipe/", "training/estimate/", "training/test_distributed.py",
    "training/test_guards.py", "training/test_nothing_learned.py", "training/optimizers/", "adapt/test_merging.py",
    "adapt/test_lora_merge.py", "adapt/test_merge_directories.py", "adapt/test_peft.py", "adapt/test_gptq.py",
    "adapt/test_quantized_files.py", "api/", "export/test_onnx.py",
    "data/sources/test_hub.py", "data/sources/test_urls.py", "data/prepare/test_ray.py", "generation/test_ensemble.py",
    "model/test_cache.py", "model/test_context.py", "model/files/test_directory.py",
    "parity/test_transformers.py", "parity/test_wrong_readings.py", "tokenizer/test_kinds.py",
    "tokenizer/test_stock_templates.py", "tokenizer/test_gpt2.py", "training/test_compilation.py",
    "training/test_precision.py", "training/logging/test_trackers.py", "serving/test_batches.py",
    "serving/test_clients.py", "serving/test_page_",
)  # fmt: skip


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        path = item.path.relative_to(Path(__file__).parent).as_posix()
        if path.startswith(SLOW) or (path == "parity/test_families.py" and "llama" not in item.name):
            item.add_marker(pytest.mark.slow)


def leave_out_plan_and_pictures(patch: pytest.MonkeyPatch) -> None:
    from slmkit.training.estimate import forecast
    from slmkit.training.logging import logger

    for draw in ("plot_losses", "plot_shares", "plot_tasks"):
        patch.setattr(logger, draw, lambda *arguments: None)
    patch.setattr(forecast.PlanFile, "update", lambda *arguments: None)
    patch.setattr(forecast, "weights_bytes", lambda profile: 0)


@pytest.fixture
def without_plan_and_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs without the arithmetic of plan.json and without drawings, seconds of each, for tests of something else."""
    leave_out_plan_and_pictures(monkeypatch)


@pytest.fixture(scope="module")
def module_without_plan_and_pictures() -> Iterator[None]:
    """The same for all tests of a file and for its fixtures."""
    with pytest.MonkeyPatch.context() as patch:
        leave_out_plan_and_pictures(patch)
        yield
