"""An adapter's life through recipes: trained on conversations, resumed, talked to, trained on, folded in."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from slmkit import SLMForCausalLM, SLMTrainer, TextDataset, UserError
from slmkit.adapt.adapter import trained_tensors
from slmkit.adapt.load import load_adapted, load_model
from slmkit.adapt.lora import fold
from slmkit.files.find import find_model_directory
from slmkit.generation.chat import ChatSession
from slmkit.generation.sampling_settings import SamplingSettings
from slmkit.model.files.adapter_directory import LoRASettings
from slmkit.model.files.directory import load_decoder
from slmkit.tokenizer import SLMTokenizer
from slmkit.training.checkpoints.checkpoint import complete_checkpoints, delete
from slmkit.training.logging.list_runs import read_run
from slmkit.training.recipe.recipe import find_recipe, load_recipe
from slmkit.workflows.merge import merge_adapters
from slmkit.workflows.train import replay_run, resume_run, train_recipe
from tests.test_life import FEW_STEPS, Silent

pytestmark = pytest.mark.usefixtures("without_plan_and_pictures")  # the runs of fixtures have both
TINY = [
    "model.hidden_size=32", "model.intermediate_size=64", "model.num_hidden_layers=2", "model.num_attention_heads=2",
    "tokenizer.vocab_size=400", "data.documents=60", "data.validation_documents=6",
]  # fmt: skip


def train(name: str, root: Path, *overrides: str) -> tuple[Path, Silent]:
    reporter = Silent()
    values = [f"output_dir={root}", *FEW_STEPS, *overrides]
    return train_recipe(load_recipe(find_recipe(name), values), reporter).root, reporter


def train_adapter(base: Path, root: Path, *overrides: str) -> tuple[Path, Silent]:
    conversations = ["data.source=stories", "data.documents=30", "data.validation_documents=4"]
    return train("own-chat-lora", root, f"model.path={base}", *conversations, *overrides)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train("quickstart-primer", tmp_path_factory.mktemp("base") / "run", *TINY, "train.max_steps=4")[0]


@pytest.fixture(scope="module")
def adapter(base: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Silent]:
    root = tmp_path_factory.mktemp("adapter") / "run"
    return train_adapter(base, root, "lora.r=4", "train.max_steps=6", "train.eval_steps=2", "train.save_total_limit=9")


def test_the_summary_says_how_little_is_trained_and_the_plan_what_it_takes(adapter: tuple[Path, Silent]) -> None:
    root, reporter = adapter
    learned = sum(t.numel() for t in trained_tensors(load_adapted(find_model_directory(root))[0]).values())
    assert any(f"{learned:,} parameters (" in str(line) and "that are frozen" in str(line) for line in reporter.lines)
    predicted = json.loads((root / "plan.json").read_text())["predicted"]
    weights = sum(p.nbytes for p in load_model(find_model_directory(root))[0].parameters())
    assert predicted["disk_bytes"] < 40 * 4 * learned + 100_000 + weights
    assert read_run(root).state == "finished"
    assert (root / "samples.md").is_file()


def test_a_model_learns_to_talk_and_its_base_stays_as_it_was(base: Path, adapter: tuple[Path, Silent]) -> None:
    before, _ = load_decoder(find_model_directory(base))
    directory = find_model_directory(adapter[0])
    decoder, _ = load_model(directory)
    tokenizer = SLMTokenizer.from_pretrained(directory)
    session = ChatSession(decoder, tokenizer, SamplingSettings(temperature=0), max_new_tokens=5)
    assert isinstance("".join(session.reply("Who are you?")), str)
    ids = torch.tensor([tokenizer.encode("Once upon a time")])
    logits = SLMForCausalLM.from_pretrained(adapter[0])(ids).logits
    assert (logits - before.logits(before(ids))).abs().max() > 1e-4
    folded = merge_adapters(base, [adapter[0]], adapter[0].parent / "folded")
    assert torch.allclose(SLMForCausalLM.from_pretrained(folded)(ids).logits, logits, atol=1e-4)


def test_it_is_resumed_and_replayed_bit_for_bit(adapter: tuple[Path, Silent], tmp_path: Path) -> None:
    copy = tmp_path / "run"
    shutil.copytree(adapter[0], copy, symlinks=True)
    for path in complete_checkpoints(copy / "checkpoints")[1:]:
        shutil.rmtree(path)
    resume_run(copy, Silent())
    ours, theirs = (load_file(root / "latest" / "adapter_model.safetensors") for root in (copy, adapter[0]))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    again = replay_run(copy, 6, Silent())
    assert again.recorded is not None
    assert not again.differences


def test_what_a_run_began_with_outlives_the_checkpoint_it_was(base: Path, tmp_path: Path) -> None:
    """The base's run goes on, and its checkpoints are deleted one after another as it does."""
    first = tmp_path / "first"
    shutil.copytree(base, first, symlinks=True)
    standing = [
        train_adapter(first, tmp_path / "chat", "lora.r=2", "train.max_steps=2", "train.eval_steps=1")[0],
        train("own-chat", tmp_path / "whole", f"model.path={first}", "data.source=stories", "data.documents=30",
              "data.validation_documents=4", "train.max_steps=2", "train.eval_steps=1")[0],
    ]  # fmt: skip
    ids = torch.arange(30)[None]
    began = find_model_directory(first).resolve()
    adapted_logits = load_model(find_model_directory(standing[0]))[0](ids)
    for root in standing:
        assert load_recipe(root / "recipe.yaml").model.path == str(root / "base")
        assert (root / "base" / "model.safetensors").samefile(began / "model.safetensors")  # no room on the disk
    for path in complete_checkpoints(first / "checkpoints"):
        delete(path)
    assert torch.equal(load_model(find_model_directory(standing[0]))[0](ids), adapted_logits)
    for root in standing:
        weights = "adapter_model.safetensors" if root.name == "chat" else "model.safetensors"
        ended = load_file(root / "latest" / weights)
        delete(complete_checkpoints(root / "checkpoints")[-1])
        resume_run(root, Silent())
        again = load_file(root / "latest" / weights)
        assert all(torch.equal(again[name], ended[name]) for name in ended)
    moved = tmp_path / "moved"
    standing[0].rename(moved)
    assert torch.equal(load_model(find_model_directory(moved))[0](ids), adapted_logits)


