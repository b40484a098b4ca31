"""What the documentation says exists, exists."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from slmkit.adapt.merge_recipe import MergeRecipe
from slmkit.config import load_settings
from slmkit.model.families import FAMILIES
from slmkit.model.presets import PRESETS
from slmkit.training.recipe import Recipe
from tests.parity.configurations import DRAW, PER_FAMILY

DOCS = Path(__file__).parent.parent / "docs"
PAGES = sorted(DOCS.glob("*.md"))
ARCHITECTURES = (DOCS / "architectures.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_recipe_in_the_docs_is_one(page: Path) -> None:
    for block in re.findall(r"```yaml\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL):
        content = yaml.safe_load(block)
        if "merge_method" in content:
            load_settings(MergeRecipe, content, origin=page.name)
            continue
        recipe = load_settings(Recipe, content, origin=page.name)
        if recipe.model.changes:
            recipe.model.build_config()


def test_the_tables_name_every_family_and_preset() -> None:
    rows = [row for row in re.findall(r"^\| `(\w+)` \|", ARCHITECTURES, re.MULTILINE) if row != "model_type"]
    assert sorted(rows) == sorted([*FAMILIES, *DRAW])
    assert all(f"`{preset}`" in ARCHITECTURES for preset in PRESETS)


def test_as_many_configurations_are_compared_as_are_claimed() -> None:
    claimed = re.findall(r"^\| `(\w+)` \| (\d+) \| (\d+) \| (\d+) \| (\d+) \|$", ARCHITECTURES, re.MULTILINE)
    assert {row[0]: set(row[1:]) for row in claimed} == {family: {str(PER_FAMILY)} for family in DRAW}
