"""Answers are sampled from the model as it is, judged, and weighed against those of their group."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from slmkit.config import UserError
from slmkit.data.prepare.conversations import prepare_chat
from slmkit.data.rows.answers import Questions
from slmkit.model.decoder import Decoder
from slmkit.model.initialization import build_decoder
from slmkit.training.distributed import ALONE
from slmkit.training.objectives.grpo import GroupRelative
from slmkit.training.recipe.objective_settings import GrpoSettings
from slmkit.workflows.grpo import Rollouts, Score
from tests.training.helpers import TOKENIZER
from tests.training.objectives.test_preference import CONFIG

LENGTH = 64
SETTINGS = {"prompts_per_step": 3, "num_generations": 4, "max_new_tokens": 5}


def talk(question: str, answer: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def questions(folder: Path, *more: list[dict[str, str]], length: int = LENGTH) -> Questions:
    talks = [*(talk(f"{n}?", f"a{n}") for n in range(7)), *more]
    return Questions(prepare_chat(talks, TOKENIZER, folder / "shards"), length, SETTINGS["max_new_tokens"])


def drawn(model: Decoder, prompts: Sequence[np.ndarray], count: int, seed: int) -> list[np.ndarray]:
    """Answers of one to five tokens that follow from the seed and from the model's weights."""
    size = model.embedding.weight.detach().sum().item()
    chance = np.random.default_rng([seed, int(abs(size) * 1e6)])
    return [chance.integers(3, 100, size=chance.integers(1, 6)) for _ in range(count * len(prompts))]


def by_first_token(prompt: np.ndarray, answer: np.ndarray, known: np.ndarray) -> Score:
    return Score(float(answer[0] % 3), bool(answer[0] % 3 == 2))


def rollouts(folder: Path, model: Decoder, reference: Decoder | None = None, **changes: object) -> Rollouts:
    settings = GrpoSettings(**SETTINGS | changes)
    return Rollouts(questions(folder), model, reference, drawn, by_first_token, settings, LENGTH, seed=3, group=ALONE)


def test_a_question_is_all_before_the_last_answer_which_is_what_is_right(tmp_path: Path) -> None:
    long = [*talk("Hi", "Hello"), *talk("And?", "So.")]
    found = questions(tmp_path, long)
    before = TOKENIZER.encode_chat(long[:-1], add_generation_prompt=True).ids
    assert found.prompt(7).tolist() == before
    assert TOKENIZER.decode(found.known(7)) == "So.<|im_end|>"


def test_questions_without_room_for_an_answer_are_left_out_and_counted(tmp_path: Path) -> None:
    found = questions(tmp_path, talk("much too long " * 5, "a"))
    assert (len(found), *found.left_out.values()) == (7, 1, 0)
    assert "1 questions left out" in found.report()[0]
    with pytest.raises(UserError, match="not one question leaves room"):
        questions(tmp_path / "short", length=10)


def test_a_batch_follows_from_step_weights_and_rank(tmp_path: Path) -> None:
    model = build_decoder(CONFIG, seed=0)
    source = rollouts(tmp_path, model)
    first = source.batch(4)
    assert torch.equal(source.batch(4).ids, first.ids)
    assert not torch.equal(source.batch(5).ids, first.ids)
    assert source.batch(4, rank=1, world=3).ids.shape == (4, LENGTH)
    with torch.no_grad():
        model.embedding.weight.add_(0.01)
    assert not torch.equal(source.batch(4).ids, first.ids)


def test_advantages_are_what_rewards_are_above_their_groups_mean(tmp_path: Path) -> None:
    batch = rollouts(tmp_path, build_decoder(CONFIG, 0)).batch(0)
    rewards = batch.extra["reward"].reshape(3, 4)
    advantages = batch.extra["advantage"].reshape(3, 4)
    assert torch.allclose(advantages, rewards - rewards.mean(1, keepdim=True), atol=1e-6)
    scaled = rollouts(tmp_path / "scaled", build_decoder(CONFIG, 0), loss="grpo").batch(0).extra["advantage"]
    expected = advantages / (rewards.std(1, keepdim=True) + 1e-4)
    assert torch.allclose(scaled.reshape(3, 4), expected, atol=1e-5)
    silent = (rewards == rewards[:, :1]).all(1)
    assert torch.equal(batch.extra["silent"].reshape(3, 4)[:, 0].bool(), silent)


def test_the_answers_alone_are_learned(tmp_path: Path) -> None:
    source = rollouts(tmp_path, build_decoder(CONFIG, 0))
    batch = source.batch(0)
    for ids, labels in zip(batch.ids, batch.labels):
        at = (labels != -100).nonzero().flatten()
        assert 1 <= len(at) <= 5
        assert torch.equal(ids[at + 1], labels[at])
        prompt = ids[: at[0] + 1].tolist()
        assert prompt in [source.questions.prompt(index).tolist() for index in range(7)]


