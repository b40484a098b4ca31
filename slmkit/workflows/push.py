"""`slm push`: publish a model on the hub, with a model card of what it is, how it was made and measured, and how it is
run.

Names, paths and figures come from files that anybody may have written: they are escaped for the place where they stand.
"""

from __future__ import annotations

import html
import json
import math
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jinja2
import yaml

from slmkit.config import UserError, read_json_object, read_yaml
from slmkit.files.find import find_model_directory, learned_conversations
from slmkit.files.hub import HubName, hub_name, publish
from slmkit.model.architectures import architecture_of
from slmkit.model.config import SLMConfig
from slmkit.model.families import NOT_IN_TRANSFORMERS
from slmkit.model.files.adapter_directory import ADAPTER_CONFIG, is_adapter
from slmkit.model.files.directory import quantization_of
from slmkit.model.sizes import parameter_count
from slmkit.tokenizer import SLMTokenizer
from slmkit.training.checkpoints.checkpoint import step_of
from slmkit.training.run_directory import RunDirectory
from slmkit.workflows.merge import MADE_FROM

# Files of a checkpoint that do not belong to the model.
LEFT_OUT = ("MANIFEST.json", "README.md")


def push_model(
    source: str | Path, name: str, private: bool = False, revision: str | None = None, license: str | None = None
) -> str:
    """Publish a run's best checkpoint, or a model directory, as `OWNER/NAME`, with a model card.

    `license` is named in the card; without one, that of the recipe is.

    Creates the repository (`private` or public) and the branch `revision` if they do not exist. One commit has all
    files, without the training state. Returns the URL of the page. Raises `UserError` for a wrong name, a model without
    safetensors, and errors of the hub.
    """
    wanted = hub_name(name if name.startswith("hf://") else f"hf://{name}")
    if wanted is None or (wanted.revision is not None and revision is not None):
        raise UserError(f"{name}: expected OWNER/NAME, as the hub names a model")
    wanted = HubName(wanted.name, wanted.revision or revision)
    directory = find_model_directory(source)
    files: dict[str, Path | bytes] = {
        path.name: path for path in sorted(directory.iterdir()) if path.is_file() and path.name not in LEFT_OUT
    }
    if not any(file.endswith(".safetensors") for file in files):
        raise UserError(f"{directory}: it has no weights in safetensors: there is nothing to publish")
    own_card = directory / "README.md"
    if own_card.is_file() and license is None:
        files["README.md"] = own_card
    else:
        files["README.md"] = card_of(Path(source), directory, wanted.name, license).encode()
        files |= {path.name: path for path in [RunDirectory(source).plot] if path.is_file()}
    return publish(wanted, files, private, f"Upload from slmkit: {directory.resolve().name}")


# -- what is known of a model ------------------------------------------------------------------------------------------


def card_of(source: Path, directory: Path, name: str, license: str | None = None) -> str:
    """The model card of a run's model, or of a model directory, that is published as `name`. A run's loss.png is to lie
    beside it.
    """
    run = RunDirectory(source)
    recipe = read_yaml(run.recipe) if run.recipe.is_file() else {}
    merge = read_yaml(directory / MADE_FROM) if (directory / MADE_FROM).is_file() else {}
    base = _base(directory, recipe)  # before the config, which an adapter without its base has not
    merged = [hub_name(entry["model"]) for entry in merge.get("models", [])]
    known = Known(
        SLMConfig.from_pretrained(directory),
        bases=[*([base] if base else []), *dict.fromkeys(one.name for one in merged if one)],
        license=license or recipe.get("license"),
        is_adapter=is_adapter(directory),
        has_chat=_has_chat(directory) and learned_conversations(source) is not False,
        curve=run.plot.name if run.plot.is_file() else None,
        quantization=quantization_of(directory),
        merge=merge,
        recipe=recipe,
        metrics=run.metrics.read(),
        step=step_of(directory.resolve()) if directory.resolve().name.startswith("step-") else None,
        environment=run.described(),
    )
    return model_card(name, known)


def _has_chat(directory: Path) -> bool:
    try:
        return SLMTokenizer.from_pretrained(directory).chat_template is not None
    except UserError:  # an adapter may have no tokenizer
        return False


