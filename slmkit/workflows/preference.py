"""DPO and KTO runs: rows of answers, the reference's log-probabilities, and validation on held-out answers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import safetensors
import torch
from safetensors.numpy import load_file, save

from slmkit.config import UserError
from slmkit.data.make_batches import stream_of
from slmkit.data.rows.answers import JudgedRows, PairRows
from slmkit.data.shards.reader import TokenShards
from slmkit.device import Device
from slmkit.files import write_whole
from slmkit.model.decoder import Decoder
from slmkit.training.estimate.memory import MemoryProfile, read_answers
from slmkit.training.loop import Report, State
from slmkit.training.objective import Sums, surveyed
from slmkit.training.objectives.preference import Kto, Preference, reference_log_probabilities, rounded_up
from slmkit.training.precision import to_weight_dtype
from slmkit.training.recipe.recipe import Recipe
from slmkit.workflows.context import ObjectiveParts, RecipeContext

REFERENCE_FILE = "reference.safetensors"  # in a run's data folder
ROWS_AT_ONCE = 16  # rows per batch without gradients


def has_reference(recipe: Recipe) -> bool:
    """Whether the loss compares with the log-probabilities of the starting model."""
    return recipe.objective == "kto" or (recipe.objective == "dpo" and recipe.preference.needs_reference)


def preference_parts(m: RecipeContext) -> ObjectiveParts:
    """Objective parts of the losses of pairs (DPO and others), or of KTO, whose answers have a label each.

    Computes the reference's log-probabilities if they are needed and missing.
    """
    recipe, of_pairs = m.recipe, m.recipe.objective == "dpo"
    objective = Preference(recipe.preference) if of_pairs else Kto(recipe.kto)

    def rows_of(shards: TokenShards) -> PairRows | JudgedRows:
        return PairRows(shards, m.length) if of_pairs else JudgedRows(shards, m.length, recipe.seed)

    train = dict(zip(recipe.data.weights, map(rows_of, m.corpus.train), strict=True))
    validation = rows_of(m.corpus.validation)
    all_rows = [*train.values(), validation]
    for line in validation.report():
        m.reporter.say(f"validation: {line}")
    if has_reference(recipe):
        _add_reference(m, all_rows)
    return ObjectiveParts(
        batches=stream_of(train, recipe.data, recipe.tokens_of_row(m.length), m.rows_per_step, recipe.seed),
        objective=objective,
        validate=ValidatePreferences(validation, objective, m),
        validation_tokens=2 * validation.rows_in_epoch * m.length,
        measures={"validation_loss": False} | dict.fromkeys(["validation/rewards/accuracy"] * of_pairs, True),
        longest=rounded_up(max(rows.longest for rows in all_rows)),
    )


def preference_memory(recipe: Recipe, model: Decoder, tokens: int, device: Device) -> MemoryProfile:
    """Memory profile with one model: only log-probabilities of the reference are kept."""
    return MemoryProfile(model, readings=(lambda model, frozen, length: read_answers(model, 2 * ROWS_AT_ONCE, length),))


def _add_reference(m: RecipeContext, all_rows: Sequence[PairRows | JudgedRows]) -> None:
    """Add the starting model's log-probabilities to each of `all_rows`, and store them in the run's data."""
    path = m.run.data / REFERENCE_FILE
    try:
        found = load_file(path) if path.is_file() else {}
    except (OSError, safetensors.SafetensorError) as error:
        raise UserError(f"{path}: cannot be read: {error}; delete it; it is then computed again") from None
    wanted = {f"{number:02}": rows for number, rows in enumerate(all_rows)}
    if {name: (rows.rows_in_epoch, 2) for name, rows in wanted.items()} != {n: a.shape for n, a in found.items()}:
        m.model.to(m.device.torch_device)
        to_weight_dtype(m.model, m.device)
        total = sum(rows.rows_in_epoch for rows in all_rows)
        m.reporter.say(f"reference: computing the starting model's log-probabilities of {total:,} {m.recipe.reads}")
        progress, done = m.reporter.counter("reference", total), Counter[str]()

        def tell(rows: int, tokens: int) -> None:
            done.update(rows=rows, tokens=tokens)
            progress(done["rows"], done["tokens"], 0)

        for name, rows in wanted.items():
            found[name] = reference_log_probabilities(m.model, rows, m.device, ROWS_AT_ONCE, tell)
        write_whole(path, save({name: found[name] for name in wanted}))
    for name, rows in wanted.items():
        rows.reference = found[name]


class ValidatePreferences:
    """Hook for all ranks: the objective's loss and figures over held-out rows, distributed over the ranks."""

    def __init__(self, rows: PairRows | JudgedRows, objective: Preference | Kto, m: RecipeContext) -> None:
        self.rows, self.objective, self.device, self.group = rows, objective, m.device, m.group

    def __call__(self, state: State, report: Report) -> None:
        group, sums = self.group, Sums()
        mine = range(group.rank, self.rows.rows_in_epoch, group.world)
        parts = [mine[start : start + ROWS_AT_ONCE] for start in range(0, max(1, len(mine)), ROWS_AT_ONCE)]
        batches = [self.rows.batch(part) if len(part) else self.rows.batch([0]).untrained() for part in parts]
        batches = [batch.to(self.device.torch_device) for batch in batches]
        state.model.eval()
        with group.whole(state.model), torch.no_grad():
            for batch in surveyed(self.objective, state.model, batches, self.device, group):
                with self.device.autocast():
                    sums.add(self.objective(state.model, batch))
        report["validation_loss"], means = sums.means(self.rows.rows_in_epoch, group)
        report |= {f"validation/{name}": mean for name, mean in means.items()}
