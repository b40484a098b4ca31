"""The starting model of a run: new weights, a trained model, or an adapter; and how it is saved."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from slmkit.adapt.load import load_model, start_adapter
from slmkit.adapt.quantize import expect_full
from slmkit.config import UserError
from slmkit.data.prepare.corpus import Corpus, Reporter, build_corpus
from slmkit.files.find import find_tokenizer_directory
from slmkit.files.hub import at_commit
from slmkit.model.config import SLMConfig
from slmkit.model.decoder import Decoder
from slmkit.model.files.adapter_directory import is_adapter
from slmkit.model.initialization import build_decoder, grow_vocabulary
from slmkit.tokenizer import SLMTokenizer
from slmkit.training.checkpoints.checkpoint import ModelFiles, WholeModel
from slmkit.training.recipe.recipe import Recipe


class StartingModel(NamedTuple):
    """A run's model before its first step, and how it is saved."""

    decoder: Decoder
    config: SLMConfig
    files: ModelFiles


def model_for(
    recipe: Recipe, tokenizer: SLMTokenizer, base: Path | None, shape: SLMConfig | None = None
) -> StartingModel:
    """A new model with the tokenizer's vocabulary, or `base` with the tokens added that it lacks.

    With `lora` it is an adapter of `base`. `shape` is the config of the new model, if it has been built already.
    """
    if base is None:
        return _new_model(recipe, shape or recipe.model.build_config(), tokenizer)
    if recipe.lora is not None:
        return _adapter(recipe, tokenizer, base)
    decoder, config = load_model(base)
    expect_full(decoder, f"{base}: only an adapter (lora) can be trained on it")
    model, config = fit_to_tokenizer(
        decoder, config, tokenizer_of_base(recipe, base), tokenizer, _ends(recipe, tokenizer)
    )
    return StartingModel(model, config, WholeModel(config))


def at_commits(recipe: Recipe) -> Recipe:
    """The recipe with the commit of each hub model that it names, so that a resumed run uses the same ones."""
    changes: dict[str, Any] = {}
    for section, key in (("model", "path"), ("tokenizer", "path"), ("distillation", "teacher")):
        settings = getattr(recipe, section)
        if settings is not None and getattr(settings, key):
            changes[section] = settings.model_copy(update={key: at_commit(getattr(settings, key))})
    return recipe.model_copy(update=changes)


def _new_model(recipe: Recipe, shape: SLMConfig, tokenizer: SLMTokenizer) -> StartingModel:
    """A new model with the tokenizer's vocabulary, or a larger `model.vocab_size`. Raises `UserError` on conflict."""
    known: dict[str, Any] = {
        "vocab_size": max(len(tokenizer), recipe.model.changes.get("vocab_size", 0)),
        "eos_token_id": _listed(_ends(recipe, tokenizer)),
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id,
    }
    for name, value in known.items():
        given = recipe.model.changes.get(name)
        if given is not None and value not in (given, [given]):
            found = "the tokenizer has none" if value is None else f"the tokenizer's {value}"
            raise UserError(f"model.{name} is {given} and {found}: remove it from the recipe (a run's: recipe.yaml)")
    config = shape.model_copy(update=known)
    return StartingModel(build_decoder(config, recipe.seed, recipe.model.initialization), config, WholeModel(config))


def _adapter(recipe: Recipe, tokenizer: SLMTokenizer, base: Path) -> StartingModel:
    """A new adapter for `base`, or the adapter in `base`. With new tokens it includes embedding and head."""
    assert recipe.lora is not None
    before = tokenizer_of_base(recipe, base)
    if not tokenizer.pieces_of_new_tokens(before):
        return StartingModel(*start_adapter(base, recipe.lora, recipe.seed))
    if is_adapter(base):
        raise UserError(
            f"{base}: an adapter, and the recipe adds tokens, which need larger embeddings: merge it first "
            "with `slm merge`, and name the result in model.path"
        )
    saved = [*recipe.lora.modules_to_save, "embedding", "head"]
    settings = recipe.lora.model_copy(update={"modules_to_save": saved})
    return StartingModel(
        *start_adapter(
            base, settings, recipe.seed,
            lambda decoder, config: fit_to_tokenizer(decoder, config, before, tokenizer, _ends(recipe, tokenizer)),
        )
    )  # fmt: skip


def _ends(recipe: Recipe, tokenizer: SLMTokenizer) -> set[int]:
    """Ids that end what the model writes: an end of turn only if it learns one. By this a copy of it is known later."""
    return {tokenizer.eos_token_id} if recipe.reads == "text" else tokenizer.stop_token_ids


def _listed(ids: set[int]) -> int | list[int]:
    return sorted(ids) if len(ids) > 1 else min(ids)


def prepare_data(recipe: Recipe, folder: Path, base: Path | None, reporter: Reporter) -> tuple[Corpus, SLMConfig, int]:
    """The corpus of a run, made in `folder`; the config of its model before tokens are added; and tokens of a row.

    `base` is the directory of the model that is trained on, None for a new one.
    """
    tokenizer = tokenizer_of_base(recipe, base) if base else None
    shape = SLMConfig.from_pretrained(base) if base else recipe.model.build_config()
    length = recipe.train.sequence_length or shape.max_position_embeddings
    corpus = build_corpus(recipe.reads, recipe.data, recipe.tokenizer, recipe.seed, folder, tokenizer, reporter, length)
    return corpus, shape, length


def tokenizer_of_base(recipe: Recipe, base: Path) -> SLMTokenizer:
    """The tokenizer in the model's directory, or the recipe's if there is none."""
    return SLMTokenizer.from_pretrained(
        find_tokenizer_directory(recipe.tokenizer.path) if recipe.tokenizer.path else base
    )


def fit_to_tokenizer(
    decoder: Decoder, config: SLMConfig, before: SLMTokenizer, after: SLMTokenizer, learned_ends: set[int]
) -> tuple[Decoder, SLMConfig]:
    """The model with a row for every token of `after`, and a config whose ids that end texts and turns are the
    `learned_ends` and those that it had.

    `before` is the model's present tokenizer. Raises `UserError` if it does not match the model.
    """
    if len(before) > config.vocab_size:
        raise UserError(
            f"the tokenizer has {len(before):,} tokens and the model rows for {config.vocab_size:,}: it belongs to "
            "another model; set tokenizer.path to this model's tokenizer"
        )
    decoder, config = grow_vocabulary(decoder, config, after.pieces_of_new_tokens(before))
    known = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
    # transformers defaults to id 2, which may be any word.
    ends = learned_ends | {*after.special_tokens.values()}.intersection(known)
    changes = {
        "eos_token_id": _listed(ends),
        "pad_token_id": after.pad_token_id if config.pad_token_id is None else config.pad_token_id,
        "bos_token_id": config.bos_token_id if after.bos_token_id == before.bos_token_id else after.bos_token_id,
    }
    return decoder, config.model_copy(update=changes)
