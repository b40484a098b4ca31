"""Top-k, top-p, min-p and typical sampling, for all rows of a batch at once, each by its own values.

Each of them keeps the tokens whose probability is in some range, so it is enough to find the ends of the range, and
for that mostly the few likeliest tokens: sorting a whole vocabulary can take longer than the model. Tokens that tie
with the last one kept are kept too, so that no order among them matters.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from slmkit.generation.sampling_settings import SamplingSettings

FEW = 64  # likeliest tokens that are looked at first
BLOCK = 64  # values of which only the greatest is looked at, to find the likeliest tokens
# The value that changes nothing, and what stands for it among rows with other values.
NEUTRAL = {"top_k": (0, 2**53), "top_p": (1, math.inf), "min_p": (0, 0), "typical_p": (1, math.inf)}


def filtered(p: Tensor, settings: Sequence[SamplingSettings]) -> Tensor:
    """Probabilities p [rows, vocab_size] → the same, but 0 for what the filters remove [rows, vocab_size]."""
    values = {}
    for name, (neutral, stand_in) in NEUTRAL.items():
        column = [getattr(one, name) for one in settings]
        if any(value != neutral for value in column):
            numbers = [[stand_in if value == neutral else value] for value in column]
            values[name] = torch.tensor(numbers, dtype=torch.float64).to(p.device)  # [rows, 1]
    least, greatest = _range(p, values).split(1, dim=-1)
    kept = torch.ge(p, least, out=torch.empty_like(p)).mul_(p)  # 1 or 0 as float32: faster than `where`
    return kept.mul_(torch.le(p, greatest, out=torch.empty_like(p))) if "typical_p" in values else kept


def _range(p: Tensor, values: Mapping[str, Tensor]) -> Tensor:
    """p [rows, vocab_size], values of the filters in use [rows, 1] → least and greatest probability kept [rows, 2]."""
    head, _ = likeliest(p, FEW)
    beyond = (1 - total(head)).clamp(min=0)
    found, is_whole = _range_of_sorted(head, beyond, values)
    rest = (~is_whole).nonzero().squeeze(-1)
    if head.size(-1) < p.size(-1) and len(rest):
        of_rest = {name: column[rest] for name, column in values.items()}
        found[rest], _ = _range_of_sorted(_descending(p[rest]), torch.zeros_like(beyond[rest]), of_rest)
    return found


def _range_of_sorted(p: Tensor, beyond: Tensor, values: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """The n greatest probabilities [rows, n], descending, and the sum of all others [rows, 1] → least and greatest
    probability kept [rows, 2], and whether that is certain without looking at the others [rows]."""
    ends = p.cumsum(-1, dtype=torch.float64)  # [rows, n]
    kept = (p > 0).sum(-1, keepdim=True).clamp(min=1)  # of the likeliest tokens [rows, 1]
    for name, rule in RULES.items():
        if name in values:
            whole = ends.gather(-1, kept - 1) + beyond * (kept == p.size(-1))
            kept = torch.minimum(kept, rule(p, ends, whole, values[name])).clamp(min=1)
            kept = (p >= p.gather(-1, kept - 1)).sum(-1, keepdim=True).clamp(min=1)
    first, last = torch.zeros_like(kept), kept - 1
    if "typical_p" in values:
        first, last = _typical(p, kept, values["typical_p"] * ends.gather(-1, kept - 1))
    return p.gather(-1, torch.cat((last, first), -1)), (kept < p.size(-1)).squeeze(-1)


def top_k(p: Tensor, ends: Tensor, whole: Tensor, k: Tensor) -> Tensor:
    """How many tokens top-k keeps [rows, 1]."""
    return k.long()


def top_p(p: Tensor, ends: Tensor, whole: Tensor, share: Tensor) -> Tensor:
    """The least number of likeliest tokens with this share of the total (nucleus, arXiv:1904.09751)  [rows, 1].

    ends [rows, n]: sums of p up to each token; whole [rows, 1]: that of all tokens that the rules before it kept.
    """
    return torch.searchsorted(ends, share * whole) + 1


def min_p(p: Tensor, ends: Tensor, whole: Tensor, least: Tensor) -> Tensor:
    """The number of tokens at least `least` times as likely as the likeliest one (arXiv:2407.01082)  [rows, 1]."""
    return (p >= (least * p[:, :1]).float()).sum(-1, keepdim=True)


# In transformers' order; typical sampling is the last.
RULES: dict[str, Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]] = {"top_k": top_k, "top_p": top_p, "min_p": min_p}


def _typical(p: Tensor, kept: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
    """Of the first `kept` of p [rows, n], descending, those with surprise -log p nearest to the entropy, as many as
    have the total probability `wanted` [rows, 1] (arXiv:2202.00666) → places of the first and last of them [rows, 1].
    """
    p = p.double().masked_fill(torch.arange(p.size(-1), device=p.device) >= kept, 0)
    log = p.log()
    mean = total(p * log.nan_to_num(neginf=0)) / total(p)
    # Falls with p down to the mean, then rises, so the tokens kept are adjacent.
    distance, order = _stable_sort((log - mean).abs())
    number = torch.searchsorted(p.gather(-1, order).cumsum(-1), wanted)
    farthest = distance.gather(-1, torch.minimum(number, kept - 1))
    number = torch.searchsorted(distance, farthest, right=True).clamp(min=1) - 1  # with all that tie
    return order.cummin(-1).values.gather(-1, number), order.cummax(-1).values.gather(-1, number)


def _stable_sort(distance: Tensor) -> tuple[Tensor, Tensor]:
    """distance [rows, n] ascending, and its order. numpy's sort makes use of runs that are sorted already."""
    if distance.is_cuda:
        return distance.sort(dim=-1, stable=True)
    order = torch.from_numpy(np.argsort(distance.numpy(), axis=-1, kind="stable"))
    return distance.gather(-1, order), order


