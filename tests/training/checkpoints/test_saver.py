"""Checkpoints written behind the run's back: of one instant, one at a time, and a failure is borne while it can be."""

from __future__ import annotations

import os
import re
import shutil
import signal
import textwrap
import threading
import time
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
import torch

from slmkit import cli
from slmkit.config import UserError
from slmkit.training.checkpoints import checkpoint as checkpoints
from slmkit.training.checkpoints.checkpoint import complete_checkpoints, load_checkpoint, newest_intact, verify
from slmkit.training.checkpoints.saver import FAILURES_BORNE, Saver, point_links
from slmkit.training.loop import Every, Report, RunStopped, State
from slmkit.training.run_directory import RunDirectory
from tests.cli.helpers import python
from tests.training.checkpoints.test_checkpoint import assert_same_run
from tests.training.checkpoints.test_crash_points import state_at
from tests.training.faults import disk_full, operations_on_files
from tests.training.helpers import FILES, TOKENIZER, run, state
from tests.training.ranks import processes

pytestmark = pytest.mark.usefixtures("without_plan_and_pictures")
REPOSITORY = Path(__file__).parents[3]


@pytest.fixture
def warnings() -> list[str]:
    return []


@pytest.fixture
def saver(tmp_path: Path, warnings: list[str]) -> Saver:
    (tmp_path / "checkpoints").mkdir()
    return Saver(RunDirectory(tmp_path), FILES, TOKENIZER.save_pretrained, 9, warnings.append)


def test_what_is_written_is_the_instant_of_the_save(saver: Saver, monkeypatch: pytest.MonkeyPatch) -> None:
    """The run goes on while a slow disk takes its time, and the checkpoint knows nothing of that."""
    write, may_write = checkpoints.write_checkpoint, threading.Event()

    def slow(*arguments):
        may_write.wait()
        return write(*arguments)

    monkeypatch.setattr(checkpoints, "write_checkpoint", slow)
    learner = state_at(4)
    learner.guard.norms = [1.0]
    saver.save(learner, {})
    learner.step, learner.guard.norms[0] = 5, 2.0
    with torch.no_grad():
        learner.model.norm.weight.fill_(5)
    assert complete_checkpoints(saver.run.checkpoints) == []
    assert not saver.run.latest.exists()  # no link to what is not there yet
    may_write.set()
    saver.finish()
    loaded = state()
    load_checkpoint(saver.run.latest, loaded, FILES)
    assert (loaded.step, loaded.guard.norms, loaded.model.norm.weight[0].item()) == (4, [1.0], 4)


def test_a_run_copied_without_its_links_gets_them_back(saver: Saver) -> None:
    """`cp -rL` and `scp -r` make folders of `latest` and `best`."""
    saver.save(state_at(2), {})
    saver.finish()
    only, links = saver.run.checkpoints / "step-000002", (saver.run.latest, saver.run.best)
    for link in links:
        link.unlink(missing_ok=True)
        shutil.copytree(only, link)
    point_links(saver.run, only, only.name)
    assert [link.is_symlink() and link.resolve() == only.resolve() for link in links] == [True, True]
    assert {path.name for path in saver.run.root.iterdir()} == {"checkpoints", "latest", "best"}
    saver.run.latest.unlink()
    saver.run.latest.mkdir()
    (saver.run.latest / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="latest is a folder where a link to a checkpoint belongs: move it away"):
        point_links(saver.run, only, only.name)
    assert (saver.run.latest / "notes.txt").read_text() == "mine"


def fail(saver: Saver, step: int) -> None:
    saver.wait()
    with operations_on_files(3, disk_full):
        saver.save(state_at(step), {})
        assert saver._thread is not None
        saver._thread.join()


def test_a_failed_save_does_not_end_a_run_that_can_go_on(saver: Saver, warnings: list[str]) -> None:
    saver.save(state_at(1), {})
    saver.wait()
    fail(saver, 2)
    saver.check(state_at(3), {})  # at the next step
    assert len(warnings) == 1
    assert "No space left on device" in warnings[0]
    assert warnings[0].endswith("the run goes on, and would be resumed from step-000001")
    assert "\n" not in warnings[0]
    saver.save(state_at(4), {})
    saver.finish()
    assert [path.name for path in complete_checkpoints(saver.run.checkpoints)] == ["step-000001", "step-000004"]


def test_several_in_a_row_do(saver: Saver, warnings: list[str]) -> None:
    saver.save(state_at(1), {})
    for step in range(2, 2 + FAILURES_BORNE):
        fail(saver, step)  # which is told of at the next save
    with pytest.raises(UserError, match="could not be written"):
        saver.save(state_at(9), {})
    assert len(warnings) == FAILURES_BORNE - 1
    assert newest_intact(saver.run.checkpoints, warnings.append) == saver.run.checkpoints / "step-000001"


def test_so_does_the_first_without_anything_to_go_on_from_and_the_last(saver: Saver) -> None:
    fail(saver, 1)
    with pytest.raises(UserError, match="could not be written"):
        saver.check(state_at(2), {})
    saver.save(state_at(2), {})
    saver.wait()
    fail(saver, 3)
    with pytest.raises(UserError, match="could not be written"):
        saver.finish()


