"""The story world report: what it asks, counts and compares, on models whose figures are known."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from slmkit.data.rows.datasets import TextDataset
from slmkit.data.stories import Question, held_out_scene, tell, tell_many
from slmkit.data.stories.sentences import SENTENCE_END
from slmkit.data.stream import Stream
from slmkit.evaluation import ask, stories, written_stories
from slmkit.evaluation.results import TaskResult
from slmkit.evaluation.stories import story_report
from slmkit.evaluation.written_stories import METRICS, TrainingStories, grams, story_items
from slmkit.generation.generator import generate_ids
from slmkit.generation.sampling_settings import SamplingSettings
from slmkit.generation.text import end_tokens, prompt_ids
from slmkit.model.config import SLMConfig
from slmkit.model.decoder import Decoder
from slmkit.model.initialization import build_decoder
from slmkit.tokenizer import SLMTokenizer
from slmkit.training.loop import train
from slmkit.training.objective import next_token
from slmkit.training.optimizers.choose import adamw
from tests.evaluation.known_models import uniform
from tests.training.helpers import plan, settings, state

TRAINING = 150  # stories


@pytest.fixture(scope="module")
def tokenizer() -> SLMTokenizer:
    tokenizer = SLMTokenizer(500)
    tokenizer.train([story.text for story in tell_many(1, 200)])
    return tokenizer


def model(context: int = 512) -> Decoder:
    torch.manual_seed(0)
    return build_decoder(
        SLMConfig(vocab_size=500, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
                  max_position_embeddings=context, initializer_range=0.1)
    ).eval()  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def short_training():
    """Fewer training stories than usual, and shorter stories."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(written_stories, "TRAINING_STORIES", TRAINING)
        patch.setattr(stories, "MOST_TOKENS", 60)
        yield


@pytest.fixture(scope="module")
def report(tokenizer: SLMTokenizer) -> dict[str, TaskResult]:
    return by_name(story_report(model(), tokenizer, count=4, seed=3, chat=False))


def by_name(results: list[TaskResult]) -> dict[str, TaskResult]:
    return {result.task.removeprefix("stories/"): result for result in results}


# -- distance from the perfect loss -----------------------------------------------------------------------------------


@pytest.mark.parametrize("context", [64, 1024], ids=["windows", "whole stories"])
def test_the_distance_of_a_uniform_model_is_its_closed_form(tokenizer: SLMTokenizer, context: int) -> None:
    asked = stories._Asked(uniform(500, context), tokenizer, 0, False, lambda *done: None)
    told = [*tell_many(9, 20, "heldout")]
    result = asked.distance("loss-heldout", told)
    tokens = [len(tokenizer.encode(story.text)) + 1 for story in told]  # and the end-of-text token
    beyond = [n * math.log(500) + story.log_probability for n, story in zip(tokens, told)]
    size = sum(len(story.text.encode()) for story in told)
    assert result.score("nats_per_story").value == pytest.approx(sum(beyond) / 20, rel=1e-9)
    assert result.score("nats_per_token").value == pytest.approx(sum(beyond) / sum(tokens), rel=1e-9)
    assert result.score("bits_per_byte").value == pytest.approx(sum(beyond) / math.log(2) / size, rel=1e-9)
    assert result.score("loss").value == pytest.approx(math.log(500), rel=1e-9)
    assert result.score("perfect_loss").value == pytest.approx(math.log(500) - sum(beyond) / sum(tokens), rel=1e-9)
    spread = math.sqrt(sum((one - sum(beyond) / 20) ** 2 for one in beyond) / 19 / 20)
    assert result.score("nats_per_story").standard_error == pytest.approx(spread, rel=1e-9)


@torch.inference_mode()
def test_a_generator_that_knows_what_the_model_knows_is_at_distance_0(tokenizer: SLMTokenizer) -> None:
    """Stories that are said to be as likely as the model finds them, one by one, token by token."""
    decoder, told = model(1024), []
    for story in tell_many(9, 5):
        ids = [tokenizer.eos_token_id, *tokenizer.encode(story.text), tokenizer.eos_token_id]
        logits = decoder.logits(decoder(torch.tensor([ids])))[0].double()
        nats = [-logits[at - 1].log_softmax(0)[ids[at]].item() for at in range(1, len(ids))]
        told.append(replace(story, log_probability=-sum(nats)))
    result = stories._Asked(decoder, tokenizer, 0, False, lambda *done: None).distance("loss", told)
    assert result.score("nats_per_story").value == pytest.approx(0, abs=1e-2)  # of about 1,500
    assert result.score("loss").value == pytest.approx(result.score("perfect_loss").value, rel=1e-5)


