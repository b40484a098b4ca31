"""Sampling of the next token, each row of a batch by its own settings.

Rules are functions from logits to logits, applied in this order: ids that are not allowed, logit bias, repetition
penalty, presence and frequency penalties, and, unless the row is greedy, temperature, top-k, top-p, min-p and typical
sampling, as in transformers. One uniform number per token then decides, a function of the row's seed and the token's
number alone. So what a row gets depends on nothing else in the batch.
"""

from __future__ import annotations

import secrets
import struct
from collections import Counter
from collections.abc import Callable, Sequence
from hashlib import blake2b
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from slmkit.generation.sampling_settings import SamplingSettings

# logits [rows, vocab_size], the rows' values of the setting [rows, 1] → logits [rows, vocab_size]
Rule = Callable[[Tensor, Tensor], Tensor]
NEVER = -torch.inf
FEW = 64  # candidates that are sorted first: sorting a whole vocabulary can take longer than the model
BLOCK = 512  # probabilities that `draw` sums at a time
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
    """The uniform number in [0, 1) that decides token `number` of a text, in steps of 2^-53."""
    return (_hashed(seed, number, b"token") >> 11) * 2.0**-53


def _hashed(seed: int, number: int, purpose: bytes) -> int:
    """64 bits: a cryptographic hash, so that neighbouring seeds and numbers are as unrelated as any others."""
    return int.from_bytes(blake2b(struct.pack("<QQ", seed, number), digest_size=8, person=purpose).digest(), "little")


def sample(logits: Tensor, rows: Sequence[SampledRow]) -> Tensor:
    """logits [rows, vocab_size] → the next id of each row [rows], or a key of `FAULTS` for a row with an error."""
    logits = logits.float()
    shaped = penalized(logits, rows)
    sampled = [place for place, row in enumerate(rows) if not row.settings.is_greedy]
    best, chosen = shaped.max(-1)
    if sampled:
        drawn = [rows[place] for place in sampled]
        chosen = chosen.index_put((_on(logits, sampled),), draw(_filtered(_at(shaped, sampled), drawn), points(drawn)))
    chosen = chosen.masked_fill(best == NEVER, -2)
    return chosen.masked_fill(~logits.amax(-1).isfinite(), -1)  # amax propagates NaN


def probabilities(logits: Tensor, rows: Sequence[SampledRow]) -> Tensor:
    """logits [rows, vocab_size] → the distribution that `sample` draws from [rows, vocab_size], one-hot if greedy.

    A row with an error is all NaN.
    """
    logits = logits.float()
    shaped = penalized(logits, rows)
    best = shaped.argmax(-1, keepdim=True)
    greedy = [place for place, row in enumerate(rows) if row.settings.is_greedy]
    sampled = [place for place, row in enumerate(rows) if not row.settings.is_greedy]
    found = torch.zeros_like(shaped)
    if greedy:
        at = _on(logits, greedy)
        found[at] = found[at].scatter(-1, best[at], 1)
    if sampled:
        found[_on(logits, sampled)] = _filtered(_at(shaped, sampled), [rows[place] for place in sampled])
    wrong = ~(shaped.amax(-1).isfinite() & logits.amax(-1).isfinite())
    return found.masked_fill(wrong[:, None], torch.nan)


def points(rows: Sequence[SampledRow]) -> list[float]:
    """The uniform number of each row's next token."""
    return [uniform(row.seed, len(row.ids) - row.prompt_length) for row in rows]


def draw(probabilities: Tensor, points: Sequence[float]) -> Tensor:
    """probabilities [rows, n], not necessarily of sum 1 → for each row the index at its point of the unit line [rows].

    Inverse transform sampling in float64: the block that contains the point, then the place in it. An index of
    probability 0 has an empty interval.
    """
    rows, n = probabilities.shape
    if missing := -n % BLOCK:
        probabilities = F.pad(probabilities, (0, missing))
    blocks = probabilities.view(rows, -1, BLOCK)
    ends = blocks.sum(-1).double().cumsum(-1)  # [rows, blocks]
    point = torch.tensor(points, dtype=torch.float64).to(ends.device)[:, None]
    block, inside = _interval(ends, point)  # [rows, 1]
    ends = blocks.gather(1, block[:, :, None].expand(-1, -1, BLOCK)).squeeze(1).double().cumsum(-1)  # [rows, BLOCK]
    return (block * BLOCK + _interval(ends, inside)[0]).squeeze(-1)


