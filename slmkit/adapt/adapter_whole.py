"""Fully trained modules of an adapter, such as embeddings of new tokens."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from slmkit.adapt.adapter_config import AdapterConfig
from slmkit.config import UserError
from slmkit.model.config import SLMConfig
from slmkit.model.decoder import Decoder
from slmkit.model.families import Family, family_of
from slmkit.model.files.directory import from_disk, stored_names, to_disk

EMBEDDING = "embedding.weight"
ANOTHER = "it is an adapter of another model"


def _stored(decoder: Decoder, config: SLMConfig) -> dict[str, list[str]]:
    """The reference's name of each tensor of the base model → ours."""
    with torch.device("meta"):
        return stored_names(Decoder(decoder.architecture).state_dict(), family_of(config.model_type))


def whole_to_disk(decoder: Decoder, config: SLMConfig, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The fully trained modules in `tensors`, under the reference's names.

    A tied embedding is stored twice, also as the head: peft copies the modules that it trains, and so unties them.
    """
    family = family_of(config.model_type)
    state = {name: tensor.detach() for name, tensor in decoder.state_dict().items()}
    whole = {
        theirs: to_disk(family, theirs, [tensors.get(name, state[name]) for name in ours])
        for theirs, ours in _stored(decoder, config).items()
        if any(name in tensors for name in ours)
    }
    if decoder.head is None and EMBEDDING in tensors:
        whole[f"{family.names['head']}.weight"] = tensors[EMBEDDING]
    return whole


def whole_from_disk(
    path: Path, decoder: Decoder, config: SLMConfig, described: AdapterConfig, whole: dict[str, Tensor]
) -> dict[str, Tensor]:
    """Fully trained tensors of a file, under our names. Raises `UserError` for those of another model."""
    family, wanted = family_of(config.model_type), _stored(decoder, config)
    shapes = {name: tensor.shape for name, tensor in decoder.state_dict().items()}
    if decoder.head is None:
        _expect_tied(path, family, described, whole)
    state: dict[str, Tensor] = {}
    for theirs, tensor in whole.items():
        if theirs not in wanted:
            raise UserError(f"{path}: holds {theirs!r}, which its base does not have: {ANOTHER}")
        ours, tensor = wanted[theirs], from_disk(family, theirs, tensor.float())
        rows = [shapes[name][0] for name in ours]
        expected = (sum(rows), *shapes[ours[0]][1:])
        if tensor.shape != expected:
            found = tuple(tensor.shape)
            raise UserError(f"{path}: {theirs!r} has shape {found}, its base's is {expected}: {ANOTHER}")
        state |= {name: part.contiguous() for name, part in zip(ours, tensor.split(rows))}
    return state


def _expect_tied(path: Path, family: Family, described: AdapterConfig, whole: dict[str, Tensor]) -> None:
    """For a base with a tied head: drop the head's copy. Raises `UserError` if it differs from the embedding."""
    embedding, head = (f"{family.names[name]}.weight" for name in ("embedding", "head"))
    copy, is_there = whole.pop(head, None), embedding in whole
    if is_there != (copy is not None or (is_there and described.ties_head)):
        raise UserError(
            f"{path}: changes only one of embedding and head, which share a matrix in its base: not supported"
        )
    if copy is not None and not torch.equal(copy, whole[embedding]):
        raise UserError(f"{path}: its embedding and its head differ, but share one matrix in its base: not supported")
