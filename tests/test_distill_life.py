"""Distillation as a user has it: by a recipe, from a teacher at hand or a stored one, stopped, resumed and replayed."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from slmkit import DistillationLoss, SLMConfig, SLMForCausalLM, SLMTrainer, TextDataset
from slmkit.config import UserError, load_settings
from slmkit.data.prepare.corpus import open_corpus
from slmkit.data.rows.teacher_cache import HEADER, POSITIONS, PROGRESS, read_header
from slmkit.model.files.directory import load_decoder
from slmkit.tokenizer import SLMTokenizer
from slmkit.training.recipe.recipe import Recipe
from slmkit.training.run_directory import RunDirectory
from slmkit.workflows.distill import cache_teacher
from slmkit.workflows.train import replay_run, resume_run, train_recipe
from tests.test_life import Silent
from tests.training.ranks import on_ranks

pytestmark = pytest.mark.usefixtures("module_without_plan_and_pictures")

THINGS = ("kite", "drum", "boat", "lamp")
CHATS = [
    {"messages": [{"role": "user", "content": f"What has {name}?"}, {"role": "assistant", "content": f"A {thing}."}]}
    for name in ("Ann", "Ben", "Cleo", "Dan", "Eve")
    for thing in THINGS
]
SHAPE = {"intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2, "max_position_embeddings": 64}
TRAIN = {
    "tokens_per_step": 256, "max_steps": 8, "eval_steps": 4, "logging_steps": 1, "save_total_limit": 9,
    "learning_rate": 5e-3, "device": "cpu", "precision": "float32", "sample_tokens": 2,
}  # fmt: skip


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with text, conversations and a trained teacher."""
    folder = tmp_path_factory.mktemp("distil")
    text = [f"{name} has a {thing} and takes it to the hill. " for name in ("Ann", "Ben", "Cleo") for thing in THINGS]
    documents = [f"{number}. {' '.join(text[number % 5 :][:6])}" for number in range(60)]
    (folder / "book.txt").write_text("\n<|endoftext|>\n".join(documents))
    (folder / "chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in CHATS))
    train_recipe(
        recipe(folder, "teacher", "pretrain", model=SHAPE | {"hidden_size": 48, "num_hidden_layers": 3}), Silent()
    )
    return folder


def recipe(folder: Path, name: str, objective: str = "distill", *more: str, **sections: dict) -> Recipe:
    content = {
        "objective": objective,
        "output_dir": str(folder / name),
        "model": SHAPE | {"hidden_size": 32},
        "tokenizer": {} if objective == "distill" else {"vocab_size": 300},
        "data": {"source": str(folder / "book.txt"), "validation_fraction": 0.1},
        "train": TRAIN,
        **({"distillation": {"teacher": str(folder / "teacher"), "top_k": 16}} if objective == "distill" else {}),
    }
    return load_settings(Recipe, content | sections, more)


def metrics(run: Path) -> list[dict]:
    return RunDirectory(run).metrics.comparable()


def weights(run: Path) -> dict[str, Tensor]:
    return load_file(run / "latest" / "model.safetensors")


def test_a_student_is_taught_and_keeps_nothing_of_its_teacher(here: Path) -> None:
    """It begins with the teacher's tokenizer; both parts of the loss are told; a checkpoint is the student alone."""
    train_recipe(recipe(here, "online"), Silent())
    lines = metrics(here / "online")
    for line in lines:
        mixed = 0.5 * line["cross_entropy"] + 0.5 * 9 * line["divergence"]
        assert line["loss"] == pytest.approx(mixed, rel=1e-5)
    assert lines[-1]["divergence"] < lines[0]["divergence"]
    assert lines[-1]["validation_loss"] < lines[3]["validation_loss"]
    decoder, config = load_decoder(here / "online" / "best")
    assert config.hidden_size == 32
    tokenizers = [SLMTokenizer.from_pretrained(here / run / "best") for run in ("online", "teacher")]
    assert tokenizers[0].fingerprint == tokenizers[1].fingerprint
    names = {
        name.rpartition("/")[0]
        for name in load_file(here / "online" / "latest" / "training_state" / "optimizer.safetensors")
    }
    assert names <= {name for name, _ in decoder.named_parameters()}
    assert "teacher: " in (here / "online" / "recipe.yaml").read_text()


@pytest.mark.parametrize("more", [[], ["distillation.hidden_weight=0.5", "distillation.divergence=js"], ["cache"]])
def test_a_run_that_was_cut_is_resumed_to_the_same_bits(here: Path, tmp_path: Path, more: list[str]) -> None:
    if more == ["cache"]:
        more = [f"distillation.cache={tmp_path / 'cache'}"]
        cache_teacher(recipe(here, "", "distill", *more), Silent())
    wanted = recipe(here, "", "distill", f"output_dir={tmp_path / 'run'}", "model.hidden_dropout=0.1", *more)
    train_recipe(wanted, Silent())
    whole, lines = weights(tmp_path / "run"), metrics(tmp_path / "run")
    assert ("hidden" in lines[0]) == ("distillation.hidden_weight=0.5" in more)
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step-000008")
    resume_run(tmp_path / "run", Silent())
    assert metrics(tmp_path / "run") == lines
    assert all(torch.equal(tensor, whole[name]) for name, tensor in weights(tmp_path / "run").items())
    replay = replay_run(tmp_path / "run", 7, Silent())
    assert replay.recorded is not None
    assert not replay.differences
    assert replay.broken is None


@pytest.mark.parametrize("reads", ["text", "conversations"])
def test_stored_with_all_tokens_a_teacher_teaches_what_it_teaches_online(
    here: Path, tmp_path: Path, reads: str
) -> None:
    data = {"source": str(here / ("book.txt" if reads == "text" else "chats.jsonl")), "validation_fraction": 0.2}
    more = [f"distillation.reads={reads}", "distillation.top_k=1000000", "distillation.temperature=2"]
    runs = {"online": more, "offline": [*more, f"distillation.cache={tmp_path / 'cache'}"]}
    for name, keys in runs.items():
        wanted = recipe(here, "", "distill", f"output_dir={tmp_path / name}", *keys, data=data)
        if name == "offline":
            told = Silent()
            stored = cache_teacher(wanted, told)
            assert stored.k == stored.tokens
            assert told.counted["teacher"] == (stored.rows, stored.rows)
        train_recipe(wanted, Silent())
    online, offline = (metrics(tmp_path / name) for name in runs)
    for theirs, ours in zip(online, offline, strict=True):
        assert ours["tokens"] == theirs["tokens"]
        for figure in ("loss", "cross_entropy", "divergence"):
            assert ours[figure] == pytest.approx(theirs[figure], rel=1e-3, abs=1e-5)


def test_a_cache_is_of_the_conversations_that_the_run_does_not_skip(here: Path, tmp_path: Path) -> None:
    asked, answered = CHATS[0]["messages"]
    long = [{"messages": [asked | {"content": asked["content"] * times}, answered]} for times in range(20, 30)]
    (tmp_path / "chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in [*CHATS, *long]))
    data = {"source": str(tmp_path / "chats.jsonl"), "validation_fraction": 0.2, "on_long_conversation": "skip"}
    more = ["distillation.reads=conversations", f"distillation.cache={tmp_path / 'cache'}", "train.max_steps=2"]
    wanted = recipe(here, "", "distill", f"output_dir={tmp_path / 'run'}", *more, data=data)
    cache_teacher(wanted, Silent())
    train_recipe(wanted, Silent())
    assert len(metrics(tmp_path / "run")) == 2
    assert 5 < sum(shards.header.documents for shards in open_corpus(tmp_path / "run" / "data").train) <= len(CHATS)


def test_a_cache_that_was_not_finished_or_is_of_something_else_is_refused(here: Path, tmp_path: Path) -> None:
    at = f"distillation.cache={tmp_path / 'cache'}"
    cache_teacher(recipe(here, "", "distill", at), Silent())
    complete = (tmp_path / "cache" / POSITIONS).read_bytes()
    for change, words in (
        (["distillation.temperature=1"], "temperature 3.0, not 1.0"),
        (["train.sequence_length=32"], "length 64, not 32"),
        (["distillation.top_k=8"], "k 16, not 8"),
        (["data.separate_documents=true"], "separate False, not True"),
        ([f"data.source={here / 'online'}/samples.md"], "data "),
    ):
        if change[0].startswith("data.source"):
            (tmp_path / "other.txt").write_text((here / "book.txt").read_text() * 2)
            change = [f"data.source={tmp_path / 'other.txt'}"]
        with pytest.raises(UserError, match="made for other data or settings") as caught:
            train_recipe(recipe(here, "", "distill", at, f"output_dir={tmp_path / 'run'}", *change), Silent())
        assert words in str(caught.value)
        assert not (tmp_path / "run").exists()
    lessons = json.loads((tmp_path / "cache" / HEADER).read_text())
    (tmp_path / "cache" / HEADER).rename(tmp_path / "cache" / PROGRESS)
    (tmp_path / "cache" / PROGRESS).write_text(json.dumps(lessons | {"done": 3}))
    with pytest.raises(UserError, match="was not finished"):
        train_recipe(recipe(here, "", "distill", at, f"output_dir={tmp_path / 'run'}"), Silent())
    cache_teacher(recipe(here, "", "distill", at), Silent())
    assert (tmp_path / "cache" / POSITIONS).read_bytes() == complete
    assert read_header(tmp_path / "cache").k == 16


def test_training_from_a_cache_needs_no_teacher_at_all(here: Path, tmp_path: Path) -> None:
    shutil.copytree(here / "teacher", tmp_path / "teacher", symlinks=True)
    at = f"distillation.cache={tmp_path / 'cache'}"
    cache_teacher(recipe(here, "", "distill", at, f"distillation.teacher={tmp_path / 'teacher'}"), Silent())
    shutil.rmtree(tmp_path / "teacher")
    train_recipe(
        recipe(here, "", "distill", at, "distillation.teacher=null", f"output_dir={tmp_path / 'run'}"), Silent()
    )
    assert metrics(tmp_path / "run")[-1]["divergence"] < metrics(tmp_path / "run")[0]["divergence"]


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["distillation.alpha=1.5"], "distillation.alpha"),
        (["distillation.divergence=kl"], "forward_kl"),
        (["distillation.reads=pairs"], "conversations"),
        (["distillation.teacher=null"], "no teacher"),
        (["distillation.tempreature=2"], "did you mean 'temperature'?"),
        (["distillation.cache=x", "distillation.hidden_weight=1"], "needs the teacher's hidden states"),
        (["distillation.cache=x", "data.streaming=true"], "numbered rows, which a stream"),
        (["objective=pretrain"], "needs a section `distillation`"),
        (["distillation=null"], "needs a section `distillation`"),
        (["model.max_position_embeddings=128"], "reads 64 tokens at most, rows have 128"),
        (["distillation.teacher=nowhere"], "no such directory"),
    ],
)
def test_what_does_not_fit_is_refused_in_one_line(here: Path, tmp_path: Path, more: list[str], words: str) -> None:
    with pytest.raises(UserError) as caught:
        train_recipe(recipe(here, "", "distill", f"output_dir={tmp_path / 'run'}", *more), Silent())
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_a_teacher_of_another_tokenizer_is_refused_with_both_named(here: Path, tmp_path: Path) -> None:
    other = SLMTokenizer(290)
    other.train(["Nothing of this is in the book, not one word of it."] * 5)
    other.save_pretrained(tmp_path / "tokenizer")
    more = (f"tokenizer.path={tmp_path / 'tokenizer'}", f"output_dir={tmp_path / 'run'}")
    with pytest.raises(UserError, match="is not that of the student") as caught:
        train_recipe(recipe(here, "", "distill", *more), Silent())
    assert other.fingerprint[:12] in str(caught.value)


