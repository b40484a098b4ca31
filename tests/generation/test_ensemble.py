"""An ensemble says what the mean of its members' probabilities says, wherever a model is used."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from slmkit import SLMEnsemble, SLMForCausalLM
from slmkit.config import UserError
from slmkit.data.prepare.text_to_shards import prepare_text
from slmkit.data.stream import DocumentRows
from slmkit.device import find_device
from slmkit.evaluation import ask, validation_loss
from slmkit.generation.chat import ChatSession
from slmkit.generation.engine import Engine, Request
from slmkit.generation.ensemble import Ensemble
from slmkit.generation.generator import generate_ids
from slmkit.generation.sampling_settings import SamplingSettings
from slmkit.model.config import SLMConfig
from slmkit.model.decoder import Decoder
from slmkit.model.files.directory import save_decoder
from slmkit.model.initialization import build_decoder
from slmkit.tokenizer import SLMTokenizer
from tests.generation.helpers import TOKENIZER, byte_decoder, complete
from tests.generation.test_engine import run
from tests.long import several
from tests.model.test_cache import UNLIKE, config
from tests.model.test_decoder import ids, tiny

GREEDY = SamplingSettings(do_sample=False)
SAMPLED = SamplingSettings(temperature=0.8, top_p=0.9, repetition_penalty=1.3, seed=7)


def unlike() -> list[Decoder]:
    """Three models that have nothing but the vocabulary in common."""
    window = config("gemma2").model_copy(update={"max_position_embeddings": 80})
    wide = tiny(hidden_size=64, num_hidden_layers=2, max_position_embeddings=56)
    return [build_decoder(shape, seed).eval() for seed, shape in enumerate((wide, window, config("gpt2")))]


def mean_of_probabilities(members: list[Decoder], weights: list[float], x: Tensor) -> np.ndarray:
    """Σ w_i softmax(logits_i) / Σ w_i in double precision, one position at a time.  [batch, length, vocab_size]"""
    total = np.zeros((*x.shape, 97))
    for member, weight in zip(members, weights):
        with torch.no_grad():
            logits = member.logits(member(x)).double().numpy()
        for place in np.ndindex(*x.shape):
            exponentials = np.exp(logits[place] - logits[place].max())
            total[place] += weight * exponentials / exponentials.sum()
    return total / sum(weights)


def probabilities(ensemble: Ensemble, x: Tensor, pieces: list[int] | None = None) -> np.ndarray:
    with torch.no_grad():
        if pieces is None:
            return ensemble.logits(ensemble(x)).softmax(-1).numpy()
        cache = ensemble.new_cache(x.size(0), x.size(1))
        return np.concatenate(
            [ensemble.logits(ensemble(piece, cache)).softmax(-1).numpy() for piece in x.split(pieces, dim=1)], axis=1
        )


def generate(model: Ensemble | Decoder, prompt: Tensor, count: int, settings: SamplingSettings, **more) -> Tensor:
    return generate_ids(
        model, prompt, max_new_tokens=count, stop_ids=frozenset(), settings=settings, pad_token_id=96, **more
    )


@pytest.mark.parametrize("pieces", [None, [1] * 20, [7, 1, 12]], ids=str)
@pytest.mark.parametrize("weights", [[1, 1, 1], [3, 0.5, 1e-4]], ids=str)
def test_every_position_has_the_mean_of_the_members_probabilities(weights: list[float], pieces) -> None:
    members, x = unlike(), ids(2, 20)
    found = probabilities(Ensemble(members, weights), x, pieces)
    np.testing.assert_allclose(found, mean_of_probabilities(members, weights, x), atol=2e-6)
    assert np.abs(found - mean_of_probabilities(members[:1], [1], x)).max() > 0.05


def test_what_one_member_thinks_impossible_counts_with_the_others_share() -> None:
    """In log space: a token of probability e^-200 in one member, which is 0 in float32, has half of the other's."""
    ensemble = Ensemble([build_decoder(tiny(), 1), build_decoder(tiny(), 1)])
    sure, even = torch.zeros(97), torch.zeros(97)
    sure[3] = 200.0
    ensemble.members[0].logits, ensemble.members[1].logits = (lambda hidden: sure), (lambda hidden: even)
    log_p = ensemble.logits(torch.zeros(64)).log_softmax(-1)
    assert log_p[5].item() == pytest.approx(np.log(0.5 / 97), abs=1e-5)
    assert log_p[3].item() == pytest.approx(np.log(0.5 + 0.5 / 97), abs=1e-5)


