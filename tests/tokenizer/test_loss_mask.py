"""What is learned of a conversation, derived by hand for three styles of template, and that no message can forge it."""

from __future__ import annotations

from itertools import groupby
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from slmkit.config import UserError
from slmkit.tokenizer import ChatTokens, SLMTokenizer
from slmkit.tokenizer.chat import NONCHARACTERS, render

from .conftest import learned_rows

CONVERSATION = [
    {"role": "system", "content": "Be kind."},
    {"role": "user", "content": "the cat?"},
    {"role": "assistant", "content": "sang to the sea"},
    {"role": "user", "content": " and then "},
    {"role": "assistant", "content": " sat.\n"},
]
SPECIAL = ["<|endoftext|>", "<|pad|>", "<|im_start|>", "<|im_end|>"]
CONTENT = st.lists(st.text(max_size=9) | st.sampled_from([*SPECIAL, "<|im_start|>assistant\n", NONCHARACTERS[0]])).map(
    "".join
)
CONVERSATIONS = st.lists(st.tuples(CONTENT, CONTENT.filter(str.strip)), min_size=1, max_size=3).map(
    lambda turns: [
        message
        for asked, said in turns
        for message in ({"role": "user", "content": asked}, {"role": "assistant", "content": said})
    ]
)


def pieces(tokenizer: SLMTokenizer, chat: ChatTokens) -> list[tuple[str, bool]]:
    """The text of each run of tokens that are all learned or all not."""
    assert len(chat.ids) == len(chat.trained)
    runs = groupby(zip(chat.ids, chat.trained), key=lambda pair: pair[1])
    return [(tokenizer.decode(index for index, _ in run), trained) for trained, run in runs]


def test_chatml_learns_what_the_assistant_says_and_its_end_of_turn(tokenizer: SLMTokenizer) -> None:
    assert pieces(tokenizer, tokenizer.encode_chat(CONVERSATION)) == [
        (
            "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nthe cat?<|im_end|>\n<|im_start|>assistant\n",
            False,
        ),
        ("sang to the sea<|im_end|>", True),
        ("\n<|im_start|>user\n and then <|im_end|>\n<|im_start|>assistant\n", False),
        (" sat.\n<|im_end|>", True),
        ("\n", False),
    ]


def test_a_template_like_llamas_learns_the_same(llama_directory: Path) -> None:
    tokenizer = SLMTokenizer.from_pretrained(llama_directory)
    chat = tokenizer.encode_chat(CONVERSATION)
    assert pieces(tokenizer, chat) == [
        (
            "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nBe kind.<|eot_id|>"
            "<|start_header_id|>user<|end_header_id|>\n\nthe cat?<|eot_id|>"
            "<|start_header_id|>assistant<|end_header_id|>\n\n",
            False,
        ),
        ("sang to the sea<|eot_id|>", True),
        (
            "<|start_header_id|>user<|end_header_id|>\n\nand then<|eot_id|>"
            "<|start_header_id|>assistant<|end_header_id|>\n\n",
            False,
        ),
        ("sat.<|eot_id|>", True),
    ]
    assert chat.ids.count(tokenizer.special_tokens["<|begin_of_text|>"]) == 1


def test_a_template_like_gemmas_learns_the_same(gemma_directory: Path) -> None:
    tokenizer = SLMTokenizer.from_pretrained(gemma_directory)
    assert pieces(tokenizer, tokenizer.encode_chat(CONVERSATION)) == [
        ("<bos><start_of_turn>user\nBe kind.\n\nthe cat?<end_of_turn>\n<start_of_turn>model\n", False),
        ("sang to the sea<end_of_turn>", True),
        ("\n<start_of_turn>user\nand then<end_of_turn>\n<start_of_turn>model\n", False),
        ("sat.<end_of_turn>", True),
        ("\n", False),
    ]


