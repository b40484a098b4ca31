"""Conversations as rows of tokens: what public rows teach, and that nothing is lost without being counted by place."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from slmkit.cli.data import _print_samples
from slmkit.config import UserError
from slmkit.data.make_batches import make_batches
from slmkit.data.prepare import conversations
from slmkit.data.prepare.conversations import IN_ROWS, UNLEARNED, ConversationEncoder, EncodedConversation, prepare_chat
from slmkit.data.prepare.corpus import Corpus
from slmkit.data.prepare.preview import samples_of_shards
from slmkit.data.settings import DataSettings, Reads
from slmkit.data.sources import Source, open_source
from slmkit.data.sources.settings import SourceSettings
from slmkit.data.stream import ChatRows
from slmkit.tokenizer import ChatTokens, SLMTokenizer
from slmkit.training.recipe.recipe import load_recipe
from slmkit.workflows.train import train_recipe
from tests.cli.helpers import TINY, slm
from tests.data.public_rows import OF_RECIPES
from tests.data.sources.test_row_formats import write as write_rows

TEMPLATES = {"chatml": "<|im_end|>", "llama3": "<|eot_id|>", "gemma": "<end_of_turn>"}
NONE = SourceSettings(path="nowhere")  # nothing is held out, then
GOOD = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}]


def files(folder: Path, rows: list[dict[str, Any]]) -> list[Path]:
    """The same rows as parquet and as JSON lines."""
    return [write_rows(folder / name, rows) for name in ("a.parquet", "a.jsonl")]


@pytest.fixture(scope="module")
def tokenizer() -> SLMTokenizer:
    return SLMTokenizer(260)


def learned(tokenizer: SLMTokenizer, chat: ChatTokens) -> list[str]:
    runs = groupby(zip(chat.ids, chat.trained), key=lambda pair: pair[1])
    return [tokenizer.decode(index for index, _ in run) for is_trained, run in runs if is_trained]


def source_of(path: Path, **settings: Any) -> Source:
    return open_source(SourceSettings(path=str(path), **settings))


def encoded_of(
    source: Source, encoder_of: Callable[[Source], ConversationEncoder], reads: Reads = "conversations"
) -> Iterator[EncodedConversation]:
    return encoder_of(source).encode_all(row for row, _ in source.read_rows(reads))


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("name", OF_RECIPES)
def test_the_answers_of_public_rows_are_learned_in_every_template(
    tokenizer: SLMTokenizer, tmp_path: Path, name: str, template: str
) -> None:
    row, messages, _ = OF_RECIPES[name]
    ours = tokenizer.extended(chat_template=template)
    for path in files(tmp_path, [row]):
        (encoded,) = encoded_of(source_of(path), lambda source: ConversationEncoder(ours, source))
        (chat,) = encoded.rows
        assert learned(ours, chat) == [messages[-1]["content"] + TEMPLATES[template]]


def test_a_turn_of_weight_0_of_slimorca_is_read_and_not_learned(tokenizer: SLMTokenizer, tmp_path: Path) -> None:
    turns = [("human", "a?", 0.0), ("gpt", "no.", 0.0), ("human", "b?", 0.0), ("gpt", "yes.", 1.0)]
    row = {"conversations": [{"from": who, "value": said, "weight": weight} for who, said, weight in turns]}
    for path in files(tmp_path, [row]):
        (encoded,) = encoded_of(source_of(path), lambda source: ConversationEncoder(tokenizer, source))
        assert learned(tokenizer, encoded.rows[0]) == ["yes.<|im_end|>"]
        assert "no.<|im_end|>" in tokenizer.decode(encoded.rows[0].ids)


def test_a_system_message_without_a_word_is_none(tmp_path: Path) -> None:
    for path in files(tmp_path, [{"messages": [{"role": "system", "content": " "}, *GOOD]}]):
        assert [conversation for conversation, _ in source_of(path).read(kind="conversations")] == [GOOD]


def turn(role: str, content: str = "x", **more: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **more}


# What is wrong with the row on line 2 → the row, the reason it is counted by, what the line says.
BAD = {
    "order": ([turn("user"), turn("user")], "roles out of order", "message 2: user where it is the assistant's turn"),
    "silence": ([turn("user"), turn("assistant", " ")], "an empty turn", "message 2: the assistant's text is empty"),
    "empty question": (
        [turn("user", ""), turn("assistant")],
        "an empty turn",
        "message 1: the text of the user is empty",
    ),
    "no messages": ([], "not as expected", "expected in column 'messages' a list of messages"),
    "schema": (["Hi"], "not as expected", "expected in column 'messages' a list of messages"),
    "role": ([turn("narrator")], "not as expected", "role 'narrator'"),
    "weight": ([turn("user"), turn("assistant", weight=0.3)], "not as expected", "weight 0.3; expected 1"),
    "column": (None, "no such column", "no column 'messages'"),
    "template": ([turn("user", "forbidden"), turn("assistant")], "refused by the chat template", "not here"),
}


def write(path: Path, conversations: list[Any]) -> Path:
    rows = ({"text": "x"} if messages is None else {"messages": messages} for messages in conversations)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def with_refusal(tokenizer: SLMTokenizer) -> SLMTokenizer:
    changed = tokenizer.extended()
    refusal = "{% if messages[0].content == 'forbidden' %}{{ raise_exception('not here') }}{% endif %}"
    changed.chat_template = refusal + (tokenizer.chat_template or "")
    return changed


@pytest.mark.parametrize("name", BAD)
def test_a_bad_row_is_refused_by_its_place_or_left_out_and_counted(
    tokenizer: SLMTokenizer, tmp_path: Path, name: str
) -> None:
    row, reason, words = BAD[name]
    path, ours = write(tmp_path / "a.jsonl", [GOOD, row, GOOD]), with_refusal(tokenizer)
    with pytest.raises(UserError, match=words) as raised:
        list(encoded_of(source_of(path), lambda source: ConversationEncoder(ours, source)))
    assert str(raised.value).startswith(f"{path}:2: ")
    assert "\n" not in str(raised.value)
    source = source_of(path, on_bad_row="skip", name="mine")
    kept = list(encoded_of(source, lambda source: ConversationEncoder(ours, source)))
    assert [[row.to_lists() for row in one.rows] for one in kept] == [[ours.encode_chat(GOOD)]] * 2
    assert source.skipped == {reason: 1}
    (line,) = source.report()
    assert line.startswith(f"mine: 1 skipped ({reason}), such as {path}:2: ")
    assert words in line


@pytest.mark.parametrize("reads", ["pairs", "questions"])
def test_pairs_and_questions_that_the_template_refuses_are_left_out_and_counted(
    tokenizer: SLMTokenizer, tmp_path: Path, reads: Reads
) -> None:
    def row(asked: str) -> dict[str, Any]:
        if reads == "pairs":
            return {"prompt": asked, "chosen": "a", "rejected": "b"}
        return {"messages": [turn("user", asked), turn("assistant")]}

    path, ours = tmp_path / "a.jsonl", with_refusal(tokenizer)
    path.write_text("".join(json.dumps(row(asked)) + "\n" for asked in ("Hi", "forbidden", "Hello")))
    with pytest.raises(UserError, match="not here") as raised:
        list(encoded_of(source_of(path), lambda source: ConversationEncoder(ours, source), reads))
    assert str(raised.value).startswith(f"{path}:2: ")
    source = source_of(path, on_bad_row="skip", name="mine")
    assert len(list(encoded_of(source, lambda source: ConversationEncoder(ours, source), reads))) == 2
    (line,) = source.report()
    assert line.startswith(f"mine: 1 skipped (refused by the chat template), such as {path}:2: ")


LONG = [turn("user", "?"), turn("assistant", "word " * 40)]
LONG_QUESTION = [turn("user", "word " * 40), turn("assistant", "!")]
UNWEIGHED = [turn("user"), turn("assistant", weight=0)]
MIXED = [GOOD, LONG, LONG_QUESTION, UNWEIGHED, GOOD, LONG]


@pytest.mark.parametrize("said", [{}, {"content": None}, {"content": 3}], ids=["nothing", "none", "a number"])
def test_a_message_that_is_no_text_is_one_line(tokenizer: SLMTokenizer, tmp_path: Path, said: dict[str, Any]) -> None:
    talk = [{"role": "user", **said}, {"role": "assistant", "content": "Hello"}]
    with pytest.raises(UserError, match="^conversation 1: message 1: content is (nothing|a whole number);"):
        prepare_chat([talk], tokenizer, tmp_path / "shards")


def test_what_a_row_cuts_and_what_teaches_nothing_is_counted_by_place(tokenizer: SLMTokenizer, tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", MIXED)
    source = source_of(path, name="mine")
    encoded = list(encoded_of(source, lambda source: ConversationEncoder(tokenizer, source, length=64)))
    assert len(encoded) == len(MIXED)
    assert source.noted == {"cut at 64 tokens": 3, UNLEARNED: 2}
    length = len(tokenizer.encode_chat(LONG).ids)
    assert source.report() == [
        f"mine: 3 cut at 64 tokens, such as {path}:2: {length:,} tokens",
        f"mine: 2 {UNLEARNED}, such as {path}:3: {len(tokenizer.encode_chat(LONG_QUESTION).ids)} tokens, "
        "none of them learned",
    ]
    skipping = source_of(path)
    encoder = ConversationEncoder(tokenizer, skipping, length=64, on_long="skip")
    assert [one.rows[0].to_lists() for one in encoder.encode_all(MIXED)] == [
        tokenizer.encode_chat(messages) for messages in (GOOD, UNWEIGHED, GOOD)
    ]
    assert skipping.skipped == {"longer than 64 tokens": 3}
    with pytest.raises(UserError, match=rf"a\.jsonl:2: {length} tokens, and a row has 64: raise train.sequence_length"):
        list(encoded_of(source_of(path), lambda s: ConversationEncoder(tokenizer, s, 64, "refuse")))
    # A conversation that just fits loses nothing but the end-of-text token behind it, which is not learned anyway.
    exact = ConversationEncoder(tokenizer, (just := source_of(path)), length, "refuse")
    assert len(list(exact.encode_all([LONG]))) == 1
    assert not just.noted


def test_rows_are_counted_in_their_order_however_far_ahead_they_are_read(
    tokenizer: SLMTokenizer, tmp_path: Path
) -> None:
    disordered, refused = [turn("user"), turn("user")], [turn("user", "forbidden"), turn("assistant")]
    rows = [GOOD, LONG, refused, disordered, GOOD]
    path, ours = write(tmp_path / "a.jsonl", rows), with_refusal(tokenizer)
    source = source_of(path, on_bad_row="skip")
    kept = list(encoded_of(source, lambda source: ConversationEncoder(ours, source, 64, "skip")))
    assert len(kept) == 2
    assert list(source.skipped) == ["longer than 64 tokens", "refused by the chat template", "roles out of order"]
    with pytest.raises(UserError, match=rf"{path}:2: \d+ tokens, and a row has 64"):
        list(encoded_of(source := source_of(path), lambda source: ConversationEncoder(ours, source, 64, "refuse")))
    assert not source.skipped
    with pytest.raises(UserError, match=f"{path}:3: the chat template failed"):
        list(encoded_of(source_of(path), lambda source: ConversationEncoder(ours, source)))
    nothing = write(tmp_path / "b.jsonl", [disordered] * 3)
    with pytest.raises(UserError, match="no documents found"):
        list(encoded_of(source := source_of(nothing, on_bad_row="skip"), lambda s: ConversationEncoder(ours, s)))
    assert source.skipped == {"roles out of order": 3}


@pytest.mark.parametrize("size", [1, 100, conversations.BATCH_BYTES])
def test_shards_are_the_same_however_many_conversations_are_encoded_at_once(
    tokenizer: SLMTokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int
) -> None:
    monkeypatch.setattr(conversations, "BATCH_BYTES", size)
    odd = [turn("user", "half \ud800"), turn("assistant", "<|im_end|>")]
    shards = prepare_chat([*MIXED, odd, *MIXED], tokenizer, tmp_path / "shards")
    each = [tokenizer.encode_chat(messages) for messages in [*MIXED, odd, *MIXED]]
    assert shards.tokens_in(0, len(shards)).tolist() == [i for one in each for i in (*one.ids, tokenizer.eos_token_id)]
    assert shards.trained_in(0, len(shards)).tolist() == [t for one in each for t in (*one.trained, False)]
    assert np.diff(shards.document_ends, prepend=0).tolist() == [len(one.ids) + 1 for one in each]


def test_a_conversation_of_several_rows_is_counted_and_all_its_answers_are_fed(
    tokenizer: SLMTokenizer, tmp_path: Path
) -> None:
    forgetful = tokenizer.extended()
    forgetful.chat_template = (
        "{% for m in messages %}{{ m.role + ':' + (m.content if loop.last else '…') + '<|im_end|>' }}{% endfor %}"
        "{{ 'assistant:' if add_generation_prompt }}"
    )
    talk = [turn(role, text) for role, text in [("user", "…"), ("assistant", "a"), ("user", "…"), ("assistant", "b")]]
    source = source_of(write(tmp_path / "a.jsonl", [talk] * 3))
    encoded = list(encoded_of(source, lambda source: ConversationEncoder(forgetful, source)))
    assert source.noted == {IN_ROWS: 3}
    assert [len(one.rows) for one in encoded] == [2, 2, 2]
    shards = prepare_chat([talk] * 3, forgetful, tmp_path / "shards")
    assert shards.header.documents == 6
    rows = ChatRows(shards, 256)
    labels = [label for index in range(rows.rows_in_epoch) for label in rows.row(index)[1].tolist() if label >= 0]
    assert sorted(forgetful.decode(labels).split("<|im_end|>")) == ["", *"aaa", *"bbb"]


def test_rows_of_shards_say_what_they_cut_and_leave_out(tokenizer: SLMTokenizer, tmp_path: Path) -> None:
    shards = prepare_chat(MIXED, tokenizer, tmp_path / "shards")
    rows = ChatRows(shards, 64)
    assert (rows.truncated, rows.untrained) == (3, 2)
    assert rows.report() == [
        "3 of 6 conversations are longer than 64 tokens and cut",
        "2 of 6 conversations have nothing to learn within 64 tokens",
    ]
    skipping = ChatRows(shards, 64, "skip")
    learned_labels = [label for i in range(skipping.rows_in_epoch) for label in skipping.row(i)[1] if label >= 0]
    assert tokenizer.decode(learned_labels) == "Hello.<|im_end|>" * 2
    assert "left out" in skipping.report()[0]
    with pytest.raises(UserError, match="conversation 2 is longer than 64 tokens: raise train.sequence_length"):
        ChatRows(shards, 64, "refuse")
    assert ChatRows(shards, 512).report() == ["1 of 6 conversations have nothing to learn within 512 tokens"]


class Listening:
    """A reporter that keeps what it is told."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def say(self, line: Any) -> None:
        self.lines.append(str(line))

    warn = say

    def counter(self, label: str, total: int | None = None) -> Any:
        return lambda *done: None