def test_a_run_of_an_adapter_on_an_adapter_says_what_it_does(adapter: tuple[Path, Silent], tmp_path: Path) -> None:
    _, reporter = train_adapter(adapter[0], tmp_path / "on", "lora.r=4", "train.max_steps=1")
    assert f"{adapter[0]}: an adapter, which is trained on" in reporter.lines


def test_all_weights_are_trained_on_from_an_adapter_too(adapter: tuple[Path, Silent], tmp_path: Path) -> None:
    root, _ = train(
        "own-chat", tmp_path / "run", f"model.path={adapter[0]}", "data.source=stories", "data.documents=30",
        "data.validation_documents=4", "train.max_steps=1", "train.learning_rate=1e-9",
    )  # fmt: skip
    ids = torch.arange(30)[None]
    whole, _ = load_decoder(find_model_directory(root))
    assert torch.allclose(whole(ids), load_model(find_model_directory(adapter[0]))[0](ids), atol=1e-4)


@pytest.mark.parametrize(
    ("name", "more"),
    [
        ("quickstart-dpo", []),
        ("quickstart-grpo", ["grpo.prompts_per_step=2", "grpo.num_generations=2", "grpo.max_new_tokens=4"]),
        ("quickstart-stories", ["objective=distill", "distillation.alpha=0.5", "train.muon_learning_rate=1e-9"]),
    ],
    ids=["dpo", "grpo", "distill"],
)
def test_any_objective_trains_an_adapter(name: str, more: list[str], base: Path, tmp_path: Path) -> None:
    """The base is what it was; after a step at a rate of nearly nothing, so is what the adapter makes of it."""
    if "objective=distill" in more:
        more = [*more, f"distillation.teacher={base}"]
    values = [f"model.path={base}", "lora.r=2", "lora.base_weights=int8", "data.documents=20", "train.max_steps=2"]
    few = ["data.validation_documents=4", "train.sample_prompts=[]", "train.max_tokens=null", "train.eval_steps=2"]
    values += [*few, "train.sequence_length=128", "train.tokens_per_step=256", "train.learning_rate=1e-9", *more]
    loaded = load_recipe(find_recipe(name), [f"output_dir={tmp_path}/run", *FEW_STEPS, *values])
    root = train_recipe(loaded, Silent(), force=True).root
    directory = find_model_directory(root)
    assert not (directory / "model.safetensors").exists()
    decoder, _, _ = load_adapted(directory)
    assert all("lora_" in key for key in trained_tensors(decoder))
    ids = torch.arange(30)[None]
    assert torch.allclose(decoder(ids), load_decoder(find_model_directory(base))[0](ids), atol=1e-4)


def test_a_script_trains_an_adapter(base: Path, tmp_path: Path) -> None:
    tokenizer = SLMTokenizer.from_pretrained(find_model_directory(base))
    model = SLMForCausalLM.from_pretrained(base)
    before = {name: parameter.clone() for name, parameter in model.decoder.named_parameters()}
    dataset = TextDataset(["Ann has a kite. " * 20] * 4, tokenizer, max_length=64)
    lora = LoRASettings(r=2, target_modules=["q_proj", "v_proj"], use_dora=True)
    config = model.config.model_copy(update={"learning_rate": 1e-2, "warmup_steps": 0})
    trainer = SLMTrainer(config, model, tokenizer, dataset, output_dir=str(tmp_path / "run"), device="cpu", lora=lora)
    trainer.train(max_steps=4)
    with pytest.raises(UserError, match=r"has an adapter: fold\(model.decoder\)"):
        model.save_pretrained(tmp_path / "whole")
    ids = torch.arange(40)[None]
    logits = model(ids).logits
    assert torch.allclose(SLMForCausalLM.from_pretrained(tmp_path / "run")(ids).logits, logits, atol=1e-4)
    fold(model.decoder)
    assert torch.allclose(model(ids).logits, logits, atol=1e-4)
    after = dict(model.decoder.named_parameters())
    changed = {
        name.rpartition(".")[0].rpartition(".")[2] for name in before if not torch.equal(before[name], after[name])
    }
    assert changed == {"query", "value"}
    with pytest.raises(UserError, match="lora: an adapter needs a base model on disk"):
        SLMTrainer(config, SLMForCausalLM(config), tokenizer, dataset, lora=lora)


def test_an_adapter_of_nothing_is_refused(tmp_path: Path) -> None:
    recipe = load_recipe(find_recipe("own-chat-lora"), [f"output_dir={tmp_path}/run", "data.source=stories"])
    with pytest.raises(UserError, match="lora needs a trained model to adapt: set model.path"):
        train_recipe(recipe, Silent())
    assert not (tmp_path / "run").exists()
