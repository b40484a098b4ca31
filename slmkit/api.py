"""The few classes a script wants, put together from the rooms below; the commands stand on the same functions."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from slmkit.config import UserError
from slmkit.data import corpus as data_corpus
from slmkit.data.corpus import Corpus, build_corpus, open_corpus
from slmkit.data.stream import ChatRows, DocumentRows, PretrainRows, Stream
from slmkit.data.text_dataset import TextDataset
from slmkit.device import Device, find_device
from slmkit.evaluation import validation_loss
from slmkit.evaluation.loss import LossReport, Rows
from slmkit.generation import ChatSession, SamplingSettings, complete, generate_ids
from slmkit.model import Decoder, SLMConfig, build_decoder, load_decoder, save_decoder
from slmkit.model.config import TRAINING_FIELDS
from slmkit.tokenizer import SLMTokenizer
from slmkit.training.loop import Every, Hook, Plan, Report, State
from slmkit.training.progress import TrainingProgress
from slmkit.training.recipe import ModelSettings, Recipe, TrainSettings, load_recipe
from slmkit.training.run import (
    RunDirectory,
    evaluation_interval,
    find_model_directory,
    fit,
    make_plan,
    new_run_directory,
)
from slmkit.training.run_log import append_samples


class SLMForCausalLM(nn.Module):
    """A decoder with its head: token ids in, logits out."""

    def __init__(self, config: SLMConfig, decoder: Decoder | None = None) -> None:
        """Fresh weights, drawn from torch's global generator (`torch.manual_seed`), unless a decoder is given."""
        super().__init__()
        self.config = config
        self.decoder = decoder or build_decoder(config, seed=int(torch.randint(2**62, ())))

    def forward(self, input_ids: Tensor) -> Tensor:
        """input_ids [batch, sequence] → logits [batch, sequence, vocab_size], float32."""
        return self.decoder.logits(self.decoder(input_ids)).float()

    @classmethod
    def from_pretrained(cls, directory: str | Path, device: str = "cpu") -> SLMForCausalLM:
        """Read a model directory, or a run's best checkpoint, in evaluation mode. Raises `UserError`."""
        decoder, config = load_decoder(find_model_directory(directory), device)
        return cls(config, decoder).eval()

    def save_pretrained(self, directory: str | Path) -> None:
        """Write a Hugging Face model directory. Raises `UserError` when it cannot be written."""
        save_decoder(self.decoder, self.config, directory)

    def generate(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        max_length: int | None = None,
        max_new_tokens: int | None = None,
        do_sample: bool = False,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        min_p: float = 0.0,
        repetition_penalty: float = 1.0,
        eos_token_id: int | Sequence[int] | None = None,
        pad_token_id: int | None = None,
        seed: int | None = None,
    ) -> Tensor:
        """input_ids [batch, prompt] → [batch, prompt + new], the prompt included; meanings as in transformers.

        `attention_mask` [batch, prompt] is 0 where a shorter prompt is padded, at its left, and 1 elsewhere.
        `max_length` counts the prompt, `max_new_tokens` does not; with neither it is the model's whole context.
        Rows that have ended are filled with `pad_token_id`.
        """
        settings = SamplingSettings(
            do_sample=do_sample,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            min_p=min_p,
            repetition_penalty=repetition_penalty,
            seed=seed,
        )
        prompt = input_ids.size(1)
        if max_new_tokens is None:
            max_new_tokens = (max_length or self.decoder.architecture.max_positions) - prompt
        if max_new_tokens < 1:
            raise UserError(f"max_length {max_length} leaves no room after a prompt of {prompt} tokens: raise it")
        return generate_ids(
            self.decoder,
            input_ids,
            max_new_tokens=max_new_tokens,
            stop_ids=_as_set(self.config.eos_token_id if eos_token_id is None else eos_token_id),
            settings=settings,
            pad_token_id=_first(pad_token_id, self.config.pad_token_id, 0),
            padding=_left_padding(attention_mask),
        )


