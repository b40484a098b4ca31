"""Opening a run: building the data, model and plan of its recipe, for `train` and `resume`."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from rich.console import Console

from slmkit.config import UserError
from slmkit.data.prepare.corpus import Corpus, open_corpus
from slmkit.device import Device
from slmkit.model.config import SLMConfig
from slmkit.model.decoder import Decoder
from slmkit.model.sizes import parameter_count
from slmkit.training.checkpoints.checkpoint import newest_intact, step_of
from slmkit.training.checkpoints.model_files import ModelFiles
from slmkit.training.diagnostics.xray_page import look
from slmkit.training.distributed import ALONE, Group
from slmkit.training.estimate.forecast import PlanFile
from slmkit.training.estimate.memory import meta_model_of
from slmkit.training.estimate.micro_batch import resolve_micro_batch
from slmkit.training.fit import fit, make_plan
from slmkit.training.logging.progress import TrainingProgress
from slmkit.training.logging.reference_curves import ReferenceBand, find_curve
from slmkit.training.loop import Every, Plan, StopRequested
from slmkit.training.optimizers.choose import trained
from slmkit.training.recipe.changes import PROCESSES, Change, changes_between, is_of_length
from slmkit.training.recipe.recipe import LENGTHS, Recipe, load_recipe
from slmkit.training.run_directory import RunDirectory
from slmkit.workflows.context import SILENCE, Reporter, RunContext
from slmkit.workflows.model import model_for
from slmkit.workflows.objectives import inventory_of, work_of
from slmkit.workflows.resume import draws_by_process, find_base, fingerprints_of, said_of_length, with_length


def open_run(
    run: RunDirectory,
    device: Device,
    group: Group = ALONE,
    reporter: Reporter = SILENCE,
    recipe: Recipe | None = None,
    is_new: bool = False,
) -> Session:
    """The session of a run whose data is prepared, with its own recipe unless another is given.

    `is_new`: use the weights before the first step, even if there are checkpoints.
    """
    recipe = recipe or load_recipe(run.recipe)
    corpus = open_corpus(run.data)
    base, named = find_base(run, recipe, is_new)
    model, config, files = model_for(named, corpus.tokenizer, base)
    return Session(run, recipe, corpus, model, config, files, device, group, reporter)


class Session:
    """A run with everything in its recipe built, shared by `train` and `resume`.

    Raises `UserError` for rows longer than the context, and for data too short for one step.
    """

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
                f"{config.max_position_embeddings}: lower the first or raise the second"
            )
        inventory = inventory_of(recipe, meta_model_of(model), len(corpus.tokenizer), device)
        settings = resolve_micro_batch(recipe.train, model, inventory, self.length, device)
        self.recipe = recipe = recipe.model_copy(update={"train": settings})
        material = RunContext(run, recipe, corpus, model, config, device, group, self.length, reporter)
        self.work = work_of(material)
        self.inventory = replace(inventory, longest=self.work.longest)
        self.stream = self.work.batches
        if not self.stream.has(0):
            raise UserError(
                f"the data is too short for one step of {material.rows_per_step} rows of {self.length} tokens: "
                "add text, or lower train.tokens_per_step"
            )
        self.plan = self._plan_of(recipe)

    def _plan_of(self, recipe: Recipe) -> Plan:
        return make_plan(
            recipe.train,
            self.stream.rows_in_epoch,
            recipe.tokens_of_row(self.length),
            self.device,
            recipe.guard,
            self.stream.total_rows,
            self.group,
        )

    @property
    def fingerprints(self) -> dict[str, Any]:
        """Fingerprints of the data and models that the run depends on."""
        return fingerprints_of(self.run, self.recipe, self.corpus, self.stream)

    def take_over(self, prepared: Recipe, reporter: Reporter, replan: bool) -> None:
        """Apply, report and record the recipe's changes since preparation. Raises `UserError` for one not allowed."""
        step, changes = self.run.newest_step(), changes_between(prepared, self.recipe)
        if replan or any(map(is_of_length, changes)):
            anew = self._plan_of(self.recipe)
            self.recipe = with_length(self.run.root, prepared, self.recipe, self._plan_of, step, replan)
            self.plan = self._plan_of(self.recipe)
            reporter.say(said_of_length(self._plan_of(prepared), self.plan, anew, self.recipe.train, step))
            changes = changes_between(prepared, self.recipe)
        if changes:
            reporter.say(f"from step {step + 1} on: {', '.join(map(str, changes))}")
        ranks = self.run.described().get(PROCESSES, 1)
        if ranks != self.group.world:
            changes.append(Change(PROCESSES, ranks, self.group.world))
        share = -(-self.stream.rows_per_step // self.group.world)  # rows per process
        was, now = (min(plan.rows_per_micro_batch, share) for plan in (self._plan_of(prepared), self.plan))
        if draws_by_process(self.recipe, self.config) and (ranks != self.group.world or was != now):
            reporter.warn(
                "dropout and sampled answers follow how rows are shared out, which has changed: the run differs from "
                "the one that it would have been by more than rounding"
            )
        if changes:
            self.run.change(self.recipe, changes, step)
            self.run.add(**{PROCESSES: self.group.world})

    def is_finished(self) -> bool:
        """Whether all steps are done or the run ended early. Raises `UserError` if all its checkpoints are damaged."""
        step, ended = self.run.newest_step(), self.run.described().get("finished") or {}
        ended_early = step == ended.get("step") and step < ended["steps"] and self.plan.patience == ended["patience"]
        if not (step >= self.plan.steps or ended_early):
            return False
        newest = newest_intact(self.run.checkpoints, lambda line: None)
        return newest is not None and step_of(newest) == step

    def finished(self) -> str:
        """Message that the run is finished, and how to train it longer."""
        step, train, root = self.run.newest_step(), self.recipe.train, self.run.root
        name = next((name for name in LENGTHS if getattr(train, name) is not None), "num_train_epochs")
        if step < self.plan.steps:
            if train.early_stopping_patience is None:
                return f"{root}: finished at step {step} of {self.plan.steps}, where its data ended"
            name = "early_stopping_patience"
        longer = f"slm resume {root} train.{name}={2 * (getattr(train, name) or 1):g}"
        return f"{root}: finished at step {step}; to train longer: {longer}"

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
            f"{parameters}, {tokens} training tokens in the data, "
            f"{self.plan.steps:,} steps of {self.stream.rows_per_step} × {self.length} tokens{ends}, "
            f"{self.device.describe()['device']} in {self.device.describe()['compute_dtype']}"
            + (f", {self.group.world} processes" if self.group.world > 1 else "")
        )

    def look(self, reporter: Reporter, force: bool) -> None:
        """Run the X-ray. Raises `UserError` for its findings, unless `force`."""
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
        interval = self.recipe.train.evaluation_interval(self.plan.steps)
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
                extra_files=self.corpus.tokenizer.save_pretrained,
                objective=self.work.objective,
                inventory=self.inventory,
                files=self.files,
                hooks=(
                    Every(interval, self.work.validate, on_all_ranks=True),
                    Every(interval, self.work.sample, on_all_ranks=True),
                    *([Every(1, ReferenceBand(curve).update)] if curve else []),
                    Every(1, progress.update),
                    Every(1, plan_file.update),
                ),
                perfect_loss=self.corpus.validation.header.perfect_loss,
                resume=resume,
                warn=reporter.warn,
                stop=stop,
            )
        if self.corpus.training_tokens is None:  # streams know only now which rows were skipped
            for line in self.work.report():
                reporter.say(line)
        if compared := plan_file.complete(state.best.get("validation_loss")):
            reporter.say(compared)

    def _plan_file(self) -> PlanFile:
        return PlanFile(
            self.run.root,
            self.inventory,
            self.recipe.train,
            self.plan.steps,
            self.device,
            unique_tokens=self.corpus.training_tokens,
            validation_tokens=self.work.validation_tokens,
            from_scratch=self.recipe.objective == "pretrain" and self.recipe.model.path is None,
        )
