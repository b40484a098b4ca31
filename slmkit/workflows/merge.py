"""`slm merge`: merge models from a recipe, or adapters into a model."""

from __future__ import annotations

import contextlib
import functools
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from slmkit.adapt.adapter import expect_base, fingerprint, load_adapter
from slmkit.adapt.lora import fold
from slmkit.adapt.merge_recipe import MergeRecipe
from slmkit.adapt.merging import Merge, plan_merge
from slmkit.config import UserError, to_yaml
from slmkit.files import free_path, staged
from slmkit.files.find import find_model_directory
from slmkit.files.hub import at_commit
from slmkit.generation.ensemble import common_tokenizer
from slmkit.model.files.adapter_directory import base_of, find_adapter, is_adapter
from slmkit.model.files.directory import copy_extras, load_decoder, save_decoder
from slmkit.model.files.stored import expect_finite
from slmkit.tokenizer import SLMTokenizer

MADE_FROM = "merge.yaml"


def prepare_merge(recipe: MergeRecipe) -> Merge:
    """Find, open and compare the models of a recipe; no weights are read yet.

    Raises `UserError` for a missing model, the first difference between two, and an `output_dir` that is taken.
    """
    # `merge.yaml` names hub models with the commit that was read.
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
    """Write the model directory of a prepared merge atomically. Raises `UserError` if it cannot be written.

    Config, tokenizer and generation settings are those of the first model; `merge.yaml` holds the merge recipe.
    """
    output = Path(merge.recipe.output_dir)
    first = find_model_directory(merge.recipe.merged[0].model)
    with new_directory(output) as folder:
        merge.write(folder, progress)
        copy_extras(first, folder)
        (folder / MADE_FROM).write_text(to_yaml(merge.recipe), encoding="utf-8")
    return output


@contextlib.contextmanager
def new_directory(final: Path) -> Iterator[Path]:
    """Context manager with a folder that becomes `final` at its end, and is deleted if it fails.

    Raises `UserError` if it cannot be written.
    """
    try:
        with staged(final.absolute().parent, final.name) as folder:
            fresh = folder / "done" / final.name
            fresh.mkdir()
            yield fresh
    except OSError as error:
        raise UserError(f"{final}: the model cannot be written: {error}") from None


def merge_adapters(model: str | Path, adapters: Sequence[str | Path], output: str | Path | None = None) -> Path:
    """Write `model` with `adapters` folded in, one after another, to a new directory, and return that.

    All are directories or runs; the tokenizer is the last adapter's, or else the model's. `output` defaults to a
    directory beside the model; it is written atomically. Raises `UserError` for adapters of another model, for a model
    of fewer than 16 bits, and if `output` exists.
    """
    directory = find_model_directory(model)
    found = [find_adapter(adapter) for adapter in adapters]
    if is_adapter(directory):
        found, directory = [directory, *found], base_of(directory)
        logging.getLogger(__name__).warning(f"{model}: an adapter, which is folded into {directory} first")
    final = Path(output) if output is not None else free_path(f"{str(model).rstrip('/')}-merged")
    if final.exists():
        raise UserError(f"{final}: exists already and is not overwritten: name another --output")
    decoder, config = load_decoder(directory)
    before = functools.cache(functools.partial(fingerprint, decoder))
    for adapter in found:
        expect_base(adapter, before, functools.partial(fingerprint, decoder))
        decoder, config, _ = load_adapter(decoder, config, adapter)
        fold(decoder)
    for name, tensor in decoder.state_dict().items():
        expect_finite(tensor, f"{name!r} of the merged model", "an adapter is too large for it: use another checkpoint")
    with new_directory(final) as folder:
        save_decoder(decoder, config, folder)
        source = next((each for each in reversed([directory, *found]) if (each / "tokenizer.json").is_file()), None)
        if source is not None:
            SLMTokenizer.from_pretrained(source).save_pretrained(folder)
    return final
