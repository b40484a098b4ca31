"""Every operation of a save made to fail in turn, and to be the last one in turn: something whole is always there."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from slmkit.config import UserError
from slmkit.training.checkpoints.checkpoint import clear_leftovers, load_checkpoint, newest_intact, verify
from slmkit.training.checkpoints.saver import Saver
from slmkit.training.logging.metrics_log import MetricsLog, append_samples
from slmkit.training.loop import State
from slmkit.training.run_directory import RunDirectory
from tests.training.faults import Act, PowerCut, disk_full, operations_on_files, power_cut
from tests.training.helpers import FILES, TOKENIZER, state


def state_at(step: int) -> State:
    """A state whose weights say which step they are of."""
    learner = state()
    learner.step = step
    with torch.no_grad():
        learner.model.norm.weight.fill_(step)
    return learner


def save(root: Path, learner: State) -> None:
    """A save as a run has it, seen to its end: checkpoint, `latest`, `best`, and the one before deleted."""
    saver = Saver(RunDirectory(root), FILES, TOKENIZER.save_pretrained, save_total_limit=1, warn=lambda line: None)
    saver.save(learner, {"validation_loss": 1 / learner.step})
    saver.finish()


def assert_goes_on(root: Path, steps: set[int]) -> None:
    """A checkpoint of one of these steps is found and is whole, and what links there are lead to a whole one."""
    found = newest_intact(root / "checkpoints", lambda line: None)
    assert found is not None
    loaded = state()
    load_checkpoint(found, loaded, FILES)
    assert loaded.step in steps
    assert loaded.model.norm.weight.tolist() == [loaded.step] * 32
    for link in (root / "latest", root / "best"):
        if link.is_symlink():
            verify(link.resolve())
    assert (root / "latest").is_symlink()


def operations_of(action: Callable[[], None]) -> int:
    with operations_on_files() as counted:
        action()
    return counted.count


@pytest.fixture
def saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run with one checkpoint, of step 4, on a disk that is in no need of waiting for it."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    save(tmp_path / "run", state_at(4))
    return tmp_path / "run"


def fresh_copy(saved: Path) -> Path:
    copy = saved.with_name("copy")
    shutil.rmtree(copy, ignore_errors=True)
    return shutil.copytree(saved, copy, symlinks=True)


@pytest.mark.parametrize("act", [power_cut, disk_full])
def test_no_operation_of_a_save_leaves_neither_checkpoint(act: Act, saved: Path) -> None:
    later = state_at(8)
    total = operations_of(lambda: save(fresh_copy(saved), later))
    assert total > 40
    seen = set()
    for at in range(1, total + 1):
        root = fresh_copy(saved)
        # Some failures are of no account, such as that of clearing up: those are not raised.
        with contextlib.suppress(PowerCut, UserError), operations_on_files(at, act) as operations:
            save(root, later)
        assert_goes_on(root, {4, 8})
        if act is power_cut:
            operations.lose_what_was_not_synced()
            assert_goes_on(root, {4, 8})
        seen.add((root / "latest").resolve().name)
        clear_leftovers(root / "checkpoints")
        save(root, later)
        assert_goes_on(root, {8})
        assert {path.name for path in (root / "checkpoints").iterdir()} == {"step-000008"}
    assert seen == {"step-000004", "step-000008"}


def test_a_damaged_checkpoint_written_again_is_no_exception(saved: Path) -> None:
    """The run went on from step 4, since that of step 8 was damaged, and comes to step 8 again."""
    later = state_at(8)
    keeps_both = Saver(RunDirectory(saved), FILES, TOKENIZER.save_pretrained, 2, warn=lambda line: None)
    keeps_both.save(later, {})
    keeps_both.finish()
    (saved / "checkpoints" / "step-000008" / "config.json").unlink()
    (saved / "latest").unlink()
    (saved / "latest").symlink_to("checkpoints/step-000004")
    for at in range(1, operations_of(lambda: save(fresh_copy(saved), later)) + 1):
        root = fresh_copy(saved)
        with contextlib.suppress(PowerCut), operations_on_files(at) as operations:
            save(root, later)
        operations.lose_what_was_not_synced()
        assert_goes_on(root, {4, 8})


def test_metrics_are_the_old_lines_or_the_rewound_ones(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path / "metrics.jsonl")

    def refill() -> None:
        log.path.write_text("".join(f'{{"step": {step}}}\n' for step in range(1, 6)) + '{"step": 6, "lo')

    refill()
    found = set()
    for at in range(1, operations_of(lambda: log.rewind(2)) + 1):
        refill()
        with contextlib.suppress(PowerCut), operations_on_files(at) as operations:
            log.rewind(2)
        operations.lose_what_was_not_synced()
        found.add(tuple(line["step"] for line in log.read()))
    assert found == {(1, 2, 3, 4, 5), (1, 2)}


def test_a_metrics_line_cut_short_is_no_line(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path / "metrics.jsonl")
    log.append({"step": 1})
    for at in range(1, operations_of(lambda: log.append({"step": 2})) + 1):
        log.rewind(1)
        with contextlib.suppress(PowerCut), operations_on_files(at):
            log.append({"step": 2})
        assert [line["step"] for line in log.read()] == [1]
        log.rewind(1)
        log.append({"step": 2})
        assert log.path.read_text() == '{"step": 1}\n{"step": 2}\n'


def test_a_full_disk_is_one_line_for_metrics_and_samples_too(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path / "metrics.jsonl")
    with pytest.raises(UserError, match="No space left on device.*slm resume"), operations_on_files(2, disk_full):
        log.append({"step": 1})
    samples = [("Once upon a time", " there was a fox.")]
    with pytest.raises(UserError, match="No space left on device.*slm resume"), operations_on_files(2, disk_full):
        append_samples(tmp_path / "samples.md", 1, samples)
