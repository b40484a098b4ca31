"""Standard tasks by name, run by lm-eval: its prompts, its metrics, with any of its `LM`s.

`tasks.yaml` says what an alias means and how local files look; everything else is lm-eval's own configuration.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

from slmkit.config import UserError, did_you_mean, one_line, read_table
from slmkit.evaluation.results import Item, TaskResult
from slmkit.evaluation.task_files import local_rows

# lm-eval's aggregations: our form where more is better and where less is, and a document's (numerator, denominator).
LN2 = 0.6931471805599453
RATIOS: dict[str, tuple[str, str, Callable[[Any], tuple[float, float]]]] = {
    "mean": ("mean", "loss", lambda value: (float(value), 1.0)),
    "perplexity": ("exp", "exp", lambda log_probability: (-log_probability, 1.0)),
    "weighted_perplexity": ("exp", "exp", lambda pair: (-pair[0], float(pair[1]))),
    "bits_per_byte": ("loss", "loss", lambda pair: (-pair[0] / LN2, float(pair[1]))),
}


class Tasks(dict[str, Any]):
    """lm-eval's tasks by name, and in `groups` its groups of them."""

    groups: dict[str, Any]


def load_tasks(
    names: Sequence[str],
    *,
    data: Path | None = None,
    shots: int | None = None,
    chat: bool = False,
    samples: int = 1,
    temperature: float | None = None,
) -> Tasks:
    """Tasks by the aliases of `tasks.yaml` or lm-eval's own names.

    `data`: a folder with the tasks' files; None: the hub, as lm-eval does. `shots`: instead of lm-eval's number, but
    for tasks that lm-eval always asks without. `chat`: prompts in the model's chat template. `samples`: answers for
    each problem of code tasks, drawn at `temperature`. Raises `UserError` for an unknown name, and for missing or
    malformed files.
    """
    try:
        from slmkit.evaluation.harness_task import Factory, FittedTask
    except ImportError as error:
        if error.name != "lm_eval":
            raise
        raise UserError("standard tasks need lm-eval: pip install slmkit[eval]") from None
    table = read_table(Path(__file__).with_name("tasks.yaml"))

    def make(config: dict[str, Any]) -> FittedTask:
        if shots is not None and config.get("num_fewshot") != 0:
            config["num_fewshot"] = shots
        config["num_fewshot"] = config.get("num_fewshot") or 0
        shots_from, found = "lm-eval's own split", {"hub": [config.get("dataset_path"), config.get("dataset_name")]}
        if data is not None:
            config, shots_from, found = with_local_rows(config, data, table["data"])
        return FittedTask(config, found, shots_from, chat)

    loaded = Tasks()
    loaded.groups = {}
    with quiet(), offline() if data else contextlib.nullcontext():
        for name in names:
            alias = table["aliases"].get(name, {"tasks": [name]})
            manager = task_manager(alias.get("folder"))
            manager._factory = Factory(make)
            wanted = alias.get("chat", alias["tasks"]) if chat else alias["tasks"]
            if unknown := [one for one in wanted if one not in manager.task_index]:
                raise UserError(f"no task {unknown[0]!r}: {did_you_mean(unknown[0], manager.all_tasks)}")
            found = manager.load(list(wanted))
            loaded.update(found["tasks"])
            loaded.groups.update(found["groups"])
    return loaded


@cache
def task_manager(folder: str | None) -> Any:
    """lm-eval's index of its tasks, of one of its folders or (half a minute) of all."""
    import lm_eval.tasks

    root = Path(lm_eval.tasks.__file__).parent
    return lm_eval.tasks.TaskManager(include_defaults=False, include_path=str(root / (folder or "")))


def with_local_rows(
    config: dict[str, Any], folder: Path, entries: Mapping[str, Any]
) -> tuple[dict[str, Any], str, dict[str, Any]]:
    """lm-eval's configuration of a task with the rows of local files, where its shots are from, and the files.

    Shots come from the task's own examples, a train file, or the rows of the same file that are not evaluated.
    """
    import datasets

    task = config["task"]
    entry = entries.get(task, {"names": [task]})
    evaluated = config.get("test_split") or config["validation_split"]
    few = config.get("fewshot_config") or {}
    examples = few.get("split") or config.get("fewshot_split") or config.get("training_split")
    found = {evaluated: local_rows(folder, task, entry, evaluated, config)}
    shots_from = "the task's own examples"
    if not few.get("samples"):
        shots_from = "rows that are not evaluated"
        if examples not in (None, evaluated) and (train := local_rows(folder, task, entry, examples, config, True)):
            found[examples], shots_from = train, "the train file"
        if len(found) == 1:
            config |= {
                "training_split": None,
                "fewshot_split": evaluated,
                "fewshot_config": {**few, "split": evaluated},
            }
    try:
        splits = {split: datasets.Dataset.from_list(one.rows) for split, one in found.items()}
    except (TypeError, ValueError) as error:  # pyarrow's errors are ValueErrors
        raise UserError(f"{task}: rows of different types in {folder}: {one_line(error)}") from None
    data = {**found[evaluated].data, **({"shots": found[examples].data} if len(found) > 1 else {})}
    return {**config, "custom_dataset": lambda **_: splits, "dataset_kwargs": None}, shots_from, data


