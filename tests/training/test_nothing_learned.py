"""A run from which nothing can be learned ends with the reason, or says so: whatever the objective."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from slmkit import SLMForCausalLM, SLMTrainer
from slmkit.config import UserError
from slmkit.data.batch import Batch
from slmkit.model.files.directory import save_decoder
from slmkit.model.initialization import build_decoder
from slmkit.training.guards import GuardSettings
from slmkit.training.loop import Every, State, train
from slmkit.training.recipe.recipe import Recipe
from slmkit.workflows.grpo import REWARDS
from slmkit.workflows.train import train_recipe
from tests.long import IS_LONG
from tests.test_life import Silent
from tests.training.helpers import TOKENIZER, Changed, config, dataset, plan, state, stream
from tests.training.objectives.test_preference import CONFIG

pytestmark = pytest.mark.usefixtures("without_plan_and_pictures")


class Masked:
    """A stream whose labels are all masked from some step to another."""

    def __init__(self, first: int = 0, last: int = 10**9) -> None:
        self.stream, self.first, self.last = stream(), first, last

    def __getattr__(self, name: str) -> object:
        return getattr(self.stream, name)

    def batch(self, step: int, rank: int = 0, world: int = 1) -> Batch:
        batch = self.stream.batch(step, rank, world)
        return replace(batch, labels=torch.full_like(batch.labels, -100), weight=0) if self.is_masked(step) else batch

    def is_masked(self, step: int) -> bool:
        return self.first <= step < self.last


def nothing(total: torch.Tensor) -> torch.Tensor:
    return total * 0


CASES: dict[str, tuple[Callable[[], State], object, object, str]] = {
    "no gradient": (state, Changed(nothing), stream(), "every gradient is 0"),
    "no label": (state, Changed(lambda total: total), Masked(), "no trained token"),
    **{
        f"no change, {optimizer}, {precision}": (
            lambda optimizer=optimizer, precision=precision: state(
                optimizer=optimizer, precision=precision, learning_rate=1e-30, muon_learning_rate=1e-30
            ),
            Changed(lambda total: total),
            stream(),
            "a learning rate of 1e-30 is too small for weights in torch.",
        )
        for optimizer in ("adamw", "lion", "muon")
        for precision in ("float32", "bfloat16-pure", "bfloat16-master")
        if IS_LONG or optimizer == "adamw" or precision == "float32"
    },
}


@pytest.mark.parametrize("name", CASES)
def test_the_first_steps_that_change_nothing_end_a_run(name: str) -> None:
    make, objective, batches, reason = CASES[name]
    learner = make()
    precision = next((word for word in name.split(", ") if word.startswith("bfloat16")), "float32")
    with pytest.raises(UserError, match=rf"stopped: nothing was learned in the first 10 steps: .*{reason}"):
        train(learner, objective, batches, plan(30, precision=precision))  # type: ignore[arg-type]
    assert learner.step == 10
    patient = replace(plan(30, precision=precision), guard=GuardSettings(max_idle=None))
    learner = train(make(), objective, batches, patient)  # type: ignore[arg-type]
    assert (learner.step, learner.guard.idle, learner.guard.has_learned) == (30, 30, False)


def test_a_run_that_has_learned_goes_on_through_steps_that_teach_nothing_and_counts_them() -> None:
    idle: list[int | None] = []
    learner = state()
    batches = Masked(first=2, last=15)
    hooks = [Every(1, lambda state, report: idle.append(report.get("idle_steps")))]
    train(learner, Changed(lambda total: total), batches, plan(17), hooks)  # type: ignore[arg-type]
    assert idle == [None, None, *range(1, 14), None, None]


def test_a_loss_that_depends_on_nothing_that_is_trained_is_refused() -> None:
    with pytest.raises(UserError, match="the loss does not depend on any weight that is trained"):
        train(state(), Changed(lambda total: total.detach()), stream(), plan(2))


def test_a_model_that_is_frozen_whole_is_refused(tmp_path: Path) -> None:
    model = SLMForCausalLM(config()).requires_grad_(False)
    trainer = SLMTrainer(model.config, model, TOKENIZER, dataset(), output_dir=str(tmp_path / "run"))
    with pytest.raises(UserError, match="nothing is trained: every parameter is frozen"):
        trainer.train(num_epochs=1)


# -- whole runs -------------------------------------------------------------------------------------------------------

TALK = '{"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes."}]}\n'
TRAIN = {
    "sequence_length": 64, "tokens_per_step": 256, "max_steps": 12, "eval_steps": 12, "logging_steps": 1,
    "sample_tokens": 3, "device": "cpu", "precision": "float32",
}  # fmt: skip
ROWS = {
    "sft": TALK.replace('"Yes."}', '"Yes.", "weight": 0}'),
    "dpo": '{"prompt": "Hi", "chosen": "' + "y" * 60 + 'a", "rejected": "' + "y" * 60 + 'b"}\n',
    "kto": '{"prompt": "Hi", "completion": "Yes.", "label": true}\n',
}
SAID = {
    "sft": r"rows\.jsonl: nothing to learn within 64 tokens in any of .* conversations",
    "dpo": "no pair to learn from: .* the same tokens within 64",
    "kto": "all answers are labelled good and none bad",
    "grpo": "nothing was learned in the first 10 steps: every gradient is 0, since all answers to a question get",
    "distill": "is the model of model.path, and with alpha 0 nothing else is learned",
    "pretrain": "nothing was learned in the first 10 steps: no weight changed",
}


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("start")
    save_decoder(build_decoder(CONFIG, 7), CONFIG, root)
    TOKENIZER.save_pretrained(root)
    return root


@pytest.mark.parametrize("objective", SAID)
def test_data_from_which_nothing_can_be_learned_ends_a_run_of_every_objective(
    objective: str, start: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(REWARDS, "same", lambda prompt, answer, known: 1.0)
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(ROWS.get(objective, TALK).replace("Hi", f"Hi {n}") for n in range(40)))
    sections: dict = {
        "objective": objective, "output_dir": str(tmp_path / "run"), "model": {"path": str(start)},
        "data": {"source": str(path) if objective in ROWS else "sums", "documents": 60, "validation_documents": 6},
        "train": dict(TRAIN),
    }  # fmt: skip
    if objective == "grpo":
        sections["grpo"] = {"prompts_per_step": 2, "num_generations": 2, "max_new_tokens": 4, "reward": "same"}
    if objective == "distill":  # by a copy of the student
        sections["distillation"] = {"teacher": str(shutil.copytree(start, tmp_path / "teacher")), "alpha": 0.0}
    if objective == "pretrain":
        sections["train"]["learning_rate"] = 1e-30
    force = objective not in ("sft", "kto")  # a model that knows nothing is not what is looked at here
    with pytest.raises(UserError, match=SAID[objective]):
        train_recipe(Recipe.model_validate(sections), Silent(), force=force)
