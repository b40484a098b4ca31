"""A look inside shows what the forward pass computes: the same hidden states, weights and probabilities."""

from __future__ import annotations

import copy
import json
import math
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("transformers")

from slmkit.config import UserError
from slmkit.evaluation.look import (
    MOST_CHARACTERS,
    MOST_TOKENS,
    UNIT,
    attention,
    attention_weights,
    hidden_states,
    lens,
    logit_lens,
    look,
    predictions,
    token_spelling,
)
from slmkit.generation.ensemble import Ensemble
from slmkit.model.config import SLMConfig
from slmkit.model.decoder import Decoder
from slmkit.model.initialization import build_decoder
from slmkit.tokenizer import SLMTokenizer
from tests.parity.configurations import DRAW
from tests.parity.twins import Twins, text, twins, twins_of

CONFIGURATIONS = [(family, number) for family in DRAW for number in range(3)]
every_configuration = pytest.mark.parametrize(("family", "number"), CONFIGURATIONS, ids=lambda value: str(value))
WINDOWS = {"sliding_window": 40, "max_position_embeddings": 512, "vocab_size": 67, "hidden_size": 32}
WINDOWS |= {"intermediate_size": 48, "num_hidden_layers": 6, "num_attention_heads": 4, "num_key_value_heads": 2}
WINDOWS |= {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None, "head_dim": 8}


def theirs(pair: Twins, ids: Tensor) -> Any:
    """Attention weights and hidden states of the reference, whose fused kernels return no weights."""
    model = copy.deepcopy(pair.theirs)
    model.set_attn_implementation("eager")
    with torch.no_grad():
        return model(ids, output_attentions=True, output_hidden_states=True, use_cache=False)


def small_model(vocab_size: int = 300, **settings: Any) -> Decoder:
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4}
    return build_decoder(SLMConfig(vocab_size=vocab_size, initializer_range=0.2, **shape | settings))


