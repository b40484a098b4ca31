"""A whole run from its recipe: what `slm train`, `slm resume` and `slm quickstart` stand on."""

from __future__ import annotations

import shutil
from dataclasses import dataclass, replace
from pathlib import Path

from rich.console import Console

from slmkit.adapt.load import load_model
from slmkit.api.distill import with_the_teachers_tokenizer
from slmkit.api.material import Material
from slmkit.api.models import at_commits, model_for
from slmkit.api.prompts import with_prompts
from slmkit.api.reporter import SILENCE, Reporter
from slmkit.api.vocabulary import tokenizer_of_base
from slmkit.api.work import expect_a_model, inventory_of, work_of
from slmkit.api.xray import look
from slmkit.config import UserError
from slmkit.data.corpus import Corpus, build_corpus, open_corpus
from slmkit.data.stream import DocumentRows
from slmkit.device import Device, find_device
from slmkit.evaluation import validation_loss
from slmkit.evaluation.loss import LossReport
from slmkit.find import find_model_directory
from slmkit.hub import spelled
from slmkit.model import Decoder, SLMConfig
from slmkit.model.adapter_directory import config_directory, is_adapter
from slmkit.model.config import TRAINING_FIELDS
from slmkit.model.sizes import parameter_count
from slmkit.training.checkpoints import complete_checkpoints, kept_in
from slmkit.training.distributed import ALONE, Group, join
from slmkit.training.find import find_run
from slmkit.training.inventory import blueprint_of
from slmkit.training.loop import Every, Plan, StopRequested
from slmkit.training.micro_batch import resolve_micro_batch
from slmkit.training.model_files import ModelFiles
from slmkit.training.optimizers import trained
from slmkit.training.plan_file import PlanFile
from slmkit.training.progress import TrainingProgress
from slmkit.training.recipe import ModelSettings, Recipe, load_recipe
from slmkit.training.reference import Beside, find_curve
from slmkit.training.run import (
    RunDirectory,
    evaluation_interval,
    fit,
    make_plan,
    new_run_directory,
    run_of_job,
)
from slmkit.training.trackers import check_trackers


def train_recipe(
    recipe: Recipe, reporter: Reporter, dry_run: bool = False, force: bool = False, stop: StopRequested | None = None
) -> RunDirectory:
    """Do a whole run: tokenizer, shards, model, training. Nothing is left behind when it fails before the first step.

    Under `torchrun` the first process prepares the data while the others wait, and a job that is started again goes on
    with the run it made. Raises `UserError` for whatever in the recipe or its data is wrong, and for what the X-ray
    finds, unless `force`; `RunStopped`, with a checkpoint, where a signal or `stop` ends it early.
    """
    check_trackers(recipe.train.report_to)
    expect_a_model(recipe)
    recipe = with_the_teachers_tokenizer(at_commits(recipe))
    device = find_device(recipe.train.device, recipe.train.precision)
    with join(device, recipe.train.ddp_timeout) as group:
        reporter = reporter if group.is_main else SILENCE
        if group.is_main:
            session = _prepare(recipe, device, group, reporter, force)
            group.from_main(str(session.run.root))
        else:
            session = open_run(RunDirectory(group.from_main("")), device, group)
        if not dry_run:
            resume = group.from_main(bool(complete_checkpoints(session.run.checkpoints)))
            session.run_to_the_end(reporter, resume, stop)
        elif group.is_main:
            shutil.rmtree(session.run.root)
    return session.run


def resume_run(directory: str | Path, reporter: Reporter) -> RunDirectory:
    """Go on with a run from its newest intact checkpoint, on any number of processes.

    Raises `UserError` where there is none.
    """
    run = RunDirectory(find_run(directory))
    settings = load_recipe(run.recipe).train
    device = find_device(settings.device, settings.precision)
    with join(device, settings.ddp_timeout) as group:
        reporter = reporter if group.is_main else SILENCE
        if group.is_main and not run.environment.is_file():
            reporter.say(f"{run.root}: was stopped before its data was ready; preparing it again")
            _build(run, load_recipe(run.recipe), device, group, reporter, force=False)
        group.from_main(True)
        session = open_run(run, device, group, reporter)
        reporter.say(session.summary())
        session.run_to_the_end(reporter, resume=True)
    return run