@pytest.mark.parametrize("streaming", [False, True])
def test_a_run_says_what_it_leaves_out_and_cuts(tmp_path: Path, streaming: bool) -> None:
    good = [[turn("user", f"{number}?"), turn("assistant", f"{number}.")] for number in range(60)]
    bad = [[turn("user"), turn("user")], [turn("user"), turn("assistant", "")], LONG, UNWEIGHED]
    path = write(tmp_path / "chats.jsonl", [*good[:30], *bad, *good[30:]])
    validation = {"path": str(write(tmp_path / "others.jsonl", [GOOD]))}
    data = {"source": str(path), "validation": validation, "streaming": streaming}
    (tmp_path / "recipe.yaml").write_text(json.dumps({"objective": "sft", "data": data}))
    keys = [*TINY, f"output_dir={tmp_path / 'run'}", "data.on_bad_row=skip", "tokenizer.vocab_size=260"]
    keys += ["train.max_steps=12", "train.eval_steps=12"]
    reporter = Listening()
    train_recipe(load_recipe(tmp_path / "recipe.yaml", keys), reporter)
    assert any(f"skipped (roles out of order), such as {path}:31: message 2" in line for line in reporter.lines)
    assert any(f"skipped (an empty turn), such as {path}:32: message 2" in line for line in reporter.lines)
    assert any(f"cut at 64 tokens, such as {path}:33:" in line for line in reporter.lines)
    assert any(f"{UNLEARNED}, such as {path}:34:" in line for line in reporter.lines)
    begins = [line for line in reporter.lines if "conversations are longer than 64 tokens and cut" in line]
    assert len(begins) == (not streaming)
    if not streaming:
        assert begins[0].startswith("training data: 1 of ")
        assert any("chats.jsonl: 1 skipped (roles out of order)" in line for line in reporter.lines)
    keys += ["data.on_bad_row=refuse"]
    with pytest.raises(UserError, match=r"chats\.jsonl:31: message 2: user where it is the assistant's turn"):
        train_recipe(load_recipe(tmp_path / "recipe.yaml", keys), Listening())
    keys += ["data.on_bad_row=skip", "data.on_long_conversation=refuse"]
    with pytest.raises(UserError, match=r"chats\.jsonl:33: \d+ tokens, and a row has 64"):
        train_recipe(load_recipe(tmp_path / "recipe.yaml", keys), Listening())


