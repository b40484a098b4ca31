"""`train_recipe` and `resume_run`: whole runs from a recipe."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from slmkit.adapt.load import load_model
from slmkit.config import UserError
from slmkit.data.prepare.corpus import build_corpus, open_corpus
from slmkit.data.stream import DocumentRows
from slmkit.device import Device, find_device
from slmkit.evaluation import validation_loss
from slmkit.evaluation.loss import LossReport
from slmkit.find import find_model_directory
from slmkit.hub import spelled
from slmkit.model.config import TRAINING_FIELDS, SLMConfig
from slmkit.model.files.adapter_directory import config_directory, is_adapter
from slmkit.model.files.find import find_run
from slmkit.training.checkpoints.checkpoint import complete_checkpoints, kept_in
from slmkit.training.distributed import Group, join
from slmkit.training.logging.trackers import check_trackers
from slmkit.training.loop import StopRequested
from slmkit.training.recipe.changes import NOW, changes_between, expect_obeyable, of_absent_sections, recipe_at
from slmkit.training.recipe.checks import expect_a_model, unlikely, without_effect
from slmkit.training.recipe.recipe import ModelSettings, Recipe, load_recipe
from slmkit.training.run_directory import RunDirectory, new_run_directory, run_of_job
from slmkit.workflows.context import SILENCE, Reporter
from slmkit.workflows.distill import with_the_teachers_tokenizer
from slmkit.workflows.hooks import with_prompts
from slmkit.workflows.model import at_commits, model_for, tokenizer_of_base
from slmkit.workflows.open_run import Session, open_run
from slmkit.workflows.resume import expect_the_same


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
            session = _prepare(recipe, device, group, reporter, force, held)
            group.from_main(str(session.run.root))
        else:
            session = open_run(RunDirectory(group.from_main("")), device, group)
        if not dry_run:
            resume = group.from_main(bool(complete_checkpoints(session.run.checkpoints)))
            if not resume:
                reporter.say(f"  Whole rows of the x-ray: {session.run.root / 'xray.md'}")
            session.run_to_the_end(reporter, resume, stop)
        elif group.is_main:
            shutil.rmtree(session.run.root)
            steps = f"{session.plan.steps:,} step{'' if session.plan.steps == 1 else 's'}"
            reporter.say(f"dry run: nothing was written; without --dry-run it trains {steps}")
    return session.run


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
            held.enter_context(run.held())
            session = _go_on(run, recipe, device, group, reporter, replan, overrides)
            group.from_main(True)
        else:
            group.from_main(True)
            session = open_run(run, device, group)
        if group.from_main(session.is_finished()):
            reporter.say(session.finished())
            return run
        session.run_to_the_end(reporter, resume=True)
    return run


def _go_on(
    run: RunDirectory,
    recipe: Recipe,
    device: Device,
    group: Group,
    reporter: Reporter,
    replan: bool = False,
    overrides: Sequence[str] = (),
) -> Session:
    """The session of a prepared run with its edited recipe; on rank 0 only."""
    if not run.environment.is_file():
        reporter.say(f"{run.root}: was stopped before its data was ready; preparing it again")
        return _build(run, recipe, device, group, reporter, force=False)
    prepared = recipe_at(run.described(), NOW)
    if prepared is not None:
        expect_obeyable(run.root, prepared, changes_between(prepared, recipe), overrides)
    session = open_run(run, device, group, reporter, recipe)
    expect_the_same(run, session.corpus, session.fingerprints)
    if prepared is not None:
        session.take_over(prepared, reporter, replan)
    reporter.say(session.summary())
    return session


def _prepare(
    recipe: Recipe, device: Device, group: Group, reporter: Reporter, force: bool, held: contextlib.ExitStack
) -> Session:
    """The session of a new run, or of the one that this job made before a restart."""
    found = run_of_job(recipe.output_dir)
    if found is not None:
        held.enter_context(found.held())
        reporter.say(f"{found.root}: continuing the run of this job, as its recipe.yaml says")
        return _go_on(found, load_recipe(found.recipe), device, group, reporter)
    run = new_run_directory(recipe.output_dir)
    held.enter_context(run.held())
    if run.root != Path(recipe.output_dir):
        reporter.say(
            f"{recipe.output_dir} is there already: this is a new run, in {run.root}; to go on with the first one: "
            f"slm resume {recipe.output_dir}"
        )
    try:
        run.claim(recipe)
        return _build(run, recipe, device, group, reporter, force)
    except BaseException:
        shutil.rmtree(run.root, ignore_errors=True)
        raise


def _build(run: RunDirectory, recipe: Recipe, device: Device, group: Group, reporter: Reporter, force: bool) -> Session:
    """Prepare tokenizer, data and model, and describe the run, which can be opened from then on."""
    base = kept_in(run.root / "base", find_model_directory(recipe.model.path)) if recipe.model.path else None
    if base is not None and is_adapter(base):
        is_trained = "is trained on" if recipe.lora is not None else "is folded into its model first"
        reporter.say(f"{recipe.model.path}: an adapter, which {is_trained}")
    tokenizer = tokenizer_of_base(recipe, base) if base else None
    shape = SLMConfig.from_pretrained(config_directory(base)) if base else recipe.model.build_config()
    length = recipe.train.sequence_length or shape.max_position_embeddings
    corpus = build_corpus(
        recipe.reads, recipe.data, recipe.tokenizer, recipe.seed, run.data, tokenizer, reporter, length
    )
    model, config, files = model_for(recipe, corpus.tokenizer, base)
    resolved_recipe = _resolve(with_prompts(recipe, corpus), run, config, base)
    session = Session(run, resolved_recipe, corpus, model, config, files, device, group, reporter)
    run.describe(session.recipe, device, corpus.describe())
    run.add(fingerprints=session.fingerprints)
    reporter.say(session.summary())
    for line in unlikely(session.recipe.train, session.plan.steps):
        reporter.warn(line)
    for line in session.work.report():
        reporter.say(f"training data: {line}")
    session.look(reporter, force)
    return session


@dataclass(frozen=True)
class RunFigures:
    """Losses of a run's best model on its validation text."""

    report: LossReport
    bits_per_byte: float
    perfect_loss: float | None  # nats per token of the corpus' generator, if it has one


def evaluate_run(directory: str | Path) -> RunFigures:
    """Validation losses of a pretraining run's best checkpoint, in float32, every document in full context."""
    run = RunDirectory(directory)
    decoder, config = load_model(find_model_directory(directory))
    shards = open_corpus(run.data).validation
    length = load_recipe(run.recipe).train.sequence_length or config.max_position_embeddings
    separate = load_recipe(run.recipe).data.separate_documents
    rows, device = DocumentRows(shards, length), find_device("cpu", "float32")
    report = validation_loss(decoder, rows, device, separate=separate)
    return RunFigures(report, report.bits_per_byte(shards.header.text_bytes), shards.header.perfect_loss)


def _resolve(recipe: Recipe, run: RunDirectory, config: SLMConfig, base: Path | None) -> Recipe:
    """The recipe with all values of presets written out, so that later changes of presets do not affect it."""
    model = recipe.model if base is not None else resolved(config, recipe.model.initialization)
    if base is not None:  # a run's best checkpoint may change later
        model = model.model_copy(update={"path": spelled(base)})
    return recipe.model_copy(update={"output_dir": str(run.root), "model": model})


def resolved(config: SLMConfig, initialization: str = "gpt2") -> ModelSettings:
    shape = config.model_dump(exclude=TRAINING_FIELDS)
    return ModelSettings.model_validate(shape | {"initialization": initialization})
