"""`SLMTrainer` with data sets, optimizers, losses and callbacks of a script's own."""

from __future__ import annotations

import contextlib
import inspect
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import Dataset, IterableDataset

from slmkit import (
    DistillationLoss,
    SLMConfig,
    SLMEnsemble,
    SLMForCausalLM,
    SLMTokenizer,
    SLMTrainer,
    TextDataset,
    UserError,
)
from slmkit.api.callbacks import Callback
from slmkit.data.batch import Batch
from slmkit.training.logging.list_runs import list_runs
from slmkit.training.loop import Report, RunStopped, State
from slmkit.workflows.context import SILENCE
from slmkit.workflows.train import resume_run

pytestmark = pytest.mark.usefixtures("without_plan_and_pictures")

TOKENIZER = SLMTokenizer(vocab_size=260)
CONFIG = SLMConfig(
    vocab_size=280, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
    max_position_embeddings=32, batch_size=3, learning_rate=1e-2, warmup_steps=0,
)  # fmt: skip


def item(index: int) -> dict[str, Any]:
    """Of 8 to 12 tokens, in every form that a data set may give."""
    ids = [10 + (index + place) % 40 for place in range(8 + index % 5)]
    labels = [-100, -100, *ids[2:]]
    if index % 4 == 1:
        return {"input_ids": np.array(ids, dtype=np.int32), "labels": np.array(labels)}
    if index % 4 == 2:
        return {"input_ids": torch.tensor(ids), "labels": torch.tensor(labels)}
    if index % 4 == 3:  # padded by somebody else, on the left
        pad = [0, 0, 0]
        return {"input_ids": pad + ids, "labels": [-100] * 3 + labels, "attention_mask": [0] * 3 + [1] * len(ids)}
    return {"input_ids": ids, "labels": labels, "idx": index}


class Numbered(Dataset):
    def __len__(self) -> int:
        return 12

    def __getitem__(self, index: int) -> dict[str, Any]:
        return item(index)


class InOrder(IterableDataset):
    def __iter__(self) -> Iterator[dict[str, Any]]:
        return map(item, range(12))


IDS = torch.tensor([[5, 6, 7]])
DATASETS = {"map-style": Numbered(), "iterable": InOrder(), "list": [item(i) for i in range(12)]}


def fresh() -> SLMForCausalLM:
    torch.manual_seed(0)
    return SLMForCausalLM(CONFIG)


def trainer(folder: Path, dataset: Any = DATASETS["list"], model: SLMForCausalLM | None = None, **more: Any) -> Any:
    return SLMTrainer(
        CONFIG, model or fresh(), TOKENIZER, dataset, output_dir=str(folder / "run"), device="cpu", **more
    )


@pytest.mark.parametrize("name", DATASETS)
def test_any_torch_data_set_is_trained_on_and_evaluated(name: str, tmp_path: Path) -> None:
    one = trainer(tmp_path, DATASETS[name], eval_dataset=DATASETS[name])
    figures = one.train(max_steps=12)
    assert figures["step"] == 12
    model, nats, count = one.model, 0.0, 0
    for index in range(12):
        row = {key: torch.as_tensor(np.asarray(value))[None] for key, value in item(index).items() if key != "idx"}
        learned = int((row["labels"] != -100).sum())
        with torch.no_grad():
            nats += model(**row).loss.item() * learned
        count += learned
    assert figures["validation_loss"] == pytest.approx(nats / count, abs=1e-4)
    assert figures["validation_loss"] < 5
    assert [run.state for run in list_runs(tmp_path)] == ["finished"]


def test_padding_changes_no_update(tmp_path: Path) -> None:
    """A step over rows of unlike length is the mean over all learned tokens of plain, unpadded rows."""
    rows = [item(i) for i in range(3)]
    model = fresh()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    trainer(tmp_path, rows, model, optimizers=(optimizer, None)).train(max_steps=1)
    plain = fresh()
    losses = [
        plain(
            torch.as_tensor(row["input_ids"])[None], labels=torch.as_tensor(row["labels"])[None], num_items_in_batch=1
        )
        for row in rows
    ]
    count = sum(int((np.asarray(row["labels"]) != -100).sum()) for row in rows)
    (sum(output.loss for output in losses) / count).backward()
    torch.nn.utils.clip_grad_norm_(plain.parameters(), 1.0)
    torch.optim.SGD(plain.parameters(), lr=0.1).step()
    torch.testing.assert_close(model.state_dict(), plain.state_dict(), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"text": "a"}, "item 0 of the data set: expected a dict with input_ids .*found text"),
        ("text", "expected a dict with input_ids .*found text"),
        ({"input_ids": [1, 2, 3], "labels": [1, 2]}, r"of one length; found input_ids int64 \[3\], labels \[2\]"),
        ({"input_ids": [[1, 2, 3]]}, r"one row of whole numbers each.*\[1, 3\]"),
        ({"input_ids": [0.5, 1.5]}, "whole numbers each.*float64"),
        ({"input_ids": [1, 2, 999]}, "token 999 is not among the model's 280"),
        ({"input_ids": [1, 2, 3], "labels": [1, -1, 3]}, "label -1 is not among"),
        ({"input_ids": [1] * 40}, "40 tokens are longer than 32"),
        ({"input_ids": [1, 2, 3], "attention_mask": [1, 0, 1]}, "zeros between ones"),
    ],
)
def test_an_item_that_is_no_row_is_one_line(wrong: Any, words: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=words) as error:
        trainer(tmp_path, [wrong] * 3).train(max_steps=1)
    assert "\n" not in str(error.value)


