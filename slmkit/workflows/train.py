"""`train_recipe`: a whole run from a recipe; `resume_run`: go on with a run, checked against its start, perhaps with
changes to its recipe; `replay_run`: repeat a step from its files.
"""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Sequence
from pathlib import Path

from slmkit.config import UserError
from slmkit.device import Device, find_device
from slmkit.files.find import find_run
from slmkit.model.config import SLMConfig
from slmkit.training.checkpoints.checkpoint import complete_checkpoints, load_checkpoint, newest_intact, step_of
from slmkit.training.checkpoints.flight_recorder import Replay, read_record, replay_step
from slmkit.training.distributed import Group, join
from slmkit.training.fit import fresh_state
from slmkit.training.logging.logger import check_trackers
from slmkit.training.logging.metrics_log import mark_running
from slmkit.training.logging.progress import training_progress
from slmkit.training.loop import Every, Plan, StopRequested
from slmkit.training.recipe.changes import (
    NOW,
    PROCESSES,
    Change,
    changes_between,
    expect_obeyable,
    is_of_length,
    of_absent_sections,
    recipe_at,
)
from slmkit.training.recipe.checks import expect_a_model, without_effect
from slmkit.training.recipe.recipe import LENGTHS, Recipe, TrainSettings, load_recipe
from slmkit.training.run_directory import RunDirectory, new_run_directory, run_of_job
from slmkit.workflows.context import SILENCE, Reporter
from slmkit.workflows.distill import with_the_teachers_tokenizer
from slmkit.workflows.hooks import tasks_of
from slmkit.workflows.model import at_commits
from slmkit.workflows.open_run import PREPARED, PreparedRun, build_run, fingerprints_of, open_run


def train_recipe(
    recipe: Recipe, reporter: Reporter, dry_run: bool = False, force: bool = False, stop: StopRequested | None = None
) -> RunDirectory:
    """Do a whole run: tokenizer, shards, model, training. If it fails before the first step, its files are deleted.

    Under `torchrun` rank 0 prepares the data while the others wait, and a restarted job continues its run. Raises
    `UserError` for errors in the recipe or its data, and for findings of the X-ray, unless `force`; `RunStopped`, after
    a checkpoint, if a signal or `stop` ends it early.
    """
    check_trackers(recipe.train.report_to)
    expect_a_model(recipe)
    for line in without_effect(recipe):
        reporter.warn(line)
    recipe = with_the_teachers_tokenizer(at_commits(recipe))
    device = find_device(recipe.train.device, recipe.train.precision)
    with join(device, recipe.train.ddp_timeout) as group, contextlib.ExitStack() as held:
        reporter = reporter if group.is_main else SILENCE
        if group.is_main:
            prepared = _prepare(recipe, device, group, reporter, force, held)
            group.from_main(str(prepared.context.run.root))
        else:
            prepared = open_run(RunDirectory(group.from_main("")), device, group)
        run = prepared.context.run
        if not dry_run:
            resume = group.from_main(bool(complete_checkpoints(run.checkpoints)))
            if not resume:
                reporter.say(f"  Whole rows of the x-ray: {run.root / 'xray.md'}")
            prepared.train(resume, stop)
        elif group.is_main:
            shutil.rmtree(run.root)
            steps = f"{prepared.plan.steps:,} step{'' if prepared.plan.steps == 1 else 's'}"
            reporter.say(f"dry run: nothing was written; without --dry-run it trains {steps}")
    return run


def _prepare(
    recipe: Recipe, device: Device, group: Group, reporter: Reporter, force: bool, held: contextlib.ExitStack
) -> PreparedRun:
    """The new run, or the one that this job made before a restart."""
    found = run_of_job(recipe.output_dir)
    if found is not None:
        held.enter_context(mark_running(found.root))
        reporter.say(f"{found.root}: continuing the run of this job, as its recipe.yaml says")
        return go_on(found, load_recipe(found.recipe), device, group, reporter)
    tasks_of(recipe.train, chat=recipe.reads != "text")  # before the data is prepared, which may take hours
    run = new_run_directory(recipe.output_dir)
    held.enter_context(mark_running(run.root))
    if run.root != Path(recipe.output_dir):
        reporter.say(
            f"{recipe.output_dir} is there already: this is a new run, in {run.root}; to go on with the first one: "
            f"slm resume {recipe.output_dir}"
        )
    try:
        run.claim(recipe)
        return build_run(run, recipe, device, group, reporter, force)
    except BaseException:
        shutil.rmtree(run.root, ignore_errors=True)
        raise


# -- resume and replay -------------------------------------------------------------------------------------------------


