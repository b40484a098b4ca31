"""lm-eval's samples as a `TaskResult`, and the figure of a group of tasks."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import numpy as np

from slmkit.evaluation.answers import NORMALISATION, extra_metrics
from slmkit.evaluation.results import Item, TaskResult, residuals

# lm-eval's aggregations: the forms where more and where less is better, and a document's (numerator, denominator).
Ratio = tuple[str, str, Callable[[Any], tuple[float, float]]]
RATIOS: dict[str, Ratio] = {
    "mean": ("mean", "loss", lambda value: (float(value), 1.0)),
    "perplexity": ("exp", "exp", lambda log_probability: (-log_probability, 1.0)),
    "weighted_perplexity": ("exp", "exp", lambda pair: (-pair[0], float(pair[1]))),
    "bits_per_byte": ("loss", "loss", lambda pair: (-pair[0] / math.log(2), float(pair[1]))),
}
CORPUS = ("bleu", "chrf", "ter")  # of a whole corpus in lm-eval; a document's value is that of its own text
LENGTHS = {"acc": "none", "acc_norm": "characters", "acc_bytes": "UTF-8 bytes", "acc_tokens": "tokens"}


@dataclass(frozen=True)
class Group:
    """A figure over several tasks: of which metrics (empty: of all), and what a task weighs: `equal`, `documents`, or
    `units` (ratio of sums over all documents)."""

    tasks: tuple[str, ...]
    mean: str
    metrics: tuple[str, ...] = ()
    note: str = ""


def task_result(name: str, task: Any, samples: Sequence[Mapping[str, Any]], common: Mapping[str, Any]) -> TaskResult:
    """A `TaskResult` from lm-eval's samples, of which there is one for each document and filter."""
    several = len({sample["filter"] for sample in samples}) > 1
    metrics, values, texts = dict[str, str](), dict[str, dict[str, Any]](), dict[str, dict[str, Any]]()
    for sample in samples:
        document = f"{sample['doc_id']}-{sample['doc_hash'][:12]}"
        texts.setdefault(document, shown(task, sample))
        for metric, form, pair in figures(task, sample):
            key = f"{metric},{sample['filter']}" if several and not metric.endswith("number") else metric
            metrics[key] = form
            values.setdefault(document, {})[key] = pair
    shots = task.config.num_fewshot or 0
    recipe = {
        "template": "chat" if task.chat else "none",
        "shots": shots,
        "shots from": task.about["shots from"] if shots else None,
        "dropped shots": sum(shots - used for used in task.shots.values()),
        "cut on the left": task.too_long,
        "new tokens": task.new_tokens or None,
        "normalisation": _normalisation(metrics),
        **common,
        **{key: value for key, value in task.about.items() if key != "shots from"},
        "version": f"lm-eval {version('lm_eval')}, task {task.VERSION}",
    }
    if corpus := [metric for metric in CORPUS if metric in task.aggregation()]:
        every = {metric: [sample[metric] for sample in samples if metric in sample] for metric in corpus}
        recipe["of the whole corpus"] = {name: task.aggregation()[name](its) for name, its in every.items() if its}
    room = f"no room for its prompt without shots and {task.new_tokens:,} new tokens in {task.context:,} positions"
    errors = [f"document {number}: {room}" for number in sorted(task.no_room)]
    items = tuple(Item(document, values.get(document, {}), text) for document, text in texts.items())
    return TaskResult(name, recipe, metrics, items, tuple(errors))


def figures(task: Any, sample: Mapping[str, Any]) -> list[tuple[str, str, tuple[float, float]]]:
    """(metric, form, (numerator, denominator)) of a document: lm-eval's own metrics and ours."""
    from lm_eval.api.registry import AGGREGATION_REGISTRY

    names = {function: name for name, function in AGGREGATION_REGISTRY.items()}
    found = list[tuple[str, str, tuple[float, float]]]()
    for metric in sample["metrics"]:
        aggregation = task.aggregation().get(metric)
        name = names.get(aggregation, "mean")
        better, worse, ratio = RATIOS.get(name, RATIOS["mean"])
        value = aggregation([sample[metric]]) if name in CORPUS else sample[metric]
        if name in RATIOS or name in CORPUS:
            form = better if task.higher_is_better().get(metric, True) else worse
            found.append((f"{metric} of sentences" if name in CORPUS else metric, form, ratio(value)))
    if task.OUTPUT_TYPE == "generate_until":
        extra = extra_metrics(task, sample["doc"], sample["resps"][0][0], sample["filtered_resps"][0])
        found += [(name, "loss" if name == "no_number" else "mean", (value, 1.0)) for name, value in extra.items()]
    chance = (task.config.metadata or {}).get("chance")
    if chance is not None:
        right = sample["acc"]
        if task.OUTPUT_TYPE == "multiple_choice":
            lengths = [len(task.lm._encode_pair(*pair)[1]) for pair in sample["arguments"]]
            right = float(np.argmax(_log_probabilities(sample) / np.array(lengths)) == gold(task, sample))
            found.append(("acc_tokens", "mean", (right, 1.0)))
        found.append(("centred", "mean", ((right - chance) / (1 - chance), 1.0)))
    return found


