"""The shape of the code: who may import whom, how much of it there may be, and no family named outside its files.

A budget is raised only in a commit that says why, and what was deleted for it.
"""

from __future__ import annotations

import ast
import io
import re
import tokenize
from collections import Counter
from pathlib import Path

PACKAGE = Path(__file__).parent.parent / "slmkit"
MODULES = {str(path.relative_to(PACKAGE)): path.read_text() for path in sorted(PACKAGE.rglob("*.py"))}
TREES = {name: ast.parse(source) for name, source in MODULES.items()}

BASE = {"config", "device", "files"}
ROOMS = {"model", "tokenizer", "data", "training", "adapt", "generation", "evaluation", "export", "serving"}
GENERATION = BASE | {"model", "tokenizer"}
MAY_IMPORT = {
    "config": set(),
    "device": set(),
    "files": {"config"},  # for its messages
    "model": BASE,
    "tokenizer": BASE,
    "data": {"config", "files", "tokenizer"},
    "training": BASE | {"model", "data"},
    "adapt": BASE | {"model"},
    "generation": GENERATION,
    "evaluation": GENERATION | {"data", "generation"},
    "export": GENERATION | {"adapt"},
    "serving": GENERATION | {"generation", "adapt"},
    "workflows": BASE | ROOMS,
    "api": BASE | ROOMS | {"workflows"},
}
# Lines of code: no blank lines, comments or docstrings. The goal of the design is 18,000 for the whole package, with
# export and evaluation in it; today's figures are above it, and a room may not grow beyond them.
CODE_LINES = {
    "": 30_694, "adapt": 1_450, "api": 604, "cli": 1_841, "data": 5_717, "evaluation": 2_517, "export": 2_195,
    "files": 379, "generation": 1_608, "model": 2_248, "serving": 1_728, "tokenizer": 1_488, "training": 4_459,
    "workflows": 3_988,
}  # fmt: skip
LINES_IN_A_FILE = 400
LEAST_LINES_IN_A_FILE = 40
SMALL_FILES = {  # each is a thing of its own, that others would not be looked for in
    "__main__.py", "cli/__main__.py",
    "model/norms.py",
}  # fmt: skip
ENTRIES_IN_A_FOLDER = 20
# What a reader opens on the ways that matter, and how many files at most: each is called by one before it, and named
# with what is called. CONTRIBUTING.md shows the same. Packages that only re-export (`data/sources`) do not count.
WALKS = {
    "the command → the update": (
        5,
        "cli/train:train workflows/train:train_recipe workflows/open_run:PreparedRun.train training/fit:fit "
        "training/loop:train",
    ),
    "the command → the loss": (
        7,
        "cli/train:train workflows/train:train_recipe workflows/open_run:PreparedRun.train training/fit:fit "
        "training/loop:train training/objective:NextToken.__call__ training/losses:linear_cross_entropy",
    ),
    "the loop → attention": (
        4,
        "training/loop:train training/objective:NextToken.__call__ model/decoder:Decoder.forward model/attend:attend",
    ),
    "`sliding_window` in a recipe → the kernel": (
        7,
        "workflows/model:model_for training/recipe/recipe:ModelSettings.build_config "
        "model/config:SLMConfig.from_preset model/initialization:build_decoder model/architectures:architecture_of "
        "model/decoder:Decoder model/attend:attend",
    ),
    "a config → the decoder": (
        3,
        "model/initialization:build_decoder model/architectures:architecture_of model/decoder:Decoder",
    ),
    "a text file → documents": (
        4,
        "data/prepare/corpus:build_corpus data/prepare/open_sources:items_of data/sources/source:Source.read "
        "data/sources/files:text_documents",
    ),
    "documents → shards": (
        3,
        "data/prepare/text_to_shards:prepare_text data/shards/folder:write_shard data/shards/writer:write_files",
    ),
    "shards → a batch": (
        4,
        "data/make_batches:make_batches data/stream:Stream data/shards/reader:TokenShards.runs data/batch:Batch.of",
    ),
    "a shard → the loss": (
        6,
        "training/loop:train data/stream:Stream.batch data/shards/reader:TokenShards.runs data/batch:Batch.of "
        "training/objective:NextToken.__call__ training/losses:linear_cross_entropy",
    ),
    "a step → a checkpoint": (
        5,
        "training/fit:fit training/loop:train training/checkpoints/saver:Saver "
        "training/checkpoints/checkpoint:write_checkpoint model/files/directory:save_decoder",
    ),
    "a request → a token": (
        4,
        "generation/engine:Engine.step generation/slots:Pools model/compiled:for_decoding generation/sampling:sample",
    ),
}
CALLED_THROUGH_AN_INSTANCE = {"forward", "__call__"}  # `model(…)`, `objective(…)`: no name to look for
LINES_IN_A_FUNCTION = 60
# A family may be named where families are data: its config and presets, and its table.
FAMILY_FILES = {"model/config.py", "model/families.py", "model/architectures.py"}
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


