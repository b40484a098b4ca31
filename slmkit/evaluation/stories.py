"""The story world report: a model measured by the generator of the built-in stories, which knows its rules exactly.

Questions about held-out stories, consistency and novelty of the stories that the model writes, and its distance from
the perfect loss. The unit of every figure is a story, since questions about one story are not independent.
"""

from __future__ import annotations

import hashlib
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch

from slmkit.data.stories import Question, Story, held_out_scene, tell_many
from slmkit.data.stories.reader import CONTRADICTIONS, FAULTS, read_story
from slmkit.data.stories.sentences import SENTENCE_END
from slmkit.data.stories.talk import Message, drawn_questions, pasted, story_request
from slmkit.data.stories.teller import random_stream
from slmkit.evaluation.perplexity import start_tokens, token_losses, window_and_stride
from slmkit.evaluation.questions import ask, write_all
from slmkit.evaluation.results import Item, TaskResult
from slmkit.generation.ensemble import LanguageModel
from slmkit.generation.sampling_settings import SamplingSettings
from slmkit.tokenizer import SLMTokenizer

COUNT = 100  # stories and scenes
QUESTIONS = 4  # about each, of different forms
TEMPERATURES = (1.0, 0.8)
MOST_TOKENS = 512  # of a story that the model writes; the generator's longest have about 350
TRAINING_STORIES = 10_000  # the first of the training stream, with which written stories are compared
COPIED = 8  # words in a row from which on they count as copied
FRESH = 2_000_003  # added to the seed: stories that no training or validation stream of a nearby seed has
PROBES = 8  # stories by which a chat model is told from one that continues text
FORMS = {"longest_copy": "loss", "verbatim": "loss"} | {f"fault_{kind}": "loss" for kind in FAULTS}  # others: "mean"
Progress = Callable[[str, float | None], None]  # what is being done, the share of it that is done
Gram = tuple[str, ...]


def story_report(
    decoder: LanguageModel,
    tokenizer: SLMTokenizer,
    *,
    count: int = COUNT,
    seed: int = 0,
    chat: bool | None = None,
    progress: Progress = lambda what, share: None,
) -> list[TaskResult]:
    """Results `stories/…` about the first `count` held-out stories of the stream `seed`.

    `chat`: questions and wishes for a story are conversations, else text that goes on; default: what the model knows
    (see `StoryEvaluation.is_chat_model`). Raises `UserError` for logits that are not finite.
    """
    stories = [*tell_many(seed, count, "heldout")]
    scenes = [held_out_scene(index)[0] for index in range(count)]
    evaluation = StoryEvaluation(decoder, tokenizer, seed, progress)
    evaluation.chat = evaluation.is_chat_model(stories[:PROBES]) if chat is None else chat
    results = [
        evaluation.questions("questions", [(story.text, story.questions) for story in stories]),
        evaluation.questions("scenes", [(scene.text, scene.questions) for scene in scenes]),
        evaluation.distance("loss", [*tell_many(seed + FRESH, count)]),
        evaluation.distance("loss-heldout", stories),
    ]
    written = {f"written-{at:g}": evaluation.write(stories, at) for at in TEMPERATURES}
    return results + evaluation.read(written | {"generator": [story.text for story in stories]})


