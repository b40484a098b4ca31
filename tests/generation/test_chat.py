"""A conversation is remembered, trimmed when it outgrows the context, and kept when an answer is broken off."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from slmkit.config import UserError
from slmkit.generation.chat import ChatSession
from slmkit.generation.sampling_settings import SamplingSettings
from slmkit.tokenizer import SLMTokenizer
from tests.generation.helpers import TOKENIZER, byte_decoder, make_models_say


@pytest.fixture(autouse=True)
def _plain_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every pass is the decoder's own, which tests interrupt and count."""
    monkeypatch.setattr("slmkit.generation.engine.for_decoding", lambda decoder: decoder)


EXCHANGE = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi"}]


def session(context: int = 256, **changes: object) -> ChatSession:
    return ChatSession(byte_decoder(context), TOKENIZER, SamplingSettings(seed=1), **({"max_new_tokens": 12} | changes))


@pytest.fixture
def speaking(monkeypatch: pytest.MonkeyPatch) -> None:
    make_models_say([*TOKENIZER.encode(" Good day 🦊!"), TOKENIZER.end_of_turn_id], monkeypatch)


@pytest.mark.usefixtures("speaking")
def test_both_sides_are_remembered() -> None:
    chat = session(system="Be kind.", max_new_tokens=40)
    assert "".join(chat.reply("Hello")) == "Good day 🦊!"
    assert chat.messages == [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": "Good day 🦊!"},
    ]


@pytest.mark.usefixtures("speaking")
@pytest.mark.parametrize(("room", "reason"), [(40, "stop"), (3, "length")])
def test_what_ended_an_answer_is_known(room: int, reason: str) -> None:
    chat = session(max_new_tokens=room)
    list(chat.reply("Hello"))
    assert chat.finish_reason == reason
    broken_off = chat.reply("And?")
    next(broken_off)
    broken_off.close()
    assert chat.finish_reason is None


def test_an_answer_is_what_the_model_says_to_the_whole_conversation(monkeypatch: pytest.MonkeyPatch) -> None:
    chat = session()
    "".join(chat.reply("Hello"))
    prompts = []
    forward = chat.decoder.forward
    monkeypatch.setattr(chat.decoder, "forward", lambda ids, cache: prompts.append(ids) or forward(ids, cache))
    "".join(chat.reply("And now?"))
    asked = TOKENIZER.encode_chat(chat.messages[:-1], add_generation_prompt=True).ids
    (read,) = prompts[0].tolist()
    assert len(read) > 20
    assert asked[-len(read) :] == read, "what comes before was read for the first answer"


@pytest.mark.usefixtures("speaking")
def test_an_answer_broken_off_is_remembered_as_far_as_it_went() -> None:
    chat = session(max_new_tokens=40)
    pieces = chat.reply("Hello")
    said = "".join(next(pieces) for _ in range(6))
    pieces.close()
    assert said == "Good "
    assert chat.messages[-1] == {"role": "assistant", "content": "Good"}


def test_an_interruption_inside_the_model_keeps_the_answer_so_far(monkeypatch: pytest.MonkeyPatch) -> None:
    chat = session(max_new_tokens=40)
    forward, calls, said = chat.decoder.forward, [], []

    def interrupted(ids, cache):
        calls.append(1)
        if len(calls) == 20:
            raise KeyboardInterrupt
        return forward(ids, cache)

    monkeypatch.setattr(chat.decoder, "forward", interrupted)
    with pytest.raises(KeyboardInterrupt):
        said.extend(chat.reply("Hello"))
    assert len(calls) == 20
    assert [message["role"] for message in chat.messages] == ["user", "assistant"]
    monkeypatch.undo()
    assert "".join(chat.reply("Go on"))


def test_a_message_without_an_answer_is_not_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    make_models_say([TOKENIZER.end_of_turn_id], monkeypatch)
    chat = session()
    assert "".join(chat.reply("Hello")) == ""
    assert chat.messages == []


def test_reset_forgets_all_but_the_system_message() -> None:
    chat = session(system="Be kind.")
    "".join(chat.reply("Hello"))
    chat.reset()
    assert chat.messages == [{"role": "system", "content": "Be kind."}]


@pytest.mark.usefixtures("speaking")
@pytest.mark.parametrize("context", range(210, 310, 9))
def test_the_oldest_exchanges_make_room_as_few_as_possible_and_the_system_message_stays(context: int) -> None:
    chat = session(context, system="Be kind.", max_new_tokens=40)
    system, everything = chat.messages[0], []

    def room_after(messages: list[dict[str, str]]) -> int:
        return context - len(TOKENIZER.encode_chat([system, *messages], add_generation_prompt=True).ids)

    for number in range(6):
        "".join(chat.reply(f"message number {number}"))
        everything += chat.messages[-2:]
        assert chat.messages == [system, *everything[chat.forgotten :]]
        assert room_after(everything[chat.forgotten : -1]) >= 40
        assert chat.forgotten == 0 or room_after(everything[chat.forgotten - 2 : -1]) < 40
    assert 0 < chat.forgotten < 10


