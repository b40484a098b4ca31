"""The primer asks about what its scene said, and nothing else; held-out pairs stay out of it."""

from __future__ import annotations

import re

from slmkit.data.stories import primer_texts
from slmkit.data.stories.script import load_library
from slmkit.data.stories.words import held_out_things

TEXTS = list(primer_texts(seed=3, count=600))


def test_a_text_depends_on_seed_and_number_alone() -> None:
    assert list(primer_texts(seed=3, count=20)) == TEXTS[:20]
    assert not set(primer_texts(seed=4, count=600)) & set(TEXTS)


def test_every_name_in_an_answer_was_said_before() -> None:
    for text in TEXTS:
        scene = re.split(r" (?:What|Who|Whom|Where|Was|In which|Which) ", text)[0]
        answers = re.findall(r"\? ([^?]+\.)(?= |$)", text)
        assert answers
        for word in re.findall(r"[A-Z][a-z]+", " ".join(re.sub(r"(?:^|\. )[A-Z]", " ", a) for a in answers)):
            assert word in scene, (word, text)


def test_up_to_seven_questions_are_asked_of_every_scene() -> None:
    asked = [len(re.findall(r"\?", text)) for text in TEXTS]
    assert min(asked) >= 2
    assert max(asked) == 7


def test_more_than_half_of_the_scenes_are_recited_word_for_word() -> None:
    recited = [text.split(" Once more: ") for text in TEXTS if " Once more: " in text]
    assert 0.5 < len(recited) / len(TEXTS) < 0.7
    assert all(second.startswith(first) for first, second in recited)


def test_no_scene_puts_a_held_out_pair_together() -> None:
    book = load_library().book
    kinds = set(book.lists["anyone"])
    lists = [book.lists[name] for name in book.thing_lists]
    held_out = {kind: {thing for things in lists for thing in held_out_things(kind, things)} for kind in kinds}
    any_thing = re.compile(rf"\bthe ({'|'.join(sorted(book.looks, key=len, reverse=True))})\b")  # "to whistle" is none
    for text in TEXTS:
        hero = next(word for word in re.findall(r"[a-z]+", text) if word in kinds)
        assert not held_out[hero] & set(any_thing.findall(text)), text
