"""Compiled products for decoding on a CPU: a few rows times weights of 32, 16, 8 or 4 bits.

`kernels.cpp` is compiled once per machine, in three to five seconds, when a product is first asked for; where that
fails (no compiler), PyTorch computes the same. With weights of float32, bfloat16 and nf4, sums and activations are
float32. With int8 and int4, each group of activations is rounded to integers of 16 bits, whose products are added as
integers, twice as fast: an error of about 2e-5 of a result (activations of 8 bits, as llama.cpp has them, make one of
5e-3, and need as many instructions on a processor with AVX2). Each row's result is the same, bit by bit, alone and with
others.

How weights are stored, in groups of `group` (32, 64 or 128) values of a row with one float32 scale:

    float32, bfloat16   weight [out, in], no scales
    int8                weight int8 [out, in]; value q means q × scale
    int4                weight uint8 [out, in / 2]; byte j of a group has value j in its low and value j + group / 2 in
                        its high four bits; q in 0 … 15 means (q - 8) × scale
    nf4                 as int4; q means NF4[q] × scale (QLoRA, arXiv:2305.14314)
    scales              float32 [out, in / group]
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
import time
from functools import cache
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from slmkit.files import cache_folder

Kind = Literal["float32", "bfloat16", "int8", "int4", "nf4"]
KINDS: tuple[Kind, ...] = ("float32", "bfloat16", "int8", "int4", "nf4")  # in the order of kernels.cpp
GROUPS = (32, 64, 128)
NF4_VALUES = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
    -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634,
    0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
NF4 = torch.tensor(NF4_VALUES)
MOST_ROWS = 32  # more rows are faster in PyTorch's products
SOURCE = Path(__file__).with_name("kernels.cpp")
COMPILERS = ("c++", "g++", "clang++")
LONGEST_BUILD = 30  # seconds: ten times what it takes


class MatrixFields(ctypes.Structure):
    _fields_ = [(name, ctypes.c_void_p) for name in ("weight", "scales", "bias")] + [
        (name, ctypes.c_int64) for name in ("kind", "out", "in", "group", "bias_is_bfloat16")
    ]


class Matrix:
    """A weight matrix in one of the forms above, and a bias, for products with rows on its left.

    weight [out, in] or packed, scales [out, in / group] (None for float32 and bfloat16), bias [out] or None.
    The tensors are read where they are: in-place changes count. Raises `ValueError` for shapes and types that do not
    fit together.
    """

    def __init__(
        self, kind: Kind, weight: Tensor, scales: Tensor | None = None, group: int = 32, bias: Tensor | None = None
    ) -> None:
        self.kind, self.group = kind, group
        self.weight = weight.detach()
        self.scales, self.bias = (None if x is None else x.detach() for x in (scales, bias))
        self.out_features, self.in_features = weight.size(0), weight.size(1) * (2 if kind in ("int4", "nf4") else 1)
        self._check()
        # A bias of another precision, such as float16, is added by PyTorch.
        self.adds_bias = bias is None or bias.dtype in (torch.float32, torch.bfloat16)
        read = (self.weight, self.scales, self.bias if self.adds_bias else None)
        pointers = (None if x is None else x.data_ptr() for x in read)
        numbers = KINDS.index(kind), self.out_features, self.in_features, group
        self.fields = MatrixFields(*pointers, *numbers, bias is not None and bias.dtype == torch.bfloat16)
        self._reference = ctypes.byref(self.fields)

    def reads(self, weight: Tensor, scales: Tensor | None, bias: Tensor | None) -> bool:
        """Whether these are the tensors that are read. Those are kept, so no other can have come to their addresses."""
        pairs = ((weight, self.weight), (scales, self.scales), (bias, self.bias))
        return all(a is b is None or (a is not None and b is not None and is_same(a, b)) for a, b in pairs)

    def _check(self) -> None:
        stored = {"int8": torch.int8, "int4": torch.uint8, "nf4": torch.uint8}.get(self.kind)
        if self.weight.dtype != (stored or getattr(torch, self.kind)):
            raise ValueError(
                f"weights of kind {self.kind} are stored as {stored or self.kind}, not {self.weight.dtype}"
            )
        there = [x for x in (self.weight, self.scales, self.bias) if x is not None]
        if not all(x.is_contiguous() and x.device == self.weight.device for x in there):
            raise ValueError("weights, scales and bias must be contiguous, and on one device")
        if self.bias is not None and self.bias.shape != (self.out_features,):
            raise ValueError(f"a bias of shape {list(self.bias.shape)}, where [{self.out_features}] is expected")
        if stored is None:
            return
        groups = self.in_features // self.group
        if self.group not in GROUPS or self.in_features % self.group:
            raise ValueError(f"{self.in_features} inputs in groups of {self.group}; groups: a divisor of {GROUPS}")
        if (
            self.scales is None
            or self.scales.dtype != torch.float32
            or self.scales.shape != (self.out_features, groups)
        ):
            raise ValueError(f"scales must be float32 [{self.out_features}, {groups}]")

    def __call__(self, x: Tensor) -> Tensor:
        """x W^T + bias, in the precision of x.  [..., in] → [..., out]

        Raises `ValueError` for rows of another width.
        """
        if x.size(-1) != self.in_features:
            raise ValueError(f"rows of {x.size(-1)} values, where the matrix has {self.in_features} inputs")
        compiled, rows = self._compiled(), x.numel() // self.in_features
        if compiled is None or not x.is_cpu or rows > MOST_ROWS or (x.requires_grad and torch.is_grad_enabled()):
            bias = None if self.bias is None else self.bias.to(x.dtype)
            return F.linear(x, self.dequantized().to(x.dtype), bias)
        read = x.float().contiguous()
        y = read.new_empty(*x.shape[:-1], self.out_features)
        compiled.slmkit_linear(self._reference, read.data_ptr(), rows, y.data_ptr(), torch.get_num_threads())
        return (y if self.adds_bias or self.bias is None else y + self.bias).to(x.dtype)

    def dequantized(self) -> Tensor:
        """The weights as float32.  [out, in]"""
        if self.kind == "float32":
            return self.weight
        compiled = self._compiled()
        if compiled is None:
            return dequantize(self.kind, self.weight, self.scales, self.group)
        whole = torch.empty(self.out_features, self.in_features)
        compiled.slmkit_dequantize(self._reference, whole.data_ptr(), torch.get_num_threads())
        return whole

    def _compiled(self) -> Any:
        return library() if self.weight.is_cpu else None


def is_same(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors are the same memory, read in the same way."""
    return a.data_ptr() == b.data_ptr() and a.shape == b.shape and a.dtype == b.dtype and a.device == b.device


