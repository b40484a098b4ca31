"""Templates as fixed text around messages: equal to Jinja's rendering, or refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from slmkit import SLMTokenizer, UserError
from slmkit.tokenizer.chat_pieces import chat_pieces

from .conftest import GEMMA_TEMPLATE, LLAMA_TEMPLATE
from .test_kinds import TEMPLATES

LOOP = "{% for m in messages %}<|{{ m.role }}|>{{ CONTENT }}<|end|>{% endfor %}<|assistant|>"
# Qwen 3's rule: of earlier answers only what follows the reasoning.
THINKS = LOOP.replace(
    "CONTENT", "m.content.split('</think>')[-1].lstrip('\\n') if '</think>' in m.content else m.content"
)
DEFAULT = "{% if messages[0].role != 'system' %}<|system|>Be kind.<|end|>{% endif %}" + LOOP.replace(
    "CONTENT", "m.content"
)
DATED = "<|system|>Today is {{ strftime_now('%d %B %Y') }}.<|end|>" + LOOP.replace("CONTENT", "m.content")
TALK = [
    {"role": "system", "content": "Be brief. "},
    {"role": "user", "content": " Who are\nyou?"},
    {"role": "assistant", "content": "<think>\nWho?\n</think>\n\nA cat, 猫. "},
    {"role": "user", "content": "Where {{ is }} the <sea>?\n"},
]


def with_template(template: str) -> SLMTokenizer:
    tokenizer = SLMTokenizer(260)
    tokenizer.chat_template = template
    return tokenizer


@pytest.mark.parametrize(
    "template", [*TEMPLATES.values(), LLAMA_TEMPLATE, GEMMA_TEMPLATE, THINKS, DEFAULT, DATED], ids=range(9)
)
def test_the_pieces_give_the_rendering_of_the_template(template: str) -> None:
    tokenizer = with_template(template)
    pieces = chat_pieces(tokenizer)
    for messages in (TALK, TALK[1:], TALK[:2], TALK[1:2]):
        assert pieces.render(messages) == tokenizer.apply_chat_template(messages, True, tokenize=False)


@pytest.mark.parametrize("name", ["chatml", "llama3", "gemma"])
def test_the_built_in_templates_have_pieces(name: str) -> None:
    tokenizer = SLMTokenizer(260).extended(chat_template=name)
    pieces = chat_pieces(tokenizer)
    assert pieces.render(TALK) == tokenizer.apply_chat_template(TALK, True, tokenize=False)
    assert not pieces.dated
    assert not pieces.drops_thinking


def test_what_pieces_say_of_a_template() -> None:
    assert chat_pieces(with_template(THINKS)).drops_thinking
    assert chat_pieces(with_template(DATED)).dated
    assert chat_pieces(with_template(LLAMA_TEMPLATE)).trimmed == {"system", "user", "assistant"}
    assert chat_pieces(with_template(DEFAULT)).between[">user"] == "<|system|>Be kind.<|end|><|user|>"


@pytest.mark.parametrize(
    "refusal",
    [
        "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}",
        "{% if messages[0].role == 'system' %}{% set messages = messages[1:] %}{% endif %}",
    ],
    ids=["refused", "left out"],
)
def test_a_template_without_system_messages_has_no_piece_for_them(refusal: str) -> None:
    pieces = chat_pieces(with_template(refusal + LOOP.replace("CONTENT", "m.content")))
    assert not any("system" in key for key in pieces.between)
    assert ">user" in pieces.between


@pytest.mark.parametrize(
    "content",
    [
        "m.content | upper",  # the text is changed
        "m.content | replace('\\n', ' ')",
        "m.content.lstrip()",
        "(loop.index ~ ': ') + m.content",  # another text before each message
        "m.content + ' ' * (m.content | length % 2)",
        "('Answer in one word. ' if loop.last else '') + m.content",  # another text before the last one
        "m.content + (' (long)' if m.content | length > 1000 else '')",
    ],
)
def test_a_template_that_is_not_fixed_text_around_messages_is_refused_in_one_line(content: str) -> None:
    with pytest.raises(UserError, match="does not write the same text around every message") as error:
        chat_pieces(with_template(LOOP.replace("CONTENT", content)))
    assert "\n" not in str(error.value)


def test_a_tokenizer_without_template_is_refused(gpt2_directory: Path) -> None:
    with pytest.raises(UserError, match="no chat template"):
        chat_pieces(SLMTokenizer.from_pretrained(gpt2_directory))
