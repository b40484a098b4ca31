"""Runs that train an adapter: what they leave on disk, that they go on exactly, on several processes too."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from slmkit.adapt.adapter import trained_tensors
from slmkit.adapt.load import load_adapted, load_model, start_adapter
from slmkit.config import UserError, load_settings
from slmkit.data.stream import Stream
from slmkit.device import find_device
from slmkit.files.find import find_model_directory
from slmkit.model.files.adapter_directory import LoRASettings
from slmkit.model.files.directory import empty_decoder, load_decoder, save_decoder
from slmkit.model.initialization import build_decoder
from slmkit.tokenizer import SLMTokenizer
from slmkit.training.checkpoints.checkpoint import complete_checkpoints, verify
from slmkit.training.distributed import join
from slmkit.training.estimate.memory import MemoryProfile, checkpoint_bytes, meta_model_of, state_bytes, training_bytes
from slmkit.training.fit import RunContext, fit
from slmkit.training.logging.logger import ThroughputMonitor
from slmkit.training.logging.metrics_log import MetricsLog
from slmkit.training.loop import State
from slmkit.training.objective import next_token
from slmkit.training.recipe.recipe import Recipe
from slmkit.training.run_directory import RunDirectory
from tests.adapt.helpers import KINDS
from tests.training.helpers import LENGTH, TOKENIZER, config, dataset, settings
from tests.training.ranks import on_ranks

pytestmark = pytest.mark.usefixtures("without_plan_and_pictures")

CPU = find_device("cpu", "float32")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("base")
    save_decoder(build_decoder(config(), seed=1), config(), directory)
    TOKENIZER.save_pretrained(directory)
    return directory


def lora_run(root: Path, base: Path, resume: bool = False, train: dict[str, Any] | None = None, **lora: Any) -> State:
    """A run of an adapter with dropout, so that random numbers matter; on whatever ranks there are."""
    chosen = LoRASettings(**({"r": 4, "lora_dropout": 0.2} | lora))
    train_settings = settings(**(train or {}))
    recipe = Recipe(output_dir=str(root), train=train_settings, lora=chosen, model={"path": str(base)})
    model, shape, files = start_adapter(base, chosen, seed=5)
    rows, device = dataset(), find_device("cpu", train_settings.precision)
    with join(device, 60) as group:
        RunDirectory(root).checkpoints.mkdir(parents=True, exist_ok=True)
        context = RunContext(
            run=RunDirectory(root), recipe=recipe, model=model, config=shape, files=files,
            extra_files=TOKENIZER.save_pretrained, device=device, group=group, warn=lambda line: None,
        )  # fmt: skip
        batches = Stream(rows, train_settings.rows_per_step(LENGTH), seed=0)
        return fit(context, batches, next_token, context.plan(batches), resume=resume)


def metrics(root: Path) -> list[dict[str, Any]]:
    return MetricsLog(root / "metrics.jsonl").comparable()


def test_a_checkpoint_is_the_adapter_alone_with_its_tokenizer(base: Path, tmp_path: Path) -> None:
    state = lora_run(tmp_path, base)
    losses = [line["loss"] for line in metrics(tmp_path)]
    assert losses[-1] < losses[0] - 0.1
    for path in complete_checkpoints(tmp_path / "checkpoints"):
        verify(path)
        names = {file.name for file in path.iterdir()}
        assert {"adapter_config.json", "adapter_model.safetensors", "tokenizer.json", "training_state"} <= names
        assert not names & {"model.safetensors", "config.json"}
        assert SLMTokenizer.from_pretrained(path).fingerprint == TOKENIZER.fingerprint
    moments = load_file(path / "training_state" / "optimizer.safetensors")
    assert {name.rpartition("/")[0] for name in moments} == trained_tensors(state.model).keys()
    found = find_model_directory(tmp_path)
    assert json.loads((found / "adapter_config.json").read_text())["base_model_name_or_path"] == str(base)
    ids = torch.arange(20)[None]
    with torch.no_grad():
        trained = state.model.eval()(ids)
        assert (load_model(found)[0](ids) - trained).abs().max() < 1e-4
        assert (load_decoder(base)[0](ids) - trained).abs().max() > 1e-2


CASES: dict[str, dict[str, Any]] = {
    "lora": {},
    "dora on four bits": {"use_dora": True, "base_weights": "nf4"},
    "embeddings too, by Muon": {"modules_to_save": ["embedding"], "train": {"optimizer": "muon"}},
    "in bfloat16": {"train": {"precision": "bfloat16-pure"}},
}


@pytest.mark.parametrize("case", CASES)
def test_a_run_that_goes_on_ends_as_the_unbroken_one_bit_for_bit(case: str, base: Path, tmp_path: Path) -> None:
    lora_run(tmp_path / "unbroken", base, **CASES[case])
    broken = tmp_path / "broken"
    shutil.copytree(tmp_path / "unbroken", broken, symlinks=True)
    for path in complete_checkpoints(broken / "checkpoints")[-1:]:
        shutil.rmtree(path)
    lora_run(broken, base, resume=True, **CASES[case])
    assert metrics(broken) == metrics(tmp_path / "unbroken")
    ours, theirs = (
        load_file(root / "latest" / "adapter_model.safetensors") for root in (broken, tmp_path / "unbroken")
    )
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_two_processes_train_the_adapter_that_one_trains(base: Path, tmp_path: Path) -> None:
    train = {"max_steps": 4, "eval_steps": 2}
    lora_run(tmp_path / "one", base, lora_dropout=0.0, train=train)
    on_ranks(2, _on_a_rank, tmp_path / "two", base, train)
    one, two = (load_file(tmp_path / name / "latest" / "adapter_model.safetensors") for name in ("one", "two"))
    assert one.keys() == two.keys()
    assert all(torch.allclose(one[name], two[name], atol=1e-4) for name in one)


def test_shares_of_a_frozen_model_are_refused(base: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="lora: parallel fsdp splits what is trained"):
        load_settings(Recipe, {"lora": {}, "model": {"path": str(base)}, "train": {"parallel": "fsdp"}})


def _on_a_rank(root: Path, base: Path, train: dict[str, Any]) -> None:
    lora_run(root, base, lora_dropout=0.0, train=train)


@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_is_trained_on_from_where_it_was(kind: str, base: Path, tmp_path: Path) -> None:
    lora_run(tmp_path / "first", base, train={"max_steps": 3}, **KINDS[kind])
    first = find_model_directory(tmp_path / "first")
    state = lora_run(tmp_path / "second", first, train={"max_steps": 1, "learning_rate": 1e-9}, **KINDS[kind])
    expected = trained_tensors(load_adapted(first)[0])
    assert all(torch.allclose(expected[n], tensor, atol=1e-6) for n, tensor in trained_tensors(state.model).items())
    content = json.loads((find_model_directory(tmp_path / "second") / "adapter_config.json").read_text())
    assert content["base_model_name_or_path"] == str(base)
    with pytest.raises(UserError, match=r"an adapter of r 4, the recipe's lora.r is 8: set it so .* or fold it in"):
        start_adapter(first, LoRASettings(r=8, **KINDS[kind]))


def test_a_base_in_fewer_bits_is_kept_so_when_an_adapter_is_trained_on(base: Path, tmp_path: Path) -> None:
    lora_run(tmp_path, base, train={"max_steps": 2})
    model, _, _ = start_adapter(find_model_directory(tmp_path), LoRASettings(r=4, base_weights="int8"))
    assert model.blocks[0].mlp.up.base.kind == "int8"
    assert trained_tensors(model).keys() == trained_tensors(load_adapted(find_model_directory(tmp_path))[0]).keys()


def test_memory_is_estimated_of_what_is_trained(base: Path) -> None:
    """Full fine-tuning keeps four numbers a weight; an adapter's run one, or an eighth of one."""
    plain, _ = load_decoder(base)
    needed = {"full": state_bytes(MemoryProfile(meta_model_of(plain)), settings(), CPU)}
    for name in ("float32", "int8", "nf4"):
        model, _, _ = start_adapter(base, LoRASettings(r=1, target_modules=["query"], base_weights=name))
        inventory = MemoryProfile(meta_model_of(model))
        needed[name] = state_bytes(inventory, settings(), CPU)
        trained = sum(tensor.numel() for tensor in trained_tensors(model).values())
        kept = checkpoint_bytes(inventory, settings(), CPU)
        assert 3 * 4 * trained <= kept <= 3 * 4 * trained + 2000  # weights and two moments
        assert training_bytes(inventory, settings(), 2, LENGTH, CPU) > needed[name]
    weights = sum(p.nbytes for p in plain.parameters())
    assert needed["full"] > 2.9 * weights
    assert weights < needed["float32"] < 1.2 * weights
    assert needed["nf4"] < needed["int8"] < needed["float32"]


def test_estimates_are_the_same_for_a_loaded_model_as_for_one_of_its_config(base: Path) -> None:
    plain, shape = load_decoder(base)
    of_either = [
        training_bytes(MemoryProfile(model), settings(gradient_checkpointing=1), 4, LENGTH, CPU)
        for model in (empty_decoder(shape), meta_model_of(plain))
    ]
    assert of_either[0] == of_either[1]


def test_mfu_counts_no_gradients_of_frozen_matrices(base: Path) -> None:
    plain, _ = load_decoder(base)
    adapted, _, _ = start_adapter(base, LoRASettings(r=1, target_modules=["query"]))
    full, lora = (ThroughputMonitor(model, CPU, 4, LENGTH).step_flops(4 * LENGTH) for model in (plain, adapted))
    assert 2 / 3 * full < lora < 0.75 * full