def test_an_adapter_is_taught_from_a_cache_and_may_teach_itself(here: Path, tmp_path: Path) -> None:
    """The student is the teacher's own model with LoRA beside it; then that adapter is the teacher of a new student."""
    lora = {"model": {"path": str(here / "teacher")}, "lora": {"r": 2}}
    at = f"distillation.cache={tmp_path / 'cache'}"
    cache_teacher(recipe(here, "", "distill", at, **lora), Silent())
    train_recipe(recipe(here, "", "distill", at, f"output_dir={tmp_path / 'adapter'}", **lora), Silent())
    assert metrics(tmp_path / "adapter")[0]["divergence"] < 0.01  # it begins as its teacher
    more = [f"distillation.teacher={tmp_path / 'adapter'}", f"output_dir={tmp_path / 'run'}"]
    train_recipe(recipe(here, "", "distill", *more), Silent())
    again = [f"distillation.cache={tmp_path / 'of adapter'}", *more, f"output_dir={tmp_path / 'stored'}"]
    cache_teacher(recipe(here, "", "distill", *again), Silent())
    train_recipe(recipe(here, "", "distill", *again), Silent())
    online, offline = (metrics(tmp_path / run)[-1] for run in ("run", "stored"))
    assert offline["cross_entropy"] == pytest.approx(online["cross_entropy"], rel=0.05)


