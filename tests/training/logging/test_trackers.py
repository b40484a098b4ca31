"""What TensorBoard and Weights & Biases would draw, read back from the files that they were given."""

from __future__ import annotations

import json
import struct
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from slmkit.config import UserError
from slmkit.training.logging import logger
from slmkit.training.logging.metrics_log import MetricsLog
from slmkit.training.loop import Every
from tests.training.helpers import run

VALIDATE = Every(4, lambda state, report: report.update(validation_loss=float(state.step)))


def logged(root: Path, name: str) -> dict[int, float]:
    return {line["step"]: line[name] for line in MetricsLog(root / "metrics.jsonl").read() if name in line}


def in_tensorboard(root: Path, name: str) -> dict[int, float]:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = accumulator.EventAccumulator(str(root / "tensorboard"), size_guidance={"scalars": 0})
    events.Reload()
    return {event.step: event.value for event in events.Scalars(name)}


def leveldb_records(content: bytes) -> Iterator[bytes]:
    """The records of a LevelDB log: blocks of 32 KiB of pieces, each with its checksum, length and kind in front."""
    place, record = 0, b""
    while place + 7 <= len(content):
        left_in_block = 32_768 - (place + 7) % 32_768
        if left_in_block < 7:  # too little for a piece: filled up with zeros
            place += left_in_block
            continue
        length, kind = struct.unpack_from("<HB", content, place + 4)
        record += content[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # whole, or the last piece
            yield record
            record = b""


def in_wandb(folder: Path) -> dict[int, dict[str, float]]:
    """The history records of one offline run, by our step. Its writer is another process: wait for it."""
    from wandb.proto.wandb_internal_pb2 import Record

    (file,) = folder.glob("*.wandb")
    for _ in range(1200):
        history, is_complete = {}, False
        for data in leveldb_records(file.read_bytes()[7:]):  # after W&B's own header
            record = Record()
            record.ParseFromString(data)
            is_complete |= record.HasField("exit")
            if record.HasField("history"):
                line = {item.key or item.nested_key[0]: json.loads(item.value_json) for item in record.history.item}
                history[line["step"]] = line
        if is_complete:
            return history
        time.sleep(0.1)
    raise AssertionError(f"{file} has no end")


def test_tensorboard_holds_what_metrics_hold(tmp_path: Path) -> None:
    run(tmp_path, hooks=(VALIDATE,), report_to=["tensorboard"])
    for name in ("loss", "grad_norm", "learning_rate", "validation_loss", "tokens"):
        expected = logged(tmp_path, name)
        assert in_tensorboard(tmp_path, name) == pytest.approx(expected, rel=1e-6), name
    assert len(logged(tmp_path, "loss")) == 12


def test_a_resumed_run_goes_on_in_tensorboard_without_the_steps_it_repeats(tmp_path: Path) -> None:
    class PowerCutError(Exception):
        pass

    def cut(state, report) -> None:
        if state.step == 7:
            raise PowerCutError

    with pytest.raises(PowerCutError):
        run(tmp_path, hooks=(Every(1, cut),), report_to=["tensorboard"])
    run(tmp_path, resume=True, report_to=["tensorboard"])
    assert in_tensorboard(tmp_path, "loss") == pytest.approx(logged(tmp_path, "loss"), rel=1e-6)
    assert sorted(logged(tmp_path, "loss")) == list(range(1, 13))


def test_an_offline_run_of_wandb_holds_what_metrics_hold_and_resumes_as_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    run(tmp_path, hooks=(VALIDATE,), report_to=["wandb"], max_steps=8)
    (first,) = (tmp_path / "wandb").glob("offline-run-*")
    history = in_wandb(first)
    for name in ("loss", "validation_loss", "tokens"):
        assert {step: line[name] for step, line in history.items() if name in line} == logged(tmp_path, name)
    assert len(logged(tmp_path, "loss")) == 8

    run(tmp_path, resume=True, report_to=["wandb"], max_steps=12)
    (second,) = set((tmp_path / "wandb").glob("offline-run-*")) - {first}
    assert first.name.rpartition("-")[2] == second.name.rpartition("-")[2]
    assert sorted(in_wandb(second)) == [9, 10, 11, 12]


def test_a_missing_package_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logger.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"wandb is not installed: pip install slmkit\[track\]"):
        logger.check_trackers(["wandb"])
