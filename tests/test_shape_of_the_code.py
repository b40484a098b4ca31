"""The house keeps its shape: who may import whom, how long things may be, and no family named outside its files."""

from __future__ import annotations

import ast
import re
from pathlib import Path

PACKAGE = Path(__file__).parent.parent / "slmkit"
MODULES = {str(path.relative_to(PACKAGE)): path.read_text() for path in sorted(PACKAGE.rglob("*.py"))}
TREES = {name: ast.parse(source) for name, source in MODULES.items()}

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


def room(name: str) -> str:
    """`model/rope.py` → `model`."""
    return name.split("/")[0].removesuffix(".py")


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


def forbidden_imports(home: str, tree: ast.AST) -> set[str]:
    if home in ("cli", "__init__", "__main__"):
        return set()
    return imported_rooms(tree) - MAY_IMPORT[home] - {home}


def test_a_module_imports_only_what_its_room_may() -> None:
    found = {name: forbidden_imports(room(name), tree) for name, tree in TREES.items()}
    assert not {name: rooms for name, rooms in found.items() if rooms}


def test_a_forbidden_import_is_found_wherever_it_stands() -> None:
    def forbidden(home: str, source: str) -> set[str]:
        return forbidden_imports(home, ast.parse(source))

    assert forbidden("model", "def f():\n    from slmkit.training import loop") == {"training"}
    assert forbidden("training", "import slmkit.evaluation.loss") == {"evaluation"}
    assert forbidden("data", "from slmkit import cli") == {"cli"}


def test_every_room_has_a_row_in_the_table() -> None:
    assert {room(name) for name in MODULES} <= MAY_IMPORT.keys() | {"cli", "__init__", "__main__"}


def test_files_and_functions_are_short() -> None:
    assert not {name: source.count("\n") for name, source in MODULES.items() if source.count("\n") > LINES_IN_A_FILE}
    lengths = {
        f"{name}: {node.name}": (node.end_lineno or 0) - node.lineno + 1
        for name, tree in TREES.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    }
    assert not {name: length for name, length in lengths.items() if length > LINES_IN_A_FUNCTION}


def test_nothing_branches_on_a_family() -> None:
    found = {name: FAMILY_BRANCH.search(source) for name, source in MODULES.items() if name not in FAMILY_FILES}
    assert not {name: match[0] for name, match in found.items() if match}


def test_every_module_has_a_docstring() -> None:
    assert not [name for name, tree in TREES.items() if not ast.get_docstring(tree)]


def test_nothing_a_user_loads_is_a_pickle() -> None:
    pickled = re.compile(r"\bimport pickle\b|torch\.load\(|torch\.save\(|allow_pickle\s*=\s*True")
    assert not [name for name, source in MODULES.items() if pickled.search(source)]
