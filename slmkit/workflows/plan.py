"""`slm plan` of a recipe: memory, time, disk and loss of its run."""

from __future__ import annotations

from collections.abc import Callable

from slmkit.adapt.adapter_config import read_adapter_config
from slmkit.adapt.lora import add_lora
from slmkit.config import UserError
from slmkit.device import find_device
from slmkit.find import find_config_directory, find_model_directory, find_tokenizer_directory
from slmkit.model.config import SLMConfig
from slmkit.model.decoder import Decoder
from slmkit.model.files.adapter_directory import config_directory, is_adapter
from slmkit.model.files.directory import empty_decoder
from slmkit.tokenizer import SLMTokenizer
from slmkit.training.estimate.forecast import forecast
from slmkit.training.estimate.micro_batch import resolve_micro_batch
from slmkit.training.estimate.probe import LONGEST, STEPS, probe
from slmkit.training.estimate.proposal import RunEstimate, tokens_of
from slmkit.training.recipe.checks import expect_a_model
from slmkit.training.recipe.recipe import Recipe
from slmkit.workflows.distill import with_the_teachers_tokenizer
from slmkit.workflows.objectives import OBJECTIVES

QUICKSTART = "runs/quickstart/"  # models that later stages of the quickstart start from


def plan_recipe(recipe: Recipe, measure: bool = True, say: Callable[[str], None] = lambda line: None) -> RunEstimate:
    """Estimate of a run of this recipe on this machine; `say` is called with what is being measured.

    Raises `UserError` for a setting that the plan needs and the recipe lacks.
    """
    expect_a_model(recipe)
    recipe = with_the_teachers_tokenizer(recipe)
    if recipe.tokenizer.path is not None:  # its size is known already
        size = len(SLMTokenizer.from_pretrained(find_tokenizer_directory(recipe.tokenizer.path)))
        recipe = recipe.model_copy(update={"tokenizer": recipe.tokenizer.model_copy(update={"vocab_size": size})})
    device = find_device(recipe.train.device, recipe.train.precision)
    assumptions: list[str] = []
    config = _config_of(recipe, assumptions)
    length = recipe.train.sequence_length or config.max_position_embeddings
    text = tokens_of(recipe, assumptions)
    if text is None and recipe.train.max_steps is None and recipe.train.max_tokens is None:
        raise UserError("the length of this text is not known before it is read: set train.max_tokens or max_steps")
    rows = _rows_of(recipe, text, length, assumptions)
    steps = recipe.train.total_steps(rows, recipe.tokens_of_row(length))
    profile = OBJECTIVES[recipe.objective].memory(recipe, _meta_model(recipe, config), config.vocab_size, device)
    recipe = recipe.model_copy(update={"train": resolve_micro_batch(recipe.train, profile, length, device)})
    measured = None
    if measure:
        say(f"measuring the speed in up to {STEPS} steps on random tokens, at most {LONGEST:.0f} seconds")
        measured = probe(profile, recipe.train, device)
    estimate = forecast(
        profile,
        recipe.train,
        steps,
        device,
        tokens_per_second=measured.tokens_per_second if measured else None,
        unique_tokens=text,
        validation_tokens=round((text or 0) * recipe.data.validation_fraction),
        from_scratch=recipe.objective == "pretrain" and recipe.model.path is None,
    )
    epochs = steps * recipe.train.rows_per_step(recipe.tokens_of_row(length)) / rows if text else None
    return RunEstimate(recipe, config, profile, device, estimate, measured, text, epochs, assumptions)


def _meta_model(recipe: Recipe, config: SLMConfig) -> Decoder:
    """The model that the recipe trains, on the meta device; with `lora` it has an adapter, such as the recipe starts
    from.
    """
    decoder, wanted = empty_decoder(config), recipe.lora
    if wanted is None:
        return decoder
    if recipe.model.path is not None and is_adapter(base := find_model_directory(recipe.model.path)):
        wanted = read_adapter_config(base).settings.model_copy(update={"base_weights": wanted.base_weights})
    add_lora(decoder, config, wanted)
    return decoder


def _config_of(recipe: Recipe, assumptions: list[str]) -> SLMConfig:
    """The model's config; adds to the assumptions."""
    if recipe.model.path is None:
        return recipe.model.build_config(vocab_size=recipe.tokenizer.vocab_size)
    try:
        return SLMConfig.from_pretrained(config_directory(find_config_directory(recipe.model.path)))
    except UserError:
        if not recipe.model.path.startswith(QUICKSTART):
            raise
    assumptions.append(f"{recipe.model.path} is not there yet: assumed to have the shape of the preset quickstart")
    return SLMConfig.from_preset("quickstart")


def _rows_of(recipe: Recipe, text: int | None, length: int, assumptions: list[str]) -> int:
    """Rows of an epoch; adds to the assumptions."""
    if recipe.is_padded:
        assumptions.append(f"rows of {length} tokens are assumed full: shorter {recipe.reads} train faster")
    if recipe.reads == "questions":
        assumptions.append("the time to sample answers is not included")
    if recipe.is_padded and recipe.data.is_built_in:
        return recipe.data.documents * (recipe.grpo.num_generations if recipe.reads == "questions" else 1)
    return max(1, (text or 0) // (recipe.tokens_of_row(length) if recipe.is_padded else length))
