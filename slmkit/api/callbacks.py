"""Extensions of `SLMTrainer`: callbacks, an optimizer with its schedule, a loss."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from slmkit.config import UserError, kind_of_value
from slmkit.data.batch import Batch
from slmkit.model.decoder import Decoder
from slmkit.training.distributed import Group
from slmkit.training.loop import Report, State
from slmkit.training.objective import Loss, Objective
from slmkit.training.optimizers.choose import trained

MOMENTS = ("on_step", "on_evaluation", "on_save")
LossFunction = Callable[[Tensor, Batch], Tensor]


class Callback:
    """Base class of callbacks; a plain function is `on_step`. A method that returns True ends the run after this step,
    with a checkpoint. `state` has the decoder, the optimizers and the step; `report` is the line of metrics.
    """

    def on_step(self, state: State, report: Report) -> bool | None:
        """After each update: `report` has step, tokens, loss, learning_rate and grad_norm."""

    def on_evaluation(self, state: State, report: Report) -> bool | None:
        """After each evaluation: `report` also has validation_loss."""

    def on_save(self, state: State, directory: Path) -> bool | None:
        """After a checkpoint is complete on disk, in `directory`."""


class Callbacks:
    """The callbacks of a run, called on rank 0; their decisions apply to all ranks."""

    def __init__(self, given: Sequence[Any]) -> None:
        """Raises `UserError` for a callback without any of the methods, or with other arguments."""
        if not isinstance(given, Iterable):
            raise UserError(f"callbacks: expected a list, found {given!r}: put it into one, callbacks=[…]")
        self.given, self.has_stopped = [_as_callback(each) for each in given], False

    def at(self, moment: str, group: Group) -> Callable[[State, Any], bool]:
        def call_all(state: State, what: Any) -> bool:
            wants = False
            if group.is_main:
                for call in filter(None, (getattr(each, moment, None) for each in self.given)):
                    wants |= call(state, what) is True
            wants = group.from_main(wants)
            self.has_stopped |= wants
            return wants

        return call_all

    def has(self, moment: str) -> bool:
        return any(getattr(type(each), moment, None) not in (None, getattr(Callback, moment)) for each in self.given)


def _as_callback(given: Any) -> Any:
    if inspect.isfunction(given) or inspect.ismethod(given):
        _expect_two_arguments(given, f"the function {given.__name__}")
        return type("Function", (Callback,), {"on_step": staticmethod(given)})()
    if inspect.isclass(given) or not any(callable(getattr(given, moment, None)) for moment in MOMENTS):
        raise UserError(f"callbacks: {given!r} is neither a function nor an object with {', '.join(MOMENTS)}")
    for moment in filter(lambda name: callable(getattr(given, name, None)), MOMENTS):
        _expect_two_arguments(getattr(given, moment), f"{moment} of {type(given).__name__}")
    return given


def _expect_two_arguments(call: Callable[..., Any], name: str) -> None:
    try:
        inspect.signature(call).bind(None, None)
    except TypeError:
        what = "directory" if name.startswith("on_save") else "report"
        raise UserError(f"callbacks: {name} does not take (state, {what}); see slmkit.api.callbacks.Callback") from None


class GivenLoss(Objective):
    """The objective of a function `loss(hidden, batch)`.

    `hidden` [rows, length, width] are hidden states (`model.decoder.logits(hidden)` gives logits),
    `batch` has `ids` and `labels` [rows, length], where `labels[:, t]` is the token after position t, or -100: not
    learned. It returns the sum [] over learned labels: the loop divides by their number in the whole step, so that
    every split into micro-batches gives the same update. Raises `UserError` for another result.
    """

    def __init__(self, loss: LossFunction) -> None:
        self.loss = loss

    def __call__(self, model: Decoder, batch: Batch) -> Loss:
        total = self.loss(model(batch.ids, documents=batch.documents), batch)
        if not isinstance(total, Tensor) or total.dim() or not total.requires_grad:
            found = f"a tensor {list(total.shape)}" if isinstance(total, Tensor) else kind_of_value(total)
            raise UserError(
                f"loss: expected a tensor of one number with a gradient, the sum over labels, found {found}"
            )
        return Loss(total)


class TorchSchedule:
    """A torch scheduler as the loop's schedule: it is stepped once after each update, and sets the peak rates.

    A resumed run steps it once for each past update, so its rates must depend on their number only.
    """

    def __init__(self, scheduler: Any) -> None:
        """Raises `UserError` for a scheduler that depends on the loss."""
        if isinstance(scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau):
            raise UserError("optimizers: ReduceLROnPlateau needs the loss: step it in a callback's on_evaluation")
        self.scheduler, self.done = scheduler, 0
        self._keep()

    def __call__(self, step: int) -> float:
        while self.done < step:
            for group in self.scheduler.optimizer.param_groups:
                group["lr"] = group["peak_lr"]
            self.scheduler.step()
            self._keep()
            self.done += 1
        return 1.0

    def _keep(self) -> None:
        for group in self.scheduler.optimizer.param_groups:
            group["peak_lr"] = group["lr"]


def check_pair(optimizers: Any) -> tuple[Any, Any]:
    """The optimizer and the scheduler. Raises `UserError` for anything but a pair."""
    if not isinstance(optimizers, tuple | list) or len(optimizers) != 2:
        found = "" if isinstance(optimizers, tuple | list) else f", found {type(optimizers).__name__}"
        raise UserError(f"optimizers: expected a pair (optimizer, scheduler or None){found}")
    return optimizers[0], optimizers[1]


def check_optimizer(optimizer: Any, model: torch.nn.Module) -> None:
    """Raises `UserError` unless it updates exactly the trained parameters of `model`."""
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise UserError(f"optimizers: expected (optimizer, scheduler or None), found {kind_of_value(optimizer)} first")
    closure = inspect.signature(optimizer.step).parameters.get("closure")
    if closure is not None and closure.default is closure.empty:
        raise UserError(
            f"optimizers: {type(optimizer).__name__} computes the loss again within its step, which training here does "
            "not support: take one whose step() needs no closure, such as torch.optim.AdamW"
        )
    has = {id(p) for group in optimizer.param_groups for p in group["params"]}
    wanted = {id(p): name for name, p in trained(model).items()}
    if has - wanted.keys():
        raise UserError("optimizers: the optimizer has parameters of another model: give it this model's")
    if left := [name for key, name in wanted.items() if key not in has]:
        raise UserError(
            f"optimizers: the optimizer leaves out {len(left)} parameters, such as {left[0]}: give it all, or set "
            "requires_grad=False on those that stay as they are"
        )
