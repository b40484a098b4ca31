"""A look inside a model: what it expects at each token, after each layer, and where each head attends.

Hidden states are what the decoder's blocks return. The logit lens applies the model's last norm and head to those of
every layer (nostalgebraist 2020, "interpreting GPT: the logit lens"). Attention weights are what the layer's own
attention returns for values that are the rows of the identity matrix, softmax(scale q·k) I, so masks, windows, caps
and grouped heads are those of the forward pass.

`look`, `lens` and `attention` give the same as small JSON, for the web page. All of it is for one thread at a time,
since hooks on the decoder capture what passes through it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.hooks import RemovableHandle

from slmkit.config import UserError
from slmkit.generation.ensemble import LanguageModel, evaluating
from slmkit.generation.sampling import FAULTS
from slmkit.generation.text import prompt_ids
from slmkit.model.attend import AttentionInputs, attend, dense_mask
from slmkit.model.decoder import Decoder
from slmkit.tokenizer import SLMTokenizer

MOST_TOKENS = 512  # weights of a layer are [heads, tokens, tokens], the lens computes [layers, tokens, vocab_size]
MOST_CHARACTERS = 64 * MOST_TOKENS  # a longer text is refused before it is encoded
MOST_LIKELIEST = 100
POSITIONS_AT_ONCE = 64  # whose logits are in memory at the same time
OVERVIEW = 48  # rows and columns of a head's small map
UNIT = 10_000  # attention weights in JSON are whole numbers of 1/10,000


@dataclass(frozen=True)
class Predictions:
    """What a model expected at each place of a text."""

    probabilities: Tensor  # [tokens - 1], of each token but the first after those before it
    ranks: Tensor  # int [tokens - 1], of the same tokens; 1: none was likelier
    entropies: Tensor  # [tokens], in bits, of the distribution after each token
    likeliest: Tensor  # ids [tokens, k] after each token, the likeliest first
    likeliest_probabilities: Tensor  # [tokens, k]


@dataclass(frozen=True)
class Lens:
    """The logit lens: what each layer's hidden states say about the next token."""

    likeliest: Tensor  # ids [layers, tokens], after each token
    likeliest_probabilities: Tensor  # [layers, tokens]
    probabilities: Tensor  # [layers, tokens - 1], of each token but the first after those before it


def hidden_states(decoder: LanguageModel, ids: Sequence[int]) -> Tensor:
    """ids [tokens] → hidden states after each block, before the last norm  [layers, tokens, width].

    Raises `UserError` for an ensemble, for no ids, more than `MOST_TOKENS` or than the context, and unknown ones.
    """
    plain, found = _expect_decoder(decoder, ids), list[Tensor]()
    _run(plain, ids, [block.register_forward_hook(lambda *call: found.append(call[-1])) for block in plain.blocks])
    return torch.cat(found)


@torch.inference_mode()
def predictions(decoder: LanguageModel, ids: Sequence[int], k: int = 10) -> Predictions:
    """ids [tokens] → `Predictions`. Raises `UserError` as `hidden_states`, and for logits that are not finite."""
    return _predictions(decoder, hidden_states(decoder, ids)[-1], ids, k)


@torch.inference_mode()
def logit_lens(decoder: LanguageModel, ids: Sequence[int]) -> Lens:
    """ids [tokens] → `Lens`. Raises `UserError` as `predictions`."""
    layers = [_predictions(decoder, hidden, ids, 1) for hidden in hidden_states(decoder, ids)]
    return Lens(
        torch.stack([layer.likeliest[:, 0] for layer in layers]),
        torch.stack([layer.likeliest_probabilities[:, 0] for layer in layers]),
        torch.stack([layer.probabilities for layer in layers]),
    )


def attention_weights(decoder: LanguageModel, ids: Sequence[int], layer: int) -> Tensor:
    """ids [tokens] → how much each query attends to each key, float32 [heads, tokens, tokens]; rows sum to one.

    `layer` counts from 0. Raises `UserError` as `hidden_states`, and for a layer that is not there.
    """
    plain, found = _expect_decoder(decoder, ids), list[Tensor]()
    _expect("layer", layer, 0, len(plain.blocks) - 1)

    def weigh(module: Any, arguments: tuple[Tensor, AttentionInputs, None]) -> None:
        x, inputs, _ = arguments
        if inputs.blocks is not None:  # FlexAttention's kernels do not take values of every size
            inputs = replace(inputs, mask=dense_mask(inputs.blocks, x.device), blocks=None)
        q, k, _ = module.queries_keys_values(x, inputs)
        values = torch.eye(k.size(2), dtype=q.dtype, device=q.device).expand(*k.shape[:2], -1, -1)
        found.append(attend(q, k, values, inputs, module.scale, module.cap, 0.0))  # [1, heads, tokens, tokens]

    attention: Any = plain.blocks[layer].attention
    _run(plain, ids, [attention.register_forward_pre_hook(weigh)])
    return found[0][0].float()


