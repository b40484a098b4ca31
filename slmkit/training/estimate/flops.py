"""FLOPs of a training step, counting matrix products only."""

from __future__ import annotations

from dataclasses import dataclass

from slmkit.model.decoder import Decoder
from slmkit.model.sizes import Flops, flops_per_token
from slmkit.training.estimate.memory_profile import MemoryProfile


@dataclass(frozen=True)
class StepOperations:
    """FLOPs per position of one forward and backward pass. A frozen matrix needs no weight gradient; `adapter`
    parameters beside it have their own products."""

    flops: Flops
    is_frozen: bool
    adapter: int
    head: int  # of a position's logits

    @classmethod
    def of(cls, model: Decoder, length: int) -> StepOperations:
        a, is_frozen = model.architecture, not all(parameter.requires_grad for parameter in model.parameters())
        trained = (p for p in model.blocks.parameters() if p.requires_grad and p.dim() == 2)
        adapter = sum(p.numel() for p in trained) if is_frozen else 0
        return cls(flops_per_token(a, length), is_frozen, adapter, 2 * a.vocab_size * a.width)

    def of_step(self, positions: int, trained: int) -> int:
        """FLOPs of an update in which `trained` of all positions are learned: only those pass through the head."""
        matrices = positions * self.flops.matrices - (positions - trained) * self.head
        attention, adapter = positions * self.flops.attention, positions * 2 * self.adapter
        return (2 if self.is_frozen else 3) * matrices + 3 * (attention + adapter)


def operations_per_token(inventory: MemoryProfile, length: int) -> int:
    """FLOPs per learned token: of its step, and of the teacher or reference model that reads it."""
    beside = 0 if inventory.beside is None else flops_per_token(inventory.beside.architecture, length).forward
    if not isinstance(inventory.model, Decoder):
        return 3 * flops_per_token(inventory.model, length).forward + beside
    return StepOperations.of(inventory.model, length).of_step(1, 1) + beside
