"""What is planned is what comes: memory, disk and speed beside real steps, and proposals that really train."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from slmkit.device import find_device
from slmkit.model.config import SLMConfig
from slmkit.model.files.directory import empty_decoder
from slmkit.training.estimate.forecast import disk_bytes, forecast, loss_ahead
from slmkit.training.estimate.memory import MemoryProfile, state_bytes
from slmkit.training.estimate.probe import probe
from slmkit.training.recipe.recipe import TrainSettings
from tests.training.helpers import config, settings
from tests.training.helpers import run as trained

CPU = find_device("cpu", "float32")
SHAPE = {
    "vocab_size": 2_048, "hidden_size": 192, "intermediate_size": 512, "num_hidden_layers": 4,
    "num_attention_heads": 3, "max_position_embeddings": 256,
}  # fmt: skip
PROFILE = MemoryProfile(empty_decoder(SLMConfig(**SHAPE)))


def test_a_checkpoint_takes_what_was_said(tmp_path: Path) -> None:
    for optimizer in ("adamw", "muon"):
        root = tmp_path / optimizer
        trained(root, optimizer=optimizer, max_steps=2, eval_steps=1)
        checkpoint = (root / "latest").resolve()
        files = [checkpoint / "model.safetensors", *(checkpoint / "training_state").glob("*.safetensors")]
        real = sum(path.stat().st_size for path in files)
        said = state_bytes(MemoryProfile(empty_decoder(config())), settings(optimizer=optimizer), CPU)
        assert said == pytest.approx(real, rel=0.1), optimizer  # the rest is names


def test_disk_counts_those_kept_the_best_and_the_one_being_written() -> None:
    kept = settings(max_steps=100, eval_steps=10, save_total_limit=2)
    assert disk_bytes(1_000, kept, 100, 4_096, unique_tokens=0) == 4_000
    assert disk_bytes(1_000, kept, 10, 4_096, unique_tokens=0) == 2_000  # it ends with its first
    assert disk_bytes(0, kept, 100, 4_096, unique_tokens=50) == 100
    assert disk_bytes(0, kept, 100, 100_000, unique_tokens=50) == 200


@pytest.mark.parametrize("rows_per_micro_batch", [8, 2])
def test_the_probe_takes_real_steps_also_where_one_has_several_micro_batches(rows_per_micro_batch: int) -> None:
    train = settings(tokens_per_step=8 * 32, micro_batch_tokens=rows_per_micro_batch * 32)
    found = probe(MemoryProfile(empty_decoder(config())), train, CPU, steps=12)
    assert found.steps == 12
    assert found.tokens_per_second == pytest.approx(8 * 32 / found.step_seconds)


def test_a_probe_measures_the_memory_that_training_adds() -> None:
    code = """
import json, sys
from slmkit.device import find_device
from slmkit.model.config import SLMConfig
from slmkit.model.files.directory import empty_decoder
from slmkit.training.estimate.forecast import forecast
from slmkit.training.estimate.memory import MemoryProfile
from slmkit.training.estimate.probe import probe
from slmkit.training.recipe.recipe import TrainSettings
profile = MemoryProfile(empty_decoder(SLMConfig(**json.loads(sys.argv[1]))))
train = TrainSettings(sequence_length=256, tokens_per_step=4096, micro_batch_tokens=4096)
device = find_device("cpu", "float32")
measured = probe(profile, train, device, steps=3).memory_bytes
print(json.dumps([forecast(profile, train, 100, device, tokens_per_second=1.0).memory_bytes, measured]))
"""
    shape = json.dumps(SHAPE)
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code, shape], capture_output=True, text=True, check=True, env=environment
    )
    said, measured = json.loads(done.stdout)
    assert said == pytest.approx(measured, rel=0.25)  # a whole run has an evaluation besides


def test_no_loss_is_promised_beyond_guessing() -> None:
    assert loss_ahead(1_000_000, 100_000, None, 4_096) is None
    assert loss_ahead(100_000_000, 2_000_000_000, None, 16_384) == pytest.approx(3.4, abs=0.2)


def test_what_steps_were_seen_to_hold_counts_more_than_arithmetic() -> None:
    train = TrainSettings(tokens_per_step=4_096, micro_batch_tokens=4_096)
    counted, seen, more = (forecast(PROFILE, train, 10, CPU, held_bytes=held) for held in (None, 300 << 20, 400 << 20))
    assert counted.memory_bytes == counted.counted_bytes == seen.counted_bytes
    assert more.memory_bytes - seen.memory_bytes == 100 << 20
    assert 300 << 20 < seen.memory_bytes < 450 << 20


def test_a_larger_batch_takes_more_memory_and_a_measured_speed_counts() -> None:
    small, large = (
        forecast(PROFILE, TrainSettings(tokens_per_step=n, micro_batch_tokens=n), 10, CPU, tokens_per_second=1_000.0)
        for n in (4_096, 16_384)
    )
    assert large.memory_bytes > 2 * small.memory_bytes
    assert small.seconds == pytest.approx(small.tokens / 1_000, abs=15)