def _descending(p: Tensor) -> Tensor:
    """p [rows, n] with each row sorted. On a CPU by numpy, which is more than ten times as fast as torch."""
    if p.is_cuda:
        return p.sort(-1, descending=True).values
    return torch.from_numpy(np.sort(p.numpy(), axis=-1)).flip(-1)


def likeliest(values: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """values [rows, n] → the `count` highest, descending, and their indices, both [rows, min(count, n)].

    As `torch.topk`, which is slow for a large n: the highest values are in the blocks with the highest maxima.
    """
    n = values.size(-1)
    if n % BLOCK or n < 2 * count * BLOCK:
        return torch.topk(values, min(count, n))
    blocks = values.unflatten(-1, (-1, BLOCK))
    chosen = blocks.amax(-1).topk(count).indices  # [rows, count]
    best, place = pick(blocks, chosen).flatten(1).topk(count)
    return best, chosen.gather(-1, place // BLOCK) * BLOCK + place % BLOCK


def argmax(values: Tensor) -> Tensor:
    """values [rows, n] → the index of the greatest, of several the first [rows]. As `Tensor.argmax`, but faster."""
    if values.size(-1) % BLOCK:
        return values.argmax(-1)
    blocks = values.unflatten(-1, (-1, BLOCK))
    chosen = blocks.amax(-1).argmax(-1, keepdim=True)  # [rows, 1]
    return chosen.squeeze(-1) * BLOCK + pick(blocks, chosen).squeeze(1).argmax(-1)


def total(values: Tensor) -> Tensor:
    """values [rows, n] → the sum of each row, float64 [rows, 1].

    `Tensor.sum` divides a long row among threads if it is the only one, and so rounds otherwise than among others.
    """
    return values.cumsum(-1, dtype=torch.float64)[:, -1:]


def pick(blocks: Tensor, chosen: Tensor) -> Tensor:
    """blocks [rows, blocks, width], numbers of blocks [rows, count] → these blocks [rows, count, width]."""
    return blocks.gather(1, chosen[:, :, None].expand(-1, -1, blocks.size(-1)))
