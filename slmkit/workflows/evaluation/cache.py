"""Results that were computed before, kept by what determines them.

The key of an entry is the sha256 of everything a figure depends on: the content of all files of the model, its
tokenizer and, for an adapter, its base; the texts or the task's documents and configuration; the recipe; slmkit's own
code and the versions of the libraries. Files are always read whole: a file can be changed in place within one tick of
its times, and reading it takes less time than loading it.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import slmkit
from slmkit.config import UserError
from slmkit.evaluation.results import TaskResult
from slmkit.files import cache_folder, write_whole
from slmkit.files.find import find_model_directory, find_tokenizer_directory
from slmkit.model.files.adapter_directory import base_of, is_adapter

# Files that a model or tokenizer is loaded from: weights, configurations, vocabularies, chat templates.
LOADED = {".safetensors", ".json", ".jinja", ".model", ".txt", ".gz", ".tiktoken"}


def model_content(model: str | Path) -> dict[str, str]:
    """sha256 of each file that determines what a model, run or adapter answers, by folder and name."""
    directory = find_model_directory(model)
    folders = [
        directory,
        Path(find_tokenizer_directory(model)),
        *([base_of(directory)] if is_adapter(directory) else []),
    ]
    files = [(n, path) for n, folder in enumerate(dict.fromkeys(folders)) for path in sorted(folder.iterdir())]
    return {f"{n}/{path.name}": digest(path) for n, path in files if path.suffix in LOADED and path.is_file()}


def digest(path: Path) -> str:
    """sha256 (hex) of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def digest_of(values: Iterable[Any]) -> str:
    """sha256 (hex) of JSON values, in their order."""
    found = hashlib.sha256()
    for value in values:
        found.update(json.dumps(value, sort_keys=True, default=str).encode() + b"\n")
    return found.hexdigest()


@cache
def code_content() -> str:
    """sha256 (hex) of slmkit's own code and tables: of one version there are several while it is worked on."""
    package = Path(slmkit.__file__).parent
    files = sorted(path for path in package.rglob("*") if path.suffix in (".py", ".yaml", ".cpp"))
    return digest_of([str(path.relative_to(package)), digest(path)] for path in files)


def stored(key: Mapping[str, Any], compute: Callable[[], list[TaskResult]]) -> list[TaskResult]:
    """The results stored under `key`, else those of `compute`, which are then stored.

    An entry that is damaged, or of another key, is computed again and replaced. If the cache cannot be written, the
    results are returned all the same.
    """
    path = None
    with contextlib.suppress(OSError):
        path = cache_folder() / "evaluations" / f"{digest_of([key])}.json"
        with contextlib.suppress(ValueError, KeyError, TypeError, UserError):
            entry = json.loads(path.read_bytes())
            if entry["key"] == json.loads(json.dumps(key, default=str)):
                return [TaskResult.from_json(one) for one in entry["results"]]
    results = compute()
    if path is not None:
        with contextlib.suppress(OSError):
            path.parent.mkdir(parents=True, exist_ok=True)
            content = {"key": key, "results": [one.to_json() for one in results]}
            write_whole(path, json.dumps(content, default=str))
    return results


def known_results(model: str | Path) -> list[TaskResult]:
    """The stored results of a model as it is now, the latest last; of the same task and recipe only the latest."""
    content, found = model_content(model), dict[str, TaskResult]()
    with contextlib.suppress(OSError):
        entries = (cache_folder() / "evaluations").glob("*.json")
        for path in sorted(entries, key=lambda path: path.stat().st_mtime):
            with contextlib.suppress(OSError, ValueError, KeyError, TypeError, UserError):
                entry = json.loads(path.read_bytes())
                if content.items() <= entry["key"].items():
                    for one in map(TaskResult.from_json, entry["results"]):
                        found[digest_of([one.task, one.recipe])] = one
    return [*found.values()]
