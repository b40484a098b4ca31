"""The device, its precision and the process's rank. Determined once, then passed on."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import math
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch

# Precision → type of matrix products, type of weights. `bfloat16-master` also keeps float32 copies of the weights.
PRECISIONS = {
    "float32": (torch.float32, torch.float32),
    "bfloat16": (torch.bfloat16, torch.float32),
    "float16": (torch.float16, torch.float32),
    "bfloat16-pure": (torch.bfloat16, torch.bfloat16),
    "bfloat16-master": (torch.bfloat16, torch.bfloat16),
}


class DeviceError(ValueError):
    """This machine lacks the requested device or precision; one line, like `slmkit.config.UserError`."""


@dataclass(frozen=True)
class Ranks:
    """Ranks of this process: `rank` among all `world` processes, `local_rank` among those on this host."""

    rank: int = 0
    local_rank: int = 0
    world: int = 1


@dataclass(frozen=True)
class Device:
    """The torch device, the type of its matrix products, and the type of weights in training."""

    torch_device: torch.device
    compute_dtype: torch.dtype
    weight_dtype: torch.dtype = torch.float32
    keeps_master: bool = False  # float32 master copies of bfloat16 weights, to which updates are added
    ranks: Ranks = Ranks()

    def autocast(self) -> contextlib.AbstractContextManager:
        """Autocast of matrix products to `compute_dtype`; does nothing in float32."""
        if self.compute_dtype == torch.float32:
            return contextlib.nullcontext()
        return torch.autocast(self.torch_device.type, self.compute_dtype)

    def describe(self) -> dict[str, str | int]:
        """The device, its types and the number of threads, for a run's records."""
        if self.torch_device.type == "cuda":
            name = torch.cuda.get_device_name(self.torch_device)
        else:
            name = str(torch.cpu.get_capabilities().get("cpu_name", "cpu"))
        return {
            "device": str(self.torch_device),
            "device_name": name,
            "compute_dtype": str(self.compute_dtype).removeprefix("torch."),
            "weight_dtype": str(self.weight_dtype).removeprefix("torch."),
            "threads": torch.get_num_threads(),
        }


def find_device(name: str = "auto", precision: str = "auto") -> Device:
    """The requested device (`cpu`, `cuda`, `cuda:1`, `mps`); for `auto`, the best one here.

    `auto` precision is bfloat16 if the hardware supports it: on CPUs only with AVX-512-BF16 or AMX, since it is
    otherwise emulated and many times slower than float32. Raises `DeviceError` if the machine has no such device.
    """
    if precision not in PRECISIONS and precision != "auto":
        raise DeviceError(f"unknown precision {precision!r}; known: auto, {', '.join(PRECISIONS)}")
    ranks = find_ranks()
    device = torch.device(_best() if name == "auto" else checked_device(name))
    if device == torch.device("cuda") and ranks.world > 1:
        device = torch.device("cuda", ranks.local_rank)
    if precision == "auto":
        precision = "bfloat16" if multiplies_in_bfloat16(device) else "float32"
    compute_dtype, weight_dtype = PRECISIONS[precision]
    return Device(device, compute_dtype, weight_dtype, keeps_master=precision == "bfloat16-master", ranks=ranks)


def find_ranks() -> Ranks:
    """The ranks in `torchrun`'s environment variables; rank 0 of 1 without them. Raises `DeviceError` if invalid."""
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE")
    if not any(name in os.environ for name in names):
        return Ranks()
    try:
        rank, local_rank, world = (int(os.environ[name]) for name in names)
    except (KeyError, ValueError):
        found = ", ".join(f"{name}={os.environ.get(name)}" for name in names)
        raise DeviceError(f"expected {', '.join(names)} as torchrun sets them, found {found}") from None
    if not 0 <= local_rank <= rank < world:
        raise DeviceError(f"there is no rank {rank} ({local_rank} of its host) among {world} processes: start torchrun")
    return Ranks(rank, local_rank, world)


def _best() -> str:
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def checked_device(name: str) -> str:
    """The name. Raises `DeviceError` if this machine has no such device."""
    kind = name.partition(":")[0]
    there = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if not there.get(kind, False):
        here = ", ".join(kind for kind, is_there in there.items() if is_there)
        raise DeviceError(f"device {name!r} is not available; this machine has: {here}")
    return name


