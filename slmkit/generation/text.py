"""Text of generated tokens, without incomplete characters, stop tokens and stop strings."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache
from typing import Protocol

from slmkit.config import UserError, kind_of_value

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"  # decoded from bytes that are no (complete) character
LONGEST_STOP, MOST_STOPS = 1_024, 64  # characters, strings: they are searched for after each token
# Of tokens that never become a character the first and last are kept: with one before them, the four bytes that
# decide whether a tokenizer decodes such a run at all; the nine bytes of three U+FFFD, and three of a cut character.
FIRST, LAST = 5, 12


class TextTokenizer(Protocol):
    """The interface that text generation requires of a tokenizer; ids are [tokens].

    Optional: `eos_token_id` and `stop_token_ids` end a text, `special_tokens` (spelling → id) are not shown,
    `encode_prompt` prepends the tokenizer's own beginning, `known_ids` are the only ids that are drawn.
    """

    def encode(self, text: str) -> list[int]: ...

    def decode(self, ids: Sequence[int]) -> str: ...


class Spelling:
    """What the tails of many texts of one tokenizer share: hidden ids, and the latest results of `decode`, since the
    same few tokens follow each other again and again.
    """

    def __init__(self, tokenizer: TextTokenizer) -> None:
        self.hidden = {*end_tokens(tokenizer), *getattr(tokenizer, "special_tokens", {}).values()}
        self._decoded = lru_cache(maxsize=16_384)(lambda ids: tokenizer.decode([*ids]))

    def decode(self, ids: Sequence[int]) -> str:
        return self._decoded(tuple(ids))


class TextTail:
    """Decodes the tokens of one text, and holds back what is not certain yet: incomplete characters, and text that may
    begin a stop string. End tokens and other special ones are not shown.
    """

    def __init__(self, spelling: Spelling, prompt: Sequence[int], stop: Sequence[str] = ()) -> None:
        self._hidden, self._held, self._stops = spelling.hidden, "", StopStrings(stop)
        before = [token for token in prompt[-1:] if token not in self._hidden]
        self._characters = WholeCharacters(spelling.decode, before)

    def add(self, token: int, is_last: bool) -> tuple[str, bool]:
        """The text completed by one more token, and whether a stop string ends it."""
        self._held += "" if token in self._hidden else self._characters.add(token)
        if is_last:
            self._held += self._characters.rest()
        end = self._stops.find(self._held)
        if end is not None:
            return self._held[:end], True
        ready = len(self._held) - (0 if is_last else self._stops.may_begin(self._held))
        text, self._held = self._held[:ready], self._held[ready:]
        return text, False


def end_tokens(tokenizer: TextTokenizer) -> set[int]:
    """The ids that end a text."""
    return {*getattr(tokenizer, "stop_token_ids", ()), *_document_start(tokenizer)}


def prompt_ids(tokenizer: TextTokenizer, text: str) -> list[int]:
    """The ids [prompt] of a text, with the tokenizer's own beginning."""
    encode = getattr(tokenizer, "encode_prompt", None)
    return encode(text) if encode else [*_document_start(tokenizer), *tokenizer.encode(text)]


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
            if len(self._window) > FIRST + LAST:
                del self._window[FIRST:-LAST]
                self._shown = len(self._decode(self._window)) - incomplete
        else:
            piece = text[self._shown :]
            self._window, self._shown = [token], len(self._decode([token]))
        return piece

    def rest(self) -> str:
        """The text held back so far, for the end of the sequence."""
        return self._decode(self._window)[self._shown :]


class StopStrings:
    """Finds the stop string that is complete first, independent of how the text is split into pieces.

    Raises `UserError` for what is no list of strings, for more than `MOST_STOPS`, and for one longer than
    `LONGEST_STOP`.
    """

    def __init__(self, strings: Sequence[str]) -> None:
        if isinstance(strings, str) or not isinstance(strings, Iterable):
            raise UserError(f"expected a list of stop strings, such as ['END'], found {str(strings)[:80]!r}")
        self._strings = list(strings)
        for string in self._strings:
            if not isinstance(string, str) or len(string) > LONGEST_STOP:
                found = f"{len(string):,}" if isinstance(string, str) else kind_of_value(string)
                raise UserError(f"a stop string: expected text of at most {LONGEST_STOP:,} characters, found {found}")
        if len(self._strings) > MOST_STOPS:
            raise UserError(f"{len(self._strings):,} stop strings: at most {MOST_STOPS} are allowed")
        self._strings = [string for string in self._strings if string]

    def find(self, text: str) -> int | None:
        """The index at which the text has to end; None without a stop string."""
        found = [(start + len(string), start) for string in self._strings if (start := text.find(string)) >= 0]
        return min(found)[1] if found else None

    def may_begin(self, text: str) -> int:
        """How many of the last characters of `text` may begin a stop string."""
        return max((_beginning_at_end(string, text) for string in self._strings), default=0)


def _beginning_at_end(string: str, text: str) -> int:
    """The length of the longest beginning of `string`, not all of it, with which `text` ends."""
    start = max(0, len(text) - len(string) + 1)
    while (start := text.find(string[0], start)) >= 0:
        if string.startswith(text[start:]):
            return len(text) - start
        start += 1
    return 0
