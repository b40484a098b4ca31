"""Streams generated text, without incomplete characters, stop tokens and stop strings."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

from slmkit.config import UserError
from slmkit.generation.ensemble import LanguageModel
from slmkit.generation.generator import FinishReason, IdStream
from slmkit.generation.sampling_settings import SamplingSettings

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"  # decoded from bytes that are no (complete) character


class TextTokenizer(Protocol):
    """The interface that text generation requires of a tokenizer; ids are [tokens].

    Optional: `eos_token_id` and `stop_token_ids` end a text, `special_tokens` (spelling → id) are not shown,
    `encode_prompt` prepends the tokenizer's own beginning, `known_ids` are the only ids that are drawn.
    """

    def encode(self, text: str) -> list[int]: ...

    def decode(self, ids: Sequence[int]) -> str: ...


class TextStream:
    """Iterates once over the pieces of a text as they are generated. Joined, they are the text.

    `prompt` is plain text, before which the tokenizer puts its own beginning, or ids [prompt]. Incomplete characters,
    and text that may begin a stop string, are held back until they are complete. `finish_reason` is None until the end.
    Raises `UserError` for an empty prompt, one that fills the context, and fewer
    than one new token.
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
        if isinstance(prompt, str):
            encode = getattr(tokenizer, "encode_prompt", None)
            prompt = encode(prompt) if encode else [*_document_start(tokenizer), *tokenizer.encode(prompt)]
        stop_ids = {*getattr(tokenizer, "stop_token_ids", ()), *_document_start(tokenizer)}
        self._hidden = {*stop_ids, *getattr(tokenizer, "special_tokens", {}).values()}
        self._stops = StopStrings(stop)
        before = [token for token in prompt[-1:] if token not in self._hidden]
        self._characters = WholeCharacters(tokenizer.decode, before)
        self._ids = IdStream(
            decoder,
            prompt,
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


def _document_start(tokenizer: TextTokenizer) -> list[int]:
    eos_token_id = getattr(tokenizer, "eos_token_id", None)
    return [] if eos_token_id is None else [eos_token_id]


class WholeCharacters:
    """Decodes token ids one by one; bytes of an incomplete character are held back.

    `decode` maps ids [tokens] to text. A token is decoded together with the one before it, because many vocabularies
    drop the space before the first decoded token. `before`: the last ids of the preceding text.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str], before: Sequence[int] = ()) -> None:
        self._decode = decode
        self._window = list(before)  # the last token of the returned text, and those not returned in full
        self._shown = len(decode(self._window))  # in characters of the window's text

    def add(self, token: int) -> str:
        """The text completed by one more token; may be empty."""
        self._window.append(token)
        text = self._decode(self._window)
        if text.endswith(REPLACEMENT):  # may be an incomplete character: one U+FFFD per byte
            incomplete = min(3, len(text) - len(text.rstrip(REPLACEMENT)))
            piece = text[self._shown : len(text) - incomplete]
            self._shown += len(piece)
        else:
            piece = text[self._shown :]
            self._window, self._shown = [token], len(self._decode([token]))
        return piece

    def rest(self) -> str:
        """The text held back so far, for the end of the sequence."""
        return self._decode(self._window)[self._shown :]


class StopStrings:
    """Finds the stop string that is complete first, independent of how the text is split into pieces.

    Raises `UserError` for one string instead of several.
    """

    def __init__(self, strings: Sequence[str]) -> None:
        if isinstance(strings, str):
            raise UserError(f"expected a list of stop strings, found the string {strings!r}: put it into a list")
        self._strings = [string for string in strings if string]

    def find(self, text: str) -> int | None:
        """The index at which the text has to end; None without a stop string."""
        found = [(start + len(string), start) for string in self._strings if (start := text.find(string)) >= 0]
        return min(found)[1] if found else None

    def may_begin(self, text: str) -> int:
        """How many of the last characters of `text` may begin a stop string."""
        beginnings = (string[:length] for string in self._strings for length in range(1, len(string)))
        return max((len(beginning) for beginning in beginnings if text.endswith(beginning)), default=0)
