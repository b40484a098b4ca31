"""A run that goes on: with what it began with, or with what was changed and can be; longer or shorter; and alone."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from safetensors.numpy import load_file

import slmkit.training.logging.logger
from slmkit.config import UserError, load_settings, read_yaml, to_yaml
from slmkit.device import DeviceError
from slmkit.training.estimate.forecast import PlanFile
from slmkit.training.recipe.changes import LENGTH
from slmkit.training.recipe.keys import KEYS
from slmkit.training.recipe.recipe import Recipe
from slmkit.workflows.train import replay_run, resume_run, train_recipe
from tests.test_life import Silent
from tests.training.every_key import EVERY, changed, make_world, scenario, train_until

OBEYED_KEYS = {*KEYS["obeyed"], *LENGTH, "train.precision"}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    make_world(folder)
    return folder


@pytest.fixture(autouse=True)
def _no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PlanFile, "update", lambda *arguments: None)
    for draw in ("plot_losses", "plot_shares", "plot_tasks"):
        monkeypatch.setattr(slmkit.training.logging.logger, draw, lambda *arguments: None)


def train(world: Path, root: Path, name: str = "text", stop_at: int | None = None, **keys: Any) -> Path:
    """A run of 8 steps of a recipe in `every_key`, stopped behind a step where that is asked for."""
    content = changed(scenario(name, world) | {"output_dir": str(root)}, {"train.max_steps": 8} | keys)
    train_until(content, stop_at, Silent())
    return root


@pytest.fixture(scope="module")
def stopped(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Stopped behind step 4 of 8. To be copied."""
    return train(world, tmp_path_factory.mktemp("stopped") / "run", stop_at=4)


@pytest.fixture
def run(stopped: Path, tmp_path: Path) -> Path:
    shutil.copytree(stopped, tmp_path / "run", symlinks=True)
    return tmp_path / "run"