@every_configuration
def test_weights_and_hidden_states_are_the_references(family: str, number: int) -> None:
    pair, ids = twins(family, number), text(1)
    expected, tokens = theirs(pair, ids), ids[0].tolist()
    for layer, weights in enumerate(expected.attentions):
        found = attention_weights(pair.ours, tokens, layer)
        assert (found - weights[0]).abs().max() <= 2e-5, layer
    hidden = hidden_states(pair.ours, tokens)
    # The first of the reference's is the embedding's, its last one has passed the last norm.
    assert len(hidden) == len(expected.hidden_states) - 1
    for layer, states in enumerate(expected.hidden_states[1:-1]):
        torch.testing.assert_close(hidden[layer], states[0], rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        torch.testing.assert_close(pair.ours.norm(hidden[-1]), expected.hidden_states[-1][0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["Mistral", "Gemma3", "Gemma2"])
def test_weights_of_windows_shorter_than_a_long_text(name: str) -> None:
    """In which the layer computes pieces, and the weights are still whole rows."""
    pair, ids = twins_of(name, WINDOWS), text(1, 300)
    expected = theirs(pair, ids).attentions
    for layer, kind in enumerate(pair.ours.architecture.layers):
        weights = attention_weights(pair.ours, ids[0].tolist(), layer)
        assert (weights - expected[layer][0]).abs().max() <= 2e-5
        query, key = torch.arange(300)[:, None], torch.arange(300)[None]
        reach = 300 if kind.window is None else kind.window
        outside = (key > query) | (key <= query - reach)
        assert (weights[:, outside] == 0).all()
        assert (weights[:, ~outside] > 0).float().mean() > 0.99
        assert weights.sum(-1).sub(1).abs().max() <= 1e-5
    assert {kind.window for kind in pair.ours.architecture.layers} >= {40}


def test_neither_mode_nor_hooks_are_left_behind() -> None:
    decoder = small_model(hidden_dropout=0.5, max_position_embeddings=128).train()
    first = predictions(decoder, [5, 6, 7])
    attention_weights(decoder, [5, 6, 7], 1)
    with pytest.raises(UserError):
        hidden_states(decoder, range(1, 300))
    assert decoder.training
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in decoder.modules())
    assert torch.equal(predictions(decoder, [5, 6, 7]).probabilities, first.probabilities)


@pytest.mark.parametrize(
    "settings", [{}, {"model_type": "gemma2", "final_logit_softcapping": 2.0}], ids=["llama", "cap"]
)
def test_predictions_and_the_last_layer_of_the_lens_are_the_models(settings: dict[str, Any]) -> None:
    """Over more positions than are computed at once."""
    decoder = small_model(**settings).eval()
    ids = torch.randint(300, (100,), generator=torch.Generator().manual_seed(0)).tolist()
    with torch.no_grad():
        p = decoder.logits(decoder(torch.tensor([ids])))[0].double().softmax(-1)  # [tokens, vocab_size]
    found, layers = predictions(decoder, ids, k=4), logit_lens(decoder, ids)
    true = torch.tensor([p[place, token] for place, token in enumerate(ids[1:])])
    close = {"rtol": 1e-4, "atol": 1e-6, "check_dtype": False}
    torch.testing.assert_close(found.probabilities, true, **close)
    ranks = [int((p[place] > p[place, token]).sum()) + 1 for place, token in enumerate(ids[1:])]
    assert found.ranks.tolist() == ranks
    assert 1 < max(ranks) <= 300
    torch.testing.assert_close(found.entropies, -(p * p.log2()).sum(-1), **close)
    assert torch.equal(found.likeliest, p.topk(4).indices)
    torch.testing.assert_close(found.likeliest_probabilities, p.topk(4).values, **close)
    assert layers.likeliest.shape == (3, 100)
    assert torch.equal(layers.likeliest[-1], p.argmax(-1))
    torch.testing.assert_close(layers.likeliest_probabilities[-1], p.amax(-1), **close)
    torch.testing.assert_close(layers.probabilities[-1], true, **close)
    assert not torch.allclose(layers.probabilities[0], layers.probabilities[-1], atol=1e-4)


def test_the_lens_of_a_layer_is_the_model_without_the_layers_after_it() -> None:
    decoder, ids = small_model(), [7, 3, 200, 41, 5]
    first = logit_lens(decoder, ids)
    decoder.blocks = decoder.blocks[:1]
    with torch.no_grad():
        p = decoder.logits(decoder(torch.tensor([ids])))[0].softmax(-1)
    assert torch.equal(first.likeliest[0], p.argmax(-1))
    torch.testing.assert_close(first.likeliest_probabilities[0], p.amax(-1))


def test_json_of_a_text() -> None:
    decoder, tokenizer = small_model(), SLMTokenizer(300)
    page = json.loads(json.dumps(look(decoder, tokenizer, text="Ω and é", k=3)))
    ids = tokenizer.encode_prompt("Ω and é")
    assert page["ids"] == ids
    assert page["answers"] == [False] * len(ids)
    assert [len(page[name]) for name in ("probabilities", "ranks", "entropies")] == [len(ids) - 1] * 2 + [len(ids)]
    assert page["likeliest_probabilities"][2] == pytest.approx(
        predictions(decoder, ids).likeliest_probabilities[2, :3].tolist(), rel=1e-3
    )
    assert {len(row) for row in page["likeliest"]} == {3}
    assert {*map(int, page["vocabulary"])} == {*ids, *(token for row in page["likeliest"] for token in row)}
    assert (page["windows"], page["heads"]) == ([None] * 3, 4)
    again = lens(decoder, tokenizer, ids)
    assert again["likeliest"] == logit_lens(decoder, ids).likeliest.tolist()
    assert {*again["vocabulary"]} == {token for row in again["likeliest"] for token in row}


def test_json_of_a_conversation_says_which_tokens_are_the_answers() -> None:
    tokenizer = SLMTokenizer(300)
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Oh!"}]
    page = look(small_model(), tokenizer, messages=messages)
    assert page["ids"] == tokenizer.encode_chat(messages).ids
    answer = [token for token, is_answer in zip(page["ids"], page["answers"]) if is_answer]
    assert tokenizer.decode(answer).startswith("Oh!")
    assert page["vocabulary"][page["ids"][0]] == ("<|im_start|>", "special")


def test_spellings_of_tokens_that_are_no_characters() -> None:
    tokenizer = SLMTokenizer(300)
    (first, *_) = tokenizer.encode("é")
    assert token_spelling(tokenizer, first) == ("C3", "bytes")
    assert token_spelling(tokenizer, tokenizer.eos_token_id)[1] == "special"
    assert token_spelling(tokenizer, tokenizer.encode("\n")[0]) == ("\n", "text")
    assert token_spelling(tokenizer, 299) == ("299", "unused")


def test_json_of_weights_has_one_head_and_small_maps_of_all() -> None:
    decoder = small_model(num_key_value_heads=2, max_position_embeddings=512)
    ids = [token % 300 for token in range(100)]
    page, weights = attention(decoder, ids, layer=1, head=2), attention_weights(decoder, ids, 1)
    assert [len(row) for row in page["weights"]] == [*range(1, 101)]
    for query in (0, 57, 99):
        assert [x / UNIT for x in page["weights"][query]] == pytest.approx(
            weights[2, query, : query + 1].tolist(), abs=1e-4
        )
    assert torch.tensor(page["maps"]).shape == (4, 48, 48)
    assert page["maps"][3][0][0] == UNIT  # the first token sees itself alone
    assert torch.tensor(page["maps"]).amax((1, 2)).tolist() == (weights.amax((1, 2)) * UNIT).round().int().tolist()
    assert torch.tensor(attention(decoder, [1, 2], 0, 0)["maps"]).shape == (4, 2, 2)


def test_what_is_refused() -> None:
    decoder, tokenizer = small_model(max_position_embeddings=1024), SLMTokenizer(300)
    refusals = {
        f"513 tokens: a look inside takes 1 to {MOST_TOKENS}": lambda: predictions(decoder, [5] * 513),
        "0 tokens": lambda: hidden_states(decoder, []),
        "token 300: the model has 300 tokens": lambda: lens(decoder, tokenizer, [5, 300]),
        "token -1": lambda: attention_weights(decoder, [-1], 0),
        "layer 3: expected 0 to 2": lambda: attention(decoder, [5], 3, 0),
        "layer -1": lambda: attention(decoder, [5], -1, 0),
        "head 4: expected 0 to 3": lambda: attention(decoder, [5], 0, 4),
        "k 0: expected 1 to 300": lambda: predictions(decoder, [5], 0),
        "k 101: expected 1 to 100": lambda: look(decoder, tokenizer, text="a", k=101),
        "either text or messages": lambda: look(decoder, tokenizer),
        f"more than {MOST_CHARACTERS:,} characters": lambda: look(decoder, tokenizer, text="a" * 40_000),
        "context of 128": lambda: predictions(small_model(max_position_embeddings=128), [5] * 129),
        "an ensemble has no layers": lambda: look(Ensemble([decoder]), tokenizer, text="a"),
    }
    for message, call in refusals.items():
        with pytest.raises(UserError, match=message):
            call()
    decoder.norm.weight.data.fill_(math.nan)
    with pytest.raises(UserError, match="not finite"):
        predictions(decoder, [5])
