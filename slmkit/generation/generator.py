"""Generation for one caller: a batch of ids, or the text of one continuation as it comes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence, Set

import numpy as np
import torch
from torch import Tensor

from slmkit.config import UserError
from slmkit.generation.engine import Engine, Event, FinishReason, Request, check_room
from slmkit.generation.ensemble import LanguageModel
from slmkit.generation.sampling import seed_of
from slmkit.generation.sampling_settings import SamplingSettings
from slmkit.generation.text import TextTokenizer, end_tokens, prompt_ids


def generate_ids(
    decoder: LanguageModel,
    prompts: Tensor,
    *,
    max_new_tokens: int,
    stop_ids: Set[int],
    settings: SamplingSettings,
    pad_token_id: int,
    padding: Tensor | None = None,
    num_return_sequences: int = 1,
    known: np.ndarray | None = None,
) -> Tensor:
    """prompts [batch, prompt] → [batch * num_return_sequences, prompt + new]: prompt, new tokens and the stop token.

    The continuations of one prompt are adjacent. Shorter prompts are left-padded; `padding` [batch] counts the tokens
    to be left out. Ended sequences are filled with `pad_token_id`; generation ends when all have ended or the context
    is full. `known` bool [ids]: ids that may be drawn, none beyond; None: all. Raises `UserError` for an empty prompt,
    one that fills the context, numbers below 1, and logits that are not finite.
    """
    if num_return_sequences < 1:
        raise UserError(f"num_return_sequences {num_return_sequences}: expected 1 or more")
    check_room(decoder.max_positions, prompts.size(1), max_new_tokens)
    # All rows have room for the columns of the longest prompt, its padding included.
    max_new_tokens = min(max_new_tokens, decoder.max_positions - prompts.size(1))
    skipped = [0] * len(prompts) if padding is None else padding.tolist()
    rows = [ids[first:] for ids, first in zip(prompts.tolist(), skipped) for _ in range(num_return_sequences)]
    engine = Engine(decoder, known=known, max_rows=len(rows))
    for number, ids in enumerate(rows):  # the handles count the rows
        seed = None if settings.seed is None else seed_of(settings.seed, number)
        engine.insert(Request(ids, max_new_tokens, settings.model_copy(update={"seed": seed}), stop_ids))
    said: list[list[int]] = [[] for _ in rows]
    for event in _events(engine):
        assert event.token is not None  # without one only if scoring was asked
        said[event.handle].append(event.token)
    longest = max(map(len, said))
    new = [ids + [pad_token_id] * (longest - len(ids)) for ids in said]
    added = torch.tensor(new, dtype=prompts.dtype, device=prompts.device)
    return torch.cat((prompts.repeat_interleave(num_return_sequences, dim=0), added), dim=1)


def _events(engine: Engine) -> Iterator[Event]:
    """All events until the end. Raises `UserError` for a row that ends with an error."""
    while engine.is_busy:
        for event in engine.step():
            if event.error:
                raise UserError(event.error)
            yield event


class TextStream:
    """Iterates once over the pieces of a text as they are generated. Joined, they are the text.

    `prompt` is plain text, before which the tokenizer puts its own beginning, or ids [prompt]. Incomplete characters,
    and text that may begin a stop string, are held back until they are complete. `tokens` counts what was generated,
    stop token included; `finish_reason` is None until the end. Raises `UserError` as `Engine.insert` does.
    """

    def __init__(
        self,
        decoder: LanguageModel,
        tokenizer: TextTokenizer,
        prompt: str | Sequence[int],
        *,
        settings: SamplingSettings,
        max_new_tokens: int,
        stop: Sequence[str] = (),
    ) -> None:
        ids = prompt_ids(tokenizer, prompt) if isinstance(prompt, str) else prompt
        self._engine, self.tokens = Engine(decoder, tokenizer), 0
        self._engine.insert(Request(ids, max_new_tokens, settings, end_tokens(tokenizer), stop))
        self.finish_reason: FinishReason | None = None

    def __iter__(self) -> Iterator[str]:
        for event in _events(self._engine):
            self.tokens, self.finish_reason = self.tokens + 1, event.finish_reason
            if event.text:
                yield event.text
