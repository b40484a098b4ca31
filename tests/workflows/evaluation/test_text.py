"""WikiText by name and by its look, with the figures of lm-eval's task `wikitext` on the same pages."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from slmkit.config import UserError, load_settings
from slmkit.data.sources.settings import SourceSettings
from slmkit.evaluation.perplexity import text_result
from slmkit.evaluation.results import TaskResult
from slmkit.tokenizer import SLMTokenizer
from slmkit.workflows.evaluation import text as module
from slmkit.workflows.evaluation.evaluate import evaluate
from slmkit.workflows.evaluation.text import ON_THE_HUB, find_text, pages_of, read_text
from tests.evaluation.known_models import uniform
from tests.real_data import real_data
from tests.workflows.evaluation.small_model import write_model

PAGE = ' = The @-@ Fox = \n \n A fox , 10 @,@ 000 of them . \n = = Life = = \n \n It \'s " old " . \n'
OTHER = " = Hens ( birds ) = \n \n Two hens = one hen = more . \n"
PAGES = 3  # of the real file, and characters of each
CHARACTERS = 2_500


def source(path: Path | str, **more: Any) -> SourceSettings:
    return load_settings(SourceSettings, {**find_text(str(path)), **more}, [])


def test_pages_are_cut_at_titles_and_cleaned_and_the_originals_are_kept(tmp_path: Path) -> None:
    pytest.importorskip("lm_eval")
    (tmp_path / "wiki.txt").write_text(f" \n{PAGE} \n{OTHER}")
    found = read_text(source(tmp_path / "wiki.txt"))
    assert found.originals == [f"{PAGE} \n", OTHER]
    assert found.documents[0].startswith(' = The-Fox =\n\nA fox, 10,000 of them.\n== Life ==\n\nIt\'s "old".')
    assert any("cleaned by lm-eval's wikitext" in note for note in found.notes)
    assert read_text(source(tmp_path / "wiki.txt"), limit=1).originals == [f"{PAGE} \n"]


def test_other_texts_are_left_as_they_are(tmp_path: Path) -> None:
    text = "Sums:\n = 1 + 1 = \n are two .\n"
    (tmp_path / "text.txt").write_text(text)
    found = read_text(source(tmp_path / "text.txt"))
    assert (found.documents, found.originals, found.notes) == ([text], None, [])
    long = "word " * 40_000  # sources give it in pieces
    (tmp_path / "long.txt").write_text(f"{long}\n<|endoftext|>\nshort\n<|endoftext|>\n")
    assert read_text(source(tmp_path / "long.txt")).documents == [long, "short"]
    assert read_text(source(tmp_path / "long.txt"), limit=1).documents == [long]


@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_bytes_are_those_of_the_file(tmp_path: Path, end: str, mark: str) -> None:
    """Of a model that is uniform over V: bits per byte = tokens · log2 V / bytes of the file."""
    tokenizer, file = SLMTokenizer(260), tmp_path / "text.txt"
    line = f"A fox, ein Füchslein, 狐.{end}"

    def bits(**options: Any) -> tuple[float, TaskResult]:
        found = read_text(source(file), **options)
        model = uniform(260, context=1024)
        result = text_result(model, tokenizer, found.documents, left_out=found.left_out)
        return sum(map(len, map(tokenizer.encode, found.documents))) * 8.0, result

    for lines in (3, 400):  # one item, and several blocks
        file.write_bytes((mark + line * lines).encode())
        total, result = bits()
        size = file.stat().st_size
        ratio = total / 8 * math.log2(260) / size
        assert result.score("bits_per_byte").value == pytest.approx(ratio, abs=1e-9)
        assert (result.score("bits_per_byte").standard_error is None) is (lines == 3)
    _, part = bits(limit=2)
    assert len(part.items) == 2
    whole = {item.id: item.values["bits_per_byte"][1] for item in result.items}
    assert [whole[item.id] for item in part.items] == [item.values["bits_per_byte"][1] for item in part.items]
    file.write_bytes((mark + f"<|endoftext|>{end}".join([line * 2, line])).encode())
    _, apart = bits()
    assert [item.values["bits_per_byte"][1] for item in apart.items] == pytest.approx(
        [len(mark.encode()) + len(line.encode()) * 2 - len(end), len(line.encode())]
    )
    (first,) = bits(limit=1)[1].items
    assert first == apart.items[0]


def test_a_folder_of_that_name_means_its_test_file_and_the_name_alone_the_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert find_text("wikitext-2") == ON_THE_HUB
    folder = tmp_path / "wikitext-2"
    folder.mkdir()
    (folder / "wiki.test.raw").write_text(PAGE)
    with pytest.raises(UserError, match="rename it so"):
        find_text("wikitext-2")
    for name in ("train.txt", "test.txt", "valid.txt"):
        (folder / name).write_text(PAGE)
    assert find_text("wikitext-2") == {"path": "wikitext-2/test.txt", "name": "wikitext-2"}
    assert find_text(str(folder))["path"] == str(folder / "test.txt")
    assert find_text("book.txt") == {"path": "book.txt"}


def test_without_lm_eval_it_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "wiki.txt").write_text(PAGE)
    module.detokenizer.cache_clear()
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install slmkit\[eval\]"):
        read_text(source(tmp_path / "wiki.txt"))


def test_the_real_file_has_62_pages() -> None:
    """As many as the data set has that lm-eval reads."""
    text = real_data("wikitext-2/test.txt").read_text()
    pages = pages_of(text)
    assert len(pages) == 62
    assert "".join(pages) == text.lstrip("\n").removeprefix(" \n")


@pytest.mark.parametrize(("begins_twice", "tolerance"), [(False, 1e-5), (True, 1e-3)])
def test_the_figures_are_those_of_lm_eval(tmp_path: Path, begins_twice: bool, tolerance: float) -> None:
    """Word perplexity and bits per byte of lm-eval's task by its Hugging Face backend, on some pages of the real file.

    Its `loglikelihood_rolling` has disjoint windows of the whole context. By default that backend also predicts the
    beginning token of a tokenizer that begins texts itself, one token a page; with `add_bos_token=False` it does not.
    """
    pytest.importorskip("lm_eval")
    from datasets import Dataset
    from lm_eval.api.task import ConfigurableTask
    from lm_eval.evaluator import evaluate as evaluate_tasks
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks._yaml_loader import load_yaml
    from transformers import AutoModelForCausalLM, AutoTokenizer

    pages = [page[:CHARACTERS] for page in pages_of(real_data("wikitext-2/test.txt").read_text())[:PAGES]]
    (tmp_path / "test.txt").write_text("\n".join(pages))
    read, model = pages_of((tmp_path / "test.txt").read_text()), write_model(tmp_path / "model")
    config = load_yaml(Path(module.detokenizer().__code__.co_filename).with_name("wikitext.yaml"))
    config |= {"custom_dataset": lambda **_: {"test": Dataset.from_list([{"page": page} for page in read])}}
    task = ConfigurableTask(config=config | {"training_split": None, "validation_split": None})
    lm = HFLM(
        pretrained=AutoModelForCausalLM.from_pretrained(model), tokenizer=AutoTokenizer.from_pretrained(model),
        batch_size=1, max_length=256, add_bos_token=None if begins_twice else False,
    )  # fmt: skip
    found = evaluate_tasks(lm, {"tasks": {"wikitext": task}}, bootstrap_iters=0)["results"]["wikitext"]

    (ours,) = evaluate(model, text=[source(tmp_path / "test.txt")], window=256, stride=256, device="cpu", cache=False)
    assert len(ours.items) == PAGES
    bits, words = ours.score("bits_per_byte").value, ours.score("word_perplexity").value
    assert bits == pytest.approx(found["bits_per_byte,none"], rel=tolerance)
    assert 2**bits == pytest.approx(found["byte_perplexity,none"], rel=6 * tolerance)  # e^x has the error of x, times x
    assert math.log(words) == pytest.approx(math.log(found["word_perplexity,none"]), rel=tolerance)
    (sliding,) = evaluate(model, text=[source(tmp_path / "test.txt")], window=256, device="cpu", cache=False)
    assert abs(sliding.score("bits_per_byte").value / bits - 1) > 1e-4  # more context gives other figures
