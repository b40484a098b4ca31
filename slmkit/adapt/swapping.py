"""Replacing the linears of a built model by other modules."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Protocol, cast

from torch import Tensor, nn

from slmkit.config import UserError

ALL_LINEAR = "all-linear"  # every linear but the head, whose product is part of the loss
HEAD = "head"
Patterns = str | Sequence[str]


class LinearLike(Protocol):
    """x W^T + b, with W stored in any form."""

    in_features: int
    out_features: int
    bias: Any

    @property
    def weight(self) -> Tensor: ...  # [out, in]

    def requires_grad_(self, requires_grad: bool = True) -> Any: ...

    def __call__(self, x: Tensor) -> Tensor: ...  # [..., in] → [..., out]


def swap(
    model: nn.Module,
    pattern: Patterns,
    make: Callable[[LinearLike], nn.Module],
    aliases: Mapping[str, str] | None = None,
    except_for: Patterns = (),
) -> list[str]:
    """Replace every linear whose dotted name matches by `make(linear)`; returns the names.

    A pattern is a name, its end, or a regular expression for all of it; `all-linear` is every linear but the head.
    `aliases` are second names of linears. Raises `UserError` if a pattern matches nothing.
    """
    names = matching(linears(model), pattern, aliases, except_for)
    for name in names:
        replace(model, name, make(linear(model, name)))
    return names


def replace(model: nn.Module, name: str, module: nn.Module) -> None:
    """Replace the module `name` by `module`."""
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)


def linears(model: nn.Module) -> list[str]:
    """The dotted names of a model's linears, with quantized and adapted ones."""
    names = (name for name, module in model.named_modules() if hasattr(module, "in_features"))
    return [name for name in names if name.rpartition(".")[2] != "base"]


def linear(model: nn.Module, name: str) -> LinearLike:
    """The linear of a dotted name."""
    return cast(LinearLike, model.get_submodule(name))


def matching(
    names: Sequence[str], pattern: Patterns, aliases: Mapping[str, str] | None = None, except_for: Patterns = ()
) -> list[str]:
    """The names that match any pattern, in order.

    Raises `UserError` that lists the names for a pattern that matches none of them.
    """
    aliases = aliases or {}

    def is_called(name: str, one: str) -> bool:
        return any(_is_named(one, called) for called in (name, aliases.get(name, name)))

    found: set[str] = set()
    for one in _as_list(pattern):
        matched = {name for name in names if is_called(name, one)}
        if not matched:
            raise UserError(f"{one!r} matches no module; there are: {_overview(names, aliases)}, and {ALL_LINEAR}")
        found |= matched
    return [name for name in names if name in found and not any(is_called(name, one) for one in _as_list(except_for))]


def _is_named(pattern: str, name: str) -> bool:
    if pattern == ALL_LINEAR:
        return name.rpartition(".")[2] not in (HEAD, "lm_head")
    if name == pattern or name.endswith(f".{pattern}"):
        return True
    try:
        return re.fullmatch(pattern, name) is not None
    except re.error as error:
        raise UserError(f"{pattern!r}: neither a module's name nor a regular expression ({error})") from None


def _as_list(patterns: Patterns) -> list[str]:
    return [patterns] if isinstance(patterns, str) else list(patterns)


def _overview(names: Iterable[str], aliases: Mapping[str, str]) -> str:
    """Each kind of name once, with its alias."""
    kinds: dict[str, str] = {}
    for name in names:
        kind = re.sub(r"^.*\.\d+\.", "", name)
        kinds.setdefault(kind, aliases.get(name, name).rpartition(".")[2])
    return ", ".join(kind if kind.endswith(alias) else f"{kind} ({alias})" for kind, alias in kinds.items())
