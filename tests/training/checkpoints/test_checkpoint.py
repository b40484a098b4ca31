"""A checkpoint is there whole or not at all, and going on from one is as if the run had never stopped."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import textwrap
from pathlib import Path

import pytest
import torch

from slmkit.config import UserError
from slmkit.model.files.directory import load_decoder
from slmkit.training.checkpoints.checkpoint import (
    MANIFEST,
    complete_checkpoints,
    keep_newest,
    load_checkpoint,
    newest_intact,
    point_link,
    save_checkpoint,
    verify,
)
from slmkit.training.logging.metrics_log import MetricsLog
from slmkit.training.loop import train
from slmkit.training.objective import next_token
from tests.cli.helpers import python
from tests.training import helpers
from tests.training.helpers import FILES, TOKENIZER, config, run, state

pytestmark = pytest.mark.usefixtures("without_plan_and_pictures")


def silent(line: str) -> None:
    pass


def weights(path: Path) -> dict[str, torch.Tensor]:
    return load_decoder(path)[0].state_dict()


def metrics(root: Path) -> list[dict]:
    return MetricsLog(root / "metrics.jsonl").comparable()


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("unbroken")
    run(root)
    return root


def assert_same_run(found: Path, expected: Path) -> None:
    assert metrics(found) == metrics(expected)
    ours, theirs = weights(found / "latest"), weights(expected / "latest")
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_a_run_repeated_is_the_same_bit_for_bit(unbroken: Path, tmp_path: Path) -> None:
    run(tmp_path)
    assert_same_run(tmp_path, unbroken)


@pytest.mark.parametrize("last_step", [4, 8])
def test_a_run_that_goes_on_from_a_checkpoint_ends_as_the_unbroken_one(
    last_step: int, unbroken: Path, tmp_path: Path
) -> None:
    """The checkpoints after `last_step` are lost, as when the machine died; dropout and order must come back."""
    run(tmp_path, save_total_limit=10)
    for path in complete_checkpoints(tmp_path / "checkpoints"):
        if int(path.name.removeprefix("step-")) > last_step:
            shutil.rmtree(path)
    run(tmp_path, resume=True, save_total_limit=10)
    assert_same_run(tmp_path, unbroken)


def test_a_killed_run_ends_as_the_unbroken_one(unbroken: Path, tmp_path: Path) -> None:
    """SIGKILL at whatever instant, twice, in a process of its own."""
    script = textwrap.dedent(f"""
        import os, signal, sys, threading, time
        from pathlib import Path
        from tests.training.helpers import run
        from slmkit.training.loop import Every
        root = Path({str(tmp_path)!r})
        resume = any((root / "checkpoints").glob("step-*/MANIFEST.json"))
        steps_left = int(sys.argv[1])
        def kill():
            time.sleep(0.01 * int(sys.argv[1]))
            os.kill(os.getpid(), signal.SIGKILL)
        def slow(state, report):
            global steps_left
            steps_left -= 1
            if steps_left == 0:
                threading.Thread(target=kill).start()
            time.sleep(0.05)
            if state.step == 12 and steps_left < 0 < int(sys.argv[1]):
                time.sleep(600)  # it does not end before it is killed
        run(root, resume=resume, hooks=(Every(1, slow),))
    """)
    repository = Path(__file__).parents[3]
    for kill_after, end in ((5, -signal.SIGKILL), (4, -signal.SIGKILL), (0, 0)):
        done = python(script, str(kill_after), cwd=repository)
        assert done.returncode == end, done.stderr
    assert_same_run(tmp_path, unbroken)


def test_every_checkpoint_is_a_model_directory_with_its_tokenizer(unbroken: Path) -> None:
    from slmkit.tokenizer import SLMTokenizer

    for path in complete_checkpoints(unbroken / "checkpoints"):
        verify(path)
        assert SLMTokenizer.from_pretrained(path).fingerprint == TOKENIZER.fingerprint
        assert load_decoder(path)[1] == config(hidden_dropout=0.2, attention_dropout=0.1)
    assert (unbroken / "latest").resolve().name == "step-000012"


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_the_optimizers_come_back_bit_for_bit(optimizer: str, tmp_path: Path) -> None:
    saved = train(state(optimizer=optimizer), next_token, helpers.stream(), helpers.plan(3))
    path = save_checkpoint(saved, FILES, tmp_path, TOKENIZER.save_pretrained)
    loaded = state(optimizer=optimizer)
    load_checkpoint(path, loaded, FILES)
    assert (loaded.step, loaded.tokens, loaded.best) == (saved.step, saved.tokens, saved.best)
    for ours, theirs in zip(loaded.optimizers, saved.optimizers):
        before, after = theirs.state_dict()["state"], ours.state_dict()["state"]
        assert before.keys() == after.keys()
        for index, moments in before.items():
            assert moments
            for name, tensor in moments.items():
                assert torch.equal(tensor, after[index][name])


def damaged(tmp_path: Path) -> tuple[Path, Path]:
    """Two checkpoints; the newer one is to be damaged."""
    older = save_checkpoint(state(), FILES, tmp_path, TOKENIZER.save_pretrained)
    later = state()
    later.step = 5
    return older, save_checkpoint(later, FILES, tmp_path, TOKENIZER.save_pretrained)


@pytest.mark.parametrize("name", ["model.safetensors", "training_state/optimizer.safetensors", "config.json"])
@pytest.mark.parametrize("damage", ["truncated", "one bit", "missing"])
def test_a_damaged_checkpoint_is_noticed_and_the_one_before_it_taken(name: str, damage: str, tmp_path: Path) -> None:
    older, newer = damaged(tmp_path)
    path = newer / name
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes(content[: len(content) // 2] if damage == "truncated" else content)
    with pytest.raises(UserError, match=path.name):
        verify(newer)
    warnings: list[str] = []
    assert newest_intact(tmp_path, warnings.append) == older
    assert len(warnings) == 1


def test_without_a_manifest_there_is_no_checkpoint(tmp_path: Path) -> None:
    older, newer = damaged(tmp_path)
    (newer / MANIFEST).unlink()
    assert newest_intact(tmp_path, silent) == older
    (older / MANIFEST).unlink()
    with pytest.raises(UserError, match="no complete checkpoint"):
        newest_intact(tmp_path, silent)


def test_a_run_killed_before_its_first_checkpoint_begins_again(unbroken: Path, tmp_path: Path) -> None:
    assert newest_intact(tmp_path, silent) is None
    MetricsLog(tmp_path / "metrics.jsonl").append({"step": 1, "loss": 9.0})  # to be repeated
    run(tmp_path, resume=True)
    assert_same_run(tmp_path, unbroken)


def test_what_is_half_written_is_ignored_with_a_warning_and_written_again(tmp_path: Path) -> None:
    older, _ = damaged(tmp_path)
    (tmp_path / ".partial-step-000009").mkdir()
    warnings: list[str] = []
    newest_intact(tmp_path, warnings.append)
    assert any("half-written" in line for line in warnings)
    later = state()
    later.step = 9
    verify(save_checkpoint(later, FILES, tmp_path, TOKENIZER.save_pretrained))
    assert older.exists()


@pytest.mark.parametrize("kilobytes", [1, 40, 90])
def test_a_full_disk_leaves_what_was_there_and_is_one_line(kilobytes: int, tmp_path: Path) -> None:
    """The limit on file size stands in for the disk: no file may grow beyond it."""
    save_checkpoint(state(), FILES, tmp_path, TOKENIZER.save_pretrained)
    script = textwrap.dedent(f"""
        import resource
        from pathlib import Path
        from slmkit.config import UserError
        from slmkit.training.checkpoints.checkpoint import save_checkpoint
        from tests.training.helpers import FILES, TOKENIZER, state
        later = state()
        later.step = 5
        resource.setrlimit(resource.RLIMIT_FSIZE, ({kilobytes} * 1024, resource.RLIM_INFINITY))
        try:
            save_checkpoint(later, FILES, Path({str(tmp_path)!r}), TOKENIZER.save_pretrained)
        except UserError as error:
            print(error)
    """)
    repository = Path(__file__).parents[3]
    done = python(script, cwd=repository)
    assert done.returncode == 0, done.stderr
    assert "could not be written" in done.stdout
    assert "slm resume" in done.stdout
    assert done.stdout.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["step-000000"]
    verify(tmp_path / "step-000000")
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] == resource.RLIM_INFINITY


def test_a_link_names_the_old_checkpoint_or_the_new_one_and_never_neither(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    older, newer = damaged(tmp_path)
    link = tmp_path / "latest"
    point_link(link, older)
    assert link.resolve() == older.resolve()

    def power_cut(*arguments: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as context:
        context.setattr(os, "replace", power_cut)
        with pytest.raises(KeyboardInterrupt):
            point_link(link, newer)
    assert link.resolve() == older.resolve()
    point_link(link, newer)
    assert link.resolve() == newer.resolve()


def test_old_checkpoints_go_and_the_best_one_stays(tmp_path: Path) -> None:
    for step in range(6):
        one = state()
        one.step = step
        save_checkpoint(one, FILES, tmp_path, TOKENIZER.save_pretrained)
    keep_newest(tmp_path, 2, keep={"step-000001"}, until=5)
    assert [path.name for path in complete_checkpoints(tmp_path)] == ["step-000001", "step-000004", "step-000005"]


def test_what_a_run_that_went_back_has_not_reached_again_is_not_counted(tmp_path: Path) -> None:
    for step in (1, 2, 3, 9):  # 9 is damaged, say, so that the run went on from 2
        one = state()
        one.step = step
        save_checkpoint(one, FILES, tmp_path, TOKENIZER.save_pretrained)
    keep_newest(tmp_path, 1, keep=set(), until=3)
    assert [path.name for path in complete_checkpoints(tmp_path)] == ["step-000003", "step-000009"]


def test_another_recipes_checkpoint_is_refused(tmp_path: Path) -> None:
    path = save_checkpoint(state(seed=1), FILES, tmp_path, TOKENIZER.save_pretrained)
    with pytest.raises(UserError, match="seed 1, the recipe says 2"):
        load_checkpoint(path, state(seed=2), FILES)


def test_nothing_in_a_checkpoint_is_a_pickle(tmp_path: Path) -> None:
    path = save_checkpoint(state(), FILES, tmp_path, TOKENIZER.save_pretrained)
    for file in (p for p in path.rglob("*") if p.is_file()):
        assert file.suffix in (".json", ".safetensors"), file
        if file.suffix == ".json":
            json.loads(file.read_text())
