"""Adapter directories: finding them and their base models, and the settings of LoRA."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field

from slmkit.config import Settings, UserError, read_json_object
from slmkit.files.find import find_model_directory
from slmkit.files.hub import HubName, hub_directory, hub_name

ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def is_adapter(directory: str | Path) -> bool:
    """Whether a directory holds an adapter in `peft`'s format, and no model of its own."""
    directory = Path(directory)
    return (directory / ADAPTER_CONFIG).is_file() and not (directory / "config.json").is_file()


def find_adapter(path: str | Path) -> Path:
    """The directory of an adapter, as `find_model_directory`. Raises `UserError` also for a whole model."""
    directory = find_model_directory(path)
    if not is_adapter(directory):
        raise UserError(f"{directory}: a model and no adapter: expected a directory with an adapter_config.json")
    return directory


def base_of(directory: str | Path) -> Path:
    """The directory of an adapter's base: a path relative to the adapter or to the working directory, or a name on
    the hub.

    Raises `UserError` if the adapter does not name its base, or the base does not exist.
    """
    path = Path(directory) / ADAPTER_CONFIG
    content = read_json_object(path)
    named, revision = content.get("base_model_name_or_path"), content.get("revision")
    if not isinstance(named, str) or not named:
        raise UserError(f"{path}: does not say which model it adapts: put its directory in base_model_name_or_path")
    of_its_run = Path(directory).resolve().parents[1] / "base"  # for a run whose folder was moved
    for base in (Path(directory) / named, Path(named), of_its_run):
        if (base / "config.json").is_file():
            return base.resolve()
        if is_adapter(base):
            raise UserError(
                f"{path}: its base {named!r} is an adapter itself: fold that into its model with `slm merge`, and put "
                "the result in base_model_name_or_path"
            )
    if (wanted := hub_name(named)) is not None:
        return hub_directory(HubName(wanted.name, wanted.revision or revision))
    raise UserError(
        f"{path}: its base {named!r} is not there: put the model back, or its new place in base_model_name_or_path"
    )


def config_directory(directory: str | Path) -> Path:
    """The directory with the `config.json` of a model or an adapter's base. Raises `UserError` as `base_of`."""
    return base_of(directory) if is_adapter(directory) else Path(directory)


class LoRASettings(Settings):
    """Low-rank adaptation of a frozen model (arXiv:2106.09685).

    `target_modules` are names of linears or ends of names, ours (`query`) or the reference implementation's (`q_proj`),
    or a regular expression for whole names; `all-linear` is every linear but the head. A layer's update is multiplied
    by lora_alpha / r, with `use_rslora` by lora_alpha / √r (arXiv:2312.03732); with `use_dora` the length of each row
    of the sum is learned apart from its direction (arXiv:2402.09353).
    """

    r: int = Field(8, gt=0)  # the rank
    lora_alpha: float = Field(16, gt=0)  # the update's scale, times r
    lora_dropout: float = Field(0.0, ge=0, lt=1)  # dropout of the adapter's input
    target_modules: str | list[str] = "all-linear"  # which linears get an adapter
    use_rslora: bool = False  # scale by the square root of r
    use_dora: bool = False  # learn the length of each row separately
    # modules that are trained in full and stored with the adapter
    modules_to_save: list[str] = Field(default_factory=list)
    # What the frozen matrices are kept in while the adapter is trained (QLoRA, arXiv:2305.14314): a half, a quarter
    # or an eighth of float32's memory. A finished adapter is used on the full weights.
    base_weights: Literal["float32", "bfloat16", "int8", "nf4"] = "float32"

    @property
    def scale(self) -> float:
        """Factor on a layer's update."""
        return scale_of(self.lora_alpha, self.r, self.use_rslora)


def scale_of(lora_alpha: float, r: int, use_rslora: bool) -> float:
    """lora_alpha / r, or with rsLoRA lora_alpha / √r."""
    return lora_alpha / (r**0.5 if use_rslora else r)
