"""`slm plan` of a recipe: memory, time, disk and loss of its run; `slm inspect` of a model: its size and needs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from slmkit.adapt.adapter_config import read_adapter_config
from slmkit.adapt.load import adapter_meta_model
from slmkit.adapt.lora import add_lora
from slmkit.config import UserError
from slmkit.device import find_device
from slmkit.find import find_config_directory, find_model_directory, find_tokenizer_directory
from slmkit.model.architectures import Architecture, architecture_of
from slmkit.model.config import SLMConfig, find_model_or_preset
from slmkit.model.decoder import Decoder
from slmkit.model.files.adapter_directory import ADAPTER_WEIGHTS, is_adapter
from slmkit.model.files.directory import empty_decoder
from slmkit.model.files.stored import stored_tensors
from slmkit.model.sizes import cache_size, cache_variants, flops_per_token, parameters_by_module
from slmkit.tokenizer import SLMTokenizer
from slmkit.training.estimate.forecast import forecast
from slmkit.training.estimate.memory import MemoryProfile, reading_bytes, training_bytes
from slmkit.training.estimate.micro_batch import resolve_micro_batch
from slmkit.training.estimate.probe import LONGEST, STEPS, probe
from slmkit.training.estimate.proposal import RunEstimate, tokens_of
from slmkit.training.recipe.checks import expect_a_model
from slmkit.training.recipe.recipe import Recipe, TrainSettings
from slmkit.workflows.distill import with_the_teachers_tokenizer
from slmkit.workflows.objectives import OBJECTIVES

QUICKSTART = "runs/quickstart/"  # models that later stages of the quickstart start from
LONGEST_BY_DEFAULT = 2_048  # tokens of a row that is inspected


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
        return SLMConfig.from_pretrained(find_config_directory(recipe.model.path))
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


# -- `slm inspect` -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Inspection:
    """Figures of one model: sizes in bytes, FLOPs per token; a multiply-add counts as two."""

    summary: str
    length: int
    parameters: dict[str, int]
    operations: dict[str, int]
    cache_bytes: dict[str, int]  # per token, of layers without a window: this configuration and others
    window_bytes: int  # of a row's cache, for layers with a window
    cache_of_a_row: int
    memory: dict[str, int]
    compute_dtype: str

    @property
    def parameter_count(self) -> int:
        return sum(self.parameters.values())


def inspect_model(
    model: str | Path,
    rows: int = 8,
    length: int | None = None,
    precision: str = "auto",
    optimizer: str = "adamw",
) -> Inspection:
    """`model` is a model directory, an adapter, a run or a preset; `rows` of `length` tokens go through it at once.

    Training is that of all weights, or of the adapter on a frozen base. Raises `UserError` for a model that does not
    exist, and for a length beyond its context.
    """
    found = find_model_or_preset(model)
    config = SLMConfig.from_preset(found) if isinstance(found, str) else SLMConfig.from_pretrained(found)
    a, decoder = architecture_of(config), empty_decoder(config)
    length = length or min(a.max_positions, LONGEST_BY_DEFAULT)
    a.expect(length)
    parameters = parameters_by_module(a)
    if isinstance(found, Path) and is_adapter(found):
        adapter = find_model_directory(model)
        tensors = stored_tensors(adapter / ADAPTER_WEIGHTS).values()
        parameters["adapter"] = sum(torch.Size(tensor.shape).numel() for tensor in tensors)
        decoder = adapter_meta_model(adapter)
    device, flops, cache = find_device("cpu", precision), flops_per_token(a, length), cache_size(a, length)
    settings, profile = TrainSettings(optimizer=optimizer), MemoryProfile(decoder)
    recomputed = settings.model_copy(update={"gradient_checkpointing": 1})
    return Inspection(
        summary=_summary(config, a),
        length=length,
        parameters=parameters,
        operations={
            "forward, matrices": flops.matrices,
            "forward, attention": flops.attention,
            "backward": flops.backward,
        },
        cache_bytes={"this configuration": cache.per_token}
        | {name: cache_size(variant, length).per_token for name, variant in cache_variants(a).items()},
        window_bytes=cache.of_windows,
        cache_of_a_row=cache.at_length,
        memory={
            f"training with {optimizer}": training_bytes(profile, settings, rows, length, device),
            "… and gradient_checkpointing": training_bytes(profile, recomputed, rows, length, device),
            "running in float32": reading_bytes(a, rows, length, torch.float32),
            "running in bfloat16": reading_bytes(a, rows, length, torch.bfloat16),
        },
        compute_dtype=str(device.describe()["compute_dtype"]),
    )


def _summary(config: SLMConfig, a: Architecture) -> str:
    attention = f"{a.heads} heads over {a.kv_heads} key-value heads of {a.head_dim}"
    if a.latent is not None:
        attention = f"{a.heads} heads over latents of {a.latent.kv_rank} + {a.latent.rope_dim}"
    windows = sum(layer.window is not None for layer in a.layers)
    seen = f" ({windows} with a window)" if windows else ""
    return (
        f"{config.model_type}, {a.depth} layers{seen} of width {a.width}, {attention}, MLP {a.mlp_width}, "
        f"{a.vocab_size:,} tokens, context {a.max_positions:,}"
    )
