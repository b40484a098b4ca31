"""Merging models of one architecture, tensor by tensor and some rows at a time.

Memory holds one tensor of the result, and for TIES the magnitudes of one task vector.

TIES trims and DARE drops within each tensor, as in mergekit, so that the merge can be streamed; the paper of TIES ranks
all weights of a model at once.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from slmkit.adapt.merge_methods import arc, drop, elect, least_kept, linear, task_arithmetic, trim
from slmkit.adapt.merge_recipe import MergeRecipe, at
from slmkit.config import UserError
from slmkit.model.architectures import Architecture, architecture_of
from slmkit.model.config import TRAINING_FIELDS, SLMConfig
from slmkit.model.families import family_of
from slmkit.model.files.directory import WEIGHTS, empty_decoder, open_weights, stored_names, write_configs
from slmkit.model.files.stored import DTYPES, StoredTensor, expect_finite, write_tensors

# Config fields in which merged models may differ; the result has those of the first.
MAY_DIFFER = TRAINING_FIELDS | {
    "initializer_range", "attention_dropout", "hidden_dropout", "bos_token_id", "eos_token_id", "pad_token_id",
}  # fmt: skip


NUMBERS = 1 << 20  # elements of a tensor merged at a time


@dataclass(frozen=True)
class Place:
    """One tensor of the result: its source in each model, its depth (0 to 1), and its stored type."""

    base: StoredTensor | None
    parts: list[StoredTensor]
    depth: float
    dtype: torch.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        return self.parts[0].shape

    @property
    def slices(self) -> list[slice]:
        """Slices of all rows in order, each of at most `NUMBERS` elements but at least one row."""
        rows = self.shape[0]
        step = max(1, NUMBERS * rows // torch.Size(self.shape).numel())
        return [slice(start, min(start + step, rows)) for start in range(0, rows, step)]

    def read(self, rows: slice) -> list[Tensor]:
        """The rows [rows, ...] of all models, base first, in float32. Raises `UserError` for NaN or infinity."""
        sources = (*([self.base] if self.base else []), *self.parts)
        read = [(stored, stored.read(rows).float()) for stored in sources]
        for stored, tensor in read:
            expect_finite(tensor, f"{stored.path}: {stored.name!r}", "the model is broken: use another checkpoint")
        return [tensor for _, tensor in read]


@dataclass(frozen=True)
class Merge:
    """A checked merge, ready to be computed and written."""

    recipe: MergeRecipe
    config: SLMConfig
    places: dict[str, Place]  # by name in the result

    @property
    def dtype(self) -> torch.dtype:
        """The widest stored type among the tensors."""
        return functools.reduce(torch.promote_types, (place.dtype for place in self.places.values()))

    @property
    def parameters(self) -> int:
        return sum(torch.Size(place.shape).numel() for place in self.places.values())

    @property
    def bytes(self) -> int:
        return sum(torch.Size(place.shape).numel() * place.dtype.itemsize for place in self.places.values())

    def write(self, directory: Path, progress: Callable[[int], None] = lambda written: None) -> None:
        """Write config and weights into a new `directory`; `progress` is called with the bytes of each tensor written.

        Raises `UserError` if a model's file is damaged or the result cannot be written.
        """
        write_configs(self.config, directory, str(self.dtype).removeprefix("torch."))
        shapes = {name: (place.shape, place.dtype) for name, place in self.places.items()}
        try:
            write_tensors(directory / WEIGHTS, shapes, self._tensors(progress))
        except OSError as error:
            raise UserError(f"{directory}: the model cannot be written: {error}") from None

    def _tensors(self, progress: Callable[[int], None]) -> Iterator[tuple[str, Tensor]]:
        for name, place in self.places.items():
            tensor = merged_tensor(self.recipe, name, place)
            yield name, tensor
            progress(tensor.nbytes)


def plan_merge(recipe: MergeRecipe, directories: Mapping[str, Path]) -> Merge:
    """Open and compare all models of a recipe; `directories` maps their names to their directories.

    Raises `UserError` for the first difference that prevents a merge, and for weights that sum to 0.
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
    for entry in recipe.models:
        if entry.layer_range not in (None, (0, config.num_hidden_layers)):
            raise UserError(
                f"{entry.model}: layer_range is {list(entry.layer_range)}: only whole models are merged here"
            )
    base = next((tensors[name] for name in _base(recipe)), None)
    places = {}
    for theirs, ours in stored_names(decoder.state_dict(), family).items():
        parts = [tensors[name][theirs] for name in names]
        depth = _depth(ours[0], decoder.architecture.depth)
        _weights(recipe, theirs, depth)
        origin = base[theirs] if base else None
        widest = [DTYPES[part.spelling] for part in (*parts, *([origin] if origin else []))]
        dtype = getattr(torch, recipe.dtype) if recipe.dtype else functools.reduce(torch.promote_types, widest)
        places[theirs] = Place(origin, parts, depth, dtype)
    return Merge(recipe, config, places)


