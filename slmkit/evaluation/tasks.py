"""Standard tasks by name, run by lm-eval: its prompts, its metrics, with any of its `LM`s.

`tasks.yaml` says what an alias means and how local files look; everything else is lm-eval's own configuration. CORE
(Li et al. 2024, https://arxiv.org/abs/2406.11794) is a table of configurations, too.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatch
from functools import cache, partial
from pathlib import Path
from typing import Any

from jinja2 import TemplateError

from slmkit.config import UserError, did_you_mean, one_line, read_table
from slmkit.evaluation.results import TaskResult
from slmkit.evaluation.task_files import MissingFileError, example_rows, local_rows
from slmkit.evaluation.task_results import Group, group_result, task_result

CORE = "core"
# In lm-eval's task files: what a line defines, and its name or the list of names below it.
NAMED = re.compile(r"""^["']?(task|group|tag)["']?:[ \t]*(?:([^\s#][^\n#]*)|((?:\n[ \t]*- [^\n{:]+)+))""", re.MULTILINE)


@dataclass(eq=False)
class Tasks(dict[str, Any]):
    """lm-eval's tasks by name, and the groups of them that get a figure."""

    groups: dict[str, Group] = field(default_factory=dict)


def load_tasks(names: Sequence[str], **asked: Any) -> Tasks:
    """Tasks by the aliases of `tasks.yaml` or lm-eval's own names, made as the fields of `Maker` say.

    Raises `UserError` for an unknown name, for missing or malformed files, and for code tasks without a sandbox.
    """
    try:
        from slmkit.evaluation.harness_task import Factory, quiet
    except ImportError as error:
        if error.name != "lm_eval":
            raise
        raise UserError("standard tasks need lm-eval: pip install slmkit[eval]") from None
    table, loaded = task_table(), Tasks()
    make = Maker(**asked)
    with quiet(offline=make.data is not None):
        for name in names:
            alias = table["aliases"].get(name) or _own_name(name)
            manager = task_manager(*alias["folders"])
            manager._factory = Factory(make)
            found, wanted = _load(name, alias, manager, make)
            if "mean" in alias and len(found) > 1:
                note = f"{len(found)} of {wanted} tasks"
                note += ": not comparable with published CORE figures" if name == CORE and len(found) < wanted else ""
                found.groups[name] = Group((*found,), alias["mean"], ("centred",) if name == CORE else (), note)
            loaded.update(found)
            loaded.groups.update(found.groups)
    return loaded


def _load(name: str, alias: Mapping[str, Any], manager: Any, make: Maker) -> tuple[Tasks, int]:
    """The tasks of an alias, and how many they should be; of a `partial` one those whose files are there."""
    wanted = core_tasks(task_table()) if name == CORE else alias.get("chat" if make.chat else "", alias["tasks"])
    found, missing = Tasks(), manager._factory.missing
    for one in wanted:
        try:
            built = manager.load([one])
        except ImportError as error:
            raise UserError(f"{one}: {one_line(error)}") from None
        found.update({task: its for task, its in built["tasks"].items() if task not in missing})
        found.groups.update(_groups(built["groups"]))
    if missing and not (found and make.data and "partial" in alias):
        first, *others = missing
        more = f"; nor of {len(others)} more of its {len(found) + len(missing)} tasks: {', '.join(others[:5])}"
        raise MissingFileError(f"{missing[first]}{(more + ', …' * (len(others) > 5)) * bool(others)}")
    return found, len(wanted)


def _own_name(name: str) -> dict[str, Any]:
    """A task, group or tag of lm-eval as if it were an alias. Raises `UserError` for an unknown name."""
    known = names_of_lm_eval()
    if name not in known:
        raise UserError(f"no task {name!r}; {did_you_mean(name, [*task_table()['aliases'], *known])}")
    return {"tasks": [name], "folders": known[name]}


def _groups(groups: Mapping[str, Any]) -> Iterator[tuple[str, Group]]:
    """lm-eval's groups that have a figure."""
    for name, group in groups.items():
        if group.aggregate_metric_list:
            tasks = tuple(task.task_name for task in group.get_all_tasks())
            metrics = tuple(one.metric for one in group.aggregate_metric_list)
            yield name, Group(tasks, "documents" if group.aggregate_metric_list[0].weight_by_size else "equal", metrics)


@cache
def task_table() -> dict[str, Any]:
    return read_table(Path(__file__).with_name("tasks.yaml"))


@cache
def task_manager(*folders: str) -> Any:
    """lm-eval's index of the tasks in some of its folders; of all without a name, which takes seconds."""
    import lm_eval.tasks

    root = Path(lm_eval.tasks.__file__).parent
    return lm_eval.tasks.TaskManager(include_defaults=not folders, include_path=[str(root / name) for name in folders])


@cache
def names_of_lm_eval() -> dict[str, tuple[str, ...]]:
    """Every name of lm-eval, and the folder that defines it; none for a group or tag, whose tasks may be anywhere.

    Files without an ending are included by others, and may define their tags.
    """
    import lm_eval.tasks

    root, names = Path(lm_eval.tasks.__file__).parent, dict[str, tuple[str, ...]]()
    for path in sorted(path for path in root.rglob("*") if path.suffix in ("", ".yaml") and path.is_file()):
        text = path.read_text("utf-8")
        for key, inline, several in NAMED.findall(text):
            for name in re.findall(r"(?<!#)[^#\s'\"\[\],]+", inline or several.replace("- ", "")):
                names[name] = path.relative_to(root).parts[:1] if key == "task" and inline else ()
    return names


def core_tasks(table: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Configurations of CORE's tasks. `metadata` has the accuracy of guessing; `local` is for `Maker`."""

    def filled(value: Any, between: str) -> Any:
        before = between.rstrip(" ")
        space = between[len(before) :]
        if not isinstance(value, str):
            return value
        # lm-eval takes a rendered text of digits for a number, but not that of a column.
        return re.sub(r"^\{\{(\w+)\}\}$", r"\1", value.replace("{before}", before).replace("{space}", space))

    return [
        {
            **{key: filled(value, between) for key, value in table["core_kinds"][kind]["config"].items()},
            "task": f"core_{name}",
            "test_split": "test",
            "num_fewshot": shots,
            "metadata": {"version": 1.0, "chance": chance},
            "local": {"names": [file], "splits": ["test", "validation"], **table["core_kinds"][kind]["data"]},
        }
        for name, kind, file, shots, between, chance in table["core"]
    ]


@dataclass(frozen=True)
class Maker:
    """Makes a task of lm-eval's configuration of it."""

    data: Path | None = None  # a folder with the tasks' files; None: the hub, as lm-eval does
    shots: int | None = None  # instead of lm-eval's number, but for tasks that lm-eval always asks without
    chat: bool = False  # prompts in the model's chat template
    samples: int = 1  # answers for each problem of code tasks, drawn at `temperature`
    temperature: float | None = None
    unsafe_code: bool = False  # without a sandbox if there is none
    progress: Callable[[int, int], None] = lambda done, programs: None  # programs with a verdict, and all of them

    def __call__(self, config: dict[str, Any]) -> Any:
        from slmkit.evaluation.harness_task import FittedTask

        local = config.pop("local", None)
        chat = self.chat and local is None  # CORE is defined on plain text
        if self.shots is not None and (config.get("num_fewshot") != 0 or local):
            config["num_fewshot"] = self.shots
        config["num_fewshot"] = config.get("num_fewshot") or 0
        about: dict[str, Any] = {"samples": 1, "temperature": None}
        if config.get("unsafe_code"):
            config, about = self._with_samples(config)
        about |= {"data": {"hub": config.get("dataset_path"), "name": config.get("dataset_name")}}
        about["shots from"] = "the split that lm-eval takes"
        if self.data is not None:
            config = with_local_rows(config, self.data, local, about)
        elif local:
            raise UserError(f"{config['task']}: name the folder of the evaluation bundle's files: --task-data FOLDER")
        try:
            return FittedTask(config, about, chat)
        except (OSError, RuntimeError, ValueError, LookupError, TypeError, TemplateError) as error:
            if self.data is None and "scripts are no longer supported" in str(error):
                return self._from_parquet(config, about)
            if self.data is None:
                raise _no_hub(config, error) from None
            name, why = about["data"]["name"], one_line(error)
            raise UserError(f"{config['task']}: rows of {name} are not as lm-eval expects them: {why}") from None

    def _from_parquet(self, config: dict[str, Any], about: dict[str, Any]) -> Any:
        """The task with the hub's own conversion of a data set that a script would load."""
        from slmkit.evaluation.harness_task import FittedTask

        where = {"revision": "refs/convert/parquet", "data_dir": config.get("dataset_name") or "default"}
        try:
            return FittedTask({**config, "dataset_name": None, "dataset_kwargs": where}, about, self.chat)
        except (OSError, RuntimeError, ValueError) as error:
            raise _no_hub(config, error) from None

    def _with_samples(self, config: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        from slmkit.evaluation.code.tasks import with_sandbox

        temperature = self.temperature if self.temperature or self.samples == 1 else 0.8  # Chen et al. 2021
        sampling = {"do_sample": True, "temperature": temperature} if temperature else {"do_sample": False}
        generation = {**config.get("generation_kwargs", {}), **sampling}
        about = {"samples": self.samples, "temperature": temperature}
        config = {**config, "repeats": self.samples, "generation_kwargs": generation}
        config = with_sandbox(config, unsafe=self.unsafe_code, progress=self.progress)
        return config, {**about, "sandbox": config["metadata"]["sandbox"], "limits": config["metadata"]["limits"]}


def _no_hub(config: Mapping[str, Any], error: Exception) -> UserError:
    where = f"{config.get('dataset_path')} of the hub cannot be loaded ({one_line(error)})"
    return UserError(f"{config['task']}: {where}; name a folder with its files: --task-data FOLDER")


def with_local_rows(
    config: dict[str, Any], folder: Path, entry: Mapping[str, Any] | None, about: dict[str, Any]
) -> dict[str, Any]:
    """lm-eval's configuration of a task with the rows of local files. `about` gets where shots are from, and the files.

    Shots come from the task's own examples, a train file, or the rows of the same file that are not evaluated; for CORE
    from all its other rows, as published.
    """
    import datasets

    task, is_core = config["task"], entry is not None
    entries = task_table()["data"].items()
    entry = entry or next((found for pattern, found in entries if fnmatch(task, pattern)), {"names": [task]})
    evaluated = config.get("test_split") or config["validation_split"]
    few = config.get("fewshot_config") or {}
    examples = few.get("split") or config.get("fewshot_split") or config.get("training_split")
    rows = local_rows(folder, entry, evaluated, config)
    found = {evaluated: rows.rows}
    about |= {"data": rows.data, "shots from": "the task's own examples"}
    if not few.get("samples"):
        about["shots from"] = "the other rows" if is_core else "rows that are not evaluated"
        if examples not in (None, evaluated) and (train := example_rows(folder, entry, examples, config)):
            found[examples], about["shots from"] = train.rows, "the train file"
            if config["num_fewshot"]:
                about["data"]["shots"] = train.data
        else:
            few = {**few, "split": evaluated}
    try:
        splits = {split: datasets.Dataset.from_list(one) for split, one in found.items()}
    except (TypeError, ValueError) as error:  # pyarrow's errors are ValueErrors
        raise UserError(f"{task}: rows of different types in {folder}: {one_line(error)}") from None
    config = {**config, "custom_dataset": lambda **_: splits, "dataset_kwargs": None, "fewshot_config": few or None}
    return config | {key: None for key in ("training_split", "validation_split") if config.get(key) not in splits}


def expect_self_test(lm: Any, tasks: Mapping[str, Any], limit: int | None = None, seed: int = 1234) -> None:
    """The self-test of tasks as `run_tasks` would do it. Raises `UserError` if it fails."""
    from slmkit.evaluation.self_test import self_test

    run = partial(run_tasks, limit=limit, seed=seed, self_test=False)
    self_test(tasks, run, lm, repr((limit, seed)))


def run_tasks(
    lm: Any,
    tasks: Mapping[str, Any],
    *,
    limit: int | None = None,
    seed: int = 1234,
    self_test: bool = True,
    progress: Callable[[int, int], None] | None = None,
) -> list[TaskResult]:
    """The results of an lm-eval `LM` on tasks of `load_tasks`, in their order, then those of groups.

    `limit`: the first documents of each task. `seed`: of the choice of shots (1234 is lm-eval's own default).
    `progress` gets the requests answered and their number, if the `LM` tells. Raises `UserError` if the answers of a
    task leave no room for prompts, or if the self-test (`self_test.py`) fails.
    """
    from slmkit.evaluation.harness_task import evaluated, quiet

    if self_test:
        expect_self_test(lm, tasks, limit, seed)
    if progress is not None and hasattr(lm, "progress"):
        lm.progress = progress
    with quiet():
        for task in tasks.values():
            task.prepare(lm, limit, seed)
        found = evaluated(lm, tasks, limit)
        common = {"seed": seed, "limit": limit}
        results = {name: task_result(name, task, found.get(name, []), common) for name, task in tasks.items()}
    groups = getattr(tasks, "groups", {}).items()
    over = [group_result(name, group, [results[one] for one in group.tasks]) for name, group in groups]
    return [*results.values(), *over]
