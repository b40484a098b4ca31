"""Operations of a step of training: what its products need, and no more than that."""

from __future__ import annotations

from dataclasses import dataclass

from slmkit.model.decoder import Decoder
from slmkit.model.sizes import Flops, flops_per_token
from slmkit.training.estimate.memory_profile import MemoryProfile


@dataclass(frozen=True)
class StepOperations:
    """Forward and backward, once each. A frozen matrix has no gradient of its own to be computed; what is trained
    beside it, `adapter` parameters, has products of its own."""

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
        """Of an update in which `trained` of all positions are learned: only they pass the head."""
        matrices = positions * self.flops.matrices - (positions - trained) * self.head
        attention, adapter = positions * self.flops.attention, positions * 2 * self.adapter
        return (2 if self.is_frozen else 3) * matrices + 3 * (attention + adapter)


def operations_per_token(inventory: MemoryProfile, length: int) -> int:
    """Of a learned token: those of its step, and of the model beside that reads it, too."""
    beside = 0 if inventory.beside is None else flops_per_token(inventory.beside.architecture, length).forward
    if not isinstance(inventory.model, Decoder):
        return 3 * flops_per_token(inventory.model, length).forward + beside
    return StepOperations.of(inventory.model, length).of_step(1, 1) + beside