class StoryEvaluation:
    """A model, how it is asked, and who is told how far it is."""

    chat = False

    def __init__(self, decoder: LanguageModel, tokenizer: SLMTokenizer, seed: int, progress: Progress) -> None:
        self.decoder, self.tokenizer, self.seed, self.progress = decoder, tokenizer, seed, progress
        self.start = start_tokens(tokenizer)
        self.window = window_and_stride(decoder.max_positions, None, None)

    def is_chat_model(self, stories: Sequence[Story]) -> bool:
        """Whether stories are likelier as answers to a wish for them than as documents.

        A chat template does not tell: a tokenizer may have it before any conversation was learned.
        """
        if self.tokenizer.chat_template is None:
            return False
        talks = [self.tokenizer.encode_chat(story_request(random_stream(story.text), story)) for story in stories]
        losses = token_losses(self.decoder, [torch.tensor(talk.ids) for talk in talks], *self.window)
        answers = sum(float(nats[torch.tensor(talk.trained)].sum()) for nats, talk in zip(losses, talks))
        return answers < sum(float(nats.sum()) for nats in self._losses(stories))

    def questions(self, name: str, texts: Sequence[tuple[str, Sequence[Question]]]) -> TaskResult:
        """Accuracy in all and by form of question. An item is a text with its questions, each of another form."""
        drawn = [
            (number, text, question)
            for number, (text, questions) in enumerate(texts)
            for question in drawn_questions(random_stream(name, number), questions, QUESTIONS)
        ]
        asked = [(self._asked(text, question, number), question.answer) for number, text, question in drawn]
        answers = ask(self.decoder, self.tokenizer, asked, progress=self._shown(name)).answers
        items, errors = [], []
        for number, group in itertools.groupby(zip(drawn, answers), key=lambda one: one[0][0]):
            given = [(question, answer) for (_, _, question), answer in group if answer.given is not None]
            if not given:
                errors.append(f"text {number}: no room in the context")
                continue
            right = {question.form: (float(answer.is_right), 1.0) for question, answer in given}
            all_ = {"accuracy": (sum(one for one, _ in right.values()), float(len(given)))}
            told = [{"question": one.question, "expected": one.answer, "given": answer.given} for one, answer in given]
            items.append(Item(str(number), all_ | right, {"text": texts[number][0], "asked": told}))
        recipe = {"questions": f"{QUESTIONS} about each, of different forms", "answers": "greedy, right word for word"}
        return self._result(name, items, recipe, (text for text, _ in texts), tuple(errors))

    def _asked(self, text: str, question: Question, number: int) -> list[Message] | str:
        """A question about a text: in a conversation, or behind the text, as in the primer."""
        if not self.chat:
            return f"{text} {question.question}"
        return [{"role": "user", "content": pasted(random_stream("pasted", number), text, question)}]

    def distance(self, name: str, stories: Sequence[Story]) -> TaskResult:
        """Nats of each story beyond those of the generator, which knows the story's exact probability.

        Predicted are the tokens of the story and the end-of-text token after it, behind `start_tokens`. The expected
        value is the Kullback-Leibler divergence of the model from the generator: 0 for a perfect model, never less.
        """
        items = []
        for number, (story, nats) in enumerate(zip(stories, self._losses(stories, self._shown(name)))):
            total, tokens, size = math.fsum(nats.tolist()), float(len(nats)), float(len(story.text.encode()))
            beyond = total + story.log_probability
            values = {
                "nats_per_story": (beyond, 1.0), "nats_per_token": (beyond, tokens),
                "bits_per_byte": (beyond / math.log(2), size), "loss": (total, tokens),
                "perfect_loss": (-story.log_probability, tokens),
            }  # fmt: skip
            items.append(Item(str(number), values, {"story": story.text}))
        behind = self.tokenizer.decode(self.start)
        recipe = {"predicted": f"the story and its end-of-text token, behind {behind}", "window": self.window[0]}
        return self._result(name, items, recipe, (story.text for story in stories), form="loss")

    def _losses(
        self, stories: Sequence[Story], shown: Callable[[int, int], None] = lambda done, of: None
    ) -> list[torch.Tensor]:
        """Loss of each predicted token in nats, float64 [tokens] of each story."""
        encoded = self.tokenizer.encode_batch([story.text for story in stories])
        rows = [torch.tensor([*self.start, *map(int, ids), self.tokenizer.eos_token_id]) for ids in encoded]
        return [nats[len(self.start) :] for nats in token_losses(self.decoder, rows, *self.window, progress=shown)]

    def write(self, stories: Sequence[Story], temperature: float) -> list[str | None]:
        """A story of the model's for each of these: on a wish for its hero and thing, else from its first sentence on.

        None where the context has no room.
        """
        begun, prompts = [], []
        for story in stories:
            wish = story_request(random_stream(story.text), story)[:1]
            begun.append("" if self.chat else SENTENCE_END.split(story.text)[0])
            prompts.append(
                self.tokenizer.encode_chat(wish, add_generation_prompt=True).ids
                if self.chat
                else [*self.start, *self.tokenizer.encode(begun[-1])]
            )
        settings = [SamplingSettings(temperature=temperature, seed=self.seed + one) for one in range(len(stories))]
        shown = self._shown(f"written-{temperature:g}")
        given = write_all(self.decoder, self.tokenizer, prompts, [MOST_TOKENS] * len(stories), settings, progress=shown)
        return [None if text is None else first + text for first, text in zip(begun, given)]

    def read(self, written: Mapping[str, Sequence[str | None]]) -> list[TaskResult]:
        """Consistency and novelty of stories, a result for each who wrote some."""
        texts = [text for stories in written.values() for text in stories if text is not None]
        training, where = _found_in_training(texts, self._shown("novelty"))
        results = []
        for name, stories in written.items():
            items, known = [], {2: set[Gram](), 4: set[Gram]()}
            for number, text in enumerate(stories):
                if text is None:
                    continue
                reading, runs = read_story(text), copied_runs(text, where)
                given = 0 if self.chat or name == "generator" else 1  # the first sentence is not the model's
                faults = {fault.kind: fault.sentence for fault in reversed(reading.faults)}  # the first of each kind
                values = {
                    "consistent": (float(not faults), 1.0),
                    "no_contradiction": (float(faults.keys().isdisjoint(CONTRADICTIONS)), 1.0),
                    "possible_sentences": (max(0.0, reading.possible - given), float(reading.sentences - given)),
                    **{f"fault_{kind}": (float(kind in faults), 1.0) for kind in FAULTS},
                    "verbatim": (float(text.strip() in training), 1.0),
                    "longest_copy": (float(max(runs, default=0)), 1.0),
                    f"novel_{COPIED}grams": (float(runs.count(0)), float(len(runs))),
                }
                for n, seen in known.items():
                    told = [*grams(text, n)]
                    values[f"distinct_{n}"] = float(len({*told} - seen)), float(len(told))
                    seen.update(told)
                items.append(Item(str(number), values, {"story": text, "plot": reading.plot, "faults": faults}))
            recipe = {
                "temperature": name.partition("-")[2],
                "training_stories": f"first {TRAINING_STORIES:,} of seed 0",
            }
            lost = tuple(f"story {number}: no room in the context" for number, one in enumerate(stories) if one is None)
            results.append(self._result(name, items, recipe, (), lost))
        return results

    def _shown(self, what: str) -> Callable[[int, int], None]:
        return lambda done, of: self.progress(f"stories/{what}: {done:,} of {of:,}", done / max(1, of))

    def _result(
        self, name: str, items: Sequence[Item], recipe: Mapping[str, Any], texts: Iterable[str],
        errors: tuple[str, ...] = (), form: str = "mean",
    ) -> TaskResult:  # fmt: skip
        digest = hashlib.sha256("\n".join(texts).encode()).hexdigest()
        about = {"form": "conversation" if self.chat else "text", "seed": self.seed, "data_sha256": digest}
        metrics = dict.fromkeys(metric for item in items for metric in item.values)
        forms = {metric: FORMS.get(metric, form) for metric in metrics}
        return TaskResult(f"stories/{name}", {**about, **recipe}, forms, tuple(items), errors)


