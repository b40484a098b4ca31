"""The loss of answers labelled good or bad is the paper's and trl's, however a step is split."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from slmkit.data.batch import Batch
from slmkit.data.prepare.conversations import prepare_chat
from slmkit.data.rows.answers import JudgedRows
from slmkit.data.sources import Judged
from slmkit.model.files.directory import save_decoder
from slmkit.model.initialization import build_decoder
from slmkit.training.distributed import ALONE
from slmkit.training.loop import State, compute_gradients
from slmkit.training.objective import surveyed
from slmkit.training.objectives.preference import Kto, reference_log_probabilities
from slmkit.training.recipe.objective_settings import KtoSettings
from tests.training.helpers import TOKENIZER, plan
from tests.training.objectives.test_preference import CONFIG, LENGTH

ANSWERS = [("Yes, of course.", True), ("No.", False), ("Ann.", True), ("It is nobody.", False), ("A kite", True)]
DEVICE = plan(1).device
POLICY = 23  # a seed whose model is some way from the reference, so that the divergence is above nought


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> JudgedRows:
    judgements = [
        Judged([{"role": "user", "content": f"What is {n}?"}, {"role": "assistant", "content": answer}], label)
        for n, (answer, label) in enumerate(ANSWERS)
    ]
    rows = JudgedRows(prepare_chat(judgements, TOKENIZER, tmp_path_factory.mktemp("judged") / "shards"), LENGTH)
    rows.reference = reference_log_probabilities(build_decoder(CONFIG, 1), rows, DEVICE, 2, lambda rows, tokens: None)
    return rows


def loss_of(settings: KtoSettings, batch: Batch) -> tuple[float, dict[str, float]]:
    """Mean loss and figures of a step, as the loop takes them."""
    model = build_decoder(CONFIG, POLICY).train()
    state = State(model, [])
    found = compute_gradients(state, Kto(settings), batch, plan(1, rows_per_micro_batch=len(batch.ids)))
    return found.loss, found.figures


@pytest.mark.parametrize("name", ["kto", "apo_zero_unpaired"])
def test_the_loss_is_that_of_trl(name: str, rows: JudgedRows, tmp_path: Path) -> None:
    pytest.importorskip("trl")
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import KTOConfig, KTOTrainer

    for seed, side in ((POLICY, "policy"), (1, "reference")):
        save_decoder(build_decoder(CONFIG, seed), CONFIG, tmp_path / side)
        TOKENIZER.save_pretrained(tmp_path / side)
    settings = KtoSettings(loss=name, beta=0.3, desirable_weight=1.5, undesirable_weight=0.7)
    arguments = KTOConfig(
        output_dir=str(tmp_path), loss_type=name, beta=0.3, desirable_weight=1.5, undesirable_weight=0.7,
        max_length=LENGTH, report_to=[], use_cpu=True, bf16=False, gradient_checkpointing=False,
    )  # fmt: skip
    model, reference = (AutoModelForCausalLM.from_pretrained(tmp_path / side) for side in ("policy", "reference"))
    example = {
        "prompt": [{"role": "user", "content": "?"}], "completion": [{"role": "assistant", "content": "a"}],
    }  # fmt: skip
    trainer = KTOTrainer(
        model=model, ref_model=reference, args=arguments,
        processing_class=AutoTokenizer.from_pretrained(tmp_path / "policy"),
        train_dataset=Dataset.from_list([example | {"label": n % 2 == 0} for n in range(8)]),
    )  # fmt: skip
    batch = rows.batch(range(len(ANSWERS)))
    inputs = {"label": batch.extra["desirable"]}
    sides = {"": (batch.ids, batch.labels), "KL_": (batch.extra["other_ids"], batch.extra["other_labels"])}
    for prefix, (ids, labels) in sides.items():
        answered = torch.zeros_like(ids)
        answered[:, 1:] = (labels != -100)[:, :-1]  # they mark tokens, and we the positions before them
        inputs |= {f"{prefix}input_ids": ids, f"{prefix}completion_mask": answered}
        inputs[f"{prefix}attention_mask"] = torch.ones_like(ids)
    expected = trainer.compute_loss(trainer.model, inputs).item()
    loss, figures = loss_of(settings, batch)
    assert loss == pytest.approx(expected, abs=1e-5)
    theirs = {key: values[-1] for key, values in trainer._metrics["eval"].items()}
    assert figures["rewards/chosen"] == pytest.approx(theirs["rewards/chosen"], abs=1e-4)
    assert figures["rewards/rejected"] == pytest.approx(theirs["rewards/rejected"], abs=1e-4)
    assert figures["divergence"] == pytest.approx(theirs["kl"], abs=1e-4)
    if name == "kto":
        assert theirs["kl"] > 0.1, "the divergence has to play a part in what is compared"
    assert figures["desirable"] == 3 / 5


@pytest.mark.parametrize("name", ["kto", "apo_zero_unpaired"])
def test_a_step_is_the_same_however_it_is_split(name: str, rows: JudgedRows) -> None:
    """The divergence is of the whole step, and not of a micro-batch."""
    batch, found, gradients = rows.batch(range(len(ANSWERS))), [], []
    for size in (5, 1, 3):
        model = build_decoder(CONFIG, POLICY).train()
        found.append(compute_gradients(State(model, []), Kto(KtoSettings(loss=name)), batch, plan(1, size)))
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    for other, gradient in zip(found[1:], gradients[1:]):
        assert other.loss == pytest.approx(found[0].loss, rel=1e-5)
        assert other.figures == pytest.approx(found[0].figures, rel=1e-4, abs=1e-5)
        assert torch.allclose(gradient, gradients[0], atol=1e-6)


def test_the_divergence_is_never_below_nought_and_has_no_dropout(rows: JudgedRows) -> None:
    batch = rows.batch(range(len(ANSWERS)))
    reference = batch.extra["reference"].clone()
    reference[:, 1] += 1e4  # the model is less likely to say what others were answered than the reference
    assert loss_of(KtoSettings(), batch.with_extra(reference=reference))[1]["divergence"] == 0
    dropping = build_decoder(CONFIG.model_copy(update={"hidden_dropout": 0.5}), 0).train()
    means = [surveyed(Kto(KtoSettings()), dropping, [batch], DEVICE, ALONE)[0].extra["mean_of_step"] for _ in range(2)]
    assert means[0].unique().numel() == 1
    assert (means[0] == means[1]).all()
    assert dropping.training


def test_good_answers_become_likelier_and_bad_ones_less_so(rows: JudgedRows) -> None:
    model = build_decoder(CONFIG, 1).train()  # the reference itself
    batch, optimizer = rows.batch(range(len(ANSWERS))), torch.optim.SGD(model.parameters(), lr=0.5)
    learner = State(model, [])
    before = compute_gradients(learner, Kto(KtoSettings()), batch, plan(1))
    assert before.loss == pytest.approx(0.5, abs=1e-5)  # of every row, since every reward is 0
    for _ in range(5):
        optimizer.step()
        after = compute_gradients(learner, Kto(KtoSettings()), batch, plan(1))
    assert after.figures["rewards/chosen"] > before.figures["rewards/chosen"] + 0.01
    assert after.figures["rewards/rejected"] < before.figures["rewards/rejected"] - 0.01
    assert after.loss < before.loss


def test_weights_are_those_of_the_two_kinds(rows: JudgedRows) -> None:
    batch = rows.batch(range(len(ANSWERS)))
    plain, good, bad = (
        loss_of(KtoSettings(**weights), batch)[0]
        for weights in ({}, {"desirable_weight": 2.0}, {"undesirable_weight": 2.0})
    )
    assert (good - plain) + (bad - plain) == pytest.approx(plain, abs=1e-5)
    only_good = rows.batch([0, 2, 4])
    assert loss_of(KtoSettings(undesirable_weight=9.0), only_good) == loss_of(KtoSettings(), only_good)
    assert "rewards/rejected" not in loss_of(KtoSettings(), only_good)[1]


def test_a_row_of_which_nothing_is_learned_does_not_count(rows: JudgedRows) -> None:
    objective, batch = Kto(KtoSettings()), rows.batch([0, 1, 2])
    assert objective.weight(batch) == 3
    assert objective.weight(batch.untrained()) == 0
    model = build_decoder(CONFIG, POLICY)
    alone = surveyed(objective, model, [batch], DEVICE, ALONE)
    beside = surveyed(objective, model, [batch, batch.untrained()], DEVICE, ALONE)
    assert (alone[0].extra["mean_of_step"] == beside[0].extra["mean_of_step"]).all()
    assert objective(model, beside[1]).total.item() == 0


def test_the_reference_does_not_depend_on_who_stands_beside_a_row(rows: JudgedRows) -> None:
    alone = reference_log_probabilities(build_decoder(CONFIG, 1), rows, DEVICE, 1, lambda rows, tokens: None)
    np.testing.assert_allclose(alone, rows.reference, atol=1e-4)