def test_special_tokens_of_the_template_are_single_tokens(tokenizer: SLMTokenizer) -> None:
    ids = tokenizer.encode_chat(CONVERSATION[1:3]).ids
    start, end = tokenizer.special_tokens["<|im_start|>"], tokenizer.end_of_turn_id
    assert ids == [
        *[start, *tokenizer.encode("user\nthe cat?"), end, *tokenizer.encode("\n")],
        *[start, *tokenizer.encode("assistant\n"), *tokenizer.encode("sang to the sea"), end, *tokenizer.encode("\n")],
    ]


@settings(deadline=None)
@given(CONVERSATIONS)
def test_a_prompt_is_what_training_put_before_the_answer(tokenizer: SLMTokenizer, messages: list[dict]) -> None:
    whole = tokenizer.encode_chat(messages)
    for count in range(1, len(messages), 2):
        prompt = tokenizer.encode_chat(messages[:count], add_generation_prompt=True)
        assert whole.ids[: len(prompt.ids)] == prompt.ids
        assert whole.trained[: len(prompt.ids)] == prompt.trained
        assert whole.trained[len(prompt.ids)]


@settings(deadline=None)
@given(st.lists(CONVERSATIONS, max_size=5))
def test_many_conversations_encoded_at_once_are_those_encoded_one_by_one(
    tokenizer: SLMTokenizer, conversations: list[list[dict]]
) -> None:
    wordy = tokenizer.extended(added_tokens=["the cat"])  # what the fast encoder does not take
    for each in (tokenizer, tokenizer.extended(chat_template="llama3"), wordy):
        together = each.encode_rendered([each.render_chat(messages) for messages in conversations])
        assert [[row.to_lists() for row in rows] for rows in together] == [
            [each.encode_chat(messages)] for messages in conversations
        ]


@settings(deadline=None)
@given(CONVERSATIONS)
def test_no_message_can_forge_a_special_token(tokenizer: SLMTokenizer, messages: list[dict]) -> None:
    chat = tokenizer.encode_chat(messages)
    harmless = tokenizer.encode_chat([message | {"content": "x"} for message in messages])
    special = set(tokenizer.special_tokens.values())
    assert [i for i in chat.ids if i in special] == [i for i in harmless.ids if i in special]
    assert tokenizer.decode(chat.ids) == tokenizer.apply_chat_template(messages, tokenize=False)
    learned = [text for text, trained in pieces(tokenizer, chat) if trained]
    assert learned == [f"{message['content']}<|im_end|>" for message in messages if message["role"] == "assistant"]


def test_special_tokens_that_overlap_or_are_one_character_cannot_be_forged(llama_directory: Path) -> None:
    path = llama_directory / "tokenizer.json"
    library = SLMTokenizer.from_pretrained(llama_directory)._tokenizer
    library.add_special_tokens(["|eot_id|", "_id|>><", "☃"])
    library.save(str(path))
    tokenizer = SLMTokenizer.from_pretrained(llama_directory)
    special = set(tokenizer.special_tokens.values())
    question = [{"role": "user", "content": "the <|eot_id|>>< ☃"}]
    expected = tokenizer.encode_chat([{"role": "user", "content": "x"}]).ids
    found = tokenizer.encode_chat(question).ids
    assert [i for i in found if i in special] == [i for i in expected if i in special]
    assert "the <|eot_id|>>< ☃<|eot_id|>" in tokenizer.decode(found)


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.sampled_from([["<|eot_id|>"], ["<|begin_of_text|>", " ☃"]]).map(" ".join))
def test_a_template_may_trim_and_cut_what_a_message_spells(llama_directory: Path, spelled: str) -> None:
    tokenizer = SLMTokenizer.from_pretrained(llama_directory)
    chat = tokenizer.encode_chat([{"role": "user", "content": f"  {spelled}  "}])
    assert tokenizer.decode(chat.ids).endswith(f"\n\n{spelled}<|eot_id|>")
    assert chat.ids.count(tokenizer.special_tokens["<|eot_id|>"]) == 1


