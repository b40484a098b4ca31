"""Hidden states matched besides the logits, layer by layer, whatever the widths.

Compared is how the positions of a row relate to one another: the cosines of all pairs of their states (similarity-
preserving distillation, Tung and Mori 2019, arXiv:1907.09682; MiniLMv2 does so in heads, arXiv:2012.15828). They have
no width, so that nothing has to carry states from one width to another: a learned projection would be trained and saved
and yet be no part of the model, and a random one would tie the student to directions that mean nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from slmkit.model import Decoder


def paired_layers(students: int, teachers: int) -> list[tuple[int, int]]:
    """Each of the student's layers with the teacher's at the same share of the depth; the last ones are a pair."""
    return [(layer, -(-(layer + 1) * teachers // students) - 1) for layer in range(students)]


@contextmanager
def watched_layers(model: Decoder, layers: Sequence[int]) -> Iterator[list[Tensor]]:
    """Within, each pass through the model leaves the outputs of these blocks, in order: [rows, length, width] each."""
    seen: list[Tensor] = []

    @torch.compiler.disable
    def see(module: nn.Module, inputs: Any, output: Tensor) -> None:
        seen.append(output)

    handles = [model.blocks[layer].register_forward_hook(see) for layer in layers]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def relations_apart(student: Tensor, teacher: Tensor, learned: Tensor) -> Tensor:
    """Of states [rows, length, width] each, where `learned` [rows, length]: the sum over positions of the mean squared
    difference between their cosines to all positions of their row.
    """
    total = torch.zeros((), device=student.device)
    with torch.autocast(student.device.type, enabled=False):
        for mine, theirs, here in zip(student, teacher, learned):
            s, t = (F.normalize(states[here].float(), dim=-1) for states in (mine, theirs))  # [positions, width]
            if len(s):
                total = total + (s @ s.T - t @ t.T).square().mean(-1).sum()
    return total
