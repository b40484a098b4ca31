"""A prompt that a run's model can be expected to know: from the data that is held out of its training."""

from __future__ import annotations

import itertools

from slmkit.data.corpus import Corpus
from slmkit.data.data_settings import Reads
from slmkit.training.recipe import Recipe

WORDS, CHARACTERS = 5, 40  # of a text's beginning
LONGEST_QUESTION = 100  # characters
QUESTION_WORDS = 3
LOOKED_AT = 50  # documents
MARK = "QUESTION"


def with_prompts(recipe: Recipe, corpus: Corpus) -> Recipe:
    """The recipe with a prompt for its samples, unless it has some, or says that it wants none."""
    if recipe.train.sample_prompts is not None:
        return recipe
    train = recipe.train.model_copy(update={"sample_prompts": prompts_of(corpus, recipe.reads)})
    return recipe.model_copy(update={"train": train})


def prompts_of(corpus: Corpus, reads: Reads) -> list[str]:
    """One prompt: how a held-out text begins, or the shortest first question of the held-out conversations that has
    `QUESTION_WORDS` or more; where none has, the shortest.

    Empty where none of the first documents has a short one.
    """
    shards, tokenizer = corpus.validation, corpus.tokenizer
    ends = shards.document_ends[:LOOKED_AT].tolist()
    around = None if reads == "text" else _around_a_question(corpus)
    questions = []
    for start, end in zip([0, *ends], ends):
        if around is None:
            head = shards.tokens_in(start, min(end, start + 64))
            if prompt := _beginning(tokenizer.decode(head, skip_special_tokens=True)):
                return [prompt]
        else:
            learned = shards.trained_in(start, end)
            asked = shards.tokens_in(start, start + int(learned.argmax()))
            questions.append(_question(tokenizer.decode(asked), *around))
    return sorted(filter(None, questions), key=lambda asked: (len(asked.split()) < QUESTION_WORDS, len(asked)))[:1]


def _beginning(text: str) -> str:
    """The first words of the first line."""
    lines = [line for line in text.splitlines() if line.strip()]
    return " ".join(lines[0].split()[:WORDS])[:CHARACTERS].rstrip("\ufffd ") if lines else ""


def _around_a_question(corpus: Corpus) -> tuple[str, str]:
    """What the chat template writes before and behind a user's last message."""
    tokenizer, user = corpus.tokenizer, {"role": "user", "content": MARK}
    first, later = (
        tokenizer.decode(tokenizer.encode_chat(messages, add_generation_prompt=True).ids).split(MARK)
        for messages in ([user], [user, {"role": "assistant", "content": MARK}, user])
    )
    same = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(reversed(first[0]), reversed(later[-2])))
    return "".join(letter for letter, _ in same)[::-1], first[-1]


def _question(text: str, before: str, behind: str) -> str:
    """The first message in a rendered conversation; empty where there is none, or a long one."""
    if not (before and behind):
        return ""
    _, found, rest = text.partition(before)
    question = rest.partition(behind)[0]
    return question.strip() if found and len(question) <= LONGEST_QUESTION and "\n" not in question else ""
