"""The loss of distillation is its formula, whole or in chunks, from all of a teacher's logits or from the likeliest."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from slmkit.config import UserError
from slmkit.data.batch import Batch
from slmkit.data.packing import IGNORED
from slmkit.data.rows.teacher_cache import IDS, LOGITS, REST
from slmkit.device import find_device
from slmkit.model.decoder import Decoder
from slmkit.model.initialization import build_decoder
from slmkit.training import losses
from slmkit.training.objectives.distillation import (
    DIVERGENCES,
    CachedTeacher,
    Distill,
    DistillationLoss,
    DistillOwnLoss,
    OnlineTeacher,
    check_fit,
    frozen,
    objective_of,
    paired_layers,
    relations_apart,
    targets_of_top_k,
    top_k,
)
from tests.training.helpers import config

TOKENS = 260


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several chunks of 16 positions, the last one partial."""
    monkeypatch.setattr(losses, "SMALLEST_CHUNK", 16)
    monkeypatch.setattr(losses, "LOGITS_PER_CHUNK", {"cpu": 0})


def student(**changes: object) -> Decoder:
    return build_decoder(config(initializer_range=0.4, **changes), seed=1)


def teacher(**changes: object) -> Decoder:
    changed = {"hidden_size": 48, "num_hidden_layers": 3, "vocab_size": 300, "initializer_range": 0.5} | changes
    return frozen(build_decoder(config(**changed), seed=2), find_device("cpu", "float32"))


def batch(rows: int = 3, length: int = 25) -> Batch:
    """With rows of which all, half and nothing is learned."""
    ids = torch.randint(TOKENS, (rows, length + 1), generator=torch.Generator().manual_seed(0))
    labels = ids[:, 1:].clone()
    labels[1, ::2] = IGNORED
    labels[2:] = IGNORED
    return Batch(ids[:, :-1], labels, int((labels != IGNORED).sum()))


def gradients(total: Tensor, model: Decoder) -> list[Tensor]:
    return [*torch.autograd.grad(total, list(model.parameters()))]


def by_hand(z: Tensor, t: Tensor, labels: Tensor, alpha: float, temperature: float, divergence: str) -> float:
    """The formula, position by position and token by token."""
    total = 0.0
    for position in (labels != IGNORED).nonzero().flatten().tolist():
        q, p = ((logits[position] / temperature).softmax(-1).tolist() for logits in (z, t[:, : z.size(-1)]))
        m = [(a + b) / 2 for a, b in zip(p, q)]
        kl = lambda a, b: sum(x * math.log(x / y) for x, y in zip(a, b))  # noqa: E731
        apart = {"forward_kl": kl(p, q), "reverse_kl": kl(q, p), "js": (kl(p, m) + kl(q, m)) / 2}[divergence]
        label = -z[position].log_softmax(-1)[labels[position]].item()
        total += alpha * label + (1 - alpha) * temperature**2 * apart
    return total


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize(("alpha", "temperature"), [(0.5, 3.0), (0.2, 1.0), (1.0, 2.0), (0.0, 0.5)])
def test_the_loss_is_its_formula(divergence: str, alpha: float, temperature: float) -> None:
    generator = torch.Generator().manual_seed(4)
    z, t = torch.randn(5, 7, generator=generator), torch.randn(5, 9, generator=generator) * 2
    labels = torch.tensor([3, -100, 0, 6, -100])
    found = DistillationLoss(alpha, temperature, divergence)(z, t, labels)
    assert found.item() == pytest.approx(by_hand(z.double(), t.double(), labels, alpha, temperature, divergence))


