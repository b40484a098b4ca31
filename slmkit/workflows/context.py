"""`RecipeContext`: the context of a recipe's run; `ObjectiveParts`: the objective's input to the loop."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

from rich.text import Text

from slmkit.data.prepare import corpus as prepared
from slmkit.data.prepare.corpus import Corpus
from slmkit.data.prepare.text_to_shards import Progress
from slmkit.data.stream import Batches
from slmkit.training.fit import RunContext
from slmkit.training.loop import Hook
from slmkit.training.objective import Objective


@dataclass(kw_only=True)
class RecipeContext(RunContext):
    """The context of a recipe's run, from which its objective builds its parts."""

    corpus: Corpus
    reporter: Reporter

    @property
    def text_bytes(self) -> int | None:
        """Bytes of the validation text; None for conversations, of which only the answers are predicted."""
        header = self.corpus.validation.header
        return None if header.masked else header.text_bytes

    @property
    def rows_per_step(self) -> int:
        return self.recipe.train.rows_per_step(self.recipe.tokens_of_row(self.length))


@dataclass(frozen=True)
class ObjectiveParts:
    """Batches, objective and validation of a run. `validate` is for all ranks, and called at every evaluation.

    `longest`: computed tokens of the longest row, if rows are padded. `measures`: the metrics that `validate` adds to a
    report, and whether more of each is better.
    """

    batches: Batches
    objective: Objective
    validate: Hook
    validation_tokens: int
    longest: int | None = None
    measures: Mapping[str, bool] = field(default_factory=lambda: {"validation_loss": False})


class Reporter(prepared.Reporter, Protocol):
    """Receives progress messages of long functions; the colours of a `Text` are significant."""

    def say(self, line: str | Text) -> None: ...

    def warn(self, line: str) -> None: ...


class Silence:
    """A reporter without output, for ranks other than 0."""

    def say(self, line: str | Text) -> None: ...

    warn = say

    def counter(self, label: str, total: int | None = None) -> Progress:
        return lambda *done: None


SILENCE = Silence()