class SLMTrainer:
    """Train a model on a dataset in a script. What it leaves in `output_dir` is a run like any other.

    `config` carries the training fields: `learning_rate`, `batch_size` (sequences a step), `sequence_length`,
    `gradient_clip_norm`, `warmup_steps`.
    """

    def __init__(
        self,
        config: SLMConfig,
        model: SLMForCausalLM,
        tokenizer: Any,
        train_dataset: TextDataset,
        eval_dataset: TextDataset | None = None,
        teacher_model: nn.Module | None = None,
        output_dir: str = "./checkpoints",
        device: str = "auto",
        seed: int = 0,
    ) -> None:
        if teacher_model is not None:
            raise UserError("teacher_model: distillation is not there yet; train without a teacher")
        if len(tokenizer) > config.vocab_size:
            raise UserError(
                f"the tokenizer has {len(tokenizer)} tokens, the model {config.vocab_size}: "
                f"set vocab_size={len(tokenizer)} in its config"
            )
        self.config, self.model, self.tokenizer = config, model, tokenizer
        self.train_dataset, self.eval_dataset = train_dataset, eval_dataset
        self.output_dir, self.device_name, self.seed = output_dir, device, seed

    def train(self, num_epochs: float = 1, max_steps: int | None = None) -> dict[str, float]:
        """Train and return the last step's figures: `loss`, `tokens`, `validation_loss` where there is an eval set."""
        length = self.train_dataset.length
        settings = TrainSettings(
            sequence_length=length,
            tokens_per_step=self.config.batch_size * length,
            learning_rate=self.config.learning_rate,
            max_grad_norm=self.config.gradient_clip_norm,
            warmup_steps=self.config.warmup_steps,
            num_train_epochs=None if max_steps else num_epochs,
            max_steps=max_steps,
            device=self.device_name,
        )
        device = find_device(settings.device, settings.precision)
        rows = min(self.config.batch_size, self.train_dataset.rows_in_epoch)
        stream = Stream(self.train_dataset, rows, self.seed)
        plan = make_plan(settings, self.train_dataset.rows_in_epoch, length, device)
        run = new_run_directory(self.output_dir)
        recipe = Recipe(output_dir=str(run.root), seed=self.seed, model=_resolved(self.config), train=settings)
        run.describe(recipe, device, {"texts": "given in a script"})
        last: Report = {}
        hooks = [Every(plan.steps, lambda state, report: last.update(report))]
        if self.eval_dataset is not None:
            validate = Validate(self.eval_dataset, device)
            hooks.insert(0, Every(evaluation_interval(settings, plan.steps), validate))
        with TrainingProgress("training", plan.steps) as progress:
            hooks.append(Every(1, progress.update))
            fit(run, recipe, self.model.decoder, self.config, stream, plan, companions=self._companions, hooks=hooks)
        self.model.eval()
        return last

    def _companions(self, directory: Path) -> None:
        if hasattr(self.tokenizer, "save_pretrained"):
            self.tokenizer.save_pretrained(str(directory))


class Reporter(data_corpus.Reporter, Protocol):
    """Where the long functions below say how far they are."""

    def warn(self, line: str) -> None: ...


def train_recipe(recipe: Recipe, reporter: Reporter, dry_run: bool = False) -> RunDirectory:
    """Do a whole run: tokenizer, shards, model, training. Nothing is left behind when it fails before the first step.

    Raises `UserError` for whatever in the recipe or its data is wrong.
    """
    device = find_device(recipe.train.device, recipe.train.precision)
    base = find_model_directory(recipe.model.path) if recipe.model.path else None
    run = new_run_directory(recipe.output_dir)
    try:
        tokenizer = SLMTokenizer.from_pretrained(base) if base else None
        corpus = build_corpus(
            recipe.objective, recipe.data, recipe.tokenizer, recipe.seed, run.data, tokenizer, reporter
        )
        model, config = _model_for(recipe, corpus.tokenizer, base)
        session = _Session(run, _resolve(recipe, run, config, base), corpus, model, config, device)
        run.describe(session.recipe, device, corpus.describe())
        reporter.say(session.summary())
    except BaseException:
        shutil.rmtree(run.root, ignore_errors=True)
        raise
    if dry_run:
        shutil.rmtree(run.root)
    else:
        session.run_to_the_end(reporter, resume=False)
    return run


