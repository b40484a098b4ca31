"""Loss, perplexity and bits per byte of a text, with a sliding window.

A window of W tokens moves on by S tokens at a time, the stride, and the model predicts the token after each of its
positions. Only predictions that no earlier window made count, so each token of a text is predicted exactly once: given
W−S+1 to W tokens before it, or all that there are at the beginning. All figures are ratios of sums over all tokens,
never means of windows' means. A stride of W gives the windows of lm-eval's `loglikelihood_rolling`.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from slmkit.config import UserError
from slmkit.evaluation.results import Item, TaskResult
from slmkit.generation.ensemble import LanguageModel, evaluating
from slmkit.generation.sampling import FAULTS
from slmkit.model.sizes import LOGITS_AT_ONCE
from slmkit.tokenizer import SLMTokenizer
from slmkit.tokenizer.encoder import ChatRow

LONGEST_WINDOW = 2048  # tokens of a window by default, for models with a longer context
TOKENS_AT_ONCE = 8_192  # in a batch of windows
SHOWN = 200  # characters of a document in its item
BLOCK = 2_048  # characters of an item, at most, of a text that is one document

Progress = Callable[[int, int], None]  # windows done, and all of them


def text_result(
    decoder: LanguageModel, tokenizer: SLMTokenizer, documents: Sequence[str], *, name: str = "text",
    originals: Sequence[str] | None = None, left_out: Sequence[float] | None = None, window: int | None = None,
    stride: int | None = None, joined: bool = False, start: Sequence[int] | None = None,
    progress: Progress = lambda done, windows: None,
) -> TaskResult:  # fmt: skip
    """Loss (nats per token), perplexity and bits per byte of `documents`, which are the items; of a single one its
    blocks (`blocks_of`) are.

    Each document is read apart, behind the `start` tokens (default: `start_tokens`); with `joined` all are one stream,
    with `start` before each. These tokens are context and not predicted; without any, the first token is not predicted.
    Bytes are the UTF-8 bytes of the documents; if these were changed for the model, those of their `originals`, whose
    words then give `word_perplexity` as well. `left_out`: bytes that each document has in its file besides.

    `window`: tokens read at once, by default the model's context, at most `LONGEST_WINDOW`. `stride`: by default half
    of the window, so that a token is predicted with half a window of context or more, and read twice.

    Raises `UserError` for a window beyond the context, a stride beyond the window, a text without tokens, and as
    `token_losses` does.
    """
    window, stride = window_and_stride(decoder.max_positions, window, stride)
    before = start_tokens(tokenizer) if start is None else [*start]
    encoded = tokenizer.encode_batch(documents)
    tokenizer.check_losses()
    rows = [torch.tensor([*before, *ids], dtype=torch.long) for ids in encoded]  # [tokens] of each document
    joined = joined and len(rows) > 1
    losses = token_losses(decoder, [torch.cat(rows)] if joined else rows, window, stride, progress)
    if joined:
        losses = [*losses[0].split([len(row) for row in rows])]
    # Nothing predicts the first token of a stream.
    scored = [nats[len(before) or int(n == 0 or not joined) :] for n, nats in enumerate(losses)]
    recipe = {
        "documents": "joined" if joined else "each apart", "before_a_document": tokenizer.decode(before),
        **_stated(window, stride, decoder),
    }  # fmt: skip
    texts, sizes = originals or documents, [*(left_out or [0] * len(documents))]
    if len(texts) == 1 and not originals and len(blocks := blocks_of(texts[0])) > 1:
        recipe["items"] = f"blocks of {BLOCK:,} characters"
        lines = [block.count("\n") or 1e-9 for block in blocks]  # what is left out are line ends
        sizes = [sizes[0] * count / math.fsum(lines) for count in lines]
        scored = _by_block(tokenizer, encoded[0], scored[0], blocks)
        texts = blocks
    return _result(name, recipe, texts, scored, originals is not None, sizes)


def blocks_of(text: str) -> list[str]:
    """A text cut before white space into blocks of at most `BLOCK` characters, as good as it goes."""
    return re.findall(rf"(?s).{{1,{BLOCK}}}(?!\S)|.{{1,{BLOCK}}}", text)


def _by_block(tokenizer: SLMTokenizer, ids: np.ndarray, nats: Tensor, blocks: Sequence[str]) -> list[Tensor]:
    """The losses of the tokens that begin in each block. `nats`: of the last of the tokens `ids`, or of all."""
    begins = np.cumsum([0, *(len(tokenizer.token_bytes(one)) for one in ids)])  # [tokens + 1]
    ends = np.cumsum([len(block.encode("utf-8", "surrogatepass")) for block in blocks])
    # A tokenizer that changes the text has other bytes: then in proportion.
    firsts = np.searchsorted(begins[:-1], ends * (begins[-1] / ends[-1])) - (len(ids) - len(nats))
    return [*nats.tensor_split(firsts[:-1].clip(0).tolist())]


def chat_result(
    decoder: LanguageModel, tokenizer: SLMTokenizer, conversations: Sequence[ChatRow], *, name: str = "conversations",
    window: int | None = None, stride: int | None = None,
    progress: Progress = lambda done, windows: None,
) -> TaskResult:  # fmt: skip
    """`text_result` of the learned tokens of conversations, each read apart: the assistant's turns with their ends.

    Bytes are those of the answers, without special tokens. Raises `UserError` as it does.
    """
    window, stride = window_and_stride(decoder.max_positions, window, stride)
    rows = [torch.tensor(row.ids.astype("int64")) for row in conversations]  # [tokens] each
    losses = token_losses(decoder, rows, window, stride, progress)
    learned = [torch.tensor(row.trained)[1:] for row in conversations]  # nothing predicts the first token
    answers = [tokenizer.decode(row[1:][its], skip_special_tokens=True) for row, its in zip(rows, learned)]
    scored = [nats[1:][its] for nats, its in zip(losses, learned)]
    recipe = {"conversations": "each apart", "predicted": "answers", **_stated(window, stride, decoder)}
    return _result(name, recipe, answers, scored, False, [0] * len(answers))


def _stated(window: int, stride: int, decoder: LanguageModel) -> dict[str, Any]:
    context = f"{window - stride + 1} to {window} tokens, fewer at the beginning"
    precision = str(next(decoder.parameters()).dtype).removeprefix("torch.")
    return {"window": window, "stride": stride, "context": context, "precision": precision}


def _result(
    name: str, recipe: dict[str, Any], texts: Sequence[str], scored: Sequence[Tensor], by_word: bool,
    left_out: Sequence[float],
) -> TaskResult:  # fmt: skip
    """Figures of texts, whose bytes and words count, from the losses of their predicted tokens in nats [tokens]."""
    items, errors, digest = [], [], hashlib.sha256()
    for number, (text, nats) in enumerate(zip(texts, scored, strict=True)):
        content = text.encode("utf-8", "surrogatepass")
        digest.update(own := hashlib.sha256(content).digest())
        if not len(nats):
            errors.append(f"document {number + 1}: no token to predict")
            continue
        total = math.fsum(nats.tolist())
        values = dict.fromkeys(("loss", "perplexity"), (total, float(len(nats))))
        values["bits_per_byte"] = total / math.log(2), len(content) + float(left_out[number])
        if by_word:  # words are counted as lm-eval's task `wikitext` does
            values["word_perplexity"] = total, float(len(re.split(r"\s+", text)))
        items.append(Item(f"{number}-{own.hex()[:12]}", values, {"text": text[:SHOWN]}))
    if not items:
        raise UserError(f"{name}: no token to predict: it needs text")
    forms = {"loss": "loss", "perplexity": "exp", "bits_per_byte": "loss", "word_perplexity": "exp"}
    metrics = {metric: form for metric, form in forms.items() if metric in items[0].values}
    data = {"name": name, "sha256": digest.hexdigest(), "documents": 1 if "items" in recipe else len(texts)}
    return TaskResult(name, {"data": data, **recipe}, metrics, tuple(items), tuple(errors))


def window_and_stride(context: int, window: int | None, stride: int | None) -> tuple[int, int]:
    """Window and stride with their defaults. `context`: positions of the model. Raises `UserError` as `text_result`."""
    window = window or min(context, LONGEST_WINDOW)
    stride = stride or max(1, window // 2)
    if window > context:
        raise UserError(
            f"a window of {window:,} tokens: the model reads at most {context:,} tokens at once: lower --window"
        )
    if stride > window:
        raise UserError(f"a stride of {stride:,} tokens is longer than the window of {window:,}: lower --stride")
    return window, stride


def start_tokens(tokenizer: SLMTokenizer) -> list[int]:
    """What stands before a text [tokens]: what the tokenizer itself puts there; if that is nothing, its
    beginning-of-text token, else its end-of-text token, behind which the next document stood in training.
    """
    bos = tokenizer.bos_token_id
    return [*tokenizer.beginning] or [tokenizer.eos_token_id if bos is None else bos]


def windows(tokens: int, window: int, stride: int) -> list[tuple[int, int, int]]:
    """The windows of a stream: (begin, first, end). Tokens begin to end − 1 are read; the predictions that count are of
    tokens first to end. The last window is full too: it begins as early as it can.
    """
    last = tokens - 1
    ends = [min(begin + window, last) for begin in range(0, last, stride)]
    ends = ends[: ends.index(last) + 1] if ends else []  # the others would predict nothing new
    return [(max(0, end - window), ends[k - 1] + 1 if k else 1, end) for k, end in enumerate(ends)]


def token_losses(
    decoder: LanguageModel, streams: Sequence[Tensor], window: int, stride: int,
    progress: Progress = lambda done, windows: None,
) -> list[Tensor]:  # fmt: skip
    """Loss of every token in nats, float64 [tokens] for each of the `streams`, ids [tokens]; 0 for the first token.

    Raises `UserError` for ids beyond the model's vocabulary and for logits that are not finite.
    """
    found = [torch.zeros(len(stream), dtype=torch.float64) for stream in streams]
    if max((int(stream.max()) for stream in streams if len(stream)), default=0) >= decoder.vocab_size:
        raise UserError(f"ids beyond the model's {decoder.vocab_size:,} tokens: the tokenizer is another model's")
    waiting = [(index, *one) for index, stream in enumerate(streams) for one in windows(len(stream), window, stride)]
    # Windows of one length share a batch, so that little of it is padding.
    waiting.sort(key=lambda one: one[1] - one[3])
    done = 0
    while done < len(waiting):
        _, begin, _, end = waiting[done]  # the longest that is left
        batch = waiting[done : done + max(1, TOKENS_AT_ONCE // (end - begin))]
        # Padding stands at the end, where causal attention lets nothing see it.
        ids = pad_sequence([streams[index][begin:end] for index, begin, _, end in batch], batch_first=True)
        wanted = torch.cat([streams[index][first : end + 1] for index, _, first, end in batch]).to(decoder.device)
        with evaluating(decoder):
            states = decoder(ids.to(decoder.device))  # [windows, tokens, width]
            hidden = torch.cat([x[first - 1 - begin : end - begin] for x, (_, begin, first, end) in zip(states, batch)])
            parts = zip(hidden.split(LOGITS_AT_ONCE), wanted.split(LOGITS_AT_ONCE))
            nats = torch.cat([cross_entropy(decoder.logits(part), its) for part, its in parts])
        if not nats.isfinite().all():
            raise UserError(FAULTS[-1])
        for (index, _, first, end), its in zip(batch, nats.split([end + 1 - first for _, _, first, end in batch])):
            found[index][first : end + 1] = its
        done += len(batch)
        progress(done, len(waiting))
    return found


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """logits [n, vocab_size], targets [n] → nats, float64 [n], on the CPU.

    The logarithm of the sum is taken in float64, so that equal logits give log(vocab_size) to 15 digits.
    """
    highest = logits.float().amax(-1, keepdim=True)
    sums = (logits.float() - highest).exp().sum(-1)
    return sums.cpu().double().log() + (highest - logits.gather(-1, targets[:, None]))[:, 0].cpu().double()
