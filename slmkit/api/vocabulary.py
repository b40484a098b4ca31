"""A model to start from, and the run's tokenizer: where that has further tokens, the model grows rows for them."""

from __future__ import annotations

from pathlib import Path

from slmkit.config import UserError
from slmkit.find import find_tokenizer_directory
from slmkit.model import Decoder, SLMConfig
from slmkit.model.growth import grow_vocabulary
from slmkit.tokenizer import SLMTokenizer
from slmkit.training.recipe import Recipe


def tokenizer_of_base(recipe: Recipe, base: Path) -> SLMTokenizer:
    """The one in the model's directory, or the one that the recipe names where a model came without."""
    return SLMTokenizer.from_pretrained(
        find_tokenizer_directory(recipe.tokenizer.path) if recipe.tokenizer.path else base
    )


def fit_to_tokenizer(
    decoder: Decoder, config: SLMConfig, before: SLMTokenizer, after: SLMTokenizer
) -> tuple[Decoder, SLMConfig]:
    """The model with a row for every token of `after`, and a config that names what ends a text and a turn now.

    `before` is the tokenizer that the model knows. Raises `UserError` where it is not the model's.
    """
    if len(before) > config.vocab_size:
        raise UserError(
            f"the tokenizer has {len(before):,} tokens and the model rows for {config.vocab_size:,}: it belongs to "
            "another model; set tokenizer.path to this model's tokenizer"
        )
    decoder, config = grow_vocabulary(decoder, config, after.pieces_of_new_tokens(before))
    known = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
    # transformers names id 2 where nobody said anything, which may be any word.
    ends = after.stop_token_ids | {*after.special_tokens.values()}.intersection(known)
    changes = {
        "eos_token_id": sorted(ends) if len(ends) > 1 else min(ends),
        "pad_token_id": after.pad_token_id if config.pad_token_id is None else config.pad_token_id,
        "bos_token_id": config.bos_token_id if after.bos_token_id == before.bos_token_id else after.bos_token_id,
    }
    return decoder, config.model_copy(update=changes)
