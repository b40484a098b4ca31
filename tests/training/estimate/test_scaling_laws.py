"""The laws give the figures that their papers print, and what follows from them."""

from __future__ import annotations

import pytest

from slmkit.training.estimate.forecast import (
    expected_loss,
    learning_rate_for,
    parameters_for,
    tokens_per_step_for,
)


def test_chinchilla_itself_has_the_loss_that_the_corrected_fit_gives_it() -> None:
    # 70 B parameters, 1.4 T tokens: 1.8172 + 482.01 / 5,907 + 2085.43 / 27,806.
    assert expected_loss(70e9, 1.4e12) == pytest.approx(1.974, abs=0.002)


def test_some_twenty_tokens_a_parameter_are_enough() -> None:
    for tokens in (2e9, 2e11):
        assert 10 < tokens / parameters_for(tokens) < 40


def test_the_size_for_a_budget_is_where_neither_more_of_one_nor_of_the_other_helps() -> None:
    tokens = 1e10
    best = parameters_for(tokens)
    compute = best * tokens
    losses = [expected_loss(best * scale, compute / (best * scale)) for scale in (0.8, 1.0, 1.25)]
    assert losses[1] == min(losses)


def test_text_read_again_is_worth_less_each_time() -> None:
    fresh, four, forty = (expected_loss(1e8, 4e9, unique) for unique in (4e9, 1e9, 1e8))
    assert fresh < four < forty
    assert four - fresh < 0.05  # Muennighoff et al.: up to four times is almost as good
    assert expected_loss(1e8, 4e9, unique_tokens=1e10) == fresh


def test_rates_and_batches() -> None:
    # Li et al.'s own example sizes: about 1 B parameters and 100 B tokens.
    assert learning_rate_for(1e9, 1e11) == pytest.approx(1.64e-3, rel=0.02)
    assert tokens_per_step_for(1e11) == pytest.approx(1.1e6, rel=0.05)
    assert learning_rate_for(1e6, 1e9) == 1e-2