@pytest.mark.parametrize("loss", ["dr_grpo", "grpo"])
def test_the_gradient_is_that_of_weighed_log_probabilities(tmp_path: Path, loss: str) -> None:
    """Policy gradient: the sum over answers of advantage times the gradient of what the answer's tokens have."""
    model = build_decoder(CONFIG, seed=0)
    source = rollouts(tmp_path, model, loss=loss, temperature=0.7)
    batch, objective = source.batch(0), GroupRelative(source.settings)
    objective(model, batch).total.backward()
    found = torch.cat([p.grad.flatten() for p in model.parameters()])
    model.zero_grad()
    total = torch.zeros(())
    for ids, labels, advantage in zip(batch.ids, batch.labels, batch.extra["advantage"]):
        logits = model.logits(model(ids[None]))[0].float() / 0.7
        learned = labels != -100
        each = logits.log_softmax(-1)[learned].gather(-1, labels[learned][:, None])
        total = total - advantage * each.sum() / (len(each) if loss == "grpo" else 5)
    total.backward()
    expected = torch.cat([p.grad.flatten() for p in model.parameters()])
    assert torch.allclose(found, expected, atol=1e-5)
    assert expected.abs().max() > 1e-3


def test_answers_as_good_as_their_group_are_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, rows_read = build_decoder(CONFIG, seed=0), []
    source = rollouts(tmp_path, model)
    batch, objective = source.batch(0), GroupRelative(source.settings)
    batch.extra["advantage"][4:8] = 0
    whole = model.forward
    monkeypatch.setattr(model, "forward", lambda ids, **more: rows_read.append(len(ids)) or whole(ids, **more))
    loss = objective(model, batch)
    batch.extra["advantage"].zero_()
    silent = objective(model, batch)
    signal = int((source.batch(0).extra["advantage"] != 0).reshape(3, 4)[[0, 2]].sum())
    assert 0 < signal <= 8
    assert rows_read == [signal, 1]  # one row where there is no signal: processes must go through the model together
    assert loss.figures == silent.figures
    silent.total.backward()
    assert all(not parameter.grad.any() for parameter in model.parameters())


def test_questions_of_a_step_are_in_order_of_their_length(tmp_path: Path) -> None:
    asked = [talk(f"{n}{'?' * (n * 3 % 7)}", "a") for n in range(7)]
    prepared = Questions(prepare_chat(asked, TOKENIZER, tmp_path / "shards"), LENGTH, 5)
    source = Rollouts(
        prepared,
        build_decoder(CONFIG, 0),
        None,
        drawn,
        by_first_token,
        GrpoSettings(**SETTINGS),
        LENGTH,
        3,
        ALONE,
    )
    lengths = [int((labels != -100).nonzero()[0]) + 1 for labels in source.batch(0).labels]
    assert lengths == sorted(lengths)
    assert len(set(lengths)) > 1
    assert [prepared.length(index) for index in range(7)] == [len(prepared.prompt(index)) for index in range(7)]


def test_figures_are_means_over_answers_and_dummy_rows_do_not_count(tmp_path: Path) -> None:
    model = build_decoder(CONFIG, seed=0)
    source = rollouts(tmp_path, model)
    batch, objective = source.batch(0), GroupRelative(source.settings)
    assert objective.weight(batch) == 12
    assert objective.weight(batch.untrained()) == 0
    assert objective(model, batch.untrained()).total.item() == 0
    parts = [objective(model, part).figures for part in (*batch.split(5), batch.untrained())]
    right = sum(part["answers/right"].item() for part in parts)
    assert right == batch.extra["right"].sum().item()
    assert sum(part["answers/tokens"].item() for part in parts) == batch.weight


def test_the_divergence_from_the_start_pulls_back(tmp_path: Path) -> None:
    start, model = build_decoder(CONFIG, seed=0), build_decoder(CONFIG, seed=0)
    source = rollouts(tmp_path, model, start, beta=0.5)
    objective = GroupRelative(source.settings)
    assert objective(model, source.batch(0)).figures["divergence"].item() == pytest.approx(0, abs=1e-5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    batch = source.batch(0)
    batch.extra["advantage"].zero_()  # nothing else is left to learn from
    before = objective(model, batch)
    before.total.backward()
    assert before.figures["divergence"].item() > 0.01
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.sub_(0.003 * parameter.grad / parameter.grad.norm())
    assert objective(model, batch).total.item() < before.total.item()
