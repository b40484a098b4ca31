"""`build_run` and `open_run`: data, model, batches and plan of a recipe, for `train`, `resume` and `replay`."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console

from slmkit.config import UserError
from slmkit.data.prepare.corpus import Corpus, open_corpus
from slmkit.data.rows.teacher_cache import HEADER, data_fingerprint
from slmkit.data.settings import TokenizerSettings
from slmkit.device import Device
from slmkit.files import file_sha256
from slmkit.files.find import find_model_directory
from slmkit.files.hub import pinned_name
from slmkit.model.config import SLMConfig
from slmkit.model.files.adapter_directory import is_adapter
from slmkit.model.sizes import parameter_count
from slmkit.training.checkpoints.checkpoint import complete_checkpoints, kept_in, newest_intact
from slmkit.training.diagnostics.xray_page import check_data
from slmkit.training.distributed import ALONE, Group
from slmkit.training.estimate.forecast import PlanFile
from slmkit.training.estimate.memory import MemoryProfile, meta_model_of
from slmkit.training.estimate.micro_batch import resolve_micro_batch
from slmkit.training.fit import decide_whether_to_compile, fit
from slmkit.training.logging.progress import training_progress
from slmkit.training.logging.reference_curves import ReferenceBand, find_curve
from slmkit.training.loop import Every, Goal, Plan, Stage, StopRequested
from slmkit.training.optimizers.choose import trained
from slmkit.training.recipe.checks import unlikely
from slmkit.training.recipe.recipe import ModelSettings, Recipe, load_recipe
from slmkit.training.run_directory import RunDirectory
from slmkit.workflows.context import SILENCE, ObjectiveParts, RecipeContext, Reporter
from slmkit.workflows.distill import teacher_fingerprint
from slmkit.workflows.hooks import RunTasks, WriteSamples, goal_of, with_prompts
from slmkit.workflows.model import StartingModel, model_for, prepare_data
from slmkit.workflows.objectives import OBJECTIVES
from slmkit.workflows.preference import REFERENCE_FILE, has_reference

PREPARED = "prepared"


def open_run(
    run: RunDirectory,
    device: Device,
    group: Group = ALONE,
    reporter: Reporter = SILENCE,
    recipe: Recipe | None = None,
    is_new: bool = False,
) -> PreparedRun:
    """A run whose data is prepared, with its own recipe unless another is given.

    `is_new`: use the weights before the first step, even if there are checkpoints.
    """
    recipe = recipe or load_recipe(run.recipe)
    corpus = open_corpus(run.data)
    base, named = find_base(run, recipe, is_new)
    start = model_for(named, corpus.tokenizer, base)
    return prepared_run(run, recipe, corpus, start, device, group, reporter)


def prepared_run(
    run: RunDirectory,
    recipe: Recipe,
    corpus: Corpus,
    start: StartingModel,
    device: Device,
    group: Group,
    reporter: Reporter,
) -> PreparedRun:
    """The run with the parts of its objective.

    Raises `UserError` for rows longer than the model's context, and for data too short for one step.
    """
    context = RecipeContext(
        run=run,
        recipe=recipe,
        model=start.decoder,
        config=start.config,
        files=start.files,
        extra_files=corpus.tokenizer.save_pretrained,
        device=device,
        group=group,
        warn=reporter.warn,
        corpus=corpus,
        reporter=reporter,
    )
    length = context.length
    if length > start.config.max_position_embeddings:
        raise UserError(
            f"train.sequence_length {length} is longer than the model's max_position_embeddings "
            f"{start.config.max_position_embeddings}: lower the first or raise the second"
        )
    memory = OBJECTIVES[recipe.objective].memory(recipe, meta_model_of(start.decoder), len(corpus.tokenizer), device)
    settings = resolve_micro_batch(recipe.train, memory, length, device)
    context.recipe = recipe.model_copy(update={"train": settings})
    parts = OBJECTIVES[recipe.objective].parts(context)
    if not parts.batches.has(0):
        raise UserError(
            f"the data is too short for one step of {context.rows_per_step} rows of {length} tokens: "
            "add text, or lower train.tokens_per_step"
        )
    return PreparedRun(context, parts, replace(memory, longest=parts.longest), context.plan(parts.batches))


def build_run(
    run: RunDirectory, recipe: Recipe, device: Device, group: Group, reporter: Reporter, force: bool
) -> PreparedRun:
    """Prepare tokenizer, data and model, and describe the run, which can be opened from then on. X-ray its data."""
    base = kept_in(run.root / "base", find_model_directory(recipe.model.path)) if recipe.model.path else None
    if base is not None and is_adapter(base):
        is_trained = "is trained on" if recipe.lora is not None else "is folded into its model first"
        reporter.say(f"{recipe.model.path}: an adapter, which {is_trained}")
    corpus, shape, _ = prepare_data(recipe, run.data, base, reporter)
    start = model_for(recipe, corpus.tokenizer, base, shape)
    resolved_recipe = _resolve(with_prompts(recipe, corpus), run, start.config, base)
    prepared = prepared_run(run, resolved_recipe, corpus, start, device, group, reporter)
    prepared.expect_evaluations()
    context = prepared.context
    decide_whether_to_compile(context, prepared.parts.objective, prepared.memory, prepared.plan)
    run.describe(context.recipe, device, corpus.describe())
    run.add(fingerprints=fingerprints_of(prepared))
    reporter.say(prepared.summary())
    for line in unlikely(context.recipe.train, prepared.plan.steps):
        reporter.warn(line)
    for line in prepared.parts.batches.report():
        reporter.say(f"training data: {line}")
    check_data(
        prepared.parts.batches,
        corpus.tokenizer,
        context.config.vocab_size,
        run.root,
        reporter.say,
        train=corpus.train,
        validation=[corpus.validation],
        is_chat=recipe.reads in ("conversations", "pairs", "judgements"),
        is_padded=recipe.is_padded,
        force=force,
    )
    return prepared


def _resolve(recipe: Recipe, run: RunDirectory, config: SLMConfig, base: Path | None) -> Recipe:
    """The recipe with all values of presets written out, so that later changes of presets do not affect it."""
    if base is None:
        model = ModelSettings.of_config(config, recipe.model.initialization)
    else:  # a run's best checkpoint may change later
        model = recipe.model.model_copy(update={"path": pinned_name(base)})
    return recipe.model_copy(update={"output_dir": str(run.root), "model": model})


@dataclass
class PreparedRun:
    """A run that can be trained: its context, the parts of its objective, what is in memory, and the loop's plan.

    `run_tasks` evaluates on tasks during the run, if the recipe has some.
    """

    context: RecipeContext
    parts: ObjectiveParts
    memory: MemoryProfile
    plan: Plan
    run_tasks: RunTasks | None = None

    def expect_evaluations(self) -> None:
        """Prepare what is evaluated during the run, and find which way its metric is better; on rank 0 only.

        Raises `UserError` for a task that cannot be run, and for a metric that the run does not measure.
        """
        settings, measures = self.context.recipe.train, dict(self.parts.measures)
        if settings.eval_tasks:
            self.run_tasks = RunTasks(self.context)
            measures |= self.run_tasks.try_out()
        self.plan = replace(self.plan, goal=goal_of(settings.metric_for_best_model, measures))

    def summary(self) -> str:
        """One line with the size of model, data and run."""
        context, batches = self.context, self.parts.batches
        learned = sum(p.numel() for p in trained(context.model).values())
        whole = parameter_count(context.model.architecture)
        parameters = f"{learned:,} parameters"
        if context.recipe.lora is not None:
            parameters += f" ({learned / (whole + learned):.2%}) beside {whole:,} that are frozen"
        tokens = f"{context.corpus.training_tokens:,}" if context.corpus.training_tokens else "streamed"
        rows, device = batches.total_rows, context.device.describe()
        is_all = rows is not None and (self.plan.steps + 1) * batches.rows_per_step > rows
        ends = f" (then the data ends: {context.recipe.data.when_exhausted})" if is_all else ""
        processes = f", {context.group.world} processes" if context.group.world > 1 else ""
        return (
            f"{parameters}, {tokens} training tokens in the data, "
            f"{self.plan.steps:,} steps of {batches.rows_per_step} × {context.length} tokens{ends}, "
            f"{device['device']} in {device['compute_dtype']}{processes}"
        )

    def train(self, resume: bool, stop: StopRequested | None = None) -> None:
        """Train to the end, with progress bar, evaluations, samples and plan.json."""
        context, parts, recipe = self.context, self.parts, self.context.recipe
        goal = context.group.from_main(asdict(self.plan.goal))  # found on rank 0
        plan = replace(self.plan, goal=Goal(**goal))
        evaluated = recipe.train.evaluation_interval(plan.steps)
        console = None if context.group.is_main else Console(quiet=True)
        plan_file = PlanFile(
            context.run.root,
            self.memory,
            recipe.train,
            plan.steps,
            context.device,
            unique_tokens=context.corpus.training_tokens,
            validation_tokens=parts.validation_tokens,
            from_scratch=recipe.objective == "pretrain" and recipe.model.path is None,
        )
        sample = WriteSamples(context.run.samples, recipe, context.corpus.tokenizer, context.group)
        rows = parts.batches.rows_in_epoch
        epoch = rows / parts.batches.rows_per_step if rows else None
        with training_progress(recipe.objective, plan.steps, console, epoch) as progress:
            hooks = [
                Every(evaluated, parts.validate, Stage.EVALUATE, on_all_ranks=True),
                Every(evaluated, sample, Stage.EVALUATE, on_all_ranks=True),
                Every(1, progress, Stage.SHOW),
                Every(1, plan_file.update, Stage.SHOW),
            ]
            if recipe.train.eval_tasks:
                run_tasks = self.run_tasks or RunTasks(context)
                every = recipe.train.tasks_interval(plan.steps)
                hooks.append(Every(every, run_tasks, Stage.EVALUATE, on_all_ranks=True))
            if curve := find_curve(recipe, context.config):
                hooks.append(Every(1, ReferenceBand(curve).update, Stage.EVALUATE))
            state = fit(
                context,
                parts.batches,
                parts.objective,
                plan,
                hooks,
                resume=resume,
                memory=self.memory,
                perfect_loss=context.corpus.validation.header.perfect_loss,
                stop=stop,
            )
        if context.corpus.training_tokens is None:  # streams know only now which rows were skipped
            for line in parts.batches.report():
                context.reporter.say(line)
        if compared := plan_file.complete(state.best.get("validation_loss")):
            context.reporter.say(compared)


def find_base(run: RunDirectory, recipe: Recipe, is_new: bool = False) -> tuple[Path | None, Recipe]:
    """The directory of a run's base model, and the recipe for it.

    A fully trained model is in the run's checkpoints and no longer needs its base.
    """
    if recipe.model.path is None:
        return None, recipe
    if is_new or _needs_base(run, recipe):
        return find_model_directory(recipe.model.path), recipe
    own = newest_intact(run.checkpoints, lambda line: None)
    return own, recipe.model_copy(update={"tokenizer": TokenizerSettings()})


def _needs_base(run: RunDirectory, recipe: Recipe) -> bool:
    refers = has_reference(recipe) and not (run.data / REFERENCE_FILE).is_file()
    compares = recipe.objective == "grpo" and recipe.grpo.beta > 0
    return recipe.lora is not None or refers or compares or not complete_checkpoints(run.checkpoints)


def fingerprints_of(prepared: PreparedRun) -> dict[str, Any]:
    """Fingerprints of everything outside of its checkpoints that a run depends on, and their time."""
    run, recipe, corpus = prepared.context.run, prepared.context.recipe, prepared.context.corpus
    known = run.described().get("fingerprints", {})
    found: dict[str, Any] = {
        "tokenizer": corpus.tokenizer.fingerprint,
        "data": data_fingerprint([*corpus.train, corpus.validation]),
    }
    for source in prepared.parts.batches.origins:
        name = f"data: {source.settings.label}"
        found[name] = source.fingerprint(known.get(name))
    if recipe.model.path is not None and _needs_base(run, recipe):
        found["model.path"] = teacher_fingerprint(find_model_directory(recipe.model.path))
    if recipe.distillation is not None and recipe.distillation.cache is not None:
        found["distillation.cache"] = file_sha256(Path(recipe.distillation.cache) / HEADER)
    elif recipe.distillation is not None and recipe.distillation.teacher is not None:
        found["distillation.teacher"] = teacher_fingerprint(find_model_directory(recipe.distillation.teacher))
    reward = Path(recipe.grpo.reward.rpartition(":")[0])
    if recipe.objective == "grpo" and reward.suffix == ".py":
        found[f"grpo.reward {recipe.grpo.reward}"] = file_sha256(reward)
    return found | {PREPARED: time.time()}
