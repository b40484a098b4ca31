"""Prompts for samples and suggestions come from the run's own validation data."""

from __future__ import annotations

from pathlib import Path

import pytest

from slmkit.data.prepare.conversations import prepare_chat
from slmkit.data.prepare.corpus import Corpus
from slmkit.data.prepare.text_to_shards import prepare_text
from slmkit.data.sources import Message
from slmkit.data.sources.documents import Pair
from slmkit.tokenizer import SLMTokenizer
from slmkit.training.recipe.recipe import Recipe
from slmkit.workflows.hooks import prompts_of, with_prompts

TEMPLATES = ["chatml", "llama3", "gemma"]


@pytest.fixture(scope="module")
def tokenizer() -> SLMTokenizer:
    tokenizer = SLMTokenizer(vocab_size=400)
    tokenizer.train(["The fox had a red kite. Who had the kite? The fox had it."] * 20)
    return tokenizer


def talk(question: str, system: str | None = None) -> list[Message]:
    head = [{"role": "system", "content": system}] if system else []
    return [*head, {"role": "user", "content": question}, {"role": "assistant", "content": "The fox."}]


@pytest.mark.parametrize(
    ("text", "prompt"),
    [
        ("\n  The fox had a red kite and lost it.\nThen it rained.", "The fox had a red"),
        ("Hi", "Hi"),
        ("猫が海のそばに座って歌った。" * 9, "猫が海のそばに座って歌った。"),
    ],
)
def test_of_text_it_is_how_a_held_out_document_begins(
    tokenizer: SLMTokenizer, tmp_path: Path, text: str, prompt: str
) -> None:
    shards = prepare_text([text], tokenizer, tmp_path / "text")
    (found,) = prompts_of(Corpus(tokenizer, [], shards), "text")
    assert text.strip().startswith(found)
    assert found.startswith(prompt)
    assert len(found) <= 40


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("system", [None, "Be kind."])
def test_of_conversations_it_is_a_short_question(
    tokenizer: SLMTokenizer, tmp_path: Path, template: str, system: str | None
) -> None:
    if template == "gemma" and system:
        pytest.skip("Gemma's template writes the system message into the first question")
    chatting = tokenizer.extended(chat_template=template)
    talks = [talk("A long story. " * 20 + "\nWho?", system), talk("Who had the kite?", system), talk("Why?", system)]
    shards = prepare_chat(talks, chatting, tmp_path / "chat")
    assert prompts_of(Corpus(chatting, [], shards), "conversations") == ["Who had the kite?"]
    assert prompts_of(Corpus(chatting, [], shards), "questions") == ["Who had the kite?"]


@pytest.mark.parametrize("template", TEMPLATES)
def test_it_is_a_first_question_and_the_shortest_of_three_words(
    tokenizer: SLMTokenizer, tmp_path: Path, template: str
) -> None:
    chatting = tokenizer.extended(chat_template=template)
    unlearned = {"role": "assistant", "content": "It flew.", "weight": 0}
    followed = [{"role": "user", "content": "Who had a kite?"}, unlearned, *talk("Go on now")]
    shards = prepare_chat([talk("Where is the red kite?"), followed, talk("Why?")], chatting, tmp_path / "chat")
    assert prompts_of(Corpus(chatting, [], shards), "judgements") == ["Who had a kite?"]


@pytest.mark.parametrize("template", TEMPLATES)
def test_of_pairs_it_is_their_question(tokenizer: SLMTokenizer, tmp_path: Path, template: str) -> None:
    chatting = tokenizer.extended(chat_template=template)
    worse = [*talk("Who had it?")[:1], {"role": "assistant", "content": "The owl."}]
    shards = prepare_chat([Pair(talk("Who had it?"), worse, 1)], chatting, tmp_path / "pairs")
    assert prompts_of(Corpus(chatting, [], shards), "pairs") == ["Who had it?"]


def test_the_recipe_s_own_prompts_are_kept_and_none_is_none(tokenizer: SLMTokenizer, tmp_path: Path) -> None:
    corpus = Corpus(tokenizer, [], prepare_text(["The fox ran."], tokenizer, tmp_path / "text"))
    for own in (["Ann"], []):
        recipe = Recipe.model_validate({"train": {"sample_prompts": own}})
        assert with_prompts(recipe, corpus).train.sample_prompts == own
    assert with_prompts(Recipe(), corpus).train.sample_prompts == ["The fox ran."]
