"""Distillation: a student learns a teacher's distribution in addition to the labels.

    loss = alpha * CE(student, label) + (1 - alpha) * T² * D(p, q)
    p = softmax(teacher's logits / T),  q = softmax(student's logits / T)

Hinton et al. 2015, arXiv:1503.02531: T > 1 gives the teacher's unlikely tokens more weight, and T² keeps the gradient
as large as at T = 1. `alpha` is the weight of the labels. D is the forward KL(p || q), which covers all modes of the
teacher; the reverse KL(q || p), which is mode-seeking (MiniLLM, arXiv:2306.08543); or the Jensen-Shannon divergence
(GKD, arXiv:2306.13649).

The teacher is a model in memory (`OnlineTeacher`), or a cache of its top-k logits (`CachedTeacher`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from slmkit.config import UserError, arguments_checked, did_you_mean, kind_of_value
from slmkit.data.batch import Batch
from slmkit.data.packing import IGNORED
from slmkit.data.rows.teacher_cache import IDS, LOGITS, REST
from slmkit.device import Device
from slmkit.model.decoder import Decoder
from slmkit.training.losses import chunked_loss
from slmkit.training.objective import Loss, Objective

Divergence = Callable[[Tensor, Tensor], Tensor]  # log p and log q [positions, outcomes] → nats [positions]


def kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(p || q) of each position: [positions, outcomes] twice → nats [positions]."""
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def jensen_shannon(log_p: Tensor, log_q: Tensor) -> Tensor:
    """(KL(p || m) + KL(q || m)) / 2 with m = (p + q) / 2: [positions, outcomes] twice → nats [positions]."""
    log_m = torch.logaddexp(log_p, log_q) - math.log(2)
    return (kl(log_p, log_m) + kl(log_q, log_m)) / 2


DIVERGENCES: dict[str, Divergence] = {
    "forward_kl": kl,
    "reverse_kl": lambda log_p, log_q: kl(log_q, log_p),
    "js": jensen_shannon,
}


@dataclass(frozen=True)
class TeacherTargets:
    """A teacher's distribution at some positions, at a temperature.

    The outcomes are all `tokens`; or, with `ids`, the teacher's top k < tokens plus one outcome for all other tokens.
    """

    log_p: Tensor  # float32 [positions, outcomes]
    tokens: int  # shared by teacher and student: the first of both vocabularies
    ids: Tensor | None = None  # int64 [positions, k]

    def log_probabilities(self, logits: Tensor, temperature: float) -> Tensor:
        """log q of the same outcomes: a student's float32 logits [positions, vocab_size] → [positions, outcomes]."""
        logits = logits[:, : self.tokens] / temperature
        if self.ids is None:
            return F.log_softmax(logits, dim=-1)
        others = logits.scatter(-1, self.ids, -torch.inf).logsumexp(-1, keepdim=True)  # [positions, 1]
        return F.log_softmax(torch.cat([logits.gather(-1, self.ids), others], dim=-1), dim=-1)


