"""`generation_config.json` of a model: ids that end a text, its length, and recommended sampling settings."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import pydantic
from pydantic import Field

from slmkit.config import Settings, UserError, load_settings, read_json_object
from slmkit.model.files.published import HARMLESS

FILE = "generation_config.json"
Id = Annotated[int, Field(ge=0)]
# Ranges of sampling settings, as in transformers; the temperature and the penalty cannot make logits infinite.
Temperature = Annotated[float, Field(ge=0, le=1e6, description="0: greedy")]
TopK = Annotated[int, Field(ge=0, description="0: all tokens")]
TopP = Annotated[float, Field(gt=0, le=1)]
MinP = Annotated[float, Field(ge=0, lt=1)]
TypicalP = Annotated[float, Field(gt=0, le=1)]
Penalty = Annotated[float, Field(ge=0.01, le=100, description="1: none")]


class GenerationAdvice(Settings):
    """The supported keys, with the types and ranges that they have in transformers; others are ignored."""

    model_config = pydantic.ConfigDict(extra="ignore", strict=True)

    eos_token_id: Id | list[Id] | None = None
    pad_token_id: int | None = None
    suppress_tokens: list[Id] | None = None
    max_new_tokens: Annotated[int, Field(gt=0)] | None = None
    max_length: Annotated[int, Field(gt=0)] | None = None
    do_sample: bool | None = None
    temperature: Temperature | None = None
    top_k: TopK | None = None
    top_p: TopP | None = None
    min_p: MinP | None = None
    typical_p: TypicalP | None = None
    repetition_penalty: Penalty | None = None


def read_generation_config(directory: Path) -> dict[str, Any]:
    """The object in a model's `generation_config.json`; empty if there is none.

    Raises `UserError` with the path for a file that is not a JSON object, and for a wrong value of a supported key.
    """
    path = directory / FILE
    if not path.exists():
        return {}
    content = read_json_object(path, "correct or remove it")
    load_settings(GenerationAdvice, content, origin=str(path))
    return content


def new_tokens(content: dict[str, Any], usual: int, prompt: int = 0) -> int:
    """Tokens to generate after `prompt` tokens: `max_new_tokens`, else `usual` within `max_length` for both.

    Raises `UserError` if that leaves none.
    """
    if content.get("max_new_tokens") is not None:
        return int(content["max_new_tokens"])
    whole = content.get("max_length")
    if whole is not None and whole <= prompt:
        raise UserError(
            f"{FILE}: its max_length of {whole} leaves no room after a prompt of {prompt} tokens: give max_new_tokens"
        )
    return usual if whole is None else min(usual, whole - prompt)


def not_obeyed(content: dict[str, Any]) -> list[str]:
    """The unsupported keys whose values would affect generation."""
    others = content.keys() - HARMLESS["generation"] - GenerationAdvice.model_fields.keys()
    neutral = {key for key in others & HARMLESS["neutral_at_one"] if content[key] == 1}
    return sorted(key for key in others - neutral if content[key])
