"""Each token counts once, with the context that is said, and the figures are those of models that are known exactly."""

from __future__ import annotations

import itertools
import json
import math
import random
from functools import partial

import pytest
import torch

from slmkit.config import UserError
from slmkit.evaluation import perplexity
from slmkit.evaluation.perplexity import blocks_of, start_tokens, text_result, token_losses, windows
from slmkit.evaluation.results import TaskResult
from slmkit.generation.ensemble import Ensemble
from slmkit.model.config import SLMConfig
from slmkit.model.decoder import Decoder
from slmkit.model.initialization import build_decoder
from slmkit.tokenizer import SLMTokenizer
from tests.evaluation.known_models import counting, uniform

TOKENIZER = SLMTokenizer(260)  # a token is a byte; the end of text is 0 and stands before each document
V, P = 260, 0.7
GEOMETRIES = [(window, stride) for window in (8, 16) for stride in range(1, window + 1)]


def texts(count: int = 40) -> list[str]:
    """Texts of 1 to `count` bytes, in which about half of the bytes follow the one before."""
    draw, made = random.Random(5), []
    for length in range(1, count + 1):
        codes = [draw.randrange(33, 126)]
        while len(codes) < length:
            codes.append(codes[-1] + 1 if draw.random() < 0.5 and codes[-1] < 125 else draw.randrange(33, 126))
        made.append(bytes(codes).decode())
    return made


def closed_form(ids: list[int]) -> float:
    """Nats of all ids but the first, for the model that counts."""
    nats = (-math.log(P) if b == a + 1 else -math.log((1 - P) / (V - 1)) for a, b in itertools.pairwise(ids))
    return math.fsum(nats)


def random_model(context: int = 64) -> Decoder:
    """Every prediction depends on the whole context."""
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = SLMConfig(vocab_size=V, max_position_embeddings=context, initializer_range=0.3, **shape)
    torch.manual_seed(3)
    return build_decoder(config).eval()


@pytest.mark.parametrize("start", [None, ()])
@pytest.mark.parametrize("joined", [False, True])
def test_every_token_is_scored_once_and_a_uniform_model_has_the_vocabulary_as_perplexity(
    start: tuple[int, ...] | None, joined: bool
) -> None:
    model, documents = uniform(V), texts()
    bare = 0 if start is None else 1  # first tokens that nothing predicts
    lengths = [len(text) - bare for text in documents]
    if joined and bare:
        lengths = [0, *(len(text) for text in documents[1:])]
    for window, stride in GEOMETRIES:
        result = text_result(model, TOKENIZER, documents, window=window, stride=stride, joined=joined, start=start)
        scored = {int(item.id.partition("-")[0]): item.values["loss"][1] for item in result.items}
        assert scored == {number: length for number, length in enumerate(lengths) if length}
        assert result.score("perplexity").value == pytest.approx(V, abs=1e-6)
        assert result.score("loss").value == pytest.approx(math.log(V), abs=1e-9)
        assert result.recipe["stride"] == stride
        assert len(result.errors) == len(documents) - len(result.items)


def test_a_model_that_counts_has_its_closed_form_in_every_geometry() -> None:
    model, documents, start = counting(V, P), texts(), start_tokens(TOKENIZER)
    wanted = {n: closed_form([*start, *TOKENIZER.encode(text)]) for n, text in enumerate(documents)}
    tokens = sum(map(len, documents))
    for window, stride in GEOMETRIES:
        result = text_result(model, TOKENIZER, documents, window=window, stride=stride)
        for item in result.items:
            number = int(item.id.partition("-")[0])
            assert item.values["loss"][0] == pytest.approx(wanted[number], rel=1e-5)
        ratio = sum(wanted.values()) / tokens
        assert result.score("loss").value == pytest.approx(ratio, rel=1e-5)
        assert result.score("perplexity").value == pytest.approx(math.exp(ratio), rel=1e-5)


def test_the_context_of_each_token_is_the_one_that_is_said() -> None:
    """Against a loop without batches: token i is predicted from the tokens of its window alone."""
    model, ids = random_model(), torch.tensor(random.Random(1).choices(range(V), k=40))
    for window, stride in [(window, stride) for window in (8, 16) for stride in (1, 3, 7, 8, 16) if stride <= window]:
        (found,) = token_losses(model, [ids], window, stride)
        for place in range(1, len(ids)):
            number = max(0, math.ceil((place - window) / stride))  # the first window that reaches it
            begin = min(number * stride, max(0, len(ids) - 1 - window))  # the last one begins earlier, to be full
            context = ids[begin:place]
            assert place <= window or window - stride + 1 <= len(context) <= window
            with torch.no_grad():
                logits = model.logits(model(context[None]))[0, -1]
            wanted = -logits.double().log_softmax(-1)[ids[place]].item()
            assert found[place].item() == pytest.approx(wanted, rel=1e-4, abs=1e-4)


