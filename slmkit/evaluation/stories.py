"""The story world report: a model measured by the generator of the built-in stories, which knows its rules exactly.

Questions about held-out stories, consistency and novelty of the stories that the model writes, and its distance from
the perfect loss. An item is a story with all its questions, since questions about one story are not independent.
"""

from __future__ import annotations

import functools
import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from slmkit.data.sources import STORIES, STORY_WORLDS
from slmkit.data.stories import Question, Story, held_out_scene, tell_many
from slmkit.data.stories.sentences import SENTENCE_END
from slmkit.data.stories.talk import drawn_questions, pasted, story_request
from slmkit.data.stories.teller import random_stream
from slmkit.evaluation.perplexity import start_tokens, token_losses, window_and_stride
from slmkit.evaluation.questions import ask, write_all
from slmkit.evaluation.results import Item, TaskResult
from slmkit.evaluation.written_stories import METRICS, TRAINING_STORIES, TrainingStories, story_items
from slmkit.generation.ensemble import LanguageModel
from slmkit.generation.sampling_settings import SamplingSettings
from slmkit.tokenizer import SLMTokenizer

COUNT = 100  # stories and scenes
QUESTIONS = 4  # about each, of different forms
TEMPERATURES = (1.0, 0.8)
MOST_TOKENS = 512  # of a story that the model writes; the generator's longest have about 350
FRESH = 2_000_003  # added to the seed: stories that no training or validation stream of a nearby seed has
NO_ROOM = "no room in the context"
Progress = Callable[[str, int, int], None]  # what is being done, how much is done, of how much


def story_report(
    decoder: LanguageModel,
    tokenizer: SLMTokenizer,
    *,
    count: int = COUNT,
    seed: int = 0,
    chat: bool | None = None,
    progress: Progress = lambda what, done, of: None,
    source: str = STORIES,
) -> list[TaskResult]:
    """Results `stories/…` about the first `count` held-out stories of the stream `seed`.

    `source`: one of `STORY_WORLDS`, which the results are named by.
    `chat`: questions and wishes for a story are conversations, else text that goes on, as in the primer; by default
    as the tokenizer has a chat template. Raises `UserError` for logits that are not finite.
    """
    world = STORY_WORLDS[source]
    held_out = [*tell_many(seed, count, "heldout", world=world)]
    scenes = [held_out_scene(index, world)[0] for index in range(count)]
    chat = tokenizer.chat_template is not None if chat is None else chat
    asked = _Asked(decoder, tokenizer, seed, chat, progress, source)
    return [
        asked.questions("questions", [(story.text, story.questions) for story in held_out]),
        asked.questions("scenes", [(scene.text, scene.questions) for scene in scenes]),
        asked.distance("loss", [*tell_many(seed + FRESH, count, world=world)]),
        asked.distance("loss-heldout", held_out),
        *asked.written(held_out),
    ]