def code_lines(source: str, tree: ast.AST) -> int:
    """How many lines hold code: no blank lines, comments or docstrings."""
    docstrings: set[int] = set()
    for node in ast.walk(tree):
        may_have_one = isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
        if may_have_one and ast.get_docstring(node, clean=False) is not None:
            docstrings |= {*range(node.body[0].lineno, (node.body[0].end_lineno or 0) + 1)}
    no_code = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}
    found: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in no_code:
            found |= {*range(token.start[0], token.end[0] + 1)}
    return len(found - docstrings)


def test_what_counts_as_code() -> None:
    source = '"""A docstring."""\n\n# a comment\nx = 1  # code\n\n\ndef f():\n    """Another."""\n    return [\n    ]\n'
    assert code_lines(source, ast.parse(source)) == 4


def test_there_is_no_more_code_than_the_budgets_allow() -> None:
    lines: Counter[str] = Counter()
    for name, source in MODULES.items():
        counted = code_lines(source, TREES[name])
        lines[""] += counted
        if "/" in name:
            lines[room(name)] += counted
    assert not {name: count for name, count in lines.items() if count > CODE_LINES[name]}


def test_folders_and_files_are_neither_crowded_nor_fragments() -> None:
    entries: dict[Path, set[str]] = {}
    for name in MODULES:
        for path in (Path(name), *Path(name).parents[:-1]):
            if path.parent != Path():  # the top has the rooms
                entries.setdefault(path.parent, set()).add(path.name)
    assert not {folder: len(names) for folder, names in entries.items() if len(names) > ENTRIES_IN_A_FOLDER}
    short = {name for name, source in MODULES.items() if source.count("\n") < LEAST_LINES_IN_A_FILE}
    assert {name for name in short if not name.endswith("__init__.py")} <= SMALL_FILES


def imports_of(name: str, through_packages: bool = False) -> set[str]:
    """The files of slmkit that a file imports anywhere; with `through_packages` also those that a package hands on."""
    found = set[str]()
    for node in ast.walk(TREES[name]):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("slmkit."):
            base = (node.module or "").removeprefix("slmkit.").replace(".", "/")
            modules = {f"{base}/{alias.name}.py" for alias in node.names} & MODULES.keys()
            found |= modules or {f"{base}.py", f"{base}/__init__.py"} & MODULES.keys()
    packages = [one for one in found if one.endswith("__init__.py")] if through_packages else []
    return found.union(*map(imports_of, packages))


def test_no_file_imports_itself_by_way_of_others() -> None:
    """Not even for a type."""
    waiting = {name: imports_of(name) - {name} for name in MODULES}
    while ready := {name for name, imported in waiting.items() if not imported & waiting.keys()}:
        waiting = {name: imported for name, imported in waiting.items() if name not in ready}
    assert not waiting


def called_in(name: str) -> set[str]:
    """The names of the functions, classes and methods that a file calls."""
    functions = [node.func for node in ast.walk(TREES[name]) if isinstance(node, ast.Call)]
    names = {function.id for function in functions if isinstance(function, ast.Name)}
    return names | {function.attr for function in functions if isinstance(function, ast.Attribute)}


def defined_in(name: str) -> set[str]:
    """The functions and classes of a file, and the methods as `Class.method`."""
    parts = [node for node in TREES[name].body if isinstance(node, ast.ClassDef | ast.FunctionDef)]
    methods = {f"{part.name}.{node.name}" for part in parts for node in part.body if isinstance(node, ast.FunctionDef)}
    return methods | {part.name for part in parts}


def test_each_file_of_a_walk_is_called_by_one_before_it() -> None:
    for walk, (most, stops) in WALKS.items():
        before: list[str] = []
        for stop in stops.split():
            path, what = stop.split(":")
            name, called = f"{path}.py", what.split(".")[-1]
            assert what in defined_in(name), f"{walk}: {what} is not in {name}"
            callers = [other for other in before if name in imports_of(other, through_packages=True)]
            if called not in CALLED_THROUGH_AN_INSTANCE:
                callers = [other for other in callers if called in called_in(other)]
            assert callers or not before, f"{walk}: no file before {name} calls {what}"
            before.append(name)
        assert len(before) <= most, f"{walk}: {len(before)} files"


def test_contributing_shows_the_walks() -> None:
    page = (PACKAGE.parent / "CONTRIBUTING.md").read_text(encoding="utf-8")
    shown = {
        walk: (int(count), files)
        for walk, count, files in re.findall(r"^\| (.* → .*) \| (\d+) \| (.*) \|$", page, re.M)
    }
    expected = {}
    for walk, (_, stops) in WALKS.items():
        files = [f"`{stop.split(':')[0]}.py`" for stop in stops.split()]
        expected[walk] = len(files), ", ".join(files)
    assert shown == expected
