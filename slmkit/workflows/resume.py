"""Checks of a resumed run's base model and data, and its schedule after a change of length."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from slmkit.config import UserError
from slmkit.data.prepare.corpus import Corpus
from slmkit.data.rows.teacher_cache import HEADER, data_fingerprint
from slmkit.data.settings import TokenizerSettings
from slmkit.data.stream import Batches
from slmkit.find import find_model_directory
from slmkit.model.config import SLMConfig
from slmkit.training.checkpoints.checkpoint import complete_checkpoints, file_sha256, newest_intact
from slmkit.training.loop import Plan
from slmkit.training.recipe.recipe import LENGTHS, Recipe, TrainSettings
from slmkit.training.run_directory import RunDirectory
from slmkit.workflows.distill import teacher_fingerprint
from slmkit.workflows.preference import REFERENCE

BASE, PREPARED = "model.path", "prepared"


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
    has_reference = recipe.objective == "kto" or (recipe.objective == "dpo" and recipe.preference.needs_reference)
    refers = has_reference and not (run.data / REFERENCE).is_file()
    compares = recipe.objective == "grpo" and recipe.grpo.beta > 0
    return recipe.lora is not None or refers or compares or not complete_checkpoints(run.checkpoints)


def fingerprints_of(run: RunDirectory, recipe: Recipe, corpus: Corpus, stream: Batches) -> dict[str, Any]:
    """Fingerprints of everything outside of its checkpoints that a run depends on, and their time."""
    known = run.described().get("fingerprints", {})
    found: dict[str, Any] = {
        "tokenizer": corpus.tokenizer.fingerprint,
        "data": data_fingerprint([*corpus.train, corpus.validation]),
    }
    for source in getattr(stream, "origins", ()):
        name = f"data: {source.settings.label}"
        found[name] = source.fingerprint(known.get(name))
    if recipe.model.path is not None and _needs_base(run, recipe):
        found[BASE] = teacher_fingerprint(find_model_directory(recipe.model.path))
    if recipe.distillation is not None and recipe.distillation.cache is not None:
        found["distillation.cache"] = file_sha256(Path(recipe.distillation.cache) / HEADER)
    elif recipe.distillation is not None and recipe.distillation.teacher is not None:
        found["distillation.teacher"] = teacher_fingerprint(find_model_directory(recipe.distillation.teacher))
    return found | {PREPARED: time.time()}


def expect_the_same(run: RunDirectory, corpus: Corpus, found: dict[str, Any]) -> None:
    """Raises `UserError` for the first fingerprint that differs from the run's start."""
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


def with_length(
    root: Path, prepared: Recipe, recipe: Recipe, plan_of: Callable[[Recipe], Plan], step: int, replan: bool
) -> Recipe:
    """The recipe with its previous schedule or, with `replan` or before the first step, one over the new length.

    Raises `UserError` for a length that the run has passed.
    """
    before, after = plan_of(prepared).steps, plan_of(recipe).steps
    if after < step:
        key = next(name for name in (*LENGTHS, "num_train_epochs") if getattr(recipe.train, name, None) is not None)
        raise UserError(f"{root}: step {step} is done, and train.{key} would end the run at step {after}: raise it")
    was, now = prepared.train.lr_schedule_steps, recipe.train.lr_schedule_steps
    if replan or not step:
        now = None if now == was else now
    elif now == was:
        now = was or before
    train = recipe.train.model_copy(update={"lr_schedule_steps": None if now == after else now})
    return recipe.model_copy(update={"train": train})


def said_of_length(before: Plan, after: Plan, replanned: Plan, train: TrainSettings, step: int) -> str:
    """Message on the learning rate after the run's length was changed."""

    def rate(plan: Plan, step: int) -> str:
        return f"{train.learning_rate * plan.schedule(step):.3g}"

    if train.lr_schedule_steps is None:
        was = f", where it would have been {rate(before, step)}" if step else ""
        return f"the learning rate is planned anew over {after.steps} steps: {rate(after, step)} at the next step{was}"
    now, last, anew = rate(after, step), rate(after, after.steps - 1), rate(replanned, step)
    ahead = now if now == last else f"{now} at the next step, {last} at the last"
    otherwise = "" if anew == now else f": {anew} at the next step"
    return (
        f"the learning rate keeps to its schedule over {train.lr_schedule_steps} steps: {ahead} "
        f"(--replan would spread it over all {after.steps}{otherwise})"
    )


def draws_by_process(recipe: Recipe, config: SLMConfig) -> bool:
    """Whether random numbers of a step depend on the number of processes."""
    dropout = max(config.hidden_dropout, config.attention_dropout, recipe.lora.lora_dropout if recipe.lora else 0.0)
    return dropout > 0 or recipe.objective == "grpo"
