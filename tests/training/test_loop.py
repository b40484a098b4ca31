"""One step does what a step should, however its batch is cut; and many steps learn."""

from __future__ import annotations

import random
import time

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from slmkit.data.batch import Batch
from slmkit.data.packing import IGNORED
from slmkit.model.decoder import Decoder
from slmkit.training.loop import Every, StopRequested, seed_everything, train, train_step
from slmkit.training.objective import Loss, NextToken, next_token
from tests.training.helpers import plan, snapshot_of, state, stream


def uneven_batch() -> Batch:
    """Rows with very different numbers of trained tokens, as conversations have."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(260, (8, 32), generator=generator)
    labels = torch.randint(260, (8, 32), generator=generator)
    for row in range(8):
        labels[row, : 4 * row] = -100
    return Batch(ids, labels, int((labels != -100).sum()))


@pytest.mark.parametrize("rows", [1, 3, 4, 8])
def test_every_cut_of_a_batch_gives_the_same_update(rows: int) -> None:
    whole, cut = state(), state()
    expected = train_step(whole, next_token, uneven_batch(), plan(1, rows_per_micro_batch=8))
    found = train_step(cut, next_token, uneven_batch(), plan(1, rows_per_micro_batch=rows))
    assert found["loss"] == pytest.approx(expected["loss"], rel=1e-5)
    assert found["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-4)


def test_the_loss_is_the_mean_over_trained_tokens_as_transformers_has_it(tmp_path) -> None:
    transformers = pytest.importorskip("transformers")
    from slmkit.model.files.directory import save_decoder
    from tests.training.helpers import config

    ours, batch = state(), uneven_batch()
    save_decoder(ours.model, config(), tmp_path)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    with torch.no_grad():
        expected = F.cross_entropy(theirs(batch.ids).logits.flatten(0, 1), batch.labels.flatten()).item()
    assert train_step(ours, next_token, batch, plan(1))["loss"] == pytest.approx(expected, abs=1e-4)


def test_separate_documents_are_learned_as_if_each_had_a_row_of_its_own() -> None:
    generator = torch.Generator().manual_seed(4)
    ids, labels = (torch.randint(260, (2, 12), generator=generator) for _ in range(2))
    packed = Batch(ids.view(1, 24), labels.view(1, 24), 24, torch.tensor([[3] * 12 + [5] * 12]))
    apart, together, mixed = state(), state(), state()
    expected = train_step(apart, next_token, Batch(ids, labels, 24), plan(1))
    found = train_step(together, next_token, packed, plan(1))
    assert found["loss"] == pytest.approx(expected["loss"], rel=1e-5)
    assert found["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-4)
    assert train_step(mixed, next_token, Batch(packed.ids, packed.labels, 24), plan(1))["loss"] != expected["loss"]
    for a, b in zip(apart.model.parameters(), together.model.parameters()):
        # Adam's first step is a hundredth for every weight: rounding shows where the gradient is nearly nothing.
        torch.testing.assert_close(a, b, rtol=0, atol=1e-3)


@pytest.mark.parametrize("every", [1, 2])
def test_layers_computed_again_give_the_same_update(every: int) -> None:
    kept, again = state(), state()
    again.model.recompute_every = every
    for learner in (kept, again):
        train_step(learner, next_token, uneven_batch(), plan(1))
    assert all(torch.equal(a, b) for a, b in zip(kept.model.parameters(), again.model.parameters()))


def test_masked_labels_teach_nothing() -> None:
    """What stands at positions that are not learned, and after them, does not matter."""
    batch = uneven_batch()
    one, other = state(), state()
    changed = batch.labels.clone()
    changed[:, -1] = torch.where(changed[:, -1] == -100, -100, (changed[:, -1] + 1) % 260)
    train_step(one, next_token, batch, plan(1))
    train_step(other, next_token, Batch(batch.ids, changed, batch.weight), plan(1))
    assert not torch.equal(one.model.head_weight, other.model.head_weight)
    masked = batch.labels.clone()
    masked[:, :] = -100
    masked[0, :4] = batch.labels[0, :4]
    ids = batch.ids.clone()
    ids[1:] = 7  # rows without a label
    ids[0, 4:] = 9  # behind the last label
    first, second = state(), state()
    train_step(first, next_token, Batch(batch.ids, masked, 4), plan(1))
    train_step(second, next_token, Batch(ids, masked, 4), plan(1))
    for a, b in zip(first.model.parameters(), second.model.parameters()):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_tiny_text_is_learned_by_heart(optimizer: str) -> None:
    learner = state(optimizer=optimizer)
    losses = []
    train(learner, next_token, stream(), plan(150), [Every(1, lambda s, report: losses.append(report["loss"]))])
    assert losses[0] > 4
    assert losses[-1] < 0.45  # what is left is which of three names and things comes, where nothing tells
    assert learner.tokens == sum(stream().batch(step).weight for step in range(150))


def test_the_gradient_is_clipped_to_the_norm_asked_for() -> None:
    """Adam forgets the scale of one gradient, but not that of one gradient beside another."""
    free, clipped = state(), state()
    report = train_step(free, next_token, uneven_batch(), plan(1, max_grad_norm=1e9))
    train_step(clipped, next_token, uneven_batch(), plan(1, max_grad_norm=report["grad_norm"] / 10))
    moments = [s.optimizers[0].state[s.model.embedding.weight]["exp_avg"] for s in (free, clipped)]
    torch.testing.assert_close(moments[0] / 10, moments[1], rtol=1e-3, atol=1e-9)


def names(group: dict, model: torch.nn.Module) -> set[str]:
    return {name for name, p in model.named_parameters() if any(p is other for other in group["params"])}


def test_decay_is_on_matrices_alone() -> None:
    learner = state()
    decayed, spared = learner.optimizers[0].param_groups
    assert (decayed["weight_decay"], spared["weight_decay"]) == (0.1, 0)
    assert all(p.dim() == 2 for p in decayed["params"])
    assert all(p.dim() == 1 for p in spared["params"])
    assert names(decayed, learner.model) | names(spared, learner.model) == set(dict(learner.model.named_parameters()))


def test_muon_has_the_hidden_matrices_and_adamw_the_rest() -> None:
    learner = state(optimizer="muon")
    first, rest = learner.optimizers
    (matrices,) = first.param_groups
    assert all(name.startswith("blocks.") for name in names(matrices, learner.model))
    assert names(rest.param_groups[0], learner.model) == {"embedding.weight"}
    every = names(matrices, learner.model).union(*(names(group, learner.model) for group in rest.param_groups))
    assert every == set(dict(learner.model.named_parameters()))


def test_the_schedule_multiplies_the_peak() -> None:
    import dataclasses

    learner = state(learning_rate=0.5)
    report = train_step(learner, next_token, uneven_batch(), dataclasses.replace(plan(1), schedule=lambda step: 0.25))
    assert report["learning_rate"] == 0.125


def test_a_batch_without_a_trained_token_changes_nothing_and_is_no_nan() -> None:
    learner = train(state(), next_token, stream(), plan(2))
    before = snapshot_of(learner)
    labels = torch.full((1, 4), -100)
    report = train_step(learner, next_token, Batch(torch.zeros(1, 4, dtype=torch.long), labels, 0), plan(9))
    assert report["skipped"] == "its batch has no trained token"
    assert (report["loss"], report["grad_norm"], learner.step, learner.guard.in_a_row) == (0, 0, 3, 0)
    assert snapshot_of(learner) == before


def test_hooks_fire_at_their_interval_and_after_the_last_step() -> None:
    fired = []
    train(state(), next_token, stream(), plan(7), [Every(3, lambda s, report: fired.append(s.step))])
    assert fired == [3, 6, 7]


def test_a_stop_ends_the_run_after_the_step_it_is_in_and_does_only_what_must_not_be_lost() -> None:
    stop, fired = StopRequested(), []

    def ask_to_stop(s, report) -> None:
        stop.is_set = s.step == 2

    hooks = [
        Every(1, ask_to_stop),
        Every(100, lambda s, report: fired.append(("validation", s.step))),
        Every(100, lambda s, report: fired.append(("checkpoint", s.step)), on_stop=True),
        Every(3, lambda s, report: fired.append(("log", s.step))),
    ]
    learner = train(state(), next_token, stream(), plan(50), hooks, stop)
    assert learner.step == 3
    assert fired == [("checkpoint", 3), ("log", 3)]


def test_all_random_numbers_follow_from_seed_and_step() -> None:
    def drawn(seed: int, step: int) -> tuple:
        seed_everything(seed, step)
        return random.random(), np.random.rand(), torch.rand(1).item()

    assert drawn(3, 7) == drawn(3, 7)
    assert len({*drawn(3, 7), *drawn(3, 8), *drawn(4, 7)}) == 9


class Counting(NextToken):
    """Divides by rows, and tells how many labels there are."""

    def __call__(self, model: Decoder, batch: Batch) -> Loss:
        return Loss(super().__call__(model, batch).total, {"labels": (batch.labels != IGNORED).sum()})

    def weight(self, batch: Batch) -> int:
        return len(batch.ids)


@pytest.mark.parametrize("rows", [8, 3, 1])
def test_an_objective_says_what_the_mean_is_over_and_what_else_to_report(rows: int) -> None:
    batch, learner = uneven_batch(), state()
    report = train_step(learner, Counting(), batch, plan(1, rows_per_micro_batch=rows))
    usual = train_step(state(), next_token, batch, plan(1))
    assert report["labels"] == batch.weight / len(batch.ids)
    assert report["loss"] == pytest.approx(usual["loss"] * batch.weight / len(batch.ids), rel=1e-5)
    assert learner.tokens == report["tokens"] == batch.weight
    assert "labels" not in usual


def test_a_stop_may_be_asked_for_or_come_by_the_clock() -> None:
    assert not StopRequested().is_set
    assert StopRequested(at=time.monotonic() - 1).is_set
    later = StopRequested(at=time.monotonic() + 1000)
    assert not later.is_set
    later.is_set = True
    assert later.is_set
    assert later.is_asked
