"""Two and four processes over gloo train what one process trains, and read each other's checkpoints."""

from __future__ import annotations

import functools
import os
import signal
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch.profiler import profile

from slmkit.api.causal_lm import SLMForCausalLM
from slmkit.api.trainer import SLMTrainer
from slmkit.config import UserError
from slmkit.data.rows.datasets import TextDataset
from slmkit.data.stream import Rows, Stream
from slmkit.device import DeviceError, Ranks, find_device, find_ranks
from slmkit.model.initialization import build_decoder
from slmkit.training.checkpoints.checkpoint import WholeModel
from slmkit.training.distributed import Group, join, whole
from slmkit.training.fit import RunContext, fit
from slmkit.training.loop import Every, Plan, Report, RunStopped, State, train_step
from slmkit.training.objective import next_token
from slmkit.training.optimizers.choose import OPTIMIZERS
from slmkit.training.recipe.recipe import Recipe
from slmkit.training.run_directory import RunDirectory
from slmkit.workflows.hooks import Validate
from tests.long import several
from tests.training.helpers import LENGTH, TOKENIZER, Changed, config, settings
from tests.training.ranks import on_ranks

STEPS = 6


class UnevenRows(Rows):
    """Rows of which none to 24 tokens are learned: ranks have unequal weights, and a micro-batch may have nothing."""

    rows_in_epoch, length = 40, LENGTH

    def row(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        ids = (np.arange(LENGTH) * (index % 7 + 1) + index) % 260
        labels = np.roll(ids, -1)
        labels[(index % 4) * 8 :] = -100
        return ids, labels

    def documents(self, index: int) -> np.ndarray:
        return np.zeros(LENGTH, dtype=np.int64)


def train_run(root: Path, parallel: str, optimizer: str, resume: bool = False, stop_at: int | None = None) -> None:
    """A run on whatever ranks there are: 7 rows a step, 2 at once, so that no split is even.

    The last rank alone is asked to stop; all of them have to.
    """
    train = settings(
        parallel=parallel, optimizer=optimizer, tokens_per_step=7 * LENGTH, micro_batch_tokens=2 * LENGTH,
        max_steps=STEPS, eval_steps=2, max_grad_norm=0.5, muon_beta2=0.8,
    )  # fmt: skip
    rows, shape, directory = UnevenRows(), config(vocab_size=261), RunDirectory(root)
    device = find_device("cpu", "float32")
    with join(device, 60) as group:
        directory.checkpoints.mkdir(parents=True, exist_ok=True)

        def stop(state: State, report: Report) -> None:
            if state.step == stop_at and group.rank == group.world - 1:
                os.kill(os.getpid(), signal.SIGTERM)

        hooks = (Every(2, Validate(rows, device, group=group), on_all_ranks=True), Every(1, stop, on_all_ranks=True))
        context = RunContext(
            run=directory, recipe=Recipe(output_dir=str(root), train=train), model=build_decoder(shape, seed=1),
            config=shape, files=WholeModel(shape), extra_files=TOKENIZER.save_pretrained, device=device, group=group,
        )  # fmt: skip
        batches = Stream(rows, train.rows_per_step(LENGTH))
        try:
            fit(context, batches, next_token, context.plan(batches), hooks, resume=resume)
        except RunStopped:
            assert stop_at is not None


@functools.cache
def one_process(optimizer: str) -> Path:
    root = Path(tempfile.mkdtemp())
    train_run(root, "auto", optimizer)
    return root


def assert_same_run(root: Path, reference: Path) -> None:
    """The same data to the token at every step, and figures and weights that differ by rounding alone."""
    ours, theirs = (RunDirectory(path).metrics.read() for path in (root, reference))
    assert [line["step"] for line in ours] == list(range(1, STEPS + 1))
    for mine, expected in zip(ours, theirs):
        assert mine["tokens"] == expected["tokens"]
        for name in ("loss", "grad_norm", "learning_rate", "validation_loss"):
            if name in mine or name in expected:
                assert mine[name] == pytest.approx(expected[name], rel=2e-4), (mine["step"], name)
    a, b = (load_file(path / "latest" / "model.safetensors") for path in (root, reference))
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=1e-2, atol=2e-3)
    a, b = (load_file(path / "latest" / "training_state" / "optimizer.safetensors") for path in (root, reference))
    assert {name: tensor.shape for name, tensor in a.items()} == {name: tensor.shape for name, tensor in b.items()}


@pytest.mark.parametrize(
    ("world", "parallel", "optimizer"), [(2, "auto", "muon"), (4, "fsdp", "muon"), (2, "fsdp", "lion")]
)
def test_many_processes_train_what_one_trains(tmp_path: Path, world: int, parallel: str, optimizer: str) -> None:
    on_ranks(world, train_run, tmp_path, parallel, optimizer)
    assert_same_run(tmp_path, one_process(optimizer))


UP_AND_DOWN, UP = [(2, "ddp"), (4, "fsdp"), (1, "auto")], [(1, "auto"), (2, "fsdp"), (4, "ddp")]


@pytest.mark.parametrize("ranks", several([UP_AND_DOWN], [UP_AND_DOWN, UP]), ids=str)
def test_a_checkpoint_is_read_by_any_number_of_processes(tmp_path: Path, ranks: list[tuple[int, str]]) -> None:
    for part, (world, parallel) in enumerate(ranks):
        stop_at = 2 * part + 2 if part < 2 else None
        on_ranks(world, train_run, tmp_path, parallel, "adamw", part > 0, stop_at)
    assert_same_run(tmp_path, one_process("adamw"))