def test_the_command_prepares_counts_and_shows_what_is_learned(tokenizer: SLMTokenizer, tmp_path: Path) -> None:
    path = write(tmp_path / "chats.jsonl", [UNWEIGHED, [turn("user"), turn("user")], LONG, GOOD])
    tokenizer.extended(chat_template="llama3").save_pretrained(tmp_path / "tokenizer")
    asked = ["data", "prepare", path, "--tokenizer", tmp_path / "tokenizer", "-o", tmp_path / "shards", "--chat"]
    refused = slm(*asked)
    assert refused.returncode == 2
    assert "chats.jsonl:2: message 2: user where it is the assistant's turn" in refused.stderr
    done = slm(*asked, "--source", "on_bad_row=skip", "--length", "64")
    assert done.returncode == 0, done.stderr
    assert "1 skipped (roles out of order), such as" in done.stderr
    assert f"1 cut at 64 tokens, such as {path}:3:" in done.stderr
    assert "3 documents" in done.stdout
    shown = slm("data", "inspect", tmp_path / "shards", "--tokenizer", tmp_path / "tokenizer", "--length", "64",
                "--documents", "3")  # fmt: skip
    assert shown.returncode == 0, shown.stderr
    assert "truncated        1 of the documents" in shown.stdout
    assert "packed           2 rows of 64 tokens" in shown.stdout
    assert "1 of 3 conversations have nothing to learn within 64 tokens" in shown.stdout


