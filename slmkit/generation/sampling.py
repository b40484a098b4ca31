"""Sampling of the next token. Each rule is a function from logits to logits, applied in transformers' order."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from slmkit.config import UserError
from slmkit.generation.sampling_settings import SamplingSettings

# logits [batch, vocab_size], ids so far [batch, sequence] → logits [batch, vocab_size]
Rule = Callable[[Tensor, Tensor], Tensor]
NEVER = -torch.inf
FEW = 64  # candidates that `top_p` sorts first


def repetition_penalty(penalty: float) -> Rule:
    """Divide positive logits of tokens already in `ids` by `penalty`, multiply negative ones (arXiv:1909.05858)."""

    def rule(logits: Tensor, ids: Tensor) -> Tensor:
        said = logits.gather(-1, ids)  # [batch, sequence]
        return logits.scatter(-1, ids, torch.where(said < 0, said * penalty, said / penalty))

    return rule


def temperature(t: float) -> Rule:
    """Divide all logits by t: below 1 sharpens the distribution, above 1 flattens it."""
    return lambda logits, ids: logits / t


def top_k(k: int) -> Rule:
    """Keep the k most likely tokens, and all that tie with the last of them."""

    def rule(logits: Tensor, ids: Tensor) -> Tensor:
        last = logits.topk(min(k, logits.size(-1))).values[..., -1:]  # [batch, 1]
        return logits.masked_fill(logits < last, NEVER)

    return rule


def top_p(p: float) -> Rule:
    """Keep the smallest set of most likely tokens with total probability p (nucleus, arXiv:1904.09751)."""

    def rule(logits: Tensor, ids: Tensor) -> Tensor:
        probabilities, vocab_size = logits.softmax(-1), logits.size(-1)  # [batch, vocab_size]
        # A nucleus is mostly small, and sorting a whole vocabulary can take longer than the model: sort a few
        # candidates first, then more.
        count = min(FEW, vocab_size)
        likeliest, order = probabilities.topk(count)  # [batch, count], descending
        while count < vocab_size and bool((likeliest.sum(-1) < p).any()):
            count = min(8 * count, vocab_size)
            likeliest, order = probabilities.topk(count)
        likelier = likeliest.cumsum(-1) - likeliest  # probability of all more likely tokens: 0 for the first
        kept = logits.gather(-1, order).masked_fill(likelier >= p, NEVER)
        return torch.full_like(logits, NEVER).scatter(-1, order, kept)

    return rule


def min_p(p: float) -> Rule:
    """Keep tokens at least p times as likely as the most likely one (arXiv:2407.01082)."""

    def rule(logits: Tensor, ids: Tensor) -> Tensor:
        probabilities = logits.softmax(-1)  # [batch, vocab_size]
        return logits.masked_fill(probabilities < p * probabilities.amax(-1, keepdim=True), NEVER)

    return rule


# Each setting with its value that changes nothing, in transformers' order.
RULES: tuple[tuple[str, float, Callable[[Any], Rule]], ...] = (
    ("repetition_penalty", 1, repetition_penalty),
    ("temperature", 1, temperature),
    ("top_k", 0, top_k),
    ("top_p", 1, top_p),
    ("min_p", 0, min_p),
)


def rules_of(settings: SamplingSettings) -> list[Rule]:
    """The rules that have an effect with these settings, in order. Greedy decoding uses only the repetition penalty."""
    values = [(getattr(settings, name), neutral, rule) for name, neutral, rule in RULES]
    used = values[:1] if settings.is_greedy else values
    return [rule(value) for value, neutral, rule in used if value != neutral]


class Sampler:
    """Chooses one token per sequence with a generator of its own: the same seed gives the same tokens."""

    def __init__(self, settings: SamplingSettings, device: torch.device, known: np.ndarray | None = None) -> None:
        """`known` bool [ids]: which ids are tokens. All others, and those beyond it, are never chosen."""
        self.rules, self.is_greedy = rules_of(settings), settings.is_greedy
        self.known = None if known is None else torch.from_numpy(known).to(device)
        self.generator = torch.Generator(device)
        if settings.seed is None:
            self.generator.seed()
        else:
            self.generator.manual_seed(settings.seed)

    def __call__(self, logits: Tensor, ids: Tensor) -> Tensor:
        """logits [batch, vocab_size], ids so far [batch, sequence] → [batch]. Raises `UserError` unless finite."""
        logits = logits.float()
        if not logits.amax(-1).isfinite().all():  # amax propagates NaN; argmax would choose it
            raise UserError("the model's logits are not finite: its weights are damaged, or its training diverged")
        if self.known is not None:
            beyond = max(0, logits.size(-1) - len(self.known))
            logits = logits.masked_fill(~F.pad(self.known, (0, beyond))[: logits.size(-1)], NEVER)
        for rule in self.rules:
            logits = rule(logits, ids)
        return logits.argmax(-1) if self.is_greedy else self._draw(logits.softmax(-1))

    def _draw(self, probabilities: Tensor) -> Tensor:
        """probabilities [batch, vocab_size] → one index per sequence, drawn with its probability [batch].

        Inverse transform sampling: ten times as fast as `torch.multinomial`, which draws one number per token of the
        vocabulary.
        """
        ends = probabilities.cumsum(-1)  # [batch, vocab_size]; a token of probability 0 has an empty interval
        points = torch.rand(ends.size(0), 1, device=ends.device, generator=self.generator) * ends[:, -1:]
        return torch.searchsorted(ends, points, right=True).squeeze(-1)
