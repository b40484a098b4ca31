"""Continuations as branches of a tree get what each gets alone, in every kind of model."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch

from slmkit.config import UserError
from slmkit.evaluation.scoring import Tree, batches, score
from slmkit.generation.ensemble import Ensemble, LanguageModel
from slmkit.model.config import SLMConfig
from slmkit.model.decoder import Decoder
from slmkit.model.initialization import build_decoder

DYNAMIC = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10_000.0}
MODELS: dict[str, dict[str, Any]] = {
    "llama": {},
    "gpt2": {"model_type": "gpt2"},  # learned positions
    "windows": {"model_type": "gemma3_text", "sliding_window": 4, "head_dim": 16},
    "depends on length": {"rope_parameters": DYNAMIC, "max_position_embeddings": 16},
}


def decoder_of(seed: int = 1, **more: Any) -> Decoder:
    shape = {
        "vocab_size": 50, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2,
        "max_position_embeddings": 64, "initializer_range": 0.3,
    }  # fmt: skip
    return build_decoder(SLMConfig(**(shape | more)), seed=seed).double().eval()


def trees() -> list[Tree]:
    pick = random.Random(3)

    def ids(least: int, most: int) -> tuple[int, ...]:
        return tuple(pick.choices(range(50), k=pick.randint(least, most)))

    return [Tree(ids(1, 9), tuple(ids(1, 7) for _ in range(count))) for count in (1, 4, 2, 5, 1, 3)]


def alone(model: LanguageModel, context: tuple[int, ...], branch: tuple[int, ...]) -> tuple[float, bool]:
    read = torch.tensor([[*context, *branch[:-1]]])
    with torch.no_grad():
        log = model.logits(model(read)[0]).log_softmax(-1)[-len(branch) :]
    return float(log.gather(-1, torch.tensor(branch)[:, None]).sum()), log.argmax(-1).tolist() == [*branch]


@pytest.mark.parametrize("name", [*MODELS, "ensemble"])
@pytest.mark.parametrize("at_once", [8, 4096])
def test_a_branch_gets_what_it_gets_alone(name: str, at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("slmkit.evaluation.scoring.AT_ONCE", {"cpu": at_once})
    model: Any = Ensemble([decoder_of(), decoder_of(seed=2)]) if name == "ensemble" else decoder_of(**MODELS[name])
    asked = trees()
    found = dict(score(model, asked))
    assert sorted(found) == [*range(len(asked))]
    for number, tree in enumerate(asked):
        for (sum_, is_best), branch in zip(found[number], tree.branches, strict=True):
            expected = alone(model, tree.context, branch)
            # An ensemble mixes probabilities in float32.
            assert sum_ == pytest.approx(expected[0], abs=1e-4 if name == "ensemble" else 1e-9)
            assert is_best is expected[1]


def test_a_batch_has_at_most_so_many_tokens_with_its_padding() -> None:
    asked = trees()
    found = [*batches(asked, 40)]
    assert sorted(number for batch in found for number in batch) == [*range(len(asked))]
    assert all(len(batch) == 1 or len(batch) * max(asked[number].size for number in batch) <= 40 for batch in found)


def test_logits_that_are_not_finite_are_refused() -> None:
    decoder = decoder_of()
    decoder.embedding.weight.data[3] = torch.nan
    with pytest.raises(UserError, match="not finite"):
        [*score(decoder, trees())]
