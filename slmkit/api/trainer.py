"""`SLMTrainer`: training from a script, with a run directory."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterable, Iterator, Sequence, Sized
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console
from torch.utils.data import IterableDataset

from slmkit.adapt.adapter import AdapterFiles, fingerprint
from slmkit.adapt.lora import add_lora
from slmkit.adapt.quantize import expect_full
from slmkit.api.callbacks import Callbacks, GivenLoss, LossFunction, TorchSchedule, check_optimizer, check_pair
from slmkit.api.causal_lm import SLMForCausalLM
from slmkit.config import UserError, kind_of_value, methods_checked
from slmkit.data.rows.datasets import DatasetRows, ItemFormat, IterableBatches, TextDataset
from slmkit.data.stream import Batches, Rows, Stream
from slmkit.device import Device, find_device
from slmkit.model.config import TRAINING_FIELDS, SLMConfig
from slmkit.model.files.adapter_directory import LoRASettings, is_adapter
from slmkit.training.checkpoints.checkpoint import WholeModel, kept_in
from slmkit.training.diagnostics.xray_page import check_data
from slmkit.training.distributed import Group, join
from slmkit.training.estimate.micro_batch import with_usual_micro_batch
from slmkit.training.fit import RunContext, fit
from slmkit.training.logging.metrics_log import mark_running
from slmkit.training.logging.progress import training_progress
from slmkit.training.loop import Every, Report, RunStopped, Stage
from slmkit.training.objective import Objective, next_token
from slmkit.training.objectives.distillation import DistillationLoss, OnlineTeacher, check_fit, frozen, objective_of
from slmkit.training.recipe.objective_settings import DistillationSettings
from slmkit.training.recipe.recipe import ModelSettings, Recipe, TrainSettings
from slmkit.training.run_directory import RunDirectory, new_run_directory, run_to_resume
from slmkit.workflows.hooks import Validate

GIVEN_IN_A_SCRIPT = "given in a script"  # in place of the data in environment.json
SHOW = Stage.SHOW


@methods_checked
class SLMTrainer:
    """Train a model on a data set in a script; writes a run to `output_dir`.

    `config` has the training fields: `learning_rate`, `batch_size` (sequences per step), `sequence_length` (tokens),
    `gradient_clip_norm`, `warmup_steps`. A data set is a `TextDataset`, or any torch data set, map-style or iterable,
    of dicts with `input_ids` and `labels`; see `slmkit.data.rows.datasets.ItemFormat.row`.

    With a `teacher_model` of the same tokenizer it distils, with the config's `distillation_alpha` and
    `distillation_temperature` or with the given `DistillationLoss`. With `lora` the model is frozen, and an adapter for
    the directory that the model was read from is trained and saved; `slmkit.adapt.lora.fold(model.decoder)` merges
    both.

    `optimizers=(optimizer, scheduler)` replace AdamW, and warm-up and cosine; with a scheduler of None the rates of the
    optimizer's groups are the peaks of that schedule. `callbacks` are functions of (state, report), called after each
    step, or objects as `slmkit.api.callbacks.Callback`. `loss(hidden, batch)` replaces the cross-entropy; see
    `slmkit.api.callbacks.GivenLoss`.
    """

    def __init__(
        self,
        config: SLMConfig,
        model: SLMForCausalLM,
        tokenizer: Any,
        train_dataset: Any,
        eval_dataset: Any = None,
        teacher_model: SLMForCausalLM | None = None,
        output_dir: str = "./checkpoints",
        device: str = "auto",
        seed: int = 0,
        force: bool = False,
        distillation_loss: DistillationLoss | None = None,
        lora: LoRASettings | None = None,
        optimizers: tuple[Any, Any] = (None, None),
        callbacks: Sequence[Any] = (),
        loss: LossFunction | None = None,
    ) -> None:
        """Raises `UserError` for conflicting arguments; `train` raises it for the X-ray's findings, unless `force`."""
        expect_kind("config", config, SLMConfig)
        expect_kind("model", model, SLMForCausalLM)
        expect_kind("teacher_model", model if teacher_model is None else teacher_model, SLMForCausalLM)
        expect_kind("lora", LoRASettings() if lora is None else lora, LoRASettings)
        if isinstance(tokenizer, str) or not isinstance(tokenizer, Sized):
            raise UserError(f"tokenizer: expected a tokenizer, found {kind_of_value(tokenizer)}")
        if len(tokenizer) > config.vocab_size:
            raise UserError(
                f"the tokenizer has {len(tokenizer)} tokens, the model {config.vocab_size}: "
                f"set vocab_size={len(tokenizer)} in its config"
            )
        check_config(config, model.config)
        if lora is None:
            expect_full(model.decoder, "model: only an adapter (lora) can be trained on it")
        self.config, self.model, self.tokenizer = config, model, tokenizer
        self.train_dataset, self.eval_dataset = train_dataset, eval_dataset
        self.output_dir, self.device_name, self.seed = output_dir, device, seed
        self.force, self.loss, self.callbacks = force, loss, Callbacks(callbacks)
        self.teacher_model, self.distillation_loss = teacher_model, distillation_loss
        self.distils = teacher_model is not None and config.use_distillation is not False
        self.length = getattr(train_dataset, "length", None) or config.sequence_length or config.max_position_embeddings
        self.evaluated = None if eval_dataset is None else self._rows(eval_dataset, "eval_dataset")
        if teacher_model is None and (config.use_distillation or distillation_loss is not None):
            raise UserError("distillation needs a teacher: give the trainer a teacher_model")
        if teacher_model is not None:
            check_fit(teacher_model.decoder, len(tokenizer), self.length, "teacher_model")
        if loss is not None and self.distils:
            raise UserError("loss and teacher_model: a loss with a teacher is a DistillationLoss, as distillation_loss")
        self.optimizer, self.scheduler = check_pair(optimizers)
        if self.optimizer is not None and lora is not None:
            raise UserError("optimizers with lora: the adapter's parameters are made here: set the rates in the config")
        self.lora, self.adapter = lora, None if lora is None else self._begin_adapter(lora)
        if self.optimizer is not None:
            check_optimizer(self.optimizer, model.decoder)
        elif self.scheduler is not None:
            raise UserError("optimizers: a scheduler without its optimizer: give (optimizer, scheduler)")

    def train(
        self,
        num_epochs: float = 1,
        max_steps: int | None = None,
        resume_from_checkpoint: bool | str | Path | None = None,
    ) -> dict[str, float]:
        """Train and return the last step's figures: `loss` (nats per token), `tokens`, and with an eval set
        `validation_loss`.

        `resume_from_checkpoint` continues the newest run of `output_dir` (True), or the named run, from its newest
        intact checkpoint. Raises `UserError` if there is none.
        """
        settings = TrainSettings(
            sequence_length=self.length,
            tokens_per_step=self.config.batch_size * self.length,
            learning_rate=self.config.learning_rate,
            max_grad_norm=self.config.gradient_clip_norm,
            num_train_epochs=None if max_steps else num_epochs,
            max_steps=max_steps,
            device=self.device_name,
        )
        device = find_device(settings.device, settings.precision)
        resumed = run_to_resume(self.output_dir, resume_from_checkpoint)
        with join(device, settings.ddp_timeout) as group:
            return self._fit(settings, device, group, resumed)

    def _fit(self, settings: TrainSettings, device: Device, group: Group, resumed: Path | None) -> dict[str, float]:
        stream = self._stream(self.train_dataset)
        steps = settings.total_steps(stream.rows_in_epoch, self.length)
        settings = with_usual_micro_batch(settings, self.config.hidden_size, device).model_copy(
            update={"max_steps": steps, "num_train_epochs": None, "warmup_steps": self._warmup(steps)}
        )
        context = self._context(settings, device, group, resumed)
        plan = context.plan(stream)
        if self.scheduler is not None:
            plan = replace(plan, schedule=TorchSchedule(self.scheduler))
        if group.is_main and resumed is None:
            context.run.describe(context.recipe, device, {"texts": GIVEN_IN_A_SCRIPT})
            check_data(
                stream, self.tokenizer, self.config.vocab_size, context.run.root, lambda line: None, force=self.force
            )
        last: Report = {}
        with (
            mark_running(context.run.root) if group.is_main else contextlib.nullcontext(),
            training_progress("training", steps, None if group.is_main else Console(quiet=True)) as progress,
        ):
            try:
                fit(
                    context,
                    stream,
                    self._objective(device),
                    plan,
                    [*self._hooks(settings.evaluation_interval(steps), context, last), Every(1, progress, SHOW)],
                    resume=resumed is not None,
                    optimizer=self.optimizer,
                    on_save=self.callbacks.at("on_save", group) if self.callbacks.has("on_save") else None,
                )
            except RunStopped as stopped:
                if not self.callbacks.has_stopped:
                    way = f"SLMTrainer(…).train(resume_from_checkpoint={str(context.run.root)!r})"  # not `slm resume`
                    raise RunStopped(f"{str(stopped).partition(';')[0]}; go on with: {way}") from None
        self.model.eval()
        return last or context.run.metrics.read()[-1]

    def _context(self, settings: TrainSettings, device: Device, group: Group, resumed: Path | None) -> RunContext:
        root = resumed or (new_run_directory(self.output_dir).root if group.is_main else "")
        run = RunDirectory(group.from_main(str(root)))
        if self.adapter is not None and group.is_main:
            self.adapter = replace(self.adapter, base=kept_in(run.root / "base", self.adapter.base))
        return RunContext(
            run=run,
            recipe=self._recipe(run, settings),
            model=self.model.decoder,
            config=self.config,
            files=self.adapter or WholeModel(self.config),
            extra_files=self._extra_files,
            device=device,
            group=group,
        )

    def _stream(self, dataset: Any) -> Batches:
        if not _is_iterable(dataset):
            rows = self._rows(dataset)
            return Stream(rows, min(self.config.batch_size, rows.rows_in_epoch), self.seed)
        return IterableBatches(dataset, self._form(), self.config.batch_size)

    def _rows(self, dataset: Any, name: str = "the data set") -> Rows:
        if isinstance(dataset, TextDataset):
            return dataset
        return DatasetRows(list(dataset) if _is_iterable(dataset) else dataset, self._form(name))

    def _form(self, name: str = "the data set") -> ItemFormat:
        pad_id = getattr(self.tokenizer, "pad_token_id", None)
        return ItemFormat(self.length, 0 if pad_id is None else pad_id, self.config.vocab_size, name)

    def _warmup(self, steps: int) -> int:
        """The config's `warmup_steps`; if they are not set, at most a tenth of the run."""
        warmup = self.config.warmup_steps
        if "warmup_steps" not in self.config.model_fields_set:
            return min(warmup, steps // 10)
        if warmup >= steps:
            print(f"warning: warmup_steps {warmup}: the learning rate rises through all {steps} steps", file=sys.stderr)
        return warmup

    def _hooks(self, interval: int, context: RunContext, last: Report) -> Iterator[Every]:
        group = context.group
        if not isinstance(self.train_dataset, TextDataset):  # the computed tokens of a row are not known
            yield Every(1, lambda state, report: report.pop("mfu", None))
        if self.evaluated is not None:
            yield Every(interval, Validate(self.evaluated, context.device, group=group), on_all_ranks=True)
        yield Every(1, lambda state, report: last.update(report), SHOW, on_all_ranks=True)
        yield Every(1, self.callbacks.at("on_step", group), SHOW, on_all_ranks=True)
        if self.evaluated is not None:
            yield Every(interval, self.callbacks.at("on_evaluation", group), SHOW, on_all_ranks=True)

    def _begin_adapter(self, lora: LoRASettings) -> AdapterFiles:
        base = self.model.directory
        if base is None or is_adapter(base):
            raise UserError("lora: an adapter needs a base model on disk: save_pretrained(), then from_pretrained()")
        before = fingerprint(self.model.decoder)
        add_lora(self.model.decoder, self.config, lora, self.seed)
        return AdapterFiles(self.config, lora, base, before)

    def _recipe(self, run: RunDirectory, settings: TrainSettings) -> Recipe:
        """The recipe of the run, without the objects given in the script."""
        model = (
            ModelSettings.of_config(self.config) if self.adapter is None else ModelSettings(path=str(self.adapter.base))
        )
        recipe = Recipe(output_dir=str(run.root), seed=self.seed, model=model, lora=self.lora, train=settings)
        if not self.distils:
            return recipe
        loss = self._distillation_loss()
        alpha, temperature = loss.alpha, loss.temperature
        distillation = DistillationSettings(teacher=GIVEN_IN_A_SCRIPT, alpha=alpha, temperature=temperature)
        return recipe.model_copy(update={"objective": "distill", "distillation": distillation})

    def _distillation_loss(self) -> DistillationLoss:
        config = self.config
        return self.distillation_loss or DistillationLoss(config.distillation_alpha, config.distillation_temperature)

    def _objective(self, device: Device) -> Objective:
        if not self.distils:
            return next_token if self.loss is None else GivenLoss(self.loss)
        assert self.teacher_model is not None
        teacher = OnlineTeacher(frozen(self.teacher_model.decoder, device), len(self.tokenizer))
        return objective_of(self._distillation_loss(), teacher)

    def _extra_files(self, directory: Path) -> None:
        if hasattr(self.tokenizer, "save_pretrained"):
            self.tokenizer.save_pretrained(str(directory))


def expect_kind(name: str, value: object, kind: type) -> None:
    """Raise `UserError` for an argument of another type."""
    if not isinstance(value, kind):
        raise UserError(f"{name}: expected a value of type {kind.__name__}, found {kind_of_value(value)}")


def check_config(config: SLMConfig, of_model: SLMConfig) -> None:
    """Raise `UserError` if `config`, which is saved with the weights, describes another model than `of_model`."""
    given, built = (each.model_dump(exclude=TRAINING_FIELDS) for each in (config, of_model))
    if differ := [f"{name} {given[name]!r} and {built[name]!r}" for name in given if given[name] != built[name]]:
        raise UserError(
            f"the config and the model's own differ in {', '.join(differ)}: give the trainer model.config, "
            "or a copy with other training fields"
        )


def _is_iterable(dataset: Any) -> bool:
    """Whether a data set is iterable and not map-style. Raises `UserError` if it is neither."""
    if hasattr(dataset, "__getitem__") and hasattr(dataset, "__len__") and not isinstance(dataset, IterableDataset):
        return False
    if isinstance(dataset, Iterable):
        return True
    raise UserError(f"a data set has __getitem__ and __len__, or __iter__; found {kind_of_value(dataset)}")
