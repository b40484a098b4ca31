"""`fit`: train the model of a `RunContext` by its recipe and write the run directory."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch.optim import Optimizer

from slmkit.config import UserError
from slmkit.data.stream import Batches
from slmkit.device import Device, keep_freed_memory
from slmkit.model.config import SLMConfig
from slmkit.model.decoder import Decoder
from slmkit.training.checkpoints import checkpoint as checkpoints
from slmkit.training.checkpoints.checkpoint import ModelFiles
from slmkit.training.checkpoints.flight_recorder import FlightRecorder
from slmkit.training.checkpoints.saver import Saver, best_checkpoint, point_links
from slmkit.training.compilation import (
    LEAST_FLOPS,
    compile_blocks,
    compile_pays,
    compiles,
    found_to_pay,
    is_compiled,
    uncompiled,
)
from slmkit.training.distributed import ALONE, Group
from slmkit.training.estimate.memory import MemoryProfile, meta_model_of
from slmkit.training.estimate.micro_batch import lack_of_memory_explained
from slmkit.training.guards import Diverged, GuardSettings
from slmkit.training.logging.logger import Logger, StepFlops, ThroughputMonitor, open_trackers
from slmkit.training.loop import (
    Every,
    Goal,
    Plan,
    Report,
    RunStopped,
    Stage,
    State,
    StopRequested,
    train,
)
from slmkit.training.objective import Objective, next_token
from slmkit.training.optimizers.choose import make_optimizers, with_peaks
from slmkit.training.precision import LossScale, to_weight_dtype
from slmkit.training.recipe.recipe import Recipe, TrainSettings
from slmkit.training.run_directory import RunDirectory


@dataclass(kw_only=True)
class RunContext:
    """Model, recipe, device and directory of a run, built by `prepared_run` from a recipe or by `SLMTrainer`.

    `extra_files` writes the tokenizer into the directory of each checkpoint.
    """

    run: RunDirectory
    recipe: Recipe
    model: Decoder
    config: SLMConfig
    files: ModelFiles  # the format of a checkpoint: the whole model, or an adapter
    extra_files: checkpoints.ExtraFiles
    device: Device
    group: Group = ALONE
    warn: Callable[[str], None] = print

    @property
    def length(self) -> int:
        """Tokens of a row."""
        return self.recipe.train.sequence_length or self.config.max_position_embeddings

    def plan(self, batches: Batches, recipe: Recipe | None = None) -> Plan:
        """The plan of the recipe, or of another with the same batches."""
        recipe = recipe or self.recipe
        tokens_of_row = recipe.tokens_of_row(self.length)
        return make_plan(
            recipe.train,
            batches.rows_in_epoch,
            tokens_of_row,
            self.device,
            recipe.guard,
            batches.total_rows,
            self.group,
        )


def fit(
    context: RunContext,
    batches: Batches,
    objective: Objective,
    plan: Plan,
    hooks: Sequence[Every] = (),
    *,
    resume: bool = False,
    memory: MemoryProfile | None = None,
    perfect_loss: float | None = None,
    optimizer: Optimizer | None = None,
    on_save: Callable[[State, Path], Any] | None = None,
    stop: StopRequested | None = None,
) -> State:
    """Train the model by the recipe and write the run directory. Returns the state after the last step.

    `hooks` are called besides those that measure, log and save. With `resume`, training continues from the newest
    intact checkpoint. `memory` describes what is in memory besides the model, `perfect_loss` (nats per token) is drawn
    into the plot, `optimizer` replaces the recipe's, and `on_save` is called on all ranks with each complete
    checkpoint. Raises `RunStopped` when a signal or `stop` ended the run, after a checkpoint.
    """
    run, settings, group, warn = context.run, context.recipe.train, context.group, context.warn
    memory = memory or MemoryProfile(meta_model_of(context.model))
    state = fresh_state(context.recipe, context.model, context.device, group, optimizer)
    if is_compiled(context.model) and objective is next_token and group.world == 1:
        compiles(context.model, memory.batch(plan.rows_per_micro_batch, context.length), context.device, warn)
    _begin(context, state, resume)
    recorder = FlightRecorder(run.records, context.recipe.seed, warn, group)
    keep = recorder.needed_checkpoints
    saver = Saver(run, context.files, context.extra_files, settings.save_total_limit, warn, keep, group, plan.goal)
    reported_to = settings.report_to if group.is_main else ()
    sequences = settings.rows_per_micro_batch(context.length)  # at once; a pair is two
    with (
        open_trackers(reported_to, run.root, context.recipe.model_dump(mode="json"), state.step) as trackers,
        stop_on_signals(stop) as asked,
        saver,
        lack_of_memory_explained(memory, settings, sequences, context.length, plan.device),
    ):
        logger = Logger(run, perfect_loss, warn, trackers)
        own_hooks = _hooks(context, batches, plan, state, logger, saver, on_save)
        all_hooks = uncompiled([*hooks, *own_hooks], context.model)
        while True:
            try:
                train(state, objective, batches, plan, all_hooks, asked, recorder.note)
                break
            except Diverged as error:
                saver.wait()
                roll_back(context, state, plan, error)
                logger.last_step = -1
    _warn_at_the_end(context, state, plan, batches)
    return state


def decide_whether_to_compile(context: RunContext, objective: Objective, memory: MemoryProfile, plan: Plan) -> None:
    """Replace `compile: auto` on a CPU by what is measured to be faster, if the new run is long enough.

    Several processes would have to agree on what they measured: their runs stay plain.
    """
    settings, model, length = context.recipe.train, context.model, context.length
    is_alone = objective is next_token and context.device.torch_device.type == "cpu" and context.group.world == 1
    if settings.compile != "auto" or not is_alone:
        return
    rows = settings.rows_per_step(length)
    positions = round(plan.steps * rows * length)
    if StepFlops(model, length).of_step(positions, positions) < LEAST_FLOPS:
        return
    batch, passes = memory.batch(plan.rows_per_micro_batch, length), plan.steps * rows / plan.rows_per_micro_batch
    pays = found_to_pay(model, batch, context.device, passes, context.warn)
    context.recipe = context.recipe.model_copy(update={"train": settings.model_copy(update={"compile": pays})})


def _hooks(
    context: RunContext,
    batches: Batches,
    plan: Plan,
    state: State,
    logger: Logger,
    saver: Saver,
    on_save: Callable[[State, Path], Any] | None,
) -> Iterator[Every]:
    """The hooks of every run: throughput, the count for early stopping, the log and checkpoints."""
    settings = context.recipe.train
    rows, seconds = context.recipe.full(batches.rows_per_step), context.run.metrics.seconds()
    monitor = ThroughputMonitor(context.model, context.device, rows, context.length, state.tokens, seconds)
    evaluated = settings.evaluation_interval(plan.steps)
    tasks_run = settings.tasks_interval(plan.steps)
    saved = settings.save_steps or (tasks_run if settings.is_best_by_task else evaluated)

    yield Every(1, monitor.update, Stage.MEASURE)
    yield Every(1, plan.goal.note, Stage.COUNT, on_all_ranks=True)
    yield Every(1, logger.log_if_skipped, Stage.LOG)
    yield Every(settings.logging_steps, logger.log, Stage.LOG)
    yield Every(evaluated, logger.log_and_draw, Stage.LOG)
    if settings.eval_tasks and tasks_run % evaluated:
        yield Every(tasks_run, logger.log_and_draw, Stage.LOG)
    yield Every(saved, saver.save, Stage.SAVE, on_stop=True, on_all_ranks=True)
    if on_save is not None:

        def call_back(state: State, report: Report) -> Any:
            saver.wait()
            return on_save(state, context.run.checkpoints / checkpoints.checkpoint_name(state.step))

        yield Every(saved, call_back, Stage.SAVE, on_stop=True, on_all_ranks=True)
    yield Every(1, saver.check, Stage.SAVE)


def _begin(context: RunContext, state: State, resume: bool) -> None:
    """Load the newest intact checkpoint if the run is resumed, and drop what was logged after it."""
    run = context.run
    if resume and (newest := _newest_intact(context)) is not None:
        checkpoints.load_checkpoint(newest, state, context.files)
    if context.group.is_main:
        if state.step:
            point_links(run, run.checkpoints / checkpoints.checkpoint_name(state.step), best_checkpoint(state))
        run.rewind(state.step)
        checkpoints.clear_leftovers(run.checkpoints)


def _warn_at_the_end(context: RunContext, state: State, plan: Plan, batches: Batches) -> None:
    """Warn that nothing was learned, or why the run ended early. Raises `RunStopped` if it was stopped."""
    run, warn = context.run, context.warn
    if not state.guard.has_learned and state.guard.idle:
        warn(f"{run.root}: {state.guard.idle_report()}")
    place = f"step {state.step} of {plan.steps}"
    if state.step < plan.steps and plan.is_stalled(state):
        what = "the validation loss has not fallen"
        if plan.goal != Goal():
            what = f"{plan.goal.metric} has not {'risen' if plan.goal.greater_is_better else 'fallen'}"
        warn(
            f"ended after {place}: {what} in {state.evaluations['in_vain']} evaluations (train.early_stopping_patience)"
        )
    elif state.step < plan.steps and batches.has(state.step):
        raise RunStopped(f"stopped after {place}; go on with: slm resume {run.root}")
    elif state.step < plan.steps:
        warn(
            f"the data ended after {place}: a source ran out, and data.when_exhausted does not repeat it; "
            "the run is complete, with a checkpoint"
        )
    if context.group.is_main:
        run.add(
            finished={"step": state.step, "steps": plan.steps, "patience": plan.patience, "metric": plan.goal.metric}
        )


def _newest_intact(context: RunContext, wanted: Callable[[Path], bool] = lambda checkpoint: True) -> Path | None:
    """The newest checkpoint that is complete and wanted, found by rank 0 for all ranks."""
    group = context.group
    found = checkpoints.newest_intact(context.run.checkpoints, context.warn, wanted) if group.is_main else None
    return group.from_main(found)


def fresh_state(
    recipe: Recipe, model: Decoder, device: Device, group: Group = ALONE, optimizer: Optimizer | None = None
) -> State:
    """The state before the first step."""
    if device.torch_device.type == "cpu":
        keep_freed_memory()
    model.to(device.torch_device)
    to_weight_dtype(model, device)
    model.recompute_every = recipe.train.gradient_checkpointing
    if compile_pays(recipe.train.compile, device):
        compile_blocks(model)
    group.share(model, recipe.train.parallel, device.torch_device)
    optimizers = make_optimizers(model, recipe.train, device) if optimizer is None else [with_peaks(optimizer)]
    return State(model, optimizers, seed=recipe.seed, loss_scale=LossScale.of(device))


def roll_back(context: RunContext, state: State, plan: Plan, why: Diverged) -> None:
    """Return the run to the last checkpoint before the refused steps, with a lower learning rate.

    Raises `UserError` if the recipe says to stop, all rollbacks are used up, or there is no checkpoint.
    """
    run = context.run
    first = state.step - state.guard.in_a_row + 1
    report = (
        f"{run.root}: {why}, steps {first} to {state.step}; the weights are those of step {first - 1}. "
        f"See what happened with: slm replay {run.root} --step {first}"
    )
    settings, before = plan.guard, state.guard
    if settings.on_divergence == "stop":
        raise UserError(f"{report}; then lower train.learning_rate, or set guard.on_divergence=rollback")
    if before.rollbacks >= settings.max_rollbacks:
        raise UserError(f"{report}; it was rolled back {before.rollbacks} times (guard.max_rollbacks) without success")
    good = _newest_intact(context, checkpoints.saved_while_all_was_well)
    if good is None:
        raise UserError(f"{report}; there is no checkpoint yet to go back to: lower train.learning_rate")
    checkpoints.load_checkpoint(good, state, context.files)
    state.guard.rollbacks, state.guard.skipped = before.rollbacks + 1, before.skipped
    if not context.group.is_main:
        return
    # This order lets a run that crashes in between resume from the same checkpoint.
    point_links(run, good, best_checkpoint(state))
    for later in checkpoints.complete_checkpoints(run.checkpoints):
        if checkpoints.step_of(later) > state.step:
            checkpoints.delete(later)
    run.rewind(state.step)
    ratio = state.guard.learning_rate_ratio(settings)
    last = first + before.in_a_row - 1
    context.warn(f"{why}, steps {first} to {last}; back to step {state.step}, learning rate × {ratio:g}")


def make_plan(
    settings: TrainSettings,
    rows_in_epoch: int | None,
    sequence_length: int,
    device: Device,
    guard: GuardSettings | None = None,
    total_rows: int | None = None,
    group: Group = ALONE,
) -> Plan:
    """The loop's `Plan`, computed from the settings.

    `total_rows`: rows of the data if known; they bound the number of steps.
    """
    steps = settings.total_steps(rows_in_epoch, sequence_length)
    if total_rows is not None:
        steps = max(1, min(steps, total_rows // settings.rows_per_step(sequence_length)))
    return Plan(
        steps=steps,
        rows_per_micro_batch=settings.rows_per_micro_batch(sequence_length),
        max_grad_norm=settings.max_grad_norm,
        schedule=settings.schedule(steps),
        device=device,
        guard=guard or GuardSettings(),
        group=group,
        patience=settings.early_stopping_patience,
        goal=Goal(settings.metric_for_best_model),
    )


@contextlib.contextmanager
def stop_on_signals(stop: StopRequested | None = None) -> Iterator[StopRequested]:
    """Context manager in which Ctrl-C and SIGTERM end the run after the current step; a second Ctrl-C ends it at once.

    A second SIGTERM does not: cluster managers send it to every process, and launchers forward it again.
    """
    stop = stop or StopRequested()

    def request(number: int, frame: Any) -> None:
        if stop.is_set and number == signal.SIGINT:
            raise KeyboardInterrupt
        stop.is_set = True

    try:
        before = {number: signal.signal(number, request) for number in (signal.SIGINT, signal.SIGTERM)}
    except ValueError:  # not in the main thread, where Python allows no signal handlers
        yield stop
        return
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
