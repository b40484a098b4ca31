"""The generator: prefill of the prompt, then one token per step with the KV cache."""

from __future__ import annotations

from collections.abc import Iterator, Sequence, Set
from contextlib import contextmanager
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from slmkit.config import UserError
from slmkit.generation.ensemble import LanguageModel
from slmkit.generation.sampling import Sampler
from slmkit.generation.sampling_settings import SamplingSettings

# A stop token or string, `max_new_tokens` reached, or the model's context is full.
FinishReason = Literal["stop", "length", "context"]


def room_after(decoder: LanguageModel, prompt: int, max_new_tokens: int) -> tuple[int, FinishReason]:
    """The number of tokens that can follow a prompt of `prompt` tokens, and the finish reason when all are used.

    Raises `UserError` for an empty prompt, one that fills the context, and fewer than one new token.
    """
    context = decoder.max_positions
    if prompt == 0:
        raise UserError("an empty prompt: give at least one token, such as the end-of-text token")
    if prompt >= context:
        raise UserError(f"a prompt of {prompt} tokens fills the model's context of {context}: shorten it")
    if max_new_tokens < 1:
        raise UserError(f"max_new_tokens {max_new_tokens}: expected 1 or more")
    room = context - prompt
    return (max_new_tokens, "length") if max_new_tokens <= room else (room, "context")


def token_steps(
    decoder: LanguageModel,
    prompt_ids: Tensor,
    count: int,
    settings: SamplingSettings,
    padding: Tensor | None = None,
    num_return_sequences: int = 1,
    known: np.ndarray | None = None,
) -> Iterator[Tensor]:
    """prompt_ids [batch, prompt] → yields the next token per sequence [batch * num_return_sequences], `count` times.

    `padding` [batch]: padding tokens at the left of each sequence. `known` bool [ids]: ids that may be drawn, none
    beyond; None: all. A prompt is read once, and the sequences that continue it are adjacent in the batch. The caller
    detects ended sequences. The model's mode and torch's gradient mode are restored before each yield, so the caller
    may train or generate between steps, or stop early.
    """
    sampler = Sampler(settings, prompt_ids.device, known)
    cache = decoder.new_cache(prompt_ids.size(0), prompt_ids.size(1) + count, padding)
    new, ids = prompt_ids, _own_tokens(prompt_ids, padding)
    for number in range(count):
        with _evaluating(decoder):
            hidden = decoder(new, cache)[:, -1]  # [batch, width]
            if number == 0 and num_return_sequences > 1:
                cache.repeat(num_return_sequences)
                hidden, ids = (rows.repeat_interleave(num_return_sequences, dim=0) for rows in (hidden, ids))
            token = sampler(decoder.logits(hidden), ids)  # [batch * num_return_sequences]
            new = token[:, None]
            ids = torch.cat((ids, new), dim=1)
        yield token


def _own_tokens(ids: Tensor, padding: Tensor | None) -> Tensor:
    """ids [batch, sequence], padding replaced by the first token after it, so the repetition penalty ignores it."""
    if padding is None:
        return ids
    columns = torch.arange(ids.size(1), device=ids.device)
    return ids.gather(1, torch.maximum(columns, padding[:, None]))


@contextmanager
def _evaluating(decoder: LanguageModel) -> Iterator[None]:
    """Evaluation and inference mode; visits no module of a model that is in evaluation mode, to save time."""
    was_training = decoder.training
    if was_training:
        decoder.eval()
    try:
        with torch.inference_mode():
            yield
    finally:
        if was_training:
            decoder.train()


def generate_ids(
    decoder: LanguageModel,
    prompt_ids: Tensor,
    *,
    max_new_tokens: int,
    stop_ids: Set[int],
    settings: SamplingSettings,
    pad_token_id: int,
    padding: Tensor | None = None,
    num_return_sequences: int = 1,
    known: np.ndarray | None = None,
) -> Tensor:
    """prompt_ids [batch, prompt] → [batch * num_return_sequences, prompt + new]: prompt, new tokens and the stop token.

    The continuations of one prompt are adjacent. Shorter prompts are left-padded; `padding` [batch] counts the tokens
    to be masked. Ended sequences are filled with `pad_token_id`; generation ends when all have ended or the context is
    full. `known` bool [ids] as in `token_steps`. Raises `UserError` as `room_after` does, and for fewer than one
    sequence.
    """
    if num_return_sequences < 1:
        raise UserError(f"num_return_sequences {num_return_sequences}: expected 1 or more")
    count, _ = room_after(decoder, prompt_ids.size(1), max_new_tokens)
    prompt_rows = prompt_ids.repeat_interleave(num_return_sequences, dim=0)
    stops = torch.tensor(sorted(stop_ids), dtype=torch.long, device=prompt_ids.device)
    ended = torch.zeros(prompt_rows.size(0), dtype=torch.bool, device=prompt_ids.device)
    columns = [prompt_rows]
    for token in token_steps(decoder, prompt_ids, count, settings, padding, num_return_sequences, known):
        columns.append(torch.where(ended, pad_token_id, token)[:, None])
        ended |= torch.isin(token, stops)
        if ended.all():
            break
    return torch.cat(columns, dim=1)


class IdStream:
    """Iterates once over the new ids of one sequence, prompt_ids [prompt], as they are generated, stop token included.

    `tokens` counts them; `finish_reason` is None until the end. `known` bool [ids] as in `token_steps`. Raises
    `UserError` as `room_after` does.
    """

    def __init__(
        self,
        decoder: LanguageModel,
        prompt_ids: Sequence[int],
        *,
        max_new_tokens: int,
        stop_ids: Set[int],
        settings: SamplingSettings,
        known: np.ndarray | None = None,
    ) -> None:
        count, self._reason_at_the_end = room_after(decoder, len(prompt_ids), max_new_tokens)
        prompt = torch.tensor([list(prompt_ids)], dtype=torch.long, device=decoder.device)
        self._steps = token_steps(decoder, prompt, count, settings, known=known)
        self._stop_ids, self.tokens = stop_ids, 0
        self.finish_reason: FinishReason | None = None

    def __iter__(self) -> Iterator[int]:
        for step in self._steps:
            token = int(step)
            self.tokens += 1
            if token in self._stop_ids:
                self.finish_reason = "stop"
            yield token
            if self.finish_reason:
                return
        self.finish_reason = self._reason_at_the_end