def resume_run(directory: str | Path, reporter: Reporter) -> RunDirectory:
    """Go on with a run from its newest intact checkpoint. Raises `UserError` where there is none."""
    run = RunDirectory(directory)
    if not run.recipe.is_file():
        raise UserError(f"{run.root}: not a run: it has no recipe.yaml; expected a directory that `slm train` made")
    recipe = load_recipe(run.recipe)
    device = find_device(recipe.train.device, recipe.train.precision)
    corpus = open_corpus(run.data)
    base = find_model_directory(recipe.model.path) if recipe.model.path else None
    model, config = _model_for(recipe, corpus.tokenizer, base)
    session = _Session(run, recipe, corpus, model, config, device)
    reporter.say(session.summary())
    session.run_to_the_end(reporter, resume=True)
    return run


@dataclass(frozen=True)
class RunFigures:
    """How good a run's best model is on its validation text."""

    report: LossReport
    bits_per_byte: float
    perfect_loss: float | None  # nats per token of the corpus' own generator, where it has one


def evaluate_run(directory: str | Path) -> RunFigures:
    """Validation loss of a pretraining run's best checkpoint, in float32, every document in full context."""
    run = RunDirectory(directory)
    decoder, config = load_decoder(find_model_directory(directory))
    shards = open_corpus(run.data).validation
    length = load_recipe(run.recipe).train.sequence_length or config.max_position_embeddings
    separate = load_recipe(run.recipe).data.separate_documents
    rows, device = DocumentRows(shards, length), find_device("cpu", "float32")
    report = validation_loss(decoder, rows, device, separate=separate)
    return RunFigures(report, report.bits_per_byte(shards.header.text_bytes), shards.header.perfect_loss)


class _Session:
    """A recipe with everything it names built: what `train` and `resume` have in common."""

    def __init__(
        self, run: RunDirectory, recipe: Recipe, corpus: Corpus, model: Decoder, config: SLMConfig, device: Device
    ) -> None:
        self.run, self.recipe, self.corpus, self.model, self.config, self.device = (
            run,
            recipe,
            corpus,
            model,
            config,
            device,
        )
        self.length = recipe.train.sequence_length or config.max_position_embeddings
        if self.length > config.max_position_embeddings:
            raise UserError(
                f"train.sequence_length {self.length} is longer than the model's max_position_embeddings "
                f"{config.max_position_embeddings}: shorten the one or raise the other"
            )
        is_chat = recipe.objective == "sft"
        kind = ChatRows if is_chat else PretrainRows
        self.rows = kind(corpus.train, self.length)
        self.validation_rows: Rows = (ChatRows if is_chat else DocumentRows)(corpus.validation, self.length)
        separate = recipe.data.separate_documents
        self.stream = Stream(self.rows, recipe.train.rows_per_step(self.length), recipe.seed, separate)
        self.plan: Plan = make_plan(recipe.train, self.rows.rows_in_epoch, self.length, device)

    def summary(self) -> str:
        parameters = sum(p.numel() for p in self.model.parameters())
        return (
            f"{parameters:,} parameters, {len(self.corpus.train):,} training tokens, "
            f"{self.plan.steps:,} steps of {self.stream.rows_per_step} × {self.length} tokens, "
            f"{self.device.describe()['device']} in {self.device.describe()['compute_dtype']}"
        )

    def run_to_the_end(self, reporter: Reporter, resume: bool) -> None:
        interval = evaluation_interval(self.recipe.train, self.plan.steps)
        with TrainingProgress(self.recipe.objective, self.plan.steps) as progress:
            fit(
                self.run,
                self.recipe,
                self.model,
                self.config,
                self.stream,
                self.plan,
                companions=self.corpus.tokenizer.save_pretrained,
                hooks=(
                    Every(interval, Validate(self.validation_rows, self.device, self.stream.separate)),
                    Every(interval, self._sampler()),
                    Every(1, progress.update),
                ),
                perfect_loss=self.corpus.validation.header.perfect_loss,
                resume=resume,
                warn=reporter.warn,
            )

    def _sampler(self) -> Hook:
        """Writes what the model says to the fixed prompts into samples.md."""
        train, tokenizer = self.recipe.train, self.corpus.tokenizer

        def sample(state: State, report: Report) -> None:
            settings = SamplingSettings(temperature=0.8, top_p=0.95, seed=self.recipe.seed)
            samples = []
            for prompt in train.sample_prompts:
                if self.recipe.objective == "sft":
                    session = ChatSession(state.model, tokenizer, settings, max_new_tokens=train.sample_tokens)
                    text = "\n" + "".join(session.reply(prompt))
                else:
                    text = complete(
                        state.model, tokenizer, prompt, settings=settings, max_new_tokens=train.sample_tokens
                    ).text
                samples.append((prompt, text))
            append_samples(self.run.samples, state.step, samples)

        return sample


