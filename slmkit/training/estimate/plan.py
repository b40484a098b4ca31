"""`slm plan`: memory, time, disk and loss of a recipe, or of the best recipe for a budget."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from slmkit.config import UserError, load_settings
from slmkit.data.sources import BUILT_IN
from slmkit.device import Device, available_memory, find_device
from slmkit.find import find_config_directory
from slmkit.model.architectures import architecture_of
from slmkit.model.config import SLMConfig
from slmkit.model.files.adapter_directory import config_directory
from slmkit.model.sizes import parameter_count, parameters_by_module
from slmkit.training.estimate.forecast import EVALUATION_SECONDS, Estimate, forecast, guessed_rate
from slmkit.training.estimate.memory_profile import MemoryProfile
from slmkit.training.estimate.micro_batch import fitting_rows
from slmkit.training.estimate.probe import LONGEST, STEPS, Probe, ProbeTarget, probe
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
    inventory: MemoryProfile
    device: Device
    ahead: Estimate
    guessed_rate: float  # tokens/s, before any measurement
    measured: Probe | None
    text: int | None  # approximate tokens of the training text; None if unknown
    epochs: float | None  # how often the run reads it
    memory_free: int  # bytes; 0 if the system does not report it
    disk_free: int
    assumptions: list[str] = field(default_factory=list)

    @property
    def fits(self) -> bool:
        in_memory = not self.memory_free or self.ahead.memory_bytes <= self.memory_free
        return in_memory and self.ahead.disk_bytes <= self.disk_free


def outlook(
    recipe: Recipe,
    subject_of: Callable[[Recipe, SLMConfig, Device], ProbeTarget],
    measure: bool = True,
    say: Callable[[str], None] = lambda line: None,
) -> RunEstimate:
    """Estimate of a recipe on this machine. `subject_of` gives the models to measure; `say` is called with what is
    being measured.

    Raises `UserError` for a setting that the plan needs and the recipe lacks.
    """
    device = find_device(recipe.train.device, recipe.train.precision)
    config, assumptions = _config_of(recipe)
    length = recipe.train.sequence_length or config.max_position_embeddings
    text, about_text = _tokens_of(recipe)
    assumptions += about_text
    if text is None and recipe.train.max_steps is None and recipe.train.max_tokens is None:
        raise UserError("the length of this text is not known before it is read: set train.max_tokens or max_steps")
    rows, about_rows = _rows_of(recipe, text, length)
    assumptions += about_rows
    steps = recipe.train.total_steps(rows, recipe.tokens_of_row(length))
    subject = subject_of(recipe, config, device)
    if measure:
        say(f"measuring the speed in up to {STEPS} steps on random tokens, at most {LONGEST:.0f} seconds")
    ahead = _outlook(recipe, config, subject, steps, device, text, measure, assumptions)
    epochs = steps * recipe.train.rows_per_step(length) / rows if text else None
    return replace(ahead, text=text, epochs=epochs)


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
    seen: dict[int, Probe] = {}
    for _ in range(ROUNDS if measure and hours is not None else 1):
        width, budget = _best(hours, tokens, device, efficiency)
        recipe, config = _recipe_for(width, budget, device_name, overrides)
        if not measure or width in seen:
            break
        size, length = parameter_count(architecture_of(config)), config.max_position_embeddings
        say(f"measuring a model of {size / 1e6:.1f} M parameters, at most {ROUND_SECONDS:.0f} seconds")
        seen[width] = probe(ProbeTarget.fresh(config), recipe.train, device, longest=ROUND_SECONDS)
        say(f"  {seen[width].tokens_per_second:,.0f} tokens/s")
        efficiency = seen[width].tokens_per_second / guessed_rate(
            MemoryProfile(architecture_of(config)), length, device
        )
    measured = seen.get(width)
    if hours is not None and measured is not None:  # the speed measured for this shape replaces the guess
        recipe, config = _recipe_for(width, int(hours * 3600 * measured.tokens_per_second), device_name, overrides)
    elif measure and measured is None:
        say(f"measuring the speed in up to {STEPS} steps, at most {ROUND_SECONDS:.0f} seconds")
        measured = probe(ProbeTarget.fresh(config), recipe.train, device, longest=ROUND_SECONDS)
    steps = recipe.train.total_steps(0, config.max_position_embeddings)
    size = steps * recipe.train.tokens_per_step * BYTES_PER_TOKEN
    assumptions = [
        "size and loss: Hoffmann et al. 2022 as corrected by Besiroglu et al. 2024, fitted on web text in a vocabulary "
        "of 32,000 and on 44 M parameters and more; simpler text has a lower loss",
        "learning rate and batch: Li et al. 2025, for AdamW, fitted on 60 M parameters and more",
        f"text that is read once: about {size / 1e6:,.0f} MB, at {BYTES_PER_TOKEN} bytes a token",
    ]
    ahead = _outlook(recipe, config, ProbeTarget.fresh(config), steps, device, None, measured, assumptions)
    text = _tokens_of(recipe)[0] if overrides else None
    return replace(ahead, text=text, epochs=ahead.ahead.tokens / text if text else None)


def _outlook(
    recipe: Recipe,
    config: SLMConfig,
    subject: ProbeTarget,
    steps: int,
    device: Device,
    text: int | None,
    measure: bool | Probe | None,
    assumptions: list[str],
) -> RunEstimate:
    length, inventory = recipe.train.sequence_length or config.max_position_embeddings, subject.inventory
    if recipe.train.micro_batch_tokens == "auto":
        most = recipe.train.rows_per_step(length)
        rows = fitting_rows(inventory, recipe.train, most, length, device, available_memory(device))
        train = recipe.train.model_copy(update={"micro_batch_tokens": rows * length})
        recipe = recipe.model_copy(update={"train": train})
    measured = probe(subject, recipe.train, device) if measure is True else measure or None
    guess = guessed_rate(inventory, length, device)
    ahead = forecast(
        config,
        recipe.train,
        steps,
        device,
        tokens_per_second=measured.tokens_per_second if measured else None,
        unique_tokens=text,
        validation_tokens=round((text or 0) * recipe.data.validation_fraction),
        from_scratch=recipe.objective == "pretrain" and recipe.model.path is None,
        inventory=inventory,
    )
    folder = next(
        path
        for path in (Path(recipe.output_dir).absolute(), *Path(recipe.output_dir).absolute().parents)
        if path.exists()
    )
    free = available_memory(device), shutil.disk_usage(folder).free
    return RunEstimate(recipe, config, inventory, device, ahead, guess, measured, None, None, *free, assumptions)


def _config_of(recipe: Recipe) -> tuple[SLMConfig, list[str]]:
    """The model's config, and the assumptions made."""
    if recipe.model.path is not None:
        try:
            return SLMConfig.from_pretrained(config_directory(find_config_directory(recipe.model.path))), []
        except UserError:
            if recipe.output_dir.startswith("runs/quickstart"):  # its stages depend on each other
                return SLMConfig.from_preset("quickstart"), [f"{recipe.model.path} will be as the preset quickstart"]
            raise
    return recipe.model.build_config(vocab_size=recipe.tokenizer.vocab_size), []


