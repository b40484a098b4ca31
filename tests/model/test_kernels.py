"""Compiled products: against float64, alone and in a batch, with and without a compiler."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from slmkit.model import kernels
from slmkit.model.kernels import GROUPS, KINDS, Kind, Matrix, dequantize
from tests.cli.helpers import python

FLOATS = ("float32", "bfloat16")
SHAPES = {  # kind → (out, in, group)
    kind: [(o, i, 32) for o, i in ((1, 1), (5, 33), (7, 100), (64, 96), (130, 257))]
    if kind in FLOATS
    else [(o, group * n, group) for group in GROUPS for o, n in ((1, 1), (5, 3), (130, 2))]
    for kind in KINDS
}
CASES = [(kind, *shape) for kind in KINDS for shape in SHAPES[kind]]
every_case = pytest.mark.parametrize(("kind", "out", "into", "group"), CASES)


@pytest.fixture(autouse=True)
def no_library_is_kept() -> Iterator[None]:
    kernels.library.cache_clear()
    yield
    kernels.library.cache_clear()


def random_matrix(kind: Kind, out: int, into: int, group: int, bias: bool = True) -> Matrix:
    g = torch.Generator().manual_seed(out + into)
    b = torch.randn(out, generator=g) if bias else None
    if kind in FLOATS:
        return Matrix(kind, torch.randn(out, into, generator=g).to(getattr(torch, kind)), group=group, bias=b)
    scales = torch.rand(out, into // group, generator=g)
    if kind == "int8":
        weight = torch.randint(-128, 128, (out, into), generator=g, dtype=torch.int8)
    else:
        weight = torch.randint(0, 256, (out, into // 2), generator=g, dtype=torch.uint8)
    return Matrix(kind, weight, scales, group, b)


def exact(m: Matrix, x: Tensor) -> Tensor:
    y = x.double() @ dequantize(m.kind, m.weight, m.scales, m.group).double().T
    return y if m.bias is None else y + m.bias


def near(ours: Tensor, expected: Tensor, most: float = 1e-4) -> bool:
    """Whether the largest difference is at most `most` of the largest value."""
    return bool((ours - expected).abs().max() <= most * expected.abs().max())


def is_compiled() -> bool:
    return kernels.library() is not None


@pytest.fixture
def quick_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The compiler without optimization, which takes a fifth of the time; libraries go to a folder of their own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    compiler = script(tmp_path / "compiler", 'exec c++ "$@" -O0')
    monkeypatch.setenv("CXX", str(compiler))
    return compiler


needs_compiler = pytest.mark.skipif("not __import__('shutil').which('c++')", reason="no C++ compiler")


@needs_compiler
@every_case
def test_products_are_those_of_float64(kind: Kind, out: int, into: int, group: int) -> None:
    assert is_compiled()
    m, x = random_matrix(kind, out, into, group), torch.randn(16, into)
    size = x.abs() @ m.dequantized().abs().T
    for rows in (1, 2, 3, 16):
        most = 5e-5 if kind in ("int8", "int4") else 1e-6  # activations of 16 bits
        assert (m(x[:rows]) - exact(m, x[:rows])).abs().max() <= most * size.max()


@needs_compiler
@every_case
def test_a_row_is_the_same_alone_and_with_others(kind: Kind, out: int, into: int, group: int) -> None:
    m, x = random_matrix(kind, out, into, group), torch.randn(16, into)
    together = m(x)
    assert torch.equal(torch.cat([m(row) for row in x.split(1)]), together)
    assert torch.equal(torch.cat([m(rows) for rows in x.split(5)]), together)


@needs_compiler
def test_a_row_is_the_same_with_any_number_of_threads() -> None:
    m, x, threads = random_matrix("int4", 515, 512, 32), torch.randn(3, 512), torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3, 7):
            torch.set_num_threads(count)
            results.append(m(x))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(result, results[0]) for result in results)


@needs_compiler
@every_case
def test_expanded_weights_are_what_the_form_means(kind: Kind, out: int, into: int, group: int) -> None:
    m = random_matrix(kind, out, into, group)
    assert torch.equal(m.dequantized(), dequantize(kind, m.weight, m.scales, group))


def test_the_forms_by_hand() -> None:
    scales = torch.tensor([[0.5]])
    int8 = torch.arange(-16, 16, dtype=torch.int8)[None]
    assert torch.equal(dequantize("int8", int8, scales, 32)[0], torch.arange(-16, 16) / 2)
    packed = torch.tensor([[i | (15 - i) << 4 for i in range(16)]], dtype=torch.uint8)
    upwards = torch.arange(16.0) - 8
    assert torch.equal(dequantize("int4", packed, scales, 32)[0], torch.cat((upwards, -1 - upwards)) / 2)
    nf4 = dequantize("nf4", packed, scales, 32)[0]
    assert torch.equal(nf4, torch.cat((kernels.NF4, kernels.NF4.flip(0))) / 2)


@needs_compiler
def test_other_precisions_shapes_and_gradients() -> None:
    m = random_matrix("int8", 24, 64, 32)
    x = torch.randn(2, 3, 64)
    assert m(x).shape == (2, 3, 24)
    assert m(x.bfloat16()).dtype == torch.bfloat16
    assert near(m(x.bfloat16()), m(x), 0.02)
    many = torch.randn(kernels.MOST_ROWS + 1, 64)
    assert near(m(many)[:2], m(many[:2]))
    x.requires_grad_()
    m(x).sum().backward()
    assert near(x.grad[0, 0], m.dequantized().sum(0))


@needs_compiler
@pytest.mark.parametrize("kind", KINDS)
def test_not_a_number_stays_in_its_row(kind: Kind) -> None:
    m, x = random_matrix(kind, 8, 64, 32), torch.randn(4, 64)
    x[1, 3] = torch.nan
    y = m(x)
    assert y[1].isnan().all()
    assert y[[0, 2, 3]].isfinite().all()


def test_what_does_not_fit_together() -> None:
    with pytest.raises(ValueError, match="stored as torch.uint8"):
        Matrix("int4", torch.zeros(2, 32, dtype=torch.int8), torch.ones(2, 2), 32)
    with pytest.raises(ValueError, match="100 inputs in groups of 64"):
        Matrix("int8", torch.zeros(2, 100, dtype=torch.int8), torch.ones(2, 2), 64)
    with pytest.raises(ValueError, match=r"scales must be float32 \[2, 3\]"):
        Matrix("int8", torch.zeros(2, 96, dtype=torch.int8), torch.ones(2, 2), 32)
    with pytest.raises(ValueError, match="contiguous"):
        Matrix("float32", torch.zeros(64, 4).T)


def test_rows_of_another_width_and_a_bias_of_another_length() -> None:
    for kind in KINDS:
        m = random_matrix(kind, 6, 64, 32)
        for rows in (4, kernels.MOST_ROWS + 4):
            with pytest.raises(ValueError, match="rows of 32 values, where the matrix has 64 inputs"):
                m(torch.ones(rows, 32))
    with pytest.raises(ValueError, match=r"a bias of shape \[3\], where \[6\] is expected"):
        Matrix("float32", torch.ones(6, 64), bias=torch.ones(3))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_bias_is_read_where_it_is(dtype: torch.dtype) -> None:
    bias, x = torch.randn(7).to(dtype), torch.randn(3, 64)
    m = Matrix("float32", torch.randn(7, 64), bias=bias)
    assert near(m(x), exact(m, x), 1e-6)
    before = m(x)
    bias += 1
    assert near(m(x) - before, torch.ones(3, 7), 0.01)


@pytest.mark.parametrize("broken", ["nothing on PATH", "CXX=/nonexistent", "a compiler that refuses"])
def test_without_a_compiler(broken: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = [random_matrix(kind, 33, 128, 64)(torch.ones(2, 128)) for kind in KINDS]
    kernels.library.cache_clear()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    if broken == "nothing on PATH":
        monkeypatch.setenv("PATH", "")
    else:
        monkeypatch.setenv("CXX", "/nonexistent" if "CXX" in broken else "/bin/false")
    assert not is_compiled()
    for kind, result in zip(KINDS, expected, strict=True):
        assert near(random_matrix(kind, 33, 128, 64)(torch.ones(2, 128)), result)
    assert not list(tmp_path.glob("slmkit/*"))


@pytest.mark.slow
@needs_compiler
@pytest.mark.usefixtures("quick_compiler")
def test_two_processes_build_at_once(tmp_path: Path) -> None:
    done = python("""
