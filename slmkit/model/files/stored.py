"""Tensors in safetensors files, read and written one at a time, so that only one is in memory."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import torch
from torch import Tensor

from slmkit.config import UserError

# Precisions of stored weights, as spelled in the files.
DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
SPELLED = {dtype: spelling for spelling, dtype in DTYPES.items()}
WEIGHTS = "model.safetensors"
SHARDS = "model.safetensors.index.json"
ALIGNMENT = 8  # of the first tensor, in bytes
ALL = slice(None)


@dataclass(frozen=True)
class StoredTensor:
    """A tensor of a file, with shape and precision; `read` loads its values."""

    path: Path
    name: str
    shape: tuple[int, ...]
    spelling: str  # of its precision, such as F32 or BF16

    def read(self, rows: slice = ALL) -> Tensor:
        """The stored values [rows, ...], all or some rows. Raises `UserError` for a missing or damaged file."""
        try:
            with safetensors.safe_open(self.path, framework="pt") as file:  # opened anew, so that no page stays mapped
                return file.get_tensor(self.name) if rows == ALL else file.get_slice(self.name)[rows]
        except (OSError, safetensors.SafetensorError) as error:
            raise damaged(self.path, error) from None


def stored_tensors(path: Path) -> dict[str, StoredTensor]:
    """The tensors of a file by name. Raises `UserError` if it is missing, damaged or truncated."""
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
    """Raises `UserError` that begins with `name` if a value of `tensor` [...] is NaN or infinite."""
    if tensor.numel() and not torch.stack(tensor.aminmax()).isfinite().all():  # NaN is both minimum and maximum
        raise UserError(f"{name} has numbers that are not finite (NaN or infinity): {way_out}")


def damaged(path: Path, error: Exception) -> UserError:
    return UserError(f"{path}: damaged or cut short ({error}); use another checkpoint, or copy it again")


def write_tensors(
    path: Path, shapes: Mapping[str, tuple[tuple[int, ...], torch.dtype]], tensors: Iterable[tuple[str, Tensor]]
) -> None:
    """Write a safetensors file from `tensors` in the order of `shapes` (name → shape, precision).

    The header holds all offsets, so it is written first. Raises `OSError` if writing fails, and `ValueError` for a
    tensor that does not match `shapes`.
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


def write_shards(
    folder: Path,
    shapes: Mapping[str, tuple[tuple[int, ...], torch.dtype]],
    read: Callable[[str], Tensor],
    most: float,
) -> None:
    """Write tensors to `model.safetensors`, or if they have more than `most` bytes to shards and their index.

    A tensor larger than `most` bytes has a shard of its own. `read` gives a tensor by name. Raises as `write_tensors`.
    """
    sizes = {name: torch.Size(shape).numel() * dtype.itemsize for name, (shape, dtype) in shapes.items()}
    shards: list[list[str]] = [[]]
    for name, size in sizes.items():
        if shards[-1] and sum(sizes[one] for one in shards[-1]) + size > most:
            shards.append([])
        shards[-1].append(name)
    files = [f"model-{number:05}-of-{len(shards):05}.safetensors" for number in range(1, len(shards) + 1)]
    for names, file in zip(shards, files if len(shards) > 1 else [WEIGHTS]):
        write_tensors(folder / file, {name: shapes[name] for name in names}, ((name, read(name)) for name in names))
    if len(shards) > 1:
        weight_map = {name: file for names, file in zip(shards, files) for name in names}
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map}
        (folder / SHARDS).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
