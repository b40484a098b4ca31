"""What a merge is made of: a YAML file with the keys that mergekit's users know."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, model_validator

from slmkit.config import Settings, UserError, load_settings, read_yaml


def _share(value: float | list[float]) -> float | list[float]:
    numbers = value if isinstance(value, list) else [value]
    if not numbers or not all(0 <= number <= 1 for number in numbers):
        raise ValueError("expected a number from 0 to 1, or a list of them")
    return value


def _numbers(value: float | list[float]) -> float | list[float]:
    numbers = value if isinstance(value, list) else [value]
    if not numbers or not all(map(math.isfinite, numbers)):
        raise ValueError("expected a number, or a list of them")
    return value


# One number, or a list that is spread over the depth of the model.
Number = Annotated[float | list[float], AfterValidator(_numbers)]
Share = Annotated[float | list[float], AfterValidator(_share)]


@dataclass(frozen=True)
class Method:
    """What a method reads of a recipe, besides `models`."""

    keys: frozenset[str] = frozenset()  # of the recipe
    model_keys: frozenset[str] = frozenset({"weight"})  # of an entry in `models`
    needs_base: bool = False
    normalizes: bool = False  # where `normalize` is not given


_DELTAS, _SPARSE = frozenset({"base_model", "lambda", "normalize"}), frozenset({"weight", "density"})
METHODS = {
    "linear": Method(frozenset({"normalize"}), normalizes=True),
    "slerp": Method(frozenset({"t", "base_model"}), frozenset()),
    "task_arithmetic": Method(_DELTAS, needs_base=True),
    "ties": Method(_DELTAS, _SPARSE, needs_base=True, normalizes=True),
    "dare_linear": Method(_DELTAS | {"seed"}, _SPARSE, needs_base=True),
    "dare_ties": Method(_DELTAS | {"seed"}, _SPARSE, needs_base=True),
}


class MergedModel(Settings):
    """One of the models. A list of values is spread over the depth, from the embedding to the head."""

    model: str  # a model directory or a run
    weight: Number = 1.0
    density: Share = 1.0  # of ties and dare: which share of a task vector is kept

    @model_validator(mode="before")
    @classmethod
    def _as_mergekit_writes_it(cls, given: Any) -> Any:
        return _lifted(given)


class MergeRecipe(Settings):
    """Which models are merged, and how. A key that the method does not read is refused."""

    merge_method: Literal["linear", "slerp", "task_arithmetic", "ties", "dare_linear", "dare_ties"]
    base_model: str | None = None  # what task vectors are differences from; of slerp: the model of t = 0
    models: list[MergedModel] = Field(min_length=1)
    t: Share = 0.5  # of slerp: 0 is the first model, 1 the second
    scale: Number = Field(1.0, alias="lambda")  # what the sum of task vectors is multiplied by
    normalize: bool | None = None  # divide by the sum of weights; None: linear and ties do
    seed: int = 0  # of what dare drops
    dtype: Literal["float32", "float16", "bfloat16"] | None = None  # of the result; None: the widest of the models'
    output_dir: str = "runs/merged"

    @model_validator(mode="before")
    @classmethod
    def _as_mergekit_writes_it(cls, given: Any) -> Any:
        return _lifted(given)

    @model_validator(mode="after")
    def _nothing_is_ignored(self) -> MergeRecipe:
        for key in ("base_model", "t", "lambda", "normalize", "seed"):
            name = "scale" if key == "lambda" else key
            if key not in self.method.keys and getattr(self, name) != type(self).model_fields[name].default:
                raise ValueError(f"merge_method {self.merge_method} does not read {key}: leave it out")
        for number, entry in enumerate(self.models):
            for key in ("weight", "density"):
                if key not in self.method.model_keys and getattr(entry, key) != 1.0:
                    raise ValueError(f"merge_method {self.merge_method} does not read models.{number}.{key}: drop it")
        return self

    @model_validator(mode="after")
    def _enough_models(self) -> MergeRecipe:
        names = [entry.model for entry in self.merged]
        if self.method.needs_base and self.base_model is None:
            raise ValueError(f"merge_method {self.merge_method} adds differences from a base_model: name that")
        if not names:
            raise ValueError("models: none besides the base_model; name what is added to it")
        if self.merge_method == "slerp" and len(names) != 2:
            raise ValueError(f"merge_method slerp goes from one model to another: name two, not {len(names)}")
        if self.merge_method == "slerp" and self.base_model not in (None, *names):
            raise ValueError(f"base_model {self.base_model} is neither of the two models that slerp goes between")
        return self

    @property
    def method(self) -> Method:
        return METHODS[self.merge_method]

    @property
    def merged(self) -> list[MergedModel]:
        """The models in their order, without the base (it may stand among them); of slerp that of t = 0 first."""
        if self.method.needs_base:
            return [entry for entry in self.models if entry.model != self.base_model]
        return sorted(self.models, key=lambda entry: entry.model != self.base_model) if self.base_model else self.models

    @property
    def is_normalized(self) -> bool:
        return self.method.normalizes if self.normalize is None else self.normalize


def load_merge_recipe(path: str | Path, overrides: Sequence[str] = ()) -> MergeRecipe:
    """Read a merge's YAML and apply `key=value` overrides (`models.0.weight=0.3`). Raises `UserError`."""
    if Path(path).is_dir():
        raise UserError(f"{path}: a directory; expected a merge's YAML file, or a model with --adapter beside it")
    return load_settings(MergeRecipe, read_yaml(path), overrides, origin=str(path))


def at(value: float | list[float], place: float) -> float:
    """A number, or a list of them interpolated: `place` 0 is its beginning, 1 its end."""
    if not isinstance(value, list):
        return value
    position = place * (len(value) - 1)
    before = min(int(position), len(value) - 2) if len(value) > 1 else 0
    after = min(before + 1, len(value) - 1)
    return value[before] + (position - before) * (value[after] - value[before])


def _lifted(given: Any) -> Any:
    """mergekit keeps a method's numbers in a mapping `parameters`; here they stand beside the other keys."""
    if not isinstance(given, dict) or not isinstance(given.get("parameters"), dict):
        return given
    return given["parameters"] | {key: value for key, value in given.items() if key != "parameters"}