def test_a_teacher_of_the_same_mind_adds_nothing() -> None:
    z = torch.randn(4, 7, generator=torch.Generator().manual_seed(4))
    for divergence in DIVERGENCES:
        loss = DistillationLoss(0.5, 3.0, divergence)
        assert loss(z, z.clone(), torch.zeros(4, dtype=torch.long)).item() == pytest.approx(
            0.5 * F.cross_entropy(z, torch.zeros(4, dtype=torch.long), reduction="sum").item()
        )


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("capped", ["neither", "student", "teacher"])
def test_in_chunks_it_is_the_plain_form_in_value_and_gradient(divergence: str, capped: str) -> None:
    """A vocabulary padded beyond the tokenizer's tokens at both, and the cap of logits of either."""
    cap = {"model_type": "gemma2", "final_logit_softcapping": 1.5}
    pupil = student(vocab_size=270, **(cap if capped == "student" else {}))
    master = teacher(**(cap if capped == "teacher" else {}))
    loss, rows = DistillationLoss(0.3, 2.0, divergence), batch()
    found = Distill(loss, OnlineTeacher(master, TOKENS))(pupil, rows)
    logits, theirs = (model.logits(model(rows.ids)).float() for model in (pupil, master))
    learned = rows.labels != IGNORED
    cross_entropy = F.cross_entropy(logits[learned], rows.labels[learned], reduction="sum")
    plain = loss(logits[..., :TOKENS], theirs, rows.labels)  # of the first tokens alone …
    of_known = F.cross_entropy(logits[learned][:, :TOKENS], rows.labels[learned], reduction="sum")
    plain = plain + 0.3 * (cross_entropy - of_known)  # … but labels among all that the student has
    torch.testing.assert_close(found.total, plain)
    torch.testing.assert_close(gradients(found.total * 0.7, pupil), gradients(plain * 0.7, pupil), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found.figures["cross_entropy"], cross_entropy.detach())
    apart = (plain.detach() - 0.3 * cross_entropy.detach()) / (0.7 * 4)
    torch.testing.assert_close(found.figures["divergence"], apart)


@pytest.mark.parametrize(("precision", "tolerance"), [("bfloat16", 0.1), ("float16", 0.04)])
def test_in_16_bits_gradients_are_those_of_float32_but_for_rounding(precision: str, tolerance: float) -> None:
    pupil, objective = student(), Distill(DistillationLoss(), OnlineTeacher(teacher(), TOKENS))
    expected = gradients(objective(pupil, batch()).total, pupil)
    with find_device("cpu", precision).autocast():
        loss = objective(pupil, batch())
    assert loss.total.dtype == torch.float32
    for found, wanted in zip(gradients(loss.total, pupil), expected):
        assert (found - wanted).norm() < tolerance * wanted.norm()


def test_nothing_learned_is_no_loss_and_no_nan() -> None:
    pupil, objective = student(), Distill(DistillationLoss(), OnlineTeacher(teacher(), TOKENS))
    loss = objective(pupil, batch().untrained())
    assert loss.total.item() == loss.figures["divergence"].item() == 0
    assert not any(gradient.any() for gradient in gradients(loss.total, pupil))


# -- the likeliest tokens alone ---------------------------------------------------------------------------------------


