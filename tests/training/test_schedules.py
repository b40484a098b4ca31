"""The learning rate rises, falls as its formula says, and lands where it was told to."""

from __future__ import annotations

import itertools
import math

import pytest

from slmkit.config import UserError
from slmkit.training.recipe.recipe import TrainSettings
from slmkit.training.schedules import make_schedule

TO_THE_FLOOR = ("cosine", "linear", "warmup_stable_decay")
KINDS = (*TO_THE_FLOOR, "inverse_sqrt")
STEPS, WARMUP, FLOOR = 101, 10, 0.1


def rates(kind: str, steps: int = STEPS, warmup_steps: int = WARMUP, floor: float = FLOOR) -> list[float]:
    schedule = make_schedule(kind, steps, warmup_steps, floor, decay_share=0.2)
    return [schedule(step) for step in range(steps)]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("warmup_steps", [0, 1, 10, 60])
def test_it_rises_linearly_to_the_peak_and_never_rises_again(kind: str, warmup_steps: int) -> None:
    found = rates(kind, warmup_steps=warmup_steps)
    assert found[:warmup_steps] == pytest.approx([(i + 1) / warmup_steps for i in range(warmup_steps)])
    assert found[warmup_steps] == 1.0
    assert all(later <= earlier for earlier, later in itertools.pairwise(found[warmup_steps:]))


@pytest.mark.parametrize("kind", TO_THE_FLOOR)
def test_it_lands_on_the_floor(kind: str) -> None:
    assert rates(kind)[-1] == pytest.approx(FLOOR)


CLOSED_FORMS = {
    "cosine": lambda t: FLOOR + (1 - FLOOR) * (1 + math.cos(math.pi * (t - 10) / 90)) / 2,
    "linear": lambda t: 1 - 0.9 * (t - 10) / 90,
    "inverse_sqrt": lambda t: math.sqrt(10 / t),
    "warmup_stable_decay": lambda t: 1 if t <= 80 else 1 - 0.9 * (t - 80) / 20,
}


@pytest.mark.parametrize("kind", KINDS)
def test_it_falls_as_its_formula_says(kind: str) -> None:
    expected = [CLOSED_FORMS[kind](step) for step in range(WARMUP, STEPS)]
    assert rates(kind)[WARMUP:] == pytest.approx(expected)


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_of_one_step_has_a_rate(kind: str) -> None:
    assert rates(kind, steps=1, warmup_steps=0) == [1.0]


@pytest.mark.parametrize("kind", KINDS)
def test_past_its_end_it_stays_at_the_floor_or_above(kind: str) -> None:
    assert 0 < make_schedule(kind, 20, 2, 0.1)(500) <= 0.2


def test_the_inverse_square_root_stops_at_its_floor() -> None:
    assert rates("inverse_sqrt", floor=0.5)[41:] == [0.5] * 60
    with pytest.raises(UserError, match="inverse_sqrt has no last step"):
        TrainSettings(lr_scheduler_type="inverse_sqrt", min_learning_rate_ratio=1.5)


@pytest.mark.parametrize("kind", TO_THE_FLOOR)
def test_a_floor_above_the_peak_is_risen_to(kind: str) -> None:
    found = rates(kind, floor=5.0)
    assert found[-1] == pytest.approx(5.0)
    assert all(later >= earlier for earlier, later in itertools.pairwise(found))


@pytest.mark.parametrize("kind", ["cosine", "linear"])
def test_they_are_the_curves_of_transformers(kind: str) -> None:
    """But that its run of n steps ends on the peak's share of step n, which is never taken; ours takes the last."""
    transformers = pytest.importorskip("transformers")
    import torch

    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    theirs = transformers.get_scheduler(kind, optimizer, num_warmup_steps=WARMUP, num_training_steps=STEPS - 1)
    ours = make_schedule(kind, STEPS, WARMUP, 0.0)
    assert [ours(step) for step in range(WARMUP, STEPS)] == pytest.approx(
        [theirs.lr_lambdas[0](step) for step in range(WARMUP, STEPS)]
    )


def test_a_recipe_names_them() -> None:
    settings = TrainSettings(lr_scheduler_type="warmup_stable_decay", lr_decay_ratio=0.5, warmup_steps=0)
    schedule = settings.schedule(steps=20)
    assert [schedule(step) for step in (0, 9, 14, 19)] == pytest.approx([1.0, 1.0, 0.55, 0.1])
