"""The README.md of a published model: its shape, how to load it, its training data and its results."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import yaml

from slmkit.model.architectures import architecture_of
from slmkit.model.config import SLMConfig
from slmkit.model.sizes import parameter_count

TEMPLATE = Path(__file__).with_name("model_card.md.jinja")
TRAINING_KEYS = (
    "tokens_per_step", "sequence_length", "optimizer", "learning_rate", "lr_scheduler_type", "weight_decay",
    "max_grad_norm", "precision",
)  # fmt: skip


def model_card(
    name: str,
    config: SLMConfig,
    base: str | None,
    is_adapter: bool,
    recipe: Mapping[str, Any],
    metrics: Sequence[Mapping[str, Any]],
    environment: Mapping[str, Any],
) -> str:
    """The model card of `name` (OWNER/NAME): a YAML header for the hub, then Markdown.

    `base` is the hub name of the base model, `metrics` are the lines of metrics.jsonl. What is empty is left out.
    """
    a, sources = architecture_of(config), _sources(recipe)
    header: dict[str, Any] = {
        "library_name": "peft" if is_adapter else "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["slmkit", *([recipe["objective"]] if recipe else [])],
    }
    if base:
        header["base_model"] = base
    if public := [source for source in sources if source.count("/") == 1 and not Path(source).suffix]:
        header["datasets"] = public
    facts: dict[str, Any] = {}  # the rows of the table on training
    if recipe:
        facts = {"objective": recipe["objective"], "data": ", ".join(sources)}
        if metrics:
            facts |= {"steps": f"{metrics[-1]['step']:,}", "trained tokens": f"{metrics[-1]['tokens']:,}"}
        facts |= {key: recipe.get("train", {}).get(key) for key in TRAINING_KEYS}
        facts |= {"seed": recipe.get("seed"), "device": environment.get("device")}
        facts |= {package: environment.get("packages", {}).get(package) for package in ("slmkit", "torch")}
    measured = [line for line in metrics if line.get("validation_loss") is not None]
    template = jinja2.Environment(trim_blocks=True, keep_trailing_newline=True).from_string(TEMPLATE.read_text("utf-8"))
    return template.render(
        name=name,
        title=name.partition("/")[2],
        header=yaml.safe_dump(header, sort_keys=False),
        base=base,
        is_adapter=is_adapter,
        a=a,
        family=config.model_type,
        parameters=parameter_count(a),
        facts={fact: value for fact, value in facts.items() if value not in (None, "")},
        best=min(measured, key=lambda line: line["validation_loss"], default=None),
        last=metrics[-1] if metrics else None,
    )


def _sources(recipe: Mapping[str, Any]) -> list[str]:
    """Names of the data sources; for local paths only the last part."""
    data = recipe.get("data", {})
    one = data.get("source") or []
    paths = [one] if isinstance(one, str) else [*one]
    paths += [source["path"] for source in data.get("sources", [])]
    return [path if "://" in path or not Path(path).exists() else Path(path).name for path in paths]