def grams(text: str, n: int) -> Iterator[Gram]:
    """All runs of n words of a text."""
    words = text.split()
    return zip(*(words[start:] for start in range(n)))


def _found_in_training(
    texts: Sequence[str], progress: Callable[[int, int], None]
) -> tuple[set[str], dict[Gram, list[int]]]:
    """The training stories, and where in all of them, one after the other, runs of `COPIED` words of `texts` stand."""
    wanted = {gram for text in texts for gram in grams(text, COPIED)}
    training, where, places = set[str](), dict[Gram, list[int]](), itertools.count()
    for done, story in enumerate(tell_many(0, TRAINING_STORIES), start=1):
        training.add(story.text)
        for place, gram in zip(places, grams(story.text, COPIED)):  # one place is left out behind each story
            if gram in wanted:
                where.setdefault(gram, []).append(place)
        if not done % 500:
            progress(done, TRAINING_STORIES)
    return training, where


def copied_runs(text: str, where: Mapping[Gram, Sequence[int]]) -> list[int]:
    """Words of the longest copied run that each run of `COPIED` words ends; 0 if that is nowhere in the training."""
    runs: list[int] = []
    lengths: dict[int, int] = {}
    for gram in grams(text, COPIED):
        lengths = {place: lengths.get(place - 1, COPIED - 1) + 1 for place in where.get(gram, ())}
        runs.append(max(lengths.values(), default=0))
    return runs
