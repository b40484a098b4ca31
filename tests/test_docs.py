"""What the documentation says exists, exists."""

from __future__ import annotations

import importlib
import importlib.util
import re
import shlex
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml

from slmkit.adapt.merge_recipe import MergeRecipe
from slmkit.config import load_settings
from slmkit.data.prepare.corpus import texts_of
from slmkit.data.settings import DataSettings, TokenizerSettings
from slmkit.data.sources import open_source
from slmkit.data.sources.built_in import BUILT_IN
from slmkit.data.sources.settings import SourceSettings
from slmkit.export.targets import TARGETS
from slmkit.model.architectures import ARCHITECTURES
from slmkit.model.config import PRESETS
from slmkit.model.families import FAMILIES
from slmkit.training.optimizers.choose import OPTIMIZERS
from slmkit.training.recipe.recipe import READS, Recipe
from slmkit.workflows.objectives import OBJECTIVES
from tests.parity.configurations import DRAW, PER_FAMILY

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.glob("*.md"))
ARCHITECTURES_PAGE = (DOCS / "architectures.md").read_text(encoding="utf-8")


def test_the_files_and_names_that_pages_mention_are_there() -> None:
    for page in (*PAGES, ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "LOG.md"):
        text = page.read_text(encoding="utf-8")
        paths = re.findall(r"(?<![\w/.*])((?:slmkit|tests|benchmarks|recipes|docs)/[\w./-]*\w)(?![\w*])", text)
        assert not [path for path in paths if not (ROOT / path).exists()], page.name
        imported = re.findall(r"^from (slmkit[\w.]*) import ([\w, ]+)", text, re.MULTILINE)
        for module, names in [*imported, *re.findall(r"`(slmkit\.[\w.]+)\.([A-Z]\w+)`", text)]:
            there = importlib.import_module(module)
            for name in names.split(", "):
                assert hasattr(there, name) or importlib.util.find_spec(f"{module}.{name}"), f"{page.name}: {name}"


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
    rows = [row for row in re.findall(r"^\| `(\w+)` \|", ARCHITECTURES_PAGE, re.MULTILINE) if row != "model_type"]
    assert sorted(rows) == sorted([*FAMILIES, *DRAW])
    assert all(f"`{preset}`" in ARCHITECTURES_PAGE for preset in PRESETS)


def test_as_many_configurations_are_compared_as_are_claimed() -> None:
    claimed = re.findall(r"^\| `(\w+)` \| (\d+) \| (\d+) \| (\d+) \| (\d+) \|$", ARCHITECTURES_PAGE, re.MULTILINE)
    assert {row[0]: set(row[1:]) for row in claimed} == {family: {str(PER_FAMILY)} for family in DRAW}


def test_the_readme_says_how_long_the_decoder_is() -> None:
    lines = (ROOT / "slmkit/model/decoder.py").read_text(encoding="utf-8").count("\n")
    said = re.search(r"decoder of (\d+) lines", (ROOT / "README.md").read_text(encoding="utf-8"))
    assert said is not None
    assert abs(int(said[1]) - lines) < 10


def recipe_keys() -> Any:
    """docs/recipe_keys.py as a module."""
    spec = importlib.util.spec_from_file_location("recipe_keys", DOCS / "recipe_keys.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_of_recipe_keys_is_current_and_says_what_each_key_does() -> None:
    page = (DOCS / "recipe-keys.md").read_text(encoding="utf-8")
    assert page == recipe_keys().page(), "run: python docs/recipe_keys.py"
    silent = [line for line in page.splitlines() if line.endswith("|  |")]
    assert not silent, "a comment beside the field says what it does"


def test_the_commands_of_the_export_page_are_ones() -> None:
    page = (DOCS / "export.md").read_text(encoding="utf-8")
    commands = [line for block in re.findall(r"```bash\n(.*?)```", page, re.DOTALL) for line in block.splitlines()]
    exports = [shlex.split(line) for line in commands if line.startswith("slm export ")]
    assert {words[words.index("--to") + 1] for words in exports} == TARGETS.keys()
    for words in exports:
        given = dict(zip(words[3::2], words[4::2]))
        assert given.keys() <= {"--to", "--type", "--output"}
        assert "--type" not in given or given["--type"] in TARGETS[given["--to"]].kinds
    for name, kinds in re.findall(r"^\| `(\w+)` \| .*? \| (.*?) \| ", page, re.MULTILINE):
        said = [kind for kind in re.findall(r"\w+", kinds.replace(" (as stored)", "")) if kind not in ("as", "gguf")]
        known = TARGETS[name].kinds
        assert [*said] == [kind for kind in known if kind in said] or "…" in kinds, name
        assert not said or said[0] == known[0], name
        assert set(said) <= {*known}, name


def test_every_objective_is_in_all_tables_that_contributing_names() -> None:
    names = set(get_args(Recipe.model_fields["objective"].annotation))
    assert OBJECTIVES.keys() == names
    assert READS.keys() == names - {"distill"}, "distillation.reads says it"


def test_the_examples_of_how_to_extend_it_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    tables = BUILT_IN, OPTIMIZERS, FAMILIES, ARCHITECTURES
    before = [dict(table) for table in tables]
    names: dict[str, Any] = {}
    page = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    assert max(block.count("\n") for block in blocks) <= 40
    try:
        for block in blocks:
            exec(compile(block, "CONTRIBUTING.md", "exec"), names)
        assert names["losses"][-1] < names["losses"][0] - 0.5
        settings = SourceSettings(path="counting", documents=3)
        texts = [document.text for document, _ in open_source(settings, seed=1).read()]
        assert texts == ["1000 1001 1002 1003 1004", "1010 1011 1012 1013 1014", "1020 1021 1022 1023 1024"]
        held_out = next(document.text for document, _ in open_source(settings, seed=1, held_out=True).read())
        assert held_out == "1005 1006 1007 1008 1009"
        data = DataSettings(source="counting", documents=3)
        assert [*texts_of("text", data, TokenizerSettings(), seed=1)] == texts
    finally:
        for table, content in zip(tables, before):
            table.clear()
            table.update(content)  # type: ignore[attr-defined]
