"""Merging models from a recipe: what `slm merge RECIPE` stands on."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

from slmkit.adapt.merge_recipe import MergeRecipe
from slmkit.adapt.merging import Merge, plan_merge
from slmkit.config import UserError, to_yaml
from slmkit.find import find_model_directory
from slmkit.generation import common_tokenizer
from slmkit.hub import at_commit
from slmkit.model.adapter_directory import base_of, is_adapter
from slmkit.training.files import sync

# What goes along from the first of the models: how text becomes ids, and how it is generated from.
COMPANIONS = (
    "tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "merges.txt", "tokenizer.model", "generation_config.json",
)  # fmt: skip
MADE_FROM = "merge.yaml"


def prepare_merge(recipe: MergeRecipe) -> Merge:
    """Find, open and compare the models of a recipe; no weights are read yet.

    Raises `UserError` for a missing model, the first difference between two, and an `output_dir` that is taken.
    """
    # What is written beside the result names models of the hub with the commit that was read.
    models = [entry.model_copy(update={"model": at_commit(entry.model)}) for entry in recipe.models]
    base = None if recipe.base_model is None else at_commit(recipe.base_model)
    recipe = recipe.model_copy(update={"models": models, "base_model": base})
    directories = {name: find_model_directory(name) for name in recipe.names}
    for name, directory in directories.items():
        if is_adapter(directory):
            raise UserError(
                f"{name}: an adapter; only whole models can be merged: "
                f"fold it in first with `slm merge {base_of(directory)} --adapter {name}`"
            )
    if os.path.lexists(recipe.output_dir):
        raise UserError(f"{recipe.output_dir}: exists already and is not overwritten: name another output_dir")
    merge = plan_merge(recipe, directories)
    common_tokenizer([directories[recipe.merged[0].model], *directories.values()])
    return merge


def write_merge(merge: Merge, progress: Callable[[int], None] = lambda written: None) -> Path:
    """Write the model directory of a prepared merge; it is there whole or not at all. Raises `UserError`.

    Config, tokenizer and generation settings are those of the first of the models; `merge.yaml` beside them says how
    the model was made.
    """
    output = Path(merge.recipe.output_dir)
    first = find_model_directory(merge.recipe.merged[0].model)
    fresh = output.parent / f".{output.name}.{os.getpid()}"
    try:
        fresh.mkdir(parents=True)
        merge.write(fresh, progress)
        for name in COMPANIONS:
            if (first / name).is_file():
                shutil.copyfile(first / name, fresh / name)
        (fresh / MADE_FROM).write_text(to_yaml(merge.recipe), encoding="utf-8")
        for path in fresh.iterdir():
            sync(path)
        os.rename(fresh, output)
        sync(output.parent)
    except OSError as error:
        raise UserError(f"{output}: the model cannot be written: {error.strerror or error}") from None
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
    return output
