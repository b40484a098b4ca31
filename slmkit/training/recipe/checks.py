"""Checks of a recipe before the first step: missing settings, and settings without effect."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import pydantic

from slmkit.config import UserError
from slmkit.data.sources import BUILT_IN, STORY_WORLDS, expect_source
from slmkit.data.sources.files import TEXT_KINDS, kind_of
from slmkit.data.sources.settings import SourceSettings
from slmkit.files.find import find_config_directory, find_tokenizer_directory
from slmkit.training.recipe.recipe import Recipe, TrainSettings

Reads = Callable[[Recipe], bool]


def _stored_text(recipe: Recipe) -> bool:
    return recipe.reads == "text" and not recipe.data.streaming and not recipe.data.is_built_in


def _trains_tokenizer(recipe: Recipe) -> bool:
    return recipe.model.path is None and recipe.tokenizer.path is None and recipe.distillation is None


def _mixes(recipe: Recipe) -> bool:
    return len(recipe.data.sources) > 1


def _one_source_of_files(recipe: Recipe) -> bool:
    return not recipe.data.sources and not recipe.data.is_built_in


def _names_a_column(recipe: Recipe) -> bool:
    source = recipe.data.source
    paths = source if isinstance(source, list) else [source]
    return _one_source_of_files(recipe) and not all(kind_of(path) in TEXT_KINDS for path in paths if path is not None)


def _holds_out(recipe: Recipe) -> bool:
    return recipe.data.validation is None and not recipe.data.is_built_in


def _counts_validation(recipe: Recipe) -> bool:
    data = recipe.data
    return data.is_built_in or data.streaming or data.validation is not None or _has_built_in(recipe)


def _has_built_in(recipe: Recipe) -> bool:
    return recipe.data.is_built_in or any(source.path in BUILT_IN for source in recipe.data.sources)


NO_COLUMNS = "text files have no columns, and data.sources have their own setting"
# Key patterns → the condition under which the run reads them, and the condition in words.
READ_WHERE: dict[str, tuple[Reads, str]] = {
    "model.initialization": (lambda r: r.model.path is None, "the weights are those of model.path"),
    "tokenizer.vocab_size": (_trains_tokenizer, "the tokenizer is there already"),
    "tokenizer.documents_per_source": (
        lambda r: _trains_tokenizer(r) and not (r.data.is_built_in and r.reads == "text"),
        "the tokenizer is there already, or the text is built in",
    ),
    "data.phases": (_mixes, "there is one source"),
    "data.when_exhausted": (lambda r: r.reads != "questions", "grpo asks its questions again and again"),
    "data.shuffle_buffer": (lambda r: r.data.streaming, "data.streaming is off, and shards are shuffled whole"),
    "data.cleaning.*": (_stored_text, "only text of your own that is stored before training is cleaned"),
    "data.cleaning.min_script_share": (lambda r: bool(r.data.cleaning.scripts), "data.cleaning.scripts is not set"),
    "data.cleaning.evaluation_words": (lambda r: bool(r.data.cleaning.evaluation), "data.cleaning.evaluation is empty"),
    "data.text_column": (_names_a_column, NO_COLUMNS),
    "data.messages_column": (_names_a_column, NO_COLUMNS),
    "data.columns": (_names_a_column, NO_COLUMNS),
    "data.on_bad_row": (_one_source_of_files, "it is of data.source, and data.sources have their own"),
    "data.on_long_conversation": (lambda r: r.reads == "conversations", "the run reads no conversations"),
    "data.validation_fraction": (_holds_out, "validation text is named, or made anew of what is built in"),
    "data.separate_documents": (lambda r: not r.is_padded, "each row is one document"),
    "data.documents": (
        lambda r: _has_built_in(r) and not r.data.streaming,
        "it counts documents of the built-in corpus that are stored",
    ),
    "data.primer_documents": (
        lambda r: r.data.source in [*STORY_WORLDS] and r.reads == "text" and not r.data.streaming,
        "it is of data.source: stories as text",
    ),
    "data.validation_documents": (_counts_validation, "data.validation_fraction says how much is held out of files"),
    "data.validation.name": (lambda r: False, "validation text is one source, and no figure bears its name"),
    "data.validation.weight": (lambda r: False, "validation text is not mixed"),
    "data.sources.*.weight": (lambda r: _mixes(r) and not r.data.phases, "there is one source, or data.phases weighs"),
    "train.muon_*": (lambda r: r.train.optimizer == "muon", "train.optimizer is not muon"),
    "train.adam_beta2": (lambda r: r.train.optimizer != "lion", "train.optimizer lion has a second beta of its own"),
    "train.adam_epsilon": (lambda r: r.train.optimizer != "lion", "train.optimizer is lion"),
    "train.lr_decay_ratio": (
        lambda r: r.train.lr_scheduler_type == "warmup_stable_decay",
        "train.lr_scheduler_type is not warmup_stable_decay",
    ),
    **dict.fromkeys(
        ("train.eval_tasks_steps", "train.eval_task_data", "train.eval_limit", "train.eval_max_new_tokens"),
        (lambda r: bool(r.train.eval_tasks), "train.eval_tasks is empty"),
    ),
    "train.sample_tokens": (lambda r: r.train.sample_prompts != [], "train.sample_prompts is empty"),
    "guard.window": (lambda r: r.guard.max_spike is not None, "guard.max_spike is not set"),
    "guard.rollback_learning_rate_ratio": (
        lambda r: r.guard.on_divergence == "rollback",
        "guard.on_divergence is not rollback",
    ),
    "guard.max_rollbacks": (lambda r: r.guard.on_divergence == "rollback", "guard.on_divergence is not rollback"),
    "distillation.top_k": (lambda r: r.distillation is not None and bool(r.distillation.cache), "there is no cache"),
    "preference.*": (lambda r: r.objective == "dpo", "objective is not dpo"),
    "preference.simpo_gamma": (lambda r: r.preference.loss == "simpo", "preference.loss is not simpo"),
    "kto.*": (lambda r: r.objective == "kto", "objective is not kto"),
    "grpo.*": (lambda r: r.objective == "grpo", "objective is not grpo"),
}


FEW_STEPS = 20  # in a shorter run, a relative warm-up is too short to protect the model


def expect_ready(recipe: Recipe) -> None:
    """Raises `UserError` for missing settings, and for a named model, tokenizer or file that does not exist.

    Needs no torch: commands call it before importing torch.
    """
    expect_a_model(recipe)
    data, teacher = recipe.data, recipe.distillation and recipe.distillation.teacher
    paths = data.source if isinstance(data.source, list) else []
    named = [data.validation] if data.validation else []
    for source in (*data.all_sources(), *(SourceSettings(path=path) for path in paths), *named):
        expect_source(source)
    for path in (recipe.model.path, teacher):
        if path:
            find_config_directory(path)
    if recipe.tokenizer.path:
        find_tokenizer_directory(recipe.tokenizer.path)


def expect_a_model(recipe: Recipe) -> None:
    """Raises `UserError` if a model is to be fine-tuned or adapted, and the recipe names none.

    Fine-tuning may start from new weights if the recipe describes the model. Not a validator of `Recipe`: a recipe
    with `model.path: null` is valid as a template.
    """
    model, objective = recipe.model, recipe.objective
    if model.path is not None:
        return
    if recipe.lora is not None:
        raise UserError("lora needs a trained model to adapt: set model.path, or drop lora")
    if objective in ("dpo", "kto", "grpo"):
        raise UserError(
            f"objective {objective} needs a model that can chat: set model.path to a run or model directory"
        )
    is_named = model.preset is not None or bool(model.changes)
    if not is_named and (objective == "sft" or "path" in model.model_fields_set):
        raise UserError(
            "model.path is not set: this recipe fine-tunes a trained model; name a run or model directory as "
            "model.path=…, or say which new model to train, such as model.preset=smollm2-135m"
        )


def without_effect(recipe: Recipe) -> list[str]:
    """A line for each key that is set to a value other than its default and that this run does not read."""
    lines = []
    for key, value in _set_values(recipe):
        place, _, name = key.rpartition(".")
        if place == "data.validation" or place.startswith("data.sources."):
            source = recipe.data.validation if place == "data.validation" else recipe.data.sources[int(place[13:])]
            assert source is not None
            why = _unread_of(name, source)
            lines += [f"{key}={value} has no effect: {why}"] if why else []
        for pattern, (is_read, why) in READ_WHERE.items():
            if fnmatchcase(key, pattern) and not is_read(recipe):
                lines.append(f"{key}={value} has no effect: {why}")
                break
    return lines


def _unread_of(name: str, source: SourceSettings) -> str | None:
    """Why a setting of a source is not read; None if it is."""
    built_in, is_here = source.path in BUILT_IN, Path(source.path).exists()
    if name in ("config", "split") and (built_in or Path(source.path).is_file()):
        return "path is one thing, of which there are no parts"
    if name in ("revision", "streaming", "retry_for") and (built_in or is_here):
        return "path is on this machine"
    if name in ("row_format", "on_bad_row", "text_column", "messages_column", "columns") and built_in:
        return "path is built in"
    if name in ("row_format", "text_column", "messages_column", "columns") and kind_of(source.path) in TEXT_KINDS:
        return "text files have no columns"
    return None


def unlikely(train: TrainSettings, steps: int) -> list[str]:
    """A line for each step setting that does not suit a run of `steps` steps."""
    lines, fields, planned = [], TrainSettings.model_fields, train.lr_schedule_steps or steps
    warmup = train.total_warmup_steps(planned)
    last = train.schedule(steps)(steps - 1)
    decay = round(train.lr_decay_ratio * planned) if train.lr_scheduler_type == "warmup_stable_decay" else 0
    if warmup >= steps > 1:
        lines.append(
            f"the warm-up takes {warmup} steps and the run {steps}: the last learning rate is {last:.0%} of its peak"
        )
    elif warmup + decay > planned:
        lines.append(f"warm-up ({warmup} steps) and train.lr_decay_ratio ({decay}) are longer than the run ({planned})")
    elif train.warmup_steps is None and planned < FEW_STEPS and warmup <= 2:
        longer = "a larger train.max_tokens" if train.max_tokens else "more rows, more epochs (train.num_train_epochs)"
        more = f"{longer} or a smaller train.tokens_per_step gives more steps"
        if train.max_steps is not None:
            more = "a larger train.max_steps or train.warmup_ratio makes it longer"
        few = "1 step is" if planned == 1 else f"{planned} steps are"
        lines.append(f"{few} few: the warm-up is {warmup} step{'' if warmup == 1 else 's'}; {more}")
    for name in ("eval_steps", "eval_tasks_steps", "save_steps", "logging_steps"):
        every = getattr(train, name)
        if name in train.model_fields_set and every is not None and every > steps and every != fields[name].default:
            lines.append(f"train.{name} is {every} and the run takes {steps} steps: it happens once, at the end")
    interval = train.tasks_interval(steps) if train.is_best_by_task else train.evaluation_interval(steps)
    if train.is_best_by_task and train.save_steps is not None and interval % train.save_steps:
        lines.append(
            f"train.metric_for_best_model is measured every {interval} steps and train.save_steps is "
            f"{train.save_steps}: a model that is not saved then cannot become the best"
        )
    evaluations = -(-steps // interval)
    if train.early_stopping_patience is not None and train.early_stopping_patience >= evaluations:
        lines.append(
            f"train.early_stopping_patience is {train.early_stopping_patience}, and the run is evaluated {evaluations} "
            "times: it will not be ended early"
        )
    return lines


def _set_values(settings: pydantic.BaseModel, place: str = "") -> Iterator[tuple[str, Any]]:
    """`(dotted key, value)` of all given values other than defaults."""
    for name in type(settings).model_fields:
        value, key = getattr(settings, name), f"{place}{name}"
        if isinstance(value, pydantic.BaseModel):
            yield from _set_values(value, f"{key}.")
        elif isinstance(value, list) and value and all(isinstance(entry, pydantic.BaseModel) for entry in value):
            for number, entry in enumerate(value):
                yield from _set_values(entry, f"{key}.{number}.")
        default = type(settings).model_fields[name].get_default(call_default_factory=True)
        if name in settings.model_fields_set and value != default:
            yield key, value
