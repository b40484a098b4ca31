"""Losses of pairs are those of the papers, of trl and of transformers' logits, however a step is split."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from slmkit.data.batch import Batch
from slmkit.data.prepare.conversations import prepare_chat
from slmkit.data.rows.answers import PairRows
from slmkit.data.sources.formats import pair_of
from slmkit.model.config import SLMConfig
from slmkit.model.decoder import Decoder
from slmkit.model.files.directory import save_decoder
from slmkit.model.initialization import build_decoder
from slmkit.training.objectives.preference import Preference, PreferenceSettings, reference_log_probabilities
from tests.training.helpers import TOKENIZER, plan

CONFIG = SLMConfig(
    vocab_size=260, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
    max_position_embeddings=96, initializer_range=0.2,
)  # fmt: skip
ANSWERS = [("Yes, of course.", "No."), ("Ann.", "It is nobody at all."), ("A kite", "A drum"), ("Up!", "Down the hill")]
LENGTH = 96


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> PairRows:
    def talk(number: int, answer: str) -> list[dict[str, str]]:
        before = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello!"}] * (number % 2)
        return [*before, {"role": "user", "content": "What?"}, {"role": "assistant", "content": answer}]

    pairs = [pair_of(talk(i, better), talk(i, worse)) for i, (better, worse) in enumerate(ANSWERS)]
    rows = PairRows(prepare_chat(pairs, TOKENIZER, tmp_path_factory.mktemp("pairs") / "shards"), LENGTH)
    reference = build_decoder(CONFIG, seed=1)
    rows.reference = reference_log_probabilities(reference, rows, plan(1).device, 3, lambda pairs, tokens: None)
    return rows


def policy() -> Decoder:
    return build_decoder(CONFIG, seed=0).train()


def log_probabilities(model: Any, batch: Batch) -> tuple[Tensor, Tensor]:
    """Sums over each answer, and its length, straight from the logits of a transformers model: [pairs, 2] each."""
    logits = model(batch.ids.flatten(0, 1)).logits.log_softmax(-1)
    labels = batch.labels.flatten(0, 1)
    learned = labels != -100
    each = logits.gather(-1, labels.clamp(min=0)[..., None])[..., 0] * learned
    return each.sum(1).unflatten(0, (-1, 2)), learned.sum(1).unflatten(0, (-1, 2))


def published(name: str, beta: float, sums: Tensor, lengths: Tensor, reference: Tensor, gamma: float) -> float:
    """The formulas as the papers have them, written out pair by pair."""
    total = 0.0
    for p, n, r in zip(sums.tolist(), lengths.tolist(), reference.tolist()):
        chosen, rejected = (
            {"dpo": p[i] - r[i], "dpo_norm": (p[i] - r[i]) / n[i], "simpo": p[i] / n[i]}[name] for i in (0, 1)
        )
        margin = beta * (chosen - rejected) - (gamma if name == "simpo" else 0)
        total += math.log1p(math.exp(-margin))
    return total


@pytest.fixture(scope="module")
def theirs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The policy and the reference as transformers reads them."""
    root = tmp_path_factory.mktemp("models")
    for seed, name in enumerate(("policy", "reference")):
        save_decoder(build_decoder(CONFIG, seed), CONFIG, root / name)
        TOKENIZER.save_pretrained(root / name)
    return root / "policy", root / "reference"


@pytest.mark.parametrize(("name", "beta"), [("dpo", 0.1), ("dpo_norm", 5.0), ("simpo", 2.0)])
def test_the_loss_is_the_papers_over_the_logits_of_transformers(
    name: str, beta: float, rows: PairRows, theirs: tuple[Path, Path]
) -> None:
    from transformers import AutoModelForCausalLM

    batch = rows.batch(range(len(ANSWERS)))
    model, reference = (AutoModelForCausalLM.from_pretrained(path).eval() for path in theirs)
    with torch.no_grad():
        sums, lengths = log_probabilities(model, batch)
        of_reference, _ = log_probabilities(reference, batch)
    expected = published(name, beta, sums, lengths, of_reference, gamma=0.5)
    loss = Preference(PreferenceSettings(loss=name))(policy(), batch)
    assert loss.total.item() == pytest.approx(expected, abs=1e-4)
    assert loss.figures["log_probability/chosen"].item() == pytest.approx(sums[:, 0].sum().item(), abs=1e-3)


