"""torch.compile, where it pays: block by block and in place, so that one block's code serves all of its kind."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterable, Iterator
from typing import Any, Literal

import torch

from slmkit.device import Device
from slmkit.model import Decoder
from slmkit.training.loop import Every, Hook, Report, State


def compile_pays(wanted: Literal["auto"] | bool, device: Device) -> bool:
    """`auto`: on CUDA devices. On a CPU it takes half a minute before the first step, so that one has to ask for it."""
    return device.torch_device.type == "cuda" if wanted == "auto" else wanted


def compile_blocks(model: Decoder) -> None:
    """Compile each block's forward and backward pass at its first use; no parameter gets another name."""
    for block in model.blocks:
        block.compile()


@contextlib.contextmanager
def as_written(model: Decoder) -> Iterator[None]:
    """Within, the model runs without its compiled code: generating has shapes of its own."""
    if all(block._compiled_call_impl is None for block in model.blocks):
        yield
        return
    with torch.compiler.set_stance("force_eager"):
        yield


def uncompiled(hooks: Iterable[Every], model: Decoder) -> list[Every]:
    """The same hooks, in which the model runs as it is written: samples and validation have shapes of their own."""
    if all(block._compiled_call_impl is None for block in model.blocks):
        return [*hooks]
    return [dataclasses.replace(each, hook=_uncompiled(each.hook)) for each in hooks]


def _uncompiled(hook: Hook) -> Hook:
    def call(state: State, report: Report) -> Any:
        with torch.compiler.set_stance("force_eager"):
            return hook(state, report)

    return call
