"""`slm plan`: memory, time, disk and loss of a run, or a recipe for a budget; `slm inspect`: the size of a model."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from slmkit.adapt.adapter_config import read_adapter_config
from slmkit.adapt.load import adapter_meta_model
from slmkit.adapt.lora import add_lora
from slmkit.config import UserError, load_settings
from slmkit.data.sources import BUILT_IN
from slmkit.device import Device, available_memory, find_device
from slmkit.files.find import find_config_directory, find_model_directory, find_tokenizer_directory
from slmkit.model.architectures import Architecture, architecture_of
from slmkit.model.config import SLMConfig, find_model_or_preset
from slmkit.model.decoder import Decoder
from slmkit.model.files.adapter_directory import ADAPTER_WEIGHTS, is_adapter
from slmkit.model.files.directory import empty_decoder
from slmkit.model.files.stored import stored_tensors
from slmkit.model.sizes import cache_size, cache_variants, flops_per_token, parameter_count, parameters_by_module
from slmkit.tokenizer import SLMTokenizer
from slmkit.training.estimate.cluster import ClusterEstimate, forecast_on_gpus
from slmkit.training.estimate.forecast import (
    EVALUATION_SECONDS,
    Estimate,
    expected_loss,
    forecast,
    guessed_rate,
    learning_rate_for,
    parameters_for,
    tokens_per_step_for,
)
from slmkit.training.estimate.memory import MemoryProfile, reading_bytes, training_bytes
from slmkit.training.estimate.micro_batch import resolve_micro_batch
from slmkit.training.estimate.probe import LONGEST, STEPS, Probe, probe
from slmkit.training.recipe.checks import expect_a_model
from slmkit.training.recipe.recipe import ModelSettings, Recipe, TrainSettings
from slmkit.workflows.distill import with_the_teachers_tokenizer
from slmkit.workflows.objectives import OBJECTIVES

QUICKSTART = "runs/quickstart/"  # models that later stages of the quickstart start from
LONGEST_BY_DEFAULT = 2_048  # tokens of a row that is inspected
BYTES_PER_TOKEN = 4  # of English, with a vocabulary of about ten thousand
SAMPLE = 200  # documents of the built-in corpus whose length is measured
WIDTHS = (64, 128, 192, 256, 320, 384, 448, 512, 640, 768, 896, 1_024, 1_280, 1_536, 1_792, 2_048)
FEWEST_STEPS = 200
ROUNDS = 3  # of proposing a shape and measuring it
ROUND_SECONDS = 8.0  # of measuring, in each round


@dataclass(frozen=True)
class RunEstimate:
    """Result of `slm plan`. `recipe` is the given one, or the proposed one."""

    recipe: Recipe
    config: SLMConfig
    profile: MemoryProfile
    device: Device
    estimate: Estimate
    measured: Probe | None
    text: int | None  # approximate tokens of the training text; None if unknown
    epochs: float | None  # how often the run reads it
    assumptions: list[str]

    @property
    def length(self) -> int:
        """Tokens of a row."""
        return self.recipe.train.sequence_length or self.config.max_position_embeddings

    @property
    def guessed_rate(self) -> float:
        """Tokens per second, without any measurement of this model."""
        return guessed_rate(self.profile, self.length, self.device)

    @property
    def memory_free(self) -> int:
        """Bytes; 0 if the system does not report it."""
        return available_memory(self.device)

    @property
    def disk_free(self) -> int:
        """Bytes."""
        output = Path(self.recipe.output_dir).absolute()
        return shutil.disk_usage(next(path for path in (output, *output.parents) if path.exists())).free

    @property
    def fits(self) -> bool:
        in_memory = not self.memory_free or self.estimate.memory_bytes <= self.memory_free
        return in_memory and self.estimate.disk_bytes <= self.disk_free


def plan_recipe(
    recipe: Recipe,
    measure: bool = True,
    say: Callable[[str], None] = lambda line: None,
    longest: float = LONGEST,
    measured: Probe | None = None,
) -> RunEstimate:
    """Estimate of a run of this recipe on this machine; `say` is called with what is being measured.

    Its speed is `measured` already, or with `measure` it is, in at most `longest` seconds.
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
    if measure and measured is None:
        say(f"measuring the speed in up to {STEPS} steps on random tokens, at most {longest:.0f} seconds")
        measured = probe(profile, recipe.train, device, longest=longest)
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


def plan_on_gpus(recipe: Recipe, gpus: int, gpu: str) -> tuple[ClusterEstimate, int]:
    """Estimate of a step of this recipe with FSDP on `gpus` GPUs called `gpu`, and the tokens of the whole run.

    Raises `UserError` like `plan_recipe`, and like `forecast_on_gpus`.
    """
    here = {"device": "cpu", "micro_batch_tokens": 1}  # a row at once: memory of this machine does not matter
    found = plan_recipe(recipe.model_copy(update={"train": recipe.train.model_copy(update=here)}), measure=False)
    return forecast_on_gpus(found.profile, recipe.train, gpus, gpu), found.estimate.tokens


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


def _built_in_text(recipe: Recipe, index: int) -> str:
    """Text of a document of the built-in source."""
    built_in = BUILT_IN[str(recipe.data.source)]
    if recipe.reads == "text":
        return built_in.text(0, index, False)
    messages = built_in.item("conversations" if recipe.reads == "conversations" else "questions", 0, index, False)
    said = " ".join(str(message["content"]) for message in messages)
    return said * (2 if recipe.reads == "pairs" else 1)


