"""The progress of a run: which step, which epoch, and this step's own loss."""

from __future__ import annotations

import io
from types import SimpleNamespace

import pytest
from rich.console import Console

from slmkit.training.logging.progress import training_progress


def shown(terminal: bool, first: int, losses: list[float]) -> str:
    out = io.StringIO()
    console = Console(file=out, force_terminal=terminal, width=120, color_system=None)
    with training_progress("pretrain", 20, console, steps_in_epoch=8) as progress:
        for step, loss in enumerate(losses, start=first):
            progress(SimpleNamespace(step=step), {"loss": loss, "tokens_per_second": 1000})
    return out.getvalue()


def test_each_line_has_the_step_the_epoch_and_the_loss_of_that_step() -> None:
    lines = shown(False, 1, [5.0, 4.0, 2.5]).splitlines()
    assert [line.split("  ")[:3] for line in lines] == [
        ["pretrain: step 1/20", "epoch 0.1/2.5", "loss 5.000"],
        ["pretrain: step 2/20", "epoch 0.2/2.5", "loss 4.000"],
        ["pretrain: step 3/20", "epoch 0.4/2.5", "loss 2.500"],
    ]


def test_a_resumed_run_goes_on_with_the_same_figures() -> None:
    """The loss is no average over the process's own steps: the line after a stop is the unbroken run's."""
    unbroken, resumed = shown(False, 1, [5.0, 4.0, 2.5]), shown(False, 3, [2.5])
    assert resumed.split("left")[0].rsplit("  ", 1)[0] == unbroken.splitlines()[2].split("left")[0].rsplit("  ", 1)[0]


@pytest.mark.parametrize(
    ("margin", "words"),
    [(0.0, ["loss 11.600", "preference loss 0.693", "0:00 left"]),
     (0.2, ["loss 11.600", "preference loss 0.693", "reward accuracy 75%"])],
)  # fmt: skip
def test_preference_tuning_names_both_losses_and_the_reward_accuracy(margin: float, words: list[str]) -> None:
    """Before the first update every margin is 0, and there is no accuracy to tell."""
    out = io.StringIO()
    report = {"loss": 11.6, "preference_loss": 0.693, "rewards/accuracy": 0.75, "rewards/margin": margin}
    with training_progress("dpo", 1, Console(file=out, width=120)) as progress:
        progress(SimpleNamespace(step=1), report | {"tokens_per_second": 1000})
    assert out.getvalue().strip().split("  ")[1:4] == words


def test_the_bar_shows_the_same() -> None:
    assert "step 3/20  epoch 0.4/2.5  loss 2.500" in shown(True, 1, [5.0, 4.0, 2.5])
