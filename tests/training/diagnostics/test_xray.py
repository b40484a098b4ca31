"""Each way to ruin a run before its first step is seen, and healthy runs are let pass."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from slmkit.config import UserError
from slmkit.data import stories
from slmkit.data.batch import Batch
from slmkit.data.packing import IGNORED
from slmkit.data.prepare.conversations import prepare_chat
from slmkit.data.prepare.text_to_shards import prepare_text
from slmkit.data.rows.answers import JudgedRows, PairRows
from slmkit.data.shards.reader import TokenShards
from slmkit.data.sources import open_source
from slmkit.data.sources.documents import Judged
from slmkit.data.sources.formats import pair_of
from slmkit.data.sources.settings import SourceSettings
from slmkit.data.stream import ChatRows, PretrainRows, Stream
from slmkit.tokenizer import SLMTokenizer
from slmkit.training.diagnostics.contamination import Text, contamination, text_of
from slmkit.training.diagnostics.xray import Vocabulary, XRay, examine
from slmkit.training.diagnostics.xray_page import check_data, rendered_rows, vocabulary_of
from slmkit.training.recipe.recipe import find_recipe, load_recipe
from slmkit.workflows.train import train_recipe
from tests.data.read_files import read_documents
from tests.data.written_shards import written
from tests.test_life import Silent

LENGTH = 128


@pytest.fixture(scope="module")
def tokenizer() -> SLMTokenizer:
    tokenizer = SLMTokenizer(600)
    tokenizer.train([*texts(200), "user\n", "assistant\n"])
    return tokenizer


def texts(count: int, seed: int = 0) -> list[str]:
    return [story.text for story in stories.tell_many(seed, count)]


def talks(count: int, seed: int = 0) -> list[list[dict[str, str]]]:
    return [stories.conversation(seed, index) for index in range(count)]


def seen(shards: TokenShards, vocabulary: Vocabulary, *validation: TokenShards, length: int = LENGTH) -> XRay:
    is_chat = shards.header.masked
    rows = (ChatRows if is_chat else PretrainRows)(shards, length)
    return examine(Stream(rows, 4), vocabulary, [shards], validation, is_chat)


def shards_of(folder: Path, tokenizer: SLMTokenizer, documents: Iterable[tuple[np.ndarray, np.ndarray | None]]):
    """Shards as somebody else's program might write them: ids as they are, with a mask where there is one."""
    ids, trained = zip(*documents)
    mask = None if trained[0] is None else np.concatenate(trained)
    return written(folder, tokenizer, np.concatenate(ids), np.cumsum([len(one) for one in ids]), mask)


def encoded_chat(tokenizer: SLMTokenizer, mask: Callable[[np.ndarray, np.ndarray], np.ndarray]):
    """Conversations with their masks changed by mask(ids, trained)."""
    for talk in talks(40):
        chat = tokenizer.encode_chat(talk)
        ids = np.array([*chat.ids, tokenizer.eos_token_id])
        yield ids, mask(ids, np.array([*chat.trained, False]))


# -- what is healthy --------------------------------------------------------------------------------------------------


def test_healthy_text_and_healthy_conversations_have_no_findings(tmp_path: Path, tokenizer: SLMTokenizer) -> None:
    vocabulary = vocabulary_of(tokenizer, len(tokenizer))
    text = prepare_text(texts(150), tokenizer, tmp_path / "text")
    held_out = prepare_text(texts(30, seed=9), tokenizer, tmp_path / "held-out")
    xray = seen(text, vocabulary, held_out)
    assert (xray.findings, xray.notes) == ([], [])
    assert xray.figures["learned"] == "128 a row (100%)"
    chat = prepare_chat(talks(60), tokenizer, tmp_path / "chat")
    xray = seen(chat, vocabulary, prepare_chat(talks(20, seed=9), tokenizer, tmp_path / "talk"), length=1024)
    assert xray.findings == []
    assert int(xray.figures["end tokens learned"]) > 50
    assert 0 < xray.rows.padding.mean() < 0.5


def test_one_long_text_without_an_end_in_sight_is_healthy(tmp_path: Path, tokenizer: SLMTokenizer) -> None:
    book = prepare_text(["\n".join(texts(150))], tokenizer, tmp_path)
    assert seen(book, vocabulary_of(tokenizer, len(tokenizer))).findings == []


def test_a_corpus_that_repeats_itself_is_noted_and_not_stopped(tmp_path: Path, tokenizer: SLMTokenizer) -> None:
    train = prepare_text(["The fox had a kite and the kite had a fox. " * 200], tokenizer, tmp_path / "train")
    validation = prepare_text(["The fox had a kite and the kite had a fox. " * 20], tokenizer, tmp_path / "validation")
    xray = seen(train, vocabulary_of(tokenizer, len(tokenizer)), validation, length=32)
    assert xray.findings == []
    assert "which repeats itself as much" in xray.notes[0]


