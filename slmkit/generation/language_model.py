"""What generation and evaluation ask of a model: a decoder is one, and so is an ensemble."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor


class LanguageModel(Protocol):
    """Token ids in, hidden states out; logits from hidden states.

    What the last dimension of hidden states means is the model's own affair: whoever holds them may choose positions
    among them, and hand those to `logits`. A cache is made by `new_cache`, and goes with the rows it was made for; its
    `repeat(times)` makes of each row so many.
    """

    training: bool

    @property
    def max_positions(self) -> int:
        """The longest text, in tokens."""

    @property
    def device(self) -> torch.device:
        """Where ids must be."""

    def __call__(self, ids: Tensor, cache: Any = None, documents: Tensor | None = None) -> Tensor:
        """ids [batch, new] → hidden states [batch, new, width]; with a cache, ids continue what it holds."""

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden states [..., width] → logits [..., vocab_size]."""

    def new_cache(self, batch_size: int, max_length: int, padding: Tensor | None = None) -> Any:
        """An empty cache; `padding` [batch] columns at the left of each row are not read."""

    def eval(self) -> Any: ...

    def train(self, mode: bool = True) -> Any: ...
