"""Merging models of one architecture into one, tensor by tensor: no more is held than one tensor of each.

TIES trims and DARE drops within each tensor, as a merge that is streamed can, and as mergekit does; the paper of TIES
ranks all weights of a model at once.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from slmkit.adapt.merge_methods import drop, elect, linear, slerp, task_arithmetic, trim
from slmkit.adapt.merge_recipe import MergeRecipe, at
from slmkit.config import UserError
from slmkit.model import SLMConfig
from slmkit.model.architecture import Architecture
from slmkit.model.config import TRAINING_FIELDS
from slmkit.model.directory import WEIGHTS, empty_decoder, open_weights, stored_names, write_configs
from slmkit.model.families import architecture_of, family_of
from slmkit.model.stored import DTYPES, StoredTensor, write_tensors

# What models may differ in and still be one architecture: it is that of the first which the result has.
MAY_DIFFER = TRAINING_FIELDS | {
    "initializer_range", "attention_dropout", "hidden_dropout", "bos_token_id", "eos_token_id", "pad_token_id",
}  # fmt: skip


@dataclass(frozen=True)
class Place:
    """One tensor of the result: where it is read in each model, how deep it sits (0 to 1), and what it is stored in."""

    base: StoredTensor | None
    parts: list[StoredTensor]
    depth: float
    dtype: torch.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        return self.parts[0].shape


@dataclass(frozen=True)
class Merge:
    """A merge that has been checked: all that is left is to read, compute and write."""

    recipe: MergeRecipe
    config: SLMConfig
    places: dict[str, Place]  # by the names of the result

    @property
    def dtype(self) -> torch.dtype:
        """What the widest of its tensors is stored in."""
        return functools.reduce(torch.promote_types, (place.dtype for place in self.places.values()))

    @property
    def parameters(self) -> int:
        return sum(torch.Size(place.shape).numel() for place in self.places.values())

    @property
    def bytes(self) -> int:
        return sum(torch.Size(place.shape).numel() * place.dtype.itemsize for place in self.places.values())

    def write(self, directory: Path, progress: Callable[[int], None] = lambda written: None) -> None:
        """Write config and weights into a fresh `directory`; `progress` gets the bytes of each tensor written.

        Raises `UserError` where a model's file is damaged or the disk does not take the result.
        """
        write_configs(self.config, directory, str(self.dtype).removeprefix("torch."))
        shapes = {name: (place.shape, place.dtype) for name, place in self.places.items()}
        try:
            write_tensors(directory / WEIGHTS, shapes, self._tensors(progress))
        except OSError as error:
            raise UserError(f"{directory}: the model cannot be written: {error}") from None

    def _tensors(self, progress: Callable[[int], None]) -> Iterator[tuple[str, Tensor]]:
        for name, place in self.places.items():
            tensor = merged_tensor(self.recipe, name, place).to(place.dtype)
            yield name, tensor
            progress(tensor.nbytes)


def plan_merge(recipe: MergeRecipe, directories: Mapping[str, Path]) -> Merge:
    """Open all models of a recipe, whose names `directories` leads to their directories, and compare them.

    Raises `UserError` for the first difference that keeps them from being merged, and for weights that sum to nothing.
    """
    names = [entry.model for entry in recipe.merged]
    configs = {name: SLMConfig.from_pretrained(directories[name]) for name in (*names, *_base(recipe))}
    config = configs[names[0]]
    for name, other in configs.items():
        _check_alike(names[0], config, name, other)
    family, decoder = family_of(config.model_type), empty_decoder(config)
    tensors = {name: open_weights(directories[name], decoder, family) for name in configs}
    for opened in tensors.values():
        for stored in opened.values():
            if stored.spelling not in DTYPES:
                raise UserError(
                    f"{stored.path}: {stored.name!r} is stored as {stored.spelling}: expected F32, F16 or BF16"
                )
    base = next((tensors[name] for name in _base(recipe)), None)
    places = {}
    for theirs, ours in stored_names(decoder.state_dict(), family).items():
        parts = [tensors[name][theirs] for name in names]
        depth = _depth(ours[0], decoder.architecture.depth)
        _weights(recipe, depth)
        origin = base[theirs] if base else None
        widest = [DTYPES[part.spelling] for part in (*parts, *([origin] if origin else []))]
        dtype = getattr(torch, recipe.dtype) if recipe.dtype else functools.reduce(torch.promote_types, widest)
        places[theirs] = Place(origin, parts, depth, dtype)
    return Merge(recipe, config, places)


def merged_tensor(recipe: MergeRecipe, name: str, place: Place) -> Tensor:
    """One tensor of the result, in float32; those of the models are read one after the other where that is enough."""
    weights, scale = _weights(recipe, place.depth), at(recipe.scale, place.depth)
    parts = map(_read, place.parts)
    if recipe.merge_method == "linear":
        return linear(parts, weights)
    if recipe.merge_method == "slerp":
        first, second = parts
        return slerp(first, second, at(recipe.t, place.depth))
    assert place.base is not None, "the recipe has a base"
    base = _read(place.base)
    if recipe.merge_method == "task_arithmetic":
        return task_arithmetic(base, parts, [scale * weight for weight in weights])
    drops = recipe.merge_method.startswith("dare")
    deltas = []
    for number, (part, entry) in enumerate(zip(parts, recipe.merged)):
        density = at(entry.density, place.depth)
        delta = part - base
        deltas.append(drop(delta, density, _seed(recipe.seed, number, name)) if drops else trim(delta, density))
    if recipe.merge_method == "dare_linear":
        change = linear(deltas, weights)
    else:
        change = elect(deltas, weights, recipe.is_normalized)
    return base.add(change, alpha=scale)


def _weights(recipe: MergeRecipe, depth: float) -> list[float]:
    """The weight of each model at a depth, divided by their sum where that is all that normalizing means."""
    weights = [at(entry.weight, depth) for entry in recipe.merged]
    if not recipe.is_normalized:
        return weights
    if min(weights) < 0 or not sum(weights):
        raise UserError(f"weights {weights}: normalize divides by their sum: give positive ones, or normalize: false")
    if recipe.merge_method.endswith("ties"):  # where signs are elected, the sum is another at every place
        return weights
    return [weight / sum(weights) for weight in weights]


def _base(recipe: MergeRecipe) -> list[str]:
    """The name of the model that task vectors are differences from, where there is one."""
    return [recipe.base_model] if recipe.method.needs_base and recipe.base_model else []


def _check_alike(first: str, config: SLMConfig, name: str, other: SLMConfig) -> None:
    """Raises `UserError` that names the first field in which two models are not of one architecture."""
    if _architecture(config) == _architecture(other):
        return
    for field in type(config).model_fields:
        ours, theirs = getattr(config, field), getattr(other, field)
        if field not in MAY_DIFFER and ours != theirs:
            raise UserError(
                f"{name}: {field} is {theirs!r}, and {ours!r} in {first}: only models of one architecture can be merged"
            )


def _architecture(config: SLMConfig) -> Architecture:
    """What a model computes, once it is trained."""
    return dataclasses.replace(architecture_of(config), attention_dropout=0.0, hidden_dropout=0.0)


def _depth(name: str, layers: int) -> float:
    """Where a tensor of the decoder sits: 0 at the embedding and in the first layer, 1 in the last and behind it."""
    parts = name.split(".")
    if parts[0] == "blocks":
        return int(parts[1]) / max(1, layers - 1)
    return 0.0 if parts[0] in ("embedding", "place") else 1.0


def _seed(seed: int, number: int, name: str) -> int:
    """Of what is dropped from a tensor of a model: the same in whatever order tensors are merged."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{number}/{name}".encode()).digest()[:7])


def _read(stored: StoredTensor) -> Tensor:
    return stored.read().float()
