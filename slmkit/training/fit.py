"""`fit`: train a model by its recipe and write the run directory."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from torch.optim import Optimizer

from slmkit.config import UserError
from slmkit.data.stream import Batches
from slmkit.device import Device, keep_freed_memory
from slmkit.model.config import SLMConfig
from slmkit.model.decoder import Decoder
from slmkit.training.checkpoints import checkpoint as checkpoints
from slmkit.training.checkpoints.flight_recorder import FlightRecorder
from slmkit.training.checkpoints.model_files import ModelFiles, WholeModel
from slmkit.training.checkpoints.saver import Saver, best_checkpoint, point_links
from slmkit.training.compilation import compile_blocks, compile_pays, uncompiled
from slmkit.training.distributed import ALONE, Group
from slmkit.training.estimate.memory import MemoryProfile, meta_model_of
from slmkit.training.estimate.micro_batch import lack_of_memory_explained
from slmkit.training.guards import Diverged, GuardSettings
from slmkit.training.logging.disk_hooks import Logger, hooks_on_disk
from slmkit.training.logging.throughput import ThroughputMonitor
from slmkit.training.logging.trackers import open_trackers
from slmkit.training.loop import Every, Plan, RunStopped, State, StopRequested, note_improvement, train
from slmkit.training.objective import Objective, next_token
from slmkit.training.optimizers.choose import make_optimizers, with_peaks
from slmkit.training.precision import LossScale, to_weight_dtype
from slmkit.training.recipe.recipe import Recipe, TrainSettings
from slmkit.training.run_directory import RunDirectory


def fit(
    run: RunDirectory,
    recipe: Recipe,
    model: Decoder,
    config: SLMConfig,
    stream: Batches,
    plan: Plan,
    *,
    extra_files: checkpoints.ExtraFiles,
    objective: Objective = next_token,
    inventory: MemoryProfile | None = None,
    files: ModelFiles | None = None,
    hooks: Sequence[Every] = (),
    perfect_loss: float | None = None,
    resume: bool = False,
    warn: Callable[[str], None] = print,
    optimizer: Optimizer | None = None,
    on_save: Callable[[State, Path], Any] | None = None,
    stop: StopRequested | None = None,
) -> State:
    """Train `model` by the recipe and write the run directory. Returns the state after the last step.

    `hooks` (validation, samples, progress) are called before the report is logged and may add to it. `inventory`
    describes what is in memory, `files` which tensors of the model a checkpoint holds (default: all). With `resume`,
    training continues from the newest intact checkpoint. `optimizer` replaces the recipe's; `on_save` is called on all
    ranks with each complete checkpoint. Raises `RunStopped` when a signal or `stop` ended the run, after a checkpoint.
    """
    settings, group, inventory = recipe.train, plan.group, inventory or MemoryProfile(meta_model_of(model))
    files = files or WholeModel(config)
    state = fresh_state(recipe, model, plan.device, group, optimizer)
    _begin(run, state, plan, files, resume, warn)
    recorder = FlightRecorder(run.records, recipe.seed, warn, group)
    saver = Saver(run, files, extra_files, settings.save_total_limit, warn, recorder.needed_checkpoints, group)
    length = settings.sequence_length or config.max_position_embeddings
    interval = settings.evaluation_interval(plan.steps)
    rows = recipe.full(stream.rows_per_step)
    throughput = ThroughputMonitor(model, plan.device, rows, length, state.tokens, run.metrics.seconds())
    with (
        run.held() if group.is_main else contextlib.nullcontext(),
        open_trackers(
            settings.report_to if group.is_main else (), run.root, recipe.model_dump(mode="json"), state.step
        ) as trackers,
        stop_on_signals(stop) as asked,
        saver,
        lack_of_memory_explained(inventory, settings, plan.rows_per_micro_batch, length, plan.device),
    ):
        logger = Logger(run, perfect_loss, warn, trackers)
        hooks = (Every(1, throughput.update), *hooks, Every(1, note_improvement, on_all_ranks=True))
        all_hooks = (*hooks, *hooks_on_disk(settings, interval, logger, saver, on_save))
        while True:
            try:
                train(state, objective, stream, plan, uncompiled(all_hooks, model), asked, recorder)
                break
            except Diverged as error:
                saver.wait()
                roll_back(run, state, plan, error, warn, files)
                logger.last_step = -1
    _warn_at_the_end(run, state, plan, stream, warn)
    return state


def _begin(
    run: RunDirectory, state: State, plan: Plan, files: ModelFiles, resume: bool, warn: Callable[[str], None]
) -> None:
    """Load the newest intact checkpoint if the run is resumed, and drop what was logged after it."""
    if resume and (newest := newest_intact(run, plan, warn)) is not None:
        checkpoints.load_checkpoint(newest, state, files)
    if plan.group.is_main:
        if state.step:
            point_links(run, run.checkpoints / checkpoints.checkpoint_name(state.step), best_checkpoint(state))
        run.rewind(state.step)
        checkpoints.clear_leftovers(run.checkpoints)


def _warn_at_the_end(run: RunDirectory, state: State, plan: Plan, stream: Batches, warn: Callable[[str], None]) -> None:
    """Warn that nothing was learned, or why the run ended early. Raises `RunStopped` if it was stopped."""
    if not state.guard.has_learned and state.guard.idle:
        warn(f"{run.root}: {state.guard.idle_report()}")
    if state.step >= plan.steps:
        pass
    elif plan.is_stalled(state):
        warn(
            f"ended after step {state.step} of {plan.steps}: the validation loss has not fallen in "
            f"{state.evaluations['in_vain']} evaluations (train.early_stopping_patience)"
        )
    elif stream.has(state.step):
        raise RunStopped(f"stopped after step {state.step} of {plan.steps}; go on with: slm resume {run.root}")
    else:
        warn(
            f"the data ended after step {state.step} of {plan.steps}: a source ran out, and data.when_exhausted does "
            "not repeat it; the run is complete, with a checkpoint"
        )
    if plan.group.is_main:
        run.add(finished={"step": state.step, "steps": plan.steps, "patience": plan.patience})


def newest_intact(
    run: RunDirectory, plan: Plan, warn: Callable[[str], None], wanted: Callable[[Path], bool] | None = None
) -> Path | None:
    """The checkpoint to resume from, found by rank 0 and broadcast to all ranks."""
    found = None
    if plan.group.is_main:
        found = checkpoints.newest_intact(run.checkpoints, warn, *([wanted] if wanted else []))
    return plan.group.from_main(found)


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


def roll_back(
    run: RunDirectory, state: State, plan: Plan, why: Diverged, warn: Callable[[str], None], files: ModelFiles
) -> None:
    """Return the run to the last checkpoint before the refused steps, with a lower learning rate.

    Raises `UserError` if the recipe says to stop, all rollbacks are used up, or there is no checkpoint.
    """
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
    good = newest_intact(run, plan, warn, checkpoints.saved_while_all_was_well)
    if good is None:
        raise UserError(f"{report}; there is no checkpoint yet to go back to: lower train.learning_rate")
    checkpoints.load_checkpoint(good, state, files)
    state.guard.rollbacks, state.guard.skipped = before.rollbacks + 1, before.skipped
    if not plan.group.is_main:
        return
    # This order lets a run that crashes in between resume from the same checkpoint.
    point_links(run, good, best_checkpoint(state))
    for later in checkpoints.complete_checkpoints(run.checkpoints):
        if checkpoints.step_of(later) > state.step:
            checkpoints.delete(later)
    run.rewind(state.step)
    ratio = state.guard.learning_rate_ratio(settings)
    warn(f"{why}, steps {first} to {first + before.in_a_row - 1}; back to step {state.step}, learning rate × {ratio:g}")


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