def run_tasks(
    lm: Any,
    tasks: Mapping[str, Any],
    *,
    limit: int | None = None,
    seed: int = 1234,
    self_test: bool = True,
    progress: Callable[[int, int], None] | None = None,
) -> list[TaskResult]:
    """The results of an lm-eval `LM` on tasks of `load_tasks`, in their order; groups behind their tasks.

    `limit`: the first documents of each task. `seed`: of the choice of shots (1234 is lm-eval's own default).
    `progress` gets the requests answered and their number. Raises `UserError` if a task leaves no room for prompts.
    """
    with quiet():
        from lm_eval.evaluator import evaluate

        for task in tasks.values():
            task.prepare(lm, limit, seed)
        asked = {name: task for name, task in tasks.items() if next(task.doc_iterator(limit=limit), None)}
        if progress is not None and hasattr(lm, "progress"):
            lm.progress = progress
        chat = any(task.chat for task in tasks.values())
        found = {"samples": {}} if not asked else evaluate(
            lm, {"tasks": asked}, limit=limit, bootstrap_iters=0, apply_chat_template=chat, fewshot_as_multiturn=chat,
            confirm_run_unsafe_code=True,
        )  # fmt: skip
    common = {"template": "chat" if chat else "none", "seed": seed, "limit": limit, "lm-eval": version("lm_eval")}
    return [task_result(name, task, found["samples"].get(name, []), common) for name, task in tasks.items()]


def task_result(name: str, task: Any, samples: Sequence[Mapping[str, Any]], common: Mapping[str, Any]) -> TaskResult:
    """A `TaskResult` from lm-eval's samples: one for each document and filter."""
    from lm_eval.api.registry import AGGREGATION_REGISTRY

    names = {function: name for name, function in AGGREGATION_REGISTRY.items()}
    filters = {sample["filter"] for sample in samples}
    metrics, values, texts = dict[str, str](), dict[str, dict[str, Any]](), dict[str, dict[str, Any]]()
    for sample in samples:
        document = f"{sample['doc_id']}-{sample['doc_hash'][:12]}"
        texts.setdefault(document, shown(task, sample))
        for metric in sample["metrics"]:
            better, worse, ratio = RATIOS.get(names.get(task.aggregation().get(metric), "mean"), (None, None, None))
            if ratio is not None:
                key = metric if len(filters) == 1 else f"{metric},{sample['filter']}"
                metrics[key] = better if task.higher_is_better().get(metric, True) else worse
                values.setdefault(document, {})[key] = ratio(sample[metric])
    shots = task.config.num_fewshot or 0
    recipe = {
        **common,
        "data": dict(task.data),
        "shots": shots,
        "shots from": task.shots_from if shots else None,
        "dropped shots": sum(shots - used for used in task.shots.values()),
        "cut on the left": task.too_long,
        "new tokens": task.new_tokens or None,
        "version": task.VERSION,
    }
    errors = [
        f"document {number}: the prompt without shots and {task.new_tokens:,} new tokens do not fit into "
        f"{task.context:,} positions"
        for number in sorted(task.no_room)
    ]
    items = tuple(Item(document, values.get(document, {}), text) for document, text in texts.items())
    return TaskResult(name, recipe, metrics, items, tuple(errors))


def shown(task: Any, sample: Mapping[str, Any]) -> dict[str, Any]:
    """What a reader wants to see of a document."""
    prompts, given = [request.args[0] for request in _instances(task, sample["doc_id"])], sample["filtered_resps"]
    text = {"prompt": prompts[0], "expected": sample["target"], "given": given, "shots": task.shots[sample["doc_id"]]}
    if task.OUTPUT_TYPE == "multiple_choice":
        choices, chances = task.doc_to_choice(sample["doc"]), [answer[0] for answer in given]
        text |= {
            "choices": choices,
            "log-probabilities": chances,
            "given": max(range(len(chances)), key=lambda i: chances[i]),
        }
    return text


def _instances(task: Any, document: int) -> list[Any]:
    return [instance for instance in task.instances if instance.doc_id == document]


@contextlib.contextmanager
def replaced(owner: Any, **values: Any) -> Iterator[None]:
    """Attributes of a module or object, set for a while."""
    before = {name: getattr(owner, name) for name in values}
    try:
        for name, value in values.items():
            setattr(owner, name, value)
        yield
    finally:
        for name, value in before.items():
            setattr(owner, name, value)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """No log lines below errors and no progress bars of lm-eval and datasets."""
    import datasets
    import lm_eval.api.task

    logger, bars = logging.getLogger("lm_eval"), datasets.utils.are_progress_bars_disabled()
    level = logger.level
    logger.setLevel(logging.ERROR)
    datasets.disable_progress_bars()
    try:
        with replaced(lm_eval.api.task, tqdm=lambda items, **_: items):
            yield
    finally:
        logger.setLevel(level)
        if not bars:
            datasets.enable_progress_bars()


@contextlib.contextmanager
def offline() -> Iterator[None]:
    """No attempt to reach the hub."""
    import datasets.config
    import huggingface_hub.constants

    with replaced(datasets.config, HF_HUB_OFFLINE=True), replaced(huggingface_hub.constants, HF_HUB_OFFLINE=True):
        yield
