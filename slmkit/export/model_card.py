"""The README.md of a published model: its shape, how to load it, its training data and its results."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from slmkit.model.architectures import architecture_of
from slmkit.model.config import SLMConfig
from slmkit.model.sizes import parameter_count

TRAINING_KEYS = (
    "tokens_per_step", "sequence_length", "optimizer", "learning_rate", "lr_scheduler_type", "weight_decay",
    "max_grad_norm", "precision",
)  # fmt: skip


@dataclass(frozen=True)
class CardFacts:
    """Contents of a model card besides the model's shape; empty ones are left out."""

    name: str  # OWNER/NAME
    base: str | None = None  # hub name of the base model
    is_adapter: bool = False
    recipe: Mapping[str, Any] = field(default_factory=dict)
    metrics: Sequence[Mapping[str, Any]] = ()  # lines of metrics.jsonl
    environment: Mapping[str, Any] = field(default_factory=dict)


def model_card(facts: CardFacts, config: SLMConfig) -> str:
    """The text of the model card: a YAML header for the hub, then Markdown."""
    a = architecture_of(config)
    sources = _sources(facts.recipe)
    header: dict[str, Any] = {
        "library_name": "peft" if facts.is_adapter else "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["slmkit", *([facts.recipe["objective"]] if facts.recipe else [])],
    }
    if facts.base:
        header["base_model"] = facts.base
    if public := [name for name in sources if name.count("/") == 1 and not Path(name).suffix]:
        header["datasets"] = public
    what = "An adapter (LoRA) for a" if facts.is_adapter else "A"
    lines = [
        f"---\n{yaml.safe_dump(header, sort_keys=False)}---\n",
        f"# {facts.name.partition('/')[2]}\n",
        f"{what} language model of {parameter_count(a):,} parameters: {config.model_type}, {a.depth} layers of width "
        f"{a.width}, {a.vocab_size:,} tokens, a context of {a.max_positions:,}."
        + (f" Trained on from `{facts.base}`." if facts.base else "")
        + "\n",
        _use(facts),
    ]
    if facts.recipe:
        lines.append(_training(facts, sources))
    if facts.metrics:
        lines.append(_results(facts.metrics))
    return "\n".join(lines)


def _use(facts: CardFacts) -> str:
    loads = "AutoPeftModelForCausalLM" if facts.is_adapter else "AutoModelForCausalLM"
    library = "peft" if facts.is_adapter else "transformers"
    imports = "from transformers import AutoTokenizer\n" if facts.is_adapter else ""
    both = loads if facts.is_adapter else f"{loads}, AutoTokenizer"
    return (
        f"## Use\n\n```python\nfrom {library} import {both}\n{imports}\n"
        f'tokenizer = AutoTokenizer.from_pretrained("{facts.name}")\n'
        f'model = {loads}.from_pretrained("{facts.name}")\n```\n\n'
        f"or with slmkit: `slm generate {facts.name}`\n"
    )


def _training(facts: CardFacts, sources: Sequence[str]) -> str:
    train, machine = facts.recipe.get("train", {}), facts.environment
    rows: dict[str, Any] = {"objective": facts.recipe["objective"], "data": ", ".join(sources)}
    if facts.metrics:
        rows |= {"steps": f"{facts.metrics[-1]['step']:,}", "trained tokens": f"{facts.metrics[-1]['tokens']:,}"}
    rows |= {key: train[key] for key in TRAINING_KEYS if train.get(key) is not None}
    rows |= {"seed": facts.recipe.get("seed"), "device": machine.get("device")}
    rows |= {name: machine.get("packages", {}).get(name) for name in ("slmkit", "torch")}
    table = "".join(f"| {name} | {value} |\n" for name, value in rows.items() if value not in (None, ""))
    return f"## Training\n\n| | |\n| --- | --- |\n{table}"


def _results(metrics: Sequence[Mapping[str, Any]]) -> str:
    measured = [line for line in metrics if line.get("validation_loss") is not None]
    if not measured:
        return f"## Results\n\nTraining loss at the end: {metrics[-1]['loss']:.3f}.\n"
    best = min(measured, key=lambda line: line["validation_loss"])
    return f"## Results\n\nValidation loss: {best['validation_loss']:.3f} (its lowest, after step {best['step']:,}).\n"


def _sources(recipe: Mapping[str, Any]) -> list[str]:
    """Names of the data sources; for local paths only the last part."""
    data = recipe.get("data", {})
    one = data.get("source") or []
    paths = [one] if isinstance(one, str) else [*one]
    paths += [source["path"] for source in data.get("sources", [])]
    return [path if "://" in path or not Path(path).exists() else Path(path).name for path in paths]
