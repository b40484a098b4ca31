"""Proposal of a recipe: the model with the lowest expected loss within a number of hours or tokens on this machine."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from slmkit.config import UserError, load_settings
from slmkit.data.sources import BUILT_IN
from slmkit.device import Device, available_memory, find_device
from slmkit.model.architectures import architecture_of
from slmkit.model.config import SLMConfig
from slmkit.model.files.directory import empty_decoder
from slmkit.model.sizes import parameter_count, parameters_by_module
from slmkit.training.estimate.forecast import EVALUATION_SECONDS, Estimate, forecast, guessed_rate
from slmkit.training.estimate.memory import MemoryProfile
from slmkit.training.estimate.probe import Probe, probe
from slmkit.training.estimate.scaling_laws import expected_loss, learning_rate_for, parameters_for, tokens_per_step_for
from slmkit.training.recipe.recipe import ModelSettings, Recipe, TrainSettings

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
    Raises `UserError` unless one of both budgets is given, and for an override of anything else.
    """
    if (hours is None) == (tokens is None):
        raise UserError("a proposal needs a budget: --hours or --tokens, or a recipe to look at")
    if other := next((each for each in overrides if not each.startswith(("data.", "output_dir="))), None):
        raise UserError(f"{other}: a proposal takes only data.… and output_dir; change the rest in the file it writes")
    device = find_device(device_name)
    if hours is not None:  # the run's ten evaluations take their time too
        hours = max(hours / 2, hours - 10 * EVALUATION_SECONDS / 3600)
    efficiency = 1.0  # factor on the guessed rate
    measured: dict[int, Probe] = {}  # by width
    for _ in range(ROUNDS if measure and hours is not None else 1):
        width, budget = _best(hours, tokens, device, efficiency)
        recipe, config = _recipe_for(width, budget, device_name, overrides)
        profile = MemoryProfile(empty_decoder(config))
        if not measure or width in measured:
            break
        size = parameter_count(profile.model.architecture)
        say(f"measuring a model of {size / 1e6:.1f} M parameters, at most {ROUND_SECONDS:.0f} seconds")
        measured[width] = probe(profile, recipe.train, device, longest=ROUND_SECONDS)
        rate = measured[width].tokens_per_second
        say(f"  {rate:,.0f} tokens/s")
        efficiency = rate / guessed_rate(profile, config.max_position_embeddings, device)
    found = measured.get(width)
    if hours is not None and found is not None:  # the speed measured for this shape replaces the guess
        recipe, config = _recipe_for(width, int(hours * 3600 * found.tokens_per_second), device_name, overrides)
    steps = recipe.train.total_steps(0, config.max_position_embeddings)
    text_bytes = steps * recipe.train.tokens_per_step * BYTES_PER_TOKEN
    assumptions = [
        "size and loss: Hoffmann et al. 2022 as corrected by Besiroglu et al. 2024, fitted on web text in a vocabulary "
        "of 32,000 and on 44 M parameters and more; simpler text has a lower loss",
        "learning rate and batch: Li et al. 2025, for AdamW, fitted on 60 M parameters and more",
        f"text that is read once: about {text_bytes / 1e6:,.0f} MB, at {BYTES_PER_TOKEN} bytes a token",
    ]
    estimate = forecast(
        profile, recipe.train, steps, device, tokens_per_second=found.tokens_per_second if found else None
    )
    text = tokens_of(recipe, []) if overrides else None
    epochs = estimate.tokens / text if text else None
    return RunEstimate(recipe, config, profile, device, estimate, found, text, epochs, assumptions)


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


def _recipe_for(width: int, tokens: int, device_name: str, overrides: Sequence[str]) -> tuple[Recipe, SLMConfig]:
    model = _shape(width)
    config = model.build_config()
    sizes, length = parameters_by_module(architecture_of(config)), config.max_position_embeddings
    rows = max(1, min(round(tokens_per_step_for(tokens) / length), tokens // (FEWEST_STEPS * length)))
    settings = TrainSettings(
        tokens_per_step=rows * length,
        micro_batch_tokens=min(rows * length, 8_192),
        max_tokens=max(tokens, rows * length),
        learning_rate=float(f"{learning_rate_for(sum(sizes.values()) - sizes['embedding'], tokens):.2g}"),
        device=device_name,
    )
    content = {
        "output_dir": "runs/planned",
        "model": {key: value for key, value in model.changes.items() if key != "vocab_size"},
        "tokenizer": {"vocab_size": config.vocab_size},
        "train": settings.model_dump(exclude_unset=True),
    }
    return load_settings(Recipe, content, overrides), config


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