def test_a_message_that_leaves_no_room_is_refused_and_changes_nothing() -> None:
    chat = session(system="Be kind.")
    "".join(chat.reply("Hello"))
    before = list(chat.messages)
    with pytest.raises(UserError, match="context of 256: write a shorter message"):
        next(chat.reply("x" * 300))
    assert (chat.messages, chat.forgotten) == (before, 0)


def answered(chat: ChatSession, question: str) -> str:
    return "".join(chat.reply(question))


def test_a_retry_replaces_the_answer_and_a_seed_gives_the_same_ones_in_the_same_order() -> None:
    runs = []
    for _ in range(2):
        chat = session()
        answered(chat, "Hello")
        runs.append([answered(chat, "And?"), *("".join(chat.retry()) for _ in range(4))])
        assert [message["role"] for message in chat.messages] == ["user", "assistant"] * 2
        assert chat.messages[-2:] == [
            {"role": "user", "content": "And?"},
            {"role": "assistant", "content": runs[-1][-1].rstrip()},
        ]
    assert runs[0] == runs[1]
    assert len(set(runs[0])) == 5
    assert answered(chat, "And?") != answered(session(), "And?"), "the conversation matters"
    fresh = session()
    answered(fresh, "Hello")
    assert answered(fresh, "And?") == runs[0][0], "another question begins with the seed again"


def test_a_retry_without_an_answer_keeps_the_one_before(monkeypatch: pytest.MonkeyPatch) -> None:
    chat = session()
    answered(chat, "Hello")
    before = list(chat.messages)
    make_models_say([TOKENIZER.end_of_turn_id], monkeypatch)
    assert "".join(chat.retry()) == ""
    assert chat.messages == before
    assert chat.undo() == "Hello"
    assert chat.messages == []


def test_a_question_without_an_answer_can_be_asked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as silent:
        make_models_say([TOKENIZER.end_of_turn_id], silent)
        chat = session()
        answered(chat, "Hello")
    assert chat.messages == []
    assert "".join(chat.retry())
    assert chat.messages[0] == {"role": "user", "content": "Hello"}


def test_what_cannot_be_retried_or_taken_back_is_said() -> None:
    chat = session(system="Be kind.")
    for verb in (chat.undo, lambda: next(chat.retry())):
        with pytest.raises(UserError, match="nothing was asked yet"):
            verb()
    answered(chat, "Hello")
    chat.settings = SamplingSettings(temperature=0.0)
    with pytest.raises(UserError, match="at temperature 0 the answer is always the same"):
        next(chat.retry())


def test_undo_takes_back_one_exchange_at_a_time() -> None:
    chat = session(context=512, system="Be kind.")
    for question in ("one", "two"):
        answered(chat, question)
    assert (chat.undo(), len(chat.messages)) == ("two", 3)
    assert (chat.undo(), chat.messages) == ("one", [{"role": "system", "content": "Be kind."}])


def test_a_system_message_is_set_replaced_and_removed_while_the_conversation_stays() -> None:
    chat = session()
    answered(chat, "Hello")
    before = list(chat.messages)
    for text in ("Be kind.", "Be rude."):
        chat.set_system(text)
        assert chat.system == text
        assert chat.messages == [{"role": "system", "content": text}, *before]
    with pytest.raises(UserError, match="leave no room"):
        chat.set_system("x" * 300)
    assert chat.system == "Be rude."
    chat.set_system(None)
    assert (chat.system, chat.messages) == (None, before)


def test_a_template_without_a_place_for_a_system_message() -> None:
    tokenizer = SLMTokenizer(260)
    tokenizer.chat_template = (
        "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
        "{% for m in messages %}{{ '<|im_start|>' + m.role + m.content }}{% endfor %}{{ '<|im_start|>assistant' }}"
    )
    chat = ChatSession(byte_decoder(256), tokenizer, SamplingSettings(seed=1))
    with pytest.raises(UserError, match="no system"):
        chat.set_system("Be kind.")
    assert chat.messages == []
    tokenizer.chat_template = None
    with pytest.raises(UserError, match="no chat template"):
        ChatSession(byte_decoder(256), tokenizer, SamplingSettings(seed=1))


def test_what_was_read_of_a_conversation_is_not_read_again(monkeypatch: pytest.MonkeyPatch) -> None:
    chat, read = session(context=512), []
    forward = chat.decoder.forward
    monkeypatch.setattr(chat.decoder, "forward", lambda ids, cache: read.append(ids.size(1)) or forward(ids, cache))
    answered(chat, "x" * 150)
    assert max(read) > 150
    read.clear()
    answered(chat, "And now?")
    assert max(read) < 60


