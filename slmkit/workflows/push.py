"""`slm push`: publish a model on the hub."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from slmkit.config import UserError, read_yaml
from slmkit.export.model_card import Known, model_card
from slmkit.find import find_model_directory, learned_conversations
from slmkit.hub import HubName, hub_name, publish
from slmkit.model.config import SLMConfig
from slmkit.model.files.adapter_directory import ADAPTER_CONFIG, is_adapter
from slmkit.model.files.directory import quantization_of
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
        named = json.loads((directory / ADAPTER_CONFIG).read_text(encoding="utf-8"))["base_model_name_or_path"]
    found = hub_name(named) if named else None
    if found is None and is_adapter(directory):
        raise UserError(
            f"{directory}: an adapter for {named}, which is only on this machine: publish that first and name it in "
            "base_model_name_or_path, or make one model of both with `slm merge`"
        )
    return None if found is None else found.name