def stored(rows: Batch, master: Decoder, k: int, temperature: float, dtype: torch.dtype = torch.float32) -> Batch:
    """The rows with what a cache would say of them; in float32 where rounding is not the question."""
    learned = rows.labels != IGNORED
    extra = {
        LOGITS: torch.zeros(*rows.ids.shape, k, dtype=dtype),
        IDS: torch.zeros(*rows.ids.shape, k, dtype=torch.int32),
        REST: torch.zeros(rows.ids.shape),
    }
    for row, here in enumerate(learned):
        logits = master.logits(master(rows.ids[row : row + 1])[0, here]).float()[:, :TOKENS]
        for name, found in zip((LOGITS, IDS, REST), top_k(logits, k, temperature)):
            extra[name][row, : int(here.sum())] = found.to(extra[name].dtype)
    return Batch(rows.ids, rows.labels, rows.weight, None, extra)


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_with_all_tokens_stored_it_is_the_loss_online(divergence: str) -> None:
    pupil, master, loss = student(), teacher(), DistillationLoss(0.5, 3.0, divergence)
    online = Distill(loss, OnlineTeacher(master, TOKENS))(pupil, batch())
    offline = Distill(loss, CachedTeacher(TOKENS))(pupil, stored(batch(), master, TOKENS, 3.0))
    torch.testing.assert_close(offline.total, online.total, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(gradients(offline.total, pupil), gradients(online.total, pupil), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_what_is_not_stored_is_one_outcome_more(divergence: str) -> None:
    """Against distributions whose other tokens are summed up by hand."""
    z, t = (torch.randn(6, 40, generator=torch.Generator().manual_seed(seed)) * 3 for seed in (1, 2))
    k, temperature = 5, 2.0
    targets = targets_of_top_k(*top_k(t, k, temperature), tokens=40, temperature=temperature)
    loss = DistillationLoss(0.0, temperature, divergence)
    _, found = loss.parts(z, targets, torch.zeros(6, dtype=torch.long))
    expected = 0.0
    for mine, theirs in zip(z.double(), t.double()):
        chosen = theirs.topk(k).indices.tolist()
        p, q = ((logits / temperature).softmax(-1) for logits in (theirs, mine))
        p, q = (torch.tensor([*x[chosen].tolist(), 1 - x[chosen].sum().item()]) for x in (p, q))
        expected += DIVERGENCES[divergence](p.log()[None], q.log()[None]).item()
    assert found.item() == pytest.approx(expected, rel=1e-5)


def test_fewer_outcomes_never_say_more_than_all_of_them() -> None:
    z, t = (torch.randn(6, 40, generator=torch.Generator().manual_seed(seed)) * 3 for seed in (1, 2))
    loss, labels = DistillationLoss(0.0, 1.0), torch.zeros(6, dtype=torch.long)
    apart = [loss.parts(z, targets_of_top_k(*top_k(t, k, 1.0), 40, 1.0), labels)[1].item() for k in (1, 4, 16, 40)]
    assert apart == sorted(apart)
    assert apart[-1] == pytest.approx(loss.parts(z, loss.targets(t, 40), labels)[1].item(), rel=1e-5)


def test_rounding_to_what_is_stored_hardly_changes_the_loss() -> None:
    pupil, master, loss = student(), teacher(), DistillationLoss()
    online = Distill(loss, OnlineTeacher(master, TOKENS))(pupil, batch()).total
    offline = Distill(loss, CachedTeacher(TOKENS))(pupil, stored(batch(), master, TOKENS, 3.0, torch.float16)).total
    assert offline.item() == pytest.approx(online.item(), rel=1e-4)


# -- a loss of one's own ----------------------------------------------------------------------------------------------


class Doubled(DistillationLoss):
    def forward(self, student_logits: Tensor, teacher_logits: Tensor, labels: Tensor) -> Tensor:
        assert student_logits.shape[:2] == teacher_logits.shape[:2] == labels.shape
        return 2 * super().forward(student_logits, teacher_logits, labels)


class Mistaken(DistillationLoss):
    def forward(self, student_logits: Tensor, teacher_logits: Tensor, labels: Tensor) -> Tensor:
        return student_logits


def test_a_subclass_gets_plain_logits_and_is_minimised() -> None:
    pupil, master = student(), OnlineTeacher(teacher(), TOKENS)
    own, built_in = objective_of(Doubled(), master), objective_of(DistillationLoss(), master)
    assert isinstance(own, DistillOwnLoss)
    assert type(built_in) is Distill
    found, expected = own(pupil, batch()), built_in(pupil, batch())
    torch.testing.assert_close(found.total, 2 * expected.total)
    torch.testing.assert_close(dict(found.figures), dict(expected.figures))
    with pytest.raises(UserError, match=r"Mistaken\.forward: expected a tensor of one number"):
        objective_of(Mistaken(), master)(pupil, batch())


@pytest.mark.parametrize("wrong", [{"alpha": 1.5}, {"temperature": 0.0}, {"divergence": "forward"}])
def test_settings_that_make_no_sense_are_refused(wrong: dict) -> None:
    with pytest.raises(UserError):
        DistillationLoss(**wrong)


# -- hidden states ----------------------------------------------------------------------------------------------------


def test_layers_are_paired_by_their_share_of_the_depth() -> None:
    assert paired_layers(2, 6) == [(0, 2), (1, 5)]
    assert paired_layers(3, 4) == [(0, 1), (1, 2), (2, 3)]
    assert paired_layers(4, 2) == [(0, 0), (1, 0), (2, 1), (3, 1)]


def test_states_that_are_turned_and_stretched_are_the_same_and_others_are_not() -> None:
    generator = torch.Generator().manual_seed(0)
    states, learned = torch.randn(2, 9, 8, generator=generator), torch.ones(2, 9, dtype=torch.bool)
    turn, _ = torch.linalg.qr(torch.randn(12, 12, generator=generator))
    wider = F.pad(states, (0, 4)) @ turn * 3  # [2, 9, 12]
    assert relations_apart(states, wider, learned).item() == pytest.approx(0, abs=1e-6)
    learned[1] = False
    expected = sum(
        (F.cosine_similarity(a, b, dim=0) - F.cosine_similarity(c, d, dim=0)).square().item() / 9
        for a, c in zip(states[0], states[1])
        for b, d in zip(states[0], states[1])
    )
    assert relations_apart(states, states.flip(0), learned).item() == pytest.approx(expected, rel=1e-4)


def test_matching_states_adds_their_share_and_leaves_the_rest_as_it_was() -> None:
    pupil, master = student(), OnlineTeacher(teacher(), TOKENS)
    plain = Distill(DistillationLoss(), master)
    with_states = Distill(DistillationLoss(), master, 0.25)
    rows = batch()
    found, expected = with_states(pupil, rows), plain(pupil, rows)
    learned = rows.labels != IGNORED
    pairs = [(outputs(pupil, rows)[s], outputs(master.decoder, rows)[t]) for s, t in paired_layers(2, 3)]
    hidden = torch.stack([relations_apart(s, t, learned) for s, t in pairs]).mean()
    torch.testing.assert_close(found.figures["hidden"], hidden.detach())
    torch.testing.assert_close(found.total, expected.total + 0.25 * hidden)
    pupil.recompute_every = 1
    again = with_states(pupil.train(), rows)
    torch.testing.assert_close(gradients(again.total, pupil), gradients(found.total, pupil))


def outputs(model: Decoder, rows: Batch) -> list[Tensor]:
    """Of every block, computed by a model that is cut off behind it."""
    found = []
    for layer in range(len(model.blocks)):
        handle = model.blocks[layer].register_forward_hook(lambda module, inputs, output: found.append(output))
        model(rows.ids)
        handle.remove()
    return found


# -- teachers ---------------------------------------------------------------------------------------------------------


def test_a_teacher_that_does_not_fit_is_refused_with_the_reason() -> None:
    with pytest.raises(UserError, match="a vocabulary of 300 for a tokenizer of 301"):
        check_fit(teacher(), 301, 32, "teacher")
    with pytest.raises(UserError, match="reads 32 tokens at most, rows have 33"):
        check_fit(teacher(), 260, 33, "teacher")
    check_fit(teacher(), 260, 32, "teacher")


def test_targets_of_all_tokens_have_as_many_outcomes() -> None:
    targets = targets_of_top_k(*top_k(torch.randn(2, 5), 5, 1.0), tokens=5, temperature=1.0)
    assert targets.log_p.shape == targets.log_probabilities(torch.randn(2, 7), 1.0).shape == (2, 5)
