"""`train_recipe`: a whole run from a recipe."""

from __future__ import annotations

import contextlib
import shutil
from pathlib import Path

from slmkit.device import Device, find_device
from slmkit.training.checkpoints.checkpoint import complete_checkpoints
from slmkit.training.distributed import Group, join
from slmkit.training.logging.metrics_log import mark_running
from slmkit.training.logging.trackers import check_trackers
from slmkit.training.loop import StopRequested
from slmkit.training.recipe.checks import expect_a_model, without_effect
from slmkit.training.recipe.recipe import Recipe, load_recipe
from slmkit.training.run_directory import RunDirectory, new_run_directory, run_of_job
from slmkit.workflows.context import SILENCE, Reporter
from slmkit.workflows.distill import with_the_teachers_tokenizer
from slmkit.workflows.model import at_commits
from slmkit.workflows.open_run import PreparedRun, build_run, open_run
from slmkit.workflows.resume import go_on


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