@pytest.mark.parametrize("settings", [GREEDY, SAMPLED, SamplingSettings(do_sample=False, repetition_penalty=1.4)])
@pytest.mark.parametrize("family", UNLIKE)
def test_an_ensemble_of_one_is_the_model(family: str, settings: SamplingSettings) -> None:
    decoder = build_decoder(config(family), seed=3).eval()
    x = ids(2, 6)
    alone = Ensemble([decoder])
    with torch.no_grad():
        assert torch.equal(alone.logits(alone(x)), decoder.logits(decoder(x)))
    assert torch.equal(generate(alone, x, 30, settings), generate(decoder, x, 30, settings))


def test_greedy_tokens_are_those_of_the_largest_mean_probability() -> None:
    members, x = unlike(), ids(2, 5)
    found = generate(Ensemble(members, [2, 1, 1]), x, 20, GREEDY)
    for _ in range(20):
        best = mean_of_probabilities(members, [2, 1, 1], x)[:, -1].argmax(-1)
        x = torch.cat((x, torch.from_numpy(best)[:, None]), dim=1)
    assert torch.equal(found, x)


def test_sampled_tokens_are_as_frequent_as_the_mean_says() -> None:
    members, x = unlike(), ids(1, 5)
    expected = mean_of_probabilities(members, [1, 1, 1], x)[0, -1]
    total, engine = several(2_000, 10_000), Engine(Ensemble(members), max_rows=64)
    engine.insert(Request(x[0].tolist(), 1, SamplingSettings(seed=1), n=total))  # whose prompt is read once
    drawn = [event.token for event in run(engine)]
    assert len(drawn) == total
    frequency = np.bincount(drawn, minlength=97) / total
    assert np.abs(frequency - expected).max() < 5 * (expected * (1 - expected) / total).max() ** 0.5
    assert np.abs(frequency - mean_of_probabilities(members[:1], [1], x)[0, -1]).max() > 0.05


@pytest.mark.parametrize("settings", [GREEDY, SamplingSettings(do_sample=False, repetition_penalty=1.3)])
def test_prompts_of_different_lengths_are_padded_as_with_a_model(settings: SamplingSettings) -> None:
    ensemble, long, short = Ensemble(unlike()), ids(1, 9), ids(1, 4)
    together = torch.cat((long, torch.cat((torch.full((1, 5), 96), short), dim=1)))
    both = generate(ensemble, together, 15, settings, padding=torch.tensor([0, 5]))
    assert torch.equal(both[0], generate(ensemble, long, 15, settings)[0])
    assert torch.equal(both[1, 5:], generate(ensemble, short, 15, settings)[0])


def test_several_texts_of_a_prompt_are_those_of_the_prompt_said_several_times() -> None:
    ensemble, prompt = Ensemble(unlike()), ids(2, 6)
    found = generate(ensemble, prompt, 10, SamplingSettings(seed=5), num_return_sequences=2)
    expected = generate(ensemble, prompt.repeat_interleave(2, dim=0), 10, SamplingSettings(seed=5))
    assert torch.equal(found, expected)


def test_the_context_is_the_shortest_of_the_members() -> None:
    ensemble = Ensemble(unlike())
    assert ensemble.max_positions == 56
    assert generate(ensemble, ids(1, 50), 100, GREEDY).shape == (1, 56)


def test_dropout_is_off_while_it_generates_and_on_again_after() -> None:
    members = [build_decoder(tiny(hidden_dropout=0.5), seed).train() for seed in (1, 2)]
    ensemble = Ensemble(members)
    first, again = (generate(ensemble, ids(1, 4), 8, GREEDY) for _ in range(2))
    assert torch.equal(first, again)
    assert all(module.training for member in members for module in member.modules())


def test_its_loss_is_that_of_the_mean(tmp_path: Path) -> None:
    tokenizer = SLMTokenizer(260)
    rows = DocumentRows(prepare_text(["A fox and a hen.", "An owl."] * 3, tokenizer, tmp_path / "s"), length=24)
    members, cpu = [byte_decoder(), byte_decoder(64)], find_device("cpu", "float32")
    members[1].load_state_dict(build_decoder(_bytes(64), seed=9).state_dict())
    nats = 0.0
    for index in range(rows.rows_in_epoch):
        row, labels = (torch.from_numpy(part.astype(np.int64)) for part in rows.row(index))
        with torch.no_grad():
            mean = sum(member.logits(member(row[None]))[0].double().softmax(-1) for member in members) / 2
        nats += F.nll_loss(mean.log(), labels, ignore_index=-100, reduction="sum").item()
    for separate in (False, True):
        report = validation_loss(Ensemble(members), rows, cpu, separate=separate)
        assert separate or report.nats == pytest.approx(nats, rel=1e-5)
        # −log is convex: the mean's loss is never above the mean of the losses.
        each = [validation_loss(member, rows, cpu, separate=separate).nats for member in members]
        assert report.nats < sum(each) / 2


