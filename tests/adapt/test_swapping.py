"""Other modules in the places of linears."""

from __future__ import annotations

import pytest
from torch import nn

from slmkit.adapt.lora import reference_names
from slmkit.adapt.swapping import swap
from slmkit.config import UserError
from slmkit.model.initialization import build_decoder
from tests.adapt.helpers import config_of


class Marked(nn.Module):
    def __init__(self, linear: nn.Module) -> None:
        super().__init__()
        self.inner = linear

    def forward(self, x):
        return self.inner(x)


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("query", ["blocks.0.attention.query", "blocks.1.attention.query"]),
        ("q_proj", ["blocks.0.attention.query", "blocks.1.attention.query"]),
        (["up", "gate_proj"], [f"blocks.{i}.mlp.{name}" for i in (0, 1) for name in ("gate", "up")]),
        (r"blocks\.1\..*\.(key|value)", ["blocks.1.attention.key", "blocks.1.attention.value"]),
        (r"model\.layers\.0\..*down_proj", ["blocks.0.mlp.down"]),
        ("head", ["head"]),
        ("lm_head", ["head"]),
    ],
)
def test_names_ends_of_names_and_expressions_are_found_in_either_tongue(pattern: object, expected: list[str]) -> None:
    config = config_of("llama", tie_word_embeddings=False)
    decoder = build_decoder(config)
    assert swap(decoder, pattern, Marked, reference_names(decoder, config)) == expected
    marked = [name for name, module in decoder.named_modules() if isinstance(module, Marked)]
    assert sorted(marked) == sorted(expected)


def test_all_linears_are_all_but_the_head() -> None:
    decoder = build_decoder(config_of("llama", tie_word_embeddings=False))
    names = swap(decoder, "all-linear", Marked)
    assert len(names) == 2 * 7
    assert isinstance(decoder.head, nn.Linear)


def test_a_fused_matrix_of_the_reference_is_all_of_its_parts() -> None:
    config = config_of("gpt2")
    decoder = build_decoder(config)
    assert len(swap(decoder, "c_attn", Marked, reference_names(decoder, config))) == 2 * 3


def test_what_matches_nothing_is_told_with_what_there_is() -> None:
    config = config_of("llama")
    decoder = build_decoder(config)
    with pytest.raises(
        UserError, match=r"'q_project' matches no module; there are: attention.query \(q_proj\), .*all-"
    ):
        swap(decoder, ["v_proj", "q_project"], Marked, reference_names(decoder, config))
    assert not any(isinstance(module, Marked) for module in decoder.modules())
    with pytest.raises(UserError, match="neither a module's name nor a regular expression"):
        swap(decoder, "(", Marked)
