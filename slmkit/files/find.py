"""Finds the directories of runs, models and tokenizers, on disk or on the hub. Imports nothing heavy: commands call it
before they load torch.
"""

from __future__ import annotations

import difflib
from pathlib import Path

from slmkit.config import UserError, kind_of_value, read_yaml
from slmkit.files.hub import PUBLISHED, hub_directory, hub_name


def find_model_directory(path: str | Path) -> Path:
    """The directory of a model or an adapter; for a run, its best checkpoint, else its latest; for a hub name
    (`OWNER/NAME@REVISION`), its cached copy, downloaded if necessary.

    Raises `UserError` if there is none.
    """
    return _find(path, "config.json", "adapter_config.json")


def find_config_directory(path: str | Path) -> Path:
    """Like `find_model_directory`, but downloads no weights from the hub."""
    return _find(path, "config.json", "adapter_config.json", weights=False)


def find_tokenizer_directory(path: str | Path) -> Path:
    """The directory with the `tokenizer.json` of a tokenizer, model or run; `gpt2` itself, which needs no files.

    Raises `UserError` if there is none.
    """
    if is_gpt2(path):
        return Path(path)
    return _find(path, "tokenizer.json", "tokenizer.json.gz", "tokenizer.model", weights=False)


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


def is_gpt2(path: str | Path) -> bool:
    """Whether a tokenizer's name means `tiktoken`'s GPT-2: it is `gpt2` and no directory has that name."""
    return str(path) == "gpt2" and not Path(path).exists()


def as_path(path: str | Path) -> Path:
    """Raises `UserError` for anything but a path."""
    if not isinstance(path, str | Path):
        raise UserError(f"expected a directory or a name on the hub, found {kind_of_value(path)}")
    return Path(path)


def _find(path: str | Path, *names: str, weights: bool = True) -> Path:
    """The directory that contains a file with one of these names. Raises `UserError` if there is none."""
    local = as_path(path)
    wanted = hub_name(path)
    # Other trainers name the best checkpoint in their output directory `best_model`.
    run = local.parent if local.name == "best_model" and not local.exists() else local
    for candidate in (local, run / "best", run / "latest"):
        if any((candidate / name).is_file() for name in names):
            return candidate
    if wanted is None:
        raise UserError(_not_found(local, names[0]))
    try:
        found = hub_directory(wanted, weights)
    except UserError as error:
        raise UserError(f"{error} (and there is no directory {path})") from None
    if not any((found / name).is_file() for name in names):
        raise UserError(f"{wanted}: it has no {' and no '.join(names)}; transformers' save_pretrained writes one")
    return found


def _not_found(path: Path, name: str) -> str:
    if (path / "recipe.yaml").is_file():
        return f"{path}: a run without a checkpoint yet: train on with `slm resume {path}`"
    runs = [entry.parent.name for entry in sorted(path.glob("*/recipe.yaml"))]
    if runs:
        return f"{path}: a folder of runs: name one of them, such as {path / runs[0]} (there: {', '.join(runs)})"
    if path.exists():
        what = f"no {name} in it: neither a model directory nor a run with a checkpoint"
    elif str(path) in PUBLISHED:
        return f"{path}: a preset is a shape without weights; trained ones are on the hub: {PUBLISHED[str(path)]}"
    else:
        beside = [entry.name for entry in path.parent.iterdir()] if path.parent.is_dir() else []
        near = difflib.get_close_matches(path.name, beside, 1)
        what = f"no such directory; did you mean {str(path.parent / near[0])!r}?" if near else "no such directory"
    more = f", or hf://{path} of the hub" if len(path.parts) == 2 and not path.exists() else ""
    return f"{path}: {what}; expected what `slm train` or transformers' save_pretrained writes{more}"