@pytest.mark.parametrize(("name", "theirs_name"), [("dpo", "sigmoid"), ("dpo_norm", "sigmoid_norm")])
def test_the_loss_is_that_of_trl(
    name: str, theirs_name: str, rows: PairRows, theirs: tuple[Path, Path], tmp_path: Path
) -> None:
    pytest.importorskip("trl")
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import DPOConfig, DPOTrainer

    settings = PreferenceSettings(loss=name)
    arguments = DPOConfig(
        output_dir=str(tmp_path), loss_type=theirs_name, beta=settings.strength, max_length=LENGTH,
        report_to=[], use_cpu=True, bf16=False, gradient_checkpointing=False,
    )  # fmt: skip
    model, reference = (AutoModelForCausalLM.from_pretrained(path) for path in theirs)
    say = [{"role": "user", "content": "?"}], [{"role": "assistant", "content": "a"}]
    trainer = DPOTrainer(
        model=model, ref_model=reference, args=arguments, processing_class=AutoTokenizer.from_pretrained(theirs[0]),
        train_dataset=Dataset.from_list([{"prompt": say[0], "chosen": say[1], "rejected": say[1]}]),
    )  # fmt: skip
    batch = rows.batch(range(len(ANSWERS)))
    ids, labels = (tensor.transpose(0, 1).flatten(0, 1) for tensor in (batch.ids, batch.labels))  # better ones first
    answered = torch.zeros_like(ids)
    answered[:, 1:] = (labels != -100)[:, :-1]  # they mark tokens, and we the positions before them
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "completion_mask": answered}
    expected = trainer.compute_loss(trainer.model, inputs).item()
    loss = Preference(settings)(policy(), batch)
    assert loss.total.item() / len(ANSWERS) == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("name", ["dpo", "dpo_norm", "simpo"])
def test_a_step_is_the_same_however_it_is_split(name: str, rows: PairRows) -> None:
    objective, batch = Preference(PreferenceSettings(loss=name)), rows.batch(range(len(ANSWERS)))
    gradients, totals, figures = [], [], []
    for size in (4, 1, 3):
        model = policy()
        losses = [objective(model, part) for part in (*batch.split(size), batch.untrained())]
        total = torch.stack([loss.total for loss in losses]).sum()
        total.backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
        totals.append(total.item())
        figures.append({key: sum(loss.figures[key].item() for loss in losses) for key in losses[0].figures})
    assert totals[1:] == pytest.approx(totals[:1] * 2, rel=1e-5)
    assert figures[1] == pytest.approx(figures[0], rel=1e-4, abs=1e-4)
    for gradient in gradients[1:]:
        assert torch.allclose(gradient, gradients[0], atol=1e-5)


def test_the_mean_is_over_pairs(rows: PairRows) -> None:
    objective, batch = Preference(PreferenceSettings()), rows.batch([0, 1, 2])
    assert objective.weight(batch) == 3
    assert objective.weight(batch.untrained()) == 0
    assert objective(policy(), batch.untrained()).total.item() == 0


def test_the_better_answer_itself_is_learned_as_much_as_is_asked(rows: PairRows) -> None:
    model, batch = policy(), rows.batch(range(len(ANSWERS)))
    losses = [Preference(PreferenceSettings(rpo_alpha=alpha))(model, batch) for alpha in (0, 0.7)]
    plain, both = (loss.total for loss in losses)
    assert losses[1].figures["preference_loss"].item() == pytest.approx(plain.item(), rel=1e-6)
    expected = torch.zeros(())
    for ids, labels in zip(batch.ids[:, 0], batch.labels[:, 0]):
        logits = model.logits(model(ids[None]))[0]
        expected = expected + torch.nn.functional.cross_entropy(logits, labels)  # the mean over an answer's tokens
    assert both.item() == pytest.approx((plain + 0.7 * expected).item(), rel=1e-5)
    assert expected.item() > 1


def test_what_stands_behind_the_longest_answer_changes_nothing(rows: PairRows) -> None:
    objective, batch = Preference(PreferenceSettings()), rows.batch([0, 2])
    short = Batch(batch.ids[..., :64], batch.labels[..., :64], batch.weight, None, batch.extra)
    assert (batch.labels[..., 64:] == -100).all()
    assert objective(policy(), batch).total.item() == objective(policy(), short).total.item()


def test_before_the_first_step_no_answer_is_preferred(rows: PairRows) -> None:
    """Policy and reference are one model: the loss is log 2, and the rewards are 0, for every pair."""
    loss = Preference(PreferenceSettings())(build_decoder(CONFIG, seed=1), rows.batch(range(4)))
    assert loss.total.item() == pytest.approx(4 * math.log(2), abs=1e-5)
    assert loss.figures["rewards/margin"].item() == pytest.approx(0, abs=1e-4)


def test_smoothing_takes_a_share_of_pairs_for_the_wrong_way_round(rows: PairRows) -> None:
    rewards = torch.tensor([[2.0, 0.5], [0.0, 1.0]])
    smoothed = Preference(PreferenceSettings(label_smoothing=0.1)).losses(rewards)
    right, wrong = (Preference(PreferenceSettings()).losses(r) for r in (rewards, rewards.flip(1)))
    assert torch.allclose(smoothed, 0.9 * right + 0.1 * wrong)


def test_the_reference_does_not_depend_on_who_stands_beside_a_pair(rows: PairRows) -> None:
    alone = reference_log_probabilities(build_decoder(CONFIG, 1), rows, plan(1).device, 1, lambda pairs, tokens: None)
    np.testing.assert_allclose(alone, rows.reference, atol=1e-4)
