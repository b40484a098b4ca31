"""torch.compile, block by block and in place, so that blocks of one kind share their compiled code.

On a CPU, compiling takes about a minute, and what it gains depends on processor, precision and model. A new run that is
long enough measures it before its first step, and its recipe then says whether it compiles: compiled code rounds
differently, so that resuming, replaying and repeating a run must do the same.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Literal

import torch

from slmkit.data.batch import Batch
from slmkit.device import Device
from slmkit.files import cache_folder
from slmkit.model.decoder import Decoder
from slmkit.training.loop import Every, Hook, Report, State
from slmkit.training.objective import next_token

LEAST_FLOPS = 2e13  # of a whole run: less takes a processor about as long as compiling
# Before anything is compiled: seconds to compile a block (45 on two busy cores, 17 with the code in the cache), and the
# share of a pass that its code saves: 8 % in float32 without AVX-512, 17 to 29 % in bfloat16 with AMX.
COMPILING, SAVED = 45.0, 0.1


def compile_pays(wanted: Literal["auto"] | bool, device: Device) -> bool:
    """Whether to compile. An `auto` that was not decided by `found_to_pay` compiles on CUDA devices only."""
    return device.torch_device.type == "cuda" if wanted == "auto" else wanted


def compile_blocks(model: Decoder) -> None:
    """Compile each block's forward and backward pass at its first use; no parameter gets another name."""
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(cache_folder() / "inductor"))  # its own is emptied at a reboot
    for block in model.blocks:
        if block._compiled_call_impl is None:
            block.compile()


def found_to_pay(model: Decoder, batch: Batch, device: Device, times: float, warn: Callable[[str], None]) -> bool:
    """Whether compiled code repays its compilation in `times` passes through batches like `batch`: measured, if it may.

    The blocks stay compiled where it does.
    """
    plain = _seconds(model, batch, device)
    if SAVED * plain * times < COMPILING or not compiles(model, batch, device, warn):
        return False
    pays = _seconds(model, batch, device) < plain
    if not pays:
        _leave_plain(model)
    return pays


def compiles(model: Decoder, batch: Batch, device: Device, warn: Callable[[str], None]) -> bool:
    """Compile the blocks and the code of a pass. Where that fails, they are left plain, and `warn` says why."""
    compile_blocks(model)
    try:
        _seconds(model, batch, device, passes=1)
    except Exception as error:
        _leave_plain(model)
        why = next(iter(str(error).strip().splitlines()), "")
        warn(f"torch.compile failed, and the run goes on without it ({type(error).__name__}: {why[:200]})")
        return False
    return True


def is_compiled(model: Decoder) -> bool:
    return any(block._compiled_call_impl is not None for block in model.blocks)


def _leave_plain(model: Decoder) -> None:
    for block in model.blocks:
        block._compiled_call_impl = None


def _seconds(model: Decoder, batch: Batch, device: Device, passes: int = 4) -> float:
    """The least time of a pass forward and backward over the labels of `batch`. No gradient is left behind."""
    seconds, batch = [], batch.to(device.torch_device)
    model.train()
    with torch.random.fork_rng(devices=[]):
        for _ in range(passes):
            started = time.perf_counter()
            with device.autocast():
                loss = next_token(model, batch).total
            loss.backward()
            seconds.append(time.perf_counter() - started)
            model.zero_grad(set_to_none=True)
    return min(seconds)


@contextlib.contextmanager
def eager(model: Decoder) -> Iterator[None]:
    """Context manager in which the blocks run without their compiled code, since generation has varying shapes.

    FlexAttention stays compiled: uncompiled, it would hold all attention scores in memory.
    """
    compiled = [block._compiled_call_impl for block in model.blocks]
    for block in model.blocks:
        block._compiled_call_impl = None
    try:
        yield
    finally:
        for block, call in zip(model.blocks, compiled):
            block._compiled_call_impl = call


def uncompiled(hooks: Iterable[Every], model: Decoder) -> list[Every]:
    """The same hooks, with the model uncompiled while they run: samples and validation use other shapes."""
    if not is_compiled(model):
        return [*hooks]
    return [dataclasses.replace(each, hook=_uncompiled(each.hook, model)) for each in hooks]


def _uncompiled(hook: Hook, model: Decoder) -> Hook:
    def call(state: State, report: Report) -> Any:
        with eager(model):
            return hook(state, report)

    return call
