"""The quickstart's life at a size for a test: primer, stories, talk, and figures beside the perfect ones."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from slmkit.config import UserError
from slmkit.data.prepare.corpus import open_corpus
from slmkit.data.shards.reader import TokenShards
from slmkit.data.sources import WORLDS
from slmkit.data.stories import held_out_questions
from slmkit.data.stream import DocumentRows
from slmkit.device import find_device
from slmkit.evaluation import LossReport, ask, validation_loss
from slmkit.files.find import find_model_directory
from slmkit.model.files.directory import load_decoder
from slmkit.tokenizer import SLMTokenizer
from slmkit.training.recipe.recipe import Recipe, find_recipe, load_recipe
from slmkit.training.run_directory import RunDirectory
from slmkit.workflows import quickstart
from slmkit.workflows.quickstart import EVALUATION, SMALLEST_SHARE, affordable_share, train_quickstart
from slmkit.workflows.train import resume_run, train_recipe

FEW_STEPS = ["train.num_train_epochs=null", "train.tokens_per_step=1024", "train.device=cpu", "train.sample_tokens=5"]


class Silent:
    """A reporter that keeps what it is told."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.counted: dict[str, tuple[int | None, int]] = {}  # of each label its total, and what is done

    def say(self, line: str) -> None:
        self.lines.append(line)

    warn = say

    def counter(self, label: str, total: int | None = None):
        return lambda *done: self.counted.update({label: (total, done[0])})


def evaluated(directory: Path) -> LossReport:
    """Validation loss of a pretraining run's best checkpoint, in float32, every document in full context."""
    run = RunDirectory(directory)
    decoder, config = load_decoder(find_model_directory(directory))
    recipe = load_recipe(run.recipe)
    rows = DocumentRows(
        open_corpus(run.data).validation, recipe.train.sequence_length or config.max_position_embeddings
    )
    return validation_loss(decoder, rows, find_device("cpu", "float32"), separate=recipe.data.separate_documents)