def _interval(ends: Tensor, point: Tensor) -> tuple[Tensor, Tensor]:
    """ends [rows, n] of intervals, point [rows, 1] in [0, 1) → the interval at that share of the whole line [rows, 1],
    and where in it the point is, again in [0, 1)."""
    whole = ends[:, -1:]
    place = torch.minimum(point * whole, whole.nextafter(torch.zeros_like(whole)))  # rounding can give the end
    index = torch.searchsorted(ends, place, right=True).clamp(max=ends.size(-1) - 1)  # beyond it: NaN
    start = F.pad(ends, (1, 0)).gather(-1, index)
    return index, (place - start) / (ends.gather(-1, index) - start)


def penalized(logits: Tensor, rows: Sequence[SampledRow]) -> Tensor:
    """logits [rows, vocab_size] after the rules that greedy rows obey too."""
    masks = {place: row.allowed for place, row in enumerate(rows) if row.allowed is not None}
    if masks:
        logits = _changed(logits, list(masks), only, _stacked(list(masks.values())))
    bias = [row.settings.logit_bias for row in rows]
    if any(bias):
        at, values = _flat([(list(one), list(one.values())) for one in bias], logits)
        logits = logits.index_put(at, logits[at] + values)
    penalty = [row.settings.repetition_penalty for row in rows]
    if any(one != 1 for one in penalty):
        said = [[] if one == 1 else sorted(set(row.ids)) for one, row in zip(penalty, rows)]
        at, values = _flat([(ids, [one] * len(ids)) for ids, one in zip(said, penalty)], logits)
        logits = logits.index_put(at, repetition_penalty(logits[at], values))
    deductions = [_deductions(row) for row in rows]
    if any(deductions):
        at, values = _flat([(list(one), list(one.values())) for one in deductions], logits)
        logits = logits.index_put(at, logits[at] - values)
    return logits


def only(logits: Tensor, allowed: Tensor) -> Tensor:
    """Keep the allowed ids, bool [rows or 1, vocab_size]."""
    return logits.masked_fill(~allowed, NEVER)


def repetition_penalty(logits: Tensor, penalty: Tensor) -> Tensor:
    """Logits of tokens already in the text, positive ones divided by `penalty`, negative ones multiplied by it
    (arXiv:1909.05858)."""
    return torch.where(logits < 0, logits * penalty, logits / penalty)


def _deductions(row: SampledRow) -> dict[int, float]:
    """id → what OpenAI's `presence_penalty` and `frequency_penalty` subtract; they count the generated tokens only."""
    presence, frequency = row.settings.presence_penalty, row.settings.frequency_penalty
    if presence == frequency == 0:
        return {}
    counts = Counter(row.ids[row.prompt_length :])
    return {token: presence + frequency * count for token, count in counts.items()}


def temperature(logits: Tensor, t: Tensor) -> Tensor:
    """Divide all logits by t: below 1 sharpens the distribution, above 1 flattens it. The greatest becomes 0."""
    return (logits - logits.amax(-1, keepdim=True)) / t.float()


def top_k(logits: Tensor, k: Tensor) -> Tensor:
    """Keep the k most likely tokens, and all that tie with the last of them."""
    k = k.long().clamp(max=logits.size(-1))
    last = likeliest(logits, int(k.max()))[0].gather(-1, k - 1)  # [rows, 1]
    return logits.masked_fill(logits < last, NEVER)


def top_p(logits: Tensor, p: Tensor) -> Tensor:
    """Keep the smallest set of most likely tokens with total probability p, and all that tie with the last of them
    (nucleus, arXiv:1904.09751)."""
    return logits.masked_fill(logits < _last_within(logits.softmax(-1), logits, p), NEVER)


def min_p(logits: Tensor, p: Tensor) -> Tensor:
    """Keep tokens at least p times as likely as the most likely one (arXiv:2407.01082)."""
    return logits.masked_fill(logits < logits.amax(-1, keepdim=True) + p.log().float(), NEVER)


def typical_p(logits: Tensor, p: Tensor) -> Tensor:
    """Keep the tokens whose surprise -log p is nearest to the entropy, until their total probability is p, and all
    that tie with the last of them (arXiv:2202.00666)."""
    # The entropy is the mean of -log p, so the distance is that of the logit from the mean of the logits.
    chances, exact = logits.softmax(-1), logits.double()
    distance = (exact - (chances * exact).nansum(-1, keepdim=True)).abs()
    return logits.masked_fill(-distance < _last_within(chances, -distance, p), NEVER)


