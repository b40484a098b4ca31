"""Generates text, whole or streamed, without incomplete characters, stop tokens and stop strings."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from slmkit.generation.generator import FinishReason, IdStream
from slmkit.generation.language_model import LanguageModel
from slmkit.generation.pieces import StopStrings, WholeCharacters
from slmkit.generation.sampling_settings import SamplingSettings


class TextTokenizer(Protocol):
    """The interface that text generation requires of a tokenizer; ids are [tokens].

    Optional: `eos_token_id` and `stop_token_ids` end a text, `special_tokens` (spelling → id) are not shown,
    `encode_prompt` prepends the tokenizer's own beginning, `known_ids` are the only ids that are drawn.
    """

    def encode(self, text: str) -> list[int]: ...

    def decode(self, ids: Sequence[int]) -> str: ...


@dataclass(frozen=True)
class Continuation:
    """The generated text, without the prompt.

    `tokens` includes the stop token, which is not in the text; `seconds` includes the prefill.
    """

    text: str
    tokens: int
    finish_reason: FinishReason
    seconds: float

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds


class TextStream:
    """Iterates once over the pieces of a text as they are generated; prompt_ids [prompt]. Joined, they are the text.

    Incomplete characters, and text that may begin a stop string, are held back until they are complete.
    `finish_reason` is None until the end. Raises `UserError` for an empty prompt, one that fills the context, and fewer
    than one new token.
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
        """The number of tokens generated so far, stop token included."""
        return self._ids.tokens

    @property
    def seconds(self) -> float:
        """The generation time so far, without the caller's own."""
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
    """Stream the continuation of a plain text; an empty prompt starts a new text.

    The tokenizer's own beginning, such as a beginning-of-text token, is prepended. Raises `UserError` as `TextStream`
    does.
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
    """The whole continuation of `prompt`, generated at once. Raises `UserError` as `TextStream` does."""
    stream = stream_completion(decoder, tokenizer, prompt, settings=settings, max_new_tokens=max_new_tokens, stop=stop)
    text = "".join(stream)
    assert stream.finish_reason is not None, "a stream that has been read to its end knows why it ended"
    return Continuation(text, stream.tokens, stream.finish_reason, stream.seconds)


def _document_start(tokenizer: TextTokenizer) -> list[int]:
    eos_token_id = getattr(tokenizer, "eos_token_id", None)
    return [] if eos_token_id is None else [eos_token_id]
