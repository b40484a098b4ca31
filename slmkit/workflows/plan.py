"""`slm plan` of a recipe: the models and memory profile that its run would have."""

from __future__ import annotations

from collections.abc import Callable

from slmkit.adapt.adapter_config import read_adapter_config
from slmkit.adapt.lora import add_lora
from slmkit.device import Device
from slmkit.find import find_model_directory, find_tokenizer_directory
from slmkit.model.config import SLMConfig
from slmkit.model.decoder import Decoder
from slmkit.model.files.adapter_directory import LoRASettings, is_adapter
from slmkit.model.files.directory import empty_decoder
from slmkit.model.initialization import build_decoder
from slmkit.tokenizer import SLMTokenizer
from slmkit.training.estimate.plan import RunEstimate, outlook
from slmkit.training.estimate.probe import ProbeTarget
from slmkit.training.recipe.checks import expect_a_model
from slmkit.training.recipe.recipe import Recipe
from slmkit.workflows.distill import teacher_like, with_the_teachers_tokenizer
from slmkit.workflows.objectives import inventory_of

Make = Callable[[SLMConfig], Decoder]


def plan_recipe(recipe: Recipe, measure: bool = True, say: Callable[[str], None] = lambda line: None) -> RunEstimate:
    """Estimate of a run of this recipe on this machine; `say` is called with what is being measured.

    Raises `UserError` for a setting that the plan needs and the recipe lacks.
    """
    expect_a_model(recipe)
    return outlook(_with_known_vocabulary(with_the_teachers_tokenizer(recipe)), subject_of, measure, say)


def subject_of(recipe: Recipe, config: SLMConfig, device: Device) -> ProbeTarget:
    """The models and memory profile of the recipe's run, built from configs without weights."""
    inventory = inventory_of(recipe, _model_like(recipe, config, empty_decoder), config.vocab_size, device)

    def models() -> tuple[Decoder, Decoder | None]:
        model = _model_like(recipe, config, build_decoder)
        if recipe.distillation is not None and inventory.beside is not None:
            return model, teacher_like(recipe.distillation, device, build_decoder)
        return model, inventory.built_beside()

    return ProbeTarget(inventory, models)


def _model_like(recipe: Recipe, config: SLMConfig, make: Make) -> Decoder:
    """The model that the recipe trains, made by `make` from a config; with `lora` it has an adapter."""
    decoder = make(config)
    if recipe.lora is not None:
        add_lora(decoder, config, _adapter_settings(recipe, recipe.lora))
    return decoder


def _adapter_settings(recipe: Recipe, wanted: LoRASettings) -> LoRASettings:
    """Settings of the adapter that the recipe starts from, else `wanted`."""
    if recipe.model.path is None or not is_adapter(base := find_model_directory(recipe.model.path)):
        return wanted
    return read_adapter_config(base).settings.model_copy(update={"base_weights": wanted.base_weights})


def _with_known_vocabulary(recipe: Recipe) -> Recipe:
    """The recipe with the vocabulary size of its tokenizer, if that exists already."""
    if recipe.tokenizer.path is None:
        return recipe
    size = len(SLMTokenizer.from_pretrained(find_tokenizer_directory(recipe.tokenizer.path)))
    return recipe.model_copy(update={"tokenizer": recipe.tokenizer.model_copy(update={"vocab_size": size})})
