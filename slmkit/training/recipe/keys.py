"""Recipe keys that replace or exclude each other, and their names in other programs; `keys.yaml` has the tables."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from slmkit.config import UserError, read_table, value_of

KEYS = read_table(Path(__file__).with_name("keys.yaml"))
REPLACED: dict[str, list[str]] = KEYS["replaced"]
HINTS = {  # what other programs call a key → the key, and a note on its unit
    name: f"{key} ({KEYS['notes'][key]})" if key in KEYS["notes"] else key
    for key, names in KEYS["names"].items()
    for name in names.split()
}


def make_room(content: dict[str, Any], overrides: Sequence[str]) -> list[str]:
    """Remove the keys from a recipe file's content that the overrides replace; returns a line for each.

    Raises `UserError` if two overrides contradict each other.
    """
    named = dict(override.partition("=")[::2] for override in overrides)
    typed = {key: value for key, value in named.items() if value not in ("null", "~", "")}
    lines = []
    for key, value in typed.items():
        if value_of(value) == _value_at(content, key):
            continue  # nothing becomes invalid
        patterns = _replaced_by(key, value)
        other = next((name for name in typed if name != key and _is_one_of(name, patterns)), None)
        if other is not None and not _is_one_of(other, KEYS["beside_each_other"]):
            raise UserError(f"{key} and {other} contradict each other: leave one of them out")
        given = [name for name in _keys_of(content) if name not in named and _is_one_of(name, patterns)]
        replaced = {name: _pop(content, name) for name in given}
        shown = [f"{name}: {old}" for name, old in replaced.items() if old not in (None, [], {})]
        if shown:
            more = f" and {len(shown) - 3} more" if len(shown) > 3 else ""
            lines.append(f"{key}={value} replaces {', '.join(shown[:3])}{more}")
    return lines


def rename_old_keys(content: dict[str, Any]) -> list[str]:
    """Rename the keys of earlier versions; returns a line for each."""
    train = content.get("train")
    if isinstance(train, dict) and isinstance(train.get("warmup_steps"), float) and 0 < train["warmup_steps"] < 1:
        train["warmup_ratio"] = train.pop("warmup_steps")
        return [f"train.warmup_steps: {train['warmup_ratio']} is read as train.warmup_ratio, a share of all steps"]
    return []


def _replaced_by(key: str, value: str) -> Sequence[str]:
    if key == "objective" and value == "distill":
        return ()
    return next((patterns for pattern, patterns in REPLACED.items() if fnmatchcase(key, pattern)), ())


def _is_one_of(key: str, patterns: Sequence[str]) -> bool:
    return any(fnmatchcase(key, pattern) for pattern in patterns)


def _keys_of(content: dict[str, Any]) -> Iterator[str]:
    """`section` and `section.key` of all content."""
    for section, values in content.items():
        yield section
        if isinstance(values, dict):
            yield from (f"{section}.{name}" for name in values)


def _value_at(content: dict[str, Any], key: str) -> Any:
    section, _, name = key.partition(".")
    values = content.get(section)
    return values if not name else values.get(name) if isinstance(values, dict) else None


def _pop(content: dict[str, Any], key: str) -> Any:
    section, _, name = key.partition(".")
    return content[section].pop(name) if name else content.pop(section)
