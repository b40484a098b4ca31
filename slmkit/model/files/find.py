"""Runs and presets by name. Imports no torch: commands call it first."""

from __future__ import annotations

from pathlib import Path

from slmkit.config import UserError, read_yaml
from slmkit.find import find_config_directory, find_model_directory, find_tokenizer_directory
from slmkit.model.presets import PRESETS

__all__ = [
    "find_model_directory",
    "find_model_or_preset",
    "find_run",
    "find_tokenizer_directory",
    "free_path",
    "learned_conversations",
    "run_of",
]


def free_path(wanted: str | Path) -> Path:
    """`wanted`, or `wanted-2`, `-3`… if that name is taken."""
    path, number = Path(wanted), 1
    while path.exists():
        number += 1
        path = Path(f"{wanted}-{number}")
    return path


def find_run(path: str | Path) -> Path:
    """A run's directory. Raises `UserError` for anything else."""
    path = Path(path)
    if not (path / "recipe.yaml").is_file():
        what = "not a run: it has no recipe.yaml" if path.exists() else "no such directory"
        raise UserError(f"{path}: {what}; expected the folder of a run that `slm train` made (`slm runs` lists them)")
    return path


def run_of(model: str | Path) -> Path | None:
    """The run of which a model is a checkpoint; None if it is not one. Raises `UserError` for no model."""
    run = find_model_directory(model).resolve().parents[1]  # of RUN/checkpoints/STEP
    return run if (run / "recipe.yaml").is_file() else None


def learned_conversations(model: str | Path) -> bool | None:
    """Whether a run's model was trained on conversations; None if its recipe is missing, or does not tell."""
    run = run_of(model)
    if run is None:
        return None
    recipe = read_yaml(run / "recipe.yaml")
    if recipe.get("objective") == "pretrain":
        return None if (recipe.get("model") or {}).get("path") else False
    return None if recipe.get("objective") == "distill" else True


def find_model_or_preset(name: str | Path) -> Path | str:
    """A directory with the config of a model (from the hub: without its weights), or the name of a preset.

    Raises `UserError` for neither.
    """
    preset = str(name).lower()
    if preset in PRESETS and not Path(name).exists():
        return preset
    if Path(name).exists() or "/" in str(name):
        return find_config_directory(name)
    bare = {"".join(filter(str.isalnum, one)): one for one in PRESETS}
    meant = bare.get("".join(filter(str.isalnum, preset)))
    hint = f"did you mean {meant!r}?" if meant else f"presets: {', '.join(sorted(PRESETS))}"
    raise UserError(f"{name}: neither a preset nor a directory; {hint}")
