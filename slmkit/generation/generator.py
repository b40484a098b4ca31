"""The generator: read the prompt once, then one position a step over the KV cache."""

from __future__ import annotations

from collections.abc import Iterator, Set

import torch
from torch import Tensor

from slmkit.config import UserError
from slmkit.generation.sampling import Sampler, SamplingSettings
from slmkit.model import Decoder


def token_steps(
    decoder: Decoder, prompt_ids: Tensor, max_new_tokens: int, settings: SamplingSettings
) -> Iterator[Tensor]:
    """The next token of every row, [batch], up to `max_new_tokens` times or until the context is full.

    prompt_ids [batch, prompt], at least one token each. The caller decides when rows have ended. Raises `UserError`
    for an empty prompt and for one that fills the context.
    """
    context, prompt = decoder.architecture.max_positions, prompt_ids.size(1)
    if prompt == 0:
        raise UserError("a prompt of no tokens: begin with at least one, such as the end-of-text token")
    if prompt >= context:
        raise UserError(f"a prompt of {prompt} tokens fills the model's context of {context}: shorten it")
    max_new_tokens = min(max_new_tokens, context - prompt)
    sampler = Sampler(settings, prompt_ids.device)
    was_training = decoder.training
    decoder.eval()
    try:
        with torch.inference_mode():
            cache = decoder.new_cache(prompt_ids.size(0), prompt + max_new_tokens)
            ids, new = prompt_ids, prompt_ids
            for _ in range(max_new_tokens):
                hidden = decoder(new, cache)[:, -1]  # [batch, width]
                token = sampler(decoder.logits(hidden), ids)  # [batch]
                new = token[:, None]
                ids = torch.cat((ids, new), dim=1)
                yield token
    finally:
        decoder.train(was_training)


def generate_ids(
    decoder: Decoder,
    prompt_ids: Tensor,
    *,
    max_new_tokens: int,
    stop_ids: Set[int],
    settings: SamplingSettings,
    pad_token_id: int,
) -> Tensor:
    """prompt_ids [batch, prompt] → [batch, prompt + new]: the prompt, the new tokens and the one that ended them.

    Rows that have ended are filled with `pad_token_id`; it ends when all have.
    """
    stops = torch.tensor(sorted(stop_ids), device=prompt_ids.device)
    ended = torch.zeros(prompt_ids.size(0), dtype=torch.bool, device=prompt_ids.device)
    columns = []
    for token in token_steps(decoder, prompt_ids, max_new_tokens, settings):
        columns.append(torch.where(ended, pad_token_id, token))
        ended |= torch.isin(token, stops)
        if ended.all():
            break
    return torch.cat((prompt_ids, torch.stack(columns, dim=1)), dim=1)