@functools.cache
def multiplies_in_bfloat16(device: torch.device) -> bool:
    """Whether the hardware multiplies in bfloat16; emulation is 25 times as slow as float32."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type == "cpu":
        capabilities = torch.cpu.get_capabilities()
        return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))
    return False


def keep_freed_memory() -> None:
    """Make glibc keep freed blocks for the next step instead of returning them to the system.

    A training step on a CPU allocates and frees the same hundreds of megabytes again and again, and fresh pages cost
    one page fault each. Keeping them shortens a step of a 2 M-parameter model by 20 %. Does nothing without glibc.
    """
    if not sys.platform.startswith("linux"):
        return
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):
        return
    trim_threshold, mmap_threshold = -1, -3  # malloc.h's M_TRIM_THRESHOLD and M_MMAP_THRESHOLD
    mallopt(trim_threshold, 2**31 - 1)
    mallopt(mmap_threshold, 2**30)


@functools.lru_cache
def measured_peak(device: Device) -> float:
    """Measured peak rate of matrix products in `compute_dtype`, in FLOP/s: the reference for MFU.

    The best of some products within half a second, large enough to be bound by arithmetic; a CPU that emulates this
    type is too slow for large ones. Measured once a process. The datasheet's figure is about 25 % higher on most
    accelerators and not reachable.
    """
    begun, best = time.perf_counter(), 0.0
    for size in (256, 1_024) if device.torch_device.type == "cpu" else (8_192,):
        a = torch.randn(size, size, device=device.torch_device).to(device.compute_dtype)
        for _ in range(12):
            _wait_for(device)
            started = time.perf_counter()
            a @ a
            _wait_for(device)
            best = max(best, 2 * size**3 / (time.perf_counter() - started))
            if time.perf_counter() - begun > 0.5:
                return best
    return best


@functools.lru_cache
def seconds_to_read(size: int, device: Device) -> float:
    """The least time to read `size` bytes of memory, of sums within half a second.

    A decoding step cannot take less than this for its weights. What fits into a CPU's cache is read from there. On a
    CPU, of each 16 MiB the least time counts, so that other processes disturb few.
    """
    values = torch.ones(max(1, min(size, 2**30) // 4), device=device.torch_device)
    pieces = values.split(2**22 if device.torch_device.type == "cpu" else len(values))
    begun, best = time.perf_counter(), [math.inf] * len(pieces)
    while time.perf_counter() - begun < 0.5:
        for number, piece in enumerate(pieces):
            _wait_for(device)
            started = time.perf_counter()
            piece.sum()
            _wait_for(device)
            best[number] = min(best[number], time.perf_counter() - started)
    return sum(best) * size / values.nbytes


def _wait_for(device: Device) -> None:
    """Wait until the accelerator's queue is empty."""
    if device.torch_device.type == "cuda":
        torch.cuda.synchronize(device.torch_device)
    elif device.torch_device.type == "mps":
        torch.mps.synchronize()


def reset_peak_memory(device: Device) -> None:
    """Reset the peak-memory counter, where the system supports it."""
    if device.torch_device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device.torch_device)
    else:
        with contextlib.suppress(OSError):  # only on Linux
            Path("/proc/self/clear_refs").write_text("5")


def peak_memory(device: Device) -> int:
    """Peak memory in bytes: allocated by PyTorch on a CUDA device, else the process's peak resident set."""
    if device.torch_device.type == "cuda":
        return torch.cuda.max_memory_allocated(device.torch_device)
    if found := _status("VmHWM"):
        return found
    try:
        import resource  # not on Windows
    except ImportError:
        return 0
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def resident_memory() -> int:
    """Resident memory of the process in bytes; 0 if unknown."""
    return _status("VmRSS")


def available_memory(device: Device) -> int:
    """Free memory in bytes; 0 if unknown."""
    if device.torch_device.type == "cuda":
        return torch.cuda.mem_get_info(device.torch_device)[0]
    return _field(Path("/proc/meminfo"), "MemAvailable")


def _status(name: str) -> int:
    return _field(Path("/proc/self/status"), name)


def _field(path: Path, name: str) -> int:
    """A size in one of Linux's /proc tables, in bytes; 0 if absent."""
    try:
        line = next(line for line in path.read_text().splitlines() if line.startswith(f"{name}:"))
    except (OSError, StopIteration):
        return 0
    return int(line.split()[1]) * 1024
