"""Pairs of answers to the work of a run: their rows, what the starting model gives them, and how held-out ones fare."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import safetensors
import torch
from safetensors.numpy import load_file, save_file

from slmkit.api.hooks import Sample
from slmkit.api.material import Material, Work
from slmkit.config import UserError
from slmkit.data.feed import stream_of
from slmkit.data.pairs import PairRows
from slmkit.device import Device
from slmkit.model import Decoder
from slmkit.training.files import sync
from slmkit.training.inventory import Inventory, read_answers
from slmkit.training.loop import Report, State
from slmkit.training.precision import to_weight_dtype
from slmkit.training.preference import FIGURES, Preference, reference_log_probabilities, rounded_up
from slmkit.training.recipe import Recipe

REFERENCE = "reference.safetensors"  # in the data of a run
PAIRS_AT_ONCE = 16  # of those that are read and not learned from


def preference_work(m: Material) -> Work:
    """DPO and its kin: the reference's log-probabilities are computed where they are not there yet."""
    settings, data = m.recipe.preference, m.recipe.data
    train = dict(zip(data.weights, (PairRows(shards, m.length) for shards in m.corpus.train), strict=True))
    validation = PairRows(m.corpus.validation, m.length)
    for name, rows in {**train, "validation": validation}.items():
        for line in rows.report():
            m.reporter.say(f"{name}: {line}")
    if settings.needs_reference:
        _refer(m, [*train.values(), validation])
    objective = Preference(settings)
    return Work(
        batches=stream_of(train, data, m.recipe.tokens_of_row(m.length), m.rows_per_step, m.recipe.seed),
        objective=objective,
        validate=ValidatePairs(validation, objective, m),
        sample=Sample(m.run.samples, m.recipe, m.corpus.tokenizer, True, m.group),
        validation_tokens=2 * validation.rows_in_epoch * m.length,
        longest=rounded_up(max(rows.longest for rows in (*train.values(), validation))),
    )


def preference_inventory(recipe: Recipe, model: Decoder, tokens: int, device: Device) -> Inventory:
    """One model: of the reference its log-probabilities are all that is kept."""
    return Inventory(model, readings=(lambda model, beside, length: read_answers(model, 2 * PAIRS_AT_ONCE, length),))


def _refer(m: Material, all_rows: Sequence[PairRows]) -> None:
    """Give each the log-probabilities of the model as it is before the first step, stored in the run's data."""
    path = m.run.data / REFERENCE
    found = _stored(path) if path.is_file() else {}
    wanted = {f"{number:02}": rows for number, rows in enumerate(all_rows)}
    if {name: (rows.rows_in_epoch, 2) for name, rows in wanted.items()} != {n: a.shape for n, a in found.items()}:
        m.model.to(m.device.torch_device)
        to_weight_dtype(m.model, m.device)
        total = sum(rows.rows_in_epoch for rows in all_rows)
        m.reporter.say(f"reference: what the starting model gives the answers of {total:,} pairs")
        progress = m.reporter.counter("reference")
        done = Counter[str]()

        def tell(pairs: int, tokens: int) -> None:
            done.update(pairs=pairs, tokens=tokens)
            progress(done["pairs"], done["tokens"], 0)

        found = {
            name: reference_log_probabilities(m.model, rows, m.device, PAIRS_AT_ONCE, tell)
            for name, rows in wanted.items()
        }
        _store(path, found)
    for name, rows in wanted.items():
        rows.reference = found[name]


def _stored(path: Path) -> dict[str, np.ndarray]:
    try:
        return load_file(path)
    except (OSError, safetensors.SafetensorError) as error:
        raise UserError(f"{path}: cannot be read: {error}; delete it, and it is computed again") from None


def _store(path: Path, arrays: dict[str, np.ndarray]) -> None:
    fresh = path.with_name(f".{path.name}")
    save_file(arrays, fresh)
    sync(fresh)
    fresh.rename(path)
    sync(path.parent)


class ValidatePairs:
    """A hook for all ranks: the objective's loss and figures over held-out pairs, of which each rank reads a share."""

    def __init__(self, rows: PairRows, objective: Preference, m: Material) -> None:
        self.rows, self.objective, self.device, self.group = rows, objective, m.device, m.group

    def __call__(self, state: State, report: Report) -> None:
        group, sums = self.group, dict.fromkeys(("loss", *FIGURES), 0.0)
        pairs = range(group.rank, self.rows.rows_in_epoch, group.world)
        state.model.eval()
        with group.whole(state.model), torch.no_grad():
            for start in range(0, len(pairs), PAIRS_AT_ONCE):
                batch = self.rows.batch(pairs[start : start + PAIRS_AT_ONCE]).to(self.device.torch_device)
                with self.device.autocast():
                    loss = self.objective(state.model, batch)
                for name, figure in {"loss": loss.total, **loss.figures}.items():
                    sums[name] += figure.item()
        means = {name: total / self.rows.rows_in_epoch for name, total in zip(sums, group.sum(*sums.values()))}
        report["validation_loss"] = means.pop("loss")
        report |= {f"validation/{name}": mean for name, mean in means.items()}