def test_no_model_is_better_than_the_generator(report: dict[str, TaskResult]) -> None:
    for name in ("loss", "loss-heldout"):
        found = report[name].score("nats_per_story")
        assert found.standard_error is not None
        assert found.value > 3 * found.standard_error
    train, heldout = ({item.text["story"] for item in report[name].items} for name in ("loss", "loss-heldout"))
    assert heldout == {story.text for story in tell_many(3, 4, "heldout")}
    assert train.isdisjoint(story.text for story in tell_many(3, 50))


# -- questions --------------------------------------------------------------------------------------------------------


def test_questions_of_different_forms_are_asked_of_each_story(report: dict[str, TaskResult]) -> None:
    for name, told in (
        ("questions", [tell(3, index, "heldout") for index in range(4)]),
        ("scenes", [held_out_scene(index)[0] for index in range(4)]),
    ):
        for item, story in zip(report[name].items, told):
            known = {question.question: (question.answer, question.form) for question in story.questions}
            asked = item.text["asked"]
            forms = [known[one["question"]][1] for one in asked]
            assert item.text["text"] == story.text
            assert [known[one["question"]][0] for one in asked] == [one["expected"] for one in asked]
            assert len({*forms}) == len(forms) >= 2
            assert item.values.keys() == {"accuracy", *forms}
            right = [float(one["given"].strip() == one["expected"]) for one in asked]
            assert item.values["accuracy"] == (sum(right), len(asked))


@pytest.fixture(scope="module")
def parrot(tokenizer: SLMTokenizer) -> tuple[Decoder, list[tuple[str, tuple[Question, ...]]], str]:
    """A model that has learned questions about two scenes by heart, the scenes, and the answer that it has wrong."""
    told = [(scene.text, scene.questions) for scene in (held_out_scene(index)[0] for index in range(2))]
    wrong = told[1][1][0].answer
    said = [(f"{text} {one.question}", one.answer) for text, questions in told for one in questions]
    texts = [f"{asked} {'No.' if answer == wrong else answer} And what else?" for asked, answer in said]
    learner = state()
    learner.model = model()
    learner.optimizers = adamw(learner.model, settings())
    train(learner, next_token, Stream(TextDataset(texts, tokenizer, max_length=200), len(texts)), plan(50))
    return learner.model, told, wrong


def test_right_answers_are_right_and_the_wrong_one_wrong(parrot, tokenizer: SLMTokenizer) -> None:
    decoder, told, wrong = parrot
    result = stories._Asked(decoder, tokenizer, 0, False, lambda *done: None).questions("scenes", told)
    asked = [one for item in result.items for one in item.text["asked"]]
    is_wrong = [one["expected"] == wrong for one in asked]
    assert sum(is_wrong) == 1, "it is among the questions that are drawn"
    assert [one["given"].strip() for one in asked] == [
        "No." if wrong else one["expected"] for wrong, one in zip(is_wrong, asked)
    ]
    assert result.score("accuracy").value == pytest.approx(1 - 1 / len(asked))
    assert next(iter(result.metrics)) == "accuracy"
    forms = [result.score(form) for form in [*result.metrics][1:]]
    assert sum(form.n for form in forms) == len(asked)
    assert sum(form.value * form.n for form in forms) == pytest.approx(len(asked) - 1)


def test_an_answer_is_the_first_sentence_that_the_model_writes_alone(parrot, tokenizer: SLMTokenizer) -> None:
    decoder, ((text, (one, *_)), *_), _ = parrot
    ids = torch.tensor([prompt_ids(tokenizer, f"{text} {one.question}")])
    more = generate_ids(
        decoder, ids, max_new_tokens=40, stop_ids=end_tokens(tokenizer), pad_token_id=1,
        settings=SamplingSettings(do_sample=False),
    )  # fmt: skip
    assert tokenizer.decode(more[0, ids.size(1) :], skip_special_tokens=True).startswith(f" {one.answer} And")
    (answer,) = ask(decoder, tokenizer, [(f"{text} {one.question}", one.answer)]).answers
    assert answer.given == f" {one.answer}"