@pytest.mark.parametrize("name", ["chat.jsonl", "chat.json"])
def test_what_is_saved_is_a_row_of_conversation_data(name: str, tmp_path: Path) -> None:
    from tests.data.read_files import read_conversations

    chat = session()
    "".join(chat.reply("Hello"))
    chat.save(tmp_path / name)
    assert list(read_conversations(tmp_path / name)) == [chat.messages]
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_a_saved_conversation_goes_on_where_it_was(tmp_path: Path) -> None:
    chat, later = session(system="Be kind."), session(system="Be rude.")
    "".join(chat.reply("Hello \udcff"))  # half of a surrogate pair, as a terminal may hand over
    "".join(chat.reply("🦊?"))
    chat.save(tmp_path / "chat.json")
    later.load(tmp_path / "chat.json")
    chat.messages[1]["content"] = "Hello ?"
    assert later.messages == chat.messages
    assert "".join(later.reply("Go on")) == "".join(chat.reply("Go on"))
    later.reset()
    assert later.messages == [{"role": "system", "content": "Be kind."}]


def test_a_conversation_that_has_not_begun_is_not_saved_but_loaded(tmp_path: Path) -> None:
    (tmp_path / "chat.json").write_text('\ufeff{"messages": [{"role": "system", "content": "Be kind."}]}\n')
    chat = session(system="Be brief.")
    with pytest.raises(UserError, match="nothing was asked yet, so there is no conversation to save"):
        chat.save(tmp_path / "chat.json")
    chat.load(tmp_path / "chat.json")
    assert chat.messages == [{"role": "system", "content": "Be kind."}]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "no such file$"),
        ("[" * 100_000, "not a saved conversation: JSON that is nested too deeply"),
        (f'{{"messages": []}}\n\n{{"messages": {"[" * 100_000}', "not a saved conversation: JSON that is nested too"),
        ('{"messages": []}\n\n{"messages": []}\n', "it holds 2 conversations, expected one"),
        ('{"messages": []}\nmore', "not a saved conversation: Extra data"),
        ("{", "not a saved conversation"),
        ("[]", 'expected {"messages"'),
        ('{"messages": 3}', 'expected {"messages"'),
        ('{"messages": ["hello"]}', "message 1: expected an object"),
        ('{"messages": [{"role": "assistant", "content": "Hi"}]}', "it is the user's turn"),
        ('{"messages": [{"role": "user", "content": "Hi"}]}', "message 1, the last one, has no answer"),
    ],
)
def test_a_file_that_is_no_conversation_is_one_line_and_changes_nothing(
    content: str | None, words: str, tmp_path: Path
) -> None:
    if content is not None:
        (tmp_path / "chat.json").write_text(content)
    chat = session(system="Be kind.")
    with pytest.raises(UserError, match=f"chat.json: .*{words}"):
        chat.load(tmp_path / "chat.json")
    assert chat.messages == [{"role": "system", "content": "Be kind."}]


@pytest.mark.parametrize(
    ("place", "words"),
    [
        ("nowhere/chat.json", "there is no folder .*/nowhere$"),
        ("file/chat.json", "not a directory$"),
        (".", "is a folder$"),
        ("null\0byte", ".*null"),
        ("x" * 300, "file name too long$"),
    ],
)
def test_a_place_that_cannot_be_written_is_one_line(place: str, words: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    chat = session()
    chat.messages = EXCHANGE
    with pytest.raises(UserError, match=f"cannot be saved: {words}") as refusal:
        chat.save(tmp_path / place)
    assert str(refusal.value).count(str(tmp_path)) == 1 + words.startswith("there")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_save_that_fails_keeps_what_was_saved_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "chat.json"
    path.write_text("before")

    def fail(*arguments: object) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr("slmkit.files.os.replace", fail)
    chat = session()
    chat.messages = EXCHANGE
    with pytest.raises(UserError, match="no space left"):
        chat.save(path)
    assert path.read_text() == "before"
    assert [found.name for found in tmp_path.iterdir()] == ["chat.json"]


def test_what_is_no_regular_file_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path, tmp_path / "pipe", Path("/dev/zero")):
        with pytest.raises(UserError, match=f"{path}: not a regular file$"):
            session().load(path)
    monkeypatch.setattr("slmkit.files.LARGEST_TEXT", 2**20)
    with open(tmp_path / "large", "wb") as file:
        file.truncate(2**20 + 1)
    with pytest.raises(UserError, match="large: cannot be read: larger than 1,048,576 bytes"):
        session().load(tmp_path / "large")
