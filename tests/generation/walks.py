"""Walks over the tokens that a grammar allows, and the tokenizers they are made with."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from slmkit.config import UserError
from slmkit.generation.constraints import Grammar
from slmkit.tokenizer import SLMTokenizer
from tests.tokenizer.conftest import TEXTS
from tests.tokenizer.kinds import directory_of

JSON = ['{"name": "Anna", "age": 33, "tags": ["a", "b"], "more": {"is": true, "none": null, "x": -1.5}}', '":', '","']
Bias = Callable[[bytes], float]


def byte_level_tokenizer() -> SLMTokenizer:
    tokenizer = SLMTokenizer(400)
    tokenizer.train([*TEXTS, *JSON * 40])
    return tokenizer


def tokenizer_of(kind: str, folder: Path) -> SLMTokenizer:
    return SLMTokenizer.from_pretrained(directory_of(kind, folder))


def walk(grammar: Grammar, tokenizer: SLMTokenizer, seed: int, bias: Bias | None = None, most: int = 3000) -> str:
    """The text of random allowed tokens, drawn with the logits of `bias`, up to a stop token or the only end."""
    matcher, random, ids = grammar.start(), np.random.default_rng(seed), list[int]()
    logits = np.array([bias(token) if bias else 0.0 for token in grammar.vocabulary.tokens])
    while not matcher.is_done:
        allowed = np.flatnonzero(matcher.allowed().numpy())
        noisy = logits[allowed] + random.gumbel(size=len(allowed))
        token = int(allowed[noisy.argmax()])
        matcher.accept(token)
        if token not in tokenizer.stop_token_ids:
            ids.append(token)
        assert len(ids) < most, tokenizer.decode(ids)[:200]
    return tokenizer.decode_bytes(ids).decode("utf-8")


def accepts(grammar: Grammar, ids: list[int]) -> bool:
    """Whether the ids are a whole text of the grammar."""
    matcher = grammar.start()
    try:
        for token in ids:
            matcher.accept(token)
    except UserError:
        return False
    return matcher.may_end


def refusal(call: Callable[[], Any]) -> str:
    with pytest.raises(UserError) as raised:
        call()
    text = str(raised.value)
    assert "\n" not in text
    assert len(text) < 600
    return text
