"""`slm replay`: repeat a step of a run from its files."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from slmkit.config import UserError
from slmkit.device import find_device
from slmkit.model.files.find import find_run
from slmkit.tokenizer import SLMTokenizer
from slmkit.training.checkpoints import checkpoint as checkpoints
from slmkit.training.checkpoints.flight_recorder import recorded_batches, recorded_report
from slmkit.training.diagnostics.replay import Replay, differences, replay_step
from slmkit.training.fit import fresh_state
from slmkit.training.logging.progress import TrainingProgress
from slmkit.training.loop import Every, Report
from slmkit.training.recipe.changes import recipe_at
from slmkit.training.recipe.recipe import load_recipe
from slmkit.training.run_directory import RunDirectory
from slmkit.workflows.context import Reporter
from slmkit.workflows.open_run import open_run

TOKENS_BEFORE = 24  # context shown before the first token with a non-finite value


@dataclass(frozen=True)
class RunReplay:
    """A replayed step, and the run's record of it."""

    replay: Replay
    recorded: Report | None  # the step's line in metrics.jsonl, if it was logged
    tokenizer: SLMTokenizer

    @property
    def differences(self) -> dict[str, tuple[Any, Any]]:
        """Figures that are not bit-identical to the recorded ones; on another kind of machine, some differ."""
        return differences(self.replay.report, self.recorded) if self.recorded is not None else {}

    def text_before(self, row: int, position: int) -> str:
        """Text of a row up to a token, inclusive."""
        ids = self.replay.batch.ids[row, max(0, position - TOKENS_BEFORE) : position + 1]
        return self.tokenizer.decode(ids.tolist())

    def token(self, row: int, position: int) -> tuple[int, str]:
        """A token's id and text."""
        token_id = int(self.replay.batch.ids[row, position])
        return token_id, self.tokenizer.decode([token_id])


def replay_run(directory: str | Path, step: int, reporter: Reporter) -> RunReplay:
    """Repeat step `step` of a run with hooks on every module. Nothing in the run is changed.

    Raises `UserError` if there is no such run or step.
    """
    run = RunDirectory(find_run(directory))
    recipe = recipe_at(run.described(), step) or load_recipe(run.recipe)
    is_new = not any(checkpoints.step_of(path) < step for path in checkpoints.complete_checkpoints(run.checkpoints))
    prepared = open_run(run, find_device(recipe.train.device, recipe.train.precision), recipe=recipe, is_new=is_new)
    if not 1 <= step <= prepared.plan.steps:
        raise UserError(f"--step {step}: the run has steps 1 to {prepared.plan.steps}")
    recorded = recorded_report(run.records, step) or _line_of(run, step)
    state = fresh_state(recipe, prepared.context.model, prepared.context.device)
    base = checkpoints.newest_intact(
        run.checkpoints, reporter.warn, lambda checkpoint: checkpoints.step_of(checkpoint) < step
    )
    if base is None:
        reporter.say(f"there is no checkpoint before step {step}: repeating all steps from the first")
    else:
        checkpoints.load_checkpoint(base, state, prepared.context.files)
        reporter.say(f"starting from {base.name}: {step - 1 - state.step:,} steps to repeat before step {step}")
    if recorded is not None:  # a rollback after that checkpoint lowered the learning rate
        state.guard.rollbacks = recorded.get("rollbacks", 0)
    recorded_batch = recorded_batches(run.records, step).get(step)
    with TrainingProgress("replay", step - 1) as progress:
        replay = replay_step(
            state,
            prepared.parts.objective,
            prepared.parts.batches,
            prepared.plan,
            step,
            recorded_batch,
            hooks=(Every(1, progress.update),),
        )
    return RunReplay(replay, recorded, prepared.context.corpus.tokenizer)


def _line_of(run: RunDirectory, step: int) -> Report | None:
    return next((line for line in run.metrics.comparable() if line["step"] == step), None)
