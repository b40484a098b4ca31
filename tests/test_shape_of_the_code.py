"""The house keeps its shape: who may import whom, how long things may be, and no family named outside its files."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "slmkit"
MODULES = sorted(PACKAGE.rglob("*.py"))

BASE = {"config", "device", "network", "hub", "find"}
GENERATION = BASE | {"model", "tokenizer"}
MAY_IMPORT = {
    "config": set(),
    "device": set(),
    "network": {"config"},
    "hub": {"config", "network"},
    "find": {"config", "hub"},
    "model": BASE,
    "tokenizer": BASE,
    "data": {"config", "network", "hub", "find", "tokenizer"},
    "training": BASE | {"model", "data"},
    "adapt": BASE | {"model"},
    "generation": GENERATION,
    "evaluation": GENERATION | {"data", "generation"},
    "export": GENERATION | {"adapt"},
    "serving": GENERATION | {"generation"},
    "api": BASE | {
        "model", "tokenizer", "data", "training", "adapt", "generation", "evaluation",
        "export", "serving",
    },
}  # fmt: skip
LINES_IN_A_FILE = 400
LINES_IN_A_FUNCTION = 60
# A family may be named where families are data: its config and presets, and its table.
FAMILY_FILES = {"model/config.py", "model/families.py"}
FAMILY_BRANCH = re.compile(r"(model_type|family)\s*(==|!=|in)\s*[\"'(\[{]")


def room(path: Path) -> str:
    """`slmkit/model/rope.py` → `model`."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported_rooms(tree: ast.AST) -> set[str]:
    """The rooms of slmkit that a module imports anywhere, inside functions too."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports name the whole path, so that this test can read them"
            base = node.module or ""
            names |= {f"{base}.{alias.name}" for alias in node.names} if base == "slmkit" else {base}
    return {name.split(".")[1] for name in names if name.startswith("slmkit.")}


def forbidden_imports(home: str, source: str) -> set[str]:
    if home in ("cli", "__init__", "__main__"):
        return set()
    return imported_rooms(ast.parse(source)) - MAY_IMPORT[home] - {home}


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_module_imports_only_what_its_room_may(path: Path) -> None:
    forbidden = forbidden_imports(room(path), path.read_text())
    assert not forbidden, f"{room(path)} may not import {forbidden}"


def test_a_forbidden_import_is_noticed_wherever_it_hides() -> None:
    assert forbidden_imports("model", "def f():\n    from slmkit.training import loop") == {"training"}
    assert forbidden_imports("training", "import slmkit.evaluation.loss") == {"evaluation"}
    assert forbidden_imports("data", "from slmkit import cli") == {"cli"}


def test_every_room_of_the_house_has_a_row_in_the_table() -> None:
    assert {room(path) for path in MODULES} <= MAY_IMPORT.keys() | {"cli", "__init__", "__main__"}


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_files_and_functions_stay_short(path: Path) -> None:
    source = path.read_text()
    assert source.count("\n") <= LINES_IN_A_FILE
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = (node.end_lineno or 0) - node.lineno + 1
            assert length <= LINES_IN_A_FUNCTION, f"{node.name} has {length} lines"


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_nothing_branches_on_a_family(path: Path) -> None:
    if str(path.relative_to(PACKAGE)) not in FAMILY_FILES:
        assert not FAMILY_BRANCH.search(path.read_text())


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_modules_say_what_they_are_for(path: Path) -> None:
    assert ast.get_docstring(ast.parse(path.read_text()))


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_nothing_a_user_loads_is_a_pickle(path: Path) -> None:
    source = path.read_text()
    assert not re.search(r"\bimport pickle\b|torch\.load\(|torch\.save\(|allow_pickle\s*=\s*True", source)
