"""What holds for the tests of every folder."""

from __future__ import annotations

import functools
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

# A busy machine takes longer than hypothesis expects.
settings.register_profile("slmkit", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("slmkit")

# A shell ignores SIGINT in what it runs in the background, and so would all processes that tests start and stop.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# What `make test-fast` leaves out: whole lives of models, other programs, processes, kills, and every family but Llama.
SLOW = (
    "test_documents.py", "test_families_life.py", "test_growing_life.py", "test_hub.py", "test_library.py",
    "test_life.py", "test_lora_life.py", "test_python_docs.py", "test_streamed_life.py", "test_distill_life.py",
    "api/", "cli/", "export/", "hosts/", "workflows/", "adapt/test_gptq.py", "adapt/test_lora_merge.py",
    "adapt/test_merge_directories.py", "adapt/test_merging.py", "adapt/test_peft.py", "adapt/test_quantized_files.py",
    "data/cleaning/", "data/prepare/test_conversations.py", "data/prepare/test_foreign_tokenizers.py",
    "data/prepare/test_open_sources.py", "data/prepare/test_ray.py", "data/sources/test_bad_rows.py",
    "data/sources/test_hub.py", "data/sources/test_positions.py", "data/sources/test_public_files.py",
    "data/sources/test_urls.py", "data/stories/", "data/test_make_batches.py", "data/test_streaming.py",
    "evaluation/code/", "evaluation/test_harness.py", "evaluation/test_look.py", "evaluation/test_perplexity.py",
    "evaluation/test_self_test.py", "evaluation/test_stories.py", "evaluation/test_tasks.py",
    "generation/test_chat.py", "generation/test_ensemble.py", "generation/test_foreign.py",
    "generation/test_speculation.py", "model/files/test_directory.py", "model/test_cache.py", "model/test_context.py",
    "model/test_window.py", "parity/test_compiled.py", "parity/test_long.py", "parity/test_transformers.py",
    "parity/test_trl_masks.py", "parity/test_wrong_readings.py", "serving/test_batches.py", "serving/test_clients.py",
    "serving/test_doors.py", "serving/test_embeddings.py", "serving/test_load.py", "serving/test_page_",
    "serving/test_requests.py", "serving/test_serve.py", "serving/test_streaming.py", "serving/test_upstream.py",
    "serving/test_worker.py", "tokenizer/test_fast_encoder.py", "tokenizer/test_gpt2.py", "tokenizer/test_kinds.py",
    "tokenizer/test_loss_mask.py", "tokenizer/test_stock_templates.py", "training/checkpoints/",
    "training/diagnostics/", "training/estimate/", "training/logging/", "training/optimizers/", "training/recipe/",
    "training/test_compilation.py", "training/test_distributed.py", "training/test_fit.py", "training/test_guards.py",
    "training/test_nothing_learned.py", "training/test_precision.py",
)  # fmt: skip
FAMILIES = ("gpt2", "mistral", "qwen", "smollm", "olmo", "gemma", "deepseek", "slm")  # as the names of cases begin


def is_slow(path: Path) -> bool:
    return path.relative_to(Path(__file__).parent).as_posix().startswith(SLOW)


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Files that are left out are not even imported, which would take longer than all other tests."""
    return True if config.option.markexpr == "not slow" and is_slow(collection_path) else None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        case = item.name.partition("[")[2].lower()
        if is_slow(item.path) or case.startswith(FAMILIES):
            item.add_marker(pytest.mark.slow)


@pytest.fixture(autouse=True, scope="session")
def _no_waiting_for_the_disk_or_for_git() -> Iterator[None]:
    """A run waits two dozen times until the disk has written, which matters where power fails, and asks git once.

    Tests of crashes put their own `os.fsync` here.
    """
    from slmkit.training.logging import metrics_log

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda descriptor: None)
        patch.setattr(metrics_log, "_git_revision", functools.cache(metrics_log._git_revision))
        yield


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
