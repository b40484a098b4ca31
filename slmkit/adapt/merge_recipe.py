"""The recipe of a merge: a YAML file with mergekit's keys."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, model_validator

from slmkit.config import Settings, UserError, load_settings, read_yaml


class Condition(Settings):
    """A value for the tensors whose name contains `filter`; without one (or `*`) for all that are left."""

    value: float | list[float]
    filter: str | None = None


Setting = float | list[float] | list[Condition]


def _numbers(setting: Setting) -> list[float]:
    parts = setting if isinstance(setting, list) else [setting]
    return [number for part in parts for number in (_numbers(part.value) if isinstance(part, Condition) else [part])]


def _number(setting: Setting) -> Setting:
    numbers = _numbers(setting)
    if not numbers or not all(map(math.isfinite, numbers)):
        raise ValueError("expected a number, a list of numbers, or a list of {filter, value}")
    return setting


def _share(setting: Setting) -> Setting:
    if not all(0 <= number <= 1 for number in _numbers(setting)):
        raise ValueError("expected numbers from 0 to 1")
    return setting


# One number, a list that is interpolated over the layers, or a list of conditions on names of tensors.
Number = Annotated[Setting, AfterValidator(_number)]
Share = Annotated[Number, AfterValidator(_share)]

# The keys of a recipe and of its models that each method reads.
_DELTAS = {"base_model", "lambda", "normalize", "weight"}  # methods that add task vectors to a base
METHODS = {
    "linear": {"normalize", "weight"},
    "slerp": {"t", "base_model"},
    "task_arithmetic": _DELTAS,
    "ties": _DELTAS | {"density"},
    "dare_linear": _DELTAS | {"density", "seed"},
    "dare_ties": _DELTAS | {"density", "seed"},
}


class MergedModel(Settings):
    """One of the models. A list of values is spread over the layers, from the first to the last."""

    model: str  # a model directory or a run
    layer_range: tuple[int, int] | None = None  # of mergekit's `slices`: all layers, or it is refused
    weight: Number = 1.0
    density: Share = 1.0  # of ties and dare: which share of a task vector is kept

    @model_validator(mode="before")
    @classmethod
    def _as_mergekit_writes_it(cls, given: Any) -> Any:
        return _lifted(given)


# Keys of mergekit without effect here: merged models have one tokenizer.
NO_OPS = (
    ("int8_mask", True), ("int8_mask", False), ("tokenizer_source", "base"), ("tokenizer_source", "union"),
    ("tokenizer_source", None),
)  # fmt: skip


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
        given = _from_mergekit(given)
        if isinstance(given, dict):
            _expect_all_named(given)
        return given

    @model_validator(mode="after")
    def _nothing_is_ignored(self) -> MergeRecipe:
        places: dict[str, tuple[Settings, str]] = {"lambda": (self, "scale")}
        places |= {key: (self, key) for key in ("base_model", "t", "normalize", "seed")}
        for number, entry in enumerate(self.models):
            places |= {f"models.{number}.{key}": (entry, key) for key in ("weight", "density")}
        for place, (settings, name) in places.items():
            is_read = place.rpartition(".")[2] in METHODS[self.merge_method]
            if not is_read and getattr(settings, name) != type(settings).model_fields[name].default:
                raise ValueError(f"merge_method {self.merge_method} does not read {place}: leave it out")
        return self

    @model_validator(mode="after")
    def _enough_models(self) -> MergeRecipe:
        names = [entry.model for entry in self.merged]
        if not names:
            raise ValueError("models: only the base_model is there; name another model")
        if self.merge_method == "slerp" and len(names) != 2:
            raise ValueError(f"merge_method slerp interpolates between two models: name two, not {len(names)}")
        if self.merge_method == "slerp" and self.base_model not in (None, *names):
            raise ValueError(f"base_model {self.base_model} is not one of the two models of slerp")
        return self

    @property
    def adds_task_vectors(self) -> bool:
        return METHODS[self.merge_method] >= _DELTAS

    @property
    def merged(self) -> list[MergedModel]:
        """The models in order, without the base, which may be among them; for slerp the model of t = 0 first."""
        if self.adds_task_vectors:
            return [entry for entry in self.models if entry.model != self.base_model]
        return sorted(self.models, key=lambda entry: entry.model != self.base_model) if self.base_model else self.models

    @property
    def names(self) -> list[str]:
        """All models that are read, with the base."""
        return sorted({entry.model for entry in self.models} | ({self.base_model} if self.base_model else set()))

    @property
    def is_normalized(self) -> bool:
        return self.merge_method in ("linear", "ties") if self.normalize is None else self.normalize


def load_merge_recipe(path: str | Path, overrides: Sequence[str] = ()) -> MergeRecipe:
    """Read a merge's YAML and apply `key=value` overrides (`models.0.weight=0.3`). Raises `UserError`."""
    if Path(path).is_dir():
        raise UserError(f"{path}: a directory; expected a merge's YAML file, or a model with --adapter beside it")
    return load_settings(MergeRecipe, read_yaml(path), overrides, origin=str(path))