def _base(directory: Path, recipe: Mapping[str, Any]) -> str | None:
    """The hub name of this model's base, if it has one. Raises `UserError` for an adapter without one."""
    named = (recipe.get("model") or {}).get("path")
    if is_adapter(directory):
        named = read_json_object(directory / ADAPTER_CONFIG)["base_model_name_or_path"]
    found = hub_name(named) if named else None
    if found is None and is_adapter(directory):
        raise UserError(
            f"{directory}: an adapter for {named}, which is only on this machine: publish that first and name it in "
            "base_model_name_or_path, or make one model of both with `slm merge`"
        )
    return None if found is None else found.name


# -- the model card ----------------------------------------------------------------------------------------------------

TEMPLATE = Path(__file__).with_name("model_card.md.jinja")
METHODS = {
    "pretrain": "pretraining", "sft": "supervised fine-tuning (SFT)", "distill": "distillation from a teacher",
    "dpo": "direct preference optimization (DPO)", "kto": "Kahneman-Tversky optimization (KTO)",
    "grpo": "group relative policy optimization (GRPO)",
}  # fmt: skip
TRAINING_KEYS = (
    "tokens_per_step", "sequence_length", "optimizer", "learning_rate", "lr_scheduler_type", "weight_decay",
    "max_grad_norm", "precision",
)  # fmt: skip
# Figures in a line of metrics.jsonl. Perplexity follows from the loss of objectives that read text.
FIGURES = {
    "validation_loss": "validation loss",
    "validation/rewards/accuracy": "share of validation pairs ranked correctly",
    "validation/reward": "mean reward of a validation answer",
}
READ_TEXT = ("pretrain", "sft", "distill")


@dataclass(frozen=True)
class Known:
    """What is known of a model; what is empty is left out of the card."""

    config: SLMConfig
    bases: Sequence[str] = ()  # hub names of the models that it was made from
    license: str | None = None  # as the hub spells it, such as apache-2.0
    is_adapter: bool = False
    has_chat: bool = False
    curve: str | None = None  # name of a picture beside the card
    quantization: Mapping[str, Any] | None = None  # of config.json
    merge: Mapping[str, Any] = field(default_factory=dict)  # content of merge.yaml
    recipe: Mapping[str, Any] = field(default_factory=dict)
    metrics: Sequence[Mapping[str, Any]] = ()  # lines of metrics.jsonl
    step: int | None = None  # of the checkpoint
    environment: Mapping[str, Any] = field(default_factory=dict)


def model_card(name: str, known: Known) -> str:
    """The model card of `name` (OWNER/NAME on the hub, or a folder): a YAML header for the hub, then Markdown."""
    environment = jinja2.Environment(trim_blocks=True, keep_trailing_newline=True)
    environment.filters |= {
        "md": markdown,
        "python": lambda text: json.dumps(text, ensure_ascii=False),
        "shell": lambda text: shlex.quote(" ".join(text.split())),
    }
    header = yaml.safe_dump(_header(name, known), sort_keys=False, allow_unicode=True)
    return environment.from_string(TEMPLATE.read_text("utf-8")).render(
        name=name,
        title=name.rpartition("/")[2],
        header=header,
        k=known,
        a=architecture_of(known.config),
        parameters=parameter_count(architecture_of(known.config)),
        in_transformers=known.config.model_type not in NOT_IN_TRANSFORMERS,
        methods=_methods(known),
        facts={fact: value for fact, value in _facts(known).items() if value not in (None, "")},
        sources=_sources(known.recipe),
        phases=known.recipe.get("data", {}).get("phases") or [],
        figures=_figures(known),
        last=known.metrics[-1] if known.metrics else None,
    )


def markdown(value: Any) -> str:
    """Text that Markdown shows as it is, in one line: no HTML, links, emphasis, code or cells of a table."""
    return re.sub(r"([\\`*_\[\]|~$])", r"\\\1", html.escape(" ".join(str(value).split()), quote=False))