class Validate:
    """A hook that adds `validation_loss` to the report."""

    def __init__(self, rows: Rows, device: Device, separate: bool = False) -> None:
        self.rows, self.device, self.separate = rows, device, separate

    def __call__(self, state: State, report: Report) -> None:
        report["validation_loss"] = validation_loss(state.model, self.rows, self.device, separate=self.separate).loss


def _model_for(recipe: Recipe, tokenizer: SLMTokenizer, base: Path | None) -> tuple[Decoder, SLMConfig]:
    """Fresh weights for the tokenizer's vocabulary, or those of `base`."""
    if base is not None:
        return load_decoder(base)
    known = {
        "vocab_size": len(tokenizer),
        "eos_token_id": sorted(tokenizer.stop_token_ids),
        "pad_token_id": tokenizer.pad_token_id,
    }
    config = recipe.model.build_config(**known)
    return build_decoder(config, recipe.seed, recipe.model.initialization), config


def _resolve(recipe: Recipe, run: RunDirectory, config: SLMConfig, base: Path | None) -> Recipe:
    """The recipe with nothing left to a preset, so that it still means the same when presets change."""
    model = recipe.model if base is not None else _resolved(config, recipe.model.initialization)
    return recipe.model_copy(update={"output_dir": str(run.root), "model": model})


def _resolved(config: SLMConfig, initialization: str = "gpt2") -> ModelSettings:
    shape = config.model_dump(exclude=TRAINING_FIELDS)
    return ModelSettings.model_validate(shape | {"initialization": initialization})


def _left_padding(attention_mask: Tensor | None) -> Tensor | None:
    """[batch, prompt] of 0 and 1 → [batch] zeros at the left. Raises `UserError` for a hole or an empty row."""
    if attention_mask is None or bool(attention_mask.all()):
        return None
    if bool((attention_mask.diff(dim=1) < 0).any()) or not bool(attention_mask[:, -1].all()):
        raise UserError("attention_mask: prompts of different lengths are padded at their left (0 … 0 1 … 1)")
    return (attention_mask == 0).sum(1)


def _as_set(ids: int | Sequence[int] | None) -> set[int]:
    if ids is None:
        return set()
    return {ids} if isinstance(ids, int) else set(ids)


def _first(*values: int | None) -> int:
    return next(value for value in values if value is not None)
