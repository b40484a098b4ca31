"""AdamW with 8-bit moments, from bitsandbytes; runs on CPUs too, without compilation.

Import this module only where it is used: bitsandbytes is an extra, and takes seconds to import.
"""

from __future__ import annotations

import logging
from typing import Any

import torch

logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it warns of 4-bit products, which are not used here

import bitsandbytes.optim  # noqa: E402 - after the line above

CODES = {"qmap1": "dynamic", "qmap2": "udynamic"}  # names of the 256 codes of each moment, the same for all tensors


class AdamW8bit(bitsandbytes.optim.AdamW8bit):
    """Block-wise quantised moments (Dettmers et al. 2022, arXiv:2110.02861); of small tensors they stay in float32.

    Its state dict has a flat dictionary of tensors per parameter, as in other optimizers.
    """

    def state_dict(self) -> dict[str, Any]:
        content = super().state_dict()
        return content | {"state": {index: _flat(moments) for index, moments in content["state"].items()}}

    def load_state_dict(self, content: dict[str, Any], move_to_device: bool = True) -> None:
        self.fill_qmap()
        state = {}
        for index, moments in content["state"].items():
            codes = {key: self.name2qmap[name].clone() for key, name in CODES.items() if "absmax1" in moments}
            state[index] = moments | codes | ({"step": int(moments["step"])} if moments else {})
        super().load_state_dict(content | {"state": state}, move_to_device)


def _flat(moments: dict[str, Any]) -> dict[str, torch.Tensor]:
    """The moments without bitsandbytes' wrapper around quantised tensors, and without the codes."""
    nested = [value for value in moments.values() if isinstance(value, dict)]
    flat = {key: value for part in (moments, *nested) for key, value in part.items() if not isinstance(value, dict)}
    return {key: torch.as_tensor(value) for key, value in flat.items() if key not in CODES}
