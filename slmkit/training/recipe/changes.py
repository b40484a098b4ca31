"""Changes to the recipe of a prepared run: which keys may change, and how.

Every key is compared. Keys that only affect execution, or that an update uses without state, apply from the next step
on. A change of length requires a stated schedule. Any other change is refused by name.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from slmkit.config import UserError, fields_at, load_settings, value_of
from slmkit.training.recipe.keys import KEYS
from slmkit.training.recipe.recipe import LENGTHS, Recipe

LENGTH = (*(f"train.{name}" for name in LENGTHS), "train.lr_schedule_steps")
OF_COMPUTING = ("auto", "float32", "bfloat16")  # precisions with the same checkpoint content
PROCESSES = "processes"  # recorded among the changes, beside recipe keys: the number of processes
NOW = 2**63  # after all steps
SHOWN = 60  # characters of a value in a message


@dataclass(frozen=True)
class Change:
    """A key by its dotted name, with both values as JSON has them."""

    key: str
    was: Any
    now: Any

    def __str__(self) -> str:
        now = "removed" if self.now is None else _shown(self.now)
        return f"{self.key} {_shown(self.was)} → {now}"


def changes_between(prepared: Recipe, edited: Recipe) -> list[Change]:
    """Every key whose value differs."""
    was, now = (dict(leaves_of(recipe.model_dump(mode="json"))) for recipe in (prepared, edited))
    return [
        Change(key, was.get(key), now.get(key))
        for key in dict.fromkeys([*was, *now])
        if was.get(key) != now.get(key)
    ]  # fmt: skip


def of_absent_sections(prepared: Recipe, overrides: Sequence[str]) -> list[Change]:
    """The `key=value` overrides of keys that are below a null section or in an empty list of `prepared`."""
    leaves, changes = dict(leaves_of(prepared.model_dump(mode="json"))), []
    for key, _, text in (override.partition("=") for override in overrides):
        *parents, leaf = key.split(".")
        if key not in leaves and leaf in fields_at(Recipe, parents) and value_of(text) is not None:
            changes.append(Change(key, None, value_of(text)))
    return changes


def expect_obeyable(root: Path, prepared: Recipe, changes: Sequence[Change], overrides: Sequence[str] = ()) -> None:
    """Raises `UserError` for the first change that a prepared run cannot apply."""
    # Derived keys come last, so that the message names the key that was typed or edited.
    typed = [override.partition("=")[0] for override in overrides]
    order = {key: place for place, key in enumerate([*typed, "", "train.tokens_per_step"])}
    for change in sorted(changes, key=lambda change: order.get(change.key, len(typed))):
        if not _is_obeyable(prepared, change):
            raise UserError(
                f"{root}: {change.key} cannot change in the middle of a run ({_shown(change.was)} → "
                f"{_shown(change.now)}): put it back, or start a new run: slm train {root}/recipe.yaml "
                f"{change.key}={_shown(change.now)}"
            )


def is_of_length(change: Change) -> bool:
    return change.key in LENGTH


def recipe_at(described: dict[str, Any], step: int) -> Recipe | None:
    """The recipe of `step` (from 1), from the content of environment.json; None for a run of an older version."""
    if "recipe" not in described:
        return None
    content = described["recipe"]
    for entry in reversed(described.get("changes", [])):
        if entry["step"] >= step and entry["key"] != PROCESSES:
            *parents, leaf = entry["key"].split(".")
            place = content
            for name in parents:
                place = place[int(name)] if isinstance(place, list) else place[name]
            place[int(leaf) if isinstance(place, list) else leaf] = entry["was"]
    return load_settings(Recipe, content)


def _is_obeyable(prepared: Recipe, change: Change) -> bool:
    if change.key == "train.precision":
        return change.was in OF_COMPUTING and change.now in OF_COMPUTING
    allowed = (*KEYS["obeyed"], *LENGTH, *(KEYS["obeyed_by_streams"] if prepared.data.streaming else ()))
    return any(fnmatchcase(change.key, pattern) for pattern in allowed)


def leaves_of(value: Any, place: str = "") -> Iterator[tuple[str, Any]]:
    """`(dotted key, value)` of everything below; a list is a value unless mappings are in it."""
    if isinstance(value, dict) and value:
        items: Any = value.items()
    elif isinstance(value, list) and value and all(isinstance(entry, dict) for entry in value):
        items = enumerate(value)
    else:
        yield place, value
        return
    for name, inner in items:
        yield from leaves_of(inner, f"{place}.{name}" if place else str(name))


def _shown(value: Any) -> str:
    text = "null" if value is None else str(value)
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}…"