def run_on_ranks(folder: Path, root: Path) -> None:
    train_recipe(recipe(folder, "", "distill", f"output_dir={root}", "distillation.hidden_weight=0.2"), Silent())


def test_two_processes_are_taught_what_one_is(here: Path, tmp_path: Path) -> None:
    run_on_ranks(here, tmp_path / "one")
    on_ranks(2, run_on_ranks, here, tmp_path / "two")
    for ours, theirs in zip(metrics(tmp_path / "two"), metrics(tmp_path / "one"), strict=True):
        for name in ("loss", "cross_entropy", "divergence", "hidden", "grad_norm"):
            assert ours[name] == pytest.approx(theirs[name], rel=2e-4), name


# -- in a script ------------------------------------------------------------------------------------------------------

TEXTS = [f"{name} has a {thing}. " * 3 for name in ("Ann", "Ben", "Cleo") for thing in THINGS]


def trainer(
    folder: Path, teacher: SLMForCausalLM | None, loss: DistillationLoss | None = None, **fields: object
) -> SLMTrainer:
    tokenizer = SLMTokenizer(260)
    config = SLMConfig(vocab_size=260, hidden_size=32, warmup_steps=2, learning_rate=5e-3, **SHAPE, **fields)
    torch.manual_seed(1)
    return SLMTrainer(
        config=config, model=SLMForCausalLM(config), tokenizer=tokenizer, device="cpu", output_dir=str(folder / "run"),
        train_dataset=TextDataset(TEXTS, tokenizer, max_length=32), teacher_model=teacher, distillation_loss=loss,
    )  # fmt: skip


