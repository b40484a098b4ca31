"""What a recipe's data section makes of the built-in corpus."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from slmkit.data.prepare.corpus import DataSettings, TokenizerSettings, build_corpus
from slmkit.data.sources import source
from slmkit.data.sources.files import File
from slmkit.data.stories import primer_texts, tell_many
from slmkit.tokenizer import SLMTokenizer
from tests.data.prepare.test_text_to_shards import documents_in


class Silent:
    def say(self, line: str) -> None: ...

    def counter(self, label: str, total: int | None = None):
        return lambda *done: None


def texts(folder: Path, **data: object) -> tuple[list[str], list[str]]:
    """The training and the validation documents, decoded from the shards."""
    tokenizer = SLMTokenizer(vocab_size=300)
    settings = DataSettings(validation_documents=3, **data)
    corpus = build_corpus("text", settings, TokenizerSettings(), 7, folder, tokenizer, Silent())
    train, validation = (
        [tokenizer.decode(ids[:-1]) for ids in documents_in(shards)] for shards in (*corpus.train, corpus.validation)
    )
    return train, validation


def test_stories_alone(tmp_path: Path) -> None:
    train, validation = texts(tmp_path, source="stories", documents=12)
    assert train == [story.text for story in tell_many(7, 12)]
    assert not set(train) & set(validation)


def test_the_primer_alone(tmp_path: Path) -> None:
    train, validation = texts(tmp_path, source="primer", documents=12)
    assert train == list(primer_texts(7, 12))
    assert not set(train) & set(validation)


def test_texts_with_questions_lie_evenly_among_the_stories_and_not_in_validation(tmp_path: Path) -> None:
    train, validation = texts(tmp_path, source="stories", documents=12, primer_documents=4)
    stories = [story.text for story in tell_many(7, 12)]
    primer = [index for index, text in enumerate(train) if text not in stories]
    assert primer == [3, 7, 11, 15]
    assert [text for text in train if text in stories] == stories
    assert all("?" in train[index] for index in primer)
    assert not {train[index] for index in primer} & set(primer_texts(7, 500))
    told = [any(train[index].startswith(story.text) for story in tell_many(7 + 500_009, 4)) for index in primer]
    assert told == [True, False, True, False]
    assert len(validation) == 3
    assert validation == texts(tmp_path / "without", source="stories", documents=12)[1]


def times_read(path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> float:
    """How often the characters of a file are read while a tokenizer is trained on it and its shards are made."""
    read, text_documents = Counter[str](), source.text_documents

    def counted(file: File, *arguments: object) -> Iterator[object]:
        for item, position in text_documents(file, *arguments):
            read[file.name] += len(item.text)
            yield item, position

    monkeypatch.setattr(source, "text_documents", counted)
    data = DataSettings(source=str(path))
    build_corpus("text", data, TokenizerSettings(vocab_size=300), 0, folder / "data", None, Silent())
    return read[str(path)] / len(path.read_text())


def test_a_text_is_read_twice_also_when_a_tokenizer_is_trained_on_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stories = [story.text for story in tell_many(7, 400)]
    for name, between in (("long.txt", "\n"), ("many.txt", "\n<|endoftext|>\n")):
        path = tmp_path / name
        path.write_text(between.join(stories))
        assert times_read(path, tmp_path / path.stem, monkeypatch) <= 2
