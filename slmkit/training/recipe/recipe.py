"""The recipe: everything that decides what a run computes, in one YAML file."""

from __future__ import annotations

import difflib
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, field_validator, model_validator

from slmkit.config import Settings, UserError, did_you_mean, load_settings, read_yaml
from slmkit.data.settings import DataSettings, Reads, TokenizerSettings
from slmkit.model.config import TRAINING_FIELDS, SLMConfig
from slmkit.model.files.adapter_directory import LoRASettings
from slmkit.training.guards import GuardSettings
from slmkit.training.recipe.keys import HINTS, make_room, rename_old_keys
from slmkit.training.recipe.objective_settings import (
    DistillationSettings,
    GrpoSettings,
    KtoSettings,
    PreferenceSettings,
)
from slmkit.training.schedules import Schedule, make_schedule

MODEL_KEYS = [
    "preset",
    "path",
    "initialization",
    *(name for name in SLMConfig.model_fields if name not in TRAINING_FIELDS),
]
Initialization = Literal["gpt2", "copying"]


class ModelSettings(Settings):
    """A preset or a model directory to start from, and any field of `SLMConfig` to change in a preset."""

    model_config = ConfigDict(extra="allow")

    preset: str | None = None  # a shape by name, such as smollm2-135m; `slm inspect` knows them
    path: str | None = None  # a model or run directory whose weights are trained on
    # How a new model's weights start. copying: attention repeats the tokens it looks at, and embeddings are larger. A
    # small model then learns to copy sooner; its loss begins above ln(vocabulary).
    initialization: Initialization = "gpt2"

    @model_validator(mode="after")
    def _known_fields(self) -> ModelSettings:
        for name in self.changes:
            if name in TRAINING_FIELDS:
                raise ValueError(f"{name} is no part of a model: set it in the section train or distillation")
            if name not in SLMConfig.model_fields:
                raise ValueError(f"unknown key {name!r}; {did_you_mean(name, MODEL_KEYS, HINTS)}")
        if self.path is not None and (self.preset is not None or self.changes):
            raise ValueError("path names a trained model, whose shape is fixed: remove preset and the sizes")
        return self

    @classmethod
    def of_config(cls, config: SLMConfig, initialization: Initialization = "gpt2") -> ModelSettings:
        """A new model of this config, with every value written out."""
        return cls.model_construct(initialization=initialization, **config.model_dump(exclude=TRAINING_FIELDS))

    @classmethod
    def key_names(cls) -> list[str]:
        return MODEL_KEYS

    @property
    def changes(self) -> dict[str, Any]:
        return dict(self.model_extra or {})

    def build_config(self, **known: Any) -> SLMConfig:
        """The config of a new model; `known` (vocabulary, special tokens) comes from the tokenizer."""
        if self.preset is None:
            return load_settings(SLMConfig, self.changes | known, origin="model")
        return SLMConfig.from_preset(self.preset, **(self.changes | known))


LENGTHS = ("max_tokens", "max_steps", "num_train_epochs")
WARMUP_RATIO = 0.05
USUAL_AT_ONCE = 8_192  # tokens of a micro-batch on an accelerator
ENDLESS = "the length of a stream is not known: set train.max_tokens or train.max_steps, and not num_train_epochs"