def test_data_sets_of_nothing_are_refused(tmp_path: Path) -> None:
    for wrong, words in (([], "no items"), (iter([]), "no items"), (7, "__getitem__ and __len__, or __iter__")):
        with pytest.raises(UserError, match=words):
            trainer(tmp_path, wrong).train(max_steps=1)
    with pytest.raises(UserError, match="max_steps"):
        trainer(tmp_path, InOrder()).train(num_epochs=2)
    for wrong in ([], iter([])):
        with pytest.raises(UserError, match="^eval_dataset has no items"):
            trainer(tmp_path, eval_dataset=wrong)


def test_a_config_that_does_not_fit_the_weights_is_refused(tmp_path: Path) -> None:
    model = fresh()
    model.config = CONFIG.model_copy(update={"hidden_size": 8, "rms_norm_eps": 1.0, "learning_rate": 7.0})
    with pytest.raises(UserError, match="differ in hidden_size 16 and 8, rms_norm_eps 1e-05 and 1.0: give .*model.con"):
        trainer(tmp_path, model=model)
    model.config = CONFIG.model_copy(update={"learning_rate": 7.0, "batch_size": 1, "generation_config": {"top_k": 2}})
    trainer(tmp_path, model=model)


class Watch(Callback):
    def __init__(self) -> None:
        self.seen: list[Any] = []

    def on_step(self, state: State, report: Report) -> None:
        self.seen.append(("step", report["step"], report["learning_rate"]))

    def on_evaluation(self, state: State, report: Report) -> None:
        self.seen.append(("evaluation", report["step"], report["validation_loss"]))

    def on_save(self, state: State, directory: Path) -> bool:
        assert (directory / "MANIFEST.json").is_file()
        self.seen.append(("save", state.step, directory.name))
        return state.step == 6


def test_callbacks_are_called_at_their_moments_and_may_stop_the_run(tmp_path: Path) -> None:
    watch = Watch()
    figures = trainer(tmp_path, eval_dataset=DATASETS["list"], callbacks=[watch]).train(max_steps=20)
    assert [entry[1] for entry in watch.seen if entry[0] == "step"] == [1, 2, 3, 4, 5, 6]
    assert [entry[1] for entry in watch.seen if entry[0] == "evaluation"] == [2, 4, 6]
    assert [entry[1:] for entry in watch.seen if entry[0] == "save"] == [
        (step, f"step-{step:06}") for step in (2, 4, 6)
    ]
    assert figures["step"] == 6
    assert [run.state for run in list_runs(tmp_path)] == ["stopped"]


def test_a_function_that_stops_the_run_leaves_a_checkpoint_and_the_run_goes_on_as_if_unbroken(tmp_path: Path) -> None:
    whole = trainer(tmp_path / "whole")
    whole.train(max_steps=10)
    trainer(tmp_path, callbacks=[lambda state, report: report["step"] == 4]).train(max_steps=10)
    assert (tmp_path / "run" / "latest").resolve().name == "step-000004"
    again = trainer(tmp_path)
    assert again.train(max_steps=10, resume_from_checkpoint=True)["step"] == 10
    for name, tensor in whole.model.state_dict().items():
        assert torch.equal(tensor, again.model.state_dict()[name]), name
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run", "whole"]
    finished = trainer(tmp_path).train(max_steps=10, resume_from_checkpoint=str(tmp_path / "run"))
    assert finished["step"] == 10
    with pytest.raises(UserError, match=r"given in a script: go on there, with SLMTrainer\(…\).train\(resume_from"):
        resume_run(tmp_path / "run", SILENCE)
    with pytest.raises(UserError, match="no run to resume"):
        trainer(tmp_path).train(max_steps=10, resume_from_checkpoint=str(tmp_path / "none"))


