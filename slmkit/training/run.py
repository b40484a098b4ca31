"""A run on disk, and the hooks that fill it while the loop runs."""

from __future__ import annotations

import contextlib
import json
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from slmkit.config import UserError, to_yaml
from slmkit.data.stream import Batches
from slmkit.device import Device, keep_freed_memory
from slmkit.model import Decoder, SLMConfig
from slmkit.training import checkpoints
from slmkit.training.distributed import ALONE, Group
from slmkit.training.gauges import Gauges
from slmkit.training.loop import Every, Plan, Report, RunStopped, State, StopRequested, train
from slmkit.training.objectives import OBJECTIVES
from slmkit.training.optimizers import OPTIMIZERS
from slmkit.training.plots import plot_losses
from slmkit.training.recipe import Recipe, TrainSettings
from slmkit.training.run_log import MetricsLog, environment, mark_running
from slmkit.training.trackers import Tracker, open_trackers


class RunDirectory:
    """The names inside `runs/NAME/`."""

    def __init__(self, root: str | Path) -> None:
        self.root = Path(root)
        self.recipe = self.root / "recipe.yaml"
        self.environment = self.root / "environment.json"
        self.metrics = MetricsLog(self.root / "metrics.jsonl")
        self.plot = self.root / "loss.png"
        self.samples = self.root / "samples.md"
        self.data = self.root / "data"
        self.checkpoints = self.root / "checkpoints"
        self.latest = self.root / "latest"
        self.best = self.root / "best"

    def describe(self, recipe: Recipe, device: Device, data: dict[str, Any]) -> None:
        """Write what would repeat the run."""
        self.recipe.write_text(to_yaml(recipe), encoding="utf-8")
        content = environment() | device.describe() | {"data": data, "job": job_id()}
        self.environment.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def free_path(wanted: str | Path) -> Path:
    """`wanted`, or `wanted-2`, `-3`… where that name is taken."""
    path, number = Path(wanted), 1
    while path.exists():
        number += 1
        path = Path(f"{wanted}-{number}")
    return path


def new_run_directory(wanted: str | Path) -> RunDirectory:
    """A fresh directory of the wanted name, numbered where that is taken: no run is ever overwritten."""
    path = free_path(wanted)
    try:
        (path / "checkpoints").mkdir(parents=True)
    except OSError as error:
        raise UserError(f"{path}: cannot be made: {error}") from None
    return RunDirectory(path)


def run_of_job(wanted: str | Path) -> RunDirectory | None:
    """The run of this name that the same `torchrun` job made before it was started again, if there is one."""
    path, number = Path(wanted), 1
    while job_id() is not None and path.exists():
        run = RunDirectory(path)
        with contextlib.suppress(OSError, ValueError):
            if json.loads(run.environment.read_text(encoding="utf-8")).get("job") == job_id():
                return run
        number += 1
        path = Path(f"{wanted}-{number}")
    return None


def job_id() -> str | None:
    """What `torchrun --rdzv-id` calls the job; None without one."""
    name = os.environ.get("TORCHELASTIC_RUN_ID", "none")
    return None if name == "none" else name


def find_model_directory(path: str | Path) -> Path:
    """A model directory as it is; of a run its best checkpoint, else its latest. Raises `UserError` for neither."""
    return _find(path, "config.json")


def find_tokenizer_directory(path: str | Path) -> Path:
    """The directory with the `tokenizer.json` of a tokenizer, model or run. Raises `UserError` for neither."""
    return _find(path, "tokenizer.json")


def _find(path: str | Path, name: str) -> Path:
    path = Path(path)
    for candidate in (path, path / "best", path / "latest"):
        if (candidate / name).is_file():
            return candidate
    what = "no such directory" if not path.exists() else "neither a model directory nor a run with a checkpoint"
    raise UserError(f"{path}: {what}; expected what `slm train` or transformers' save_pretrained writes")