def at(setting: Setting, depth: float, name: str, otherwise: float | None = None) -> float:
    """The value of a setting for a tensor, as in mergekit.

    A list is interpolated over the layers: `depth` is 0 in the first and 1 in the last. The first condition applies
    whose `filter` is part of the tensor's name on disk; without one, the value is `otherwise`, the key's default.
    Raises `UserError` if there is no default.
    """
    if not isinstance(setting, list):
        return setting
    conditions = [one for one in setting if isinstance(one, Condition)]
    if conditions:
        found = (one.value for one in conditions if one.filter in (None, "*") or one.filter in name)
        value = next(found, otherwise)
        if value is None:
            raise UserError(f"no filter matches {name!r}: end the list with a `value` that has no filter")
        return at(value, depth, name)
    numbers = [one for one in setting if not isinstance(one, Condition)]
    position = depth * (len(numbers) - 1)
    before = min(int(position), len(numbers) - 2) if len(numbers) > 1 else 0
    after = min(before + 1, len(numbers) - 1)
    return numbers[before] + (position - before) * (numbers[after] - numbers[before])


def _lifted(given: Any) -> Any:
    """The mapping with mergekit's `parameters` moved up to the other keys."""
    if not isinstance(given, dict) or not isinstance(given.get("parameters"), dict):
        return given
    return given["parameters"] | {key: value for key, value in given.items() if key != "parameters"}


def _from_mergekit(given: Any) -> Any:
    """Converts mergekit's other spellings: one slice of whole models, defaults for all models, no-op keys."""
    given = _lifted(given)
    if not isinstance(given, dict):
        return given
    given = {key: value for key, value in given.items() if (key, value) not in NO_OPS}
    if "out_dtype" in given:
        given["dtype"] = given.pop("out_dtype")
    slices = given.pop("slices", None)
    if slices is not None:
        if "models" in given or not isinstance(slices, list) or len(slices) != 1 or set(slices[0]) != {"sources"}:
            raise ValueError("slices: only one slice of whole models is merged here, with nothing but its sources")
        given["models"] = slices[0]["sources"]
    defaults = {key: given.pop(key) for key in ("weight", "density") if key in given}
    if defaults and isinstance(given.get("models"), list):
        given["models"] = [_with(defaults, _lifted(one)) if isinstance(one, dict) else one for one in given["models"]]
    return given


def _expect_all_named(given: dict[str, Any]) -> None:
    """Raises `ValueError` that lists every model that a template leaves unset."""
    keys, models = METHODS.get(str(given.get("merge_method")), set()), given.get("models")
    unset = ["base_model"] if keys >= _DELTAS and not given.get("base_model") else []
    for number, entry in enumerate(models if isinstance(models, list) else []):
        if isinstance(entry, dict) and "model" in entry and not entry["model"]:
            unset.append(f"models.{number}.model")
    if unset:
        examples = " ".join(f"{key}=runs/{'book' if key == 'base_model' else 'tuned'}" for key in unset)
        raise ValueError(f"set {', '.join(unset)} to model directories or runs, such as {examples}")


def _with(defaults: dict[str, Any], entry: dict[str, Any]) -> dict[str, Any]:
    """A model's own values before the defaults for all models, also after its last condition."""
    both = defaults | entry
    for key, default in defaults.items():
        if isinstance(both[key], list) and both[key] and isinstance(both[key][0], dict) and key in entry:
            has_conditions = isinstance(default, list) and default and isinstance(default[0], dict)
            both[key] = [*entry[key], *(default if has_conditions else [{"value": default}])]
    return both
