"""`SLMTrainer`: texts, a model and a tokenizer to a run on disk, for a script."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console

from slmkit.adapt import LoRASettings, add_lora
from slmkit.adapt.adapter import fingerprint
from slmkit.adapt.adapter_files import AdapterFiles
from slmkit.api.causal_lm import SLMForCausalLM
from slmkit.api.hooks import Validate
from slmkit.api.runs import resolved
from slmkit.api.xray import look
from slmkit.config import UserError
from slmkit.data.stream import Stream
from slmkit.data.text_dataset import TextDataset
from slmkit.device import Device, find_device
from slmkit.model import SLMConfig
from slmkit.model.adapter_directory import is_adapter
from slmkit.training.checkpoints import kept_in
from slmkit.training.distill import objective_of
from slmkit.training.distillation import DistillationLoss
from slmkit.training.distributed import Group, join
from slmkit.training.loop import Every, Report
from slmkit.training.objective_settings import DistillationSettings
from slmkit.training.objectives import Objective, next_token
from slmkit.training.progress import TrainingProgress
from slmkit.training.recipe import ModelSettings, Recipe, TrainSettings
from slmkit.training.run import RunDirectory, evaluation_interval, fit, make_plan, new_run_directory
from slmkit.training.teachers import OnlineTeacher, check_fit, frozen


class SLMTrainer:
    """Train a model on a dataset in a script. What it leaves in `output_dir` is a run like any other.

    `config` carries the training fields: `learning_rate`, `batch_size` (sequences a step), `sequence_length`,
    `gradient_clip_norm`, `warmup_steps`. With a `teacher_model` of the same tokenizer it distils, with the config's
    `distillation_alpha` and `distillation_temperature` or with a `DistillationLoss` of its own. With `lora` the model
    is frozen, and what is trained and saved is an adapter for the directory that the model was read from;
    `slmkit.adapt.fold(model.decoder)` makes a plain model of both.
    """

    def __init__(
        self,
        config: SLMConfig,
        model: SLMForCausalLM,
        tokenizer: Any,
        train_dataset: TextDataset,
        eval_dataset: TextDataset | None = None,
        teacher_model: SLMForCausalLM | None = None,
        output_dir: str = "./checkpoints",
        device: str = "auto",
        seed: int = 0,
        force: bool = False,
        distillation_loss: DistillationLoss | None = None,
        lora: LoRASettings | None = None,
    ) -> None:
        """Raises `UserError` for what does not fit; `train` does so for what the X-ray finds, unless `force`."""
        if len(tokenizer) > config.vocab_size:
            raise UserError(
                f"the tokenizer has {len(tokenizer)} tokens, the model {config.vocab_size}: "
                f"set vocab_size={len(tokenizer)} in its config"
            )
        self.config, self.model, self.tokenizer = config, model, tokenizer
        self.train_dataset, self.eval_dataset = train_dataset, eval_dataset
        self.output_dir, self.device_name, self.seed = output_dir, device, seed
        self.force = force
        self.teacher_model, self.distillation_loss = teacher_model, distillation_loss
        self.distils = teacher_model is not None and config.use_distillation is not False
        if teacher_model is None and (config.use_distillation or distillation_loss is not None):
            raise UserError("distillation needs someone to learn from: give the trainer a teacher_model")
        if teacher_model is not None:
            check_fit(teacher_model.decoder, len(tokenizer), train_dataset.length, "teacher_model")
        self.lora, self.files = lora, None if lora is None else self._begin_adapter(lora)

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
        with join(device, settings.ddp_timeout) as group:
            return self._fit(settings, device, group)

    def _fit(self, settings: TrainSettings, device: Device, group: Group) -> dict[str, float]:
        length = self.train_dataset.length
        rows = min(self.config.batch_size, self.train_dataset.rows_in_epoch)
        stream = Stream(self.train_dataset, rows, self.seed)
        plan = make_plan(settings, self.train_dataset.rows_in_epoch, length, device, group=group)
        run = RunDirectory(group.from_main(str(new_run_directory(self.output_dir).root) if group.is_main else ""))
        objective: Objective = self._distillation(device) if self.distils else next_token
        if self.files is not None and group.is_main:
            self.files = replace(self.files, base=kept_in(run.root / "base", self.files.base))
        recipe = self._recipe(run, settings)
        if group.is_main:
            run.describe(recipe, device, {"texts": "given in a script"})
            look(stream, self.tokenizer, self.config.vocab_size, run.root, lambda line: None, force=self.force)
        last: Report = {}
        hooks = [Every(plan.steps, lambda state, report: last.update(report), on_all_ranks=True)]
        if self.eval_dataset is not None:
            validate = Validate(self.eval_dataset, device, group=group)
            hooks.insert(0, Every(evaluation_interval(settings, plan.steps), validate, on_all_ranks=True))
        with TrainingProgress("training", plan.steps, None if group.is_main else Console(quiet=True)) as progress:
            hooks.append(Every(1, progress.update))
            fit(
                run,
                recipe,
                self.model.decoder,
                self.config,
                stream,
                plan,
                companions=self._companions,
                objective=objective,
                files=self.files,
                hooks=hooks,
            )
        self.model.eval()
        return last

    def _begin_adapter(self, lora: LoRASettings) -> AdapterFiles:
        base = self.model.directory
        if base is None or is_adapter(base):
            raise UserError("lora: an adapter names its model on disk: save_pretrained() that, and from_pretrained()")
        before = fingerprint(self.model.decoder)
        add_lora(self.model.decoder, self.config, lora, self.seed)
        return AdapterFiles(self.config, lora, base, before)

    def _recipe(self, run: RunDirectory, settings: TrainSettings) -> Recipe:
        """What of the run can be written down."""
        model = resolved(self.config) if self.files is None else ModelSettings(path=str(self.files.base))
        recipe = Recipe(output_dir=str(run.root), seed=self.seed, model=model, lora=self.lora, train=settings)
        if not self.distils:
            return recipe
        alpha, temperature = self.loss.alpha, self.loss.temperature
        taught = DistillationSettings(teacher="given in a script", alpha=alpha, temperature=temperature)
        return recipe.model_copy(update={"objective": "distill", "distillation": taught})

    @property
    def loss(self) -> DistillationLoss:
        """What a distilling run minimises."""
        config = self.config
        return self.distillation_loss or DistillationLoss(config.distillation_alpha, config.distillation_temperature)

    def _distillation(self, device: Device) -> Objective:
        assert self.teacher_model is not None
        return objective_of(self.loss, OnlineTeacher(frozen(self.teacher_model.decoder, device), len(self.tokenizer)))

    def _companions(self, directory: Path) -> None:
        if hasattr(self.tokenizer, "save_pretrained"):
            self.tokenizer.save_pretrained(str(directory))