def dequantize(kind: Kind, weight: Tensor, scales: Tensor | None, group: int) -> Tensor:
    """Weights in one of the forms above as float32, by PyTorch on any device.  → [out, in]"""
    if scales is None:
        return weight.float()
    if kind == "int8":
        values = weight.float().unflatten(1, (-1, group))  # [out, in / group, group]
    else:
        packed = weight.unflatten(1, (-1, group // 2))
        codes = torch.cat((packed & 15, packed >> 4), dim=-1)
        values = codes.float() - 8 if kind == "int4" else NF4.to(weight.device)[codes.int()]
    return (values * scales[..., None]).flatten(1)


@cache
def library() -> Any:
    """The compiled kernels; None where they cannot be compiled, which is logged once."""
    try:
        path = build()
        try:
            compiled = _load(path)
        except AttributeError:  # made by a compiler that was broken then
            path.unlink()
            compiled = _load(build())
    except (OSError, AttributeError, ValueError, subprocess.SubprocessError) as error:
        why = (getattr(error, "stderr", None) or str(error)).strip().partition("\n")[0]
        level = logging.WARNING if isinstance(error, TimeoutError) else logging.INFO
        logging.getLogger(__name__).log(level, f"decoding without compiled kernels: {why}")
        return None
    if not _is_right(compiled):
        logging.getLogger(__name__).warning(
            "decoding without compiled kernels: their products are wrong on this machine"
        )
        return None
    return compiled


def _load(path: Path) -> Any:
    """Raises `OSError` for what is no library, and `AttributeError` for another one."""
    compiled, pointer, number = ctypes.CDLL(str(path)), ctypes.c_void_p, ctypes.c_int64
    compiled.slmkit_linear.argtypes = [pointer, pointer, number, pointer, number]
    compiled.slmkit_dequantize.argtypes = [pointer, pointer, number]
    compiled.slmkit_decode.argtypes = [pointer, number, pointer, pointer, number, pointer, number, number, number]
    for function in (compiled.slmkit_linear, compiled.slmkit_dequantize, compiled.slmkit_decode):
        function.restype = None
    return compiled


def _is_right(compiled: Any) -> bool:
    """Whether the products of each kind are those of PyTorch: no compiler and processor is taken on trust."""
    generator = torch.Generator().manual_seed(0)
    x, y, scales = torch.randn(3, 96, generator=generator), torch.empty(3, 7), torch.rand(7, 3, generator=generator)
    codes = torch.randint(-128, 128, (7, 96), generator=generator)
    for kind in KINDS:
        if kind in ("float32", "bfloat16"):
            matrix = Matrix(kind, torch.randn(7, 96, generator=generator).to(getattr(torch, kind)))
        else:
            weight = codes.to(torch.int8) if kind == "int8" else (codes[:, :48] + 128).to(torch.uint8)
            matrix = Matrix(kind, weight, scales)
        compiled.slmkit_linear(matrix._reference, x.data_ptr(), 3, y.data_ptr(), 1)
        expected = F.linear(x, dequantize(kind, matrix.weight, matrix.scales, 32))
        if not torch.allclose(y, expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max())):
            return False
    return True


def flags_to_try() -> tuple[tuple[str, ...], ...]:
    """Compiler flags; the first that compile are used. Without OpenMP the kernels have one thread.

    Instructions beyond AVX2 are not used: what was measured and tested is this.
    """
    avx2 = platform.machine() in ("x86_64", "AMD64") and torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512")
    processor = ("-march=x86-64-v3",) if avx2 else ()
    return (*processor, "-fopenmp"), processor, ()


def build() -> Path:
    """Compile the kernels for this machine's processor, unless that was done before; returns the library's path.

    Its name ends with its own SHA-256: what was cut short or changed is compiled anew, since it would kill the process.
    Several processes may build at once: each writes its own file and renames it. Raises `OSError` where there is no
    compiler or no place for the library, or it takes too long, `CalledProcessError` for what the compiler refuses, and
    `ValueError` for a CXX whose quotes do not match.
    """
    found = next(filter(None, map(shutil.which, COMPILERS)), None)
    compiler = shlex.split(os.environ.get("CXX", "")) or ([found] if found else [])  # CXX may be "ccache g++"
    if not compiler:
        raise OSError(f"no C++ compiler: none of {', '.join(COMPILERS)} is on PATH; CXX may name another")
    key = hashlib.sha256(f"{compiler} {flags_to_try()} {_processor()}".encode() + SOURCE.read_bytes()).hexdigest()[:16]
    folder = cache_folder()
    for path in folder.glob(f"kernels-{key}-*.so"):
        if path.stem.endswith(hashlib.sha256(path.read_bytes()).hexdigest()):
            return path
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".kernels-", dir=folder) as place:
        fresh = Path(place) / "kernels.so"
        _compile(compiler, fresh)
        with fresh.open("rb") as file:
            os.fsync(file.fileno())
            digest = hashlib.sha256(file.read()).hexdigest()
        return fresh.replace(folder / f"kernels-{key}-{digest}.so")


def _compile(compiler: list[str], library: Path) -> None:
    """Write `library`. Raises errors as `build` does."""
    end = time.monotonic() + LONGEST_BUILD
    for flags in flags_to_try():
        command = [*compiler, "-std=c++17", "-O3", "-ffp-contract=off", *flags, "-shared", "-fPIC"]
        command += ["-o", str(library), str(SOURCE)]
        try:
            done = subprocess.run(
                command, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace",
                timeout=max(0, end - time.monotonic()),
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            how = "CXX may name another, CXX=false none"
            raise TimeoutError(f"{compiler[0]} has not compiled them in {LONGEST_BUILD} seconds: {how}") from None
        if done.returncode == 0:
            return
    done.check_returncode()


def _processor() -> str:
    """The processor's model and instruction sets, by which compiled code differs."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return f"{platform.machine()} {platform.processor()}"
    return platform.machine() + "".join(
        sorted({line for line in lines if line.startswith(("model name", "flags", "Features", "CPU part"))})
    )