class _Asked:
    """A model, and how it is asked."""

    def __init__(
        self, decoder: LanguageModel, tokenizer: SLMTokenizer, seed: int, chat: bool, progress: Progress,
        source: str = STORIES,
    ) -> None:  # fmt: skip
        self.decoder, self.tokenizer, self.seed, self.chat, self.progress = decoder, tokenizer, seed, chat, progress
        self.source = source
        self.start = start_tokens(tokenizer)  # [tokens]

    def questions(self, name: str, texts: Sequence[tuple[str, Sequence[Question]]]) -> TaskResult:
        """Accuracy in all and by form of question."""
        drawn: list[tuple[int, Question]] = []
        prompts: list[Any] = []
        for number, (text, questions) in enumerate(texts):
            chance = random_stream(name, number)
            for one in drawn_questions(chance, questions, QUESTIONS):
                drawn.append((number, one))
                message = [{"role": "user", "content": pasted(chance, text, one)}]
                prompts.append((message if self.chat else f"{text} {one.question}", one.answer))
        answers = ask(self.decoder, self.tokenizer, prompts, progress=self._shown(name)).answers
        values: dict[int, dict[str, tuple[float, float]]] = {}
        given: dict[int, list[dict[str, Any]]] = {}
        for (number, one), answer in zip(drawn, answers):
            if answer.given is None:
                continue
            its, right = values.setdefault(number, {"accuracy": (0.0, 0.0)}), float(answer.is_right)
            its["accuracy"], its[one.form] = (its["accuracy"][0] + right, its["accuracy"][1] + 1), (right, 1.0)
            told = {"question": one.question, "expected": one.answer, "given": answer.given}
            given.setdefault(number, []).append(told)
        items = [
            Item(str(number), its, {"text": texts[number][0], "asked": given[number]}) for number, its in values.items()
        ]
        errors = [f"{one.question} {NO_ROOM}" for (_, one), answer in zip(drawn, answers) if answer.given is None]
        forms = sorted({form for its in values.values() for form in its} - {"accuracy"})
        recipe = {"questions": f"{QUESTIONS} about each, of different forms", "answers": "greedy, right word for word"}
        return self._result(
            name, dict.fromkeys(["accuracy", *forms], "mean"), items, recipe, [text for text, _ in texts], errors
        )

    def distance(self, name: str, stories: Sequence[Story]) -> TaskResult:
        """Nats of each story beyond those of the generator, which knows the story's exact probability.

        Predicted are the tokens of the story and the end-of-text token after it, behind `start_tokens`. The expected
        value is the Kullback-Leibler divergence of the model from the generator: 0 for a perfect model, never less.
        """
        encoded = self.tokenizer.encode_batch([story.text for story in stories])
        rows = [torch.tensor([*self.start, *map(int, ids), self.tokenizer.eos_token_id]) for ids in encoded]
        window, stride = window_and_stride(self.decoder.max_positions, None, None)
        losses = token_losses(self.decoder, rows, window, stride, progress=self._shown(name))  # [tokens] each
        items = []
        for number, (story, nats) in enumerate(zip(stories, losses)):
            scored = nats[len(self.start) :].tolist()
            total, perfect, tokens = math.fsum(scored), -story.log_probability, float(len(scored))
            values = {
                "nats_per_story": (total - perfect, 1.0), "nats_per_token": (total - perfect, tokens),
                "bits_per_byte": ((total - perfect) / math.log(2), float(len(story.text.encode()))),
                "loss": (total, tokens), "perfect_loss": (perfect, tokens),
            }  # fmt: skip
            items.append(Item(str(number), values, {"story": story.text}))
        recipe = {
            "predicted": f"the story and its end-of-text token, behind {self.tokenizer.decode(self.start)}",
            "split": "heldout" if name.endswith("heldout") else "train, unread", "window": window, "stride": stride,
        }  # fmt: skip
        metrics = dict.fromkeys(items[0].values, "loss")
        return self._result(name, metrics, items, recipe, [story.text for story in stories])

    def written(self, stories: Sequence[Story]) -> list[TaskResult]:
        """Consistency and novelty of the model's stories, one on a wish for hero and thing of each of these (without
        conversations: from its first sentence on); and novelty of these themselves.
        """
        names = {temperature: f"written-{temperature:g}" for temperature in TEMPERATURES}
        texts = {name: self._write(stories, temperature, name) for temperature, name in names.items()}
        told = [story.text for story in stories]
        all_texts = [*told, *(text for ones in texts.values() for text in ones if text is not None)]
        training = TrainingStories(all_texts, self._shown("novelty"), STORY_WORLDS[self.source])
        compared = {"training_stories": f"the first {TRAINING_STORIES:,} of seed 0"}
        begun = "on a wish for a hero and a thing" if self.chat else "from the first sentence of a held-out story on"
        recipe = {"written": f"{begun}, at most {MOST_TOKENS} tokens"} | compared
        results = []
        for temperature, name in names.items():
            items = story_items(texts[name], training, given=0 if self.chat else 1)
            errors = [f"story {number}: {NO_ROOM}" for number, text in enumerate(texts[name]) if text is None]
            results.append(self._result(name, METRICS, items, {"temperature": temperature} | recipe, told, errors))
        metrics = {name: form for name, form in METRICS.items() if not name.startswith("fault")}
        return [*results, self._result("generator", metrics, story_items(told, training, given=0), compared, told)]

    def _write(self, stories: Sequence[Story], temperature: float, name: str) -> list[str | None]:
        """The model's stories, with the sentence that they go on from; None where the context has no room."""
        begun = [SENTENCE_END.split(story.text)[0] for story in stories]
        prompts = [[*self.start, *self.tokenizer.encode(sentence)] for sentence in begun]
        if self.chat:
            wishes = [story_request(random_stream("wish", story.text), story)[:1] for story in stories]
            prompts = [self.tokenizer.encode_chat(wish, add_generation_prompt=True).ids for wish in wishes]
            begun = [""] * len(stories)
        settings = [SamplingSettings(temperature=temperature, seed=self.seed + one) for one in range(len(stories))]
        rooms = [MOST_TOKENS] * len(stories)
        given = write_all(self.decoder, self.tokenizer, prompts, rooms, settings, progress=self._shown(name))
        return [None if text is None else first + text for first, text in zip(begun, given)]

    def _shown(self, what: str) -> Callable[[int, int], None]:
        return functools.partial(self.progress, f"{self.source}/{what}")

    def _result(
        self, name: str, metrics: Mapping[str, str], items: Sequence[Item], recipe: Mapping[str, Any],
        data: Sequence[str], errors: Sequence[str] = (),
    ) -> TaskResult:  # fmt: skip
        digest = hashlib.sha256("\n".join(data).encode()).hexdigest()
        about = {"form": "conversation" if self.chat else "text", "seed": self.seed, "data_sha256": digest}
        return TaskResult(f"{self.source}/{name}", {**about, **recipe}, metrics, tuple(items), tuple(errors))
