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
TINY = 2.0**-126  # what is less likely counts as impossible; smaller numbers of float32 are slow
MOST = 2**53  # all greater whole numbers are this one, so that float64 and int64 can hold it
# The value that changes nothing, and what stands for it among rows with other values.
NEUTRAL = {"top_k": (0, MOST), "top_p": (1, math.inf), "min_p": (0, 0), "typical_p": (1, math.inf)}


def filtered(p: Tensor, settings: Sequence[SamplingSettings]) -> Tensor:
    """Probabilities p [rows, vocab_size] → the same, but 0 for what the filters remove [rows, vocab_size].

    As in transformers, typical sampling is the last, and sees what the others keep.
    """
    values = {}
    for name, (neutral, stand_in) in NEUTRAL.items():
        column = [getattr(one, name) for one in settings]
        if any(value != neutral for value in column):
            numbers = [[stand_in if value == neutral else min(value, MOST)] for value in column]
            values[name] = torch.tensor(numbers, dtype=torch.float64).to(p.device)  # [rows, 1]
    typical = values.pop("typical_p", None)
    if values:
        least = _range(p, least_probability, values)
        p = torch.ge(p, least, out=torch.empty_like(p)).mul_(p)  # 1 or 0 as float32: faster than `where`
    if typical is not None:
        whole = total(p)
        mean = total(p.clamp(min=TINY).log().mul_(p)) / whole  # of log p
        ends = _range(p, typical_range, {"wanted": typical * whole, "mean": mean})
        p = torch.ge(p, ends[:, :1], out=torch.empty_like(p)).mul_(p)
        p = torch.le(p, ends[:, 1:], out=torch.empty_like(p)).mul_(p)
    return p


def least_probability(p: Tensor, values: Mapping[str, Tensor]) -> Tensor:
    """Probabilities of the likeliest n tokens, descending [rows, n] → the least that is kept [rows, 1].

    top_p: the fewest likeliest tokens with this share of the total (nucleus, arXiv:1904.09751); min_p: tokens at least
    this many times as likely as the likeliest one (arXiv:2407.01082).
    """
    n, found = p.size(-1), []
    if "top_k" in values:
        found.append(p.gather(-1, values["top_k"].long().clamp(max=n) - 1))
    if "top_p" in values:
        share, ends = values["top_p"], p.cumsum(-1, dtype=torch.float64)
        if found:  # of what top-k keeps; else of all, whose total is 1
            kept = (p >= found[0]).sum(-1, keepdim=True).clamp(min=1)
            share = share * torch.where(kept < n, ends.gather(-1, kept - 1), 1)
        found.append(p.gather(-1, torch.searchsorted(ends, share).clamp(max=n - 1)))
    if "min_p" in values:
        found.append((values["min_p"] * p[:, :1]).float())
    return torch.cat(found, -1).amax(-1, keepdim=True).clamp(min=TINY)


def typical_range(p: Tensor, values: Mapping[str, Tensor]) -> Tensor:
    """The likeliest n tokens' probabilities, descending [rows, n] → least and greatest of those kept [rows, 2]: those
    with log p nearest to its mean, as many as have the wanted total (arXiv:2202.00666)."""
    above = p.double().log() - values["mean"]
    distance, order = _stable_sort(above.abs())
    sums = p.gather(-1, order).cumsum(-1, dtype=torch.float64)
    number = torch.searchsorted(sums, values["wanted"]).clamp(max=p.size(-1) - 1)
    farthest = distance.gather(-1, number)
    first = (above > farthest).sum(-1, keepdim=True)
    last = p.size(-1) - 1 - (above < -farthest).sum(-1, keepdim=True)
    return p.gather(-1, torch.cat((last, first), -1)).clamp(min=TINY)


def _range(p: Tensor, find: Callable[[Tensor, Mapping[str, Tensor]], Tensor], values: Mapping[str, Tensor]) -> Tensor:
    """What `find` says of p [rows, vocab_size] when sorted. Where a few tokens show that all others are removed, only
    these are sorted. In typical sampling too: if the least likely of them is not kept, it is below the mean."""
    few = greatest(p, FEW)
    found = find(few, values)
    if few.size(-1) < p.size(-1):
        rest = (few[:, -1] >= found[:, 0]).nonzero().squeeze(-1)
        if len(rest):
            found[rest] = find(_descending(p[rest]), {name: column[rest] for name, column in values.items()})
    return found


def _stable_sort(distance: Tensor) -> tuple[Tensor, Tensor]:
    """distance [rows, n] ascending, and its order. numpy's sort makes use of parts that are sorted already."""
    if distance.is_cuda:
        return distance.sort(dim=-1, stable=True)
    order = torch.from_numpy(np.argsort(distance.numpy(), axis=-1, kind="stable"))
    return distance.gather(-1, order), order


def _descending(p: Tensor) -> Tensor:
    """p [rows, n] with each row sorted. On a CPU by numpy, which is more than ten times as fast as torch."""
    if p.is_cuda:
        return p.sort(-1, descending=True).values
    return torch.from_numpy(np.sort(p.numpy(), axis=-1)).flip(-1)


def greatest(values: Tensor, count: int) -> Tensor:
    """values [rows, n] → the `count` greatest, descending [rows, min(count, n)].

    As `torch.topk`, which is slow for a large n: the greatest values are in the blocks with the greatest maxima. On a
    CPU numpy is faster, by up to five times for many rows.
    """
    n = values.size(-1)
    if n % BLOCK == 0 and n > 8 * count * BLOCK:
        blocks = values.unflatten(-1, (-1, BLOCK))
        return greatest(pick(blocks, blocks.amax(-1).topk(count, sorted=False).indices).flatten(1), count)
    if values.is_cuda or n <= count:
        return values.topk(min(count, n)).values
    return _descending(torch.from_numpy(np.partition(values.numpy(), n - count)[:, n - count :]))


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
    if values.size(-1) % BLOCK == 0:
        values = values.unflatten(-1, (-1, BLOCK)).sum(-1)
    return values.cumsum(-1, dtype=torch.float64)[:, -1:]


def pick(blocks: Tensor, chosen: Tensor) -> Tensor:
    """blocks [rows, blocks, width], numbers of blocks [rows, count] → these blocks [rows, count, width]."""
    return blocks.gather(1, chosen[:, :, None].expand(-1, -1, blocks.size(-1)))
