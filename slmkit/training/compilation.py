"""torch.compile, where it pays: block by block and in place, so that one block's code serves all of its kind."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterable, Iterator
from typing import Any, Literal

from slmkit.device import Device
from slmkit.model.decoder import Decoder
from slmkit.training.loop import Every, Hook, Report, State


def compile_pays(wanted: Literal["auto"] | bool, device: Device) -> bool:
    """`auto`: on CUDA devices. On a CPU it takes half a minute before the first step, so that one has to ask for it."""
    return device.torch_device.type == "cuda" if wanted == "auto" else wanted


def compile_blocks(model: Decoder) -> None:
    """Compile each block's forward and backward pass at its first use; no parameter gets another name."""
    for block in model.blocks:
        block.compile()


@contextlib.contextmanager
def eager(model: Decoder) -> Iterator[None]:
    """Within, the model's blocks run without their compiled code: generating has shapes of its own.

    FlexAttention inside them stays compiled: without, it would hold every score.
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
    """The same hooks, in which the model runs as it is written: samples and validation have shapes of their own."""
    if all(block._compiled_call_impl is None for block in model.blocks):
        return [*hooks]
    return [dataclasses.replace(each, hook=_uncompiled(each.hook, model)) for each in hooks]


def _uncompiled(hook: Hook, model: Decoder) -> Hook:
    def call(state: State, report: Report) -> Any:
        with eager(model):
            return hook(state, report)

    return call