# -- what is not: a fixture for each finding --------------------------------------------------------------------------


def test_all_labels_masked(tmp_path: Path, tokenizer: SLMTokenizer) -> None:
    with pytest.raises(UserError, match="nothing to learn"):
        ChatRows(shards_of(tmp_path, tokenizer, encoded_chat(tokenizer, lambda ids, trained: trained & False)), LENGTH)

    class Masked(Stream):
        def batch(self, step: int, rank: int = 0, world: int = 1) -> Batch:
            batch = super().batch(step)
            return Batch(batch.ids, torch.full_like(batch.labels, IGNORED), 0)

    stream = Masked(PretrainRows(prepare_text(texts(20), tokenizer, tmp_path / "text"), LENGTH), 4)
    xray = examine(stream, vocabulary_of(tokenizer, len(tokenizer)))
    assert len(xray.findings) == 1
    assert "not one of 8,192 labels is learned" in xray.findings[0]


def test_no_end_token_in_text(tmp_path: Path, tokenizer: SLMTokenizer) -> None:
    endless = shards_of(tmp_path, tokenizer, ((np.array(tokenizer.encode(text)), None) for text in texts(100)))
    xray = seen(endless, vocabulary_of(tokenizer, len(tokenizer)))
    assert len(xray.findings) == 1
    assert "no end token is learned (none among 8,192 tokens)" in xray.findings[0]


def test_an_end_token_that_is_there_and_not_learned(tmp_path: Path, tokenizer: SLMTokenizer) -> None:
    """As where the end doubles as padding and every label that looks like padding is masked."""
    ends = [*tokenizer.stop_token_ids]
    chat = shards_of(tmp_path, tokenizer, encoded_chat(tokenizer, lambda ids, trained: trained & ~np.isin(ids, ends)))
    xray = seen(chat, vocabulary_of(tokenizer, len(tokenizer)), length=1024)
    assert len(xray.findings) == 1
    assert "are there and none is a label" in xray.findings[0]


def test_a_doubled_beginning(tmp_path: Path, tokenizer: SLMTokenizer) -> None:
    bos, eos = tokenizer.special_tokens["<|im_start|>"], tokenizer.eos_token_id
    vocabulary = replace(vocabulary_of(tokenizer, len(tokenizer)), bos_id=bos)
    pieces = [tokenizer.encode(text) for text in texts(60)]
    doubled = shards_of(tmp_path / "2", tokenizer, ((np.array([bos, bos, *ids, eos]), None) for ids in pieces))
    assert "begin with the beginning-of-text token twice" in seen(doubled, vocabulary).findings[0]
    single = shards_of(tmp_path / "1", tokenizer, ((np.array([bos, *ids, eos]), None) for ids in pieces))
    assert seen(single, vocabulary).findings == []


def test_a_doubled_beginning_where_beginning_and_end_are_one_token(tmp_path: Path, tokenizer: SLMTokenizer) -> None:
    """GPT-2's: the end of one text and one beginning of the next make two in any case."""
    eos = tokenizer.eos_token_id
    vocabulary = replace(vocabulary_of(tokenizer, len(tokenizer)), bos_id=eos)
    pieces = [tokenizer.encode(text) for text in texts(60)]
    doubled = shards_of(tmp_path / "2", tokenizer, ((np.array([eos, *ids, eos]), None) for ids in pieces))
    assert "twice" in seen(doubled, vocabulary).findings[0]
    single = prepare_text(texts(60), tokenizer, tmp_path / "1")
    assert seen(single, vocabulary).findings == []


def test_almost_everything_cut(tmp_path: Path, tokenizer: SLMTokenizer) -> None:
    chat = prepare_chat(talks(40), tokenizer, tmp_path)
    findings = seen(chat, vocabulary_of(tokenizer, len(tokenizer)), length=LENGTH).findings
    assert "end in the middle of a conversation, which is cut there at 128 tokens" in findings[0]


def test_another_tokenizers_shards(tmp_path: Path, tokenizer: SLMTokenizer) -> None:
    other = SLMTokenizer(600)
    other.train([text.upper() for text in texts(100)])
    shards = prepare_text(texts(100), other, tmp_path)
    ours = vocabulary_of(tokenizer, len(tokenizer))
    assert "the tokens were made by tokenizer" in seen(shards, ours).findings[0]
    # Where nobody wrote down whose they are, they give themselves away.
    xray = examine(Stream(PretrainRows(shards, LENGTH), 4), ours)
    assert "come back when their text is tokenized again" in xray.findings[0]
    small = replace(ours, size=300, fingerprint=None)
    assert "beyond the model's vocabulary of 300" in seen(shards, small).findings[0]


