"""Sampling of the next token, each row of a batch by its own settings.

The rules of a row apply in this order, as in transformers: ids that are not allowed, logit bias, repetition penalty,
presence and frequency penalties; then, unless the row is greedy, temperature, top-k, top-p, min-p, typical sampling.
One uniform number then decides, a function of the row's seed and the token's number alone. So what a row gets depends
on nothing else in the batch.
"""

from __future__ import annotations

import secrets
import struct
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from hashlib import blake2b
from itertools import chain
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from slmkit.generation.filters import argmax, filtered, pick, total
from slmkit.generation.sampling_settings import SamplingSettings

STRETCH = 512  # probabilities that `draw` sums at a time
# What `sample` returns in place of an id, and the error of that row.
FAULTS = {
    -1: "the model's logits are not finite: its weights are damaged, or its training diverged",
    -2: "no token is left to choose from: the grammar and `logit_bias` exclude all of them",
}


class SampledRow(Protocol):
    """What sampling needs to know about a row."""

    @property
    def ids(self) -> Sequence[int]:
        """Prompt and new tokens so far."""

    @property
    def prompt_length(self) -> int:
        """How many of `ids` are the prompt's."""

    @property
    def settings(self) -> SamplingSettings: ...

    @property
    def seed(self) -> int:
        """As `seed_of` gives it."""

    @property
    def allowed(self) -> Tensor | None:
        """bool [vocab_size] on the device of the logits: the ids that may be chosen. None: all."""


def seed_of(seed: int | None, number: int = 0) -> int:
    """The seed of continuation `number` of one request: of number 0 `seed` itself. Without a seed a random one."""
    if seed is None:
        return secrets.randbits(63)
    return seed if number == 0 else _hashed(seed, number, b"continuation") >> 1


def uniform(seed: int, number: int) -> float:
    """The uniform number in [0, 1) that decides token `number` of a text, in steps of 2^-52."""
    return (_hashed(seed, number, b"token") >> 12) * 2.0**-52


def _hashed(seed: int, number: int, purpose: bytes) -> int:
    """64 bits: a cryptographic hash, so that neighbouring seeds and numbers are as unrelated as any others."""
    return int.from_bytes(blake2b(struct.pack("<QQ", seed, number), digest_size=8, person=purpose).digest(), "little")


def sample(logits: Tensor, rows: Sequence[SampledRow]) -> Tensor:
    """logits [rows, vocab_size] → the next id of each row [rows], or a key of `FAULTS` for a row with an error."""
    logits = logits.detach().float()
    shaped = penalized(logits, rows)
    sampled = [place for place, row in enumerate(rows) if not row.settings.is_greedy]
    if sampled:
        drawn = [rows[place] for place in sampled]
        chosen = draw(_weights(_at(shaped, sampled), drawn), points(drawn))
    if len(sampled) < len(rows):
        best = argmax(shaped)
        chosen = best.index_copy(0, _on(best, sampled), chosen) if sampled else best
    chosen = torch.where(shaped.amax(-1) > -torch.inf, chosen, -2) if shaped is not logits else chosen
    return torch.where(logits.amax(-1).abs() < torch.inf, chosen, -1)  # amax propagates NaN


def probabilities(logits: Tensor, rows: Sequence[SampledRow]) -> Tensor:
    """logits [rows, vocab_size] → the distribution that `sample` draws from [rows, vocab_size], one-hot if greedy.

    A row with an error is all NaN.
    """
    logits = logits.detach().float()
    shaped = penalized(logits, rows)
    sampled = [place for place, row in enumerate(rows) if not row.settings.is_greedy]
    found = torch.zeros_like(shaped).scatter_(-1, argmax(shaped)[:, None], 1)
    if sampled:
        weights = _weights(_at(shaped, sampled), [rows[place] for place in sampled])
        found[_on(found, sampled)] = weights / total(weights).float()
    wrong = ~(shaped.amax(-1).isfinite() & logits.amax(-1).isfinite())
    return found.masked_fill_(wrong[:, None], torch.nan)


def points(rows: Sequence[SampledRow]) -> list[float]:
    """The uniform number of each row's next token."""
    return [uniform(row.seed, len(row.ids) - row.prompt_length) for row in rows]


def draw(probabilities: Tensor, points: Sequence[float]) -> Tensor:
    """probabilities [rows, n], not necessarily of sum 1 → for each row the index at its point of [0, 1): [rows].

    Inverse transform sampling: the stretch of indices that contains the point, then the index, with sums in float64.
    What has no probability is never drawn. Points are at most 1 - 2^-52.
    """
    if missing := -probabilities.size(-1) % STRETCH:
        probabilities = F.pad(probabilities, (0, missing))
    stretches = probabilities.unflatten(-1, (-1, STRETCH))
    lengths = stretches.sum(-1)  # [rows, stretches]
    ends = lengths.cumsum(-1, dtype=torch.float64)
    point = torch.tensor(points, dtype=torch.float64).to(ends.device)[:, None] * ends[:, -1:]
    stretch = _interval_at(ends, point)  # [rows, 1]
    point -= (ends - lengths).gather(-1, stretch)  # from the beginning of the stretch
    ends = pick(stretches, stretch).squeeze(1).cumsum(-1, dtype=torch.float64)
    # Rounding may give a place outside the stretch.
    index = _interval_at(ends, torch.minimum(point.clamp_(min=0), ends[:, -1:] * (1 - 2**-52)))
    return (stretch * STRETCH + index).squeeze(-1)


