"""A file of tensors written as they come is the file that the library writes, and is read back one at a time."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from slmkit.config import UserError
from slmkit.model.files.stored import stored_tensors, write_tensors

TENSORS = {
    "a": torch.randn(3, 5),
    "b": torch.randn(7).bfloat16(),
    "c": torch.randn(2, 3, 4).half(),
    "d": torch.tensor(1.5),
    "e": torch.randn(4, 6).T,
}
SHAPES = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in TENSORS.items()}


def test_what_is_written_one_by_one_is_read_by_the_library(tmp_path: Path) -> None:
    write_tensors(tmp_path / "x", SHAPES, iter(TENSORS.items()))
    found = load_file(tmp_path / "x")
    assert found.keys() == TENSORS.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in TENSORS.items())
    assert all(found[name].dtype == tensor.dtype for name, tensor in TENSORS.items())


def test_what_the_library_writes_is_read_one_by_one(tmp_path: Path) -> None:
    save_file({name: tensor.contiguous() for name, tensor in TENSORS.items()}, tmp_path / "x")
    stored = stored_tensors(tmp_path / "x")
    assert {name: tensor.shape for name, tensor in stored.items()} == {name: s for name, (s, _) in SHAPES.items()}
    assert [stored[name].spelling for name in "abc"] == ["F32", "BF16", "F16"]
    assert all(torch.equal(stored[name].read(), tensor) for name, tensor in TENSORS.items())


@pytest.mark.parametrize(
    "wrong",
    [
        {"a": torch.zeros(3, 4)},
        {"a": torch.zeros(3, 5).half()},
        {"b": torch.zeros(7).bfloat16()},
        {},
        TENSORS | {"f": torch.zeros(1)},
    ],
)
def test_another_tensor_than_was_announced_is_an_error(wrong: dict[str, torch.Tensor], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not the tensor whose turn it is|announced, and did not come"):
        write_tensors(tmp_path / "x", SHAPES, iter(wrong.items()))


def test_a_file_cut_after_it_was_opened_is_one_line(tmp_path: Path) -> None:
    write_tensors(tmp_path / "x", SHAPES, iter(TENSORS.items()))
    stored = stored_tensors(tmp_path / "x")
    (tmp_path / "x").write_bytes((tmp_path / "x").read_bytes()[:-8])
    with pytest.raises(UserError, match="damaged or cut short"):
        stored["a"].read()
    with pytest.raises(UserError, match="damaged or cut short"):
        stored_tensors(tmp_path / "x")
    (tmp_path / "x").unlink()
    with pytest.raises(UserError, match="no such file"):
        stored_tensors(tmp_path / "x")