def test_validation_text_in_training(tmp_path: Path, tokenizer: SLMTokenizer) -> None:
    everything = texts(120)
    train = prepare_text(everything, tokenizer, tmp_path / "train")
    validation = prepare_text([*everything[:8], *texts(22, seed=9)], tokenizer, tmp_path / "validation")
    xray = seen(train, vocabulary_of(tokenizer, len(tokenizer)), validation)
    assert len(xray.findings) == 1
    assert "of the validation text stands in the training text" in xray.findings[0]
    assert xray.figures["validation text in training"].startswith("26.7% of documents")
    apart = prepare_text([str(list(range(n, n + 60))) for n in range(5)], tokenizer, tmp_path / "apart")
    xray = seen(train, vocabulary_of(tokenizer, len(tokenizer)), apart)
    assert xray.figures["validation text in training"] == "none"
    some = prepare_text([*everything[:1], *texts(29, seed=9)], tokenizer, tmp_path / "some")
    xray = seen(train, vocabulary_of(tokenizer, len(tokenizer)), some)
    assert xray.findings == []
    assert len(xray.notes) == 1


def test_answers_that_contradict_each_other_are_counted(tmp_path: Path, tokenizer: SLMTokenizer) -> None:
    def asked(answer: str) -> list[dict[str, str]]:
        return [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": answer}]

    vocabulary = vocabulary_of(tokenizer, len(tokenizer))
    pairs = [pair_of(asked(good), asked(bad)) for good, bad in (("A.", "B."), ("B.", "A."), ("A.", "C."), ("C.", "D."))]
    rows = PairRows(prepare_chat(pairs, tokenizer, tmp_path / "pairs"), LENGTH)
    (note,) = examine(Stream(rows, 2), vocabulary, [rows.shards], is_padded=True).notes
    assert note.startswith("2 of 4 pairs are there the other way round, too")
    judged = [Judged(asked(text), label) for text, label in (("A.", True), ("A.", False), ("B.", True), ("C.", False))]
    shards = prepare_chat(judged, tokenizer, tmp_path / "judged")
    (note,) = examine(Stream(JudgedRows(shards, LENGTH), 2), vocabulary, [shards], is_padded=True).notes
    assert note.startswith("2 of 4 answers to the same prompt are labelled good in one row and bad in another")
    consistent = prepare_chat(judged[1:], tokenizer, tmp_path / "consistent")
    assert not examine(Stream(JudgedRows(consistent, LENGTH), 2), vocabulary, [consistent], is_padded=True).notes


# -- how it looks, and what it does to a run --------------------------------------------------------------------------


def test_rows_show_what_is_learned(tmp_path: Path, tokenizer: SLMTokenizer) -> None:
    talk = [{"role": "user", "content": "Who are you?"}, {"role": "assistant", "content": "A fox — of course."}]
    xray = seen(prepare_chat([talk] * 2, tokenizer, tmp_path), vocabulary_of(tokenizer, len(tokenizer)), length=100)
    (row,) = rendered_rows(xray.rows, vocabulary_of(tokenizer, len(tokenizer)), count=1)
    assert "⟧A fox — of course.<|im_end|>⟦" in row.plain
    assert "Who are you?" in row.plain
    assert "⟦padding × " in row.plain
    green = [row.plain[span.start : span.end] for span in row.spans if span.style == "green"]
    assert green == ["A fox — of course.<|im_end|>"] * 2


RECIPE = (
    "model.hidden_size=32", "model.intermediate_size=64", "model.num_hidden_layers=1", "tokenizer.vocab_size=600",
    "data.documents=60", "data.validation_documents=10", "train.num_train_epochs=null", "train.max_steps=2",
    "train.device=cpu", "train.sample_tokens=5",
)  # fmt: skip


def test_a_run_with_a_finding_is_not_begun_unless_forced(tmp_path: Path, tokenizer: SLMTokenizer) -> None:
    chat = [f"output_dir={tmp_path}/chat", "objective=sft", "data.source=stories", "train.sequence_length=150"]
    recipe = load_recipe(find_recipe("quickstart-primer"), [*RECIPE, *chat])
    reporter = Silent()
    with pytest.raises(UserError, match=r"training not started: .* cut there at 150 tokens.* --force trains anyway"):
        train_recipe(recipe, reporter)
    assert list(tmp_path.iterdir()) == []
    assert any(str(line).startswith("x-ray: rows") for line in reporter.lines)
    assert "In ⟦brackets⟧" in str(next(line for line in reporter.lines if "⟦" in str(line)))  # before the excerpts
    run = train_recipe(recipe, Silent(), force=True)
    assert (run.root / "latest").exists()
    page = (run.root / "xray.md").read_text(encoding="utf-8")
    assert "**" in page
    assert "⟦" in page


def test_a_script_with_another_tokenizer_is_looked_at_too(tmp_path: Path) -> None:
    from slmkit.data.rows.datasets import TextDataset

    class Words:
        """As little as a script's tokenizer may be."""

        def __len__(self) -> int:
            return 50

        def encode(self, text: str) -> list[int]:
            return [ord(letter) % 50 for letter in text]

        def decode(self, ids: list[int]) -> str:
            return " ".join(map(str, ids))

    dataset = TextDataset(texts(5), Words(), max_length=32)
    said: list = []
    assert check_data(Stream(dataset, 4), Words(), 50, tmp_path, said.append).findings == []
    with pytest.raises(UserError, match="beyond the model's vocabulary of 20"):
        check_data(Stream(dataset, 4), Words(), 20, tmp_path, said.append)


# -- contamination ----------------------------------------------------------------------------------------------------


def test_contamination_counts_whole_documents_and_windows() -> None:
    draw = np.random.default_rng(0)
    train = draw.integers(0, 5_000, 40_000)
    ends = np.arange(100, 40_001, 100)
    fresh = draw.integers(0, 5_000, 8_000)
    mixed = np.concatenate([train[500:2_500], fresh])  # 20 of its 100 documents, a fifth of its windows
    found = contamination(Text(train, ends), Text(mixed, np.arange(100, 10_001, 100)))
    assert found.documents == 0.2
    assert found.windows == pytest.approx(0.2, abs=0.01)
    assert (found.documents_repeated, found.windows_repeated) == (0, 0)
    twice = contamination(Text(np.tile(train, 2), np.arange(100, 80_001, 100)), Text(fresh, np.array([8_000])))
    assert (twice.documents, twice.documents_repeated) == (0, 1)
    assert twice.windows_repeated > 0.99


def test_a_large_text_is_sampled_from_all_over(tmp_path: Path, tokenizer: SLMTokenizer) -> None:
    shards = prepare_text(texts(400), tokenizer, tmp_path)
    assert len(text_of([shards]).ids) == len(shards)
    assert np.array_equal(text_of([shards]).ends, shards.document_ends)
    sample = text_of([shards], limit=12_800)
    assert len(sample.ids) == 12_800
    last = shards.tokens_in(len(shards) - 200, len(shards))
    assert np.array_equal(sample.ids[-200:], last)
    assert contamination(text_of([shards]), sample).windows > 0.5


@pytest.mark.parametrize("spelled", ["<|endoftext|>", "</s>", "<eos>", "<|im_end|>"])
def test_separators_that_are_text_are_a_finding_and_are_shown_unlike_tokens(
    tmp_path: Path, tokenizer: SLMTokenizer, spelled: str
) -> None:
    vocabulary = vocabulary_of(tokenizer, len(tokenizer))
    (tmp_path / "a.txt").write_text("".join(f"{text}{spelled}\n" for text in texts(60)))
    xray = seen(prepare_text(read_documents(tmp_path / "a.txt"), tokenizer, tmp_path / "shards"), vocabulary)
    (finding,) = [finding for finding in xray.findings if spelled in finding]
    assert "at the end of a line, as plain text that ends no document" in finding
    assert "data.separator" in finding
    shown = "".join(row.plain for row in rendered_rows(xray.rows, vocabulary))
    assert f"\\{spelled}" in shown
    source = open_source(SourceSettings(path=str(tmp_path / "a.txt"), separator=spelled))
    taken = [document.text for document, _ in source.read()]
    assert taken == texts(60), "the way out"
    healthy = prepare_text(taken, tokenizer, tmp_path / "healthy")
    assert not seen(healthy, vocabulary).findings
    assert spelled not in "".join(row.plain for row in rendered_rows(seen(healthy, vocabulary).rows, vocabulary)) or (
        spelled in tokenizer.special_tokens
    )


def test_a_text_about_special_tokens_is_let_pass(tmp_path: Path, tokenizer: SLMTokenizer) -> None:
    documents = [f"{text}\nGPT-2 writes <|endoftext|> between its texts, and </s> is Llama's." for text in texts(60)]
    xray = seen(prepare_text(documents, tokenizer, tmp_path / "a"), vocabulary_of(tokenizer, len(tokenizer)))
    assert not xray.findings