def _bytes(context: int) -> SLMConfig:
    return SLMConfig(
        vocab_size=260, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=context, initializer_range=0.3,
    )  # fmt: skip


def test_it_continues_texts_answers_questions_and_talks() -> None:
    ensemble = Ensemble([byte_decoder(), build_decoder(_bytes(128), seed=2).eval()])
    messages = [{"role": "user", "content": "Hi"}]

    def said(prompt: list[int], count: int) -> str:
        found = generate_ids(
            ensemble, torch.tensor([prompt]), max_new_tokens=count, stop_ids=TOKENIZER.stop_token_ids,
            settings=GREEDY, pad_token_id=0,
        )  # fmt: skip
        return TOKENIZER.decode(found[0, len(prompt) :].tolist(), skip_special_tokens=True)

    text = complete(ensemble, TOKENIZER, "Hello", settings=GREEDY, max_new_tokens=12).text
    assert text == said([TOKENIZER.eos_token_id, *TOKENIZER.encode("Hello")], 12)
    asked = TOKENIZER.encode_chat(messages, add_generation_prompt=True).ids
    session = ChatSession(ensemble, TOKENIZER, GREEDY, max_new_tokens=8)
    assert "".join(session.reply("Hi")) == said(asked, 8)
    assert ask(ensemble, TOKENIZER, [(messages, "bird")]).answers[0].given == said(asked, 16)


@pytest.fixture(scope="module")
def directories(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two models of one tokenizer, and a third of another as large."""
    other = SLMTokenizer(264)
    other.train(["the cat and the hat that the rat sat at"] * 9)
    tokenizer = SLMTokenizer(264)
    tokenizer.train(["a fox and an owl and a fox"] * 9)
    found = []
    for number, tokens in enumerate((tokenizer, tokenizer, other)):
        directory = tmp_path_factory.mktemp(f"model-{number}")
        shape = tiny(vocab_size=264, hidden_size=32 + 16 * number, num_attention_heads=2)
        save_decoder(build_decoder(shape, seed=number), shape, directory)
        tokens.save_pretrained(directory)
        found.append(directory)
    return found


def test_a_script_uses_it_as_a_model(directories: list[Path]) -> None:
    ensemble = SLMEnsemble.from_pretrained(directories[:2], weights=[1, 3])
    models = [SLMForCausalLM.from_pretrained(directory) for directory in directories[:2]]
    x = ids(2, 8)
    with torch.no_grad():
        mean = models[0](x).logits.softmax(-1) / 4 + models[1](x).logits.softmax(-1) * 3 / 4
        assert (ensemble(x).logits.softmax(-1) - mean).abs().max() < 1e-6
        assert ensemble.generate(x, max_new_tokens=1)[:, -1].tolist() == mean[:, -1].argmax(-1).tolist()
    assert not ensemble.training


def test_models_of_different_tokenizers_are_refused_in_one_line(directories: list[Path]) -> None:
    with pytest.raises(UserError, match="model-2.*: its tokenizer .* is not that of .*model-0.*use models of one"):
        SLMEnsemble.from_pretrained(directories)
    with pytest.raises(UserError, match="an ensemble without models: name at least one"):
        SLMEnsemble.from_pretrained([])


@pytest.mark.parametrize(
    ("members", "weights", "words"),
    [
        ([], None, "an ensemble without models: name at least one"),
        ([97, 98], None, "one vocabulary, found models of 97, 98 tokens"),
        ([97, 97], [1], "expected 2 positive numbers"),
        ([97, 97], [1, 0], "weights 1, 0: expected 2 positive"),
        ([97, 97], [1, float("nan")], "expected 2 positive"),
    ],
)
def test_what_is_no_ensemble_is_refused(members: list[int], weights: list[float] | None, words: str) -> None:
    with pytest.raises(UserError, match=words):
        Ensemble([build_decoder(tiny(vocab_size=size)) for size in members], weights)
