"""`rope_parameters` of a config.json, read as a `Rope`."""

from __future__ import annotations

import dataclasses
from typing import Any

from slmkit.config import UserError, did_you_mean
from slmkit.model.rope import DynamicNTK, Linear, Llama3, Rope, Scaling, Yarn

KINDS = ("default", "dynamic", "linear", "llama3", "yarn")
_SCALINGS: dict[str, type[Linear | Llama3 | Yarn]] = {"linear": Linear, "llama3": Llama3, "yarn": Yarn}


def rope_of(parameters: dict[str, Any], kind: str, dim: int, max_positions: int) -> Rope:
    """The rotation of layers of a kind (`full_attention`, `sliding_attention`), where kinds differ in it.

    Raises `UserError` for an unknown `rope_type`, and for a number that it needs and lacks or does not know.
    """
    own = dict(parameters.get(kind, parameters))
    rope_type, theta = own.pop("rope_type", "default"), float(own.pop("rope_theta", 10_000.0))
    where = f"rope_parameters of rope_type {rope_type!r}"
    if rope_type == "default":
        _refuse_others(where, own, set())
        return Rope(theta, dim)
    if rope_type == "dynamic":
        # transformers takes max_position_embeddings for the original length, whatever this key says.
        _refuse_others(where, own, {"factor", "original_max_position_embeddings"})
        return Rope(theta, dim, DynamicNTK(_factor(where, own), max_positions))
    if rope_type not in _SCALINGS:
        raise UserError(f"rope_parameters.rope_type {rope_type!r} is not supported; known: {', '.join(KINDS)}")
    return Rope(theta, dim, _scaling(where, _SCALINGS[rope_type], own, max_positions))


def _scaling(where: str, kind: type[Linear | Llama3 | Yarn], own: dict[str, Any], max_positions: int) -> Scaling:
    fields = {field.name: field for field in dataclasses.fields(kind)}
    _refuse_others(where, own, set(fields))
    given = {name: value for name, value in own.items() if value is not None}  # null: as if it were not there
    original = "original_max_position_embeddings"
    if original in fields:
        given.setdefault(original, max_positions)
        given.setdefault("factor", max_positions / given[original])
    _factor(where, given)
    for name, field in fields.items():
        if name not in given and field.default is dataclasses.MISSING:
            raise UserError(f"{where}: {name} is missing; expected a number")
    return kind(**given)


def _factor(where: str, own: dict[str, Any]) -> float:
    factor = own.get("factor")
    if not isinstance(factor, int | float) or factor < 1:
        raise UserError(f"{where}: factor {factor!r}; expected a number of 1 or more")
    return float(factor)


def _refuse_others(where: str, own: dict[str, Any], known: set[str]) -> None:
    for name in own:
        if name not in known:
            raise UserError(f"{where}: unknown key {name!r}; {did_you_mean(name, known | {'rope_theta', 'rope_type'})}")
