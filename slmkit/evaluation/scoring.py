"""Log-probabilities of continuations: a context is read once, and all its continuations in the same pass.

They stand one after another behind their context, in a row of the batch. Each has the positions that follow the context
and attends to the context and to itself, as the branches of a tree do (Miao et al. 2023, arXiv:2305.09781), so that it
gets what it would get alone. Only where a continuation is predicted are logits computed.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from slmkit.config import UserError
from slmkit.generation.ensemble import LanguageModel, evaluating
from slmkit.generation.sampling import FAULTS, argmax
from slmkit.model.attend import AttentionInputs
from slmkit.model.decoder import Decoder

# Tokens of a batch. A small model on a CPU is not faster with more; a GPU is not full with fewer.
AT_ONCE = {"cpu": 1_024, "cuda": 65_536}
PREDICTED_AT_ONCE = 128  # tokens whose logits exist at a time
Ids = tuple[int, ...]
Score = tuple[float, bool]  # log-probability in nats, and whether every token is the likeliest


@dataclass(frozen=True)
class Tree:
    """A context and continuations of it, all of at least one token. The last token of each is predicted, not read."""

    context: Ids
    branches: tuple[Ids, ...]

    @property
    def size(self) -> int:
        """Tokens that are read."""
        return len(self.context) + sum(len(branch) - 1 for branch in self.branches)

    @property
    def ids(self) -> list[int]:
        return [*self.context, *itertools.chain.from_iterable(branch[:-1] for branch in self.branches)]

    @property
    def positions(self) -> list[int]:
        after = len(self.context)
        return [*range(after), *(after + place for branch in self.branches for place in range(len(branch) - 1))]

    @property
    def branch_numbers(self) -> list[int]:
        """Of each token that is read; 0: the context."""
        numbered = enumerate(self.branches, 1)
        return [0] * len(self.context) + [number for number, branch in numbered for _ in branch[1:]]

    @property
    def predicted_from(self) -> list[int]:
        """The column whose hidden state predicts each token of all branches."""
        ends = itertools.accumulate((len(branch) - 1 for branch in self.branches), initial=len(self.context))
        last = len(self.context) - 1
        return [
            column
            for branch, start in zip(self.branches, ends)
            for column in (last, *range(start, start + len(branch) - 1))
        ]


def score(decoder: LanguageModel, trees: Sequence[Tree]) -> Iterator[tuple[int, list[Score]]]:
    """The number of each tree and the score of its branches, batch by batch, the longest first.

    Raises `UserError` for logits that are not finite. An ensemble and a model that is sharded among processes, whose
    `forward` alone knows what to do, read each branch in a row of its own, as does a model whose rotation depends on
    the length of the text, which padding would change.
    """
    at_once = AT_ONCE.get(decoder.device.type, AT_ONCE["cpu"])
    of_length = any(rope.depends_on_length for rope in decoder.ropes)
    with evaluating(decoder):
        if isinstance(decoder, Decoder) and not hasattr(decoder, "unshard") and not of_length:
            for batch in batches(trees, at_once):
                yield from zip(batch, _score(decoder, [trees[number] for number in batch]))
            return
        rows = [Tree(tree.context, (branch,)) for tree in trees for branch in tree.branches]
        found = dict[int, Score]()
        for batch in batches(rows, 1 if of_length else at_once):
            found |= zip(batch, (one for (one,) in _score(decoder, [rows[number] for number in batch])))
        each = (found[number] for number in range(len(rows)))
        yield from ((number, [*itertools.islice(each, len(tree.branches))]) for number, tree in enumerate(trees))


def batches(trees: Sequence[Tree], at_once: int) -> Iterator[list[int]]:
    """Numbers of trees of about the same length, which need little padding: at most `at_once` tokens, or one tree."""
    batch, longest = list[int](), 0
    for number in sorted(range(len(trees)), key=lambda number: -trees[number].size):
        longest = longest or trees[number].size
        if batch and (len(batch) + 1) * longest > at_once:
            yield batch
            batch, longest = [], trees[number].size
        batch.append(number)
    if batch:
        yield batch


def _score(decoder: LanguageModel, trees: Sequence[Tree]) -> list[list[Score]]:
    ids = _padded([tree.ids for tree in trees], 0, decoder.device)  # [trees, columns]
    if isinstance(decoder, Decoder) and any(len(branch) > 1 for tree in trees for branch in tree.branches[1:]):
        positions = _padded([tree.positions for tree in trees], 0, decoder.device)
        branches = _padded([tree.branch_numbers for tree in trees], -1, decoder.device)
        hidden = decoder.hidden_states(ids, positions, _inputs(decoder, positions, branches), None)
    else:
        hidden = decoder(ids)  # no token sees another branch; padding is behind all tokens
    columns = [tree.predicted_from for tree in trees]
    rows = [row for row, found in enumerate(columns) for _ in found]
    states = hidden[rows, [*itertools.chain.from_iterable(columns)]]  # [predicted, width]
    wanted = [token for tree in trees for branch in tree.branches for token in branch]
    log_p, is_best = _predicted(decoder, states, torch.tensor(wanted, device=decoder.device))
    each, best = iter(log_p), iter(is_best)
    return [
        [(math.fsum(itertools.islice(each, len(b))), all([*itertools.islice(best, len(b))])) for b in tree.branches]
        for tree in trees
    ]


def _inputs(decoder: Decoder, positions: Tensor, branches: Tensor) -> list[AttentionInputs]:
    """positions, branches [trees, columns] → the mask and rotations of each kind of layer."""
    columns = torch.arange(positions.size(1), device=positions.device)
    q, k = branches[:, :, None], branches[:, None]  # [trees, columns, 1], [trees, 1, columns]
    sees = (columns <= columns[:, None]) & ((k == 0) | (k == q))  # [trees, queries, keys]
    inputs = []
    for kind in decoder.kinds:
        rotation = None
        if kind.rope is not None:
            rotation = decoder.rotary[decoder.ropes.index(kind.rope)](positions, positions.amax(1) + 1)
        near = sees if kind.window is None else sees & (positions[:, None] > positions[:, :, None] - kind.window)
        inputs.append(AttentionInputs(rotation, rotation, mask=near[:, None]))
    return inputs


def _predicted(decoder: LanguageModel, states: Tensor, wanted: Tensor) -> tuple[list[float], list[bool]]:
    """Hidden states [predicted, width] and the ids that followed → log-probability of each, and if it was likeliest."""
    log_p, is_best = list[float](), list[bool]()
    for part, ids in zip(states.split(PREDICTED_AT_ONCE), wanted.split(PREDICTED_AT_ONCE)):
        logits = decoder.logits(part)
        logits = logits if logits.dtype == torch.float64 else logits.float()
        losses = F.cross_entropy(logits, ids, reduction="none")
        if not losses.isfinite().all():
            raise UserError(FAULTS[-1])
        log_p += (-losses).tolist()
        is_best += (argmax(logits) == ids).tolist()
    return log_p, is_best


def _padded(rows: Sequence[Sequence[int]], padding: int, device: torch.device) -> Tensor:
    """→ int64 [rows, longest], filled on the right."""
    longest = max(map(len, rows))
    return torch.tensor([[*row, *[padding] * (longest - len(row))] for row in rows], device=device)