def test_a_signal_names_the_way_on_in_a_script(tmp_path: Path) -> None:
    calls = [lambda state, report: report["step"] == 2 and os.kill(os.getpid(), signal.SIGTERM)]
    with pytest.raises(
        RunStopped, match=r"^stopped after step \d of 9; go on with: SLMTrainer\(…\)\.train\(resume_fro"
    ):
        trainer(tmp_path, callbacks=calls).train(max_steps=9)
    assert trainer(tmp_path).train(max_steps=9, resume_from_checkpoint=str(tmp_path / "run"))["step"] == 9


def test_an_optimizer_and_its_scheduler_set_the_rates_also_after_a_stop(tmp_path: Path) -> None:
    def optimizers(model: SLMForCausalLM) -> tuple[Any, Any]:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9)
        return optimizer, torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)

    rates: list[float] = []
    for stop in (3, 0):
        model = fresh()
        calls = [lambda state, report: rates.append(report["learning_rate"]), lambda s, r, stop=stop: r["step"] == stop]
        trainer(tmp_path, None or DATASETS["list"], model, optimizers=optimizers(model), callbacks=calls).train(
            max_steps=6, resume_from_checkpoint=not stop
        )
    assert rates == pytest.approx([0.5 * 0.5**n for n in range(6)])
    whole = fresh()
    trainer(tmp_path / "whole", DATASETS["list"], whole, optimizers=optimizers(whole)).train(max_steps=6)
    torch.testing.assert_close(model.state_dict(), whole.state_dict(), atol=0, rtol=0)


def test_optimizers_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    model, other = fresh(), fresh()
    plateau = torch.optim.SGD(model.parameters(), lr=1)
    cases: list[tuple[Any, str]] = [
        ((torch.optim.SGD(other.parameters(), lr=1), None), "parameters of another model"),
        ((torch.optim.SGD([next(model.parameters())], lr=1), None), "leaves out .* parameters, such as"),
        ((None, torch.optim.lr_scheduler.ExponentialLR(plateau, 0.5)), "a scheduler without its optimizer"),
        (("adam", None), "found text first"),
        (plateau, r"expected a pair \(optimizer, scheduler or None\), found SGD"),
        ((plateau,), "expected a pair"),
        ((torch.optim.LBFGS(model.parameters()), None), "LBFGS computes the loss again .*: take one"),
    ]
    for optimizers, words in cases:
        with pytest.raises(UserError, match=words):
            trainer(tmp_path, model=model, optimizers=optimizers)
    scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(plateau)
    with pytest.raises(UserError, match="ReduceLROnPlateau needs the loss"):
        trainer(tmp_path, model=model, optimizers=(plateau, scheduler)).train(max_steps=1)


def test_a_loss_of_ones_own_is_normalised_by_the_trained_tokens(tmp_path: Path) -> None:
    built_in = trainer(tmp_path / "built-in")
    expected = built_in.train(max_steps=5)
    model = fresh()

    def loss(hidden: Tensor, batch: Batch) -> Tensor:
        learned = batch.labels != -100
        assert hidden.shape == (*batch.ids.shape, CONFIG.hidden_size)
        logits = model.decoder.logits(hidden[learned]).float()
        return F.cross_entropy(logits, batch.labels[learned], reduction="sum")

    assert trainer(tmp_path, model=model, loss=loss).train(max_steps=5)["loss"] == pytest.approx(expected["loss"])
    torch.testing.assert_close(model.state_dict(), built_in.model.state_dict(), atol=1e-5, rtol=1e-4)
    for wrong in (
        lambda hidden, batch: 3.0,
        lambda hidden, batch: hidden.sum(-1),
        lambda hidden, batch: torch.ones(()),
    ):
        with pytest.raises(UserError, match="expected a tensor of one number with a gradient"):
            trainer(tmp_path, loss=wrong).train(max_steps=1)