def fit(
    run: RunDirectory,
    recipe: Recipe,
    model: Decoder,
    config: SLMConfig,
    stream: Batches,
    plan: Plan,
    *,
    companions: checkpoints.Companions,
    hooks: Sequence[Every] = (),
    perfect_loss: float | None = None,
    resume: bool = False,
    warn: Callable[[str], None] = print,
) -> State:
    """Train `model` as the recipe says, and leave a run on disk. Returns the state after the last step.

    `hooks` come from outside (validation, samples, progress) and fire before the report is logged, so that what they
    add to it is logged too. With `resume` it goes on from the newest intact checkpoint. Raises `RunStopped` when a
    signal ended the run early: its last step has been saved.
    """
    if plan.device.torch_device.type == "cpu":
        keep_freed_memory()
    model.to(plan.device.torch_device)
    settings = recipe.train
    model.recompute_every = settings.gradient_checkpointing
    group = plan.group
    group.share(model, settings.parallel, plan.device.torch_device)
    state = State(model, OPTIMIZERS[settings.optimizer](model, settings), seed=recipe.seed)
    if resume:
        newest = group.from_main(str(checkpoints.newest_intact(run.checkpoints, warn)) if group.is_main else "")
        checkpoints.load_checkpoint(Path(newest), state)
    if group.is_main:
        run.metrics.rewind(state.step)

    saver = Saver(run, config, companions, settings.save_total_limit, group)
    eval_steps = evaluation_interval(settings, plan.steps)
    length = settings.sequence_length or config.max_position_embeddings
    gauges: tuple[Every, ...] = ()
    if group.is_main:
        gauge = Gauges(model, plan.device, stream.rows_per_step, length, state.tokens, run.metrics.seconds())
        gauges = (Every(1, gauge.update),)
    with (
        mark_running(run.root) if group.is_main else contextlib.nullcontext(),
        open_trackers(
            settings.report_to if group.is_main else (), run.root, recipe.model_dump(mode="json"), state.step
        ) as trackers,
        stop_on_signals() as stop,
    ):
        logger = Logger(run, perfect_loss, trackers)
        own_hooks = (
            Every(settings.logging_steps, logger.log),
            Every(eval_steps, logger.log),
            Every(eval_steps, logger.draw),
            Every(settings.save_steps or eval_steps, saver.save, on_all_ranks=True),
        )
        all_hooks = (*gauges, *hooks, *own_hooks)
        train(state, OBJECTIVES[recipe.objective], stream, plan, all_hooks, stop)
    if state.step < plan.steps and not stream.has(state.step):
        warn(f"the data ended after step {state.step} of {plan.steps}, as data.when_exhausted: stop has it")
    elif state.step < plan.steps:
        raise RunStopped(f"stopped after step {state.step} of {plan.steps}; go on with: slm resume {run.root}")
    return state


def make_plan(
    settings: TrainSettings, rows_in_epoch: int, sequence_length: int, device: Device, group: Group = ALONE
) -> Plan:
    """What the loop needs of the settings, with everything counted out."""
    steps = settings.total_steps(rows_in_epoch, sequence_length)
    return Plan(
        steps=steps,
        rows_per_micro_batch=settings.rows_per_micro_batch(sequence_length),
        max_grad_norm=settings.max_grad_norm,
        schedule=settings.schedule(steps),
        device=device,
        group=group,
    )


def evaluation_interval(settings: TrainSettings, steps: int) -> int:
    return settings.eval_steps or max(1, steps // 10)


class Logger:
    """Appends to `metrics.jsonl`, tells the trackers, and redraws `loss.png`."""

    def __init__(self, run: RunDirectory, perfect_loss: float | None, trackers: Sequence[Tracker] = ()) -> None:
        self.run, self.perfect_loss, self.trackers = run, perfect_loss, trackers
        self.last_step = -1

    def log(self, state: State, report: Report) -> None:
        """A line for the step, once, whichever interval asks for it: no validation goes unrecorded."""
        if state.step != self.last_step:
            self.run.metrics.append(report)
            for tracker in self.trackers:
                tracker.log(report)
        self.last_step = state.step

    def draw(self, state: State, report: Report) -> None:
        plot_losses(self.run.metrics.read(), self.run.plot, self.run.root.name, self.perfect_loss)


class Saver:
    """Writes checkpoints and moves `latest` and `best` to them once they are whole."""

    def __init__(
        self,
        run: RunDirectory,
        config: SLMConfig,
        companions: checkpoints.Companions,
        save_total_limit: int,
        group: Group = ALONE,
    ) -> None:
        self.run, self.config, self.companions, self.limit = run, config, companions, save_total_limit
        self.group = group

    def save(self, state: State, report: Report) -> None:
        loss = report.get("validation_loss")
        is_best = loss is not None and loss < state.best.get("validation_loss", float("inf"))
        if loss is not None and is_best:
            state.best = {"step": state.step, "validation_loss": loss}
        path = checkpoints.save_checkpoint(state, self.config, self.run.checkpoints, self.companions, self.group)
        if not self.group.is_main:
            return
        checkpoints.point_link(self.run.latest, path)
        if is_best:
            checkpoints.point_link(self.run.best, path)
        keep = {checkpoints.checkpoint_name(int(state.best["step"]))} if state.best else set()
        checkpoints.keep_newest(self.run.checkpoints, self.limit, keep)


@contextlib.contextmanager
def stop_on_signals() -> Iterator[StopRequested]:
    """Ctrl-C and SIGTERM end the run after the step it is in, with a checkpoint; a second Ctrl-C ends it at once.

    A second SIGTERM does not: cluster managers send it to every process, and launchers pass it on once more.
    """
    stop = StopRequested()

    def request(number: int, frame: Any) -> None:
        if stop.is_set and number == signal.SIGINT:
            raise KeyboardInterrupt
        stop.is_set = True

    try:
        before = {number: signal.signal(number, request) for number in (signal.SIGINT, signal.SIGTERM)}
    except ValueError:  # not in the main thread: whoever runs us there has signals of their own
        yield stop
        return
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
