"""`slm report`: what is known of a run, as one HTML file without scripts, and without requests to anywhere.

Samples, names and recipes are shown as text: the template escapes everything except our own SVG.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from statistics import median
from typing import Any

import jinja2
from markupsafe import Markup

from slmkit.config import UserError, one_line, read_yaml
from slmkit.data.settings import CleaningSettings
from slmkit.evaluation.intervals import in_digits
from slmkit.evaluation.results import FORMS, TaskResult
from slmkit.files import read_text, write_whole
from slmkit.files.find import find_run
from slmkit.model.architectures import architecture_of
from slmkit.model.config import SLMConfig
from slmkit.model.sizes import flops_per_token, parameter_count
from slmkit.training.logging.list_runs import read_run
from slmkit.training.logging.metrics_log import MetricsLog, read_json
from slmkit.training.logging.progress import clock
from slmkit.training.recipe.changes import leaves_of
from slmkit.workflows.evaluation.cache import known_results
from slmkit.workflows.evaluation.report_curves import ERROR, TASKS, charts_of
from slmkit.workflows.page_data import DAMAGED, checkpoints_of, samples_of, text_of
from slmkit.workflows.push import METHODS, READ_TEXT, TRAINING_KEYS

PAGE = Path(__file__).with_name("report.html.jinja")
SHOWN = 6  # evaluations whose samples are open; the others are folded
CHIEF = 8  # metrics of a task that are open; the others are folded
Facts = Mapping[str, Any]  # name → what is shown; None is left out


def write_report(run: str | Path, path: Path, results: Sequence[str | Path] = ()) -> Path:
    """Write the report of a run to `path`, whole or not at all. Returns `path`.

    `results`: files of `slm eval --output`. Without any, those results of its best checkpoint that the cache has.
    Raises `UserError` for no run, damaged files of one, no matplotlib, and a path that cannot be written.
    """
    root = find_run(run)
    try:
        page = page_of(root, evaluations(root, results))
    except DAMAGED as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{root}: damaged, so that no report can be made: {one_line(error)}") from None
    try:
        write_whole(path, page.encode("utf-8", "replace"))
    except OSError as error:
        raise UserError(f"{path}: cannot be written: {error.strerror or error}") from None
    return path


def evaluations(root: Path, results: Sequence[str | Path]) -> list[tuple[str, TaskResult]]:
    """(model, result) of files of results, else of the cache."""
    if results:
        from slmkit.workflows.evaluation.compare import read_results

        names, found = read_results(results)
        return [(name, result) for name, several in zip(names, found) for result in several]
    try:
        return [(root.name, result) for result in known_results(root)]
    except UserError:  # no checkpoint yet
        return []


def page_of(root: Path, results: Sequence[tuple[str, TaskResult]]) -> str:
    """The report as HTML."""
    overview, recipe = read_run(root), read_yaml(root / "recipe.yaml")
    reports = [report for report in MetricsLog(root / "metrics.jsonl").read() if isinstance(report, dict)]
    described, plan = (read_json(root / name) for name in ("environment.json", "plan.json"))
    perfect = read_json(root / "data" / "validation" / "header.json").get("perfect_loss")
    main, more = charts_of(reports, perfect)
    config = config_of(root)
    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    environment.filters |= {
        "svg": Markup,
        "size": size,
        "said": said,
        "time": lambda seconds: f"{datetime.fromtimestamp(seconds):%Y-%m-%d %H:%M}",
    }
    return environment.from_string(PAGE.read_text("utf-8")).render(
        run=overview,
        name=root.resolve().name,
        method=METHODS.get(overview.objective, overview.objective),
        model=model_facts(config, recipe, overview.parameters),
        figures=figures(overview, reports),
        not_finite=[report.get("step") for report in reports if "loss" in report and report["loss"] is None],
        skipped=[(report.get("step"), report["skipped"]) for report in reports if report.get("skipped")],
        charts=main,
        more_charts=more,
        results=[
            (model, one, rows_of(one), special) for (model, one), special in zip(results, distinguishing(results))
        ],
        several_models=len({model for model, _ in results}) > 1,
        chief=CHIEF,
        tasks=tasks_in_training(reports),
        samples=samples(root, recipe),
        data=data_facts(recipe, described),
        phases=(recipe.get("data") or {}).get("phases") or [],
        fingerprints={
            name: value for name, value in (described.get("fingerprints") or {}).items() if isinstance(value, str)
        },
        xray=text_of(root / "xray.md"),
        cost=cost(reports, recipe, described, plan, config),
        checkpoints=checkpoints_of(root),
        settings={
            key: value for key, value in leaves_of(recipe) if key.partition(".")[2] in TRAINING_KEYS or key == "seed"
        },
        changes=described.get("changes") or [],
        recipe=read_text(root / "recipe.yaml"),
        environment=environment_facts(described),
        made=datetime.now().timestamp(),
    )


def config_of(root: Path) -> SLMConfig | None:
    """The configuration of the run's newest model; None before there is one, or without an adapter's base."""
    for place in ("best", "latest", "base"):
        with contextlib.suppress(UserError, OSError, ValueError):
            return SLMConfig.from_pretrained(root / place)
    return None


def model_facts(config: SLMConfig | None, recipe: Mapping[str, Any], parameters: int | None) -> str:
    """What the model is, in a sentence."""
    if config is None:
        return f"A model of {parameters:,} parameters." if parameters else "No model has been saved yet."
    a = architecture_of(config)
    adapter = f"LoRA of rank {recipe['lora'].get('r')} on a" if recipe.get("lora") else "A"
    return (
        f"{adapter} language model of {parameter_count(a):,} parameters: {config.model_type}, {a.depth} layers of "
        f"width {a.width}, {a.vocab_size:,} tokens, a context of {a.max_positions:,}."
    )


def figures(overview: Any, reports: Sequence[Mapping[str, Any]]) -> Facts:
    """The chief figures, for the top of the page."""
    last: dict[str, Any] = {}
    for report in reports:
        last |= {key: value for key, value in report.items() if value is not None}
    best, loss, reward = overview.validation_loss, last.get("loss"), last.get("answers/reward")
    return {
        "best validation loss": None if best is None else f"{best:.4f}",
        "last training loss": None if loss is None else f"{loss:.4f}",
        "last mean reward": None if reward is None else f"{reward:.3f}",
        "trained tokens": f"{overview.tokens:,}",
        "training time": clock(last["seconds"]) if "seconds" in last else None,
    }


def distinguishing(results: Sequence[tuple[str, TaskResult]]) -> list[str]:
    """For each result the settings by which it differs from others of its model and task; empty without others."""
    found = []
    for model, result in results:
        alike = [other.recipe for name, other in results if (name, other.task) == (model, result.task)]
        keys = [key for key in result.recipe if any(other.get(key) != result.recipe[key] for other in alike)]
        plain = [key for key in keys if not isinstance(result.recipe[key], Mapping)]  # mappings have hashes
        found.append(", ".join(f"{key.replace('_', ' ')} {said(result.recipe[key])}" for key in plain))
    return found


def rows_of(result: TaskResult) -> list[tuple[str, ...]]:
    """Metric, figure, standard error or interval, items and what is better, of each metric of a result."""
    return [
        (metric, *in_digits(result, metric), f"{result.score(metric).n:,}",
         "higher" if FORMS[form].higher_is_better else "lower")
        for metric, form in result.metrics.items()
    ]  # fmt: skip


def tasks_in_training(reports: Sequence[Mapping[str, Any]]) -> list[tuple[str, float, float | None, int]]:
    """Figure, value, standard error and step of the last evaluation on each task of `train.eval_tasks`."""
    last = {
        key: (key.removeprefix(TASKS), value, report.get(key + ERROR), report.get("step", 0))
        for report in reports
        for key, value in report.items()
        if key.startswith(TASKS) and not key.endswith(ERROR) and isinstance(value, int | float)
    }
    return [*last.values()]


def samples(root: Path, recipe: Mapping[str, Any]) -> list[tuple[str, list[tuple[int, str, bool]]]]:
    """(prompt, [(step, the model's continuation, whether it is open on the page)]) in the order of the recipe."""
    found = samples_of(root / "samples.md")
    last = len(found) - 1
    is_open = {round(i * last / (SHOWN - 1)) for i in range(SHOWN)}
    prompts = (recipe.get("train") or {}).get("sample_prompts") or []
    several = max((len(one["texts"]) for one in found), default=0)
    return [
        (
            prompt := prompts[number] if number < len(prompts) else "",
            [
                (one["step"], one["texts"][number].removeprefix(prompt.strip()).strip(), place in is_open)
                for place, one in enumerate(found)
                if number < len(one["texts"])
            ],
        )
        for number in range(several)
    ]


def data_facts(recipe: Mapping[str, Any], described: Mapping[str, Any]) -> Facts:
    """Sources with their weights, and what was counted in them."""
    data, read = recipe.get("data") or {}, described.get("data") or {}
    one = data.get("source") or []
    sources = [{"path": path} for path in ([one] if isinstance(one, str) else one)] + [*data.get("sources", [])]
    counts = {part: read.get(part) or {} for part in ("train", "validation")}
    unset = CleaningSettings().model_dump()
    cleaning = {key: value for key, value in (data.get("cleaning") or {}).items() if value != unset.get(key)}
    return {
        "sources": sources,
        "counts": {part: found for part, found in counts.items() if found},
        "weighted": any(source.get("weight") is not None for source in sources),
        "cleaning": cleaning,
    }


def cost(
    reports: Sequence[Mapping[str, Any]], recipe: Facts, described: Facts, plan: Facts, config: SLMConfig | None
) -> Facts:
    """Time, speed, memory and FLOPs. Energy is not measured, so it is not here."""
    seen = {
        key: [r[key] for r in reports if isinstance(r.get(key), int | float)]
        for key in ("seconds", "tokens", "memory_bytes", "mfu", "tokens_per_second", "step")
    }
    last = {key: values[-1] for key, values in seen.items() if values}
    processes = described.get("processes") or 1
    train = recipe.get("train") or {}
    flops, reads_text = None, recipe.get("objective") in READ_TEXT and not recipe.get("lora")
    if config and reads_text and "step" in last and train.get("tokens_per_step"):
        a = architecture_of(config)
        one = flops_per_token(a, train.get("sequence_length") or a.max_positions)
        flops = (one.forward + one.backward) * last["step"] * train["tokens_per_step"]
    predicted = plan.get("predicted") or {}
    speeds, shares, memory = (seen[key] for key in ("tokens_per_second", "mfu", "memory_bytes"))
    return {
        "device": described.get("device_name"),
        "processes": processes,
        "training time": clock(last["seconds"]) if "seconds" in last else None,
        "predicted before": clock(predicted["seconds"]) if predicted.get("seconds") else None,
        "device hours": f"{last['seconds'] * processes / 3600:.3g}" if "seconds" in last else None,
        "trained tokens": f"{last['tokens']:,}" if "tokens" in last else None,
        "tokens per second (median)": f"{median(speeds):,.0f}" if speeds else None,
        "share of the device's peak (MFU, median)": f"{median(shares):.0%}" if shares else None,
        "most memory": size(max(memory)) if memory else None,
        "FLOPs of forward and backward passes": None if flops is None else f"{flops:.3g}",
    }


ABOUT = "platform cpus threads device device_name compute_dtype weight_dtype processes job git_revision"


def environment_facts(described: Mapping[str, Any]) -> Facts:
    """Versions and machine; empty before the run has begun."""
    known = {"python": described.get("python"), **(described.get("packages") or {})}
    known |= {name.replace("_", " "): described.get(name) for name in ABOUT.split()}
    return {name: value for name, value in known.items() if value is not None}


def said(value: Any) -> str:
    """A value of a recipe in words, without braces and quotes."""
    if isinstance(value, Mapping):
        return "; ".join(f"{name}: {said(inner)}" for name, inner in value.items() if inner is not None)
    return ", ".join(map(said, value)) if isinstance(value, list | tuple) else str(value)


def size(count: float) -> str:
    """Bytes as `1.2 GiB`."""
    power = min(4, int(math.log2(count) // 10)) if count >= 1 else 0
    return f"{count / 1024**power:.{1 if power else 0}f} {('bytes', 'KiB', 'MiB', 'GiB', 'TiB')[power]}"