def tokens_of(recipe: Recipe, assumptions: list[str]) -> int | None:
    """Approximate tokens of the training text; None if it would have to be read. Adds to the assumptions."""
    data = recipe.data
    if data.is_built_in:
        assumptions.append(f"{BYTES_PER_TOKEN} bytes of text a token")
        size = sum(len(_built_in_text(recipe, index).encode()) for index in range(SAMPLE))
        return size // SAMPLE * data.documents // BYTES_PER_TOKEN
    sources = data.source if isinstance(data.source, list) else [data.source]
    if not data.source:
        what = "several sources" if data.sources else "no data.source"
        assumptions.append(f"{what}: any amount of text that the steps need")
    elif not all(isinstance(source, str) and Path(source).exists() for source in sources):
        assumptions.append("text that is not on this machine: any amount that the steps need")
    else:
        assumptions.append(f"{BYTES_PER_TOKEN} bytes of text a token, compressed files a third of their text")
        files = [file for source in map(str, sources) for file in (Path(source), *Path(source).rglob("*"))]
        size = sum(
            file.stat().st_size * (3 if file.suffix in (".gz", ".zst", ".parquet") else 1)
            for file in files
            if file.is_file()
        )
        return size // BYTES_PER_TOKEN
    return None


# -- proposals ---------------------------------------------------------------------------------------------------------


def propose(
    hours: float | None = None,
    tokens: int | None = None,
    device_name: str = "auto",
    measure: bool = True,
    say: Callable[[str], None] = lambda line: None,
    overrides: Sequence[str] = (),
) -> RunEstimate:
    """The best model for a budget of hours or of tokens on this device, by published laws and measured speed.

    `say` is called with the models tried; `overrides` name the data and the folder of the run (`data.source=book.txt`).
    One of both budgets has to be given. Raises `UserError` for an override of anything else.
    """
    if other := next((each for each in overrides if not each.startswith(("data.", "output_dir="))), None):
        raise UserError(f"{other}: a proposal takes only data.… and output_dir; change the rest in the file it writes")
    device, efficiency, tried = find_device(device_name), 1.0, dict[int, Probe]()  # by width
    if hours is not None:  # the run's ten evaluations take their time too
        hours = max(hours / 2, hours - 10 * EVALUATION_SECONDS / 3600)
    for _ in range(ROUNDS if measure and hours is not None else 1):
        width, budget = _best(hours, tokens, device, efficiency)
        if width in tried:
            break
        found = plan_recipe(_recipe_for(width, budget, device_name, overrides), measure, say, ROUND_SECONDS)
        if found.measured is not None:
            tried[width], rate = found.measured, found.measured.tokens_per_second
            say(f"  a model of {found.estimate.parameters / 1e6:.1f} M parameters: {rate:,.0f} tokens/s")
            efficiency = rate / found.guessed_rate
    if hours is not None and width in tried:  # the speed measured for this shape replaces the guess
        budget = int(hours * 3600 * tried[width].tokens_per_second)
        found = plan_recipe(_recipe_for(width, budget, device_name, overrides), measured=tried[width])
    text_bytes = found.estimate.tokens * BYTES_PER_TOKEN
    laws = [
        "size and loss: Hoffmann et al. 2022 as corrected by Besiroglu et al. 2024, fitted on web text in a vocabulary "
        "of 32,000 and on 44 M parameters and more; simpler text has a lower loss",
        "learning rate and batch: Li et al. 2025, for AdamW, fitted on 60 M parameters and more",
        f"text that is read once: about {text_bytes / 1e6:,.0f} MB, at {BYTES_PER_TOKEN} bytes a token",
    ]
    return replace(found, assumptions=laws + found.assumptions)


def _best(hours: float | None, tokens: int | None, device: Device, efficiency: float) -> tuple[int, int]:
    """Width and tokens: the lowest loss within the hours, or the compute-optimal size for the tokens."""
    candidates = []
    for width in WIDTHS:
        decoder = empty_decoder(_shape(width).build_config())
        a = decoder.architecture
        if hours is not None:
            rate = efficiency * guessed_rate(MemoryProfile(decoder), a.max_positions, device)
            budget = int(hours * 3600 * rate)
            candidates.append((expected_loss(parameter_count(a), max(1, budget)), width, budget))
        else:
            assert tokens is not None
            candidates.append((abs(parameter_count(a) / parameters_for(tokens) - 1), width, tokens))
    _, width, budget = min(candidates)
    return width, budget


def _shape(width: int) -> ModelSettings:
    """A Llama of this width: depth grows with it, heads have 64 channels."""
    return ModelSettings.model_validate(
        {
            "hidden_size": width,
            "num_hidden_layers": min(32, max(4, round(width / 48))),
            "num_attention_heads": max(1, width // 64),
            "intermediate_size": round(width * 8 / 3 / 64) * 64,
            "max_position_embeddings": 512 if width <= 256 else 1_024,
            "vocab_size": 4_096 if width <= 192 else 16_384 if width <= 1_024 else 32_768,
        }
    )


def _recipe_for(width: int, tokens: int, device_name: str, overrides: Sequence[str]) -> Recipe:
    model = _shape(width)
    config = model.build_config()
    sizes, length = parameters_by_module(architecture_of(config)), config.max_position_embeddings
    rows = max(1, min(round(tokens_per_step_for(tokens) / length), tokens // (FEWEST_STEPS * length)))
    content = {
        "output_dir": "runs/planned",
        "model": {key: value for key, value in model.changes.items() if key != "vocab_size"},
        "tokenizer": {"vocab_size": config.vocab_size},
        "train": {
            "tokens_per_step": rows * length,
            "max_tokens": max(tokens, rows * length),
            "learning_rate": float(f"{learning_rate_for(sum(sizes.values()) - sizes['embedding'], tokens):.2g}"),
            "device": device_name,
        },
    }
    return load_settings(Recipe, content, overrides)


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
