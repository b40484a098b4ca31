"""A conversation with a model: history in, the next answer out."""

from __future__ import annotations

import json
import os
from collections.abc import Generator
from pathlib import Path

from slmkit.config import UserError
from slmkit.generation.sampling import SamplingSettings
from slmkit.generation.text import TextStream
from slmkit.model import Decoder
from slmkit.tokenizer import SLMTokenizer


class ChatSession:
    """Keeps the messages of a conversation and streams the model's answers.

    When history and answer outgrow the context, the oldest exchanges are forgotten (`forgotten` counts their messages),
    the system message never.
    """

    def __init__(
        self,
        decoder: Decoder,
        tokenizer: SLMTokenizer,
        settings: SamplingSettings,
        system: str | None = None,
        max_new_tokens: int = 300,
    ) -> None:
        self.decoder, self.tokenizer, self.settings = decoder, tokenizer, settings
        self.max_new_tokens = max_new_tokens
        self._beginning = [{"role": "system", "content": system}] if system else []
        self.reset()

    def reset(self) -> None:
        """Forget everything but the system message."""
        self.messages: list[dict[str, str]] = list(self._beginning)
        self.forgotten = 0

    def reply(self, text: str) -> Generator[str, None, None]:
        """Stream the answer to `text`. What was said of it by the time the stream ends or is closed is remembered.

        Raises `UserError` for a message that leaves no room for an answer; it is not remembered.
        """
        self.messages.append({"role": "user", "content": text})
        try:
            prompt = self._prompt_that_fits()
        except UserError:
            self.messages.pop()
            raise
        said: list[str] = []
        stream = TextStream(self.decoder, self.tokenizer, prompt, self.settings, self.max_new_tokens)
        try:
            for piece in stream:
                said.append(piece)
                yield piece
        finally:
            answer = "".join(said).strip()
            if answer:
                self.messages.append({"role": "assistant", "content": answer})
            else:
                self.messages.pop()  # nothing was said: the template has no empty turns

    def _prompt_that_fits(self) -> list[int]:
        """The tokens of the history, its oldest exchanges left out until there is room for an answer."""
        context = self.decoder.architecture.max_positions
        room = min(self.max_new_tokens, context // 4)  # an answer should have a quarter of the context at least
        while True:
            ids = self.tokenizer.encode_chat(self.messages, add_generation_prompt=True).ids
            if len(ids) + room <= context:
                return ids
            oldest = len(self._beginning)
            if len(self.messages) <= oldest + 1:
                raise UserError(
                    f"{len(ids)} tokens leave no room for an answer in a context of {context}: write a shorter message"
                )
            del self.messages[oldest : oldest + 2]
            self.forgotten += 2

    def save(self, path: str | Path) -> None:
        """Write the conversation as JSON (`{"messages": […]}`), as fine-tuning reads it."""
        path = Path(path)
        fresh = path.with_name(f".{path.name}.tmp")
        try:
            fresh.write_text(json.dumps({"messages": self.messages}, ensure_ascii=False) + "\n", encoding="utf-8")
            os.replace(fresh, path)
        except OSError as error:
            fresh.unlink(missing_ok=True)
            raise UserError(f"{path}: the conversation cannot be saved: {error}") from None
