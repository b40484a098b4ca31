"""Merging models of one architecture, tensor by tensor and some rows at a time.

Memory holds one tensor of the result, and for TIES the magnitudes of one task vector. All methods but SLERP's angle and
TIES' threshold are elementwise. A task vector is the change by fine-tuning: τ_i = θ_i - θ_base.

TIES trims and DARE drops within each tensor, as in mergekit, so that the merge can be streamed; the paper of TIES ranks
all weights of a model at once.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from slmkit.adapt.merge_recipe import MergeRecipe, Setting, at
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
# Cosine above which SLERP's arc is replaced by a line: sin θ would be lost to rounding.
PARALLEL = 0.9995


@dataclass(frozen=True)
class MergedTensor:
    """One tensor of the result: its sources (that of the base first), its depth (0 to 1), and its stored type."""

    name: str
    sources: list[StoredTensor]
    depth: float
    dtype: torch.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        return self.sources[0].shape

    @property
    def size(self) -> int:
        return torch.Size(self.shape).numel()

    def value(self, setting: Setting, otherwise: float | None = None) -> float:
        """The value of a recipe's setting for this tensor."""
        return at(setting, self.depth, self.name, otherwise)

    @property
    def slices(self) -> list[slice]:
        """Slices of all rows in order, each of at most `NUMBERS` elements but at least one row."""
        rows = self.shape[0]
        step = max(1, NUMBERS * rows // self.size)
        return [slice(start, min(start + step, rows)) for start in range(0, rows, step)]

    def read(self, rows: slice) -> list[Tensor]:
        """The rows [rows, ...] of all models, base first, in float32. Raises `UserError` for NaN or infinity."""
        read = [stored.read(rows).float() for stored in self.sources]
        for stored, tensor in zip(self.sources, read):
            expect_finite(tensor, f"{stored.path}: {stored.name!r}", "the model is broken: use another checkpoint")
        return read


@dataclass(frozen=True)
class Merge:
    """A checked merge, ready to be computed and written."""

    recipe: MergeRecipe
    config: SLMConfig
    tensors: list[MergedTensor]

    @property
    def dtype(self) -> torch.dtype:
        """The widest stored type among the tensors."""
        return functools.reduce(torch.promote_types, (tensor.dtype for tensor in self.tensors))

    @property
    def parameters(self) -> int:
        return sum(tensor.size for tensor in self.tensors)

    @property
    def bytes(self) -> int:
        return sum(tensor.size * tensor.dtype.itemsize for tensor in self.tensors)

    def write(self, directory: Path, progress: Callable[[int], None] = lambda written: None) -> None:
        """Write config and weights into a new `directory`; `progress` is called with the bytes written so far.

        Raises `UserError` if a model's file is damaged.
        """
        write_configs(self.config, directory, str(self.dtype).removeprefix("torch."))
        shapes = {tensor.name: (tensor.shape, tensor.dtype) for tensor in self.tensors}
        write_tensors(directory / WEIGHTS, shapes, self._tensors(progress))

    def _tensors(self, progress: Callable[[int], None]) -> Iterator[tuple[str, Tensor]]:
        written = 0
        for tensor in self.tensors:
            value = merged_tensor(self.recipe, tensor)
            yield tensor.name, value
            written += value.nbytes
            progress(written)


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
    merged = []
    for theirs, ours in stored_names(decoder.state_dict(), family).items():
        sources = [tensors[name][theirs] for name in (*_base(recipe), *names)]
        widest = functools.reduce(torch.promote_types, [DTYPES[stored.spelling] for stored in sources])
        dtype = getattr(torch, recipe.dtype) if recipe.dtype else widest
        tensor = MergedTensor(theirs, sources, _depth(ours[0], decoder.architecture.depth), dtype)
        _weights(recipe, tensor)
        merged.append(tensor)
    return Merge(recipe, config, merged)


def merged_tensor(recipe: MergeRecipe, tensor: MergedTensor) -> Tensor:
    """One tensor [rows, ...] of the result: computed in float32, and rounded once to its stored type."""
    combine = _combination(recipe, tensor)
    result = torch.empty(tensor.shape, dtype=tensor.dtype)
    for rows in tensor.slices:
        result[rows] = combine(*tensor.read(rows))
    expect_finite(result, f"the merged {tensor.name!r}", f"its numbers do not fit {tensor.dtype}: set dtype: float32")
    return result


def _combination(recipe: MergeRecipe, tensor: MergedTensor) -> Callable[..., Tensor]:
    """Function from rows of the models, the base first if any, to the same rows of the result.

    Statistics of whole tensors that a method needs are computed first.
    """
    weights, scale = _weights(recipe, tensor), tensor.value(recipe.scale, otherwise=1.0)
    if recipe.merge_method == "linear":
        return lambda *parts: linear(parts, weights)
    if recipe.merge_method == "slerp":
        shares = arc(*_product_and_lengths(tensor), tensor.value(recipe.t))
        return lambda *parts: linear(parts, shares)
    if recipe.merge_method == "task_arithmetic":
        return lambda base, *tuned: task_arithmetic(base, tuned, [scale * weight for weight in weights])
    sparsify = [_sparsifier(recipe, number, tensor) for number in range(len(weights))]

    def add_sparse(base: Tensor, *tuned: Tensor) -> Tensor:
        deltas = [sparse(part - base) for sparse, part in zip(sparsify, tuned)]
        if recipe.merge_method == "dare_linear":
            return base.add(linear(deltas, weights), alpha=scale)
        return base.add(elect(deltas, weights, recipe.is_normalized), alpha=scale)

    return add_sparse


def _sparsifier(recipe: MergeRecipe, number: int, tensor: MergedTensor) -> Callable[[Tensor], Tensor]:
    """Function that sparsifies rows of a model's task vector; called for rows in order."""
    density = tensor.value(recipe.merged[number].density, otherwise=1.0)
    if recipe.merge_method.startswith("dare"):
        place = f"{recipe.seed}/{number}/{tensor.name}"  # so that the order of tensors does not matter
        seed = int.from_bytes(hashlib.sha256(place.encode()).digest()[:7])
        generator = torch.Generator().manual_seed(seed)
        return lambda delta: drop(delta, density, generator)
    if density == 1:
        return lambda delta: delta
    sizes = np.empty(tensor.shape, dtype=np.float32)
    for rows in tensor.slices:
        base, *tuned = tensor.read(rows)
        sizes[rows] = (tuned[number] - base).abs().numpy()
    least = least_kept(sizes.reshape(-1), density)
    return lambda delta: trim(delta, least)


def _product_and_lengths(tensor: MergedTensor) -> tuple[float, float]:
    """The dot product of two tensors, and the product of their norms, in float64."""
    sums = torch.zeros(3, dtype=torch.float64)
    for rows in tensor.slices:
        first, second = (part.double().flatten() for part in tensor.read(rows))
        sums += torch.stack((first.dot(second), first.dot(first), second.dot(second)))
    return sums[0].item(), (sums[1] * sums[2]).sqrt().item()


def _weights(recipe: MergeRecipe, tensor: MergedTensor) -> list[float]:
    """The weight of each model for a tensor; normalized except for TIES. Raises `UserError` if that is not possible."""
    weights = [tensor.value(entry.weight) for entry in recipe.merged]
    if not recipe.is_normalized:
        return weights
    if min(weights) < 0 or not sum(weights):
        raise UserError(f"weights {weights}: normalize divides by their sum: give positive ones, or normalize: false")
    if recipe.merge_method.endswith("ties"):  # after sign election, the sum differs at every element
        return weights
    return [weight / sum(weights) for weight in weights]


def _base(recipe: MergeRecipe) -> list[str]:
    """The name of the base of task vectors, if there is one."""
    return [recipe.base_model] if recipe.adds_task_vectors and recipe.base_model else []


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


# -- the methods, for parts of tensors [...] of all models -------------------------------------------------------------


def linear(tensors: Iterable[Tensor], weights: Sequence[float]) -> Tensor:
    """Σ w_i θ_i: [...] each → [...]. A weight of 1 among zeros gives that tensor, bit for bit."""
    total: Tensor | None = None
    for tensor, weight in zip(tensors, weights):
        if weight:
            total = weight * tensor if total is None else total.add_(tensor, alpha=weight)
        elif total is None and not any(weights):
            total = torch.zeros_like(tensor)
    assert total is not None, "there is a tensor"
    return total


def arc(product: float, lengths: float, t: float) -> tuple[float, float]:
    """Coefficients of two vectors at the point t (0 to 1) of the arc between them (SLERP, Shoemake 1985).

        sin((1 - t) Ω) / sin Ω,  sin(t Ω) / sin Ω,   cos Ω = θ_1 · θ_2 / (|θ_1| |θ_2|)

    `product` is their dot product, `lengths` the product of their norms. Linear if they are parallel, or one of them
    is zero.
    """
    cosine = product / lengths if lengths else 1.0
    if abs(cosine) > PARALLEL:
        return 1 - t, t
    angle = math.acos(cosine)
    return math.sin((1 - t) * angle) / math.sin(angle), math.sin(t * angle) / math.sin(angle)


def task_arithmetic(base: Tensor, tuned: Iterable[Tensor], weights: Sequence[float]) -> Tensor:
    """θ_base + Σ w_i τ_i (arXiv:2212.04089), [...] each, as (1 - Σ w_i) θ_base + Σ w_i θ_i, which rounds less."""
    return linear((base, *tuned), (1 - sum(weights), *weights))


def least_kept(sizes: np.ndarray, density: float) -> float:
    """The smallest kept magnitude if the share `density` of `sizes` [elements] is kept; reorders `sizes`."""
    kept = round(density * sizes.size)
    if kept == 0:
        return math.inf
    sizes.partition(sizes.size - kept)  # in place: torch's kthvalue allocates an index of eight bytes per element
    return float(sizes[sizes.size - kept])


def trim(delta: Tensor, least: float) -> Tensor:
    """The task vector [...] with elements of a magnitude below `least` set to 0; equal ones are kept."""
    return torch.where(delta.abs() >= least, delta, 0.0)


def drop(delta: Tensor, density: float, generator: torch.Generator) -> Tensor:
    """Keep each element of a task vector [...] with probability `density`, divided by it (DARE, arXiv:2311.03099)."""
    kept = torch.rand(delta.shape, generator=generator) < density
    return torch.where(kept, delta / density, 0.0) if density else torch.zeros_like(delta)


def elect(deltas: Sequence[Tensor], weights: Sequence[float], normalize: bool) -> Tensor:
    """Σ w_i τ_i over the task vectors [...] that have, at each element, the sign of the sum of all (TIES).

    `normalize`: the weighted mean of those, instead of the sum. Yadav et al. 2023, arXiv:2306.01708.
    """
    positive = linear(deltas, weights) >= 0
    total, share = torch.zeros_like(deltas[0]), torch.zeros_like(deltas[0])
    for delta, weight in zip(deltas, weights):
        pull = weight * delta
        agrees = torch.where(positive, pull > 0, pull < 0)
        total += torch.where(agrees, pull, 0.0)
        share += agrees * weight
    return total / torch.where(share == 0, 1.0, share) if normalize else total
