"""However the tokens of a step are split and padded, its gradient is the same: a property, over many splits."""

from __future__ import annotations

import itertools

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from slmkit.data.batch import Batch
from slmkit.data.packing import IGNORED
from slmkit.training.loop import State, compute_gradients, train_step
from slmkit.training.objective import next_token
from tests.training.helpers import plan, state

ROWS, LENGTH = 6, 16


def rows_of(seed: int, untrained: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and labels with holes, and rows in which nothing is learned.  [rows, length] each."""
    generator = torch.Generator().manual_seed(seed)
    ids, labels = (torch.randint(260, (ROWS, LENGTH), generator=generator) for _ in range(2))
    labels[torch.rand(ROWS, LENGTH, generator=generator) < 0.4] = IGNORED
    labels[untrained] = IGNORED
    labels[0, 0] = 7  # something is learned
    return ids, labels


def padded(x: torch.Tensor, columns: int, rows: int, value: int) -> torch.Tensor:
    return torch.nn.functional.pad(x, (0, columns, 0, rows), value=value)


def gradient_of(learner: State) -> torch.Tensor:
    return torch.cat([p.grad.flatten() for p in learner.model.parameters() if p.grad is not None])


def split_gradient(ids: torch.Tensor, labels: torch.Tensor, ranks: list[int], rows: int) -> tuple[float, torch.Tensor]:
    """Loss and gradient of a step whose rows are shared by ranks at the borders `ranks`, each in micro-batches."""
    weight, learner = int((labels != IGNORED).sum()), state()
    borders = [0, *sorted(ranks), len(ids)]
    loss, gradient = 0.0, torch.zeros(())
    for begin, end in itertools.pairwise(borders):
        if begin == end:
            continue
        part = Batch(ids[begin:end], labels[begin:end], weight)  # ranks divide by the tokens of the whole step
        loss += compute_gradients(learner, next_token, part, plan(1, rows, max_grad_norm=1e9))[0]
        gradient = gradient + gradient_of(learner)
    return loss, gradient


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 1000),
    untrained=st.lists(st.integers(0, ROWS - 1), max_size=4),
    rows=st.integers(1, ROWS + 2),
    ranks=st.lists(st.integers(0, ROWS), max_size=3),
    extra_columns=st.integers(0, 8),
    extra_rows=st.integers(0, 3),
)
def test_every_split_and_padding_gives_the_same_gradient(
    seed: int, untrained: list[int], rows: int, ranks: list[int], extra_columns: int, extra_rows: int
) -> None:
    ids, labels = rows_of(seed, untrained)
    expected_loss, expected = split_gradient(ids, labels, [], ROWS)
    wider_ids = padded(ids, extra_columns, extra_rows, 3)
    wider_labels = padded(labels, extra_columns, extra_rows, IGNORED)
    loss, gradient = split_gradient(wider_ids, wider_labels, ranks, rows)
    assert abs(loss - expected_loss) < 1e-5 * expected_loss
    assert torch.isfinite(gradient).all()
    assert (gradient - expected).norm() < 1e-4 * expected.norm()


def test_a_step_without_a_trained_token_is_skipped_counted_and_leaves_the_weights() -> None:
    learner, untouched = state(), state()
    ids = torch.randint(260, (4, LENGTH), generator=torch.Generator().manual_seed(0))
    report = train_step(learner, next_token, Batch(ids, torch.full_like(ids, IGNORED), 0), plan(1, 2))
    assert "no trained token" in report["skipped"]
    assert (report["step"], report["tokens"], report["loss"]) == (1, 0, 0.0)
    assert all(torch.equal(a, b) for a, b in zip(learner.model.parameters(), untouched.model.parameters()))
    assert not learner.optimizers[0].state
