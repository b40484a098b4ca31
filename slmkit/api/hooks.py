"""What the loop calls now and then, and must not know itself: evaluation, and samples of what the model writes."""

from __future__ import annotations

from pathlib import Path

from slmkit.config import UserError
from slmkit.device import Device
from slmkit.evaluation import validation_loss
from slmkit.evaluation.loss import LossReport, Rows
from slmkit.generation import ChatSession, SamplingSettings, complete
from slmkit.model import Decoder
from slmkit.tokenizer import SLMTokenizer
from slmkit.training.distributed import ALONE, Group
from slmkit.training.loop import Report, State
from slmkit.training.recipe import Recipe
from slmkit.training.run_log import append_samples


class Validate:
    """A hook for all ranks that adds `validation_loss` to the report: each reads a share of the rows.

    Where the rows are a whole text of so many `text_bytes`, it adds `validation_bits_per_byte`.
    """

    def __init__(
        self,
        rows: Rows,
        device: Device,
        separate: bool = False,
        group: Group = ALONE,
        text_bytes: int | None = None,
    ) -> None:
        self.rows, self.device, self.separate, self.group, self.text_bytes = rows, device, separate, group, text_bytes

    def __call__(self, state: State, report: Report) -> None:
        group = self.group
        with group.whole(state.model):
            mine = validation_loss(
                state.model, self.rows, self.device, separate=self.separate, rank=group.rank, world=group.world
            )
        nats, tokens = group.sum(mine.nats, mine.tokens)
        whole = LossReport(nats, int(tokens))
        report["validation_loss"] = whole.loss
        if self.text_bytes:
            report["validation_bits_per_byte"] = whole.bits_per_byte(self.text_bytes)


class Sample:
    """A hook for all ranks that writes what the model says to the recipe's prompts into a file: `samples.md`."""

    def __init__(self, file: Path, recipe: Recipe, tokenizer: SLMTokenizer, talks: bool, group: Group = ALONE) -> None:
        """`talks`: the prompts are what a user says, and not how a text begins."""
        self.file, self.recipe, self.tokenizer, self.talks, self.group = file, recipe, tokenizer, talks, group

    def __call__(self, state: State, report: Report) -> None:
        with self.group.whole(state.model):
            if self.group.is_main:
                prompts = self.recipe.train.sample_prompts or []
                append_samples(
                    self.file, state.step, [(prompt, self._written(state.model, prompt)) for prompt in prompts]
                )

    def _written(self, model: Decoder, prompt: str) -> str:
        try:
            return self._continued(model, prompt)
        except UserError as error:  # no sample is worth a run
            return f" ({error})"

    def _continued(self, model: Decoder, prompt: str) -> str:
        settings = SamplingSettings(temperature=0.8, top_p=0.95, seed=self.recipe.seed)
        longest = self.recipe.train.sample_tokens
        if self.talks:
            session = ChatSession(model, self.tokenizer, settings, max_new_tokens=longest)
            return "\n" + "".join(session.reply(prompt))
        return complete(model, self.tokenizer, prompt, settings=settings, max_new_tokens=longest).text
