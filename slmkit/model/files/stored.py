"""Tensors in safetensors files, one at a time: read when asked for, written as they come.

What a process holds is the tensor in its hands, however large the model is.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import torch
from torch import Tensor

from slmkit.config import UserError

# The precisions that weights are written in, as the files spell them.
DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
SPELLED = {dtype: spelling for spelling, dtype in DTYPES.items()}
ALIGNMENT = 8  # of the first tensor, in bytes
ALL = slice(None)


@dataclass(frozen=True)
class StoredTensor:
    """A tensor of a file: its shape and precision are known, its numbers are read by `read`."""

    path: Path
    name: str
    shape: tuple[int, ...]
    spelling: str  # of its precision, such as F32 or BF16

    def read(self, rows: slice = ALL) -> Tensor:
        """The numbers, as they are stored, or some rows of them. Raises `UserError` for a file gone or damaged."""
        try:
            with safetensors.safe_open(self.path, framework="pt") as file:  # opened anew, so that no page stays mapped
                return file.get_tensor(self.name) if rows == ALL else file.get_slice(self.name)[rows]
        except (OSError, safetensors.SafetensorError) as error:
            raise damaged(self.path, error) from None


def stored_tensors(path: Path) -> dict[str, StoredTensor]:
    """What a file holds. Raises `UserError` where it is missing, damaged or cut short."""
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
            return {
                name: StoredTensor(path, name, tuple(part.get_shape()), part.get_dtype())
                for name, part in slices.items()
            }
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; the directory holds a config but no weights") from None
    except (OSError, safetensors.SafetensorError) as error:
        raise damaged(path, error) from None


def expect_finite(tensor: Tensor, name: str, way_out: str) -> None:
    """Raises `UserError` that begins with `name` where a number of the tensor is NaN or infinite."""
    if tensor.numel() and not torch.stack(tensor.aminmax()).isfinite().all():  # NaN is the least and the largest
        raise UserError(f"{name} has numbers that are not finite (NaN or infinity): {way_out}")


def damaged(path: Path, error: Exception) -> UserError:
    return UserError(f"{path}: damaged or cut short ({error}); use another checkpoint, or copy it again")


def write_tensors(
    path: Path, shapes: Mapping[str, tuple[tuple[int, ...], torch.dtype]], tensors: Iterable[tuple[str, Tensor]]
) -> None:
    """Write a safetensors file whose tensors are known by shape and precision, and come in the order of `shapes`.

    The header holds every place, so it can be written first. Raises `OSError` where the disk does not take it, and
    `ValueError` for a tensor that is not the one announced.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, (shape, dtype) in shapes.items():
        begin, end = end, end + torch.Size(shape).numel() * dtype.itemsize
        header[name] = {"dtype": SPELLED[dtype], "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % ALIGNMENT)
    announced = iter(shapes.items())
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for name, tensor in tensors:
            if (name, (tuple(tensor.shape), tensor.dtype)) != next(announced, None):
                raise ValueError(f"{name} {tuple(tensor.shape)} {tensor.dtype}: not the tensor whose turn it is")
            file.write(tensor.contiguous().view(-1).view(torch.uint8).numpy().data)
    if (left := next(announced, None)) is not None:
        raise ValueError(f"{left[0]}: announced, and did not come")
