"""Where runs and models lie on disk. Nothing heavy is imported here: commands ask before they load anything."""

from __future__ import annotations

from pathlib import Path

from slmkit.config import UserError
from slmkit.model.presets import PRESETS


def free_path(wanted: str | Path) -> Path:
    """`wanted`, or `wanted-2`, `-3`… where that name is taken."""
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


def find_model_or_preset(name: str | Path) -> Path | str:
    """As `find_model_directory`, or the name of a preset, in any case. Raises `UserError` for neither."""
    preset = str(name).lower()
    if preset in PRESETS and not Path(name).exists():
        return preset
    if Path(name).exists() or "/" in str(name):
        return find_model_directory(name)
    raise UserError(f"{name}: neither a preset nor a directory; presets: {', '.join(sorted(PRESETS))}")


def find_model_directory(path: str | Path) -> Path:
    """The directory of a model or an adapter as it is; of a run its best checkpoint, else its latest.

    Raises `UserError` for neither.
    """
    return _find(path, "config.json", "adapter_config.json")


def find_tokenizer_directory(path: str | Path) -> Path:
    """The directory with the `tokenizer.json` of a tokenizer, model or run. Raises `UserError` for neither."""
    return _find(path, "tokenizer.json")


def _find(path: str | Path, *names: str) -> Path:
    """The directory that holds a file of one of these names."""
    path = Path(path)
    for candidate in (path, path / "best", path / "latest"):
        if any((candidate / name).is_file() for name in names):
            return candidate
    what = "no such directory" if not path.exists() else "neither a model directory nor a run with a checkpoint"
    raise UserError(f"{path}: {what}; expected what `slm train` or transformers' save_pretrained writes")
