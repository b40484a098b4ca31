"""The machine: which device, which precision pays on it, which process of how many. Asked once, passed on."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch

# How each precision multiplies matrices, and what its weights are; `bfloat16-master` keeps them in float32 besides.
PRECISIONS = {
    "float32": (torch.float32, torch.float32),
    "bfloat16": (torch.bfloat16, torch.float32),
    "float16": (torch.float16, torch.float32),
    "bfloat16-pure": (torch.bfloat16, torch.bfloat16),
    "bfloat16-master": (torch.bfloat16, torch.bfloat16),
}


class DeviceError(ValueError):
    """A device or precision that this machine does not have; one line, like `slmkit.config.UserError`."""


@dataclass(frozen=True)
class Ranks:
    """Which process of how many this is: `rank` of all of them, `local_rank` of those on this host."""

    rank: int = 0
    local_rank: int = 0
    world: int = 1


@dataclass(frozen=True)
class Device:
    """Where tensors live, the type in which matrices are multiplied there, and that of weights in training."""

    torch_device: torch.device
    compute_dtype: torch.dtype
    weight_dtype: torch.dtype = torch.float32
    keeps_master: bool = False  # float32 copies of weights in bfloat16, which is what updates are added to
    ranks: Ranks = Ranks()

    def autocast(self) -> contextlib.AbstractContextManager:
        """Matrix products in `compute_dtype`; does nothing in float32."""
        if self.compute_dtype == torch.float32:
            return contextlib.nullcontext()
        return torch.autocast(self.torch_device.type, self.compute_dtype)

    def describe(self) -> dict[str, str | int]:
        """What a reader of a run's figures has to know of the machine."""
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
    """The best device here, or the one named (`cpu`, `cuda`, `cuda:1`, `mps`).

    `auto` precision is bfloat16 where the hardware multiplies in it: on CPUs only with AVX-512-BF16 or AMX, since
    without them it is emulated and many times slower than float32. Raises `DeviceError` for what is not there.
    """
    if precision not in PRECISIONS and precision != "auto":
        raise DeviceError(f"unknown precision {precision!r}; known: auto, {', '.join(PRECISIONS)}")
    ranks = find_ranks()
    device = torch.device(_best() if name == "auto" else _checked(name))
    if device == torch.device("cuda") and ranks.world > 1:
        device = torch.device("cuda", ranks.local_rank)
    if precision == "auto":
        precision = "bfloat16" if multiplies_in_bfloat16(device) else "float32"
    compute_dtype, weight_dtype = PRECISIONS[precision]
    return Device(device, compute_dtype, weight_dtype, keeps_master=precision == "bfloat16-master", ranks=ranks)


def find_ranks() -> Ranks:
    """What `torchrun` says in the environment; a process by itself without it. Raises `DeviceError` for nonsense."""
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


def _checked(name: str) -> str:
    kind = name.partition(":")[0]
    there = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if not there.get(kind, False):
        here = ", ".join(kind for kind, is_there in there.items() if is_there)
        raise DeviceError(f"device {name!r} is not available; this machine has: {here}")
    return name


@functools.cache
def multiplies_in_bfloat16(device: torch.device) -> bool:
    """Whether the hardware has products of bfloat16; else they are emulated, 25 times as slow as float32."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type == "cpu":
        capabilities = torch.cpu.get_capabilities()
        return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))
    return False


def keep_freed_memory() -> None:
    """Have glibc keep freed blocks for the next step instead of giving them back to the system.

    A training step on a CPU frees and takes the same hundreds of megabytes again and again; each time the system
    hands out fresh pages one fault at a time. Keeping them takes a fifth off a step of a 2 M-parameter model. Does
    nothing where there is no glibc.
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
    """Operations a second that plain matrix products reach here in `compute_dtype`: what a training step could use.

    The best of some products within half a second, large enough that nothing but arithmetic counts; a CPU that emulates
    this type is too slow for large ones. Measured once a process. A datasheet's figure is a quarter higher on most
    accelerators, and no program reaches it.
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


def _wait_for(device: Device) -> None:
    """An accelerator's queue is worked off."""
    if device.torch_device.type == "cuda":
        torch.cuda.synchronize(device.torch_device)
    elif device.torch_device.type == "mps":
        torch.mps.synchronize()


def reset_peak_memory(device: Device) -> None:
    """Forget the most memory that was used so far, where the system lets one."""
    if device.torch_device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device.torch_device)
    else:
        with contextlib.suppress(OSError):  # Linux alone has it
            Path("/proc/self/clear_refs").write_text("5")


def peak_memory(device: Device) -> int:
    """Bytes: the most that PyTorch held on a CUDA device, elsewhere the most that the process held resident."""
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
    """Bytes that the process holds in memory now; 0 where the system does not say."""
    return _status("VmRSS")


def available_memory(device: Device) -> int:
    """Bytes that are free for more; 0 where the system does not say."""
    if device.torch_device.type == "cuda":
        return torch.cuda.mem_get_info(device.torch_device)[0]
    return _field(Path("/proc/meminfo"), "MemAvailable")


def _status(name: str) -> int:
    return _field(Path("/proc/self/status"), name)


def _field(path: Path, name: str) -> int:
    """A size in one of Linux's tables, in bytes; 0 where there is none."""
    try:
        line = next(line for line in path.read_text().splitlines() if line.startswith(f"{name}:"))
    except (OSError, StopIteration):
        return 0
    return int(line.split()[1]) * 1024