def resume_run(
    directory: str | Path, reporter: Reporter, overrides: Sequence[str] = (), replan: bool = False
) -> RunDirectory:
    """Resume a run from its newest intact checkpoint, on any number of processes.

    `overrides` and edits of recipe.yaml are applied by the rules of `slmkit.training.recipe.changes`. If the length
    changes, the learning rate keeps its schedule, unless `replan` spreads that over the new length.
    Raises `UserError` if there is no checkpoint, the run is running, a change is not allowed during a run, or its data
    or base model has changed.
    """
    run = RunDirectory(find_run(directory))
    try:
        recipe = load_recipe(run.recipe, overrides, reporter.say)
    except UserError:  # an override of an absent section gets a clearer message
        if prepared := recipe_at(run.described(), NOW):
            expect_obeyable(run.root, prepared, of_absent_sections(prepared, overrides), overrides)
        raise
    check_trackers(recipe.train.report_to)
    device = find_device(recipe.train.device, recipe.train.precision)
    with join(device, recipe.train.ddp_timeout) as group, contextlib.ExitStack() as held:
        reporter = reporter if group.is_main else SILENCE
        if group.is_main:
            held.enter_context(mark_running(run.root))
            opened = go_on(run, recipe, device, group, reporter, overrides, replan)
            group.from_main(True)
        else:
            group.from_main(True)
            opened = open_run(run, device, group)
        if finished := group.from_main(_finished(opened)):
            reporter.say(finished)
            return run
        opened.train(resume=True)
    return run


def go_on(
    run: RunDirectory,
    recipe: Recipe,
    device: Device,
    group: Group,
    reporter: Reporter,
    overrides: Sequence[str] = (),
    replan: bool = False,
) -> PreparedRun:
    """The run with its edited recipe; on rank 0 only. Prepares the data if the run was stopped before that."""
    if not run.environment.is_file():
        reporter.say(f"{run.root}: was stopped before its data was ready; preparing it again")
        return build_run(run, recipe, device, group, reporter, force=False)
    before = recipe_at(run.described(), NOW)
    if before is not None:
        expect_obeyable(run.root, before, changes_between(before, recipe), overrides)
    opened = open_run(run, device, group, reporter, recipe)
    expect_the_same(opened)
    if before is not None:
        _apply_changes(opened, before, replan)
    opened.expect_evaluations()
    reporter.say(opened.summary())
    return opened