def _interval_at(ends: Tensor, point: Tensor) -> Tensor:
    """ends [rows, n] of intervals on a line, point [rows, 1] → number of the interval that contains it [rows, 1]."""
    return torch.searchsorted(ends, point, right=True).clamp_(max=ends.size(-1) - 1)  # beyond it: NaN


def _weights(logits: Tensor, rows: Sequence[SampledRow]) -> Tensor:
    """logits [rows, vocab_size] of sampled rows → their probabilities, times a factor for each row."""
    settings = [row.settings for row in rows]
    if any(one.temperature != 1 for one in settings):
        logits = logits / torch.tensor([[one.temperature] for one in settings]).to(logits.device)
    p = logits.softmax(-1)
    places = [place for place, one in enumerate(settings) if one.has_filters]
    if places:
        kept = filtered(_at(p, places), [settings[place] for place in places])
        p = kept if len(places) == len(rows) else p.index_copy(0, _on(p, places), kept)
    return p


def penalized(logits: Tensor, rows: Sequence[SampledRow]) -> Tensor:
    """logits [rows, vocab_size] after the rules that greedy rows obey too; the same tensor if there are none."""
    masked = [place for place, row in enumerate(rows) if row.allowed is not None]
    biased = [place for place, row in enumerate(rows) if row.settings.logit_bias]
    repeated = [place for place, row in enumerate(rows) if row.settings.repetition_penalty != 1]
    counted = [place for place, row in enumerate(rows) if row.settings.has_counts]
    if masked or biased or repeated or counted:
        logits = logits.clone()
    if masked:
        _keep_only(logits, masked, [rows[place].allowed for place in masked])
    if biased:
        at, added = _entries(logits, [(place, rows[place].settings.logit_bias) for place in biased])
        logits[at] += added
    if repeated:
        said = [(place, rows[place].settings.repetition_penalty, rows[place].ids) for place in repeated]
        at, penalty = _entries(logits, [(place, dict.fromkeys(ids, penalty)) for place, penalty, ids in said])
        now = logits[at]
        logits[at] = torch.where(now < 0, now * penalty, now / penalty)  # arXiv:1909.05858
    if counted:
        at, subtracted = _entries(logits, [(place, _deductions(rows[place])) for place in counted])
        logits[at] -= subtracted
    return logits


def _keep_only(logits: Tensor, places: Sequence[int], masks: Sequence[Any]) -> None:
    """Make the logits of all other ids -inf, in place. masks: bool [vocab_size] for each place."""
    shared = all(mask is masks[0] for mask in masks)
    allowed = masks[0][None] if shared else torch.stack(list(masks))  # [rows or 1, vocab_size]
    most = (allowed.view(torch.uint8).float() - 0.5) * torch.inf  # `minimum` is far faster than `where`
    if len(places) == len(logits):
        torch.minimum(logits, most, out=logits)
    else:
        logits[_on(logits, places)] = torch.minimum(_at(logits, places), most)


def _deductions(row: SampledRow) -> dict[int, float]:
    """id → what OpenAI's `presence_penalty` and `frequency_penalty` subtract: they count generated tokens only."""
    presence, frequency = row.settings.presence_penalty, row.settings.frequency_penalty
    return {token: presence + frequency * count for token, count in Counter(row.ids[row.prompt_length :]).items()}


def _entries(
    logits: Tensor, entries: Sequence[tuple[int, Mapping[int, float]]]
) -> tuple[tuple[Tensor, Tensor], Tensor]:
    """Places of rows, each with values by id → the index of all of them in logits, and the values."""
    row = np.repeat([place for place, _ in entries], [len(of_row) for _, of_row in entries])
    ids = [*chain.from_iterable(of_row for _, of_row in entries)]
    values = [*chain.from_iterable(of_row.values() for _, of_row in entries)]
    return (_on(logits, row), _on(logits, ids)), torch.tensor(values, dtype=logits.dtype).to(logits.device)


def _at(values: Tensor, places: Sequence[int]) -> Tensor:
    """The rows of `values` at `places`, without a copy where these are all."""
    return values if len(places) == len(values) else values.index_select(0, _on(values, places))


def _on(where: Tensor, numbers: Sequence[int] | np.ndarray) -> Tensor:
    """Whole numbers on the device of `where`."""
    return torch.as_tensor(numbers, dtype=torch.long).to(where.device)


class LogProbabilities(NamedTuple):
    """Of the model itself, before any rule."""

    chosen: Tensor  # [tokens]
    top: Tensor  # [tokens, top], descending
    top_ids: Tensor  # [tokens, top]


def log_probabilities(logits: Tensor, ids: Tensor, top: int = 0) -> LogProbabilities:
    """logits [tokens, vocab_size], ids that followed [tokens] → their log-probabilities, and the `top` highest ones."""
    log = logits.float().log_softmax(-1)
    best = log.topk(min(top, log.size(-1)))
    return LogProbabilities(log.gather(-1, ids[:, None].clamp(min=0)).squeeze(-1), best.values, best.indices)


def prompt_log_probabilities(
    logits_of: Callable[[Tensor], Tensor], hidden: Tensor, ids: Tensor, top: int = 0, chunk: int = 64
) -> LogProbabilities:
    """hidden [tokens, width] and the ids that followed [tokens] → as `log_probabilities`.

    `logits_of`: the model's `logits`. Only [chunk, vocab_size] logits exist at a time.
    """
    found = [log_probabilities(logits_of(h), i, top) for h, i in zip(hidden.split(chunk), ids.split(chunk))]
    return LogProbabilities(*map(torch.cat, zip(*found)))
