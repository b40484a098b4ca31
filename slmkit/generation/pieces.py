"""What may be shown of a text that is still being written: whole characters, and nothing of a stop string."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from slmkit.config import UserError

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"  # what decoding makes of bytes that are no character, or not yet


class WholeCharacters:
    """Token ids in, the text they add out; bytes of a character that is not complete are held back.

    All it needs of a tokenizer is `decode`. A token is decoded together with the one before it, because many
    vocabularies drop the space in front of what they decode first. `before` is the end of what was written already.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str], before: Sequence[int] = ()) -> None:
        self._decode = decode
        self._window = list(before)  # the last token of what was shown, and those not shown in full
        self._shown = len(decode(self._window))  # in characters of the window's text

    def add(self, token: int) -> str:
        """What one more token makes certain; often a word, sometimes nothing."""
        self._window.append(token)
        text = self._decode(self._window)
        if text.endswith(REPLACEMENT):  # perhaps a character whose other bytes are still to come: one for each byte
            incomplete = min(3, len(text) - len(text.rstrip(REPLACEMENT)))
            piece = text[self._shown : len(text) - incomplete]
            self._shown += len(piece)
        else:
            piece = text[self._shown :]
            self._window, self._shown = [token], len(self._decode([token]))
        return piece

    def rest(self) -> str:
        """What was held back, when nothing more will come."""
        return self._decode(self._window)[self._shown :]


class StopStrings:
    """Finds the stop string that is complete first. Where it ends does not depend on the pieces a text comes in.

    Raises `UserError` for one string instead of several.
    """

    def __init__(self, strings: Sequence[str]) -> None:
        if isinstance(strings, str):
            raise UserError(f"expected a list of stop strings, found the string {strings!r}: put it into a list")
        self._strings = [string for string in strings if string]

    def find(self, text: str) -> int | None:
        """Where the text has to end; None where no stop string is in it."""
        found = [(start + len(string), start) for string in self._strings if (start := text.find(string)) >= 0]
        return min(found)[1] if found else None

    def may_begin(self, text: str) -> int:
        """How many of the last characters of `text` may be the beginning of a stop string."""
        beginnings = (string[:length] for string in self._strings for length in range(1, len(string)))
        return max((len(beginning) for beginning in beginnings if text.endswith(beginning)), default=0)
