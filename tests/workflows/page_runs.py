"""Small real runs for the tests of the page: text, conversations, pairs and judged answers."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from fastapi import FastAPI

from slmkit.serving.app import add_page
from slmkit.tokenizer import SLMTokenizer
from slmkit.training.recipe.recipe import Recipe, find_recipe, load_recipe
from slmkit.workflows.page_data import PageData
from slmkit.workflows.train import train_recipe
from tests.conftest import leave_out_plan_and_pictures
from tests.test_life import FEW_STEPS, Silent

SIZES = [
    "model.hidden_size=32", "model.intermediate_size=64", "model.num_hidden_layers=1", "tokenizer.vocab_size=600",
    "train.sequence_length=128",
]  # fmt: skip
ANSWERS = {
    "sequence_length": 64, "max_steps": 2, "eval_steps": 2, "logging_steps": 1, "sample_prompts": [], "device": "cpu",
    "precision": "float32",
}  # fmt: skip
SUMS = {"source": "sums", "documents": 12, "validation_documents": 4}


def story_recipe(root: Path, part: str, steps: int, *overrides: str, documents: int = 40) -> Recipe:
    values = [
        f"output_dir={root}", f"data.documents={documents}", "data.validation_documents=6", f"train.max_steps={steps}",
        "train.logging_steps=1", *FEW_STEPS, *overrides,
    ]  # fmt: skip
    return load_recipe(find_recipe(f"quickstart-{part}"), values)


def make_runs(folder: Path, objectives: Sequence[str] = ("dpo", "kto")) -> Path:
    """`stories`, `chat` on top of it, and of `objectives` `answers/dpo` and `answers/kto`, in `folder`."""
    with pytest.MonkeyPatch.context() as patch:
        leave_out_plan_and_pictures(patch)
        first = story_recipe(folder / "stories", "stories", 6, *SIZES, "train.eval_steps=2")
        stories = train_recipe(first, Silent()).root
        chat = [f"model.path={stories}", "train.sequence_length=512", "train.eval_steps=2"]
        train_recipe(story_recipe(folder / "chat", "chat", 4, *chat), Silent())
        for objective in objectives:
            sections = {"objective": objective, "output_dir": str(folder / "answers" / objective), "data": SUMS}
            recipe = Recipe.model_validate(sections | {"model": {"path": str(stories)}, "train": ANSWERS})
            train_recipe(recipe, Silent(), force=True)
    return folder


def page_app(runs: Path, tokenizers: dict[str, SLMTokenizer], data: Path | None = None) -> FastAPI:
    """The page with the functions of the tabs Runs and Data alone."""

    functions = PageData(runs, data, tokenizers).functions()
    app = FastAPI()
    add_page(app, functions | {"about": lambda: {"models": {}}}, contextlib.nullcontext)

    @app.get("/v1/models")
    def models() -> dict[str, Any]:
        return {"object": "list", "data": [{"id": name} for name in tokenizers]}

    return app
