"""An ensemble: several models with one vocabulary, whose probabilities are averaged at every position.

    p(token) = Σ w_i p_i(token),   Σ w_i = 1

It has a decoder's interface: its hidden states are the members' concatenated, its cache is a list of theirs.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from slmkit.config import UserError
from slmkit.model.cache import AT_ONCE, KVCache
from slmkit.model.decoder import Decoder
from slmkit.tokenizer import SLMTokenizer


class MemberCaches:
    """The KV cache of each member, with the methods of one."""

    def __init__(self, caches: Sequence[KVCache]) -> None:
        self.caches, self.max_length = caches, caches[0].max_length

    def __getitem__(self, slots: slice) -> MemberCaches:
        return MemberCaches([cache[slots] for cache in self.caches])

    def swap(self, a: int, b: int) -> None:
        for cache in self.caches:
            cache.swap(a, b)

    def length(self, slot: int) -> int:
        return self.caches[0].length(slot)

    def erase(self, slot: int) -> None:
        for cache in self.caches:
            cache.erase(slot)

    def truncate(self, slot: int, length: int) -> None:
        for cache in self.caches:
            cache.truncate(slot, length)

    def holds(self, slot: int, length: int) -> bool:
        return all(cache.holds(slot, length) for cache in self.caches)

    def copy_slot(self, slot: int, other: MemberCaches, source: int, length: int) -> None:
        for mine, theirs in zip(self.caches, other.caches):
            mine.copy_slot(slot, theirs, source, length)


class Ensemble(nn.Module):
    """The mean of the members' probabilities, weighted by `weights` (default: equal), which need not sum to one.

    Members may differ in everything but the vocabulary; the context is that of the shortest. Raises `UserError` for
    no members, vocabularies of different sizes, and weights that are not one positive number per member.
    """

    def __init__(self, members: Sequence[Decoder], weights: Sequence[float] | None = None) -> None:
        super().__init__()
        weights = [1.0] * len(members) if weights is None else list(weights)
        sizes = [member.architecture.vocab_size for member in members]
        if not members:
            raise UserError("an ensemble without models: name at least one")
        if len(set(sizes)) > 1:
            raise UserError(f"an ensemble needs one vocabulary, found models of {_listed(sizes)} tokens")
        if len(weights) != len(members) or not all(0 < weight < math.inf for weight in weights):
            raise UserError(f"weights {_listed(weights)}: expected {len(members)} positive numbers, one a model")
        self.members = list(members)
        self.registered = nn.ModuleList(members)  # for `to`, `eval` and `train`
        self.log_weights = [math.log(weight / sum(weights)) for weight in weights]
        self.widths = [member.architecture.width for member in members]
        self.max_positions, self.vocab_size = min(member.max_positions for member in members), sizes[0]
        self.ropes = [rope for member in members for rope in member.ropes]
        self.train(any(member.training for member in members))

    @property
    def device(self) -> torch.device:
        return self.members[0].device

    def new_cache(self, slots: int, max_length: int, at_once: int = AT_ONCE) -> MemberCaches:
        """An empty cache for each member."""
        return MemberCaches([member.new_cache(slots, max_length, at_once) for member in self.members])

    def cache_bytes(self, slots: int, max_length: int, at_once: int) -> int:
        """Size of the keys and values of such caches."""
        return sum(member.cache_bytes(slots, max_length, at_once) for member in self.members)

    def forward(
        self,
        ids: Tensor,
        cache: MemberCaches | None = None,
        documents: Tensor | None = None,
        attention_mask: Tensor | None = None,
    ) -> Tensor:
        """ids [batch, new] → the members' hidden states, concatenated [batch, new, sum of widths]."""
        caches: Sequence[KVCache | None] = cache.caches if cache else [None] * len(self.members)
        hidden = [member(ids, its, documents, attention_mask) for member, its in zip(self.members, caches)]
        return torch.cat(hidden, dim=-1)

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden states [..., sum of widths] → logits [..., vocab_size], float32, whose softmax is the mean.

        The mean's log-probabilities plus the mean of the members' log-normalizers. This shift changes no probability;
        the repetition penalty needs it, since it depends on the sign of the logits.
        """
        each = [member.logits(part).float() for member, part in zip(self.members, hidden.split(self.widths, dim=-1))]
        norms = torch.stack([logits.logsumexp(-1, keepdim=True) for logits in each])  # [members, ..., 1]
        mean = sum(norm * math.exp(weight) for norm, weight in zip(norms, self.log_weights))
        shares = [x + (mean - norm + weight) for x, norm, weight in zip(each, norms, self.log_weights)]
        return torch.stack(shares).logsumexp(0)


# A decoder or several, for callers that pass hidden states of one's `forward` to its `logits`, and caches from its
# `new_cache` to its `forward`.
LanguageModel = Decoder | Ensemble
Cache = Any  # a `KVCache`, or an ensemble's `MemberCaches`


@contextmanager
def evaluating(decoder: LanguageModel) -> Iterator[None]:
    """Evaluation and inference mode; visits no module of a model that is in evaluation mode, to save time."""
    was_training = decoder.training
    if was_training:
        decoder.eval()
    try:
        with torch.inference_mode():
            yield
    finally:
        if was_training:
            decoder.train()


def together(decoders: Sequence[Decoder]) -> LanguageModel:
    """The model itself if there is one, else the ensemble with equal weights."""
    return decoders[0] if len(decoders) == 1 else Ensemble(decoders)


def common_tokenizer(directories: Sequence[str | Path]) -> SLMTokenizer:
    """The tokenizer of the first directory. Raises `UserError` if another's ids differ, or if there is no directory."""
    if not directories:
        raise UserError("an ensemble without models: name at least one")
    first, *others = directories
    tokenizer = SLMTokenizer.from_pretrained(first)
    for directory in others:
        other = SLMTokenizer.from_pretrained(directory)
        if other.fingerprint != tokenizer.fingerprint:
            raise UserError(
                f"{directory}: its tokenizer ({len(other):,} tokens) is not that of {first} ({len(tokenizer):,} "
                "tokens), so the same ids mean different texts: use models of one tokenizer"
            )
    return tokenizer


def _listed(values: Sequence[float]) -> str:
    return ", ".join(f"{value:,}" for value in values) or "none"