def _apply_changes(opened: PreparedRun, before: Recipe, replan: bool) -> None:
    """Apply, report and record the changes since the recipe `before`. Raises `UserError` for one not allowed."""
    context, rows_per_step = opened.context, opened.parts.batches.rows_per_step
    run, reporter, world, step = context.run, context.reporter, context.group.world, context.run.newest_step()
    plan_before = context.plan(opened.parts.batches, before)
    if replan or any(map(is_of_length, changes_between(before, context.recipe))):
        _change_length(opened, before, plan_before, step, replan)
    changes = changes_between(before, context.recipe)
    if changes:
        reporter.say(f"from step {step + 1} on: {', '.join(map(str, changes))}")
    ranks = run.described().get(PROCESSES, 1)
    if ranks != world:
        changes.append(Change(PROCESSES, ranks, world))
    share = -(-rows_per_step // world)  # rows per process
    was, now = (min(plan.rows_per_micro_batch, share) for plan in (plan_before, opened.plan))
    if draws_by_process(context.recipe, context.config) and (ranks != world or was != now):
        reporter.warn(
            "dropout and sampled answers depend on how rows are split, which has changed: the results will differ "
            "from those of an uninterrupted run by more than rounding"
        )
    if changes:
        run.change(context.recipe, changes, step)
        run.add(**{PROCESSES: world})


def _change_length(opened: PreparedRun, before: Recipe, plan_before: Plan, step: int, replan: bool) -> None:
    """Let the learning rate keep its previous schedule, or with `replan` or before the first step spread it over the
    new length; and say so.

    `step`: the steps done. Raises `UserError` for a length that the run has passed.
    """
    context, spread = opened.context, opened.plan
    train, steps = context.recipe.train, spread.steps
    if steps < step:
        key = _length_key(train)
        raise UserError(
            f"{context.run.root}: step {step} is done, and train.{key} would end the run at step {steps}: raise it"
        )
    was, over = before.train.lr_schedule_steps, train.lr_schedule_steps
    if replan or not step:
        over = None if over == was else over
    elif over == was:
        over = was or plan_before.steps
    over = None if over == steps else over
    train = train.model_copy(update={"lr_schedule_steps": over})
    context.recipe = context.recipe.model_copy(update={"train": train})
    opened.plan = context.plan(opened.parts.batches)
    old, new, anew = (train.learning_rate * plan.schedule(step) for plan in (plan_before, opened.plan, spread))
    if over is None:
        would_be = f", where it would have been {old:.3g}" if step else ""
        line = f"is planned anew over {steps} steps: {new:.3g} at the next step{would_be}"
    else:
        line = (
            f"keeps to its schedule over {over} steps: {new:.3g} at the next step (--replan would spread it over all "
        )
        line += f"{steps}: {anew:.3g})"
    context.reporter.say(f"the learning rate {line}")


def _length_key(train: TrainSettings) -> str:
    """The setting that says how long a run is."""
    return next((name for name in LENGTHS if getattr(train, name) is not None), "num_train_epochs")


def expect_the_same(prepared: PreparedRun) -> None:
    """Raises `UserError` for the first fingerprint that differs from the run's start."""
    run, corpus, found = prepared.context.run, prepared.context.corpus, fingerprints_of(prepared)
    known = run.described().get("fingerprints", {})
    for what, fingerprint in found.items():
        if what != PREPARED and known.get(what, fingerprint) != fingerprint:
            raise UserError(
                f"{run.root}: {what} has changed since the run began: restore it, or "
                f"start a new run: slm train {run.root}/recipe.yaml"
            )
    for shards in (*corpus.train, corpus.validation):
        if PREPARED in known and shards.changed_at() > known[PREPARED]:
            shards.verify()


def draws_by_process(recipe: Recipe, config: SLMConfig) -> bool:
    """Whether random numbers of a step depend on the number of processes."""
    dropout = max(config.hidden_dropout, config.attention_dropout, recipe.lora.lora_dropout if recipe.lora else 0.0)
    return dropout > 0 or recipe.objective == "grpo"


def _finished(opened: PreparedRun) -> str | None:
    """That the run is finished, and how to train it longer; None if it is not.

    Raises `UserError` if all its checkpoints are damaged.
    """
    run, plan, train = opened.context.run, opened.plan, opened.context.recipe.train
    step, ended = run.newest_step(), run.described().get("finished") or {}
    ended_early = step == ended.get("step") and step < ended["steps"] and plan.patience == ended["patience"]
    ended_early &= ended.get("metric", "validation_loss") == plan.goal.metric
    if step < plan.steps and not ended_early:
        return None
    newest = newest_intact(run.checkpoints, lambda line: None)
    if newest is None or step_of(newest) != step:
        return None
    if step < plan.steps and train.early_stopping_patience is None:
        return f"{run.root}: finished at step {step} of {plan.steps}, where its data ended"
    key = "early_stopping_patience" if step < plan.steps else _length_key(train)
    longer = f"slm resume {run.root} train.{key}={2 * (getattr(train, key) or 1):g}"
    return f"{run.root}: finished at step {step}; to train longer: {longer}"


def replay_run(directory: str | Path, step: int, reporter: Reporter) -> Replay:
    """Repeat step `step` of a run with hooks on every module. Nothing in the run is changed.

    Raises `UserError` if there is no such run or step.
    """
    run = RunDirectory(find_run(directory))
    recipe = recipe_at(run.described(), step) or load_recipe(run.recipe)
    is_new = not any(step_of(path) < step for path in complete_checkpoints(run.checkpoints))
    prepared = open_run(run, find_device(recipe.train.device, recipe.train.precision), recipe=recipe, is_new=is_new)
    if not 1 <= step <= prepared.plan.steps:
        raise UserError(f"--step {step}: the run has steps 1 to {prepared.plan.steps}")
    recorded, recorded_batch = read_record(run.records, step)
    recorded = recorded or next((line for line in run.metrics.comparable() if line["step"] == step), None)
    context = prepared.context
    state = fresh_state(recipe, context.model, context.device)
    base = newest_intact(run.checkpoints, reporter.warn, lambda path: step_of(path) < step)
    if base is None:
        reporter.say(f"there is no checkpoint before step {step}: repeating all steps from the first")
    else:
        load_checkpoint(base, state, context.files)
        reporter.say(f"starting from {base.name}: {step - 1 - state.step:,} steps to repeat before step {step}")
    if recorded is not None:  # a rollback after that checkpoint lowered the learning rate
        state.guard.rollbacks = recorded.get("rollbacks", 0)
    parts, plan, decode = prepared.parts, prepared.plan, context.corpus.tokenizer.decode
    with training_progress("replay", step - 1) as progress:
        hooks = (Every(1, progress),)
        return replay_step(state, parts.objective, parts.batches, plan, step, recorded, recorded_batch, decode, hooks)