def test_the_windows_of_a_stream() -> None:
    assert windows(0, 4, 2) == windows(1, 4, 2) == []
    assert windows(4, 4, 2) == [(0, 1, 3)]
    assert windows(5, 4, 2) == [(0, 1, 4)]
    assert windows(6, 4, 2) == [(0, 1, 4), (1, 5, 5)]  # the last one is full
    assert windows(12, 4, 4) == [(0, 1, 4), (4, 5, 8), (7, 9, 11)]  # the token at a border is scored too


def test_documents_apart_do_not_see_each_other_and_joined_ones_do() -> None:
    model, documents = random_model(), ["a fox", "a hen and a kite", "an owl"]
    alone = [text_result(model, TOKENIZER, [text], window=32).items[0].values for text in documents]
    apart = text_result(model, TOKENIZER, documents, window=32)
    assert apart.recipe["documents"] == "each apart"
    for item, values in zip(apart.items, alone):
        assert item.values["loss"] == pytest.approx(values["loss"], rel=1e-4)
    joined = text_result(model, TOKENIZER, documents, window=32, joined=True)
    assert joined.recipe["documents"] == "joined"
    assert [item.id for item in joined.items] == [item.id for item in apart.items]
    assert joined.items[0].values["loss"] == pytest.approx(alone[0]["loss"], rel=1e-4)
    assert joined.items[2].values["loss"][0] != pytest.approx(alone[2]["loss"][0], rel=1e-3)
    ids = torch.tensor([one for text in documents for one in (0, *TOKENIZER.encode(text))])
    (nats,) = token_losses(model, [ids], 32, 16)
    places = (ids != 0).nonzero()[:, 0]
    assert joined.score("loss").value == pytest.approx(nats[places].mean().item(), rel=1e-6)


def test_bits_per_byte_are_of_the_original_text() -> None:
    """Tokens · log2 V / bytes, with characters of one to four bytes, and with more bytes in a token than one."""
    tokenizer = SLMTokenizer(300)
    documents = ["A fox and a hen, a fox and a hen.", "Ünïcödé — 猫が座った 🐈\n", " \n two  spaces \t"]
    tokenizer.train(documents * 4)
    model, size = uniform(len(tokenizer)), sum(len(text.encode()) for text in documents)
    tokens = sum(len(tokenizer.encode(text)) for text in documents)
    assert tokens < size
    for joined in (False, True):
        result = text_result(model, tokenizer, documents, joined=joined)
        wanted = tokens * math.log2(len(tokenizer)) / size
        assert result.score("bits_per_byte").value == pytest.approx(wanted, abs=1e-9)
    assert "word_perplexity" not in result.metrics
    pages = [f"{text} @-@ more words" for text in documents]  # as they were before they were cleaned
    result = text_result(model, tokenizer, documents, originals=pages)
    bits = tokens * math.log2(len(tokenizer))
    assert result.score("bits_per_byte").value == pytest.approx(bits / sum(len(p.encode()) for p in pages), abs=1e-9)
    words = 13 + 7 + 6  # as lm-eval counts them: a space at the beginning makes an empty one
    assert result.score("word_perplexity").value == pytest.approx(2 ** (bits / words), rel=1e-9)


def test_items_of_a_single_document_are_its_blocks_whatever_the_tokens() -> None:
    """The same blocks, with the same bytes, for tokenizers of one and of several bytes a token."""
    text = "".join(f"The fox had {n} kites, and a hen é had {n * n}.\n" for n in range(300))
    merging, found = SLMTokenizer(300), []
    merging.train([text])
    for tokenizer in (TOKENIZER, merging):
        model, ids = uniform(len(tokenizer)), tokenizer.encode(text)
        result = text_result(model, tokenizer, [text], left_out=[300.0])
        assert result.recipe["items"] == "blocks of 2,048 characters"
        assert result.score("bits_per_byte").n == len(blocks_of(text)) > 5
        bits = len(ids) * math.log2(len(tokenizer)) / (len(text.encode()) + 300)
        assert result.score("bits_per_byte").value == pytest.approx(bits, abs=1e-9)
        for item, block in zip(result.items, blocks_of(text)):
            tokens = item.values["loss"][1]
            assert abs(tokens - len(tokenizer.encode(block))) <= 2  # tokens that cross a border
            assert item.values["bits_per_byte"][1] == pytest.approx(len(block.encode()) + block.count("\n"))
        found.append([item.values["bits_per_byte"][1] for item in result.items])
        bare = text_result(model, tokenizer, [text], start=())
        assert sum(item.values["loss"][1] for item in bare.items) == len(ids) - 1
    assert found[0] == found[1]
    assert "".join(blocks_of(text)) == text
    assert [len(block) for block in blocks_of("a" * 5000)] == [2048, 2048, 904]