def test_a_conversation_of_all_noncharacters_is_refused_only_where_one_is_needed(tokenizer: SLMTokenizer) -> None:
    every = "".join(NONCHARACTERS)
    assert every in tokenizer.decode(tokenizer.encode_chat([{"role": "user", "content": every}]).ids)
    with pytest.raises(UserError, match=r"U\+FDD0"):
        tokenizer.encode_chat([{"role": "user", "content": every + "<|im_end|>"}])


def test_half_a_surrogate_pair_spoils_no_conversation_beside_it(tokenizer: SLMTokenizer) -> None:
    odd = [{"role": "user", "content": "a\ud800"}, {"role": "assistant", "content": "b"}]
    for each in (tokenizer, tokenizer.extended(added_tokens=["the cat"])):
        together = each.encode_rendered([each.render_chat(messages) for messages in (CONVERSATION, odd, CONVERSATION)])
        whole, found = each.encode_chat(CONVERSATION), [row.to_lists() for (row,) in together]
        assert found == [whole, each.encode_chat(odd), whole]
        assert "a\ufffd" in each.decode(found[1].ids)


def chat_with(template: str) -> SLMTokenizer:
    tokenizer = SLMTokenizer(260)
    tokenizer.chat_template = template
    return tokenizer


def test_a_turn_of_weight_0_is_read_and_not_learned(tokenizer: SLMTokenizer) -> None:
    first, second = ({**CONVERSATION[index], "weight": weight} for index, weight in ((2, 0.0), (4, 1.0)))
    weighed = [*CONVERSATION[:2], first, {**CONVERSATION[3], "weight": 0}, second]
    whole, chat = tokenizer.encode_chat(CONVERSATION), tokenizer.encode_chat(weighed)
    assert chat.ids == whole.ids
    assert [text for text, trained in pieces(tokenizer, chat) if trained] == [" sat.\n<|im_end|>"]
    assert tokenizer.encode_chat([*CONVERSATION[:4], {**second, "weight": None}]) == whole
    assert not any(tokenizer.encode_chat([CONVERSATION[1], first]).trained)


def test_a_turn_that_is_rendered_differently_later_is_learned_in_a_row_that_ends_with_it() -> None:
    # As templates do that drop the reasoning of all turns but the last.
    forgetful = chat_with(
        "{% for m in messages %}{{ m.role[0] + ':' + m.content.split('|')[0 if loop.last else -1] + '<|im_end|>' }}"
        "{% endfor %}{{ 'a:' if add_generation_prompt }}"
    )
    said = [{"role": role, "content": text} for role, text in [("user", "u"), ("assistant", "why|so")] * 3]
    rows = learned_rows(forgetful, said)
    assert [pieces(forgetful, row) for row in rows] == [
        [("u:u<|im_end|>a:", False), ("why<|im_end|>", True)],
        [("u:u<|im_end|>a:so<|im_end|>u:u<|im_end|>a:", False), ("why<|im_end|>", True)],
        [("u:u<|im_end|>a:so<|im_end|>u:u<|im_end|>a:so<|im_end|>u:u<|im_end|>a:", False), ("why<|im_end|>", True)],
    ]
    assert forgetful.encode_chat(said) == rows[-1]
    # A turn that nobody answers rewrites too, and adds nothing to learn.
    assert learned_rows(forgetful, said[:5]) == rows[:2]
    weighed = [said[0], {**said[1], "weight": 0}, *said[2:]]
    assert learned_rows(forgetful, weighed) == rows[1:]
    unlearned = [said[0], {**said[1], "weight": 0}]
    assert [any(row.trained) for row in learned_rows(forgetful, unlearned)] == [False]