def merged_tensor(recipe: MergeRecipe, name: str, place: Place) -> Tensor:
    """One tensor [rows, ...] of the result: computed in float32, and rounded once to its stored type."""
    combine = _combination(recipe, name, place)
    result = torch.empty(place.shape, dtype=place.dtype)
    for rows in place.slices:
        result[rows] = combine(*place.read(rows))
    expect_finite(result, f"the merged {name!r}", f"its numbers do not fit {place.dtype}: set dtype: float32")
    return result


def _combination(recipe: MergeRecipe, name: str, place: Place) -> Callable[..., Tensor]:
    """Function from rows of the models, the base first if any, to the same rows of the result.

    Statistics of whole tensors that a method needs are computed first.
    """
    weights, scale = _weights(recipe, name, place.depth), at(recipe.scale, place.depth, name, otherwise=1.0)
    if recipe.merge_method == "linear":
        return lambda *parts: linear(parts, weights)
    if recipe.merge_method == "slerp":
        shares = arc(*_product_and_lengths(place), at(recipe.t, place.depth, name))
        return lambda *parts: linear(parts, shares)
    if recipe.merge_method == "task_arithmetic":
        return lambda base, *tuned: task_arithmetic(base, tuned, [scale * weight for weight in weights])
    sparsify = [_sparsifier(recipe, number, name, place) for number in range(len(weights))]

    def add_sparse(base: Tensor, *tuned: Tensor) -> Tensor:
        deltas = [sparse(part - base) for sparse, part in zip(sparsify, tuned)]
        if recipe.merge_method == "dare_linear":
            return base.add(linear(deltas, weights), alpha=scale)
        return base.add(elect(deltas, weights, recipe.is_normalized), alpha=scale)

    return add_sparse


def _sparsifier(recipe: MergeRecipe, number: int, name: str, place: Place) -> Callable[[Tensor], Tensor]:
    """Function that sparsifies rows of a model's task vector; called for rows in order."""
    density = at(recipe.merged[number].density, place.depth, name, otherwise=1.0)
    if recipe.merge_method.startswith("dare"):
        generator = torch.Generator().manual_seed(_seed(recipe.seed, number, name))
        return lambda delta: drop(delta, density, generator)
    if density == 1:
        return lambda delta: delta
    sizes = np.empty(place.shape, dtype=np.float32)
    for rows in place.slices:
        base, *tuned = place.read(rows)
        sizes[rows] = (tuned[number] - base).abs().numpy()
    least = least_kept(sizes.reshape(-1), density)
    return lambda delta: trim(delta, least)


def _product_and_lengths(place: Place) -> tuple[float, float]:
    """The dot product of two tensors, and the product of their norms, in float64."""
    sums = torch.zeros(3, dtype=torch.float64)
    for rows in place.slices:
        first, second = (part.double().flatten() for part in place.read(rows))
        sums += torch.stack((first.dot(second), first.dot(first), second.dot(second)))
    return sums[0].item(), (sums[1] * sums[2]).sqrt().item()


def _weights(recipe: MergeRecipe, name: str, depth: float) -> list[float]:
    """The weight of each model at a depth; normalized except for TIES. Raises `UserError` if that is not possible."""
    weights = [at(entry.weight, depth, name) for entry in recipe.merged]
    if not recipe.is_normalized:
        return weights
    if min(weights) < 0 or not sum(weights):
        raise UserError(f"weights {weights}: normalize divides by their sum: give positive ones, or normalize: false")
    if recipe.merge_method.endswith("ties"):  # after sign election, the sum differs at every element
        return weights
    return [weight / sum(weights) for weight in weights]


def _base(recipe: MergeRecipe) -> list[str]:
    """The name of the base of task vectors, if there is one."""
    return [recipe.base_model] if recipe.method.needs_base and recipe.base_model else []


def _check_alike(first: str, config: SLMConfig, name: str, other: SLMConfig) -> None:
    """Raises `UserError` that names the first field in which two architectures differ."""
    if _architecture(config) == _architecture(other):
        return
    for field in type(config).model_fields:
        ours, theirs = getattr(config, field), getattr(other, field)
        if field not in MAY_DIFFER and ours != theirs:
            raise UserError(
                f"{name}: {field} is {theirs!r}, and {ours!r} in {first}: only models of one architecture can be merged"
            )


def _architecture(config: SLMConfig) -> Architecture:
    """The architecture without fields that matter in training only."""
    return dataclasses.replace(architecture_of(config), attention_dropout=0.0, hidden_dropout=0.0)


def _depth(name: str, layers: int) -> float:
    """Relative depth of a tensor of the decoder: 0 in the first layer, 1 in the last.

    As in mergekit, also 0 outside of the layers (embedding, final norm, head), and 1 in a model's only layer.
    """
    parts = name.split(".")
    if parts[0] != "blocks":
        return 0.0
    return int(parts[1]) / (layers - 1) if layers > 1 else 1.0


def _seed(seed: int, number: int, name: str) -> int:
    """Seed of the dropped elements of a model's tensor, independent of the order of tensors."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{number}/{name}".encode()).digest()[:7])