@pytest.fixture(scope="module")
def runs(module_without_plan_and_pictures: None, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    root = tmp_path_factory.mktemp("life")
    sizes = ["model.hidden_size=32", "model.intermediate_size=64", "model.num_hidden_layers=2"]

    def run(part: str, documents: int, steps: int, *overrides: str) -> Path:
        values = [f"output_dir={root}/{part}", f"data.documents={documents}", "data.validation_documents=10"]
        recipe = load_recipe(
            find_recipe(f"quickstart-{part}"), [*values, f"train.max_steps={steps}", *FEW_STEPS, *overrides]
        )
        return train_recipe(recipe, Silent()).root

    primer = run("primer", 80, 10, *sizes, "tokenizer.vocab_size=600")
    stories = run("stories", 80, 20, f"model.path={primer}")
    return stories, run("chat", 30, 4, f"model.path={stories}")


def test_a_run_on_stories_knows_how_far_from_perfect_it_is(runs: tuple[Path, Path]) -> None:
    report = evaluated(runs[0])
    header = TokenShards.open(runs[0] / "data" / "validation").header
    assert header.perfect_loss is not None
    assert report.tokens == header.tokens
    assert 0.1 < header.perfect_loss < report.loss < 6.4  # log 600: it has learned something
    bits_per_byte = report.bits_per_byte(header.text_bytes)
    assert bits_per_byte == pytest.approx(report.nats / 0.693147 / header.text_bytes, rel=1e-4)


def test_fine_tuning_keeps_the_tokenizer_and_learns_the_assistants_tokens_alone(runs: tuple[Path, Path]) -> None:
    base, chat = (SLMTokenizer.from_pretrained(find_model_directory(run)) for run in runs)
    assert base.fingerprint == chat.fingerprint
    shards = TokenShards.open(runs[1] / "data" / "train")
    learned = shards.trained_in(0, len(shards))
    assert 0.3 < learned.mean() < 0.95
    ends = shards.tokens_in(0, len(shards)) == base.end_of_turn_id
    assert learned[ends].sum() < ends.sum()  # the user's turns end too, and that is not learned
    assert learned[ends].any()


def test_held_out_questions_can_be_asked_of_it(runs: tuple[Path, Path]) -> None:
    directory = find_model_directory(runs[1])
    report = ask(load_decoder(directory)[0], SLMTokenizer.from_pretrained(directory), held_out_questions(3))
    assert len(report.answers) == 3
    assert all(answer.expected for answer in report.answers)


def test_a_stopped_run_goes_on_where_it_was(runs: tuple[Path, Path], tmp_path: Path) -> None:
    """A longer recipe in the run's own directory: the steps there are taken as done."""
    import shutil

    copy = tmp_path / "longer"
    shutil.copytree(runs[0], copy, symlinks=True)
    recipe = copy / "recipe.yaml"
    recipe.write_text(recipe.read_text().replace("max_steps: 20", "max_steps: 22"))
    before = (copy / "metrics.jsonl").read_text()
    resume_run(copy, Silent())
    after = (copy / "metrics.jsonl").read_text()
    assert after.startswith(before)
    assert (copy / "latest").resolve().name == "step-000022"


def test_a_slow_machine_reads_less_of_the_stories_and_a_fast_one_all() -> None:
    assert affordable_share(300, primer_seconds=30, parts=6) == 1
    assert affordable_share(5, primer_seconds=180, parts=6) == SMALLEST_SHARE
    slow = affordable_share(250, primer_seconds=50, parts=6)
    assert SMALLEST_SHARE < slow < 1
    assert 50 * slow * 6 == pytest.approx(250 * (1 - EVALUATION))


@pytest.mark.parametrize(("seconds_of_a_step", "world"), [(0.02, "whole"), (0.05, "medium"), (0.2, "small")])
def test_the_speed_of_the_machine_decides_the_size_of_the_world(
    seconds_of_a_step: float, world: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quickstart, "_seconds_of_a_step", lambda world: seconds_of_a_step)
    assert [*quickstart.try_worlds(270)][-1].name == world


def test_every_part_of_a_quickstart_reads_of_its_world() -> None:
    for world in quickstart.SIZES:
        for part in quickstart.PARTS:
            recipe = load_recipe(find_recipe(f"quickstart-{part}"), quickstart._settings(world, part))
            assert WORLDS[str(recipe.data.source)] == world.size
            assert ("primer" in str(recipe.data.source)) == (part == "primer")


def test_a_quickstart_without_the_time_for_anything_says_so_before_it_trains(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quickstart, "_seconds_of_a_step", lambda world: 10.0)
    with pytest.raises(UserError, match=r"--minutes 2: too short on this machine; it needs at least \d+"):
        train_quickstart(tmp_path / "q", 0, 2, Silent())
    assert not (tmp_path / "q").exists()


@pytest.mark.parametrize("step", [0.3, 3.0, 30.0])
@pytest.mark.parametrize("passed", [5.0, 120.0])
def test_the_minutes_that_a_quickstart_advises_are_enough(step: float, passed: float) -> None:
    """At the same speed, with as many seconds passed before the plan: no error with the first, no warning with both."""
    reporter, tried = Silent(), {quickstart.SIZES[-1]: quickstart.PRIMER_STEPS * step}

    def plan(minutes: float) -> None:
        quickstart._tell_the_plan(minutes, 60 * minutes * (1 - quickstart.RESERVE) - passed, tried, reporter)

    with pytest.raises(UserError) as refused:
        plan(0.1)
    plan(float(str(refused.value).split()[-1]))
    (warning,) = (line for line in reporter.lines if "too little time" in line)
    reporter.lines.clear()
    plan(float(warning.split()[-1]))
    assert not any("too little time" in line for line in reporter.lines)


def test_a_quickstart_on_a_machine_that_becomes_slower_stops_each_part_at_its_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first steps promised that all could be read in a second, which is over before the first part is prepared."""
    monkeypatch.setattr(quickstart, "_seconds_of_a_step", lambda world: 1e-6)
    monkeypatch.setattr(quickstart, "FIXED", 0.0)
    load = quickstart.load_recipe
    few = ["data.documents=60", "data.validation_documents=10", "train.sample_prompts=[]", "train.device=cpu"]

    def tiny(path: Path, values: Sequence[str] = ()) -> Recipe:
        sizes = ["model.hidden_size=32", "model.intermediate_size=64", "model.num_hidden_layers=2"]
        return load(path, [*values, *few, *(sizes if path.stem.endswith("primer") else [])])

    monkeypatch.setattr(quickstart, "load_recipe", tiny)
    reporter = Silent()
    trained = train_quickstart(tmp_path / "q", 0, 1 / 60, reporter)
    assert sum("stopped early" in line for line in reporter.lines) >= 2  # the last part may have but one step anyway
    for run in (trained.stories, trained.chat):
        assert find_model_directory(run.root).is_dir()
        assert (run.root / "latest").resolve().name == "step-000001"
    assert all(share <= 1 for share in trained.shares.values())