def test_a_short_run_warms_up_for_a_tenth_unless_the_config_says_otherwise(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = SLMConfig(**(CONFIG.model_dump(include={"vocab_size", "hidden_size", "max_position_embeddings"}) | {
        "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "batch_size": 3,
    }))  # fmt: skip
    rates: list[float] = []
    watch = [lambda state, report: rates.append(report["learning_rate"])]
    for changes in ({}, {"warmup_steps": 100}):
        changed = config.model_copy(update=changes)
        changed.model_fields_set.update(changes)
        SLMTrainer(changed, SLMForCausalLM(changed), TOKENIZER, DATASETS["list"], callbacks=watch, device="cpu",
                   output_dir=str(tmp_path / "run")).train(max_steps=10)  # fmt: skip
    assert max(rates[:10]) == config.learning_rate
    assert max(rates[10:]) < config.learning_rate / 5
    assert "warmup_steps 100: the learning rate rises through all 10 steps" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("call", "line"),
    [
        (lambda: trainer(Path("nowhere")).train(num_epochs=1, max_step=3), "SLMTrainer.train: .*'max_steps'"),
        (lambda: fresh()(IDS, lables=IDS), "SLMForCausalLM: .*'labels'"),
        (lambda: fresh().generate(IDS, max_new_token=3), "SLMForCausalLM.generate: .*'max_new_tokens'"),
        (lambda: SLMForCausalLM.from_pretrained("x", devise="cpu"), "SLMForCausalLM.from_pretrained: .*'device'"),
        (lambda: fresh().save_pretrained(directry="x"), "SLMForCausalLM.save_pretrained: .*'directory'"),
        (lambda: SLMEnsemble([fresh()], weight=[1]), "SLMEnsemble: .*'weights'"),
        (lambda: SLMTokenizer(vocab_sise=300), "SLMTokenizer: .*'vocab_size'"),
        (lambda: TOKENIZER("text", paddin=True), "SLMTokenizer: .*'padding'"),
        (lambda: TOKENIZER.encode("text", allow_specials=True), "SLMTokenizer.encode: .*'allow_special'"),
        (lambda: DistillationLoss(alfa=0.5), "DistillationLoss: .*'alpha'"),
    ],
    ids=["train", "forward", "generate", "read", "save", "ensemble", "tokenizer", "call", "encode", "loss"],
)
def test_a_misspelt_argument_of_any_method_names_the_right_one(call: Callable[[], Any], line: str) -> None:
    with pytest.raises(UserError, match=rf"^{line}\?$"):
        call()
    known = list(inspect.signature(SLMForCausalLM.forward).parameters)  # what transformers.Trainer looks at
    assert known == ["self", "input_ids", "attention_mask", "labels", "num_items_in_batch"]


def test_wrong_arguments_and_callbacks_are_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^SLMTrainer: unknown argument 'train_data'; did you mean 'train_dataset'\?$"):
        SLMTrainer(CONFIG, fresh(), TOKENIZER, train_data=[])
    with pytest.raises(UserError, match=r"^TextDataset: unknown argument 'max_len'; did you mean 'max_length'\?$"):
        TextDataset(["a text"], TOKENIZER, max_len=8)
    with pytest.raises(UserError, match="expected a list of texts, found one string"):
        TextDataset("a text", TOKENIZER, max_length=8)
    with pytest.raises(UserError, match="text 1 is nothing; expected text"):
        TextDataset(["a text", None], TOKENIZER, max_length=8)
    for wrong in ([7], [Watch], [object()]):
        with pytest.raises(UserError, match="neither a function nor an object with on_step"):
            trainer(tmp_path, callbacks=wrong)
    for wrong in (Watch(), lambda state, report: None):
        with pytest.raises(
            UserError, match=r"^callbacks: expected a list, found .*: put it into one, callbacks=\[…\]$"
        ):
            trainer(tmp_path, callbacks=wrong)
    transformers = pytest.importorskip("transformers")
    with pytest.raises(UserError, match=r"^callbacks: on_save of TrainerCallback does not take \(state, directory\)"):
        trainer(tmp_path, callbacks=[transformers.TrainerCallback()])
    with pytest.raises(UserError, match=r"^callbacks: the function <lambda> does not take \(state, report\)"):
        trainer(tmp_path, callbacks=[lambda state: None])
    for name in ("config", "model", "tokenizer", "lora", "teacher_model"):
        values = {"config": CONFIG, "model": fresh(), "tokenizer": TOKENIZER, "train_dataset": DATASETS["list"]}
        with pytest.raises(UserError, match=f"^{name}: expected a .*, found a whole number$"):
            SLMTrainer(**{**values, name: 3})
    with contextlib.suppress(UserError):
        SLMConfig(hiden_size=3)
    for name in SLMConfig.model_fields:
        with pytest.raises(UserError, match=rf"^SLMConfig: unknown key '{name}_'; did you mean '{name}'\?$"):
            SLMConfig(**{f"{name}_": 1})
        with pytest.raises(UserError) as error:
            SLMConfig(**{name: object()})
        assert "\n" not in str(error.value)
        assert "http" not in str(error.value)
    config = SLMConfig()
    with pytest.raises(UserError, match="^SLMConfig: unknown key 'learning_rat'; did you mean 'learning_rate'"):
        config.learning_rat = 1
    with pytest.raises(UserError, match="^SLMConfig: learning_rate: expected more than 0.*, found -1"):
        config.learning_rate = -1
