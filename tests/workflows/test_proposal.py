"""Proposals spend their budget, and more of it buys a lower loss."""

from __future__ import annotations

from pathlib import Path

import pytest

from slmkit.config import UserError
from slmkit.training.recipe.recipe import Recipe
from slmkit.workflows.plan import propose


def test_a_proposal_spends_its_budget_and_more_time_buys_a_lower_loss() -> None:
    short, long = (propose(hours=hours, device_name="cpu", measure=False) for hours in (20, 200))
    for proposal, hours in ((short, 20), (long, 200)):
        assert proposal.estimate.seconds == pytest.approx(hours * 3600, rel=0.05)
        assert isinstance(proposal.recipe, Recipe)
    assert long.estimate.parameters > short.estimate.parameters
    assert long.estimate.loss < short.estimate.loss
    assert propose(hours=0.1, device_name="cpu", measure=False).estimate.seconds <= 360
    by_tokens = propose(tokens=2_000_000_000, device_name="cpu", measure=False)
    assert by_tokens.estimate.tokens == pytest.approx(2e9, rel=0.01)
    assert 10 < 2e9 / by_tokens.estimate.parameters < 40


def test_a_proposal_takes_its_data_and_nothing_else(tmp_path: Path) -> None:
    book = tmp_path / "book.txt"
    book.write_text("x" * 400_000)
    proposal = propose(
        tokens=10_000_000, device_name="cpu", measure=False, overrides=[f"data.source={book}", "output_dir=mine"]
    )
    assert (proposal.recipe.data.source, proposal.recipe.output_dir) == (str(book), "mine")
    assert proposal.epochs == pytest.approx(100, rel=0.01)
    with pytest.raises(UserError, match=r"^model\.hidden_size=3: a proposal takes only data"):
        propose(tokens=10_000_000, device_name="cpu", measure=False, overrides=["model.hidden_size=3"])