def small_step(
    group: Group, parallel: str, rows_at_once: int, objective: Any = next_token, backend: str | None = None
) -> tuple[State, Report]:
    """One step of 8 rows, its blocks compiled where a backend is named."""
    device = find_device("cpu", "float32")
    model = build_decoder(config(), seed=1)
    for block in model.blocks if backend else ():
        block.compile(backend=backend)
    group.share(model, parallel, device.torch_device)
    state = State(model, OPTIMIZERS["adamw"](model, settings()))
    plan = Plan(1, rows_at_once, 1.0, lambda step: 1.0, device, group=group)
    return state, train_step(state, objective, Stream(UnevenRows(), 8).batch(0, group.rank, group.world), plan)


def compiled_step(group: Group, parallel: str) -> None:
    """With blocks compiled for a graph alone, since generating code for them would take half a minute."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    plain, expected = small_step(group, parallel, 2)
    compiled, found = small_step(group, parallel, 2, backend="aot_eager")
    assert found["loss"] == pytest.approx(expected["loss"], rel=1e-5)
    assert found["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-4)
    assert torch._dynamo.utils.counters["frames"]["ok"] > 0
    for (name, one), (other_name, other) in zip(plain.model.named_parameters(), compiled.model.named_parameters()):
        assert name == other_name
        torch.testing.assert_close(whole(one.detach()), whole(other.detach()), rtol=1e-4, atol=1e-4)


def in_every_way(check: Callable[[Group, str], None]) -> None:
    with join(find_device("cpu", "float32"), 60) as group:
        for parallel in ("ddp", "fsdp"):
            check(group, parallel)


def test_blocks_may_be_compiled_and_shared() -> None:
    on_ranks(2, in_every_way, compiled_step)


def script(folder: Path) -> None:
    """What somebody writes in a script, run by `torchrun`."""
    texts = [f"{name} has a {thing}." for name in ("Ann", "Ben") for thing in ("kite", "drum", "boat", "fox")]
    dataset = TextDataset(texts, TOKENIZER, max_length=16)
    torch.manual_seed(3)
    model = SLMForCausalLM(config(batch_size=4, learning_rate=1e-3))
    trainer = SLMTrainer(model.config, model, TOKENIZER, dataset, dataset, output_dir=str(folder / "run"), device="cpu")
    trainer.train(max_steps=4)


def test_a_script_trains_the_same_on_two_processes(tmp_path: Path) -> None:
    (tmp_path / "two").mkdir()
    on_ranks(2, script, tmp_path / "two")
    script(tmp_path / "one")
    assert [path.name for path in (tmp_path / "two").iterdir()] == ["run"]
    two, one = (RunDirectory(tmp_path / name / "run").metrics.comparable()[-1] for name in ("two", "one"))
    assert two == pytest.approx(one, rel=1e-3)


def count_collectives(parallel: str, event: str) -> None:
    with join(find_device("cpu", "float32"), 60) as group:
        counts = []
        for rows_at_once in (4, 1):
            with profile() as profiled:
                small_step(group, parallel, rows_at_once)
            counts.append(sum(found.count for found in profiled.key_averages() if found.key == event))
        assert counts[0] == counts[1] > 0, counts


@pytest.mark.parametrize(("parallel", "event"), [("ddp", "gloo:all_reduce"), ("fsdp", "c10d::_reduce_scatter_base_")])
def test_gradients_cross_ranks_once_a_step_however_many_micro_batches(parallel: str, event: str) -> None:
    on_ranks(2, count_collectives, parallel, event)


def agree() -> None:
    with join(find_device("cpu", "float32"), 60) as group:
        assert group.gather(group.rank, 2.5) == [[0, 1], [2.5, 2.5]]
        assert group.sum(group.rank + 1) == [3]
        assert group.any(group.rank == 1)
        assert not group.any(False)
        assert group.from_main({"name": "run"} if group.is_main else None) == {"name": "run"}


def refuse(group: Group, parallel: str) -> None:
    spoiled = Changed(lambda loss: loss * float("nan") if group.rank == 1 else loss)
    state, report = small_step(group, parallel, 2, spoiled)
    assert report["skipped"] == "the loss is nan"
    assert state.guard.in_a_row == 1


def test_ranks_agree_on_numbers() -> None:
    on_ranks(2, agree)


def test_what_is_not_finite_on_one_rank_is_refused_by_all() -> None:
    on_ranks(2, in_every_way, refuse)


def outlive(kind: str) -> None:
    """The second rank dies, or is not heard of any more; the first has to notice."""
    try:
        with join(find_device("cpu", "float32"), 2) as group:
            if group.rank == 1 and kind == "stalls":
                time.sleep(6)
            if group.rank == 1:
                os._exit(0)
            group.sum(1)
    except UserError as error:
        noticed = "lost the other processes" in str(error)
    else:
        noticed = False
    assert noticed


@pytest.mark.parametrize("kind", ["dies", "stalls"])
def test_a_lost_rank_ends_the_others(kind: str) -> None:
    on_ranks(2, outlive, kind)


def test_ranks_are_what_torchrun_says(monkeypatch: pytest.MonkeyPatch) -> None:
    assert find_ranks() == Ranks(0, 0, 1)
    for name, value in (("RANK", "3"), ("LOCAL_RANK", "1"), ("WORLD_SIZE", "4")):
        monkeypatch.setenv(name, value)
    assert find_ranks() == Ranks(3, 1, 4)
    assert find_device("cpu").ranks.world == 4
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(DeviceError, match="no rank 3"):
        find_ranks()
    monkeypatch.delenv("RANK")
    with pytest.raises(DeviceError, match="RANK=None"):
        find_ranks()
