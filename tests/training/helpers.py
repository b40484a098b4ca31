"""A run small enough for a test, on text with something to learn."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from torch import Tensor

from slmkit.data.batch import Batch
from slmkit.data.rows.datasets import TextDataset
from slmkit.data.stream import Stream
from slmkit.device import find_device
from slmkit.model.config import SLMConfig
from slmkit.model.decoder import Decoder
from slmkit.model.initialization import build_decoder
from slmkit.tokenizer import SLMTokenizer
from slmkit.training.checkpoints.checkpoint import WholeModel, take_snapshot
from slmkit.training.fit import RunContext, fit
from slmkit.training.guards import GuardSettings
from slmkit.training.loop import Goal, Plan, State
from slmkit.training.objective import Loss, NextToken, next_token
from slmkit.training.optimizers.choose import make_optimizers
from slmkit.training.precision import LossScale, to_weight_dtype
from slmkit.training.recipe.recipe import Recipe, TrainSettings
from slmkit.training.run_directory import RunDirectory

TOKENIZER = SLMTokenizer(260)
TEXTS = [f"{name} has a {thing}. " * 4 for name in ("Ann", "Ben", "Cleo") for thing in ("kite", "drum", "boat")]
LENGTH = 32


class Changed(NextToken):
    """The usual objective, with something done to its loss."""

    def __init__(self, change: Callable[[Tensor], Tensor]) -> None:
        self.change = change

    def __call__(self, model: Decoder, batch: Batch) -> Loss:
        return Loss(self.change(super().__call__(model, batch).total))


def config(**changes: object) -> SLMConfig:
    shape = {
        "vocab_size": 260, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 2, "max_position_embeddings": LENGTH, "initializer_range": 0.1,
    }  # fmt: skip
    return SLMConfig(**(shape | changes))


FILES = WholeModel(config())


def dataset() -> TextDataset:
    return TextDataset(TEXTS, TOKENIZER, max_length=LENGTH)


def stream(rows: int = 8, seed: int = 0) -> Stream:
    return Stream(dataset(), rows, seed)


def state(
    seed: int = 0, optimizer: str = "adamw", learning_rate: float = 1e-2, precision: str = "float32", **changes: object
) -> State:
    model, device = build_decoder(config(), seed), find_device("cpu", precision)
    to_weight_dtype(model, device)
    chosen = settings(optimizer=optimizer, learning_rate=learning_rate, **changes)
    return State(model, make_optimizers(model, chosen, device), seed=seed, loss_scale=LossScale.of(device))


def plan(steps: int, rows_per_micro_batch: int = 8, max_grad_norm: float = 1.0, precision: str = "float32") -> Plan:
    device = find_device("cpu", precision)
    return Plan(steps, rows_per_micro_batch, max_grad_norm, lambda step: 1.0, device)


def snapshot_of(learner: State) -> dict[str, list]:
    """Weights and optimizer state, to be compared."""
    snapshot = take_snapshot(learner, FILES)
    return {name: tensor.tolist() for name, tensor in (snapshot.weights | snapshot.moments).items()}


def settings(**changes: object) -> TrainSettings:
    defaults = {
        "sequence_length": LENGTH, "tokens_per_step": 4 * LENGTH, "max_steps": 12, "eval_steps": 4,
        "logging_steps": 1, "learning_rate": 1e-2, "device": "cpu", "precision": "float32",
    }  # fmt: skip
    return TrainSettings(**(defaults | changes))


def run(
    root: Path, resume: bool = False, hooks: tuple = (), warn=lambda line: None, guard: dict | None = None,
    goal: Goal | None = None, **changes: object,
) -> State:  # fmt: skip
    """A whole run through `fit`, with dropout so that random numbers matter."""
    train = settings(**changes)
    directory = RunDirectory(root)
    directory.checkpoints.mkdir(parents=True, exist_ok=True)
    shape = config(hidden_dropout=0.2, attention_dropout=0.1)
    rows = dataset()
    context = RunContext(
        run=directory,
        recipe=Recipe(output_dir=str(root), train=train, guard=GuardSettings(**guard or {})),
        model=build_decoder(shape, seed=1),
        config=shape,
        files=WholeModel(shape),
        extra_files=TOKENIZER.save_pretrained,
        device=find_device("cpu", train.precision),
        warn=warn,
    )
    batches = Stream(rows, train.rows_per_step(LENGTH), seed=0)
    plan = replace(context.plan(batches), goal=goal or Goal())
    return fit(context, batches, next_token, plan, hooks, resume=resume)