def scripted_teacher(vocab_size: int = 264) -> SLMForCausalLM:
    torch.manual_seed(2)
    return SLMForCausalLM(SLMConfig(vocab_size=vocab_size, hidden_size=48, initializer_range=0.3, **SHAPE))


class Labels(DistillationLoss):
    """Only the labels, whatever the teacher says."""

    def forward(self, student_logits: Tensor, teacher_logits: Tensor, labels: Tensor) -> Tensor:
        return torch.nn.functional.cross_entropy(student_logits.flatten(0, -2), labels.flatten(), reduction="sum")


def test_a_script_gives_the_trainer_a_teacher(tmp_path: Path) -> None:
    teacher = scripted_teacher()
    before = {name: tensor.clone() for name, tensor in teacher.state_dict().items()}
    taught = trainer(tmp_path, teacher, distillation_alpha=0.25, distillation_temperature=2.0).train(max_steps=6)
    mixed = 0.25 * taught["cross_entropy"] + 0.75 * 4 * taught["divergence"]
    assert taught["loss"] == pytest.approx(mixed, rel=1e-5)
    assert all(torch.equal(tensor, before[name]) for name, tensor in teacher.state_dict().items())
    assert "distillation_alpha" not in (tmp_path / "run" / "latest" / "config.json").read_text()
    assert "teacher: given in a script" in (tmp_path / "run" / "recipe.yaml").read_text()


def test_a_loss_of_ones_own_is_what_is_minimised(tmp_path: Path) -> None:
    own = trainer(tmp_path, scripted_teacher(), Labels()).train(max_steps=4)
    plain = trainer(tmp_path, scripted_teacher(), use_distillation=False).train(max_steps=4)
    assert own["loss"] == pytest.approx(plain["loss"], rel=1e-4)
    assert own["cross_entropy"] == pytest.approx(own["loss"], rel=1e-4)
    assert "divergence" not in plain


def test_a_script_is_refused_what_cannot_be(tmp_path: Path) -> None:
    for teacher, fields, words in (
        (None, {"use_distillation": True}, "give the trainer a teacher_model"),
        (scripted_teacher(259), {}, "a vocabulary of 259 for a tokenizer of 260"),
    ):
        with pytest.raises(UserError, match=words):
            trainer(tmp_path, teacher, **fields)
