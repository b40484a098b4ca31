"""Text out of a model, as it comes: whole characters only, and nothing of what ends it."""

from __future__ import annotations

import codecs
from collections.abc import Iterator, Sequence, Set
from dataclasses import dataclass

import torch

from slmkit.generation.generator import token_steps
from slmkit.generation.sampling import SamplingSettings
from slmkit.model import Decoder
from slmkit.tokenizer import SLMTokenizer


@dataclass(frozen=True)
class Continuation:
    """What was generated, without the prompt. `finish_reason`: stop (an end token or stop string) or length."""

    text: str
    tokens: int
    finish_reason: str


class TextStream:
    """Iterates over the pieces of an answer; once through, `tokens` and `finish_reason` are known.

    Bytes that are no whole character yet, and text that may be the beginning of a stop string, are held back until
    it is clear what they are.
    """

    def __init__(
        self,
        decoder: Decoder,
        tokenizer: SLMTokenizer,
        prompt_ids: Sequence[int],
        settings: SamplingSettings,
        max_new_tokens: int,
        stop: Sequence[str] = (),
        stop_ids: Set[int] | None = None,
    ) -> None:
        self.tokenizer = tokenizer
        self.stop = [text for text in stop if text]
        self.stop_ids = tokenizer.stop_token_ids if stop_ids is None else stop_ids
        self.tokens, self.finish_reason = 0, "length"
        prompt = torch.tensor([list(prompt_ids)], dtype=torch.long, device=decoder.embedding.weight.device)
        self._steps = token_steps(decoder, prompt, max_new_tokens, settings)

    def __iter__(self) -> Iterator[str]:
        utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        held = ""
        try:
            for step in self._steps:
                token = int(step[0])
                self.tokens += 1
                if token in self.stop_ids:
                    self.finish_reason = "stop"
                    break
                held += utf8.decode(self.tokenizer.token_bytes(token))
                end = self._first_stop(held)
                if end is not None:
                    self.finish_reason = "stop"
                    if end:
                        yield held[:end]
                    return
                ready = len(held) - self._may_begin_a_stop(held)
                if ready:
                    yield held[:ready]
                    held = held[ready:]
        finally:
            self._steps.close()  # type: ignore[attr-defined]  # puts the model back into the mode it was in
        held += utf8.decode(b"", final=True)
        if held:
            yield held

    def _first_stop(self, text: str) -> int | None:
        return min((place for stop in self.stop if (place := text.find(stop)) >= 0), default=None)

    def _may_begin_a_stop(self, text: str) -> int:
        """How many last characters of `text` are the beginning of a stop string."""
        longest = min(len(text), max((len(stop) for stop in self.stop), default=1) - 1)
        return next((n for n in range(longest, 0, -1) if any(stop.startswith(text[-n:]) for stop in self.stop)), 0)


def stream_completion(
    decoder: Decoder,
    tokenizer: SLMTokenizer,
    prompt: str,
    *,
    settings: SamplingSettings,
    max_new_tokens: int,
    stop: Sequence[str] = (),
) -> TextStream:
    """Continue a plain text. An empty prompt lets the model begin.

    The end-of-text token stands in front, since it stood before every document the model was trained on.
    """
    ids = [tokenizer.eos_token_id, *tokenizer.encode(prompt)]
    return TextStream(decoder, tokenizer, ids, settings, max_new_tokens, stop)


def complete(
    decoder: Decoder,
    tokenizer: SLMTokenizer,
    prompt: str,
    *,
    settings: SamplingSettings,
    max_new_tokens: int,
    stop: Sequence[str] = (),
) -> Continuation:
    """All of what `stream_completion` streams, at once."""
    stream = stream_completion(decoder, tokenizer, prompt, settings=settings, max_new_tokens=max_new_tokens, stop=stop)
    text = "".join(stream)
    return Continuation(text, stream.tokens, stream.finish_reason)