def test_no_figure_is_a_mean_of_means_and_its_error_is_that_of_a_ratio() -> None:
    model, documents = counting(V, P), ["abcdefgh" * 4, "zax"]
    result = text_result(model, TOKENIZER, documents, window=16)
    (a, b), (c, d) = (item.values["loss"] for item in result.items)
    ratio = (a + c) / (b + d)
    assert result.score("loss").value == pytest.approx(ratio, rel=1e-9)
    assert abs(ratio - (a / b + c / d) / 2) > 0.1
    error = math.sqrt(2 * ((a - ratio * b) ** 2 + (c - ratio * d) ** 2)) / (b + d)
    assert result.score("loss").standard_error == pytest.approx(error, rel=1e-9)
    assert result.score("perplexity").standard_error == pytest.approx(error * math.exp(ratio), rel=1e-9)
    assert result.score("loss").n == 2
    assert text_result(model, TOKENIZER, documents[:1]).score("loss").standard_error is None


def test_batches_change_nothing_but_rounding(monkeypatch: pytest.MonkeyPatch) -> None:
    model, found = random_model(), []
    for at_once in (1, 50, 8_192):
        monkeypatch.setattr(perplexity, "TOKENS_AT_ONCE", at_once)
        done: list[tuple[int, int]] = []
        result = text_result(
            model, TOKENIZER, texts(), window=16, stride=5, progress=lambda *counts, done=done: done.append(counts)
        )
        found.append([item.values["loss"][0] for item in result.items])
        assert done[-1][0] == done[-1][1] == sum(len(windows(length + 1, 16, 5)) for length in range(1, 41))
    assert found[1] == pytest.approx(found[0], rel=1e-5)
    assert found[2] == pytest.approx(found[0], rel=1e-5)


def test_an_ensemble_is_a_model_too() -> None:
    """The mean of 1/V and of the counting model's probabilities, in closed form."""
    model, text = Ensemble([uniform(V), counting(V, P)]), "abcdefgz"
    result = text_result(model, TOKENIZER, [text], start=())
    right, wrong = (1 / V + P) / 2, (1 / V + (1 - P) / (V - 1)) / 2
    assert result.items[0].values["loss"] == pytest.approx((-6 * math.log(right) - math.log(wrong), 7), rel=1e-5)


def test_defaults_are_the_context_and_half_of_it_and_the_precision_is_said() -> None:
    model = uniform(V, context=40).bfloat16()
    result = text_result(model, TOKENIZER, ["a fox"])
    assert (result.recipe["window"], result.recipe["stride"]) == (40, 20)
    assert result.recipe["context"] == "21 to 40 tokens, fewer at the beginning"
    assert result.recipe["precision"] == "bfloat16"
    assert result.recipe["before_a_document"] == "<|endoftext|>"
    long = uniform(V, context=5000)
    assert text_result(long, TOKENIZER, ["a fox"]).recipe["window"] == 2048
    assert TaskResult.from_json(json.loads(json.dumps(result.to_json()))) == result


def test_what_cannot_be_evaluated_is_refused() -> None:
    model = uniform(V)
    evaluate = partial(text_result, model, TOKENIZER)
    with pytest.raises(UserError, match="at most 64 tokens at once"):
        evaluate(["a fox"], window=65)
    with pytest.raises(UserError, match="a stride of 33 tokens is longer than the window of 32: lower --stride"):
        evaluate(["a fox"], window=32, stride=33)
    with pytest.raises(UserError, match="no token to predict"):
        evaluate(["", ""])
    with pytest.raises(UserError, match="no token to predict"):
        evaluate([], joined=True)
    result = evaluate(["a fox", ""])
    assert (len(result.items), result.errors) == (1, ("document 2: no token to predict",))
    with pytest.raises(UserError, match="another model's"):
        text_result(uniform(60), TOKENIZER, ["a fox"])
    torch.nn.init.constant_(model.head_weight, math.nan)
    with pytest.raises(UserError, match="not finite"):
        evaluate(["a fox"])
