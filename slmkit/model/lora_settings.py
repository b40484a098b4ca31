"""What LoRA is asked to do, in `peft`'s names: the same settings in a recipe, in a script and beside an adapter."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from slmkit.config import Settings


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
        """What a layer's update is multiplied by."""
        return scale_of(self.lora_alpha, self.r, self.use_rslora)


def scale_of(lora_alpha: float, r: int, use_rslora: bool) -> float:
    """lora_alpha / r, or with rsLoRA lora_alpha / √r."""
    return lora_alpha / (r**0.5 if use_rslora else r)
