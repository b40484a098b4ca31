"""Memory profile of a run: the models and passes of its objective.

`slm plan`, a run's `plan.json` and `micro_batch_tokens: auto` all measure it by running it on meta tensors (`memory`).
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from slmkit.data.batch import Batch
from slmkit.model.architectures import Architecture
from slmkit.model.decoder import Decoder
from slmkit.model.sizes import LOGITS_AT_ONCE, parameter_count
from slmkit.training.losses import token_log_probabilities
from slmkit.training.objective import Objective, next_token

VALIDATION_ROWS = 8  # rows per validation batch

# An architecture or, if the model was modified, the model itself on the meta device.
Blueprint = Architecture | Decoder
Reading = Callable[[Decoder, Decoder | None, int], object]  # the model, the teacher or reference model, tokens per row


def meta_model_of(model: Decoder) -> Decoder:
    """A copy of the model on the meta device, with the same frozen parameters."""
    return _copy(model, lambda tensor: tensor.detach().to("meta"))


def built(blueprint: Blueprint, device: torch.device | str = "cpu") -> Decoder:
    """A model in training mode: new from an architecture, else a copy of the blueprint on `device`, all zeros."""
    if isinstance(blueprint, Architecture):
        return Decoder(blueprint)
    return _copy(blueprint, lambda tensor: torch.zeros(tensor.shape, dtype=tensor.dtype, device=device)).train()


def _copy(model: Decoder, make: Callable[[Tensor], Tensor]) -> Decoder:
    """A copy of a model with each tensor replaced by `make(tensor)`."""
    memo: dict[int, Any] = {}
    for tensor in itertools.chain(model.parameters(), model.buffers()):
        made = make(tensor)
        is_parameter = isinstance(tensor, nn.Parameter)
        memo[id(tensor)] = nn.Parameter(made, requires_grad=tensor.requires_grad) if is_parameter else made
    return copy.deepcopy(model, memo)


# -- forward passes between two steps ---------------------------------------------------------------------------------


def read_text(model: Decoder, beside: Decoder | None, length: int) -> None:
    """Forward pass of a validation batch, with as many logits as are held at once."""
    ids = torch.zeros(VALIDATION_ROWS, length, dtype=torch.long)
    hidden, labels = model(ids).flatten(0, 1), ids.flatten()[:LOGITS_AT_ONCE]
    nn.functional.cross_entropy(model.logits(hidden[:LOGITS_AT_ONCE]).float(), labels, reduction="sum")


def read_answers(model: Decoder, rows: int, length: int) -> None:
    """Log-probabilities of `rows` rows, with chunked logits."""
    ids = torch.zeros(rows, length, dtype=torch.long)
    token_log_probabilities(model(ids).flatten(0, 1), model.head_weight, ids.flatten(), model.architecture.logit_cap)


def write_answers(model: Decoder, prompts: int, count: int, length: int, new: int) -> None:
    """Generation for a batch of prompts of `length` tokens: `count` answers of `new` tokens to each, in the type of
    the weights.
    """
    with torch.autocast("cpu", enabled=False):
        cache = model.new_cache(prompts, length + new, padding=torch.zeros(prompts, dtype=torch.long))
        hidden = model(torch.zeros(prompts, length, dtype=torch.long), cache)[:, -1]
        cache.repeat(count)
        model.logits(hidden.repeat_interleave(count, dim=0))


# -- the description --------------------------------------------------------------------------------------------------


def plain(beside: Decoder | None) -> Objective:
    return next_token


def nothing_besides(rows: int, length: int) -> Mapping[str, Tensor]:
    return {}


@dataclass(frozen=True)
class MemoryProfile:
    """The trained model, the frozen model in memory, and the passes through both.

    `beside` is a frozen model on the meta device: a teacher or a reference model. `objective` makes a step's objective
    from it; `extra(rows, length)` gives the extra tensors required by the objective. `readings` are the forward passes
    between two steps. `longest` is the longest row in tokens, if rows are padded.
    """

    model: Blueprint
    beside: Decoder | None = None
    objective: Callable[[Decoder | None], Objective] = plain
    extra: Callable[[int, int], Mapping[str, Tensor]] = nothing_besides
    readings: tuple[Reading, ...] = (read_text,)
    longest: int | None = None

    @property
    def architecture(self) -> Architecture:
        return self.model if isinstance(self.model, Architecture) else self.model.architecture

    @property
    def trained(self) -> int:
        """Number of trained parameters."""
        if isinstance(self.model, Architecture):
            return parameter_count(self.model)
        return sum(parameter.numel() for parameter in self.model.parameters() if parameter.requires_grad)

    def built(self) -> tuple[Decoder, Decoder | None]:
        """The trained model, and the teacher or reference model."""
        return built(self.model), self.built_beside()

    def built_beside(self, device: torch.device | str = "cpu") -> Decoder | None:
        return None if self.beside is None else built(self.beside, device).eval().requires_grad_(False)

    def batch(self, rows: int, length: int) -> Batch:
        """A batch in which every token is learned: [rows, length]."""
        ids = torch.zeros(rows, length, dtype=torch.long)
        return Batch(ids, ids, rows * length, extra=self.extra(rows, length))

    def used(self, length: int) -> int:
        """Positions computed at most for a row of `length` tokens."""
        return min(length, self.longest or length)