import os
other = os.fork()
from slmkit.model.kernels import library
is_there = library() is not None
if other:
    is_there &= os.waitpid(other, 0)[1] == 0
raise SystemExit(0 if is_there else 1)
""")
    assert done.returncode == 0, done.stderr
    assert [path.suffix for path in (tmp_path / "cache" / "slmkit").iterdir()] == [".so"]


@pytest.mark.slow
@needs_compiler
@pytest.mark.usefixtures("quick_compiler")
def test_a_second_start_compiles_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    built = kernels.build()
    before = built.stat().st_mtime_ns
    assert kernels.build() == built
    assert built.stat().st_mtime_ns == before
    monkeypatch.setattr(kernels, "_processor", lambda: "another processor")
    assert kernels.build() != built


@pytest.mark.slow
@needs_compiler
@pytest.mark.usefixtures("quick_compiler")
@pytest.mark.parametrize("damage", ["cut short", "one bit"])
def test_a_damaged_library_is_compiled_anew(damage: str, tmp_path: Path) -> None:
    built = kernels.build()
    whole = built.read_bytes()
    middle = len(whole) // 2
    rest = b"" if damage == "cut short" else bytes([whole[middle] ^ 1]) + whole[middle + 1 :]
    built.write_bytes(whole[:middle] + rest)
    done = python("from slmkit.model.kernels import library; assert library() is not None")
    assert done.returncode == 0, done.stderr
    assert [path.read_bytes() for path in built.parent.iterdir()] == [whole]


@pytest.mark.slow
@needs_compiler
def test_another_library_is_compiled_anew_once(tmp_path: Path, quick_compiler: Path) -> None:
    """A compiler that made something else, and is mended later; one that always does."""
    other, mended = tmp_path / "other.cpp", quick_compiler.read_text()
    other.write_text("int other() { return 1; }\n")
    script(quick_compiler, f'out=$(echo "$@" | sed "s/.* -o //; s/ .*//"); c++ -shared -fPIC -o "$out" {other}')
    kernels.build()
    assert not is_compiled()
    kernels.library.cache_clear()
    kernels.build()
    quick_compiler.write_text(mended)
    assert is_compiled()


def script(path: Path, command: str) -> Path:
    path.write_text(f"#!/bin/sh\n{command}\n")
    path.chmod(0o755)
    return path


@pytest.mark.slow
@needs_compiler
def test_a_compiler_may_have_arguments(quick_compiler: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", f"env '{quick_compiler}' -O1 -DNAME='a b'")
    assert is_compiled()


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("printf '\\377\\376 broken' >&2; exit 1", "broken"),
        ("exec sleep 1000", "has not compiled them in 1 seconds: CXX may name another, CXX=false none"),
        ("exit 0", "No such file"),
    ],
)
def test_why_there_are_no_kernels_is_logged(
    command: str, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("CXX", str(script(tmp_path / "compiler", command)))
    if "sleep" in command:
        monkeypatch.setattr(kernels, "LONGEST_BUILD", 1)
    with caplog.at_level("INFO"):
        assert not is_compiled()
    assert words in caplog.messages[0]
    assert [record.levelname for record in caplog.records] == ["WARNING" if "sleep" in command else "INFO"]
    assert "\n" not in caplog.messages[0]
    assert not list((tmp_path / "cache").glob("slmkit/*"))


def test_without_a_home_or_with_unmatched_quotes_there_are_no_kernels(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("CXX", "c++")

    def no_home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", no_home)
    with caplog.at_level("INFO"):
        assert not is_compiled()
        kernels.library.cache_clear()
        monkeypatch.setenv("CXX", "c++ 'unmatched")
        assert not is_compiled()
    assert "no folder to keep them in: set HOME or XDG_CACHE_HOME" in caplog.messages[0]
    assert "No closing quotation" in caplog.messages[1]