def test_the_last_failure_ends_the_run_also_if_it_was_noticed_before_the_end(saver: Saver, warnings: list[str]) -> None:
    saver.save(state_at(2), {})
    saver.wait()
    fail(saver, 3)
    saver.check(state_at(3), {})
    assert len(warnings) == 1
    with pytest.raises(UserError, match="could not be written"):
        saver.finish()


def test_a_disk_that_is_full_at_the_end_is_one_line_and_exit_code_2(tmp_path: Path) -> None:
    """The limit on file size stands in for the disk: a line of metrics fits, a checkpoint does not."""
    script = textwrap.dedent(f"""
        import resource, sys, time
        from pathlib import Path
        from slmkit.config import UserError
        from slmkit.training.loop import Every
        from tests.training.helpers import run
        def fill(state, report):
            if state.step == 5:
                while not Path({str(tmp_path)!r}, "latest").exists():
                    time.sleep(0.01)
                resource.setrlimit(resource.RLIMIT_FSIZE, (8192, resource.RLIM_INFINITY))
        try:
            run(Path({str(tmp_path)!r}), hooks=(Every(1, fill),), warn=lambda line: print("warning:", line))
        except UserError as error:
            print(error)
            sys.exit(2)
    """)
    done = python(script, cwd=REPOSITORY)
    assert done.returncode == 2, done.stderr
    *warned, last = done.stdout.splitlines()
    assert all(line.startswith("warning: ") for line in warned)
    assert sum("step-000008: the checkpoint could not be written" in line for line in warned) == 1
    assert "step-000012: the checkpoint could not be written" in last
    assert "slm resume" in last
    verify((tmp_path / "latest").resolve())
    assert (tmp_path / "latest").resolve().name == "step-000004"


def _signalled(root: Path, pause: float, steps: Connection, errors: Path) -> None:
    """A run that reports its steps, through the command line's way of ending."""

    def slow(state: State, report: Report) -> None:
        if state.step == 3:
            ask_to_stop = signal.getsignal(signal.SIGINT)

            def noted(number: int, frame: object) -> None:
                ask_to_stop(number, frame)  # type: ignore[operator,misc]
                steps.send("asked")

            signal.signal(signal.SIGINT, noted)
        if state.step <= 3:
            steps.send(state.step)
        if state.step >= 3:
            time.sleep(pause)

    def train(arguments: list[str], **options: object) -> None:
        run(root, hooks=(Every(1, slow),), save_steps=12, max_steps=12, eval_steps=12)

    os.dup2(os.open(errors, os.O_WRONLY | os.O_CREAT), 2)
    cli.app = train
    cli.main()


def started(root: Path, pause: float) -> tuple[BaseProcess, Connection]:
    """Such a run in a process of its own, in its third step, and what it reports."""
    steps, theirs = processes.Pipe(duplex=False)
    process = processes.Process(target=_signalled, args=(root, pause, theirs, root / "stderr"), daemon=True)
    process.start()
    theirs.close()  # so that the end of the process is noticed
    assert [steps.recv() for _ in range(3)] == [1, 2, 3]
    return process, steps


def ended(process: BaseProcess, root: Path) -> tuple[int | None, str]:
    process.join(120)
    return process.exitcode, (root / "stderr").read_text()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_one_signal_ends_the_run_with_a_checkpoint_and_exit_code_0(number: int, tmp_path: Path) -> None:
    process, _ = started(tmp_path, pause=1)
    os.kill(process.pid, number)
    code, stderr = ended(process, tmp_path)
    assert code == 0, stderr
    found = re.search(r"slm: stopped after step (\d+) of 12; go on with: slm resume", stderr)
    assert found, stderr
    assert (tmp_path / "latest").resolve().name == f"step-{found[1]:>06}"
    assert int(found[1]) < 12
    verify((tmp_path / "latest").resolve())


def test_a_second_ctrl_c_ends_it_at_once(tmp_path: Path) -> None:
    process, reports = started(tmp_path, pause=300)
    os.kill(process.pid, signal.SIGINT)
    assert reports.recv() == "asked"  # and the hook sleeps on
    os.kill(process.pid, signal.SIGINT)
    code, stderr = ended(process, tmp_path)
    assert code == 130, stderr
    assert "slm: stopped" in stderr
    assert not (tmp_path / "latest").exists()


def test_a_stopped_run_has_the_metrics_of_one_that_was_not(tmp_path: Path) -> None:
    def interrupt(learner: State, report: dict) -> None:
        if learner.step in (3, 7):
            os.kill(os.getpid(), signal.SIGTERM)

    def validate(learner: State, report: dict) -> None:
        report["validation_loss"] = learner.model.norm.weight.sum().item()

    run(tmp_path / "whole", hooks=(Every(4, validate),), logging_steps=5)
    hooks = (Every(4, validate), Every(1, interrupt))
    for resume in (False, True):
        with pytest.raises(RunStopped):
            run(tmp_path / "stopped", hooks=hooks, logging_steps=5, resume=resume)
    run(tmp_path / "stopped", hooks=hooks, logging_steps=5, resume=True)
    assert_same_run(tmp_path / "stopped", tmp_path / "whole")