@pytest.fixture(scope="module")
def whole(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of 8 steps."""
    return train(world, tmp_path_factory.mktemp("whole") / "run")


def resume(root: Path, *overrides: str, **options: Any) -> list[str]:
    reporter = Silent()
    resume_run(root, reporter, overrides, **options)
    return list(map(str, reporter.lines))


def lines_of(root: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (root / "metrics.jsonl").read_text().splitlines()]


def rates(root: Path) -> list[float]:
    return [line["learning_rate"] for line in lines_of(root)]


def assert_same_weights(one: Path, other: Path) -> None:
    for name in ("model.safetensors", "training_state/optimizer.safetensors", "config.json"):
        assert (one / "latest" / name).read_bytes() == (other / "latest" / name).read_bytes(), name


@pytest.mark.parametrize("key", [key for key in EVERY if key != "output_dir"])
def test_every_key_that_is_edited_in_the_middle_of_a_run_is_obeyed_or_refused_by_name(
    key: str, world: Path, tmp_path: Path
) -> None:
    """The comparison comes before the data, which is not there: whatever it lets pass ends at that."""
    name, extra, value = EVERY[key]
    before = load_settings(Recipe, changed(scenario(name, world), extra, world))
    after = load_settings(Recipe, changed(scenario(name, world), extra | {key: value}, world))
    (tmp_path / "environment.json").write_text(json.dumps({"recipe": before.model_dump(mode="json")}))
    (tmp_path / "recipe.yaml").write_text(to_yaml(after))
    with pytest.raises((UserError, DeviceError)) as error:
        resume_run(tmp_path, Silent())
    found = str(error.value)
    if key in OBEYED_KEYS:
        assert "it was given in a script" in found or "cuda:77" in found
    else:
        assert found.startswith(f"{tmp_path}: {key.replace('*', '0')}")
        assert "cannot change in the middle of a run" in found
    assert "\n" not in found


@pytest.mark.parametrize("key", [key for key in EVERY if key != "output_dir"])
def test_every_key_that_is_typed_is_obeyed_or_refused_by_its_own_name(key: str, world: Path, tmp_path: Path) -> None:
    """Of a run without any of the sections that a recipe may leave out."""
    recipe = load_settings(Recipe, scenario("text", world))
    (tmp_path / "environment.json").write_text(json.dumps({"recipe": recipe.model_dump(mode="json")}))
    (tmp_path / "recipe.yaml").write_text(to_yaml(recipe))
    as_it_is = {"objective": "sft", "data.shuffle_buffer": 4}  # where `EVERY` has what this recipe says already
    typed, value = key.replace("*", "0"), as_it_is.get(key, EVERY[key][2])
    with pytest.raises((UserError, DeviceError)) as error:
        resume_run(tmp_path, Silent(), [f"{typed}={json.dumps(value)}"])
    found = str(error.value)
    if key in OBEYED_KEYS:
        assert "it was given in a script" in found or "cuda:77" in found
    else:
        assert found.startswith(f"{tmp_path}: {typed}")
        assert "cannot change in the middle of a run (" in found


def test_a_key_that_is_typed_as_it_was_changes_nothing(run: Path) -> None:
    recipe = read_yaml(run / "recipe.yaml")
    assert recipe["model"]["vocab_size"]
    said = resume(run, f"tokenizer.vocab_size={recipe['tokenizer']['vocab_size']}", "train.max_steps=8")
    assert not any("replaces" in line or "from step" in line for line in said)


@pytest.mark.parametrize(
    ("typed", "is_said"),
    [("train.parallel=ddp", False), ("train.micro_batch_tokens=4096", False), ("train.micro_batch_tokens=32", True)],
)
def test_rows_that_are_shared_out_anew_are_said_where_there_is_dropout(typed: str, is_said: bool, run: Path) -> None:
    resume(run, "train.micro_batch_tokens=128", "train.max_steps=5")
    said = resume(run, typed, "train.max_steps=6")
    assert any("how rows are split" in line for line in said) == is_said


def test_what_can_be_obeyed_is_obeyed_from_the_next_step_on_and_written_down(run: Path) -> None:
    said = resume(
        run, "train.learning_rate=0.02", "train.sample_prompts=[fox]", "train.save_total_limit=9", "train.save_steps=1"
    )
    (line,) = (line for line in said if line.startswith("from step 5 on: "))
    assert "train.learning_rate 0.01 → 0.02, " in line
    schedule = load_settings(Recipe, read_yaml(run / "recipe.yaml")).train.schedule(8)
    assert rates(run) == pytest.approx([(0.01 if step < 4 else 0.02) * schedule(step) for step in range(8)])
    assert [path.name for path in sorted((run / "checkpoints").iterdir())][-3:] == [
        "step-000006", "step-000007", "step-000008",
    ]  # fmt: skip
    described = json.loads((run / "environment.json").read_text())
    assert {"step": 4, "key": "train.learning_rate", "was": 0.01, "now": 0.02} in described["changes"]
    assert read_yaml(run / "recipe.yaml")["train"]["learning_rate"] == 0.02
    for step in (3, 7):  # each by the recipe of its time
        done = replay_run(run, step, Silent())
        assert done.recorded is not None
        assert not done.differences


def test_a_change_by_hand_is_a_change(run: Path) -> None:
    recipe = run / "recipe.yaml"
    recipe.write_text(recipe.read_text().replace("max_grad_norm: 1.0", "max_grad_norm: 0.5"))
    assert "from step 5 on: train.max_grad_norm 1.0 → 0.5" in resume(run)
    recipe.write_text(recipe.read_text().replace("seed: 1", "seed: 2"))
    with pytest.raises(UserError, match="seed cannot change in the middle of a run"):
        resume(run)


def test_a_longer_run_keeps_to_its_schedule_and_is_the_run_that_was_to_be_so_long(
    world: Path, whole: Path, tmp_path: Path
) -> None:
    shutil.copytree(whole, tmp_path / "run", symlinks=True)
    said = resume(tmp_path / "run", "train.max_steps=12")
    assert any("keeps to its schedule over 8 steps" in line and "--replan" in line for line in said)
    last = f"{0.01 * 0.1:.3g}"
    assert any(
        f"over 8 steps: {last} at the next step (--replan would spread it over all 12: " in line for line in said
    )
    once = train(world, tmp_path / "once", **{"train.max_steps": 12, "train.lr_schedule_steps": 8})
    assert_same_weights(tmp_path / "run", once)
    assert rates(tmp_path / "run") == rates(once)
    assert rates(once)[7:] == [rates(once)[7]] * 5
    assert (
        f"finished at step 12; to train longer: slm resume {tmp_path / 'run'} train.max_steps=24"
        in (resume(tmp_path / "run")[-1])
    )


@pytest.mark.parametrize("length", ["train.max_steps=12", "train.max_tokens=1536"])
def test_a_longer_run_may_be_planned_anew(length: str, whole: Path, tmp_path: Path) -> None:
    shutil.copytree(whole, tmp_path / "run", symlinks=True)
    said = resume(tmp_path / "run", length, replan=True)
    (line,) = (line for line in said if line.startswith("from step 9 on: "))
    assert ("train.max_steps 8 → removed" in line) == ("max_tokens" in length)
    assert "→ null" not in line
    schedule = load_settings(Recipe, read_yaml(tmp_path / "run" / "recipe.yaml")).train.schedule(12)
    assert rates(tmp_path / "run")[8:] == pytest.approx([0.01 * schedule(step) for step in range(8, 12)])
    assert any(f"planned anew over 12 steps: {0.01 * schedule(8):.3g} at the next step, where" in line for line in said)


def test_a_shorter_run_ends_where_it_is_told_to_and_not_before_where_it_is(run: Path) -> None:
    with pytest.raises(UserError, match="step 4 is done, and train.max_steps would end the run at step 3"):
        resume(run, "train.max_steps=3")
    said = resume(run, "train.max_steps=6")
    assert any("keeps to its schedule over 8 steps" in line for line in said)
    assert [line["step"] for line in lines_of(run)] == [1, 2, 3, 4, 5, 6]
    assert "finished at step 6" in resume(run)[-1]


def test_a_finished_run_and_a_second_one_of_its_name_say_so(world: Path, whole: Path, tmp_path: Path) -> None:
    before = (whole / "metrics.jsonl").read_bytes()
    assert f"{whole}: finished at step 8; to train longer: slm resume {whole} train.max_steps=16" == resume(whole)[-1]
    assert (whole / "metrics.jsonl").read_bytes() == before
    reporter = Silent()
    content = changed(scenario("text", world) | {"output_dir": str(whole)}, {"train.max_steps": 1})
    train_recipe(load_settings(Recipe, content), reporter, dry_run=True, force=True)
    assert any(f"is there already: this is a new run, in {whole}-2" in str(line) for line in reporter.lines)


def test_a_run_that_is_running_is_left_alone(run: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from slmkit.training.logging.metrics_log import mark_running\n"
        "with mark_running(Path(sys.argv[1])): print('on', flush=True); input()"
    )
    before = (run / "metrics.jsonl").read_bytes()
    with subprocess.Popen(
        [sys.executable, "-c", code, str(run)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        process.stdout.readline()
        with pytest.raises(UserError, match=rf"run is running \(process {process.pid} on {os.uname().nodename}\)"):
            resume(run)
        assert (run / "metrics.jsonl").read_bytes() == before
        process.kill()
    resume(run)  # it died with its process
    assert lines_of(run)[-1]["step"] == 8


def replace_weights(directory: Path) -> None:
    weights = load_file(directory / "model.safetensors")
    from safetensors.numpy import save_file

    save_file({name: array + 1 for name, array in weights.items()}, directory / "model.safetensors")


def change_shards(root: Path, world: Path) -> None:
    tokens = next((root / "data" / "train").glob("*.tokens"))
    tokens.write_bytes(bytes(reversed(tokens.read_bytes())))
    os.utime(tokens, (2**31, 2**31))


def change_tokenizer(root: Path, world: Path) -> None:
    folder = root / "data" / "tokenizer"
    (folder / "tokenizer.json").write_text((folder / "tokenizer.json").read_text().replace('"!"', '"¿"'))


BENEATH = {
    "shards": ("text", change_shards, "its checksum is wrong"),
    "tokenizer": ("text", change_tokenizer, "tokenizer"),
    "teacher": ("distill", lambda root, world: replace_weights(world / "teacher"), "distillation.teacher has changed"),
    "stream": ("stream", lambda root, world: (world / "text.jsonl").write_text('{"text": "other"}\n' * 99),
               "data: text has changed since the run began"),
    "adapter's base": ("lora", lambda root, world: replace_weights(world / "base"), "model.path has changed"),
}  # fmt: skip


@pytest.mark.parametrize("what", BENEATH)
def test_what_a_run_stands_on_and_has_changed_is_refused(what: str, tmp_path: Path) -> None:
    make_world(tmp_path)
    name, change, words = BENEATH[what]
    root = train(tmp_path, tmp_path / "run", name, stop_at=2)
    change(root, tmp_path)
    with pytest.raises(UserError, match=words):
        resume(root)
    assert lines_of(root)[-1]["step"] == 2


def test_a_stream_whose_files_were_only_touched_goes_on(tmp_path: Path) -> None:
    make_world(tmp_path)
    root = train(tmp_path, tmp_path / "run", "stream", stop_at=2)
    os.utime(tmp_path / "text.jsonl", (1, 1))
    resume(root)
    assert lines_of(root)[-1]["step"] == 8


def test_a_model_that_is_trained_whole_does_not_need_its_base_any_more(tmp_path: Path) -> None:
    make_world(tmp_path)
    unbroken = train(tmp_path, tmp_path / "unbroken", "base")
    root = train(tmp_path, tmp_path / "run", "base", stop_at=2)
    shutil.rmtree(tmp_path / "base")
    resume(root)
    assert_same_weights(root, unbroken)


@pytest.fixture
def losses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """What validation is made to find, evaluation by evaluation of whichever run."""
    found = [3.0, 2.0, 2.5, 2.1, 2.2, 1.0, 1.0, 1.0]
    from slmkit.workflows import hooks

    def validate(self: hooks.Validate, state: Any, report: dict[str, Any]) -> None:
        report["validation_loss"] = found[state.step - 1]

    monkeypatch.setattr(hooks.Validate, "__call__", validate)
    return found


def test_a_run_without_improvement_is_ended_early_wherever_it_was_stopped(
    world: Path, tmp_path: Path, losses: list[float]
) -> None:
    keys = {"train.eval_steps": 1, "train.save_steps": 8, "train.early_stopping_patience": 2}
    once = train(world, tmp_path / "once", **keys)
    assert lines_of(once)[-1]["step"] == 4
    assert (once / "latest").resolve().name == "step-000004"
    broken = train(world, tmp_path / "broken", stop_at=3, **keys)
    assert lines_of(broken)[-1]["step"] == 3
    assert any("ended after step 4 of 8: the validation loss has not fallen in 2 evaluations" in line
               for line in resume(broken))  # fmt: skip
    assert_same_weights(broken, once)
    assert "finished at step 4; to train longer: slm resume" in resume(broken)[-1]
    resume(broken, "train.early_stopping_patience=4")
    assert lines_of(broken)[-1]["step"] == 8
