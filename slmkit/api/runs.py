"""A whole run from its recipe: what `slm train`, `slm resume` and `slm quickstart` stand on."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from rich.text import Text

from slmkit.api.xray import look
from slmkit.config import UserError
from slmkit.data import corpus as data_corpus
from slmkit.data.corpus import Corpus, build_corpus, open_corpus
from slmkit.data.feed import make_batches
from slmkit.data.stream import ChatRows, DocumentRows
from slmkit.device import Device, find_device
from slmkit.evaluation import validation_loss
from slmkit.evaluation.loss import LossReport, Rows
from slmkit.generation import ChatSession, SamplingSettings, complete
from slmkit.model import Decoder, SLMConfig, build_decoder, load_decoder
from slmkit.model.config import TRAINING_FIELDS
from slmkit.tokenizer import SLMTokenizer
from slmkit.training.loop import Every, Hook, Plan, Report, State
from slmkit.training.micro_batch import resolve_micro_batch
from slmkit.training.progress import TrainingProgress
from slmkit.training.recipe import ModelSettings, Recipe, load_recipe
from slmkit.training.run import (
    RunDirectory,
    evaluation_interval,
    find_model_directory,
    fit,
    make_plan,
    new_run_directory,
)
from slmkit.training.run_log import append_samples
from slmkit.training.trackers import check_trackers


class Reporter(data_corpus.Reporter, Protocol):
    """Where the long functions below say how far they are; a `Text` has colours that mean something."""

    def say(self, line: str | Text) -> None: ...

    def warn(self, line: str) -> None: ...


def train_recipe(recipe: Recipe, reporter: Reporter, dry_run: bool = False, force: bool = False) -> RunDirectory:
    """Do a whole run: tokenizer, shards, model, training. Nothing is left behind when it fails before the first step.

    Raises `UserError` for whatever in the recipe or its data is wrong, and for what the X-ray finds, unless `force`.
    """
    check_trackers(recipe.train.report_to)
    device = find_device(recipe.train.device, recipe.train.precision)
    base = find_model_directory(recipe.model.path) if recipe.model.path else None
    run = new_run_directory(recipe.output_dir)
    try:
        tokenizer = SLMTokenizer.from_pretrained(base) if base else None
        corpus = build_corpus(
            recipe.objective, recipe.data, recipe.tokenizer, recipe.seed, run.data, tokenizer, reporter
        )
        model, config = _model_for(recipe, corpus.tokenizer, base)
        session = _Session(run, _resolve(recipe, run, config, base), corpus, model, config, device)
        run.describe(session.recipe, device, corpus.describe())
        reporter.say(session.summary())
        session.look(reporter, force)
    except BaseException:
        shutil.rmtree(run.root, ignore_errors=True)
        raise
    if dry_run:
        shutil.rmtree(run.root)
    else:
        session.run_to_the_end(reporter, resume=False)
    return run


def resume_run(directory: str | Path, reporter: Reporter) -> RunDirectory:
    """Go on with a run from its newest intact checkpoint. Raises `UserError` where there is none."""
    run = RunDirectory(directory)
    if not run.recipe.is_file():
        raise UserError(f"{run.root}: not a run: it has no recipe.yaml; expected a directory that `slm train` made")
    recipe = load_recipe(run.recipe)
    device = find_device(recipe.train.device, recipe.train.precision)
    corpus = open_corpus(run.data)
    base = find_model_directory(recipe.model.path) if recipe.model.path else None
    model, config = _model_for(recipe, corpus.tokenizer, base)
    session = _Session(run, recipe, corpus, model, config, device)
    reporter.say(session.summary())
    session.run_to_the_end(reporter, resume=True)
    return run


@dataclass(frozen=True)
class RunFigures:
    """How good a run's best model is on its validation text."""

    report: LossReport
    bits_per_byte: float
    perfect_loss: float | None  # nats per token of the corpus' own generator, where it has one


def evaluate_run(directory: str | Path) -> RunFigures:
    """Validation loss of a pretraining run's best checkpoint, in float32, every document in full context."""
    run = RunDirectory(directory)
    decoder, config = load_decoder(find_model_directory(directory))
    shards = open_corpus(run.data).validation
    length = load_recipe(run.recipe).train.sequence_length or config.max_position_embeddings
    separate = load_recipe(run.recipe).data.separate_documents
    rows, device = DocumentRows(shards, length), find_device("cpu", "float32")
    report = validation_loss(decoder, rows, device, separate=separate)
    return RunFigures(report, report.bits_per_byte(shards.header.text_bytes), shards.header.perfect_loss)


