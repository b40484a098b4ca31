"""What a run has in memory, in the one form in which every objective describes it.

`slm plan`, a run's `plan.json` and `micro_batch_tokens: auto` count it all in the same way: what is described here is
done on tensors that have shapes and no content (`memory`).
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
from slmkit.model.architecture import Architecture
from slmkit.model.decoder import Decoder
from slmkit.model.sizes import LOGITS_AT_ONCE, parameter_count
from slmkit.training.losses import token_log_probabilities
from slmkit.training.objective import Objective, next_token

VALIDATION_ROWS = 8  # that go through the model at once

# What a model is made of: its architecture, or where something has been changed in it, itself without its content.
Blueprint = Architecture | Decoder
Reading = Callable[[Decoder, Decoder | None, int], object]  # the model, the one beside it, tokens of a row


def meta_model_of(model: Decoder) -> Decoder:
    """The model as it is built now, what is trained of it and what is not, with tensors that have shapes alone."""
    return _copy(model, lambda tensor: tensor.detach().to("meta"))


def built(blueprint: Blueprint, device: torch.device | str = "cpu") -> Decoder:
    """A model in training, made anew of an architecture; else one like the blueprint on `device`, of zeros."""
    if isinstance(blueprint, Architecture):
        return Decoder(blueprint)
    return _copy(blueprint, lambda tensor: torch.zeros(tensor.shape, dtype=tensor.dtype, device=device)).train()


def _copy(model: Decoder, make: Callable[[Tensor], Tensor]) -> Decoder:
    """A copy of a model in which `make(tensor)` stands for each of its tensors."""
    memo: dict[int, Any] = {}
    for tensor in itertools.chain(model.parameters(), model.buffers()):
        made = make(tensor)
        is_parameter = isinstance(tensor, nn.Parameter)
        memo[id(tensor)] = nn.Parameter(made, requires_grad=tensor.requires_grad) if is_parameter else made
    return copy.deepcopy(model, memo)


# -- what is read between two steps -----------------------------------------------------------------------------------


def read_text(model: Decoder, beside: Decoder | None, length: int) -> None:
    """A batch of validation, with as many of its logits as are there together."""
    ids = torch.zeros(VALIDATION_ROWS, length, dtype=torch.long)
    hidden, labels = model(ids).flatten(0, 1), ids.flatten()[:LOGITS_AT_ONCE]
    nn.functional.cross_entropy(model.logits(hidden[:LOGITS_AT_ONCE]).float(), labels, reduction="sum")


def read_answers(model: Decoder, rows: int, length: int) -> None:
    """The log-probabilities of rows, whose logits are never held all at once."""
    ids = torch.zeros(rows, length, dtype=torch.long)
    token_log_probabilities(model(ids).flatten(0, 1), model.head_weight, ids.flatten(), model.architecture.logit_cap)


def write_answers(model: Decoder, prompts: int, count: int, length: int, new: int) -> None:
    """Prompts of `length` tokens read side by side, then `count` answers of `new` tokens to each, in the type of
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
    """What is trained, what is kept beside it, and what is done with both.

    `beside` is a frozen model without its content: a teacher, or the model as it was. `objective` says what a step
    minimises with one like it at hand, and `extra(rows, length)` is what comes with a batch besides. `readings` happen
    between two steps. `longest` is the longest row, in tokens, where rows are not filled to their ends.
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
        """How many parameters are trained."""
        if isinstance(self.model, Architecture):
            return parameter_count(self.model)
        return sum(parameter.numel() for parameter in self.model.parameters() if parameter.requires_grad)

    def built(self) -> tuple[Decoder, Decoder | None]:
        """The model in training, and the one beside it, which only reads."""
        return built(self.model), self.built_beside()

    def built_beside(self, device: torch.device | str = "cpu") -> Decoder | None:
        return None if self.beside is None else built(self.beside, device).eval().requires_grad_(False)

    def batch(self, rows: int, length: int) -> Batch:
        """Rows of which every token is learned."""
        ids = torch.zeros(rows, length, dtype=torch.long)
        return Batch(ids, ids, rows * length, extra=self.extra(rows, length))

    def used(self, length: int) -> int:
        """Of `length` tokens of a row, how many are computed at most."""
        return min(length, self.longest or length)