def look(
    decoder: LanguageModel,
    tokenizer: SLMTokenizer,
    text: str | None = None,
    messages: Sequence[Mapping[str, Any]] | None = None,
    k: int = 10,
) -> dict[str, Any]:
    """The tokens of a text, or of a conversation as the chat template renders it, and their `Predictions`, as JSON.

    `vocabulary`: every id that occurs, with its `token_spelling`. `answers`: whether a token is the assistant's.
    `windows`: of each layer, in positions; None: the layer sees the whole past. Raises `UserError` as `predictions`
    and `encode_chat`, for neither or both of text and messages, and for more than `MOST_CHARACTERS`.
    """
    if (text is None) == (messages is None):
        raise UserError("look: give either text or messages")
    _expect("k", k, 1, MOST_LIKELIEST)
    if len(text or "") + sum(len(str(message)) for message in messages or ()) > MOST_CHARACTERS:
        raise UserError(f"more than {MOST_CHARACTERS:,} characters: a look inside takes {MOST_TOKENS} tokens at most")
    if messages is not None:
        chat = tokenizer.encode_chat(messages)
        ids, answers = chat.ids, chat.trained
    else:
        ids = prompt_ids(tokenizer, text or "")
        answers = [False] * len(ids)
    found, architecture = predictions(decoder, ids, k), _expect_decoder(decoder, ids).architecture
    return {
        "ids": ids,
        "answers": answers,
        "probabilities": _rounded(found.probabilities.tolist()),
        "ranks": found.ranks.tolist(),
        "entropies": _rounded(found.entropies.tolist()),
        "likeliest": found.likeliest.tolist(),
        "likeliest_probabilities": _rounded(found.likeliest_probabilities.tolist()),
        "vocabulary": {one: token_spelling(tokenizer, one) for one in {*ids, *found.likeliest.flatten().tolist()}},
        "windows": [layer.window for layer in architecture.layers],
        "heads": architecture.heads,
    }


def lens(decoder: LanguageModel, tokenizer: SLMTokenizer, ids: Sequence[int]) -> dict[str, Any]:
    """`logit_lens` as JSON, with the `vocabulary` of its ids as in `look`."""
    found = logit_lens(decoder, ids)
    return {
        "likeliest": found.likeliest.tolist(),
        "likeliest_probabilities": _rounded(found.likeliest_probabilities.tolist()),
        "probabilities": _rounded(found.probabilities.tolist()),
        "vocabulary": {one: token_spelling(tokenizer, one) for one in found.likeliest.flatten().tolist()},
    }


def attention(decoder: LanguageModel, ids: Sequence[int], layer: int, head: int) -> dict[str, Any]:
    """`attention_weights` as JSON, in whole numbers of 1/`UNIT`.

    `weights`: of one head, for each query those of the keys up to it. `maps`: of every head, [rows, columns] with at
    most `OVERVIEW` of each, where a number is the largest weight of its part of the text. Raises `UserError` as
    `attention_weights`, and for a head that is not there.
    """
    weights = attention_weights(decoder, ids, layer)  # [heads, tokens, tokens]
    _expect("head", head, 0, len(weights) - 1)
    maps = F.adaptive_max_pool2d(weights, min(OVERVIEW, len(ids)))  # [heads, rows, columns]
    rows, overview = ((x * UNIT).round().int().tolist() for x in (weights[head], maps))
    return {"weights": [row[: query + 1] for query, row in enumerate(rows)], "maps": overview}


def token_spelling(tokenizer: SLMTokenizer, token: int) -> tuple[str, str]:
    """A token as it can be shown, and its kind: `text`, `special`, `bytes` in hexadecimal, where these are no whole
    characters, or `unused`, an id that only the model has.
    """
    try:
        spelling = tokenizer.token_bytes(token)
    except UserError:
        return str(token), "unused"
    try:
        return spelling.decode(), "special" if token in tokenizer.special_tokens.values() else "text"
    except UnicodeDecodeError:
        return spelling.hex(" ").upper(), "bytes"


def _rounded(values: Any) -> Any:
    """A number, or nested lists of numbers, to four digits."""
    return float(f"{values:.4g}") if isinstance(values, float) else [_rounded(value) for value in values]


def _predictions(decoder: LanguageModel, hidden: Tensor, ids: Sequence[int], k: int) -> Predictions:
    """Hidden states [tokens, width] of a layer → what the last norm and the head make of them."""
    _expect("k", k, 1, decoder.vocab_size)
    parts, norm = list[tuple[Tensor, ...]](), cast(Callable[[Tensor], Tensor], decoder.norm)
    following = torch.tensor([*ids[1:], 0], device=hidden.device)  # [tokens]; after the last one any id
    for states, true in zip(hidden.split(POSITIONS_AT_ONCE), following.split(POSITIONS_AT_ONCE)):
        log_p = decoder.logits(norm(states)).float().log_softmax(-1)  # [positions, vocab_size]
        if not log_p.isfinite().all():
            raise UserError(FAULTS[-1])
        of_true, best = log_p.gather(-1, true[:, None]), log_p.topk(k)
        ranks = (log_p > of_true).sum(-1) + 1
        entropies = -(log_p.exp() * log_p).sum(-1) / math.log(2)
        parts.append((of_true[:, 0].exp(), ranks, entropies, best.indices, best.values.exp()))
    p, ranks, *rest = (torch.cat(part).cpu() for part in zip(*parts))
    return Predictions(p[:-1], ranks[:-1], *rest)


def _expect_decoder(decoder: LanguageModel, ids: Sequence[int]) -> Decoder:
    if not isinstance(decoder, Decoder):
        raise UserError("an ensemble has no layers of its own: look into one of its models")
    if not 1 <= len(ids) <= MOST_TOKENS:
        raise UserError(f"{len(ids):,} tokens: a look inside takes 1 to {MOST_TOKENS}")
    if wrong := [token for token in ids if not 0 <= token < decoder.vocab_size]:
        raise UserError(f"token {wrong[0]}: the model has {decoder.vocab_size:,} tokens, from 0")
    return decoder


def _expect(name: str, value: int, least: int, most: int) -> None:
    if not least <= value <= most:
        raise UserError(f"{name} {value}: expected {least} to {most:,}")


def _run(decoder: Decoder, ids: Sequence[int], hooks: Sequence[RemovableHandle]) -> None:
    """A forward pass with hooks, and without them afterwards."""
    try:
        with evaluating(decoder):
            decoder(torch.tensor([[*ids]], device=decoder.device))
    finally:
        for hook in hooks:
            hook.remove()