class TrainSettings(Settings):
    """Length, batch, optimizer, evaluation and saving. Batch and length are in tokens; names are Hugging Face's if any.

    One of `max_tokens`, `max_steps` and `num_train_epochs` says when to stop; with none of them it is one epoch.
    """

    sequence_length: int | None = Field(None, gt=1)  # tokens of a row; None: the model's max_position_embeddings
    tokens_per_step: int = Field(8_192, gt=0)  # tokens of one optimizer step, of all processes together
    # What goes through the model at once: less takes less memory, and changes nothing else. auto: the most that fits;
    # None: 2^18 / hidden_size on a CPU, where more is hardly faster, and 8,192 elsewhere
    micro_batch_tokens: Annotated[int, Field(gt=0)] | Literal["auto"] | None = None
    max_tokens: int | None = Field(None, gt=0)  # stop after this many trained tokens
    max_steps: int | None = Field(None, gt=0)  # stop after this many optimizer steps
    num_train_epochs: float | None = Field(None, gt=0)  # stop after this many passes over the data
    optimizer: Literal["adamw", "adamw_8bit", "muon", "lion"] = "adamw"  # docs/training.md compares them
    learning_rate: float = Field(1e-3, gt=0)  # the peak, for AdamW; Lion needs a third of it or less
    muon_learning_rate: float = Field(0.02, gt=0)  # learning rate of the matrices that Muon updates
    muon_momentum: float = Field(0.95, ge=0, lt=1)  # momentum of Muon
    muon_beta2: float | None = Field(None, ge=0, lt=1)  # beta 2 of NorMuon's row variances, such as 0.95; None: Muon
    # how the learning rate falls
    lr_scheduler_type: Literal["cosine", "linear", "warmup_stable_decay", "inverse_sqrt"] = "cosine"
    min_learning_rate_ratio: float = Field(0.1, ge=0)  # the last rate, as a share of the peak; above 1 it rises to that
    warmup_steps: int | None = Field(None, ge=0)  # steps in which the learning rate rises
    # warm-up as a share of all steps; None: 0.05 unless warmup_steps is given
    warmup_ratio: float | None = Field(None, ge=0, lt=1)
    # steps of the schedule; None: those of the run; later steps keep the last rate
    lr_schedule_steps: int | None = Field(None, gt=0)
    lr_decay_ratio: float = Field(0.2, gt=0, le=1)  # warmup_stable_decay only: the share of all steps in which it falls
    weight_decay: float = Field(0.1, ge=0)  # weight decay of matrices; norms and biases have none
    adam_beta1: float = Field(0.9, ge=0, lt=1)  # beta 1 of AdamW and Lion
    adam_beta2: float = Field(0.95, ge=0, lt=1)  # beta 2 of AdamW
    adam_epsilon: float = Field(1e-8, gt=0)  # epsilon of AdamW
    max_grad_norm: float = Field(1.0, gt=0)  # gradients with a larger norm are scaled down to it
    # every n-th layer is recomputed in the backward pass: less memory; 0: none
    gradient_checkpointing: int = Field(0, ge=0)
    # torch.compile of each block; auto: on CUDA devices, and on a CPU in long runs where it is measured to be faster
    compile: Literal["auto"] | bool = "auto"
    logging_steps: int = Field(10, gt=0)  # steps from one line of metrics.jsonl to the next
    eval_steps: int | None = Field(None, gt=0)  # steps between evaluations; None: at most ten evaluations in a run
    save_steps: int | None = Field(None, gt=0)  # steps between checkpoints; None: one at each evaluation
    save_total_limit: int = Field(2, gt=0)  # the newest checkpoints to keep, in addition to the best one
    # tasks that the model is evaluated on as it is trained: those of `slm eval --tasks`
    eval_tasks: list[str] = Field(default_factory=list)
    eval_tasks_steps: int | None = Field(None, gt=0)  # steps between them; None: at every second evaluation
    eval_task_data: str | None = None  # folder with the tasks' files; None: those of the hub
    eval_limit: int | None = Field(100, gt=0)  # the first documents of each task; None: all
    eval_max_new_tokens: int | None = Field(None, gt=0)  # the longest answer; None: as each task says
    # what the best checkpoint has the best value of: validation_loss, validation_bits_per_byte, eval/TASK/METRIC
    metric_for_best_model: str = "validation_loss"
    early_stopping_patience: int | None = Field(None, gt=0)  # evaluations without a better metric that end the run
    sample_prompts: list[str] | None = None  # what samples.md continues; None: one from the validation data
    sample_tokens: int = Field(120, gt=0)  # tokens of each sample
    # where metrics go in addition to metrics.jsonl
    report_to: list[Literal["tensorboard", "wandb"]] = Field(default_factory=list)
    # with several processes: each holds the whole model (ddp, also auto) or a share of it (fsdp)
    parallel: Literal["auto", "ddp", "fsdp"] = "auto"
    ddp_timeout: float = Field(600, gt=0)  # seconds that a process waits for the others before it fails
    device: str = "auto"  # auto, cpu, cuda, cuda:1 or mps
    # docs/training.md lists what each means
    precision: Literal["auto", "float32", "bfloat16", "float16", "bfloat16-pure", "bfloat16-master"] = "auto"

    @field_validator("warmup_steps", mode="before")
    @classmethod
    def _whole_steps(cls, steps: Any) -> Any:
        if isinstance(steps, float) and 0 < steps < 1:
            raise ValueError(f"a whole number of steps; for a share of all steps set train.warmup_ratio={steps:g}")
        return steps

    @model_validator(mode="after")
    def _keys_fit_together(self) -> TrainSettings:
        for what, names in (("when to stop", LENGTHS), ("how long the warm-up is", ("warmup_steps", "warmup_ratio"))):
            given = [name for name in names if getattr(self, name) is not None]
            if len(given) > 1:
                raise ValueError(f"{' and '.join(given)} both say {what}: keep one (`{given[0]}: null` drops it)")
        if self.min_learning_rate_ratio > 1 and self.lr_scheduler_type == "inverse_sqrt":
            raise ValueError("min_learning_rate_ratio above 1: inverse_sqrt has no last step at which to reach it")
        for name, value in (("optimizer", self.optimizer), ("precision", self.precision)):
            if self.parallel == "fsdp" and value in ("adamw_8bit", "bfloat16-pure", "bfloat16-master"):
                raise ValueError(
                    f"{name} {value} needs whole weights, which parallel: fsdp splits: set parallel to ddp, or "
                    "use adamw, muon or lion in float32, bfloat16 or float16"
                )
        return self

    def rows_per_step(self, sequence_length: int) -> int:
        return max(1, round(self.tokens_per_step / sequence_length))

    def rows_per_micro_batch(self, sequence_length: int) -> int:
        """Rows per micro-batch; for `auto` all rows of a step, until `resolve_micro_batch` has found how many fit."""
        if self.micro_batch_tokens == "auto":
            return self.rows_per_step(sequence_length)
        at_once = max(1, (self.micro_batch_tokens or USUAL_AT_ONCE) // sequence_length)
        return min(self.rows_per_step(sequence_length), at_once)

    def total_steps(self, rows_in_epoch: int | None, sequence_length: int) -> int:
        """Optimizer steps of the whole run, at least one. Raises `UserError` for epochs of unknown length."""
        rows_per_step = self.rows_per_step(sequence_length)
        if self.max_steps is not None:
            return self.max_steps
        if self.max_tokens is not None:
            return max(1, self.max_tokens // (rows_per_step * sequence_length))
        if rows_in_epoch is None:
            raise UserError(ENDLESS)
        return max(1, round((self.num_train_epochs or 1) * rows_in_epoch / rows_per_step))

    def evaluation_interval(self, steps: int) -> int:
        return self.eval_steps or max(1, -(-steps // 10))

    def tasks_interval(self, steps: int) -> int:
        """Steps from one evaluation on tasks to the next."""
        return self.eval_tasks_steps or 2 * self.evaluation_interval(steps)

    @property
    def is_best_by_task(self) -> bool:
        return self.metric_for_best_model.startswith("eval/")

    def schedule(self, steps: int) -> Schedule:
        """Step → share of the peak learning rate, over a run of `steps` steps."""
        steps = self.lr_schedule_steps or steps
        warmup = self.total_warmup_steps(steps)
        return make_schedule(self.lr_scheduler_type, steps, warmup, self.min_learning_rate_ratio, self.lr_decay_ratio)

    def total_warmup_steps(self, steps: int) -> int:
        if self.warmup_steps is not None:
            return self.warmup_steps
        return round((WARMUP_RATIO if self.warmup_ratio is None else self.warmup_ratio) * steps)


READS: dict[str, Reads] = {
    "pretrain": "text",
    "sft": "conversations",
    "dpo": "pairs",
    "kto": "judgements",
    "grpo": "questions",
}


class Recipe(Settings):
    """One run. `objective` says what is learned: the next token of any text, or the assistant's turns of chats, or
    either of them from a teacher besides; which of two answers is better (`dpo`), which answers are good and which bad
    (`kto`), or which are right (`grpo`).

    With `lora` the model of `model.path` is frozen, and what is learned is an adapter for it.
    """

    hints = HINTS

    objective: Literal["pretrain", "sft", "distill", "dpo", "kto", "grpo"] = "pretrain"  # what is learned, as above
    output_dir: str = "runs/model"  # the run's folder; numbered where it exists
    seed: int = 0  # the seed of weights, data order, dropout and sampling
    license: str | None = None  # licence of the model, as the hub spells it (apache-2.0): for its model card
    model: ModelSettings = Field(default_factory=ModelSettings)  # the model to train
    lora: LoRASettings | None = None  # train an adapter instead of the whole model
    tokenizer: TokenizerSettings = Field(default_factory=TokenizerSettings)  # load or train a tokenizer
    data: DataSettings = Field(default_factory=DataSettings)  # where text comes from
    train: TrainSettings = Field(default_factory=TrainSettings)  # length, optimizer, evaluation, saving
    distillation: DistillationSettings | None = None  # settings of objective distill

    guard: GuardSettings = Field(default_factory=GuardSettings)  # what happens with losses that are not finite
    preference: PreferenceSettings = Field(default_factory=PreferenceSettings)  # settings of objective dpo
    kto: KtoSettings = Field(default_factory=KtoSettings)  # settings of objective kto
    grpo: GrpoSettings = Field(default_factory=GrpoSettings)  # settings of objective grpo

    @model_validator(mode="after")
    def _sections_fit_together(self) -> Recipe:
        streaming, train, distillation = self.data.streaming, self.train, self.distillation
        if streaming and train.max_tokens is None and train.max_steps is None:
            raise ValueError(f"data.streaming: {ENDLESS}")
        if streaming and self.is_padded:
            raise ValueError(f"data.streaming: {self.reads} are read whole before the first step: drop it")
        if streaming and distillation is not None and distillation.cache is not None:
            raise ValueError(
                "distillation.cache needs numbered rows, which a stream does not have: drop it, or data.streaming"
            )
        if (self.objective == "distill") != (distillation is not None):
            raise ValueError(
                "objective distill needs a section `distillation`, and no other objective has one: add it, or drop it"
            )
        if self.lora is not None and train.parallel == "fsdp":
            raise ValueError(
                "lora: parallel fsdp splits what is trained, which is very little here: set train.parallel to "
                "ddp, and lora.base_weights to int8 or nf4 where the base is too large for each process"
            )
        return self

    @model_validator(mode="after")
    def _answers_make_a_step(self) -> Recipe:
        """For `grpo`, tokens_per_step follows from the number of answers."""
        if self.objective == "grpo":
            length = self.train.sequence_length
            if length is None:
                raise ValueError("train.sequence_length: grpo needs the most tokens of a question with its answer")
            self.__dict__["train"] = self.train.model_copy(update={"tokens_per_step": self.grpo.rows_per_step * length})
        return self

    @property
    def reads(self) -> Reads:
        """The kind of data that the run reads from its sources."""
        return READS[self.objective] if self.distillation is None else self.distillation.reads

    @property
    def is_padded(self) -> bool:
        """Whether rows are padded to the longest of their micro-batch, so that the computed positions vary."""
        return self.reads in ("pairs", "judgements", "questions")

    def full(self, rows: int) -> int | None:
        """`rows` if sequences are packed, else None."""
        return None if self.is_padded else rows

    def tokens_of_row(self, sequence_length: int) -> int:
        """Tokens of a row: a pair has two sequences."""
        return 2 * sequence_length if self.reads == "pairs" else sequence_length


def load_recipe(
    path: str | Path, overrides: Sequence[str] = (), tell: Callable[[str], None] = lambda line: None
) -> Recipe:
    """Read a recipe file and apply `dotted.key=value` overrides, which replace contradicting keys of the file.

    `tell` is called with a line for each key of the file that was replaced or renamed. Raises `UserError` for unknown
    keys, and for two overrides that contradict each other.
    """
    content = read_yaml(path)
    name = Path(path).stem if path in shipped_recipes().values() else str(path)
    for line in (*rename_old_keys(content), *make_room(content, overrides)):
        tell(f"{name}: {line}")
    return _with_reward_file(load_settings(Recipe, content, overrides, origin=name), Path(path).parent)


def _with_reward_file(recipe: Recipe, folder: Path) -> Recipe:
    """The recipe with the absolute path of its reward function's file, in the working directory or `folder`.

    `rewards.py:score` and `rewards:score` name such functions; a run can thus be resumed in any directory.
    """
    file, colon, function = recipe.grpo.reward.rpartition(":")
    name = file if file.endswith(".py") else f"{file}.py"
    found = next((place / name for place in (Path.cwd(), folder) if colon and (place / name).is_file()), None)
    if found is None:
        return recipe
    grpo = recipe.grpo.model_copy(update={"reward": f"{found.resolve()}:{function}"})
    return recipe.model_copy(update={"grpo": grpo})


def shipped_recipes(kind: str = "") -> dict[str, Path]:
    """The recipes that come with slmkit, by name; of kind `merging` those of merges.

    In a clone they are next to the package, in an installation under the prefix.
    """
    folders = (Path(__file__).parents[3] / "recipes", Path(sys.prefix) / "share" / "slmkit" / "recipes")
    return {path.stem: path for folder in reversed(folders) for path in sorted((folder / kind).glob("*.yaml"))}


def find_recipe(name: str, kind: str = "") -> Path:
    """The path of a recipe file, or of one that comes with slmkit by its bare name. Raises `UserError` for neither."""
    if Path(name).is_file():
        return Path(name)
    if Path(name).is_dir() and (Path(name) / "recipe.yaml").is_file():
        raise UserError(f"{name}: a run, not a recipe; go on with `slm resume {name}`, or name {name}/recipe.yaml")
    if Path(name).exists():
        raise UserError(f"{name}: not a recipe; expected a YAML file, or a name that `slm recipes` lists")
    shipped = shipped_recipes(kind)
    if name not in shipped:
        near = difflib.get_close_matches(name, shipped, n=1)
        hint = f"did you mean {near[0]!r}?" if near else "`slm recipes` lists those that come with slmkit"
        raise UserError(f"{name}: no such recipe file; {hint}")
    return shipped[name]
