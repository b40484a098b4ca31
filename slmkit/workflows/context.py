"""What a run has built, and what an objective makes of it for the loop."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from rich.text import Text

from slmkit.data.prepare import sources_to_shards as source_shards
from slmkit.data.prepare.corpus import Corpus
from slmkit.data.prepare.text_to_shards import Progress
from slmkit.data.stream import Batches
from slmkit.device import Device
from slmkit.model.config import SLMConfig
from slmkit.model.decoder import Decoder
from slmkit.training.distributed import Group
from slmkit.training.loop import Hook
from slmkit.training.objective import Objective
from slmkit.training.recipe.recipe import Recipe
from slmkit.training.run_directory import RunDirectory


@dataclass(frozen=True)
class RunContext:
    """A run with all that its recipe names built."""

    run: RunDirectory
    recipe: Recipe
    corpus: Corpus
    model: Decoder
    config: SLMConfig
    device: Device
    group: Group
    length: int  # tokens of a row
    reporter: Reporter

    @property
    def text_bytes(self) -> int | None:
        """Of the validation text; None of conversations, of which only the answers are predicted."""
        header = self.corpus.validation.header
        return None if header.masked else header.text_bytes

    @property
    def rows_per_step(self) -> int:
        return self.recipe.train.rows_per_step(self.recipe.tokens_of_row(self.length))


@dataclass(frozen=True)
class ObjectiveParts:
    """The hooks are for all ranks, and due at every evaluation.

    `longest`: the longest row, in tokens as they are computed, where rows are not filled to their ends. `report`: a
    line for whatever of the data is left out or cut, as far as it is known when it is asked for.
    """

    batches: Batches
    objective: Objective
    validate: Hook
    sample: Hook
    validation_tokens: int
    report: Callable[[], list[str]] = list
    longest: int | None = None


class Reporter(source_shards.Reporter, Protocol):
    """Where the long functions below say how far they are; a `Text` has colours that mean something."""

    def say(self, line: str | Text) -> None: ...

    def warn(self, line: str) -> None: ...


class Silence:
    """A reporter for the processes that do not speak."""

    def say(self, line: str | Text) -> None: ...

    def warn(self, line: str) -> None: ...

    def counter(self, label: str, total: int | None = None) -> Progress:
        return lambda *done: None


SILENCE = Silence()
