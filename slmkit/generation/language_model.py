"""The interface that generation and evaluation require of a model; decoders and ensembles have it."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor


class LanguageModel(Protocol):
    """Token ids → hidden states → logits.

    Callers may index positions of the hidden states and pass those to `logits`, but not interpret the last dimension.
    A cache comes from `new_cache` and belongs to one batch.
    `cache.repeat(times)` repeats each sequence of it.
    """

    training: bool

    @property
    def max_positions(self) -> int:
        """The context length in tokens."""

    @property
    def device(self) -> torch.device:
        """The device for ids."""

    def __call__(self, ids: Tensor, cache: Any = None, documents: Tensor | None = None) -> Tensor:
        """ids [batch, new] → hidden states [batch, new, width]; with a cache, ids continue the cached ones."""

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden states [..., width] → logits [..., vocab_size]."""

    def new_cache(self, batch_size: int, max_length: int, padding: Tensor | None = None) -> Any:
        """An empty cache; padding [batch]: tokens at the left of each sequence to be masked."""

    def eval(self) -> Any: ...

    def train(self, mode: bool = True) -> Any: ...