class _Session:
    """A recipe with everything it names built: what `train` and `resume` have in common."""

    def __init__(
        self, run: RunDirectory, recipe: Recipe, corpus: Corpus, model: Decoder, config: SLMConfig, device: Device
    ) -> None:
        self.run, self.recipe, self.corpus, self.model, self.config, self.device = (
            run,
            recipe,
            corpus,
            model,
            config,
            device,
        )
        self.length = recipe.train.sequence_length or config.max_position_embeddings
        if self.length > config.max_position_embeddings:
            raise UserError(
                f"train.sequence_length {self.length} is longer than the model's max_position_embeddings "
                f"{config.max_position_embeddings}: shorten the one or raise the other"
            )
        settings = resolve_micro_batch(recipe.train, model, self.length, device)
        self.recipe = recipe = recipe.model_copy(update={"train": settings})
        validation_rows = ChatRows if recipe.objective == "sft" else DocumentRows
        self.validation_rows: Rows = validation_rows(corpus.validation, self.length)
        rows_per_step = recipe.train.rows_per_step(self.length)
        self.stream = make_batches(recipe.objective, recipe.data, corpus, self.length, rows_per_step, recipe.seed)
        if not self.stream.has(0):
            raise UserError(
                f"the data ends before the first step, which is {rows_per_step} rows of {self.length} tokens: "
                "add text, or lower train.tokens_per_step"
            )
        self.plan: Plan = make_plan(
            recipe.train, self.stream.rows_in_epoch, self.length, device, recipe.guard, self.stream.total_rows
        )

    def summary(self) -> str:
        parameters = sum(p.numel() for p in self.model.parameters())
        tokens = f"{self.corpus.training_tokens:,}" if self.corpus.training_tokens else "streamed"
        return (
            f"{parameters:,} parameters, {tokens} training tokens, "
            f"{self.plan.steps:,} steps of {self.stream.rows_per_step} × {self.length} tokens, "
            f"{self.device.describe()['device']} in {self.device.describe()['compute_dtype']}"
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
            is_chat=self.recipe.objective == "sft",
            force=force,
        )

    def run_to_the_end(self, reporter: Reporter, resume: bool) -> None:
        interval = evaluation_interval(self.recipe.train, self.plan.steps)
        with TrainingProgress(self.recipe.objective, self.plan.steps) as progress:
            fit(
                self.run,
                self.recipe,
                self.model,
                self.config,
                self.stream,
                self.plan,
                companions=self.corpus.tokenizer.save_pretrained,
                hooks=(
                    Every(interval, Validate(self.validation_rows, self.device, self.stream.separate)),
                    Every(interval, self._sampler()),
                    Every(1, progress.update),
                ),
                perfect_loss=self.corpus.validation.header.perfect_loss,
                resume=resume,
                warn=reporter.warn,
            )

    def _sampler(self) -> Hook:
        """Writes what the model says to the fixed prompts into samples.md."""
        train, tokenizer = self.recipe.train, self.corpus.tokenizer

        def sample(state: State, report: Report) -> None:
            settings = SamplingSettings(temperature=0.8, top_p=0.95, seed=self.recipe.seed)
            samples = []
            for prompt in train.sample_prompts:
                if self.recipe.objective == "sft":
                    session = ChatSession(state.model, tokenizer, settings, max_new_tokens=train.sample_tokens)
                    text = "\n" + "".join(session.reply(prompt))
                else:
                    text = complete(
                        state.model, tokenizer, prompt, settings=settings, max_new_tokens=train.sample_tokens
                    ).text
                samples.append((prompt, text))
            append_samples(self.run.samples, state.step, samples)

        return sample


class Validate:
    """A hook that adds `validation_loss` to the report."""

    def __init__(self, rows: Rows, device: Device, separate: bool = False) -> None:
        self.rows, self.device, self.separate = rows, device, separate

    def __call__(self, state: State, report: Report) -> None:
        report["validation_loss"] = validation_loss(state.model, self.rows, self.device, separate=self.separate).loss


def _model_for(recipe: Recipe, tokenizer: SLMTokenizer, base: Path | None) -> tuple[Decoder, SLMConfig]:
    """Fresh weights for the tokenizer's vocabulary, or those of `base`."""
    if base is not None:
        return load_decoder(base)
    known = {
        "vocab_size": len(tokenizer),
        "eos_token_id": sorted(tokenizer.stop_token_ids),
        "pad_token_id": tokenizer.pad_token_id,
    }
    config = recipe.model.build_config(**known)
    return build_decoder(config, recipe.seed, recipe.model.initialization), config


def _resolve(recipe: Recipe, run: RunDirectory, config: SLMConfig, base: Path | None) -> Recipe:
    """The recipe with nothing left to a preset, so that it still means the same when presets change."""
    model = recipe.model if base is not None else resolved(config, recipe.model.initialization)
    return recipe.model_copy(update={"output_dir": str(run.root), "model": model})


def resolved(config: SLMConfig, initialization: str = "gpt2") -> ModelSettings:
    shape = config.model_dump(exclude=TRAINING_FIELDS)
    return ModelSettings.model_validate(shape | {"initialization": initialization})