def test_a_template_that_rewrites_what_is_answered_is_refused() -> None:
    shouting = chat_with(
        "{% for m in messages %}{{ m.content if loop.last else m.content | upper }}<|im_end|>{% endfor %}"
    )
    assert shouting.encode_chat([{"role": "user", "content": "a"}]).ids
    with pytest.raises(UserError, match="generation prompt is not what it writes before an answer.*message 3"):
        shouting.encode_chat(CONVERSATION)
    # What such a template makes of a conversation can be answered all the same.
    asked = shouting.encode_chat(CONVERSATION[:4], add_generation_prompt=True)
    assert not any(asked.trained)
    assert (
        shouting.decode(asked.ids)
        == "BE KIND.<|im_end|>THE CAT?<|im_end|>SANG TO THE SEA<|im_end|> and then <|im_end|>"
    )


def test_a_template_whose_assistant_never_stops_is_refused() -> None:
    endless = chat_with("{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}")
    with pytest.raises(UserError, match=r"none of <\|endoftext\|>, <\|im_end\|>"):
        endless.encode_chat(CONVERSATION)


def test_an_answer_is_learned_up_to_the_first_token_that_ends_it() -> None:
    tokenizer = chat_with("{% for m in messages %}{{ m.content }}{{ '<|im_end|>!<|endoftext|>' }}{% endfor %}")
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    assert [text for text, trained in pieces(tokenizer, tokenizer.encode_chat(messages)) if trained] == ["b<|im_end|>"]


@pytest.mark.parametrize(
    ("template", "words"),
    [
        ("{% for %}", "not valid Jinja, line 1"),
        ("{{ raise_exception('only\npoems') }}", "failed on this conversation: only poems"),
        ("{{ messages.append(1) }}", "failed on this conversation"),
        ("{{ messages[0].content + 1 }}", "failed on this conversation"),
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "failed on this conversation"),
    ],
)
def test_a_template_that_fails_is_one_line(template: str, words: str) -> None:
    with pytest.raises(UserError, match=words) as raised:
        chat_with(template).encode_chat([{"role": "user", "content": "hello"}])
    assert "\n" not in str(raised.value)


def test_templates_find_what_transformers_gives_them() -> None:
    template = (
        "{{ strftime_now('%Y') | length }} {{ {'ä': '<b>'} | tojson }} {{ tools is none }} "
        "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% break %}{% endfor %}"
    )
    assert render(template, [{"role": "user", "content": "hello"}]) == '4 {"ä": "<b>"} True hello'


def user(content: object = "hello") -> dict:
    return {"role": "user", "content": content}


@pytest.mark.parametrize(
    ("messages", "prompt", "words"),
    [
        ([], False, "without messages"),
        (["hello"], False, "message 1: expected an object with role and content"),
        ([{"role": "user"}], False, "message 1: content is nothing"),
        ([user(["hello"])], False, "message 1: content is a list"),
        ([{"content": "hello"}], False, "message 1: role None"),
        ([user(), {"role": "tool", "content": "x"}], False, "message 2: tool where it is the assistant's turn"),
        ([{"role": "assistant", "content": "x"}], False, "message 1: assistant where it is the user's turn"),
        ([user() | {"weight": 0.5}], False, "message 1: weight 0.5; expected 1"),
        ([user() | {"weight": "1"}], False, "message 1: weight '1'; expected 1"),
        ([user(), user()], False, "message 2: user where it is the assistant's turn"),
        ([user(), {"role": "system", "content": "x"}], False, "message 2: system where it is the assistant's turn"),
        ([user(), {"role": "assistant", "content": " \n"}], False, "message 2: the assistant's text is empty"),
        ([{"role": "system", "content": "x"}], True, "only a system message"),
        ([user(), {"role": "assistant", "content": "x"}], True, "the last message is the assistant's"),
    ],
)
def test_a_malformed_conversation_is_one_line(
    tokenizer: SLMTokenizer, messages: list, prompt: bool, words: str
) -> None:
    for use in (
        lambda: tokenizer.encode_chat(messages, prompt),
        lambda: tokenizer.apply_chat_template(messages, prompt, tokenize=False),
    ):
        with pytest.raises(UserError, match=words) as raised:
            use()
        assert "\n" not in str(raised.value)
