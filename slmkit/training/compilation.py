"""torch.compile, block by block and in place, so that blocks of one kind share their compiled code."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterable, Iterator
from typing import Any, Literal

from slmkit.device import Device
from slmkit.model.decoder import Decoder
from slmkit.training.loop import Every, Hook, Report, State


def compile_pays(wanted: Literal["auto"] | bool, device: Device) -> bool:
    """Whether to compile. `auto`: on CUDA devices only; on a CPU it delays the first step by half a minute."""
    return device.torch_device.type == "cuda" if wanted == "auto" else wanted


def compile_blocks(model: Decoder) -> None:
    """Compile each block's forward and backward pass at its first use; no parameter gets another name."""
    for block in model.blocks:
        block.compile()


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
    if all(block._compiled_call_impl is None for block in model.blocks):
        return [*hooks]
    return [dataclasses.replace(each, hook=_uncompiled(each.hook, model)) for each in hooks]


def _uncompiled(hook: Hook, model: Decoder) -> Hook:
    def call(state: State, report: Report) -> Any:
        with eager(model):
            return hook(state, report)

    return call