def test_a_stream_counts_anew_where_reading_begins_anew(tokenizer: SLMTokenizer, tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [GOOD, [turn("user"), turn("user")], LONG, UNWEIGHED])
    data = DataSettings(source=str(path), streaming=True, on_bad_row="skip", when_exhausted="stop", validation=NONE)
    batches = make_batches("conversations", data, Corpus(tokenizer, [], None), 64, 1, seed=0)  # type: ignore[arg-type]
    expected = {"1 skipped (roles out of order)", "1 cut at 64 tokens", f"1 {UNLEARNED}"}
    for _ in range(2):
        batches.batch(0)
        batches.has(2)
        assert {line.split(": ", 1)[1].split(", such as")[0] for line in batches.report()} == expected
        batches.seek(0, {})
        assert batches.report() == []


@pytest.mark.parametrize("template", TEMPLATES)
def test_inspection_colours_what_is_learned_and_nothing_else(
    tokenizer: SLMTokenizer, tmp_path: Path, template: str, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    ours = tokenizer.extended(chat_template=template)
    talk = [turn("system", "Be."), turn("user", "a?"), turn("assistant", "no.", weight=0)]
    talk += [turn("user", "b?"), turn("assistant", "yes.")]
    shards = prepare_chat([talk, GOOD], ours, tmp_path / "shards")
    for name, value in (("FORCE_COLOR", "1"), ("TERM", "xterm-256color")):
        monkeypatch.setenv(name, value)
    _print_samples(samples_of_shards(shards, 2), ours)
    shown = capsys.readouterr().out
    coloured = "".join(re.findall("\x1b\\[[0-9;]*32m(.*?)\x1b\\[0m", shown, re.DOTALL))
    end = TEMPLATES[template]
    assert coloured == f"yes.{end}Hello.{end}"
    assert re.sub("\x1b\\[[0-9;]*m", "", shown).count(end) == (7 if template != "gemma" else 6)


def test_data_settings_pass_their_choice_on() -> None:
    data = DataSettings(source="a.jsonl", on_bad_row="skip")
    assert data.all_sources()[0].on_bad_row == "skip"
