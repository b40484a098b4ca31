"""Comparing models that are known to be equal, and models that are known to differ."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path
from typing import Any

import pytest

from slmkit.config import UserError
from slmkit.data import stories
from slmkit.data.sources.settings import SourceSettings
from slmkit.evaluation.intervals import estimate, paired
from slmkit.evaluation.results import Item, TaskResult
from slmkit.model.config import SLMConfig
from slmkit.model.files.directory import save_decoder
from slmkit.model.initialization import build_decoder
from slmkit.tokenizer import SLMTokenizer
from slmkit.workflows.evaluation.compare import Comparison, compare, compare_results, draw, read_results, table
from slmkit.workflows.evaluation.evaluate import evaluate, uses_chat
from tests.adapt.trained import SHAPE, TOKENIZER, trained_decoder
from tests.export.small_model import small_config, small_tokenizer

QUESTIONS = 24


def write_files(folder: Path) -> None:
    """Stories as documents, and questions on how a sentence goes on: with its words, or with their letters mixed."""
    told = [story.text for story in stories.tell_many(77, 20)]
    (folder / "stories.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in told))
    mix, rows = random.Random(0), []
    for number in range(QUESTIONS):
        words = told[number % 20].split()[number : number + 12]
        ending = " ".join(words[6:])
        choices = ["".join(mix.sample(ending, len(ending))).strip() for _ in range(4)]
        choices[number % 4] = ending
        rows.append({"query": " ".join(words[:6]), "choices": choices, "gold": number % 4})
    (folder / "tasks").mkdir()
    (folder / "tasks" / "hellaswag.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("compare")
    write_files(folder)
    for name, decoder in (("trained", trained_decoder(30)), ("random", build_decoder(SHAPE, seed=9))):
        save_decoder(decoder, SHAPE, folder / name)
        TOKENIZER.save_pretrained(folder / name)
    shutil.copytree(folder / "trained", folder / "same")
    save_decoder(build_decoder(small_config(), seed=1), small_config(), folder / "other-tokens")
    small_tokenizer().save_pretrained(folder / "other-tokens")
    return folder


@pytest.fixture(scope="module")
def results(folder: Path) -> dict[str, list[TaskResult]]:
    text = SourceSettings(path=str(folder / "stories.jsonl"), name="stories")
    return {
        name: evaluate(
            folder / name, text=[text], tasks=["hellaswag"], task_data=folder / "tasks", device="cpu", cache=False
        )
        for name in ("trained", "same", "random", "other-tokens")
    }


@pytest.fixture(scope="module")
def found(results: dict[str, list[TaskResult]]) -> Comparison:
    return compare_results([*results], [*results.values()])


def test_each_model_is_compared_with_the_first_on_each_task(found: Comparison) -> None:
    assert [(row.model, row.task, row.metric) for row in found.rows] == [
        (model, task, metric)
        for model in (1, 2, 3)
        for task, metric in (("stories", "bits_per_byte"), ("hellaswag", "acc_norm"))
    ]
    assert [row.difference.n for row in found.rows] == [20, QUESTIONS] * 3


def test_the_same_weights_in_two_directories_do_not_differ(found: Comparison) -> None:
    for row in found.rows[:2]:
        assert row.first == row.second
        assert (row.difference.value, row.difference.standard_error, row.p) == (0, 0, 1)
        assert row.verdict == "no difference shown: the same on every item"


def test_a_trained_model_is_better_than_a_random_one(found: Comparison) -> None:
    bits, right = found.rows[2:4]
    assert bits.difference.value > 2  # 8.1 bits of a byte by chance, below 4 after the training
    assert right.difference.value < -0.3
    for row in (bits, right):
        assert row.p is not None
        assert row.p < 0.05
        assert row.verdict == "A is better"


def test_the_order_of_the_models_turns_the_signs(found: Comparison, results: dict[str, list[TaskResult]]) -> None:
    turned = compare_results(["random", "trained"], [results["random"], results["trained"]])
    for row, before in zip(turned.rows, found.rows[2:4]):
        assert row.difference.value == -before.difference.value
        assert row.difference.low == pytest.approx(-before.difference.high)  # type: ignore[operator]
        assert (row.first, row.second, row.verdict) == (before.second, before.first, "B is better")


def test_models_with_different_tokenizers_are_compared_in_bits_per_byte(
    found: Comparison, results: dict[str, list[TaskResult]]
) -> None:
    bits, one, other = found.rows[4], results["trained"][0], results["other-tokens"][0]
    assert (bits.metric, bits.verdict) == ("bits_per_byte", "A is better")
    assert bits.first == estimate(one, "bits_per_byte")
    for metric in ("loss", "perplexity"):
        with pytest.raises(UserError, match="compare the bits per byte"):
            paired(one, other, metric)
    assert "A and D: window 128 and 192" in found.notes


def test_models_are_evaluated_with_the_same_settings(folder: Path, results: dict[str, list[TaskResult]]) -> None:
    seen, text = set[str](), SourceSettings(path=str(folder / "stories.jsonl"), name="stories")
    models = [str(folder / name) for name in ("trained", "random")]
    found = compare(
        models, progress=lambda model, *done: seen.add(model), text=[text], limit=3, window=64, stride=64,
        device="cpu", cache=False,
    )  # fmt: skip
    assert seen == {*models}
    assert [(row.task, row.difference.n, row.verdict) for row in found.rows] == [("stories", 3, "A is better")]
    assert found.notes == ()
    assert found.rows[0].first.value > estimate(results["trained"][0], "bits_per_byte").value  # less context


def answers(right: str, task: str = "task", **recipe: Any) -> TaskResult:
    """A result on questions 0, 1, …: `1` for a right answer, `0` for a wrong one, a space for one that is missing."""
    items = [Item(str(number), {"acc": (float(one), 1.0)}, {}) for number, one in enumerate(right) if one != " "]
    return TaskResult(task, recipe, {"acc": "mean"}, tuple(items))


def test_a_model_that_does_not_chat_and_one_that_does_get_the_same_prompts(folder: Path, tmp_path: Path) -> None:
    plain, chats = tmp_path / "plain", folder / "trained"
    shutil.copytree(chats, plain, ignore=shutil.ignore_patterns("*.jinja"))
    tokenizer = SLMTokenizer.from_pretrained(chats)
    tokenizer.chat_template = None
    tokenizer.save_pretrained(plain)
    assert [uses_chat(model, "auto") for model in (plain, chats)] == [False, True]
    base = tmp_path / "base"  # has a template, but its texts do not end at an end of turn
    shutil.copytree(chats, base)
    config = SLMConfig.from_pretrained(base).model_copy(update={"eos_token_id": 0, "generation_config": {}})
    save_decoder(build_decoder(config, seed=1), config, base)
    assert not uses_chat(base, "auto")
    assert uses_chat(base, "chat")
    settings = {"tasks": ["hellaswag"], "task_data": folder / "tasks", "limit": 6, "device": "cpu", "cache": False}
    (row,) = compare([str(chats), str(plain)], progress=lambda *done: None, **settings).rows
    assert (row.recipe["template"], row.difference.value) == ("none", 0)
    (row,) = compare([str(chats)] * 2, progress=lambda *done: None, **settings).rows
    assert row.recipe["template"] != "none"


def test_what_only_one_model_has_is_said() -> None:
    first = [answers("1101101101"), answers("11", "another")]
    found = compare_results(["a", "b"], [first, [answers("110110  01", new_tokens=5)]])
    assert found.rows[0].difference.n == 8
    assert found.notes == (
        "A and B: only one of them has another",
        "A and B: new_tokens None and 5",
        "A and B: task: left out 2 items that only one of them has",
    )


def test_other_shots_are_refused_and_nothing_to_compare_too() -> None:
    with pytest.raises(UserError, match="task: not comparable: shots 0 and 5"):
        compare_results(["a", "b"], [[answers("10", shots=0)], [answers("11", shots=5)]])
    with pytest.raises(UserError, match="nothing to compare; A and B: only one of them has"):
        compare_results(["a", "b"], [[answers("10", "x")], [answers("11", "y")]])
    unanswered = TaskResult("task", {}, {}, (), ("no room",) * 2)
    with pytest.raises(UserError, match="answered none of its items"):
        compare_results(["a", "b"], [[answers("10")], [unanswered]])
    with pytest.raises(UserError, match="expected 2 to 26 models"):
        compare_results(["a"], [[answers("10")]])


def test_the_more_tasks_the_less_is_shown() -> None:
    """Six changes in one direction have p = 0.031: shown alone, not among others."""
    one, better = answers("000000" + "1" * 30), answers("111111" + "1" * 30)
    alone = compare_results(["a", "b"], [[one], [better]])
    assert (alone.rows[0].p, alone.rows[0].verdict) == (pytest.approx(2 / 2**6), "B is better")
    others = [answers("1010", f"other {number}") for number in range(3)]
    among = compare_results(["a", "b"], [[one, *others], [better, *others]])
    assert among.rows[0].difference == alone.rows[0].difference
    assert among.rows[0].p == pytest.approx(4 * 2 / 2**6)
    needed = among.rows[0].difference.items_needed(4)
    assert needed is not None
    assert among.rows[0].verdict.startswith("no difference shown; would take about ")
    assert table(among)[1][0][-2] == "0.125"


def test_the_table_has_no_zero_plus_minus_zero() -> None:
    _, (row,) = table(compare_results(["a", "b"], [[answers("0" * 164)], [answers("0" * 164)]]))
    assert row == [
        "task", "acc", "164", "0.0 % (0.0 to 2.3)", "0.0 % (0.0 to 2.3)", "+0.0", "-1.7 to +1.7", "1.000",
        "no difference shown: the same on every item",
    ]  # fmt: skip
    _, (row,) = table(compare_results(["a", "b"], [[answers("1")], [answers("0")]]))
    assert row[3:] == ["100.0 %", "0.0 %", "-100.0", "", "", "not tested: fewer than two items"]


def test_results_are_read_from_files(tmp_path: Path) -> None:
    one, other, path = answers("0101", shots=1), answers("1111", shots=1), tmp_path / "a.json"
    path.write_text(json.dumps({"results": [{"model": "runs/a", **one.to_json()}]}))
    (tmp_path / "b.json").write_text(json.dumps({"results": [{"model": "runs/a", **other.to_json()}]}))
    labels, results = read_results([path, tmp_path / "b.json"])
    assert labels == [f"{path}: runs/a", f"{tmp_path / 'b.json'}: runs/a"]
    assert results == [[one], [other]]
    for content in ("{", "[]", '{"results": [{"model": "a", "task": "b"}]}', "\udcff"):
        path.write_text(content, errors="surrogateescape")
        with pytest.raises(UserError, match=f"{path}: "):
            read_results([path])
    with pytest.raises(UserError, match=r"nothing\.json"):
        read_results([tmp_path / "nothing.json"])


def test_pictures_of_one_and_of_many_tasks(found: Comparison, tmp_path: Path) -> None:
    from matplotlib.image import imread

    one = compare_results(["a" * 300, "b" * 300], [[answers("0101")], [answers("1111")]])
    tasks = [f"a task with a long name that does not end for a while, number {number}" for number in range(20)]
    many = compare_results(["a", "b", "c"], [[answers("0110", task) for task in tasks]] * 3)
    heights = []
    for name, comparison in (("one", one), ("both", found), ("many", many)):
        draw(comparison, tmp_path / f"{name}.png")
        image = imread(tmp_path / f"{name}.png")  # [height, width, 4]
        assert image.shape[1] == 1080
        assert image[:, :5, :3].min() > 0.9, "the labels are not cut off at the left edge"
        heights.append(image.shape[0])
    assert heights[0] < 500 < heights[1] < heights[2]
    assert [path.name for path in tmp_path.iterdir() if "tmp" in path.name] == []
