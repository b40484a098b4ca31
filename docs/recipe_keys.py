"""Writes docs/recipe-keys.md from the settings classes and the comments beside their fields.

python docs/recipe_keys.py
"""

from __future__ import annotations

import ast
import inspect
import io
import tokenize
import types
import typing
from pathlib import Path
from typing import Any

from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from slmkit.config import Settings
from slmkit.model.config import TRAINING_FIELDS, SLMConfig
from slmkit.training.recipe.recipe import Recipe

PAGE = Path(__file__).with_name("recipe-keys.md")
HEAD = """\
# All keys of a recipe

<!-- Written by docs/recipe_keys.py from the settings classes; do not edit by hand. -->

A recipe is a YAML file; on the command line each key is written with its section: `train.learning_rate=3e-4`. An
unknown key is refused with the nearest known one. `slm train RECIPE --print-config` shows every value of a recipe.
"""


def settings_in(annotation: Any) -> type[Settings] | None:
    """The settings class inside an annotation such as `LoRASettings | None` or `list[SourceSettings]`."""
    if isinstance(annotation, type) and issubclass(annotation, Settings):
        return annotation
    return next(filter(None, map(settings_in, typing.get_args(annotation))), None)


def comments(kind: type[BaseModel]) -> dict[str, str]:
    """Field → the comment at the end of its line, or, where there is none, the lines of comment above it."""
    source = inspect.getsource(kind)
    said = {
        token.start[0]: (token.string.lstrip("# "), token.line.lstrip().startswith("#"))
        for token in tokenize.generate_tokens(io.StringIO(source).readline)
        if token.type == tokenize.COMMENT
    }
    found = {}
    for node in ast.parse(source).body[0].body:  # type: ignore[attr-defined]
        if not isinstance(node, ast.AnnAssign) or not isinstance(node.target, ast.Name):
            continue
        beside = [said[line][0] for line in range(node.lineno, (node.end_lineno or 0) + 1) if line in said]
        above, line = [], node.lineno - 1
        while line in said and said[line][1]:
            above.insert(0, said[line][0])
            line -= 1
        found[node.target.id] = " ".join([*above, *beside]).replace("None:", "null:")
    return found


def type_name(annotation: Any) -> str:
    """As a reader of YAML would say it."""
    origin, inside = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Literal:
        return ", ".join(f"`{value}`" for value in inside)
    if origin is typing.Annotated:
        return type_name(inside[0])
    if origin in (typing.Union, types.UnionType):
        return " or ".join(type_name(part) for part in inside if part is not type(None))
    if origin is list:
        return f"list of {type_name(inside[0])}"
    if settings_in(annotation):
        return "section"
    names = {bool: "true or false", int: "whole number", float: "number", str: "text"}
    return names.get(annotation, "mapping" if origin is dict else str(annotation))


def default(field: Any) -> str:
    if field.default_factory_takes_validated_data:
        return "from the others"
    value = field.get_default(call_default_factory=True)
    if value is PydanticUndefined:
        return "required"
    if isinstance(value, Settings) or value in ([], {}):
        return ""
    shown = {"None": "null", "True": "true", "False": "false"}.get(
        str(value), f"{value:g}" if isinstance(value, float) else value
    )
    return f"`{shown}`"


def section(kind: type[BaseModel], path: str, note: str = "") -> str:
    """One table, and those of the sections inside."""
    names = [name for name in kind.model_fields if kind is not SLMConfig or name not in TRAINING_FIELDS]
    bases = [
        base for base in reversed(kind.__mro__) if issubclass(base, BaseModel) and base not in (BaseModel, Settings)
    ]
    said = {name: text for base in bases for name, text in comments(base).items()}
    lines = [
        f"\n## {f'`{path}`' if path else 'The recipe itself'}{note}\n",
        inspect.cleandoc(kind.__doc__ or "") + "\n",
    ]
    lines += ["| key | value | default | what it does |", "| --- | --- | --- | --- |"]
    inner = []
    for name in names:
        field = kind.model_fields[name]
        nested = settings_in(field.annotation)
        key = field.alias or name
        if nested:
            inner.append((nested, f"{path}.{key}" if path else key))
        cells = (f"`{key}`", type_name(field.annotation), default(field), said.get(name, ""))
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines) + "\n" + "".join(section(*each) for each in inner)


def page() -> str:
    return HEAD + section(Recipe, "") + section(SLMConfig, "model", ": the shape of a new model")


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