def _rows_of(recipe: Recipe, text: int | None, length: int) -> tuple[int, list[str]]:
    """Rows of an epoch, and the assumptions made."""
    if not recipe.is_padded:
        return max(1, (text or 0) // length), []
    about = [f"{recipe.reads} that fill their rows of {length} tokens: shorter ones are faster"]
    if recipe.reads == "questions":
        about.append("answers that are there: sampling them takes its time besides")
    if recipe.data.is_built_in:
        return recipe.data.documents * (recipe.grpo.num_generations if recipe.reads == "questions" else 1), about
    return max(1, (text or 0) // recipe.tokens_of_row(length)), about


def _built_in_text(recipe: Recipe, index: int) -> str:
    """Text of a document of the built-in source."""
    built_in = BUILT_IN[str(recipe.data.source)]
    if recipe.reads == "text":
        return built_in.text(0, index, False)
    read = built_in.conversation if recipe.reads == "conversations" else built_in.question
    said = " ".join(str(message["content"]) for message in read(0, index, False))
    return said * (2 if recipe.reads == "pairs" else 1)


def _tokens_of(recipe: Recipe) -> tuple[int | None, list[str]]:
    """Approximate tokens of the training text, and the rule used; None if the text would have to be read."""
    data = recipe.data
    if data.is_built_in:
        made = (_built_in_text(recipe, index) for index in range(SAMPLE))
        size = sum(len(text.encode()) for text in made) // SAMPLE * data.documents
        return size // BYTES_PER_TOKEN, [f"{BYTES_PER_TOKEN} bytes of text a token"]
    if not data.source:
        what = "several sources" if data.sources else "no data.source"
        return None, [f"{what}: any amount of text that the steps need"]
    sources = [data.source] if isinstance(data.source, str) else data.source
    if not all(isinstance(source, str) and Path(source).exists() for source in sources):
        return None, ["text that is not on this machine: any amount that the steps need"]
    files = [
        file for source in sources for file in ([Path(source)] if Path(source).is_file() else Path(source).rglob("*"))
    ]
    size = sum(
        file.stat().st_size * (3 if file.suffix in (".gz", ".zst", ".parquet") else 1)
        for file in files
        if file.is_file()
    )
    return size // BYTES_PER_TOKEN, [f"{BYTES_PER_TOKEN} bytes of text a token, compressed files a third of their text"]


# -- the proposal -----------------------------------------------------------------------------------------------------


def _shape(width: int) -> ModelSettings:
    """A Llama of this width: depth grows with it, heads have 64 channels."""
    depth = min(32, max(4, round(width / 48)))
    vocabulary = 4_096 if width <= 192 else 16_384 if width <= 1_024 else 32_768
    return ModelSettings.model_validate(
        {
            "hidden_size": width,
            "num_hidden_layers": depth,
            "num_attention_heads": max(1, width // 64),
            "intermediate_size": round(width * 8 / 3 / 64) * 64,
            "max_position_embeddings": 512 if width <= 256 else 1_024,
            "vocab_size": vocabulary,
        }
    )


def _best(hours: float | None, tokens: int | None, device: Device, efficiency: float) -> tuple[int, int]:
    """Width and tokens: the lowest loss in so many hours, or the compute-optimal size for so many tokens."""
    candidates = []
    for width in WIDTHS:
        a = architecture_of(_shape(width).build_config())
        size, length = parameter_count(a), a.max_positions
        if hours is not None:
            budget = int(hours * 3600 * efficiency * guessed_rate(MemoryProfile(a), length, device))
            candidates.append((expected_loss(size, max(1, budget)), width, budget))
        else:
            assert tokens is not None
            candidates.append((abs(size / parameters_for(tokens) - 1), width, tokens))
    _, width, budget = min(candidates)
    return width, budget


def _recipe_for(width: int, tokens: int, device_name: str, overrides: Sequence[str]) -> tuple[Recipe, SLMConfig]:
    model = _shape(width)
    config = model.build_config()
    a = architecture_of(config)
    length = config.max_position_embeddings
    size = parameter_count(a) - parameters_by_module(a)["embedding"]
    rows = max(1, min(round(tokens_per_step_for(tokens) / length), tokens // (FEWEST_STEPS * length)))
    settings = TrainSettings(
        tokens_per_step=rows * length,
        micro_batch_tokens=min(rows * length, 8_192),
        max_tokens=max(tokens, rows * length),
        learning_rate=float(f"{learning_rate_for(size, tokens):.2g}"),
        device=device_name,
    )
    content = {
        "output_dir": "runs/planned",
        "model": {key: value for key, value in model.changes.items() if key != "vocab_size"},
        "tokenizer": {"vocab_size": config.vocab_size},
        "train": settings.model_dump(exclude_unset=True),
    }
    return load_settings(Recipe, content, overrides), config
