"""The micro-batch that fits is found, and running out of memory says what to change."""

from __future__ import annotations

import pytest
import torch

from slmkit.config import UserError, load_settings
from slmkit.device import Device, find_device
from slmkit.model.files.directory import empty_decoder
from slmkit.training import objective as objectives
from slmkit.training.estimate import micro_batch
from slmkit.training.estimate.memory import MemoryProfile, training_bytes
from slmkit.training.estimate.micro_batch import (
    fitting_rows,
    is_out_of_memory,
    lack_of_memory_explained,
    resolve_micro_batch,
)
from slmkit.training.loop import train_step
from slmkit.training.objective import next_token
from slmkit.training.recipe.recipe import TrainSettings
from tests.training.helpers import LENGTH, config, plan, settings, state, stream

CPU = find_device("cpu", "float32")
GPU = Device(torch.device("cuda"), torch.float32)


def fresh(**changes: object) -> MemoryProfile:
    """A new model that learns the next token."""
    return MemoryProfile(empty_decoder(config(**changes)))


def memory_for(rows: int, **changes: object) -> int:
    """Free bytes in which a step of `rows` rows just fits."""
    chosen = settings(**changes)
    needed = training_bytes(fresh(), chosen, rows, LENGTH, CPU)
    return int(needed / micro_batch.USABLE["cpu"]) + 1


def test_the_most_rows_that_fit_are_found() -> None:
    a, free = fresh(), memory_for(7)
    assert fitting_rows(a, settings(), 7, LENGTH, CPU, free) == 7
    assert fitting_rows(a, settings(), 24, LENGTH, CPU, free) == 7
    assert fitting_rows(a, settings(), 24, LENGTH, CPU, free - 1000) == 6


def test_auto_is_shared_out_evenly_and_keeps_the_tokens_of_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = settings(micro_batch_tokens="auto", tokens_per_step=20 * LENGTH)
    monkeypatch.setattr(micro_batch, "available_memory", lambda device: memory_for(8))
    resolved = resolve_micro_batch(chosen, fresh(), LENGTH, CPU)
    assert resolved.rows_per_micro_batch(LENGTH) == 7  # 7 + 7 + 6
    assert resolved.rows_per_step(LENGTH) == 20
    assert resolve_micro_batch(resolved, fresh(), LENGTH, CPU) is resolved


def test_a_recipe_that_says_nothing_gets_what_is_usual_on_the_device() -> None:
    silent, width = settings(tokens_per_step=2**20, micro_batch_tokens=None), config().hidden_size
    on_cpu, on_gpu = (resolve_micro_batch(silent, fresh(), LENGTH, device) for device in (CPU, GPU))
    assert on_cpu.rows_per_micro_batch(LENGTH) == 2**18 // width // LENGTH
    assert on_gpu.rows_per_micro_batch(LENGTH) == 8_192 // LENGTH
    assert resolve_micro_batch(silent, fresh(), 2**18, CPU).rows_per_micro_batch(2**18) == 1


def test_gradients_of_earlier_micro_batches_count() -> None:
    """In one micro-batch, activations are freed as gradients come; in a later one, both are there."""
    alone, later = (training_bytes(fresh(), settings(tokens_per_step=n * LENGTH), 8, LENGTH, CPU) for n in (8, 16))
    gradients = sum(4 * p.numel() for p in fresh().model.parameters())
    assert gradients / 2 < later - alone < 1.01 * gradients


def test_not_even_one_row_is_one_line_with_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(micro_batch, "available_memory", lambda device: 2**16)
    with pytest.raises(UserError) as caught:
        resolve_micro_batch(settings(micro_batch_tokens="auto"), fresh(), LENGTH, CPU)
    said = str(caught.value)
    assert "\n" not in said
    assert "1 × 32 tokens at once needs about 0.00 GiB, of 0.00 GiB" in said
    assert "micro_batch_tokens" not in said  # it cannot be less than a row
    assert "train.gradient_checkpointing=1 (about" in said


def test_a_try_that_runs_out_is_halved(monkeypatch: pytest.MonkeyPatch) -> None:
    tried, loss = [], objectives.linear_cross_entropy

    def runs_out_above_five_rows(hidden: torch.Tensor, *others: object) -> torch.Tensor:
        tried.append(len(hidden) // LENGTH)
        if tried[-1] > 5:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")
        return loss(hidden, *others)

    monkeypatch.setattr(objectives, "linear_cross_entropy", runs_out_above_five_rows)
    for optimizer in ("adamw", "adamw_8bit", "muon", "lion"):
        assert micro_batch.tried_rows(fresh(), settings(optimizer=optimizer), 20, LENGTH, CPU) == 5
    assert tried[:4] == [20, 10, 5, 20]


def really_too_much() -> RuntimeError:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**60, dtype=torch.uint8)
    return caught.value


def test_the_words_of_this_machine_s_allocator_are_known() -> None:
    assert is_out_of_memory(really_too_much())
    assert is_out_of_memory(MemoryError())
    assert is_out_of_memory(RuntimeError("MPS backend out of memory (MPS allocated: 5.00 GB)"))
    assert not is_out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))


def test_a_step_that_runs_out_says_what_to_change() -> None:
    a = fresh()
    with (
        pytest.raises(UserError, match=r"8 × 32 tokens .* set train.micro_batch_tokens=128 \(about .*adamw_8bit"),
        lack_of_memory_explained(a, settings(), 8, LENGTH, CPU),
    ):
        raise really_too_much()
    with pytest.raises(RuntimeError, match="shapes"), lack_of_memory_explained(a, settings(), 8, LENGTH, CPU):
        raise RuntimeError("shapes cannot be multiplied")


def test_a_recipe_may_say_auto_and_nothing_else_that_is_no_number() -> None:
    assert load_settings(TrainSettings, {"micro_batch_tokens": "auto"}).micro_batch_tokens == "auto"
    with pytest.raises(UserError, match="micro_batch_tokens"):
        load_settings(TrainSettings, {"micro_batch_tokens": "some"})
    with pytest.raises(UserError, match="micro_batch_tokens"):
        load_settings(TrainSettings, {"micro_batch_tokens": 0})


def test_estimates_know_what_optimizers_keep() -> None:
    a = fresh(vocab_size=20_000)
    needed = [training_bytes(a, settings(optimizer=name), 1, LENGTH, CPU) for name in ("adamw_8bit", "lion", "adamw")]
    assert needed == sorted(needed)
    assert needed[2] - needed[0] == pytest.approx(6 * 20_000 * 32, rel=0.1)  # two bytes a weight instead of eight


def test_the_step_after_a_try_is_the_step_without_one() -> None:
    tried, untried = state(), state()
    micro_batch.tried_rows(fresh(), settings(), 4, LENGTH, CPU)
    for learner in (tried, untried):
        train_step(learner, next_token, stream().batch(0), plan(1))
    assert all(torch.equal(a, b) for a, b in zip(tried.model.parameters(), untried.model.parameters()))