class DistillationLoss(nn.Module):
    """The loss above. A subclass may override `forward`, and is given to `SLMTrainer(distillation_loss=…)`."""

    @arguments_checked
    def __init__(self, alpha: float = 0.5, temperature: float = 3.0, divergence: str = "forward_kl") -> None:
        """`alpha` (0 to 1) is the weight of the labels' cross-entropy. Raises `UserError` for values out of range."""
        super().__init__()
        if not 0 <= alpha <= 1:
            raise UserError(f"expected an alpha from 0 to 1, found {alpha}: it is the share of the labels")
        if temperature <= 0:
            raise UserError(f"expected a temperature above 0, found {temperature}")
        if divergence not in DIVERGENCES:
            raise UserError(f"unknown divergence {divergence!r}; {did_you_mean(divergence, DIVERGENCES)}")
        self.alpha, self.temperature, self.divergence = alpha, temperature, divergence

    def forward(self, student_logits: Tensor, teacher_logits: Tensor, labels: Tensor) -> Tensor:
        """Logits [..., vocab_size] each, labels [...] of the same positions → sum [] over learned ones, in nats.

        `labels[t]` is the token after position t, or -100: not learned. A sum: the loop divides once by the labels
        of the whole step. If the vocabularies differ in size, the divergence is over the first tokens of both.
        """
        learned = labels != IGNORED
        student, teacher = student_logits[learned].float(), teacher_logits[learned].float()  # [positions, vocab_size]
        targets = self.targets(teacher, min(student.size(-1), teacher.size(-1)))
        return self.mixed(*self.parts(student, targets, labels[learned]))

    def targets(self, teacher_logits: Tensor, tokens: int) -> TeacherTargets:
        """Targets from float32 logits [positions, vocab_size], of which the first `tokens` columns count."""
        return TeacherTargets(F.log_softmax(teacher_logits[:, :tokens] / self.temperature, dim=-1), tokens)

    def parts(self, student_logits: Tensor, targets: TeacherTargets, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Sums of cross-entropy and divergence, in nats: float32 logits [positions, vocab_size], labels [positions]."""
        log_q = targets.log_probabilities(student_logits, self.temperature)
        divergence = DIVERGENCES[self.divergence](targets.log_p, log_q)
        return F.cross_entropy(student_logits, labels, reduction="sum"), divergence.sum()

    def mixed(self, cross_entropy: Tensor, divergence: Tensor) -> Tensor:  # [] each
        return self.alpha * cross_entropy + (1 - self.alpha) * self.temperature**2 * divergence


# -- teachers ---------------------------------------------------------------------------------------------------------

TargetsOfChunk = Callable[[slice], TeacherTargets]  # of a slice of the learned positions


class OnlineTeacher:
    """A frozen model, evaluated at each step. It is not part of the state or of checkpoints."""

    def __init__(self, decoder: Decoder, tokens: int) -> None:
        """`tokens`: size of the tokenizer; further entries of the vocabulary are padding, and not learned."""
        self.decoder, self.tokens = decoder, tokens

    @torch.no_grad()
    def states(self, batch: Batch) -> Tensor:
        """Hidden states [rows, length, width]."""
        return self.decoder(batch.ids, documents=batch.documents)

    @torch.no_grad()
    def logits(self, states: Tensor) -> Tensor:
        """Float32 logits [..., vocab_size] of hidden states [..., width]."""
        return self.decoder.logits(states).float()

    def targets(self, loss: DistillationLoss, batch: Batch, learned: Tensor) -> TargetsOfChunk:
        """Targets at `learned` [rows, length], row by row."""
        states = self.states(batch)[learned]  # [positions, width]
        return lambda place: loss.targets(self.logits(states[place]), self.tokens)


class CachedTeacher:
    """Top-k logits stored by `slm distill-cache`, which are part of each batch."""

    def __init__(self, tokens: int) -> None:
        self.tokens = tokens

    def targets(self, loss: DistillationLoss, batch: Batch, learned: Tensor) -> TargetsOfChunk:
        """Targets at `learned` [rows, length], row by row."""
        # The first places of a row hold its learned positions.
        filled = torch.arange(learned.size(1), device=learned.device) < learned.sum(1, keepdim=True)
        logits, ids, rest = (batch.extra[name][filled] for name in (LOGITS, IDS, REST))
        return lambda place: targets_of_top_k(logits[place], ids[place], rest[place], self.tokens, loss.temperature)


def targets_of_top_k(logits: Tensor, ids: Tensor, rest: Tensor, tokens: int, temperature: float) -> TeacherTargets:
    """Targets of the top k and a remainder outcome: logits and ids [positions, k]; `rest` [positions], the
    log-probability of all other tokens at this temperature.

    The probability not in `rest` is distributed by the softmax of the k logits: only their differences matter.
    """
    log_p, ids = F.log_softmax(logits.float() / temperature, dim=-1), ids.long()  # [positions, k] each
    if ids.size(-1) == tokens:
        return TeacherTargets(torch.empty_like(log_p).scatter_(-1, ids, log_p), tokens)
    rest = rest.float()[:, None]  # [positions, 1]
    return TeacherTargets(torch.cat([log_p + torch.log1p(-rest.exp()), rest], dim=-1), tokens, ids)


@torch.no_grad()
def top_k(logits: Tensor, k: int, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
    """Top k of float32 logits [positions, tokens] for the cache: logits minus the largest, and ids, both
    [positions, k]; and the log-probability of all others at `temperature` [positions].
    """
    top, ids = logits.topk(k, dim=-1)
    log_p = F.log_softmax(logits / temperature, dim=-1)
    rest = log_p.scatter(-1, ids, -torch.inf).logsumexp(-1)
    return top - top[:, :1], ids, rest


def frozen(decoder: Decoder, device: Device) -> Decoder:
    """The decoder frozen, in evaluation mode, on the run's device."""
    return decoder.to(device.torch_device).eval().requires_grad_(False)


def in_compute_type(decoder: Decoder, device: Device) -> Decoder:
    """The decoder with weights in the type of matrix products: half the memory in bfloat16 runs.

    Float16 runs keep the weights' type: hidden states may overflow in float16.
    """
    if device.compute_dtype == torch.bfloat16:
        for parameter in decoder.parameters():
            parameter.data = parameter.data.to(torch.bfloat16)
    return decoder


def check_fit(decoder: Decoder, tokens: int, length: int, who: str) -> None:
    """Raises `UserError` if the model lacks tokens of the tokenizer, or its context is shorter than a row."""
    a = decoder.architecture
    if a.vocab_size < tokens:
        raise UserError(
            f"{who}: a vocabulary of {a.vocab_size:,} for a tokenizer of {tokens:,} tokens: teacher and student must "
            "have the same tokenizer"
        )
    if a.max_positions < length:
        raise UserError(
            f"{who}: reads {a.max_positions:,} tokens at most, rows have {length:,}: lower train.sequence_length"
        )


# -- the objective ----------------------------------------------------------------------------------------------------


class Distill(Objective):
    """A `DistillationLoss` at the learned positions, with chunked logits.

    Figures: the cross-entropy of the labels and the divergence from the teacher, in nats. With `hidden_weight` a
    layer-wise loss on hidden states is added, which needs an `OnlineTeacher`, and reported as `hidden`.
    """

    def __init__(
        self, loss: DistillationLoss, teacher: OnlineTeacher | CachedTeacher, hidden_weight: float = 0.0
    ) -> None:
        self.loss, self.teacher, self.hidden_weight = loss, teacher, hidden_weight

    def __call__(self, model: Decoder, batch: Batch) -> Loss:
        if not self.hidden_weight:
            return self._of_logits(model, batch)
        assert isinstance(self.teacher, OnlineTeacher)
        mine, theirs = zip(*paired_layers(len(model.blocks), len(self.teacher.decoder.blocks)))
        with watched_layers(model, mine) as student, watched_layers(self.teacher.decoder, theirs) as teacher:
            loss = self._of_logits(model, batch)
        learned = batch.labels != IGNORED
        apart = [relations_apart(s, t, learned) for s, t in zip(student, teacher, strict=True)]
        hidden = torch.stack(apart).mean()
        return Loss(loss.total + self.hidden_weight * hidden, {**loss.figures, "hidden": hidden.detach()})

    def _of_logits(self, model: Decoder, batch: Batch) -> Loss:
        learned = batch.labels != IGNORED  # [rows, length]
        labels, targets = batch.labels[learned], self.teacher.targets(self.loss, batch, learned)
        hidden = model(batch.ids, documents=batch.documents)[learned]  # [positions, width]

        def of_chunk(logits: Tensor, place: slice) -> tuple[Tensor, Tensor]:
            parts = self.loss.parts(logits, targets(place), labels[place])
            return self.loss.mixed(*parts), torch.stack(parts)

        total, (cross_entropy, divergence) = chunked_loss(
            hidden, model.head_weight, model.architecture.logit_cap, of_chunk
        )
        return Loss(total, {"cross_entropy": cross_entropy, "divergence": divergence})


class DistillOwnLoss(Distill):
    """A user's own loss, called with all logits: [rows, length, vocab_size], labels [rows, length].

    Raises `UserError` if it does not return a tensor of one number.
    """

    def _of_logits(self, model: Decoder, batch: Batch) -> Loss:
        assert isinstance(self.teacher, OnlineTeacher)
        theirs = self.teacher.logits(self.teacher.states(batch))
        logits = model.logits(model(batch.ids, documents=batch.documents)).float()
        total = self.loss(logits, theirs, batch.labels)
        if not isinstance(total, Tensor) or total.dim():
            raise UserError(
                f"{type(self.loss).__name__}.forward: expected a tensor of one number, the sum over learned labels, "
                f"found {tuple(total.shape) if isinstance(total, Tensor) else kind_of_value(total)}"
            )
        learned = batch.labels != IGNORED
        with torch.no_grad():
            targets = self.loss.targets(theirs[learned], self.teacher.tokens)
            cross_entropy, divergence = self.loss.parts(logits[learned], targets, batch.labels[learned])
        return Loss(total, {"cross_entropy": cross_entropy, "divergence": divergence})


def objective_of(loss: DistillationLoss, teacher: OnlineTeacher) -> Distill:
    """The objective of a built-in loss, or of one that overrides `forward`."""
    is_built_in = type(loss).forward is DistillationLoss.forward
    return (Distill if is_built_in else DistillOwnLoss)(loss, teacher)


def paired_layers(students: int, teachers: int) -> list[tuple[int, int]]:
    """Pairs of student and teacher layers at the same relative depth; the last layers are a pair."""
    return [(layer, -(-(layer + 1) * teachers // students) - 1) for layer in range(students)]


@contextmanager
def watched_layers(model: Decoder, layers: Sequence[int]) -> Iterator[list[Tensor]]:
    """Context manager that collects these blocks' outputs in each forward pass: [rows, length, width] each."""
    seen: list[Tensor] = []

    @torch.compiler.disable
    def see(module: nn.Module, inputs: Any, output: Tensor) -> None:
        seen.append(output)

    handles = [model.blocks[layer].register_forward_hook(see) for layer in layers]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def relations_apart(student: Tensor, teacher: Tensor, learned: Tensor) -> Tensor:
    """Sum [] over the positions of `learned` [rows, length] of the mean squared difference between the cosine
    similarities to all positions of the row, in student and teacher states [rows, length, width].
    """
    total = torch.zeros((), device=student.device)
    with torch.autocast(student.device.type, enabled=False):
        for mine, theirs, here in zip(student, teacher, learned):
            s, t = (F.normalize(states[here].float(), dim=-1) for states in (mine, theirs))  # [positions, width]
            if len(s):
                total = total + (s @ s.T - t @ t.T).square().mean(-1).sum()
    return total