def gold(task: Any, sample: Mapping[str, Any]) -> Any:
    """The number of the right choice."""
    return task.doc_to_text(sample["doc"]) if task.multiple_input else sample["target"]


def _log_probabilities(sample: Mapping[str, Any]) -> np.ndarray:
    return np.array([answer[0] for answer in sample["filtered_resps"]])  # [choices], nats


def _normalisation(metrics: Mapping[str, str]) -> dict[str, Any]:
    """How the metrics that have a choice are computed."""
    found: dict[str, Any] = {metric: length for metric, length in LENGTHS.items() if metric in metrics}
    if any(metric.startswith("exact_match_normalised") for metric in metrics):
        found["exact_match_normalised"] = list(NORMALISATION)
    return found


def shown(task: Any, sample: Mapping[str, Any]) -> dict[str, Any]:
    """What a reader wants to see of a document."""
    text = {"prompt": sample["arguments"][0][0], "shots": task.shots.get(sample["doc_id"], 0)}
    if task.OUTPUT_TYPE != "multiple_choice":
        given = sample["resps"][0]
        return text | {"expected": sample["target"], "given": given[0] if len(given) == 1 else list(given)}
    choices, sums = task.doc_to_choice(sample["doc"]), _log_probabilities(sample)
    chosen, right = int(np.argmax(sums)), gold(task, sample)
    expected = choices[right] if isinstance(right, int) and 0 <= right < len(choices) else right
    found = {"expected": expected, "given": choices[chosen], "choices": choices}
    return text | found | {"log-probabilities": sums.tolist()}


def group_result(name: str, group: Group, parts: Sequence[TaskResult]) -> TaskResult:
    """The figure over several tasks: `units`: Σa/Σb of all documents; else the weighted mean of the tasks' figures.

    The tasks are fixed, so the error of a weighted mean is sqrt(Σ w² SE²). A document's value is the figure plus its
    own part in the error, so that the mean and the standard error of the values are these, and two models are paired
    by document.
    """
    shared = [key for key in parts[0].metrics if all(key in part.metrics for part in parts)]
    metrics = [key for key in shared if not group.metrics or key.split(",")[0] in group.metrics]
    values = dict[str, dict[str, tuple[float, float]]]()
    for metric in metrics:
        pairs = [{f"{part.task}/{item.id}": item.values[metric] for item in part.items} for part in parts]
        pairs = [one for one in pairs if one]
        every = {document: pair for one in pairs for document, pair in one.items()}
        if group.mean != "units":
            every = _linearised(pairs, [len(one) if group.mean == "documents" else 1 for one in pairs])
        for document, pair in every.items():
            values.setdefault(document, {})[metric] = pair
    data = [part.recipe["data"] for part in parts]
    digest = hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()
    shots = sorted({part.recipe["shots"] for part in parts})
    recipe = {
        **parts[0].recipe,
        **{key: sum(part.recipe[key] for part in parts) for key in ("dropped shots", "cut on the left")},
        "shots": shots[0] if len(shots) == 1 else shots,
        "shots from": next((part.recipe["shots from"] for part in parts if part.recipe["shots from"]), None),
        "data": {"tasks": len(data), "sha256": digest},
        "mean": group.mean,
        **({"note": group.note} if group.note else {}),
    }
    items = tuple(Item(document, found, {}) for document, found in values.items())
    errors = tuple(f"{part.task}: {error}" for part in parts for error in part.errors)
    return TaskResult(name, recipe, {metric: parts[0].metrics[metric] for metric in metrics}, items, errors)


def _linearised(
    tasks: Sequence[Mapping[str, tuple[float, float]]], weights: Sequence[float]
) -> dict[str, tuple[float, float]]:
    """Documents whose ratio of sums and its standard error are those of the weighted mean of tasks."""
    n, shares = sum(map(len, tasks)), [weight / sum(weights) for weight in weights]
    each = [residuals([*one.values()]) for one in tasks]  # figure, and the parts of its documents in the error
    figure = sum(share * ratio for share, (ratio, _) in zip(shares, each))
    scale = math.sqrt(n * max(n - 1, 1))  # `residuals` divides by it
    return {
        document: (figure + scale * share * part, 1.0)
        for one, share, (_, parts) in zip(tasks, shares, each)
        for document, part in zip(one, parts)
    }