def _header(name: str, known: Known) -> dict[str, Any]:
    relation = "quantized" if known.quantization else "merge" if known.merge else "finetune"
    sources = [source for source, _ in _sources(known.recipe)]
    public = [source for source in sources if re.fullmatch(r"[\w.-]+/[\w.-]+", source) and not Path(source).suffix]
    chat = ["conversational"] if known.has_chat else []
    header = {
        "license": known.license,
        "library_name": "peft" if known.is_adapter else "transformers",
        "pipeline_tag": "text-generation",
        "base_model": known.bases[0] if len(known.bases) == 1 else [*known.bases],
        "base_model_relation": ("adapter" if known.is_adapter else relation) if known.bases else None,
        "datasets": public,
        "tags": ["slmkit", known.config.model_type, *([known.recipe["objective"]] if known.recipe else []), *chat],
    }
    if figures := _figures(known):
        data = {"name": ", ".join(sources) or "held-out text", "type": public[0] if len(public) == 1 else "custom"}
        metrics = [{"type": what, "value": round(value, 4)} for what, (value, _) in figures.items()]
        result = {"task": {"type": "text-generation"}, "dataset": data, "metrics": metrics}
        header["model-index"] = [{"name": name.rpartition("/")[2], "results": [result]}]
    return {key: value for key, value in header.items() if value not in (None, [])}


def _methods(known: Known) -> list[str]:
    """What was done to get this model, in order."""
    methods = [METHODS.get(known.recipe["objective"], known.recipe["objective"])] if known.recipe else []
    lora = known.recipe.get("lora")
    methods += [f"LoRA of rank {lora['r']}"] if lora else ["LoRA"] if known.is_adapter else []
    methods += [f"merge ({known.merge['merge_method']})"] if known.merge else []
    kind = (known.quantization or {}).get("quant_method") or (known.quantization or {}).get("made_by")
    return methods + ([f"quantization ({kind})"] if kind else [])


def _facts(known: Known) -> dict[str, Any]:
    """The rows of the table on training."""
    if not known.recipe:
        return {}
    data, last = known.environment.get("data", {}).get("train", {}), known.metrics[-1] if known.metrics else {}
    counts = {"steps": last.get("step"), "trained tokens": last.get("tokens")}
    counts |= {"documents": data.get("documents"), "tokens of the data": data.get("tokens")}
    facts = {"objective": known.recipe["objective"]}
    facts |= {name: None if count is None else f"{count:,}" for name, count in counts.items()}
    facts |= {key: known.recipe.get("train", {}).get(key) for key in TRAINING_KEYS}
    facts |= {"seed": known.recipe.get("seed"), "device": known.environment.get("device_name")}
    packages = known.environment.get("packages", {})
    return facts | {package: packages.get(package) for package in ("slmkit", "torch")}


def _figures(known: Known) -> dict[str, tuple[float, int]]:
    """Name → the figure of the checkpoint's step, and that step. Where that was not evaluated: of the step with the
    lowest validation loss, else of the last evaluation.
    """
    lines = [line for line in known.metrics if any(line.get(key) is not None for key in FIGURES)]
    if not lines:
        return {}
    own = [line for line in lines if line["step"] == known.step]
    best = min(own or lines, key=lambda line: (line.get("validation_loss", math.inf), -line["step"]))
    found = {said: (float(best[key]), best["step"]) for key, said in FIGURES.items() if best.get(key) is not None}
    loss = best.get("validation_loss")
    if loss is not None and loss < 50 and known.recipe.get("objective") in READ_TEXT:
        found["validation perplexity"] = (math.exp(loss), best["step"])
    return {said: figure for said, figure in found.items() if math.isfinite(figure[0])}


def _sources(recipe: Mapping[str, Any]) -> list[tuple[str, float | None]]:
    """Names of the data sources with their weights; for local paths only the last part."""
    data = recipe.get("data", {})
    one = data.get("source") or []
    paths = [(path, None) for path in ([one] if isinstance(one, str) else one)]
    paths += [(source["path"], source.get("weight")) for source in data.get("sources", [])]
    return [(path if "://" in path or not Path(path).exists() else Path(path).name, weight) for path, weight in paths]
