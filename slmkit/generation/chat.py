"""A conversation with a model: history in, the next answer out."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Generator
from pathlib import Path
from typing import Any

from slmkit.config import UserError
from slmkit.generation.generator import FinishReason
from slmkit.generation.language_model import LanguageModel
from slmkit.generation.sampling_settings import SamplingSettings
from slmkit.generation.text import TextStream
from slmkit.tokenizer import SLMTokenizer
from slmkit.tokenizer.chat import check_messages

Messages = list[dict[str, str]]


class ChatSession:
    """Keeps the messages of a conversation and streams the model's answers.

    When history and answer outgrow the context, the oldest exchanges are forgotten (`forgotten` counts their messages),
    the system message never.
    """

    def __init__(
        self,
        decoder: LanguageModel,
        tokenizer: SLMTokenizer,
        settings: SamplingSettings,
        system: str | None = None,
        max_new_tokens: int = 300,
    ) -> None:
        self.decoder, self.tokenizer, self.settings = decoder, tokenizer, settings
        self.max_new_tokens = max_new_tokens
        self.messages: Messages = [{"role": "system", "content": system}] if system else []
        self.forgotten = 0
        self.finish_reason: FinishReason | None = None  # of the last answer; None where it was stopped

    def reset(self) -> None:
        """Forget everything but the system message."""
        self.messages, self.forgotten = _beginning(self.messages), 0

    def reply(self, text: str) -> Generator[str, None, None]:
        """Stream the answer to `text`. What was said of it by the time the stream ends or is closed is remembered.

        Raises `UserError` for a message that leaves no room for an answer; nothing is remembered or forgotten then.
        """
        messages, prompt = self._that_fit([*self.messages, {"role": "user", "content": text}])
        stream = TextStream(
            self.decoder, self.tokenizer, prompt, settings=self.settings, max_new_tokens=self.max_new_tokens
        )
        self.forgotten += len(self.messages) + 1 - len(messages)
        self.messages, self.finish_reason = messages, None
        said: list[str] = []
        try:
            for piece in stream:
                said.append(piece)
                yield piece
        finally:
            self.finish_reason = stream.finish_reason
            answer = "".join(said).strip()
            if answer:
                self.messages.append({"role": "assistant", "content": answer})
            else:
                self.messages.pop()  # nothing was said: the template has no empty turns

    def _that_fit(self, messages: Messages) -> tuple[Messages, list[int]]:
        """The messages without the oldest exchanges, as few as leave room for an answer, and their tokens."""
        context = self.decoder.max_positions
        # A quarter of the context at least: room for all of a long `max_new_tokens` would leave none for the history.
        room = max(1, min(self.max_new_tokens, context // 4))
        beginning = _beginning(messages)
        ids: list[int] = []
        for oldest in range(len(beginning), len(messages), 2):
            kept = beginning + messages[oldest:]
            ids = self.tokenizer.encode_chat(kept, add_generation_prompt=True).ids
            if len(ids) + room <= context:
                return kept, ids
        what = "a shorter message or system message" if beginning else "a shorter message"
        raise UserError(f"{len(ids)} tokens leave no room for an answer in a context of {context}: write {what}")

    def save(self, path: str | Path) -> None:
        """Write the conversation as JSON (`{"messages": […]}`), on one line, as fine-tuning reads it.

        Raises `UserError` where it cannot be written; what stood there before stays then.
        """
        path = Path(path)
        fresh = path.parent / f".{path.name}.tmp"
        line = json.dumps({"messages": self.messages}, ensure_ascii=False) + "\n"
        try:
            fresh.write_bytes(line.encode("utf-8", "replace"))  # a terminal may hand over halves of surrogate pairs
            os.replace(fresh, path)
        except (OSError, ValueError) as error:
            with contextlib.suppress(OSError, ValueError):
                fresh.unlink()
            raise UserError(f"{path}: the conversation cannot be saved: {error}") from None

    def load(self, path: str | Path) -> None:
        """Go on with a conversation that was saved, its system message included.

        Raises `UserError` for a file that is missing or holds anything else; the present conversation stays then.
        """
        try:
            content = json.loads(Path(path).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise UserError(f"{path}: not a saved conversation: {error}") from None
        self.messages, self.forgotten = _checked(content, path), 0


def _beginning(messages: Messages) -> Messages:
    """The system message, where there is one."""
    return [message for message in messages[:1] if message["role"] == "system"]


def _checked(content: Any, path: str | Path) -> Messages:
    """The messages in a saved file, when they are exchanges that all have their answer."""
    messages = content.get("messages") if isinstance(content, dict) else None
    if not isinstance(messages, list):
        raise UserError(f'{path}: not a saved conversation: expected {{"messages": […]}}')
    try:
        # As if one more were asked: so that a conversation may be empty, but not end with an unanswered message.
        check_messages([*messages, {"role": "user", "content": ""}], add_generation_prompt=True)
    except UserError as error:
        raise UserError(f"{path}: not a saved conversation: {error}") from None
    return messages