def _prepare(recipe: Recipe, device: Device, group: Group, reporter: Reporter, force: bool) -> _Session:
    """A new run with its data, or the one that this job made before it was started again."""
    found = run_of_job(recipe.output_dir)
    if found is not None:
        session = open_run(found, device, group, reporter)
        reporter.say(f"{found.root}: continuing the run of this job; {session.summary()}")
        return session
    run = new_run_directory(recipe.output_dir)
    try:
        run.claim(recipe)
        return _build(run, recipe, device, group, reporter, force)
    except BaseException:
        shutil.rmtree(run.root, ignore_errors=True)
        raise


def _build(
    run: RunDirectory, recipe: Recipe, device: Device, group: Group, reporter: Reporter, force: bool
) -> _Session:
    """Tokenizer, data and model, and a run described: from here on it can be opened."""
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
    session = _Session(run, resolved_recipe, corpus, model, config, files, device, group, reporter)
    run.describe(session.recipe, device, corpus.describe())
    reporter.say(session.summary())
    for line in session.work.report():
        reporter.say(line)
    session.look(reporter, force)
    return session


def open_run(run: RunDirectory, device: Device, group: Group = ALONE, reporter: Reporter = SILENCE) -> _Session:
    """A run whose data is prepared."""
    recipe, corpus = load_recipe(run.recipe), open_corpus(run.data)
    base = find_model_directory(recipe.model.path) if recipe.model.path else None
    model, config, files = model_for(recipe, corpus.tokenizer, base)
    return _Session(run, recipe, corpus, model, config, files, device, group, reporter)


@dataclass(frozen=True)
class RunFigures:
    """How good a run's best model is on its validation text."""

    report: LossReport
    bits_per_byte: float
    perfect_loss: float | None  # nats per token of the corpus' own generator, where it has one


def evaluate_run(directory: str | Path) -> RunFigures:
    """Validation loss of a pretraining run's best checkpoint, in float32, every document in full context."""
    run = RunDirectory(directory)
    decoder, config = load_model(find_model_directory(directory))
    shards = open_corpus(run.data).validation
    length = load_recipe(run.recipe).train.sequence_length or config.max_position_embeddings
    separate = load_recipe(run.recipe).data.separate_documents
    rows, device = DocumentRows(shards, length), find_device("cpu", "float32")
    report = validation_loss(decoder, rows, device, separate=separate)
    return RunFigures(report, report.bits_per_byte(shards.header.text_bytes), shards.header.perfect_loss)


