"""The story world report: a model measured by the generator of the built-in stories, which knows every rule and figure.

Questions about held-out stories, the consistency of the stories that the model writes, its distance from the perfect
loss, and how new its stories are. The unit of every figure is a story: questions about one story share its text, so
their errors are not independent.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch

from slmkit.data.stories import Question, Story, held_out_scene, tell_many
from slmkit.data.stories.reader import CONTRADICTIONS, FAULTS, SENTENCE_END, read_story
from slmkit.data.stories.talk import drawn_questions, pasted, story_request
from slmkit.data.stories.teller import random_stream
from slmkit.evaluation.perplexity import start_tokens, token_losses, window_and_stride
from slmkit.evaluation.questions import ask, write_all
from slmkit.evaluation.results import Item, TaskResult
from slmkit.generation.ensemble import LanguageModel
from slmkit.generation.sampling_settings import SamplingSettings
from slmkit.generation.text import prompt_ids
from slmkit.tokenizer import SLMTokenizer

COUNT = 100  # stories and scenes
QUESTIONS = 4  # about each, of different forms
TEMPERATURES = (1.0, 0.8)
MOST_TOKENS = 512  # of a story that the model writes; the generator's longest have about 350
TRAINING_STORIES = 10_000  # first stories of the training stream with which written ones are compared
RUN = 8  # words in a row from which on a text counts as copied
FRESH = 2_000_003  # added to the seed: stories that no training or validation stream of a nearby seed has
PROBES = 8  # stories that tell a chat model from one that continues text
Progress = Callable[[str, int, int], None]  # what is done, how much of it, of how much


def story_report(
    decoder: LanguageModel,
    tokenizer: SLMTokenizer,
    *,
    count: int = COUNT,
    seed: int = 0,
    chat: bool | None = None,
    progress: Progress = lambda what, done, of: None,
) -> list[TaskResult]:
    """Results `stories/…` on `count` held-out stories of the stream `seed`.

    `chat`: questions and wishes for a story are conversations; else text that goes on, as in the primer. By default
    the form in which the model finds a few held-out stories likelier. Raises `UserError` as `ask` does.
    """
    stories = [*tell_many(seed, count, "heldout")]
    chat = is_chat_model(decoder, tokenizer, stories[:PROBES]) if chat is None else chat
    recipe = {"stories": count, "seed": seed, "form": "conversation" if chat else "text"}
    about = {
        "stories/questions": [(story.text, story.questions) for story in stories],
        "stories/scenes": [(told.text, told.questions) for told, _ in map(held_out_scene, range(count))],
    }
    results = [
        question_result(decoder, tokenizer, name, texts, recipe, lambda *done, name=name: progress(name, *done))
        for name, texts in about.items()
    ]
    written = {"stories/generator": {story.text: () for story in stories}}
