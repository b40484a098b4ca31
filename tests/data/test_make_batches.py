"""From the `data` section of a recipe to batches: several sources in shards, what is held out, and mistakes named."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from slmkit.config import UserError, load_settings
from slmkit.data.make_batches import make_batches
from slmkit.data.mixture import plan_phases
from slmkit.data.prepare.corpus import Corpus, build_corpus, open_corpus, texts_of
from slmkit.data.settings import DataSettings, TokenizerSettings
from slmkit.tokenizer import SLMTokenizer
from slmkit.training.recipe.recipe import find_recipe, load_recipe


class Silent:
    def say(self, line: str) -> None: ...

    def counter(self, label: str, total: int | None = None):
        return lambda *counts: None


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two sources that share no letter but the space, so that it shows where a token is from."""
    for name, letters in (("vowels", "aeiou"), ("others", "bcdfg")):
        lines = [f"{letters[n % 5]}{letters[n // 5 % 5]}{letters[n // 25 % 5]} {letters}" * 3 for n in range(300)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    return tmp_path


def settings(folder: Path, **more: object) -> DataSettings:
    sources = [{"path": str(folder / f"{name}.jsonl"), "name": name} for name in ("vowels", "others")]
    return load_settings(DataSettings, {"sources": sources, "validation_fraction": 0.2} | more)


PHASES = [
    {"until_tokens": 1600, "weights": {"vowels": 0.8, "others": 0.2}},
    {"weights": {"vowels": 0.1, "others": 0.9}},
]


def build(data: DataSettings, to: Path) -> Corpus:
    return build_corpus("text", data, TokenizerSettings(), 7, to, SLMTokenizer(260), Silent())


def batches(data: DataSettings, corpus: Corpus):
    return make_batches("text", data, corpus, length=16, rows_per_step=10, seed=7)


def share_of_vowels(stream, steps: range) -> float:
    ids = torch.cat([stream.batch(step).ids.flatten() for step in steps]).tolist()
    text = SLMTokenizer(260).decode(ids, skip_special_tokens=True)
    vowels = sum(text.count(letter) for letter in "aeiou")
    return vowels / (vowels + sum(text.count(letter) for letter in "bcdfg"))


@pytest.mark.parametrize("streaming", [False, True])
def test_what_is_read_follows_the_curriculum(folder: Path, streaming: bool) -> None:
    data = settings(folder, phases=PHASES, streaming=streaming)
    stream = batches(data, build(data, folder / "data"))
    assert share_of_vowels(stream, range(10)) == pytest.approx(0.8, abs=0.02)
    assert stream.shares(10) == {"vowels": 0.8, "others": 0.2}
    assert share_of_vowels(stream, range(10, 50)) == pytest.approx(0.1, abs=0.02)
    assert stream.shares(50)["vowels"] == pytest.approx((80 + 40) / 500, abs=0.01)


@pytest.mark.parametrize("streaming", [False, True])
def test_what_a_run_finds_again_gives_the_same_batches(folder: Path, streaming: bool) -> None:
    data = settings(folder, phases=PHASES, streaming=streaming, shuffle_buffer=20)
    first = batches(data, build(data, folder / "data"))
    given = [first.batch(step) for step in range(30)]
    position = json.loads(json.dumps(first.position()))
    again = batches(data, open_corpus(folder / "data"))
    again.seek(30, position)
    for step in range(30, 80):  # over the border of the phases, and over that of the shorter source's epochs
        assert torch.equal(again.batch(step).ids, first.batch(step).ids)
    assert all(torch.equal(again.batch(step).ids, batch.ids) for step, batch in enumerate(given))


def test_a_stream_leaves_nothing_of_its_training_text_on_disk(folder: Path) -> None:
    data = settings(folder, streaming=True, validation_documents=10)
    corpus = build(data, folder / "data")
    assert corpus.train == []
    assert sorted(path.name for path in (folder / "data").iterdir()) == ["tokenizer", "validation"]
    assert corpus.validation.header.documents == 10


@pytest.mark.parametrize("streaming", [False, True])
def test_both_sources_are_held_out_of_and_what_is_held_out_is_not_trained_on(folder: Path, streaming: bool) -> None:
    texts = [json.loads(line)["text"] for name in ("vowels", "others") for line in (folder / f"{name}.jsonl").open()]
    data = settings(folder, streaming=streaming, validation_documents=10_000, when_exhausted="redistribute")
    corpus = build(data, folder / "data")
    held_out = SLMTokenizer(260).decode(corpus.validation.tokens_in(0, len(corpus.validation)).tolist())
    held = [text for text in texts if text in held_out]
    assert 0.1 < len(held) / len(texts) < 0.3
    assert {text[0] in "aeiou" for text in held} == {True, False}
    stream, read, step = batches(data, corpus), "", 0
    if streaming:  # rows in order: whole documents can be read in them
        stream.rows_per_step = 1
        rows: dict[bool, str] = {True: "", False: ""}
        while stream.has(step):
            ids = stream.batch(step).ids[0].tolist()
            said = SLMTokenizer(260).decode(ids, skip_special_tokens=True)
            rows[any(letter in "aeiou" for letter in said)] += SLMTokenizer(260).decode(ids)
            step += 1
        read = rows[True] + rows[False]
    else:
        read = "".join(SLMTokenizer(260).decode(s.tokens_in(0, len(s)).tolist()) for s in corpus.train)
    ends = "<|endoftext|>"
    assert not [text for text in held if f"{ends}{text}{ends}" in read]
    assert sum(f"{ends}{text}{ends}" in read for text in texts) > 0.7 * len(texts)


def test_a_source_of_its_own_is_validation(folder: Path) -> None:
    data = settings(folder, validation={"path": str(folder / "others.jsonl")}, validation_documents=7, streaming=True)
    assert build(data, folder / "data").validation.header.documents == 7


def test_shards_made_before_are_a_source_and_another_tokenizers_are_refused(folder: Path) -> None:
    made = build(settings(folder), folder / "made")
    paths = [{"name": f"s{n}", "path": str(shards.directory)} for n, shards in enumerate(made.train)]
    data = settings(folder, sources=paths, validation={"path": str(made.validation.directory)})
    corpus = build(data, folder / "run")
    assert [len(shards) for shards in corpus.train] == [len(shards) for shards in made.train]
    batch = batches(data, open_corpus(folder / "run")).batch(3)
    assert torch.equal(batch.ids, batches(data, made).batch(3).ids)
    other = SLMTokenizer(300)
    other.train(["aeiou aeiou bcdfg"] * 20)
    with pytest.raises(UserError, match="and not by this one"):
        build_corpus("text", data, TokenizerSettings(), 7, folder / "other", other, Silent())
    with pytest.raises(UserError, match="tokenizer.path is needed"):
        build_corpus("text", data, TokenizerSettings(), 7, folder / "none", None, Silent())
    with pytest.raises(UserError, match=r"as data\.validation"):
        build(settings(folder, sources=paths), folder / "none")


def test_documents_are_cleaned_before_shards_are_made(folder: Path) -> None:
    cleaned, all_of_it = (
        build(settings(folder, cleaning={"exact_duplicates": on}), folder / f"cleaned-{on}") for on in (True, False)
    )
    texts = set((folder / "vowels.jsonl").read_text().splitlines())
    assert cleaned.train[0].header.documents <= len(texts) < 300
    assert all_of_it.train[0].header.documents > len(texts)


@pytest.mark.parametrize("per_source", [None, 5])
def test_a_tokenizer_learns_from_as_much_of_every_source(
    folder: Path, per_source: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("slmkit.data.prepare.open_sources.TOKENIZER_CHARACTERS", 1000)
    with (folder / "vowels.jsonl").open("a") as file:
        file.write('{"text": "never read"}\n')
    texts = list(texts_of("text", settings(folder), TokenizerSettings(documents_per_source=per_source)))
    vowels = [text for text in texts if text[0] in "aeiou"]
    assert len(texts) == 2 * len(vowels)
    assert len(vowels) == (per_source or -(-500 // len(vowels[0])))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["data.source=stories", "data.sources=[{path: a}]"], "data.source and data.sources contradict each other"),
        (["data.phases=[{weights: {vowel: 1}}]"], "no source is named 'vowel'; did you mean 'vowels'?"),
        (["data.phases=[{weights: {vowels: 0}}]"], "all weights are 0"),
        (["data.phases=[{until_tokens: 9, weights: {vowels: 1}}, {until_tokens: 5, weights: {others: 1}}, "
          "{weights: {others: 1}}]"], "until_tokens 5 is not more than that of the phase before"),
        (["data.streaming=true"], "set train.max_tokens or train.max_steps, and not num_train_epochs"),
        (["data.streaming=true", "train.num_train_epochs=2"], "the length of a stream is not known"),
        (["data.when_exhausted=again"], "data.when_exhausted"),
        (["data.sources=[{path: a, nmae: b}]"], "unknown key 'data.sources.0.nmae'; did you mean 'name'?"),
        (["data.sources=[{path: a, weight: 0}]"], "data.sources.0.weight"),
        (["data.sources=null", "data.sources.0.weight=2"], "has no entry '0': set the whole list"),
        (["data.weight=2"], "unknown key 'data.weight'; did you mean 'data.sources'? (a list: '[{path: a.txt, weight"),
        (["data.columns={prompt: q, completion: q}"], "data.columns: column 'q' is named twice"),
        (["data.text_column=q", "data.messages_column=q"], "data.columns: column 'q' is named twice"),
        (["data.text_column=q", "data.columns={text: a}"], "data.columns: text_column and columns both name"),
        (["data.sources=[{path: a/b}, {path: hf://a/b}]"], "two sources are called 'a/b'"),
    ],
)  # fmt: skip
def test_mistakes_are_named_before_anything_is_read(tmp_path: Path, changes: list[str], message: str) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("data:\n  sources:\n    - {path: v.jsonl, name: vowels}\n    - {path: o.jsonl, name: others}\n")
    with pytest.raises(UserError) as error:
        load_recipe(recipe, changes)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_a_stream_of_too_few_documents_says_how_validation_can_be_had(tmp_path: Path) -> None:
    (tmp_path / "one.txt").write_text("one long text\n" * 50)
    data = DataSettings(source=str(tmp_path / "one.txt"), streaming=True, validation_fraction=0.001)
    with pytest.raises(UserError, match=r"no document was held out .* data\.validation"):
        build(data, tmp_path / "data")


@pytest.mark.parametrize(("name", "code"), [("vector-slm", True), ("vector-clm-50m", False)])
def test_shipped_curricula_are_read_and_begin_with_the_foundation(name: str, code: bool) -> None:
    data = load_recipe(find_recipe(name)).data
    assert set(data.weights) == {"textbooks", "educational"} | ({"web", "code"} if code else set())
    phases = plan_phases(data.phases, data.weights, length=1024)
    foundation = [sum(phase.weights[:2]) / sum(phase.weights) for phase in phases]
    assert foundation[0] == max(foundation) > 0.8
    assert all(sum(phase.weights) == pytest.approx(1) for phase in phases)


@pytest.mark.parametrize("streaming", [False, True])
def test_conversations_of_several_sources(tmp_path: Path, streaming: bool) -> None:
    tokenizer = SLMTokenizer(260)
    for name, letter in (("first", "a"), ("second", "b")):
        rows = [
            [{"role": "user", "content": f"{number}?"}, {"role": "assistant", "content": letter * (3 + number % 4)}]
            for number in range(120)
        ]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps({"messages": row}) + "\n" for row in rows))
    sources = [{"path": str(tmp_path / f"{name}.jsonl"), "name": name} for name in ("first", "second")]
    phases = [{"weights": {"first": 0.25, "second": 0.75}}]
    data = DataSettings(sources=sources, phases=phases, streaming=streaming, validation_documents=8)
    corpus = build_corpus("conversations", data, TokenizerSettings(), 7, tmp_path / "data", tokenizer, Silent())
    stream = make_batches("conversations", data, corpus, length=120, rows_per_step=4, seed=7)
    batches = [stream.batch(step) for step in range(40)]
    assert stream.shares(40) == {"first": 0.25, "second": 0.75}
    learned = torch.cat([batch.labels[batch.labels >= 0] for batch in batches])
    text = tokenizer.decode(learned.tolist(), skip_special_tokens=True)
    assert set(text.replace("\n", "")) == {"a", "b"}
    assert text.count("b") / (text.count("a") + text.count("b")) == pytest.approx(0.75, abs=0.05)
    if streaming:
        assert corpus.validation.header.documents == 8
        assert corpus.validation.header.masked
        again = make_batches("conversations", data, open_corpus(tmp_path / "data"), length=120, rows_per_step=4, seed=7)
        again.seek(40, json.loads(json.dumps(stream.position())))
        assert torch.equal(again.batch(40).labels, stream.batch(40).labels)
