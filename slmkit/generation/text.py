"""Text out of a model, as it comes: whole characters only, and nothing of what ends it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from slmkit.generation.generator import FinishReason, IdStream
from slmkit.generation.language_model import LanguageModel
from slmkit.generation.pieces import StopStrings, WholeCharacters
from slmkit.generation.sampling_settings import SamplingSettings


class TextTokenizer(Protocol):
    """What generating text needs of a tokenizer.

    Where there are, `eos_token_id` and `stop_token_ids` end a text, `special_tokens` (spelling → id) are never shown,
    `encode_prompt` puts before a text what this tokenizer puts there, and no id is drawn that `known_ids` has not.
    """

    def encode(self, text: str) -> list[int]: ...

    def decode(self, ids: Sequence[int]) -> str: ...


@dataclass(frozen=True)
class Continuation:
    """What was generated, without the prompt.

    `tokens` includes the one that ended it, which is not in the text; `seconds` includes reading the prompt.
    """

    text: str
    tokens: int
    finish_reason: FinishReason
    seconds: float

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds


class TextStream:
    """Iterates once over the pieces of a text as they come. Together they are the text.

    Bytes that are no whole character yet, and text that may be the beginning of a stop string, are held back until
    it is clear what they are. `finish_reason` is known at the end, and None until then. Raises `UserError` for an
    empty prompt, one that fills the context, and fewer than one new token.
    """

    def __init__(
        self,
        decoder: LanguageModel,
        tokenizer: TextTokenizer,
        prompt_ids: Sequence[int],
        *,
        settings: SamplingSettings,
        max_new_tokens: int,
        stop: Sequence[str] = (),
    ) -> None:
        stop_ids = {*getattr(tokenizer, "stop_token_ids", ()), *_document_start(tokenizer)}
        self._hidden = {*stop_ids, *getattr(tokenizer, "special_tokens", {}).values()}
        self._stops = StopStrings(stop)
        before = [token for token in prompt_ids[-1:] if token not in self._hidden]
        self._characters = WholeCharacters(tokenizer.decode, before)
        self._ids = IdStream(
            decoder,
            prompt_ids,
            max_new_tokens=max_new_tokens,
            stop_ids=stop_ids,
            settings=settings,
            known=getattr(tokenizer, "known_ids", None),
        )
        self.finish_reason: FinishReason | None = None

    @property
    def tokens(self) -> int:
        """How many tokens were generated so far, the one that ended the text included."""
        return self._ids.tokens

    @property
    def seconds(self) -> float:
        """How long that took, without what was done with the pieces meanwhile."""
        return self._ids.seconds

    def __iter__(self) -> Iterator[str]:
        held = ""
        for piece in self._decoded():
            held += piece
            end = self._stops.find(held)
            if end is not None:
                self.finish_reason = "stop"
                if end:
                    yield held[:end]
                return
            ready = len(held) - self._stops.may_begin(held)
            if ready:
                yield held[:ready]
                held = held[ready:]
        self.finish_reason = self._ids.finish_reason
        if held:
            yield held

    def _decoded(self) -> Iterator[str]:
        for token in self._ids:
            if token not in self._hidden:
                yield self._characters.add(token)
        yield self._characters.rest()


def stream_completion(
    decoder: LanguageModel,
    tokenizer: TextTokenizer,
    prompt: str,
    *,
    settings: SamplingSettings,
    max_new_tokens: int,
    stop: Sequence[str] = (),
) -> TextStream:
    """Continue a plain text. An empty prompt lets the model begin.

    In front stands what the tokenizer itself puts there, such as a beginning-of-text token. Raises `UserError` as
    `TextStream` does.
    """
    encode = getattr(tokenizer, "encode_prompt", None)
    ids = encode(prompt) if encode else [*_document_start(tokenizer), *tokenizer.encode(prompt)]
    return TextStream(decoder, tokenizer, ids, settings=settings, max_new_tokens=max_new_tokens, stop=stop)


def complete(
    decoder: LanguageModel,
    tokenizer: TextTokenizer,
    prompt: str,
    *,
    settings: SamplingSettings,
    max_new_tokens: int,
    stop: Sequence[str] = (),
) -> Continuation:
    """All of what `stream_completion` streams, at once."""
    stream = stream_completion(decoder, tokenizer, prompt, settings=settings, max_new_tokens=max_new_tokens, stop=stop)
    text = "".join(stream)
    assert stream.finish_reason is not None, "a stream that has been read to its end knows why it ended"
    return Continuation(text, stream.tokens, stream.finish_reason, stream.seconds)


def _document_start(tokenizer: TextTokenizer) -> list[int]:
    eos_token_id = getattr(tokenizer, "eos_token_id", None)
    return [] if eos_token_id is None else [eos_token_id]
