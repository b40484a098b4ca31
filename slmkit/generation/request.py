"""What the engine is asked: a prompt, how to continue it, and which of its tokens to score."""

from __future__ import annotations

import operator
from collections.abc import Sequence, Set
from dataclasses import dataclass, field, replace
from typing import Any

from slmkit.config import UserError
from slmkit.generation.sampling_settings import SamplingSettings

MOST_CONTINUATIONS = 65_536


@dataclass(frozen=True)
class Request:
    """A prompt and how to continue it. Log-probabilities are the model's own, before any sampling rule."""

    prompt: Sequence[int]  # ids [prompt]
    max_new_tokens: int
    settings: SamplingSettings = field(default_factory=SamplingSettings)
    stop_ids: Set[int] = frozenset()  # a token that ends the text
    stop: Sequence[str] = ()  # strings that end the text, and are not part of it
    n: int = 1  # continuations, each with a seed of its own
    grammar: Any = None  # a `constraints.Grammar`: what the text must be
    logprobs: int | None = None  # with each token its log-probability, and those of this many likeliest tokens
    prompt_logprobs: int | None = None  # the same for the prompt, with the first token
    scored_from: int = 1  # place of the first token of the prompt that `prompt_logprobs` has
    prefix_group: str = ""  # the beginning of an earlier text is reused only if that was of the same group


def checked(request: Request, vocab_size: int) -> Request:
    """The request with plain numbers. Raises `UserError` for a value of another type, or out of range."""
    ids = {"prompt": request.prompt, "stop_ids": request.stop_ids}
    found: dict[str, Any] = {}
    for name, values in ids.items():
        try:
            found[name] = [*map(operator.index, values)]
            is_wrong = bool in {*map(type, values)}
        except TypeError:
            is_wrong = True
        if is_wrong:
            raise UserError(f"{name}: expected a list of token ids, found {values!r:.60}")
    for token in (min(found["prompt"], default=0), max(found["prompt"], default=0)):
        if not 0 <= token < vocab_size:
            raise UserError(f"token {token} of the prompt: the model has {vocab_size:,} tokens, from 0")
    bounds = {"max_new_tokens": (0, 2**31), "n": (1, MOST_CONTINUATIONS), "scored_from": (1, 2**31)}
    bounds |= dict.fromkeys(("logprobs", "prompt_logprobs"), (0, vocab_size))
    for name, (least, most) in bounds.items():
        value = getattr(request, name)
        if value is None and name.endswith("logprobs"):
            continue
        try:
            found[name] = operator.index(value)
        except TypeError:
            found[name] = -1
        if isinstance(value, bool) or not least <= found[name] <= most:
            raise UserError(f"{name} {value!r}: expected a whole number from {least} to {most:,}")
    if not isinstance(request.settings, SamplingSettings):
        raise UserError(f"settings: expected SamplingSettings, found {request.settings!r:.60}")
    if request.grammar is not None and not hasattr(request.grammar, "start"):
        raise UserError(f"grammar: expected a constraints.Grammar, found {request.grammar!r:.60}")
    if not isinstance(request.prefix_group, str):
        raise UserError(f"prefix_group: expected text, found {request.prefix_group!r:.60}")
    request.settings.expect_ids_below(vocab_size)
    return replace(request, **found | {"stop_ids": frozenset(found["stop_ids"])})


def check_room(context: int, prompt: int, max_new_tokens: int, scores: bool = False) -> None:
    """Raises `UserError` for an empty prompt, or one without room for a new token, which `scores` do without.

    Where nothing is generated the prompt's last token is scored, but not read, so it may stand behind the context.
    """
    least = 0 if scores else 1
    context += scores and max_new_tokens == 0
    if prompt == 0:
        raise UserError("an empty prompt: give at least one token, such as the end-of-text token")
    if prompt > context - least:
        raise UserError(f"a prompt of {prompt} tokens fills the model's context of {context}: shorten it")
    if max_new_tokens < least:
        raise UserError(f"max_new_tokens {max_new_tokens}: expected {least} or more")