def _last_within(chances: Tensor, scores: Tensor, p: Tensor) -> Tensor:
    """The least score among the highest ones whose total probability reaches p [rows, 1].

    chances [rows, vocab_size]: the probabilities. Sorts a few candidates first, and more for the rows that need them.
    """
    count, vocab_size = FEW, scores.size(-1)
    least = scores.new_empty(len(p), 1)
    left = torch.arange(len(p), device=p.device)
    while True:
        best, ids = likeliest(scores[left], count)
        before = F.pad(chances[left].gather(-1, ids).double().cumsum(-1), (1, 0))[:, :-1]
        number = (before < p[left]).sum(-1, keepdim=True)  # of tokens to keep [rows, 1]
        least[left] = best.gather(-1, number.clamp(min=1) - 1)
        left = left[number.squeeze(-1) == best.size(-1)]
        if count >= vocab_size or not len(left):
            return least
        count *= 8


def likeliest(scores: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The `count` highest scores of each row, descending, and their ids: both [rows, min(count, vocab_size)]."""
    return scores.topk(min(count, scores.size(-1)))


# The rules of sampled rows with their value that changes nothing, in transformers' order.
FILTERS: tuple[tuple[str, float, Rule], ...] = (
    ("temperature", 1, temperature),
    ("top_k", 0, top_k),
    ("top_p", 1, top_p),
    ("min_p", 0, min_p),
    ("typical_p", 1, typical_p),
)


def _filtered(logits: Tensor, rows: Sequence[SampledRow]) -> Tensor:
    """logits [rows, vocab_size] of sampled rows → probabilities after all their rules."""
    for name, neutral, rule in FILTERS:
        values = {place: getattr(row.settings, name) for place, row in enumerate(rows)}
        values = {place: value for place, value in values.items() if value != neutral}
        if values:
            column = torch.tensor(list(values.values()), dtype=torch.float64)[:, None].to(logits.device)
            logits = _changed(logits, list(values), rule, column)
    return logits.softmax(-1)


def _changed(logits: Tensor, places: list[int], rule: Rule, values: Tensor) -> Tensor:
    """logits [rows, vocab_size] with `rule` applied to the rows at `places`, which `values` are for."""
    if len(places) == len(logits):
        return rule(logits, values)
    at = _on(logits, places)
    return logits.index_copy(0, at, rule(logits[at], values))


def _at(logits: Tensor, places: list[int]) -> Tensor:
    return logits if len(places) == len(logits) else logits[_on(logits, places)]


def _on(logits: Tensor, places: Sequence[int]) -> Tensor:
    return torch.tensor(places, dtype=torch.long).to(logits.device)


def _stacked(masks: list[Tensor]) -> Tensor:
    """bool [rows, vocab_size], or [1, vocab_size] if all are the same."""
    return masks[0][None] if all(mask is masks[0] for mask in masks) else torch.stack(masks)


def _flat(entries: Sequence[tuple[list[int], list[float]]], logits: Tensor) -> tuple[tuple[Tensor, Tensor], Tensor]:
    """ids and values of each row → the index (row, id) of all of them, and their values."""
    places = np.repeat(np.arange(len(entries)), [len(ids) for ids, _ in entries])
    ids = [one for ids, _ in entries for one in ids]
    values = torch.tensor([one for _, values in entries for one in values], dtype=torch.float32)
    return (_on(logits, places.tolist()), _on(logits, ids)), values.to(logits.device)


class LogProbabilities(NamedTuple):
    """Of the model itself, before any rule."""

    chosen: Tensor  # [tokens]
    top: Tensor  # [tokens, top], descending
    top_ids: Tensor  # [tokens, top]


def log_probabilities(logits: Tensor, ids: Tensor, top: int = 0) -> LogProbabilities:
    """logits [tokens, vocab_size], ids that followed [tokens] → their log-probabilities, and the `top` highest ones."""
    logits = logits.float()
    norm = logits.logsumexp(-1, keepdim=True)
    best, top_ids = likeliest(logits, top)
    return LogProbabilities((logits.gather(-1, ids[:, None].clamp(min=0)) - norm).squeeze(-1), best - norm, top_ids)


def prompt_log_probabilities(
    logits_of: Callable[[Tensor], Tensor], hidden: Tensor, ids: Tensor, top: int = 0, chunk: int = 64
) -> LogProbabilities:
    """hidden [tokens, width] and the ids that followed [tokens] → as `log_probabilities`.

    `logits_of`: the model's `logits`. Only [chunk, vocab_size] logits exist at a time.
    """
    found = [log_probabilities(logits_of(h), i, top) for h, i in zip(hidden.split(chunk), ids.split(chunk))]
    return LogProbabilities(*map(torch.cat, zip(*found)))
