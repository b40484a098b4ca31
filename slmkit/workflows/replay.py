"""`slm replay`: repeat a step of a run from its files."""

from __future__ import annotations

from pathlib import Path

from slmkit.config import UserError
from slmkit.device import find_device
from slmkit.find import find_run
from slmkit.training.checkpoints import checkpoint as checkpoints
from slmkit.training.checkpoints.flight_recorder import read_record
from slmkit.training.diagnostics.replay import Replay, replay_step
from slmkit.training.fit import fresh_state
from slmkit.training.logging.progress import training_progress
from slmkit.training.loop import Every
from slmkit.training.recipe.changes import recipe_at
from slmkit.training.recipe.recipe import load_recipe
from slmkit.training.run_directory import RunDirectory
from slmkit.workflows.context import Reporter
from slmkit.workflows.open_run import open_run


def replay_run(directory: str | Path, step: int, reporter: Reporter) -> Replay:
    """Repeat step `step` of a run with hooks on every module. Nothing in the run is changed.

    Raises `UserError` if there is no such run or step.
    """
    run = RunDirectory(find_run(directory))
    recipe = recipe_at(run.described(), step) or load_recipe(run.recipe)
    is_new = not any(checkpoints.step_of(path) < step for path in checkpoints.complete_checkpoints(run.checkpoints))
    prepared = open_run(run, find_device(recipe.train.device, recipe.train.precision), recipe=recipe, is_new=is_new)
    if not 1 <= step <= prepared.plan.steps:
        raise UserError(f"--step {step}: the run has steps 1 to {prepared.plan.steps}")
    recorded, recorded_batch = read_record(run.records, step)
    recorded = recorded or next((line for line in run.metrics.comparable() if line["step"] == step), None)
    context = prepared.context
    state = fresh_state(recipe, context.model, context.device)
    base = checkpoints.newest_intact(run.checkpoints, reporter.warn, lambda path: checkpoints.step_of(path) < step)
    if base is None:
        reporter.say(f"there is no checkpoint before step {step}: repeating all steps from the first")
    else:
        checkpoints.load_checkpoint(base, state, context.files)
        reporter.say(f"starting from {base.name}: {step - 1 - state.step:,} steps to repeat before step {step}")
    if recorded is not None:  # a rollback after that checkpoint lowered the learning rate
        state.guard.rollbacks = recorded.get("rollbacks", 0)
    parts, plan, decode = prepared.parts, prepared.plan, context.corpus.tokenizer.decode
    with training_progress("replay", step - 1) as progress:
        hooks = (Every(1, progress),)
        return replay_step(state, parts.objective, parts.batches, plan, step, recorded, recorded_batch, decode, hooks)
