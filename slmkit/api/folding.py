"""Adapters folded into their model: what `slm merge MODEL --adapter A` stands on."""

from __future__ import annotations

import functools
import json
import logging
import os
import shutil
from collections.abc import Sequence
from pathlib import Path

from slmkit.adapt import fold, load_adapter
from slmkit.adapt.adapter import expect_base, fingerprint, grown_for
from slmkit.config import UserError
from slmkit.find import find_model_directory
from slmkit.model import load_decoder, save_decoder
from slmkit.model.adapter_directory import base_of, find_adapter, is_adapter
from slmkit.model.stored import expect_finite
from slmkit.tokenizer import SLMTokenizer
from slmkit.training.find import free_path


def fold_adapters(model: str | Path, adapters: Sequence[str | Path], output: str | Path | None = None) -> Path:
    """Write `model` with `adapters` folded in, one after another, to a directory of its own, and return that.

    All are directories or runs; the tokenizer is the last adapter's, or else the model's. Without `output` it is beside
    the model. Nothing is left where it fails. Raises `UserError` for what does not fit together, for a model of fewer
    than 16 bits, and where `output` exists.
    """
    directory = find_model_directory(model)
    found = [find_adapter(adapter) for adapter in adapters]
    if is_adapter(directory):
        found, directory = [directory, *found], base_of(directory)
        logging.getLogger(__name__).warning(f"{model}: an adapter, which is folded into {directory} first")
    _expect_full_precision(directory)
    final = Path(output) if output is not None else free_path(f"{str(model).rstrip('/')}-merged")
    if final.exists():
        raise UserError(f"{final}: exists already and is not overwritten: name another --output")
    decoder, config = load_decoder(directory)
    before = functools.cache(functools.partial(fingerprint, decoder))
    for adapter in found:
        expect_base(adapter, before, functools.partial(fingerprint, decoder))
        decoder, config = grown_for(adapter, decoder, config)
        load_adapter(decoder, config, adapter)
        fold(decoder)
    for name, tensor in decoder.state_dict().items():
        expect_finite(tensor, f"{name!r} of the merged model", "an adapter is too large for it: use another checkpoint")
    partial = final.with_name(f".partial-{final.name}")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        save_decoder(decoder, config, partial)
        for source in reversed([directory, *found]):
            if (source / "tokenizer.json").is_file():
                SLMTokenizer.from_pretrained(source).save_pretrained(partial)
                break
        os.replace(partial, final)
    except OSError as error:
        raise UserError(f"{final}: cannot be written: {error}") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return final


def _expect_full_precision(directory: Path) -> None:
    """Raises `UserError` for a model whose weights are in 8 bits or 4."""
    path = directory / "config.json"
    if not path.is_file():
        return
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: not a readable config.json: {error}") from None
    if isinstance(content, dict) and content.get("quantization_config"):
        raise UserError(
            f"{directory}: its weights are quantized, too coarsely for what an adapter learned: name the full model "
            "that it was made from"
        )