class _Session:
    """A recipe with everything it names built: what `train` and `resume` have in common."""

    def __init__(
        self,
        run: RunDirectory,
        recipe: Recipe,
        corpus: Corpus,
        model: Decoder,
        config: SLMConfig,
        files: ModelFiles,
        device: Device,
        group: Group,
        reporter: Reporter,
    ) -> None:
        self.run, self.recipe, self.corpus, self.model, self.config = run, recipe, corpus, model, config
        self.files, self.device, self.group = files, device, group
        self.length = recipe.train.sequence_length or config.max_position_embeddings
        if self.length > config.max_position_embeddings:
            raise UserError(
                f"train.sequence_length {self.length} is longer than the model's max_position_embeddings "
                f"{config.max_position_embeddings}: shorten the one or raise the other"
            )
        inventory = inventory_of(recipe, blueprint_of(model), len(corpus.tokenizer), device)
        settings = resolve_micro_batch(recipe.train, model, inventory, self.length, device)
        self.recipe = recipe = recipe.model_copy(update={"train": settings})
        material = Material(run, recipe, corpus, model, config, device, group, self.length, reporter)
        self.work = work_of(material)
        self.inventory = replace(inventory, longest=self.work.longest)
        self.stream = self.work.batches
        if not self.stream.has(0):
            raise UserError(
                f"the data is too short for one step of {material.rows_per_step} rows of {self.length} tokens: "
                "add text, or lower train.tokens_per_step"
            )
        self.plan: Plan = make_plan(
            recipe.train,
            self.stream.rows_in_epoch,
            recipe.tokens_of_row(self.length),
            device,
            recipe.guard,
            self.stream.total_rows,
            group,
        )

    def summary(self) -> str:
        learned, whole = sum(p.numel() for p in trained(self.model).values()), parameter_count(self.model.architecture)
        parameters = f"{learned:,} parameters"
        if self.recipe.lora is not None:
            parameters += f" ({learned / (whole + learned):.2%}) beside {whole:,} that are frozen"
        tokens = f"{self.corpus.training_tokens:,}" if self.corpus.training_tokens else "streamed"
        rows = self.stream.total_rows
        is_all = rows is not None and (self.plan.steps + 1) * self.stream.rows_per_step > rows
        ends = f" (then the data ends: {self.recipe.data.when_exhausted})" if is_all else ""
        return (
            f"{parameters}, {tokens} training tokens, "
            f"{self.plan.steps:,} steps of {self.stream.rows_per_step} × {self.length} tokens{ends}, "
            f"{self.device.describe()['device']} in {self.device.describe()['compute_dtype']}"
            + (f", {self.group.world} processes" if self.group.world > 1 else "")
        )

    def look(self, reporter: Reporter, force: bool) -> None:
        """The X-ray. Raises `UserError` for what it finds, unless `force`."""
        look(
            self.stream,
            self.corpus.tokenizer,
            self.config.vocab_size,
            self.run.root,
            reporter.say,
            train=self.corpus.train,
            validation=[self.corpus.validation],
            is_chat=self.recipe.reads in ("conversations", "pairs", "judgements"),
            is_padded=self.recipe.is_padded,
            force=force,
        )

    def run_to_the_end(self, reporter: Reporter, resume: bool, stop: StopRequested | None = None) -> None:
        interval = evaluation_interval(self.recipe.train, self.plan.steps)
        console = None if self.group.is_main else Console(quiet=True)
        plan_file = self._plan_file()
        curve = find_curve(self.recipe, self.config)
        rows = self.stream.rows_in_epoch
        epoch = rows / self.stream.rows_per_step if rows else None
        with TrainingProgress(self.recipe.objective, self.plan.steps, console, epoch) as progress:
            state = fit(
                self.run,
                self.recipe,
                self.model,
                self.config,
                self.stream,
                self.plan,
                companions=self.corpus.tokenizer.save_pretrained,
                objective=self.work.objective,
                inventory=self.inventory,
                files=self.files,
                hooks=(
                    Every(interval, self.work.validate, on_all_ranks=True),
                    Every(interval, self.work.sample, on_all_ranks=True),
                    *([Every(1, Beside(curve).update)] if curve else []),
                    Every(1, progress.update),
                    Every(1, plan_file.update),
                ),
                perfect_loss=self.corpus.validation.header.perfect_loss,
                resume=resume,
                warn=reporter.warn,
                stop=stop,
            )
        if self.corpus.training_tokens is None:  # streams know now what of them was left out
            for line in self.work.report():
                reporter.say(line)
        if compared := plan_file.complete(state.best.get("validation_loss")):
            reporter.say(compared)

    def _plan_file(self) -> PlanFile:
        return PlanFile(
            self.run.root,
            self.config,
            self.recipe.train,
            self.plan.steps,
            self.device,
            self.inventory,
            unique_tokens=self.corpus.training_tokens,
            validation_tokens=self.work.validation_tokens,
            from_scratch=self.recipe.objective == "pretrain" and self.recipe.model.path is None,
        )


def _resolve(recipe: Recipe, run: RunDirectory, config: SLMConfig, base: Path | None) -> Recipe:
    """The recipe with nothing left to a preset, so that it still means the same when presets change."""
    model = recipe.model if base is not None else resolved(config, recipe.model.initialization)
    if base is not None:  # a run's best model may be another one later
        model = model.model_copy(update={"path": spelled(base)})
    return recipe.model_copy(update={"output_dir": str(run.root), "model": model})


def resolved(config: SLMConfig, initialization: str = "gpt2") -> ModelSettings:
    shape = config.model_dump(exclude=TRAINING_FIELDS)
    return ModelSettings.model_validate(shape | {"initialization": initialization})