def test_questions_without_room_are_errors_and_not_wrong(tokenizer: SLMTokenizer) -> None:
    results = by_name(story_report(model(48), tokenizer, count=3, chat=False))
    assert not results["questions"].items
    assert len(results["questions"].errors) == 12
    assert math.isnan(results["questions"].score("accuracy").value)


def test_a_chat_model_is_asked_in_conversations(tokenizer: SLMTokenizer) -> None:
    talks = story_report(model(), tokenizer, count=2, seed=3, chat=True)
    assert {result.recipe["form"] for result in talks} == {"conversation"}
    written = by_name(talks)["written-1"].items[0].text["story"]
    first = SENTENCE_END.split(tell(3, 0, "heldout").text)[0]
    assert not written.startswith(first)


# -- stories that the model writes ------------------------------------------------------------------------------------


def test_written_stories_go_on_from_the_first_sentence_and_depend_on_seed_and_temperature(
    report: dict[str, TaskResult], tokenizer: SLMTokenizer
) -> None:
    def told(results: dict[str, TaskResult], name: str) -> list[str]:
        return [item.text["story"] for item in results[name].items]

    for index, text in enumerate(told(report, "written-1")):
        assert text.startswith(SENTENCE_END.split(tell(3, index, "heldout").text)[0])
    fewer = by_name(story_report(model(), tokenizer, count=2, seed=3, chat=False))
    assert told(fewer, "written-1") == told(report, "written-1")[:2], "a text does not depend on the other texts"
    assert told(report, "written-1") != told(report, "written-0.8")
    assert report["written-0.8"].recipe["temperature"] == 0.8
    assert report["written-1"].metrics == METRICS


def test_the_generators_stories_are_read_beside_them(report: dict[str, TaskResult]) -> None:
    for metric in ("consistent", "no_contradiction", "possible_sentences"):
        assert report["generator"].score(metric).value == 1
    assert report["written-1"].score("consistent").value == 0
    assert report["written-1"].score("fault_end").value == 1


# -- consistency and novelty of a text --------------------------------------------------------------------------------


def figures(*texts: str, given: int = 0) -> list[dict[str, float]]:
    items = story_items(texts, TrainingStories(texts, lambda *done: None), given)
    return [{name: a / b if b else math.nan for name, (a, b) in item.values.items()} for item in items]


def test_a_training_story_is_a_copy() -> None:
    story, unread = tell(0, TRAINING - 1).text, tell(0, TRAINING).text
    copy, new, again = figures(story, unread, story)
    assert (copy["verbatim"], copy["longest_copy"], copy["novel_8grams"]) == (1, len(story.split()), 0)
    assert new["verbatim"] == 0
    assert new["longest_copy"] < len(unread.split())
    assert (copy["distinct_2"] > 0.9, again["distinct_2"], again["distinct_4"]) == (True, 0, 0)


def test_the_longest_copy_is_that_of_a_search_through_all_training_stories() -> None:
    read = [story.text.split() for story in tell_many(0, TRAINING)]
    texts = [tell(77, index).text for index in range(3)] + [" ".join([*read[0][-9:], *read[1][:9]])]
    for text, found in zip(texts, figures(*texts)):
        runs = {gram for story in read for gram in zip(*(story[start:] for start in range(8)))}
        longest, n = 0, 8
        while runs & {*grams(text, n)}:
            longest, n = n, n + 1
            runs = {gram for story in read for gram in zip(*(story[start:] for start in range(n)))}
        assert found["longest_copy"] == longest
    assert longest == 9, "no run goes on from one story to the next"


def test_sentences_that_were_given_do_not_count() -> None:
    first, *others = SENTENCE_END.split(tell(5, 0).text)
    text = " ".join([first, "Then it spreadsheet.", others[0]])
    assert figures(text)[0]["possible_sentences"] == pytest.approx(2 / 3)
    assert figures(text, given=1)[0]["possible_sentences"] == pytest.approx(1 / 2)
    assert math.isnan(figures(first, given=1)[0]["possible_sentences"]), "the model wrote no sentence"


def test_each_fault_is_quoted_where_it_first_shows() -> None:
    text = f"{tell(5, 0).text} What. What next."
    (item,) = story_items([None, text][1:], TrainingStories([text], lambda *done: None), 0)
    assert item.text["faults"] == {"sentence": "What.", "end": "What next."}
    assert item.values["fault_sentence"] == (1, 1)
    assert item.values["no_contradiction"] == (1, 1)
    assert item.values["consistent"] == (0, 1)
