"""How the next token is chosen. Each rule is a function from logits to logits; their order is that of transformers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from slmkit.config import UserError

# logits [batch, vocab_size], ids so far [batch, sequence] → logits [batch, vocab_size]
Rule = Callable[[Tensor, Tensor], Tensor]
NEVER = -torch.inf
FEW = 64  # candidates that a nucleus is first looked for among


@dataclass(frozen=True)
class SamplingSettings:
    """What to sample by. Temperature 0, or `do_sample=False`, is greedy. Raises `UserError` for values out of range."""

    temperature: float = 1.0
    top_k: int = 0  # 0: all tokens
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    do_sample: bool = True
    seed: int | None = None  # None: another text each time

    def __post_init__(self) -> None:
        checks = (
            (0 <= self.temperature < torch.inf, "temperature", "0 (greedy) or more", self.temperature),
            (self.top_k >= 0, "top_k", "0 (all tokens) or more", self.top_k),
            (0 < self.top_p <= 1, "top_p", "above 0 and up to 1", self.top_p),
            (0 <= self.min_p < 1, "min_p", "from 0 up to below 1", self.min_p),
            (
                0 < self.repetition_penalty < torch.inf,
                "repetition_penalty",
                "above 0 (1: none)",
                self.repetition_penalty,
            ),
            (self.seed is None or 0 <= self.seed < 2**63, "seed", "from 0 up to below 2^63", self.seed),
        )
        for is_right, name, expected, found in checks:
            if not is_right:
                raise UserError(f"{name} {found}: expected {expected}")

    @property
    def is_greedy(self) -> bool:
        return not self.do_sample or self.temperature == 0

    def rules(self) -> list[Rule]:
        """Those that change anything, in order. Greedy decoding is subject to the penalty alone."""
        rules: list[Rule] = []
        if self.repetition_penalty != 1:
            rules.append(repetition_penalty(self.repetition_penalty))
        if self.is_greedy:
            return rules
        if self.temperature != 1:
            rules.append(temperature(self.temperature))
        if self.top_k:
            rules.append(top_k(self.top_k))
        if self.top_p < 1:
            rules.append(top_p(self.top_p))
        if self.min_p:
            rules.append(min_p(self.min_p))
        return rules


def repetition_penalty(penalty: float) -> Rule:
    """Divide the positive logits of tokens already there by `penalty`, multiply negative ones (arXiv:1909.05858)."""

    def rule(logits: Tensor, ids: Tensor) -> Tensor:
        said = logits.gather(-1, ids)  # [batch, sequence]
        return logits.scatter(-1, ids, torch.where(said < 0, said * penalty, said / penalty))

    return rule


def temperature(t: float) -> Rule:
    """Divide all logits by t: below 1 the likely becomes likelier, above 1 everything becomes more alike."""
    return lambda logits, ids: logits / t


def top_k(k: int) -> Rule:
    """Keep the k likeliest tokens, and whatever ties with the last of them."""

    def rule(logits: Tensor, ids: Tensor) -> Tensor:
        last = logits.topk(min(k, logits.size(-1))).values[..., -1:]  # [batch, 1]
        return logits.masked_fill(logits < last, NEVER)

    return rule


def top_p(p: float) -> Rule:
    """Keep the smallest set of likeliest tokens that together have probability p (nucleus, arXiv:1904.09751)."""

    def rule(logits: Tensor, ids: Tensor) -> Tensor:
        probabilities, vocab_size = logits.softmax(-1), logits.size(-1)
        # A nucleus is mostly small, and sorting a whole vocabulary can take longer than the model: look among a few
        # first, then among more.
        count = min(FEW, vocab_size)
        likeliest, order = probabilities.topk(count)  # [batch, count], falling
        while count < vocab_size and bool((likeliest.sum(-1) < p).any()):
            count = min(8 * count, vocab_size)
            likeliest, order = probabilities.topk(count)
        likelier = likeliest.cumsum(-1) - likeliest  # what all likelier tokens have together: 0 for the first
        kept = logits.gather(-1, order).masked_fill(likelier >= p, NEVER)
        return torch.full_like(logits, NEVER).scatter(-1, order, kept)

    return rule


def min_p(p: float) -> Rule:
    """Keep tokens at least p times as likely as the likeliest (arXiv:2407.01082)."""

    def rule(logits: Tensor, ids: Tensor) -> Tensor:
        probabilities = logits.softmax(-1)
        return logits.masked_fill(probabilities < p * probabilities.amax(-1, keepdim=True), NEVER)

    return rule


class Sampler:
    """Chooses one token a row, from a generator of its own: the same seed gives the same tokens."""

    def __init__(self, settings: SamplingSettings, device: torch.device) -> None:
        self.rules, self.is_greedy = settings.rules(), settings.is_greedy
        self.generator = torch.Generator(device)
        if settings.seed is None:
            self.generator.seed()
        else:
            self.generator.manual_seed(settings.seed)

    def __call__(self, logits: Tensor, ids: Tensor) -> Tensor:
        """logits [batch, vocab_size], ids so far [batch, sequence] → [batch]."""
        logits = logits.float()
        for rule in self.rules:
            logits = rule(logits, ids)
        return logits.argmax(-1) if self.is_greedy else self._draw(logits.softmax(-1))

    def _draw(self, probabilities: Tensor) -> Tensor:
        """One index a row, as likely as its probability.  [batch, vocab_size] → [batch]

        A point between 0 and the sum, and the token in whose stretch it lies: ten times as fast as
        `torch.multinomial`, which draws a number for every token of the vocabulary. Raises `UserError` for
        probabilities that are not numbers.
        """
        ends = probabilities.cumsum(-1)  # [batch, vocab_size]; a token that is never drawn has a stretch of nothing
        if not ends[:, -1].isfinite().all():
            raise UserError("the model's logits are not finite: its weights are damaged, or its training diverged")
        points = torch.rand(ends.size(0), 1, device=ends.device, generator=self.generator) * ends[:, -1:]
        return torch.searchsorted(ends, points, right=True).squeeze(-1)
